#include "range_finder/block_reflector.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/geqrf.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "kernels.h"
#include "range_finder/orthonormal.h"
#include "range_finder/product.h"

namespace galore_rrf {

at::Tensor triangular_factor(const at::Tensor& v) {
  const at::Tensor products = v.mT().matmul(v);
  // H is orthogonal as far as T^-1 has the squared lengths of v: these are summed in fp64, by cascade.
  products.diagonal().copy_(v.to(at::kDouble).square().sum(0));
  const at::Tensor idle = products.diagonal().eq(0);
  at::Tensor inverse = products.triu();
  inverse.diagonal().mul_(0.5).masked_fill_(idle, 1);
  const at::Tensor identity = at::eye(v.size(1), v.options());
  const at::Tensor t = at::linalg_solve_triangular(inverse, identity, /*upper=*/true);
  t.diagonal().masked_fill_(idle, 0);
  return t;
}

void signed_lu_(const at::Tensor& q, const at::Tensor& signs) {
  constexpr int64_t kBlock = 64;
  const int64_t width = q.size(1);
  if (width <= kBlock) return kernels_for(q).signed_lu(q, signs);  // a panel's, without a copy
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t end = std::min(start + kBlock, width), size = end - start, rest = width - end;
    const at::Tensor columns = q.narrow(2, start, size), rows = q.narrow(1, start, size);
    const at::Tensor block = columns.narrow(1, start, size).clone(at::MemoryFormat::Contiguous);
    const at::Tensor of_block = at::empty({q.size(0), size}, signs.options());
    kernels_for(q).signed_lu(block, of_block);
    columns.mul_(of_block.unsqueeze(1));
    columns.narrow(1, start, size).copy_(block);
    signs.narrow(1, start, size).copy_(of_block);
    if (rest == 0) return;
    const at::Tensor below = columns.narrow(1, end, rest), right = rows.narrow(2, end, rest);
    below.copy_(at::linalg_solve_triangular(block, below, /*upper=*/true, /*left=*/false));
    right.copy_(at::linalg_solve_triangular(block, right, /*upper=*/false, /*left=*/true,
                                            /*unitriangular=*/true));
    subtract_products_(q.narrow(1, end, rest).narrow(2, end, rest), below, right);
  }
}

Reconstruction householder_reconstruction(const at::Tensor& q) {
  const int64_t width = q.size(1);
  const at::Tensor v = at::empty({width, q.size(0)}, q.options()).mT();
  const at::Tensor top = q.narrow(0, 0, width).clone(at::MemoryFormat::Contiguous);
  const at::Tensor signs = at::empty({width}, q.options());
  signed_lu_(top.unsqueeze(0), signs.unsqueeze(0));
  v.narrow(0, 0, width).copy_(top.tril(-1)).diagonal().fill_(1);
  if (q.size(0) > width) {
    const at::Tensor rest = q.narrow(0, width, q.size(0) - width).mul(signs);
    v.narrow(0, width, q.size(0) - width)
        .copy_(at::linalg_solve_triangular(top.triu(), rest, /*upper=*/true, /*left=*/false));
  }
  return {{v, triangular_factor(v)}, signs};
}

ReflectedPanel panel_qr(const at::Tensor& panel, Panel method) {
  const int64_t width = std::min(panel.size(0), panel.size(1));
  const bool by_reflectors = method == Panel::householder || method == Panel::automatic;
  if (!by_reflectors && width == panel.size(1)) {
    const auto explicit_qr = method == Panel::cholesky_qr ? cholesky_qr(panel) : gram_schmidt_qr(panel);
    if (explicit_qr) {
      const auto [h, signs] = householder_reconstruction(explicit_qr->q);
      return {h, explicit_qr->r.mul(signs.unsqueeze(1))};
    }
  }
  const auto [factored, tau] = at::geqrf(panel);
  const at::Tensor r = factored.narrow(0, 0, width).triu();
  const at::Tensor v = factored.narrow(1, 0, width).tril_(-1);
  v.diagonal().fill_(1);
  v.masked_fill_(tau.eq(0), 0);  // LAPACK's H = I
  return {{v, triangular_factor(v)}, r};
}

void apply_block_reflector_(const BlockReflector& h, const at::Tensor& a, bool transpose) {
  const at::Tensor t = transpose ? h.t.mT() : h.t;
  at::Tensor target = a;
  target.addmm_(h.v, t.matmul(h.v.mT().matmul(a)), /*beta=*/1, /*alpha=*/-1);
}

at::Tensor explicit_basis(const BlockReflector& h, int64_t columns) {
  const at::Tensor q = at::empty({columns, h.v.size(0)}, h.v.options()).mT();
  const at::Tensor factor = h.t.matmul(h.v.narrow(0, 0, columns).mT());
  at::Tensor target = q;
  at::mm_out(target, h.v, factor);
  target.neg_().diagonal().add_(1);
  return q;
}

}  // namespace galore_rrf
