#include "range_finder/block_reflector.h"

#include <ATen/ops/diag_embed.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/geqrf.h>
#include <ATen/ops/linalg_solve_triangular.h>

#include <algorithm>

namespace galore_rrf {

BlockReflector panel_qr(const at::Tensor& panel) {
  const auto [factored, tau] = at::geqrf(panel);
  const int64_t width = std::min(panel.size(0), panel.size(1));
  const at::Tensor active = tau.ne(0);
  at::Tensor v = factored.narrow(1, 0, width).tril(-1);
  v.diagonal().fill_(1);
  v.mul_(active);
  const at::Tensor inverse_tau = tau.reciprocal().masked_fill_(active.logical_not(), 1);
  const at::Tensor inverse_t = v.mT().matmul(v).triu_(1).add_(at::diag_embed(inverse_tau));
  const at::Tensor t = at::linalg_solve_triangular(inverse_t, at::eye(width, v.options()), /*upper=*/true);
  return {v, t.mul_(active)};
}

void apply_block_reflector_(const BlockReflector& h, const at::Tensor& a, bool transpose) {
  const at::Tensor t = transpose ? h.t.mT() : h.t;
  at::Tensor target = a;
  target.addmm_(h.v, t.matmul(h.v.mT().matmul(a)), /*beta=*/1, /*alpha=*/-1);
}

}  // namespace galore_rrf
