// The residual's step of Fira (Chen et al. 2024): its columns' scales, and the limit of its growth.
#pragma once

#include <ATen/core/Tensor.h>

#include "range_finder/product.h"

namespace galore_rrf {

// directions: N without lengths, projected: R, both B x r x l; `norms` (fp32 scalars) keep the norm of the
// last residual step, 0: none yet, beyond 1.01 of which the next does not go, and stay where not `moving`
// (bool [B]).
// Returns the scales of the columns of E, B x l, 0 where a matrix is left alone: `lengths` (fp64 [B]) times
// phi_j = ||N_j|| / ||R_j||, limited.
at::Tensor limited_scales(const Matrices& grads, const at::Tensor& directions, const at::Tensor& projected,
                          const at::Tensor& lengths, const Matrices& norms, const at::Tensor& moving);

}  // namespace galore_rrf
