#include "range_finder/fixed_rank.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "range_finder/energy_order.h"
#include "range_finder/orthonormal.h"
#include "range_finder/product.h"
#include "range_finder/scaling.h"

namespace galore_rrf {
namespace {

// Sketches whose squared norm lies in here have neither overflowed nor lost digits to underflow.
struct SafeRange {
  double low, high;
  bool contains(double x) const { return x >= low && x <= high; }
};

SafeRange safe_range(at::ScalarType dtype) {
  return dtype == at::kDouble ? SafeRange{1e-200, 1e250} : SafeRange{1e-50, 1e70};
}

class Sketcher {
 public:
  Sketcher(const at::Tensor& a, const FixedRankOptions& options, const at::Tensor& warm, int64_t width)
      : a_(a), options_(options), warm_(warm), width_(width) {}

  // Y (m x width), whose columns span nearly the range of 2^-exponent a.
  at::Tensor operator()(int exponent) const {
    if (options_.sketch == Sketch::half_power || options_.sketch == Sketch::warm) {
      return step(inner_basis_(product(a_.mT(), left_test_matrix(), exponent)), exponent);
    }
    at::Tensor y = step(test_matrix(a_.size(1), width_, 0), exponent);
    if (options_.sketch == Sketch::power) {
      for (int64_t i = 0; i < options_.power; ++i) {
        y = step(inner_basis_(product(a_.mT(), inner_basis_(y), exponent)), exponent);
      }
    }
    return y;
  }

 private:
  at::Tensor test_matrix(int64_t rows, int64_t cols, int64_t col_offset) const {
    at::Tensor omega = at::empty({rows, cols}, a_.options().dtype(compute_dtype(a_)));
    kernels_for(a_).fill_sketch(omega, options_.key, 0, col_offset);
    return omega;
  }

  // The previous basis, with Gaussian columns where it is narrower than the sketch; or those alone.
  at::Tensor left_test_matrix() const {
    if (options_.sketch != Sketch::warm) return test_matrix(a_.size(0), width_, 0);
    const int64_t known = std::min(warm_.size(1), width_);
    const at::Tensor previous = warm_.narrow(1, 0, known).to(compute_dtype(a_));
    if (known == width_) return previous;
    return at::cat({previous, test_matrix(a_.size(0), width_ - known, known)}, 1);
  }

  // (2^-exponent a) x, the power of two on the narrow factor, where it is cheap and exact.
  static at::Tensor product(const at::Tensor& a, at::Tensor x, int exponent) {
    if (exponent != 0) {
      x = x.clone();
      scale_by_power_(x, -exponent);
    }
    return multiply(a, x);
  }

  at::Tensor step(const at::Tensor& x, int exponent) const { return product(a_, x, exponent); }

  const at::Tensor& a_;
  const FixedRankOptions& options_;
  const at::Tensor& warm_;
  int64_t width_;
};

}  // namespace

FixedRankResult fixed_rank_range_finder(const at::Tensor& a, const FixedRankOptions& options,
                                        const at::Tensor& warm, const at::Tensor& coefficients) {
  const Kernels& kernels = kernels_for(a);
  const int64_t width = std::min(options.rank + options.oversampling, std::min(a.size(0), a.size(1)));
  TORCH_CHECK_VALUE(width >= options.rank, "Invalid rank: ", options.rank, " (must be from 1 to ", width,
                    ", the smaller side of a ", a.size(0), " x ", a.size(1), " matrix)");
  const SafeRange safe = safe_range(compute_dtype(a));

  FixedRankOptions attempt = options;
  at::Tensor y = Sketcher(a, attempt, warm, width)(0);
  if (!safe.contains(kernels.squared_norm(y))) {  // false for NaN
    const double largest = largest_magnitude(a);
    if (!std::isfinite(largest)) return {Status::nonfinite, {}};
    if (largest == 0) return {Status::zero, {}};
    const int exponent = safe_exponent_of(largest, compute_dtype(a));
    y = Sketcher(a, attempt, warm, width)(exponent);
    if (options.sketch == Sketch::warm && !safe.contains(kernels.squared_norm(y))) {
      attempt.sketch = Sketch::half_power;  // the previous basis is orthogonal to all of a
      y = Sketcher(a, attempt, warm, width)(exponent);
    }
  }

  at::Tensor q = householder_basis(y);
  y.reset();
  if (width == options.rank && !options.ordered) {
    if (coefficients.defined()) multiply_out(coefficients.mT(), a.mT(), q);
  } else {
    at::Tensor wide = coefficients;
    if (!coefficients.defined() || width != options.rank) {
      wide = at::empty({a.size(1), width}, q.options()).mT();
    }
    multiply_out(wide.mT(), a.mT(), q);
    const at::Tensor rotation = energy_order(wide).rotation.narrow(1, 0, options.rank);
    q = q.matmul(rotation);
    if (coefficients.defined()) coefficients.copy_(rotation.mT().matmul(wide));
  }
  return {Status::converged, q};
}

double relative_residual(const at::Tensor& a, const at::Tensor& basis, const at::Tensor& coefficients) {
  constexpr int64_t kTileEntries = 1 << 17;
  // Below this the rounding of B, a few u ||a||^2, would tell in the difference of squared norms.
  constexpr double kCancellation = 1.0 / 16;
  const double largest = largest_magnitude(a);
  if (largest == 0) return 0;
  const int exponent = -exponent_of(largest);
  const int64_t width = std::max<int64_t>(1, kTileEntries / a.size(0));

  // Adds the squared norm of f(columns of a, columns of B), scaled alike, over tiles of columns.
  const auto sum_over_tiles = [&](const auto& f) {
    double sum = 0;
    for (int64_t start = 0; start < a.size(1); start += width) {
      const int64_t w = std::min(width, a.size(1) - start);
      const auto scaled = [&](const at::Tensor& t) {
        const at::Tensor part =
            t.narrow(1, start, w).to(basis.scalar_type(), false, /*copy=*/true).contiguous();
        scale_by_power_(part, exponent);
        return part;
      };
      sum += kernels_for(a).squared_norm(f(scaled));
    }
    return sum;
  };

  const double total = sum_over_tiles([&](const auto& scaled) { return scaled(a); });
  double left = total - sum_over_tiles([&](const auto& scaled) { return scaled(coefficients); });
  if (left < kCancellation * total) {
    left = sum_over_tiles([&](const auto& scaled) {
      return scaled(a).addmm_(basis, scaled(coefficients), /*beta=*/1, /*alpha=*/-1);
    });
  }
  return std::sqrt(left / total);
}

}  // namespace galore_rrf
