// Taking an orthonormal basis out of a matrix block by block.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "range_finder/adaptive.h"
#include "range_finder/block_reflector.h"
#include "range_finder/scaling.h"
#include "range_finder/stop_test.h"

namespace galore_rrf {

// What left-looking loses in the difference of squared norms, in units of u ||A||^2; 11 are the most seen.
constexpr double kDifferenceUnits = 16;

// Q (m x rank) and B = Q^T A (rank x n) of a scaled matrix A, growing.
class Blocks {
 public:
  virtual ~Blocks() = default;
  // Adds the blocks that the test wants, each of columns that span nearly the range of what is left; once.
  virtual void grow(StopTest& stop) = 0;
  // Columns so far.
  virtual int64_t rank() const = 0;
  virtual at::Tensor basis() const = 0;
  virtual at::Tensor coefficients() const = 0;
  // The block reflector whose first columns are Q; of Between::householder alone.
  virtual BlockReflector reflector() const = 0;
  // By how much ||A - Q B||_F^2 may be larger than was measured.
  virtual double uncertainty() const { return 0; }
};

// A row-major copy in the compute dtype, so that trailing rows are one piece.
at::Tensor computing_copy(const ScaledMatrix& matrix);

// Right-looking: what is left is a copy of A from which every block is taken out, and its norm is exact.
// Left-looking: A is only read, and what is left is the difference of squared norms.
std::unique_ptr<Blocks> make_blocks(const ScaledMatrix& matrix, const AdaptiveOptions& options,
                                    int64_t columns, Method method);

// Whether they are found with look-ahead: where that was asked for, or pays.
bool looks_ahead(const at::Tensor& a, const AdaptiveOptions& options, Method method);

}  // namespace galore_rrf
