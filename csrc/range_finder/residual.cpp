#include "range_finder/residual.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "math/compensated_sum.h"

namespace galore_rrf {

double kept_energy(const at::Tensor& basis, const at::Tensor& coefficients) {
  CompensatedSum sum;
  for (int64_t j = 0; j < basis.size(1); ++j) {
    sum.add((2 - squared_norm(basis.narrow(1, j, 1))) * squared_norm(coefficients.narrow(0, j, 1)));
  }
  return sum.value();
}

double relative_residual(const ScaledMatrix& matrix, const at::Tensor& basis,
                         const at::Tensor& coefficients) {
  const double total = matrix.squared_norm;
  double left = total - kept_energy(basis, coefficients);
  if (left < kDifferenceTells * kDifferenceTells * total) {
    constexpr int64_t kTileEntries = 1 << 17;
    const int64_t width = std::max<int64_t>(1, kTileEntries / matrix.a.size(0));
    left = 0;
    for (int64_t start = 0; start < matrix.a.size(1); start += width) {
      const int64_t w = std::min(width, matrix.a.size(1) - start);
      const at::Tensor tile =
          matrix.a.narrow(1, start, w).to(basis.scalar_type(), false, /*copy=*/true).contiguous();
      scale_by_power_(tile, -matrix.exponent);
      left += kernels_for(tile).squared_norm(
          tile.addmm(basis, coefficients.narrow(1, start, w), /*beta=*/1, /*alpha=*/-1));
    }
  }
  return std::sqrt(left / total);
}

}  // namespace galore_rrf
