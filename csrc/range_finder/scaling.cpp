#include "range_finder/scaling.h"

#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/frexp.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/logical_or.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "galore_rrf/types.h"
#include "kernels.h"
#include "range_finder/tiles.h"

namespace galore_rrf {

namespace {

// Of a factor that neither overflows nor loses digits.
int largest_exponent(at::ScalarType dtype) { return dtype == at::kDouble ? 900 : 100; }

}  // namespace

double largest_magnitude(const at::Tensor& a) {
  if (a.numel() == 0) return 0;
  return at::linalg_vector_norm(a, std::numeric_limits<double>::infinity()).item().toDouble();
}

int exponent_of(double magnitude) { return std::ilogb(magnitude); }

int safe_exponent_of(double magnitude, at::ScalarType dtype) {
  const int most = largest_exponent(dtype);
  return std::clamp(exponent_of(magnitude), -most, most);
}

double unit_roundoff(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 0x1p-53;
    case at::kHalf:
      return 0x1p-11;
    case at::kBFloat16:
      return 0x1p-8;
    default:
      return 0x1p-24;
  }
}

bool is_safe(double squared_norm, at::ScalarType dtype) {
  const bool fp64 = dtype == at::kDouble;
  return squared_norm >= (fp64 ? 1e-200 : 1e-30) && squared_norm <= (fp64 ? 1e200 : 1e30);  // false for NaN
}

void squared_norm_out(const at::Tensor& sum, const at::Tensor& a, int exponent) {
  const Kernels& kernels = kernels_for(a);
  if (exponent == 0 && a.scalar_type() == compute_dtype(a) && a.is_non_overlapping_and_dense()) {
    // In memory order.
    return kernels.squared_norms(sum, a.as_strided({1, a.numel()}, {std::max<int64_t>(1, a.numel()), 1}));
  }
  at::Tensor total = sum;
  total.zero_();
  const at::Tensor part = at::empty_like(sum);
  for_each_tile(a, outer_dim(a), exponent, [&](int64_t, int64_t, const at::Tensor& tile) {
    kernels.squared_norms(part, tile.unsqueeze(0));
    total.add_(part);
  });
}

double squared_norm(const at::Tensor& a, int exponent) {
  const at::Tensor sum = at::empty({1}, a.options().dtype(at::kDouble));
  squared_norm_out(sum, a, exponent);
  return sum.item().toDouble();
}

ScaledMatrix scaled(const at::Tensor& a) {
  const double norm2 = squared_norm(a);
  if (is_safe(norm2, compute_dtype(a))) return {a, 0, norm2};
  const double largest = largest_magnitude(a);
  if (!std::isfinite(largest)) return {a, 0, std::numeric_limits<double>::quiet_NaN()};
  if (largest == 0) return {a, 0, 0};
  const int exponent = safe_exponent_of(largest, compute_dtype(a));
  return {a, exponent, squared_norm(a, exponent)};
}

Scaling scaling_of(const std::vector<at::Tensor>& matrices) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const at::Tensor largest = at::stack(at::_foreach_norm(matrices, kInfinity)).to(at::kDouble);
  const at::Tensor finite = largest.isfinite(), zero = largest.eq(0);
  const auto code = [](Status status) { return static_cast<int64_t>(status); };
  const at::Tensor status =
      at::full_like(largest, code(Status::converged), largest.options().dtype(at::kByte))
          .masked_fill_(zero, code(Status::zero))
          .masked_fill_(finite.logical_not(), code(Status::nonfinite));
  // Products of fp16 entries stay far inside fp32, while a scaled factor would leave fp16.
  const at::ScalarType dtype = matrices.front().scalar_type();
  const int most = dtype == at::kHalf ? 0 : largest_exponent(compute_dtype(matrices.front()));
  const at::Tensor exponents = std::get<1>(at::frexp(largest)).sub_(1).clamp_(-most, most);
  return {exponents.masked_fill_(at::logical_or(zero, finite.logical_not()), 0), status};
}

void scale_by_power_(const at::Tensor& a, int exponent) {
  if (exponent == 0) return;
  const int half = exponent / 2;
  a.mul_(std::ldexp(1.0, half));
  a.mul_(std::ldexp(1.0, exponent - half));
}

}  // namespace galore_rrf
