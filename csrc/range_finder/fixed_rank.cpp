#include "range_finder/fixed_rank.h"

#include <ATen/Context.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "range_finder/energy_order.h"
#include "range_finder/orthonormal.h"
#include "range_finder/residual.h"
#include "range_finder/scaling.h"

namespace galore_rrf {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

class Sketcher {
 public:
  Sketcher(const Matrices& a, const FixedRankOptions& options, const std::vector<SketchKey>& keys,
           const Matrices& warm, const at::Tensor& warm_products, int64_t width)
      : a_(a),
        a_transposed_(transposed(a)),
        options_(options),
        keys_(keys),
        warm_(warm),
        warm_products_(warm_products),
        width_(width) {}

  // Y (B x m x width), whose columns span nearly the ranges of 2^-exponents a.
  at::Tensor operator()(Sketch sketch, const at::Tensor& exponents) const {
    if (sketch == Sketch::half_power || sketch == Sketch::warm) {
      return multiply(a_, inner(left_products(sketch, exponents)), exponents);
    }
    at::Tensor y = multiply(a_, test_matrices(a_.front().size(1), width_), exponents);
    if (sketch == Sketch::power) {
      for (int64_t i = 0; i < options_.power; ++i) {
        y = multiply(a_, inner(multiply(a_transposed_, inner(y), exponents)), exponents);
      }
    }
    return y;
  }

 private:
  at::Tensor inner(const at::Tensor& panels) const { return inner_bases_(panels, options_.asynchronous); }

  at::Tensor test_matrices(int64_t rows, int64_t cols, int64_t first = 0) const {
    const at::Tensor& like = a_.front();
    const at::Tensor omega =
        at::empty({static_cast<int64_t>(a_.size()), rows, cols}, like.options().dtype(compute_dtype(like)));
    for (size_t i = 0; i < a_.size(); ++i) {
      kernels_for(omega).fill_sketch(omega.select(0, static_cast<int64_t>(i)), keys_[i], 0, first);
    }
    return omega;
  }

  // 2^-exponents a^T times the left test matrices.
  at::Tensor left_products(Sketch sketch, const at::Tensor& exponents) const {
    if (sketch != Sketch::warm || !warm_products_.defined()) {
      return multiply(a_transposed_, left_test_matrices(sketch), exponents);
    }
    const int64_t rows = a_.front().size(0), known = std::min(warm_products_.size(2), width_);
    const at::Tensor products =
        at::empty({warm_products_.size(0), width_, warm_products_.size(1)}, warm_products_.options()).mT();
    products.narrow(2, 0, known).copy_(scaled_down(warm_products_, exponents).narrow(2, 0, known));
    if (known < width_) {
      const at::Tensor omega = test_matrices(rows, width_ - known, known);
      products.narrow(2, known, width_ - known).copy_(multiply(a_transposed_, omega, exponents));
    }
    return products;
  }

  // The previous bases, with Gaussian columns where they are narrower than the sketch; or those alone.
  at::Tensor left_test_matrices(Sketch sketch) const {
    const int64_t rows = a_.front().size(0);
    if (sketch != Sketch::warm) return test_matrices(rows, width_);
    const int64_t known = std::min(warm_.front().size(1), width_);
    const at::Tensor previous = stacked(warm_, compute_dtype(a_.front())).narrow(2, 0, known);
    if (known == width_) return previous;
    return at::cat({previous, test_matrices(rows, width_ - known, known)}, 2);
  }

