#include "range_finder/blocks.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <cmath>

#include "range_finder/measured_norms.h"
#include "range_finder/orthonormal.h"
#include "range_finder/product.h"
#include "range_finder/reflectors.h"
#include "range_finder/residual.h"
#include "range_finder/scaling.h"
#include "range_finder/sketch.h"
#include "range_finder/trailing_rows.h"

namespace galore_rrf {
namespace {

at::TensorOptions computing(const at::Tensor& a) { return a.options().dtype(compute_dtype(a)); }

// Every block an explicit Q_i with B_i = Q_i^T A.  Right-looking: A <- A - Q_i B_i (Martinsson and
// Voronin's randQB); left-looking: A stays, and only sketches of it are cleared of earlier blocks.
class ExplicitBlocks final : public Blocks {
 public:
  ExplicitBlocks(const ScaledMatrix& matrix, const AdaptiveOptions& options, int64_t columns, Method method)
      : options_(options),
        a_(method == Method::right_looking ? computing_copy(matrix) : matrix.a),
        exponent_(method == Method::right_looking ? 0 : matrix.exponent),
        deflating_(method == Method::right_looking),
        q_(at::empty({columns, a_.size(0)}, computing(a_)).mT()),
        b_(at::empty({columns, a_.size(1)}, computing(a_))),
        reflectors_(a_.size(0), computing(a_)),
        left_(matrix.squared_norm),
        uncertainty_(deflating_ ? 0
                                : kDifferenceUnits * unit_roundoff(q_.scalar_type()) * matrix.squared_norm) {}

  void grow(StopTest& stop) override {
    for (int64_t i = 0; i < stop.wanted(); ++i) stop.measured(add(stop.width(i)));
  }

  int64_t rank() const override { return rank_; }
  at::Tensor basis() const override { return q_.narrow(1, 0, rank_); }
  at::Tensor coefficients() const override { return b_.narrow(0, 0, rank_); }
  BlockReflector reflector() const override { return reflectors_.merged(); }
  double uncertainty() const override { return uncertainty_; }

 private:
  // Returns the squared norm of what is left.
  double add(int64_t width) {
    const at::Tensor y = multiply(a_, right_factor(width), exponent_);
    const bool householder = options_.between == Between::householder;
    const at::Tensor q = householder ? reflected(y) : projected(y);
    const at::Tensor b = b_.narrow(0, rank_, width);
    multiply_out(b.mT(), a_.mT(), q, exponent_);
    q_.narrow(1, rank_, width).copy_(q);
    rank_ += width;
    if (deflating_) {
      a_.addmm_(q, b, /*beta=*/1, /*alpha=*/-1);
      const MeasuredNorms norm(a_, 1);
      norm.measure(0, a_.unsqueeze(0));
      norm.wait();
      return norm[0];
    }
    left_ -= kept_energy(q, b);
    return std::max(left_, 0.0);
  }

  // What A is multiplied by: Gaussian, or orthonormal rows of what is left that half a power step found.
  at::Tensor right_factor(int64_t width) const {
    const bool half_power = options_.sketch == Sketch::half_power;
    const at::Tensor omega = test_matrix(a_, a_.size(half_power ? 0 : 1), width, options_.key, rank_);
    if (!half_power) return omega;
    at::Tensor z = multiply(a_.mT(), omega, exponent_);
    if (!deflating_) z.addmm_(coefficients().mT(), basis().mT().matmul(omega), /*beta=*/1, /*alpha=*/-1);
    return inner_basis_(z);
  }

  // Householder: the reflectors so far take the earlier blocks out of y; those of the rest give Q_i.
  at::Tensor reflected(const at::Tensor& y) {
    reflectors_.apply_transposed_(y);
    reflectors_.add(panel_qr(y.narrow(0, rank_, y.size(0) - rank_), options_.panel).h);
    return reflectors_.columns(rank_);
  }

  // Gram-Schmidt: y less what lies in Q, and again until rounding brings nothing back.  Where nothing is
  // left of a column any other will do: a Gaussian one.
  at::Tensor projected(const at::Tensor& y) const {
    // As long as less is taken out of all (unit) columns together, the panel keeps a condition number under
    // sqrt(2), and its own orthogonalisation brings back no more than rounding.
    constexpr double kMost = 0.5;
    const double nothing = 1e3 * unit_roundoff(y.scalar_type());
    at::Tensor q = y;
    for (bool again = true, first = true; again; first = false) {
      q.addmm_(basis(), basis().mT().matmul(q), /*beta=*/1, /*alpha=*/-1);
      const at::Tensor lengths = at::linalg_vector_norm(q, 2, 0);
      again = first || static_cast<double>(q.size(1)) - lengths.square().sum().item<double>() > kMost;
      if (!first && again) {
        q = at::where(lengths.lt(nothing), test_matrix(a_, q.size(0), q.size(1), options_.key, rank_), q);
      }
      q = orthonormal_panel(q, options_.panel).q;
    }
    return q;
  }

  const AdaptiveOptions& options_;
  at::Tensor a_;
  int exponent_;
  bool deflating_;
  at::Tensor q_, b_;  // as wide as can be needed; pages never written to take no memory
  Reflectors reflectors_;
  int64_t rank_ = 0;
  double left_;
  double uncertainty_;
};

}  // namespace

at::Tensor computing_copy(const ScaledMatrix& matrix) {
  const at::Tensor copy = at::empty(matrix.a.sizes(), computing(matrix.a));
  copy.copy_(matrix.a);
  scale_by_power_(copy, -matrix.exponent);
  return copy;
}

bool looks_ahead(const at::Tensor& a, const AdaptiveOptions& options, Method method) {
  // Published, on a GPU: .87 of the speed at 1024^2, 1.16 at 4096^2 (Penke and Herten 2026).  On a CPU no
  // gain was seen (docs/range_finders.md).
  constexpr int64_t kPays = 4096 * 4096;
  const bool can = method == Method::right_looking && options.between == Between::householder &&
                   options.sketch == Sketch::plain;
  return can && options.look_ahead.value_or(!a.is_cpu() && a.numel() >= kPays);
}

std::unique_ptr<Blocks> make_blocks(const ScaledMatrix& matrix, const AdaptiveOptions& options,
                                    int64_t columns, Method method) {
  if (method == Method::right_looking && options.between == Between::householder) {
    return make_trailing_rows(matrix, options, looks_ahead(matrix.a, options, method));
  }
  return std::make_unique<ExplicitBlocks>(matrix, options, columns, method);
}

}  // namespace galore_rrf
