#include "range_finder/scaling.h"

#include <ATen/ops/linalg_vector_norm.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace galore_rrf {

double largest_magnitude(const at::Tensor& a) {
  if (a.numel() == 0) return 0;
  return at::linalg_vector_norm(a, std::numeric_limits<double>::infinity()).item().toDouble();
}

int exponent_of(double magnitude) { return std::ilogb(magnitude); }

int safe_exponent_of(double magnitude, at::ScalarType dtype) {
  const int most = dtype == at::kDouble ? 900 : 100;
  return std::clamp(exponent_of(magnitude), -most, most);
}

void scale_by_power_(const at::Tensor& a, int exponent) {
  if (exponent == 0) return;
  const int half = exponent / 2;
  a.mul_(std::ldexp(1.0, half));
  a.mul_(std::ldexp(1.0, exponent - half));
}

}  // namespace galore_rrf
