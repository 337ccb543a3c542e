#include "range_finder/energy_order.h"

#include <ATen/ops/geqrf.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_svd.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "range_finder/orthonormal.h"
#include "range_finder/scaling.h"

namespace galore_rrf {

EnergyOrder energy_order(const at::Tensor& coefficients) {
  const double largest = largest_magnitude(coefficients);
  const int exponent = largest > 0 ? safe_exponent_of(largest, coefficients.scalar_type()) : 0;
  // Squares of extreme entries leave fp64 too: scaled before they are formed.
  const at::Tensor b = exponent == 0 ? coefficients : coefficients.clone();
  scale_by_power_(b, -exponent);
  const double unit = std::ldexp(1.0, 2 * exponent);
  if (b.scalar_type() == at::kDouble) {
    const auto factored = std::get<0>(at::geqrf(b.mT()));
    const at::Tensor triangle = factored.narrow(0, 0, std::min(b.size(0), b.size(1))).triu();
    const auto svd = at::linalg_svd(triangle.mT(), /*full_matrices=*/false);
    return {std::get<1>(svd).square().mul(unit), std::get<0>(svd)};
  }
  const auto [ascending, vectors] = at::linalg_eigh(gram(b.mT()));
  const int64_t count = std::min(b.size(0), b.size(1));
  return {ascending.flip(0).narrow(0, 0, count).clamp_min(0).mul(unit),
          vectors.flip(1).narrow(1, 0, count).to(b.scalar_type())};
}

}  // namespace galore_rrf
