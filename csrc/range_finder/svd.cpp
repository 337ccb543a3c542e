#include "range_finder/svd.h"

#include <ATen/ops/linalg_svd.h>

#include <tuple>

#include "range_finder/orthonormal.h"

namespace galore_rrf {

Svd svd_of_product(const at::Tensor& basis, const at::Tensor& coefficients) {
  // B^T = P R, so B = R^T P^T and the SVD of the r x r matrix R^T gives that of B.
  const PanelQR rows = orthonormal_panel(coefficients.contiguous().mT(), Panel::cholesky_qr);
  const auto [left, s, right] = at::linalg_svd(rows.r.mT(), /*full_matrices=*/false);
  return {basis.matmul(left), s, rows.q.matmul(right.mT())};
}

}  // namespace galore_rrf
