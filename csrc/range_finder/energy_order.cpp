#include "range_finder/energy_order.h"

#include <ATen/ops/linalg_eigh.h>

#include <cmath>

#include "range_finder/orthonormal.h"
#include "range_finder/scaling.h"

namespace galore_rrf {

EnergyOrder energy_order(const at::Tensor& coefficients) {
  const double largest = largest_magnitude(coefficients);
  const int exponent = largest > 0 ? safe_exponent_of(largest, coefficients.scalar_type()) : 0;
  // Squares of extreme entries leave fp64 too: scaled before they are formed.
  const at::Tensor b = exponent == 0 ? coefficients : coefficients.clone();
  scale_by_power_(b, -exponent);
  const auto [ascending, vectors] = at::linalg_eigh(gram(b.mT()));
  return {ascending.flip(0).clamp_min(0).mul(std::ldexp(1.0, 2 * exponent)),
          vectors.flip(1).to(coefficients.scalar_type())};
}

}  // namespace galore_rrf
