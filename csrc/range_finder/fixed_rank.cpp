#include "range_finder/fixed_rank.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "range_finder/energy_order.h"
#include "range_finder/orthonormal.h"
#include "range_finder/product.h"
#include "range_finder/residual.h"
#include "range_finder/scaling.h"
#include "range_finder/sketch.h"

namespace galore_rrf {
namespace {

class Sketcher {
 public:
  Sketcher(const at::Tensor& a, const FixedRankOptions& options, const at::Tensor& warm, int64_t width)
      : a_(a), options_(options), warm_(warm), width_(width) {}

  // Y (m x width), whose columns span nearly the range of 2^-exponent a.
  at::Tensor operator()(Sketch sketch, int exponent) const {
    if (sketch == Sketch::half_power || sketch == Sketch::warm) {
      return multiply(a_, inner_basis_(multiply(a_.mT(), left_test_matrix(sketch), exponent)), exponent);
    }
    at::Tensor y = multiply(a_, test_matrix(a_, a_.size(1), width_, options_.key), exponent);
    if (sketch == Sketch::power) {
      for (int64_t i = 0; i < options_.power; ++i) {
        y = multiply(a_, inner_basis_(multiply(a_.mT(), inner_basis_(y), exponent)), exponent);
      }
    }
    return y;
  }

 private:
  // The previous basis, with Gaussian columns where it is narrower than the sketch; or those alone.
  at::Tensor left_test_matrix(Sketch sketch) const {
    if (sketch != Sketch::warm) return test_matrix(a_, a_.size(0), width_, options_.key);
    const int64_t known = std::min(warm_.size(1), width_);
    const at::Tensor previous = warm_.narrow(1, 0, known).to(compute_dtype(a_));
    if (known == width_) return previous;
    return at::cat({previous, test_matrix(a_, a_.size(0), width_ - known, options_.key, known)}, 1);
  }

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
  const auto safe = [&](const at::Tensor& sketch) {
    return is_safe(kernels.squared_norm(sketch), compute_dtype(a));
  };

  const Sketcher sketcher(a, options, warm, width);
  int exponent = 0;
  at::Tensor y = sketcher(options.sketch, exponent);
  if (!safe(y)) {
    const ScaledMatrix matrix = scaled(a);
    if (std::isnan(matrix.squared_norm)) return {Status::nonfinite, {}, matrix.squared_norm};
    if (matrix.squared_norm == 0) return {Status::zero, {}, 0};
    exponent = matrix.exponent;
    y = sketcher(options.sketch, exponent);
    if (options.sketch == Sketch::warm && !safe(y)) {
      y = sketcher(Sketch::half_power, exponent);  // the previous basis is orthogonal to all of a
    }
  }

  at::Tensor q = orthonormal_panel(y, options.panel).q;
  y.reset();
  at::Tensor b = coefficients;
  if (width == options.rank && !options.ordered) {
    if (b.defined()) multiply_out(b.mT(), a.mT(), q, exponent);
  } else {
    at::Tensor wide = b;
    if (!b.defined() || width != options.rank) wide = at::empty({a.size(1), width}, q.options()).mT();
    multiply_out(wide.mT(), a.mT(), q, exponent);
    const at::Tensor rotation = energy_order(wide).rotation.narrow(1, 0, options.rank);
    q = q.matmul(rotation);
    if (b.defined()) b.copy_(rotation.mT().matmul(wide));
  }
  double residual = std::numeric_limits<double>::quiet_NaN();
  if (options.measured) residual = relative_residual({a, exponent, squared_norm(a, exponent)}, q, b);
  if (b.defined()) scale_by_power_(b, exponent);
  return {Status::converged, q, residual};
}

}  // namespace galore_rrf
