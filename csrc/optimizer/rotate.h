// Moving low-rank moments to a new basis.
#pragma once

#include <ATen/core/Tensor.h>

namespace galore_rrf {

// With S = Q_new^T Q_old (r_new x r_old) and moments in the form r x l:
//   m <- S m,   v <- |S^2 (v - m^2) + (S m)^2|   (S^2 entrywise, m and v bias-corrected),
// the mean and variance of the rotated gradient where its old components are uncorrelated (LDAdam,
// Robert et al. 2024).  `out_*` may be the inputs themselves; works by tiles of the long side.
void rotate_moments_out(const at::Tensor& out_exp_avg, const at::Tensor& out_exp_avg_sq,
                        const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& s,
                        double bias_correction1, double bias_correction2);

}  // namespace galore_rrf
