#include "range_finder/adaptive.h"

#include <ATen/Context.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "range_finder/blocks.h"
#include "range_finder/energy_order.h"
#include "range_finder/product.h"
#include "range_finder/residual.h"
#include "range_finder/scaling.h"

namespace galore_rrf {
namespace {

// Columns beyond n that a tall matrix of full rank needs, since its last sketch is square.
constexpr int64_t kTallExtra = 16;

// The inner factor of half a power step has n rows, so no more columns than that.
int64_t block_width(int64_t n, const AdaptiveOptions& options) {
  return options.sketch == Sketch::half_power ? std::min(options.block, n) : options.block;
}

// Relative tolerances below this cannot be told from rounding: that of the matrix, or left-looking that
// of the difference of squared norms.
double tolerance_floor(at::ScalarType dtype, Method method) {
  const double u = unit_roundoff(dtype);
  return method == Method::left_looking ? std::sqrt(4 * kDifferenceUnits * u) : 200 * u;
}

Method chosen_method(const AdaptiveOptions& options, double tau, at::ScalarType dtype) {
  if (options.method != Method::automatic) return options.method;
  if (options.look_ahead.value_or(false)) return Method::right_looking;
  return tau >= tolerance_floor(dtype, Method::left_looking) ? Method::left_looking : Method::right_looking;
}

// Cuts to the rank cap, and on to the smallest rank that leaves no more than `allowed`, then up to one that
// the options allow; adds to `left` what is discarded.
int64_t cut_rank(const at::Tensor& energies, const AdaptiveOptions& options, double allowed, double& left) {
  const at::Tensor on_host = energies.cpu();
  const double* energy = on_host.const_data_ptr<double>();
  const int64_t columns = energies.size(0), cap = std::min(columns, options.max_rank);
  int64_t enough = columns;
  double beyond = left;
  while (enough > 0 && (enough > cap || beyond + energy[enough - 1] <= allowed)) beyond += energy[--enough];
  const int64_t whole = (enough + options.multiple - 1) / options.multiple * options.multiple;
  const int64_t rank = std::min(cap, std::max(options.min_rank, whole));
  for (int64_t i = columns; i > rank; --i) left += energy[i - 1];
  return rank;
}

}  // namespace

int64_t column_cap(int64_t m, int64_t n, const AdaptiveOptions& options) {
  const int64_t full = m > n && !options.implicit ? std::min(m, n + kTallExtra) : std::min(m, n);
  if (options.max_rank == std::min(m, n)) return full;
  // Trimming may find a rank within the cap that more columns than the cap are needed to find.
  const int64_t extra = options.trim ? options.extra_blocks * block_width(n, options) : 0;
  return std::min(full, options.max_rank + extra);
}

int64_t block_cap(int64_t m, int64_t n, const AdaptiveOptions& options) {
  const int64_t block = block_width(n, options);
  return (column_cap(m, n, options) + block - 1) / block;
}

AdaptiveResult adaptive_range_finder(const at::Tensor& a, const AdaptiveOptions& options) {
  const at::NoTF32Guard no_tf32;  // what is left of a matrix would be TF32's rounding
  const int64_t m = a.size(0), n = a.size(1);
  const at::ScalarType dtype = compute_dtype(a);
  const auto ended = [&](Status status, double residual) {
    const auto none = a.options().dtype(dtype);
    return AdaptiveResult{
        at::zeros({m, 0}, none), at::zeros({0, n}, none), at::zeros({0, 0}, none), residual, {}, status};
  };

  const ScaledMatrix matrix = scaled(a);
  const double norm2 = matrix.squared_norm;
  if (std::isnan(norm2)) return ended(Status::nonfinite, norm2);
  if (norm2 == 0) return ended(Status::zero, 0);
  const double tau = options.relative ? options.tolerance
                                      : std::ldexp(options.tolerance, -matrix.exponent) / std::sqrt(norm2);
  const double threshold = tau * tau * norm2;
  const Method method = chosen_method(options, tau, dtype);
  const int64_t cap = column_cap(m, n, options);

  const auto blocks = make_blocks(matrix, options, cap, method);
  // Tolerance 0 is full rank, even where nothing is left before.
  const bool nothing_to_do = tau > 0 && norm2 <= threshold;
  const double allowed = nothing_to_do ? threshold : threshold - blocks->uncertainty();
  const int64_t least = options.trim ? options.min_rank : 0;
  StopTest stop(nothing_to_do ? least : cap, block_width(n, options), options.trim ? options.extra_blocks : 0,
                tau > 0 ? allowed : -1, std::min(m, n), least);
  blocks->grow(stop);
  const std::vector<double> measured = stop.left();
  double left = measured.empty() ? norm2 : measured.back();
  std::vector<double> residuals;
  for (const double each : measured) residuals.push_back(std::sqrt(each / norm2));

  const bool trimming = options.trim && (nothing_to_do || stop.passed());
  const at::Tensor all = blocks->coefficients();
  AdaptiveResult result{{}, {}, at::zeros({0, 0}, all.options()), 0, std::move(residuals), {}};
  if (options.implicit) {
    const BlockReflector h = blocks->reflector();
    result.basis = h.v;
    result.triangular_factor = h.t;
    result.coefficients = all;
  } else if (trimming || blocks->rank() > options.max_rank) {
    const EnergyOrder order = energy_order(all);
    const int64_t kept = cut_rank(order.energies, options, trimming ? allowed : -1, left);
    const at::Tensor rotation = order.rotation.narrow(1, 0, kept);
    result.basis = multiply(blocks->basis(), rotation);
    result.coefficients = rotation.mT().matmul(all);
  } else {
    result.basis = blocks->basis();
    result.coefficients = all;
  }

  result.residual = std::sqrt(left / norm2);
  bool kept_tolerance = left <= allowed;
  if (method == Method::left_looking && result.residual < kDifferenceTells) {
    const at::Tensor q = options.implicit ? blocks->basis() : result.basis;
    result.residual = relative_residual(matrix, q, result.coefficients);
    if (result.rank() == blocks->rank() && !result.residuals.empty())
      result.residuals.back() = result.residual;
    kept_tolerance = result.residual <= tau;
  }
  scale_by_power_(result.coefficients, matrix.exponent);

  // Below the floor nobody can tell, even where the last rows have run out and nothing seems left.
  const bool can_tell = tau >= tolerance_floor(dtype, Method::right_looking);
  result.status = kept_tolerance && can_tell             ? Status::converged
                  : tau < tolerance_floor(dtype, method) ? Status::floor
                                                         : Status::rank_cap;
  return result;
}

}  // namespace galore_rrf
