#include "range_finder/orthonormal.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/geqrf.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_householder_product.h>
#include <ATen/ops/linalg_lu_factor_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "kernels.h"

namespace galore_rrf {
namespace {

// R of the Cholesky factorisation R^T R of a^T a, in fp64; undefined where a column keeps less than the
// share `least` of its squared length when those before it are taken out.
at::Tensor cholesky_factor(const at::Tensor& a, double least) {
  const at::Tensor products = gram(a);
  const auto [factor, info] = at::linalg_cholesky_ex(products, /*upper=*/true);
  const at::Tensor squares = factor.diagonal().square().div_(products.diagonal());
  const bool definite = info.item<int>() == 0 && squares.min().item<double>() > least;  // false for NaN
  return definite ? factor : at::Tensor();
}

at::Tensor divided_by(const at::Tensor& panel, const at::Tensor& r) {
  return at::linalg_solve_triangular(r, panel, /*upper=*/true, /*left=*/false);
}

}  // namespace

PanelQR householder_qr(const at::Tensor& panel) {
  const auto [reflectors, tau] = at::geqrf(panel);
  const int64_t width = std::min(panel.size(0), panel.size(1));
  return {at::linalg_householder_product(reflectors.narrow(1, 0, width), tau),
          reflectors.narrow(0, 0, width).triu(), Panel::householder};
}

std::optional<PanelQR> cholesky_qr(const at::Tensor& panel) {
  if (panel.size(0) < panel.size(1)) return std::nullopt;
  const at::Tensor first = cholesky_factor(panel, 0x1p-46);  // condition numbers to about 10^7
  if (!first.defined()) return std::nullopt;
  const at::Tensor nearly = divided_by(panel, first.to(panel.scalar_type()));
  const at::Tensor second = cholesky_factor(nearly, 0.5);
  if (!second.defined()) return std::nullopt;
  return PanelQR{divided_by(nearly, second.to(panel.scalar_type())),
                 second.matmul(first).to(panel.scalar_type()), Panel::cholesky_qr};
}

std::optional<PanelQR> gram_schmidt_qr(const at::Tensor& panel) {
  // The reciprocals of shorter columns overflow, or in fp64 squares vanish; those of longer ones likewise.
  const double longest = panel.scalar_type() == at::kDouble ? 1e140 : 1e36;
  const int64_t width = panel.size(1);
  if (panel.size(0) < width) return std::nullopt;
  const at::Tensor q = panel.mT().clone(at::MemoryFormat::Contiguous).mT();
  const at::Tensor r = at::zeros({width, width}, panel.options());
  for (int64_t j = 0; j < width; ++j) {
    const at::Tensor column = q.select(1, j), before = q.narrow(1, 0, j);
    double lengths[2];
    for (double& length : lengths) {
      const at::Tensor along = before.mT().mv(column);
      column.sub_(before.mv(along));
      r.select(1, j).narrow(0, 0, j).add_(along);
      length = at::linalg_vector_norm(column, 2, std::nullopt, false, at::kDouble).item<double>();
    }
    if (!(lengths[1] > 1 / longest && lengths[1] < longest)) return std::nullopt;
    // Twice is enough, unless the second time took away what the first had left: then that was rounding.
    if (!(lengths[1] > 0.5 * lengths[0])) return std::nullopt;
    column.div_(lengths[1]);
    r.select(0, j).select(0, j).fill_(lengths[1]);
  }
  return PanelQR{q, r, Panel::gram_schmidt};
}

PanelQR orthonormal_panel(const at::Tensor& panel, Panel method) {
  std::optional<PanelQR> found;
  if (method == Panel::cholesky_qr) found = cholesky_qr(panel);
  if (method == Panel::gram_schmidt) found = gram_schmidt_qr(panel);
  return found ? *found : householder_qr(panel);
}

at::Tensor gram(const at::Tensor& a) {
  constexpr int64_t kTileRows = 256;
  const int64_t width = a.size(1);
  at::Tensor result = at::zeros({width, width}, a.options().dtype(at::kDouble));
  for (int64_t start = 0; start < a.size(0); start += kTileRows) {
    const at::Tensor tile = a.narrow(0, start, std::min(kTileRows, a.size(0) - start)).to(at::kDouble);
    result.addmm_(tile.mT(), tile);
  }
  return result;
}

at::Tensor inner_basis_(const at::Tensor& panel) {
  const auto [factors, pivots, info] = at::linalg_lu_factor_ex(panel);
  const int64_t width = std::min(panel.size(0), panel.size(1));
  at::Tensor lower = factors.narrow(1, 0, width);
  lower.tril_(-1).diagonal().fill_(1);
  // Row i was exchanged with row pivots[i] - 1, in order; exchanged back from the last to the first.
  const at::Tensor host_pivots = pivots.cpu();
  const int32_t* pivot = host_pivots.const_data_ptr<int32_t>();
  const at::Tensor order = at::arange(panel.size(0), at::kLong);
  int64_t* source = order.mutable_data_ptr<int64_t>();
  for (int64_t i = width - 1; i >= 0; --i) std::swap(source[i], source[pivot[i] - 1]);
  at::Tensor result = panel.narrow(1, 0, width);
  kernels_for(panel).gather_rows(result, lower, order);
  return result;
}

}  // namespace galore_rrf
