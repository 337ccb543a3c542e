#include "range_finder/orthonormal.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/geqrf.h>
#include <ATen/ops/linalg_householder_product.h>
#include <ATen/ops/linalg_lu_factor_ex.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "kernels.h"

namespace galore_rrf {

at::Tensor householder_basis(const at::Tensor& panel) {
  const auto [reflectors, tau] = at::geqrf(panel);
  const int64_t width = std::min(panel.size(0), panel.size(1));
  return at::linalg_householder_product(reflectors.narrow(1, 0, width), tau);
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
