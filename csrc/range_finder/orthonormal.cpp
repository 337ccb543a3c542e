#include "range_finder/orthonormal.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/geqrf.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_householder_product.h>
#include <ATen/ops/linalg_lu_factor_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "kernels.h"
#include "range_finder/scaling.h"

namespace galore_rrf {
namespace {

// Shares of its squared length that a column keeps: condition numbers to about 10^7, then near 1.
constexpr double kFirstLeast = 0x1p-46, kSecondLeast = 0.5;

// R of the Cholesky factorisations R^T R of a^T a, in fp64, of a stack, and whether it serves, decided where
// it is: not where a column keeps less than the share `least` of its squared length when those before it are
// taken out.  Then the factor is the identity.
struct CholeskyFactors {
  at::Tensor r, serves;
};
CholeskyFactors cholesky_factors(const at::Tensor& panels, double least) {
  const at::Tensor products = gram(panels);
  const auto [factors, info] = at::linalg_cholesky_ex(products, /*upper=*/true);
  const auto diagonal = [](const at::Tensor& stack) { return stack.diagonal(0, 1, 2); };
  const at::Tensor kept = diagonal(factors).square().div_(diagonal(products));
  const at::Tensor serves = at::logical_and(info.eq(0), kept.amin(1).gt(least));  // false for NaN
  const at::Tensor identity = at::eye(factors.size(1), factors.options());
  return {at::where(serves.view({-1, 1, 1}), factors, identity), serves};
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
  const at::Tensor stack = panel.unsqueeze(0);
  const CholeskyFactors first = cholesky_factors(stack, kFirstLeast);
  if (!first.serves.item<bool>()) return std::nullopt;
  const at::Tensor nearly = divided_by(stack, first.r.to(panel.scalar_type()));
  const CholeskyFactors second = cholesky_factors(nearly, kSecondLeast);
  if (!second.serves.item<bool>()) return std::nullopt;
  return PanelQR{divided_by(nearly, second.r.to(panel.scalar_type())).squeeze(0),
                 second.r.matmul(first.r).to(panel.scalar_type()).squeeze(0), Panel::cholesky_qr};
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
  const int64_t most = a.is_cpu() ? 256 : 1 << 13;  // rows cast at a time
  const int64_t rows = a.size(-2), width = a.size(-1);
  const at::Tensor panels = a.dim() == 3 ? a : a.unsqueeze(0);
  at::Tensor result = at::zeros({panels.size(0), width, width}, a.options().dtype(at::kDouble));
  for (int64_t start = 0; start < rows; start += most) {
    const at::Tensor tile = panels.narrow(1, start, std::min(most, rows - start)).to(at::kDouble);
    result.baddbmm_(tile.mT(), tile);
  }
  return a.dim() == 3 ? result : result.squeeze(0);
}

at::Tensor orthonormal_bases_(const at::Tensor& panels, Panel method, bool asynchronous) {
  const Kernels& kernels = kernels_for(panels);
  const at::NoTF32Guard no_tf32;
  if (!asynchronous || method == Panel::gram_schmidt) {
    if (panels.size(0) == 1) return orthonormal_panel(panels.select(0, 0), method).q.unsqueeze(0);
    for (const at::Tensor& panel : panels.unbind(0)) panel.copy_(orthonormal_panel(panel, method).q);
    return panels;
  }
  const at::Tensor all = at::ones({panels.size(0)}, panels.options().dtype(at::kByte));
  if (method == Panel::householder || (method == Panel::automatic && !kernels.cholesky_qr_pays())) {
    kernels.householder_(panels, all);
    return panels;
  }
  // Twice, as above; where either factor does not serve, reflectors.
  const CholeskyFactors first = cholesky_factors(panels, kFirstLeast);
  const at::Tensor nearly = divided_by(panels, first.r.to(panels.scalar_type()));
  const CholeskyFactors second = cholesky_factors(nearly, kSecondLeast);
  const at::Tensor q = divided_by(nearly, second.r.to(panels.scalar_type()));
  const at::Tensor failed = at::logical_and(first.serves, second.serves).logical_not_();
  kernels.householder_(panels, failed.to(at::kByte));
  return panels.copy_(at::where(failed.view({-1, 1, 1}), panels, q));
}

at::Tensor inner_basis_(const at::Tensor& panel) {
  const int64_t width = std::min(panel.size(0), panel.size(1));
  if (!panel.is_cpu()) {  // the host, which exchanges the rows, would have to wait
    return orthonormal_bases_(panel.narrow(1, 0, width).unsqueeze(0), Panel::automatic, true).squeeze(0);
  }
  auto [factors, pivots, info] = at::linalg_lu_factor_ex(panel);
  // LAPACK may multiply by reciprocals of pivots, which overflow where these are subnormal.
  const double small = panel.scalar_type() == at::kDouble ? 1e-100 : 1e-15;
  if (width > 0 && std::abs(factors[0][0].item<double>()) < small) {  // the largest of the first column
    const double largest = largest_magnitude(panel);
    if (largest > 0 && largest < small) {
      scale_by_power_(panel, -safe_exponent_of(largest, panel.scalar_type()));
      std::tie(factors, pivots, info) = at::linalg_lu_factor_ex(panel);
    }
  }
  at::Tensor lower = factors.narrow(1, 0, width);
  lower.tril_(-1).diagonal().fill_(1);
  // Row i was exchanged with row pivots[i] - 1, in order; exchanged back from the last to the first.
  const at::Tensor host_pivots = pivots.cpu();
  const int32_t* pivot = host_pivots.const_data_ptr<int32_t>();
  const at::Tensor order = at::arange(panel.size(0), at::kLong);
  int64_t* source = order.mutable_data_ptr<int64_t>();
  for (int64_t i = width - 1; i >= 0; --i) std::swap(source[i], source[pivot[i] - 1]);
  at::Tensor result = panel.narrow(1, 0, width);
  AT_DISPATCH_FLOATING_TYPES(panel.scalar_type(), "inner_basis_", [&] {
    for (int64_t j = 0; j < width; ++j) {
      const scalar_t* from = lower.const_data_ptr<scalar_t>() + j * lower.stride(1);
      scalar_t* to = result.mutable_data_ptr<scalar_t>() + j * result.stride(1);
      for (int64_t i = 0; i < result.size(0); ++i) to[i] = from[source[i]];
    }
  });
  return result;
}

at::Tensor inner_bases_(const at::Tensor& panels, bool asynchronous) {
  if (asynchronous) return orthonormal_bases_(panels, Panel::automatic, asynchronous);
  for (const at::Tensor& panel : panels.unbind(0)) inner_basis_(panel);
  return panels;
}

}  // namespace galore_rrf
