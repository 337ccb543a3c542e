#include "range_finder/energy_order.h"

#include <ATen/ops/linalg_eigh.h>

#include "range_finder/orthonormal.h"

namespace galore_rrf {

EnergyOrder energy_order(const at::Tensor& coefficients) {
  const auto [ascending, vectors] = at::linalg_eigh(gram(coefficients.mT()));
  return {ascending.flip(0).clamp_min(0), vectors.flip(1).to(coefficients.scalar_type())};
}

}  // namespace galore_rrf