  const Matrices& a_;
  const Matrices a_transposed_;
  const FixedRankOptions& options_;
  const std::vector<SketchKey>& keys_;
  const Matrices& warm_;
  const at::Tensor& warm_products_;
  int64_t width_;
};

bool all_safe(const at::Tensor& sketches) {
  const at::Tensor sums = at::empty({sketches.size(0)}, sketches.options().dtype(at::kDouble));
  kernels_for(sketches).squared_norms(sums, sketches);
  const at::Tensor norms = sums.cpu();
  const double* squared = norms.const_data_ptr<double>();
  return std::all_of(squared, squared + norms.numel(),
                     [&](double norm) { return is_safe(norm, sketches.scalar_type()); });
}

// B = Q^T 2^-exponents a; with Q as it is where a residual is to rest on that, else rounded to the dtype of a
// where lists are multiplied together.
void coefficients_out(const at::Tensor& b, const Matrices& a, const at::Tensor& q,
                      const at::Tensor& exponents, bool exact) {
  at::Tensor factor = scaled_down(q, exponents);
  if (kernels_for(q).products && !exact) factor = factor.to(a.front().scalar_type());
  multiply_out(each(b.mT()), transposed(a), each(factor));
}

// The `rank` directions of most energy of Q, which is wider or in no order, and Q^T a of them.  Eigenvalue
// and singular value decompositions wait for the device, and refuse what is not finite.
at::Tensor ordered(const Matrices& a, const at::Tensor& q, int64_t rank, const Scaling& scaling,
                   const at::Tensor& coefficients, bool exact) {
  const at::NoTF32Guard no_tf32;
  const at::Tensor wide = at::empty({q.size(0), a.front().size(1), q.size(2)}, q.options()).mT();
  coefficients_out(wide, a, q, scaling.exponents, exact);
  const at::Tensor nothing = scaling.status.ne(static_cast<int64_t>(Status::converged));
  if (nothing.any().item<bool>()) wide.masked_fill_(nothing.view({-1, 1, 1}), 0);
  const at::Tensor result = at::empty({q.size(0), rank, q.size(1)}, q.options()).mT();
  for (int64_t i = 0; i < q.size(0); ++i) {
    const at::Tensor rotation = energy_order(wide.select(0, i)).rotation.narrow(1, 0, rank);
    result.select(0, i).copy_(q.select(0, i).matmul(rotation));
    if (coefficients.defined()) coefficients.select(0, i).copy_(rotation.mT().matmul(wide.select(0, i)));
  }
  return result;
}

}  // namespace

FixedRankResult fixed_rank_range_finder(const Matrices& a, const FixedRankOptions& options,
                                        const std::vector<SketchKey>& keys, const Matrices& warm,
                                        const at::Tensor& coefficients, const at::Tensor& warm_products) {
  const at::Tensor& first = a.front();
  const int64_t least = std::min(first.size(0), first.size(1));
  const int64_t width = std::min(options.rank + options.oversampling, least);
  TORCH_CHECK_VALUE(width >= options.rank, "Invalid rank: ", options.rank, " (must be from 1 to ", width,
                    ", the smaller side of a ", first.size(0), " x ", first.size(1), " matrix)");

  const Sketcher sketcher(a, options, keys, warm, warm_products, width);
  const auto count = static_cast<int64_t>(a.size());
  Scaling scaling{
      {}, at::full({count}, static_cast<int64_t>(Status::converged), first.options().dtype(at::kByte))};
  if (options.asynchronous) scaling = scaling_of(a);
  at::Tensor y = sketcher(options.sketch, scaling.exponents);
  if (!options.asynchronous && !all_safe(y)) {
    scaling = scaling_of(a);
    const bool any = scaling.status.eq(static_cast<int64_t>(Status::converged)).any().item<bool>();
    if (!any) return {{}, scaling.status, std::vector<double>(a.size(), kNaN)};
    y = sketcher(options.sketch, scaling.exponents);
    if (options.sketch == Sketch::warm && !all_safe(y)) {
      y = sketcher(Sketch::half_power, scaling.exponents);  // the previous basis is orthogonal to all of a
    }
  }

  at::Tensor q = orthonormal_bases_(y, options.panel, options.asynchronous);
  y.reset();
  const at::Tensor& b = coefficients;
  if (width != options.rank || options.ordered) {
    q = ordered(a, q, options.rank, scaling, b, options.measured);
  } else if (b.defined()) {
    coefficients_out(b, a, q, scaling.exponents, options.measured);
  }
  FixedRankResult result{q, scaling.status, std::vector<double>(a.size(), kNaN)};
  if (options.measured) {
    const at::Tensor exponents = scaling.exponents.defined() ? scaling.exponents.cpu() : at::Tensor();
    for (size_t i = 0; i < a.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      const int exponent = exponents.defined() ? exponents.const_data_ptr<int32_t>()[i] : 0;
      const ScaledMatrix matrix{a[i], exponent, squared_norm(a[i], exponent)};
      if (matrix.squared_norm > 0) {
        result.residuals[i] = relative_residual(matrix, q.select(0, at), b.select(0, at));
      }
    }
  }
  if (b.defined() && scaling.exponents.defined()) kernels_for(b).scale_by_powers_(b, scaling.exponents, 1);
  return result;
}

}  // namespace galore_rrf
