// The fixed-rank randomized range finder (Halko, Martinsson, Tropp 2011, algorithms 4.1 and 4.4)
// with half power steps and warm starts.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "range_finder/product.h"
#include "range_finder/types.h"

namespace galore_rrf {

struct FixedRankOptions {
  int64_t rank;
  int64_t oversampling = 0;  // columns sketched beyond the rank and trimmed off again
  Sketch sketch = Sketch::half_power;
  int64_t power = 1;     // full power steps of Sketch::power
  bool ordered = false;  // columns by descending energy; always so with oversampling
  Panel panel = Panel::householder;
  bool measured = false;  // whether the residuals are wanted, which needs the coefficients
  // Nobody waits for the device: what depends on the entries is decided there.  Else a matrix is scaled only
  // where its sketch asks for it, which on a CPU costs nothing to know.
  bool asynchronous = false;
};

struct FixedRankResult {
  // B x m x rank, in the compute dtype; nothing in particular where the status is not converged, undefined
  // where that is so of all and known.
  at::Tensor basis;
  at::Tensor status;              // uint8 [B]: converged, or zero or nonfinite
  std::vector<double> residuals;  // ||a - Q B||_F / ||a||_F where measured, NaN where there is no basis
};

// Finds orthonormal bases Q of nearly the ranges of B matrices `a` (m x n each).  `warm`: the previous bases
// (m x any), for Sketch::warm.  `coefficients` (B x rank x n, compute dtype, every matrix dense, perhaps
// transposed): receives Q^T a where defined, and where the status is converged.  `warm_products` (B x n x as
// many as `warm`): a^T warm where that is known already.
FixedRankResult fixed_rank_range_finder(const Matrices& a, const FixedRankOptions& options,
                                        const std::vector<SketchKey>& keys, const Matrices& warm,
                                        const at::Tensor& coefficients, const at::Tensor& warm_products = {});

}  // namespace galore_rrf
