#include "range_finder/residual.h"

#include <ATen/Context.h>

#include <cmath>

#include "math/compensated_sum.h"
#include "range_finder/measured_norms.h"
#include "range_finder/tiles.h"

namespace galore_rrf {

double kept_energy(const at::Tensor& basis, const at::Tensor& coefficients) {
  const int64_t columns = basis.size(1);
  const MeasuredNorms norms(basis, 2 * columns);
  norms.measure(0, basis.mT().contiguous());
  norms.measure(columns, coefficients.contiguous());
  norms.wait();
  CompensatedSum sum;
  for (int64_t j = 0; j < columns; ++j) sum.add((2 - norms[j]) * norms[columns + j]);
  return sum.value();
}

double relative_residual(const ScaledMatrix& matrix, const at::Tensor& basis,
                         const at::Tensor& coefficients) {
  const at::NoTF32Guard no_tf32;
  const double total = matrix.squared_norm;
  double left = total - kept_energy(basis, coefficients);
  if (left < kDifferenceTells * kDifferenceTells * total) {
    const int64_t dim = outer_dim(matrix.a);
    const MeasuredNorms norms(basis, tile_count(matrix.a, dim));
    int64_t tiles = 0;
    for_each_tile(matrix.a, dim, matrix.exponent, [&](int64_t start, int64_t width, at::Tensor& tile) {
      const bool rows = dim == 0;
      tile.addmm_(rows ? basis.narrow(0, start, width) : basis,
                  rows ? coefficients : coefficients.narrow(1, start, width), /*beta=*/1, /*alpha=*/-1);
      norms.measure(tiles++, tile.unsqueeze(0));
    });
    norms.wait();
    left = 0;
    for (int64_t i = 0; i < tiles; ++i) left += norms[i];
  }
  return std::sqrt(left / total);
}

}  // namespace galore_rrf
