#include "range_finder/residual.h"

#include <cmath>

#include "kernels.h"
#include "math/compensated_sum.h"
#include "range_finder/tiles.h"

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
    left = 0;
    const int64_t dim = outer_dim(matrix.a);
    for_each_tile(matrix.a, dim, matrix.exponent, [&](int64_t start, int64_t width, at::Tensor& tile) {
      const bool rows = dim == 0;
      tile.addmm_(rows ? basis.narrow(0, start, width) : basis,
                  rows ? coefficients : coefficients.narrow(1, start, width), /*beta=*/1, /*alpha=*/-1);
      left += kernels_for(tile).squared_norm(tile);
    });
  }
  return std::sqrt(left / total);
}

}  // namespace galore_rrf
