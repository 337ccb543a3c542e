// The building blocks of the range finders as operators, each over a matrix or a batch of them.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "ops/checks.h"
#include "ops/ops.h"
#include "range_finder/block_reflector.h"
#include "range_finder/orthonormal.h"
#include "range_finder/product.h"
#include "range_finder/svd.h"

namespace galore_rrf {
namespace {

// A panel in the compute dtype and column-major, as LAPACK wants it.
at::Tensor as_panel(const at::Tensor& a) { return a.mT().to(compute_dtype(a)).contiguous().mT(); }

at::Tensor buffer(const Batch& batch, int64_t rows, int64_t cols) {
  return at::empty({batch.count(), cols, rows}, batch.matrices.options().dtype(compute_dtype(batch.matrices)))
      .mT();
}

void check_tall(const char* op, const at::Tensor& a) {
  check_matrix(op, a);
  TORCH_CHECK_VALUE(a.size(-2) >= a.size(-1), op, " expects at least as many rows as columns, got shape ",
                    a.sizes());
}

// A basis of no columns, which is what a range finder finds where nothing is asked for, is one.
void check_basis(const char* op, const at::Tensor& a) {
  if (a.dim() < 2 || a.size(-1) > 0) check_tall(op, a);
}

void check_reflector(const char* op, const at::Tensor& v, const at::Tensor& t) {
  check_basis(op, v);
  auto square = v.sizes().vec();
  square[square.size() - 2] = v.size(-1);
  TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(square), "Invalid t: shape ", t.sizes(), " (must be ",
                    at::IntArrayRef(square), " for v of shape ", v.sizes(), ")");
  TORCH_CHECK_TYPE(t.scalar_type() == v.scalar_type() && compute_dtype(v) == v.scalar_type(),
                   "v and t must both be float32 or both float64, got ", v.scalar_type(), " and ",
                   t.scalar_type());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> panel_qr_op(const at::Tensor& panel, c10::string_view method) {
  const ExactScope scope(panel);
  check_matrix("panel_qr", panel);
  const Panel how = panel_from_name(text(method), "method");
  const Batch batch(panel);
  const int64_t p = panel.size(-2), w = panel.size(-1), k = std::min(p, w);
  const at::Tensor v = buffer(batch, p, k), t = buffer(batch, k, k), r = buffer(batch, k, w);
  batch.for_each([&](int64_t i) {
    const auto [h, upper] = panel_qr(as_panel(batch.matrices.select(0, i)), how);
    v.select(0, i).copy_(h.v);
    t.select(0, i).copy_(h.t);
    r.select(0, i).copy_(upper);
  });
  return {v.view(batch.shape({p, k})), t.view(batch.shape({k, k})), r.view(batch.shape({k, w}))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> orthonormal_panel_op(const at::Tensor& panel,
                                                                    c10::string_view method) {
  const ExactScope scope(panel);
  check_matrix("orthonormal_panel", panel);
  const Panel how = panel_from_name(text(method), "method");
  const Batch batch(panel);
  const int64_t p = panel.size(-2), w = panel.size(-1), k = std::min(p, w);
  const at::Tensor q = buffer(batch, p, k), r = buffer(batch, k, w);
  const at::Tensor fell_back = at::zeros({batch.count()}, panel.options().dtype(at::kBool));
  batch.for_each([&](int64_t i) {
    const PanelQR found = orthonormal_panel(as_panel(batch.matrices.select(0, i)), how);
    q.select(0, i).copy_(found.q);
    r.select(0, i).copy_(found.r);
    fell_back.select(0, i).fill_(found.method != how);
  });
  return {q.view(batch.shape({p, k})), r.view(batch.shape({k, w})), fell_back.view(batch.dims)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> householder_reconstruction_op(const at::Tensor& q) {
  const ExactScope scope(q);
  check_tall("householder_reconstruction", q);
  const Batch batch(q);
  const int64_t p = q.size(-2), w = q.size(-1);
  const at::Tensor v = buffer(batch, p, w), t = buffer(batch, w, w);
  const at::Tensor signs = at::empty({batch.count(), w}, v.options());
  batch.for_each([&](int64_t i) {
    const auto [h, sign] = householder_reconstruction(as_panel(batch.matrices.select(0, i)));
    v.select(0, i).copy_(h.v);
    t.select(0, i).copy_(h.t);
    signs.select(0, i).copy_(sign);
  });
  return {v.view(batch.shape({p, w})), t.view(batch.shape({w, w})), signs.view(batch.shape({w}))};
}

at::Tensor apply_block_reflector_op(const at::Tensor& v, const at::Tensor& t, const at::Tensor& a,
                                    bool transpose) {
  const ExactScope scope(a);
  check_reflector("apply_block_reflector", v, t);
  TORCH_CHECK_VALUE(a.dim() == v.dim() && a.size(-2) == v.size(-2) &&
                        a.sizes().slice(0, a.dim() - 2) == v.sizes().slice(0, v.dim() - 2) &&
                        a.scalar_type() == v.scalar_type() && a.device() == v.device(),
                    "Invalid a: ", a.sizes(), " ", a.scalar_type(), " on ", a.device(),
                    " (must have the rows, dtype and device of v, ", v.sizes(), " ", v.scalar_type(), " on ",
                    v.device(), ")");
  const at::Tensor result = a.clone(at::MemoryFormat::Contiguous);
  const Batch vs(v), ts(t), as(result);
  vs.for_each([&](int64_t i) {
    apply_block_reflector_({vs.matrices.select(0, i), ts.matrices.select(0, i)}, as.matrices.select(0, i),
                           transpose);
  });
  return result;
}

at::Tensor explicit_basis_op(const at::Tensor& v, const at::Tensor& t) {
  const ExactScope scope(v);
  check_reflector("explicit_basis", v, t);
  const Batch vs(v), ts(t);
  const at::Tensor q = buffer(vs, v.size(-2), v.size(-1));
  vs.for_each([&](int64_t i) {
    q.select(0, i).copy_(explicit_basis({vs.matrices.select(0, i), ts.matrices.select(0, i)}, v.size(-1)));
  });
  return q.view(vs.shape({v.size(-2), v.size(-1)}));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> svd_of_product_op(const at::Tensor& basis,
                                                                 const at::Tensor& coefficients) {
  const ExactScope scope(basis);
  check_basis("svd_of_product", basis);
  TORCH_CHECK_VALUE(
      coefficients.dim() == basis.dim() && coefficients.size(-2) == basis.size(-1) &&
          coefficients.size(-1) >= coefficients.size(-2) &&
          coefficients.scalar_type() == basis.scalar_type() && basis.scalar_type() == compute_dtype(basis) &&
          coefficients.sizes().slice(0, basis.dim() - 2) == basis.sizes().slice(0, basis.dim() - 2),
      "Invalid coefficients: ", coefficients.sizes(), " ", coefficients.scalar_type(),
      " (must have a row for each column of basis, at least as many columns, and its dtype, "
      "float32 or float64: ",
      basis.sizes(), " ", basis.scalar_type(), ")");
  const Batch qs(basis), bs(coefficients);
  const int64_t m = basis.size(-2), r = basis.size(-1), n = coefficients.size(-1);
  const at::Tensor u = buffer(qs, m, r), v = buffer(qs, n, r);
  const at::Tensor s = at::empty({qs.count(), r}, u.options());
  qs.for_each([&](int64_t i) {
    if (r == 0) return;
    const Svd svd = svd_of_product(qs.matrices.select(0, i), bs.matrices.select(0, i));
    u.select(0, i).copy_(svd.u);
    s.select(0, i).copy_(svd.s);
    v.select(0, i).copy_(svd.v);
  });
  return {u.view(qs.shape({m, r})), s.view(qs.shape({r})), v.view(qs.shape({n, r}))};
}

}  // namespace galore_rrf
