// Moving low-rank moments to a new basis.
#pragma once

#include <ATen/core/Tensor.h>

namespace galore_rrf {

// With S = Q_new^T Q_old (r x r) and moments in the form r x l, B of them:
//   m <- S m,   v <- |S^2 (v - m^2) + (S m)^2|   (S^2 entrywise, m and v bias-corrected by `corrections`,
// fp64 [B, 2]), the mean and variance of the rotated gradient where its old components are uncorrelated
// (LDAdam, Robert et al. 2024).  `out_*` (B x r_new x l) may be the inputs themselves; every matrix has one
// stride of 1.  Works by tiles of the long side.
void rotate_moments_out(const at::Tensor& out_exp_avg, const at::Tensor& out_exp_avg_sq,
                        const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& s,
                        const at::Tensor& corrections);

}  // namespace galore_rrf
