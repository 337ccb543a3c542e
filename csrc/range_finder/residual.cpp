#include "range_finder/residual.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "math/compensated_sum.h"
#include "range_finder/scaling.h"

namespace galore_rrf {

double kept_energy(const at::Tensor& basis, const at::Tensor& coefficients, int exponent) {
  CompensatedSum sum;
  for (int64_t j = 0; j < basis.size(1); ++j) {
    sum.add((2 - squared_norm(basis.narrow(1, j, 1))) * squared_norm(coefficients.narrow(0, j, 1), exponent));
  }
  return sum.value();
}

double relative_residual(const at::Tensor& a, const at::Tensor& basis, const at::Tensor& coefficients) {
  int exponent = 0;
  double total = squared_norm(a);
  if (!is_safe(total, basis.scalar_type())) {
    const double largest = largest_magnitude(a);
    if (largest == 0) return 0;
    exponent = exponent_of(largest);
    total = squared_norm(a, exponent);
  }
  double left = total - kept_energy(basis, coefficients, exponent);
  if (left < kDifferenceTells * kDifferenceTells * total) {
    constexpr int64_t kTileEntries = 1 << 17;
    const int64_t width = std::max<int64_t>(1, kTileEntries / a.size(0));
    left = 0;
    for (int64_t start = 0; start < a.size(1); start += width) {
      const auto scaled = [&](const at::Tensor& t) {
        const at::Tensor part = t.narrow(1, start, std::min(width, a.size(1) - start))
                                    .to(basis.scalar_type(), false, /*copy=*/true)
                                    .contiguous();
        scale_by_power_(part, -exponent);
        return part;
      };
      left += kernels_for(a).squared_norm(
          scaled(a).addmm_(basis, scaled(coefficients), /*beta=*/1, /*alpha=*/-1));
    }
  }
  return std::sqrt(left / total);
}

}  // namespace galore_rrf
