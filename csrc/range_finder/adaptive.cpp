#include "range_finder/adaptive.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "range_finder/block_reflector.h"
#include "range_finder/energy_order.h"
#include "range_finder/orthonormal.h"
#include "range_finder/product.h"
#include "range_finder/scaling.h"

namespace galore_rrf {
namespace {

// Columns beyond n that a tall matrix of full rank needs, since its last sketch is square.
constexpr int64_t kTallExtra = 16;

at::Tensor sketch_of(const at::Tensor& rest, const AdaptiveOptions& options, int64_t first, int64_t width) {
  const bool half_power = options.sketch == Sketch::half_power;
  at::Tensor x = at::empty({rest.size(half_power ? 0 : 1), width}, rest.options());
  kernels_for(rest).fill_sketch(x, options.key, 0, first);
  if (half_power) x = inner_basis_(multiply(rest.mT(), x));
  return multiply(rest, x);
}

// Q = H_1 ... H_k I(:, :rank), applied from the last to the first, each to the columns it touches.
at::Tensor explicit_basis(const std::vector<BlockReflector>& reflectors, int64_t rows, int64_t rank,
                          const at::TensorOptions& options) {
  const at::Tensor q = at::zeros({rows, rank}, options);
  q.diagonal().fill_(1);
  int64_t first = rank;
  for (auto h = reflectors.rbegin(); h != reflectors.rend(); ++h) {
    first -= h->v.size(1);
    apply_block_reflector_(*h, q.narrow(0, first, rows - first).narrow(1, first, rank - first), false);
  }
  return q;
}

// Columns that the loop may compute: the rank cap, but for the last few of a tall matrix.
int64_t column_cap(int64_t m, int64_t n, int64_t max_rank) {
  return m > n && max_rank == n ? std::min(m, n + kTallExtra) : max_rank;
}

// The inner factor of half a power step has n rows, so no more columns than that.
int64_t block_width(int64_t n, const AdaptiveOptions& options) {
  return options.sketch == Sketch::half_power ? std::min(options.block, n) : options.block;
}

// The smallest rank whose discarded energy, with what no block has kept, stays within the threshold.
int64_t trimmed_rank(const at::Tensor& energies, double& left, double threshold) {
  const double* energy = energies.const_data_ptr<double>();
  int64_t rank = energies.size(0);
  while (rank > 0 && left + energy[rank - 1] <= threshold) left += energy[--rank];
  return rank;
}

}  // namespace

double tolerance_floor(at::ScalarType dtype) { return 200 * (dtype == at::kDouble ? 0x1p-53 : 0x1p-24); }

int64_t max_adaptive_blocks(int64_t m, int64_t n, const AdaptiveOptions& options) {
  const int64_t block = block_width(n, options);
  return (column_cap(m, n, options.max_rank) + block - 1) / block;
}

AdaptiveResult adaptive_range_finder(const at::Tensor& a, const AdaptiveOptions& options) {
  const int64_t m = a.size(0), n = a.size(1);
  const auto dtype = a.options().dtype(compute_dtype(a));
  const auto empty_result = [&](Status status, double residual) {
    return AdaptiveResult{at::zeros({m, 0}, dtype), at::zeros({0, n}, dtype), residual, {}, status};
  };

  const double largest = largest_magnitude(a);
  if (!std::isfinite(largest)) {
    return empty_result(Status::nonfinite, std::numeric_limits<double>::quiet_NaN());
  }
  if (largest == 0) return empty_result(Status::zero, 0);
  const int exponent = exponent_of(largest);

  const Kernels& kernels = kernels_for(a);
  const at::Tensor work = at::empty({m, n}, dtype);  // row-major: its trailing rows are one piece
  work.copy_(a);
  scale_by_power_(work, -exponent);

  const double norm2 = kernels.squared_norm(work);
  const double tau =
      options.relative ? options.tolerance : std::ldexp(options.tolerance, -exponent) / std::sqrt(norm2);
  const double threshold = tau * tau * norm2;
  const int64_t cap = column_cap(m, n, options.max_rank);

  std::vector<BlockReflector> reflectors;
  std::vector<double> residuals;
  int64_t rank = 0;
  double left = norm2;
  const auto add_block = [&] {
    const int64_t width = std::min(block_width(n, options), cap - rank);
    at::Tensor rest = work.narrow(0, rank, m - rank);
    reflectors.push_back(panel_qr(sketch_of(rest, options, rank, width)));
    apply_block_reflector_(reflectors.back(), rest, /*transpose=*/true);
    rank += width;
    // The norm of what is left, not a running difference: free of cancellation.
    left = kernels.squared_norm(work.narrow(0, rank, m - rank));
    residuals.push_back(std::sqrt(left / norm2));
  };
  while (rank < cap && left > threshold) add_block();
  const bool within = left <= threshold;
  if (options.trim && within && rank < cap && left > 0) add_block();

  at::Tensor q = explicit_basis(reflectors, m, rank, dtype);
  at::Tensor b = work.narrow(0, 0, rank);
  if ((options.trim && within) || rank > options.max_rank) {
    const EnergyOrder order = energy_order(b);
    int64_t kept =
        options.trim && within ? trimmed_rank(order.energies, left, threshold) : order.energies.size(0);
    for (; kept > options.max_rank; --kept) left += order.energies.const_data_ptr<double>()[kept - 1];
    const at::Tensor rotation = order.rotation.narrow(1, 0, kept);
    q = q.matmul(rotation);
    b = rotation.mT().matmul(b);
  } else {
    b = b.clone();
  }
  scale_by_power_(b, exponent);

  // Below the floor nobody can tell, even where the last rows have run out and nothing seems left.
  const Status status = tau < tolerance_floor(compute_dtype(a)) ? Status::floor
                        : left <= threshold                     ? Status::converged
                                                                : Status::rank_cap;
  return {q, b, std::sqrt(left / norm2), std::move(residuals), status};
}

}  // namespace galore_rrf
