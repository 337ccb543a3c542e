// The fixed-rank randomized range finder (Halko, Martinsson, Tropp 2011, algorithms 4.1 and 4.4)
// with half power steps and warm starts.
#pragma once

#include <ATen/core/Tensor.h>

#include "range_finder/types.h"

namespace galore_rrf {

struct FixedRankOptions {
  int64_t rank;
  int64_t oversampling = 0;  // columns sketched beyond the rank and trimmed off again
  Sketch sketch = Sketch::half_power;
  int64_t power = 1;     // full power steps of Sketch::power
  bool ordered = false;  // columns by descending energy; always so with oversampling
  Panel panel = Panel::householder;
  bool measured = false;  // whether the residual is wanted, which needs the coefficients
  SketchKey key{};
};

struct FixedRankResult {
  Status status;     // converged, or zero or nonfinite: then there is no basis and nothing was written
  at::Tensor basis;  // m x rank, in the compute dtype
  double residual;   // ||a - Q B||_F / ||a||_F where measured, else NaN; 0 of a zero matrix
};

// Finds an orthonormal basis Q of nearly the range of `a` (m x n).  `warm`: the previous basis
// (m x any), for Sketch::warm.  `coefficients` (rank x n, compute dtype, may be a transposed view):
// receives Q^T a where defined.
FixedRankResult fixed_rank_range_finder(const at::Tensor& a, const FixedRankOptions& options,
                                        const at::Tensor& warm, const at::Tensor& coefficients);

}  // namespace galore_rrf
