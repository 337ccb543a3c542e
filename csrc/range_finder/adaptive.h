// The adaptive, blocked randomized range finder on an implicit Householder QR (Penke 2024, corrected).
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "range_finder/types.h"

namespace galore_rrf {

struct AdaptiveOptions {
  double tolerance;
  bool relative = true;
  int64_t block = 64;
  int64_t max_rank;               // at most min(m, n)
  Sketch sketch = Sketch::plain;  // or half_power, of what is left of the matrix
  bool trim = true;
  SketchKey key{};
};

struct AdaptiveResult {
  at::Tensor basis;               // m x rank
  at::Tensor coefficients;        // rank x n
  double residual = 0;            // ||a - Q B||_F / ||a||_F
  std::vector<double> residuals;  // the same after every block, before trimming
  Status status;
  int64_t rank() const { return basis.size(1); }
};

// Tolerances below this multiple of the unit roundoff cannot be told from rounding.
double tolerance_floor(at::ScalarType dtype);

// How many blocks a run over an m x n matrix can take at most.
int64_t max_adaptive_blocks(int64_t m, int64_t n, const AdaptiveOptions& options);

// The smallest basis with ||a - Q Q^T a||_F <= tolerance (times ||a||_F where relative), up to the
// rank cap.  With `trim` one block more is computed and the result cut, in the order of energy, to
// the smallest rank within the tolerance.
AdaptiveResult adaptive_range_finder(const at::Tensor& a, const AdaptiveOptions& options);

}  // namespace galore_rrf
