#include "optimizer/projected_adamw.h"

#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <new>
#include <string_view>

#include "kernels.h"
#include "optimizer/rotate.h"
#include "parallel.h"
#include "range_finder/fixed_rank.h"
#include "range_finder/product.h"

namespace galore_rrf {
namespace {

// One matrix of one parameter, seen as if projected on the left: gradient and weight s x l with s
// the projected side, basis s x r, moments r x l.  A right projection is the left one of the transpose.
struct Matrix {
  at::Tensor weight, grad;
  StoredMoment exp_avg, exp_avg_sq;
  at::Tensor basis, coefficients;
  double step;  // steps taken so far
  uint32_t key;
  int64_t refresh;
};

Matrix matrix_of(const ProjectedParameter& p, int64_t index) {
  const bool stack = p.weight.dim() == 3;
  const auto pick = [&](const at::Tensor& t) { return stack && t.defined() ? t.select(0, index) : t; };
  const auto turn = [&](const at::Tensor& t) {
    return t.defined() && p.side == Side::right ? pick(t).mT() : pick(t);
  };
  const auto turn_moment = [&](const StoredMoment& moment) {
    const bool coded = moment.values.scalar_type() == at::kByte;
    return StoredMoment{turn(moment.values), coded ? pick(moment.scale) : moment.scale};
  };
  return {
      turn(p.weight), turn(p.grad),         turn_moment(p.exp_avg),   turn_moment(p.exp_avg_sq),
      pick(p.basis),  turn(p.coefficients), p.step.item().toDouble(), static_cast<uint32_t>(p.key + index),
      p.refresh};
}

bool out_of_memory(const c10::Error& error) {
  return dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr ||
         std::string_view(error.what_without_backtrace()).find("DefaultCPUAllocator") !=
             std::string_view::npos;
}

// One look at the first entry nearly always tells; a unit column may have a zero there, not everywhere.
bool has_basis(const Matrix& x) {
  const at::Tensor column = x.basis.select(1, 0);
  return column.select(0, 0).item().toDouble() != 0 || column.ne(0).any().item<bool>();
}

// Adds its lifetime, in seconds, to a sum.
class Stopwatch {
 public:
  explicit Stopwatch(double& sum) : sum_(sum) {}
  ~Stopwatch() { sum_ += std::chrono::duration<double>(Clock::now() - start_).count(); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  double& sum_;
  const Clock::time_point start_ = Clock::now();
};

// The moment itself where it is kept in the dtype asked for.
at::Tensor loaded(const StoredMoment& moment, MomentKind kind, at::ScalarType dtype) {
  if (moment.values.scalar_type() == dtype) return moment.values;
  const at::Tensor out = at::empty_like(moment.values, moment.values.options().dtype(dtype));
  kernels_for(out).load_moment(out, moment, kind);
  return out;
}

void store(const StoredMoment& moment, const at::Tensor& values, MomentKind kind) {
  if (!values.is_same(moment.values)) kernels_for(values).store_moment(moment, values, kind);
}

// Singular vectors have no sign: each column, and its row of the projected gradient, gets the one that goes
// with the previous column, since kept moments are read on in it.
void align_signs_(const at::Tensor& basis, const at::Tensor& projected, const at::Tensor& previous) {
  const at::Tensor signs = basis.mul(previous).sum(0).lt(0).to(basis.scalar_type()).mul_(-2).add_(1);
  at::Tensor columns = basis, rows = projected;
  columns.mul_(signs);
  rows.mul_(signs.unsqueeze(1));
}

class Step {
 public:
  Step(const AdamWOptions& adamw, const RefreshOptions& refresh) : adamw_(adamw), refresh_(refresh) {}

  // Adds the seconds of a refresh to `refresh_seconds`.
  Outcome operator()(const Matrix& x, double& refresh_seconds) const {
    if (x.grad.numel() == 0) return Outcome::stepped;
    // In the layout of the moments, so that the Adam element runs over three equal arrays.
    const at::Tensor projected =
        at::empty_like(x.exp_avg.values, x.grad.options().dtype(compute_dtype(x.grad)));
    Outcome outcome = Outcome::stepped;
    if (x.coefficients.defined()) {
      projected.copy_(x.coefficients);
      outcome = finite(projected) ? Outcome::refreshed : Outcome::skipped;
    } else {
      outcome = project(x, projected, refresh_seconds);
    }
    if (outcome == Outcome::stepped || outcome == Outcome::refreshed) apply(x, projected);
    if (outcome == Outcome::decayed) decay(x);
    return outcome;
  }

 private:
  // R = Q^T G, in a new subspace where one is due.
  Outcome project(const Matrix& x, const at::Tensor& projected, double& refresh_seconds) const {
    const bool known = has_basis(x);
    if (x.refresh >= 0 || !known) {
      const Stopwatch stopwatch(refresh_seconds);
      try {
        return refresh(x, projected, known);
      } catch (const c10::Error& error) {
        if (!known || !out_of_memory(error)) throw;
      } catch (const std::bad_alloc&) {
        if (!known) throw;
      }
      // No memory for a new subspace: the old one serves, and the refresh stays due.
    }
    multiply_out(projected.mT(), x.grad.mT(), x.basis.to(projected.scalar_type()));
    return finite(projected) ? Outcome::stepped : Outcome::skipped;
  }

  Outcome refresh(const Matrix& x, const at::Tensor& projected, bool known) const {
    const FixedRankOptions options{
        .rank = x.basis.size(1),
        .oversampling = refresh_.oversampling,
        // Without a previous basis a warm start begins with a random one: half a power step.
        .sketch = refresh_.sketch == Sketch::warm && !known ? Sketch::half_power : refresh_.sketch,
        .power = refresh_.power,
        // Kept moments are read in the new basis column by column, so columns need an order that lasts.
        .ordered = refresh_.moments == Moments::keep,
        .key = {refresh_.seed, x.key, static_cast<uint32_t>(std::max<int64_t>(0, x.refresh))}};
    const FixedRankResult found = fixed_rank_range_finder(x.grad, options, x.basis, projected);
    const Status status = found.status;
    const at::Tensor& basis = found.basis;
    if (status == Status::zero) {
      if (!known) return Outcome::decayed;
      projected.zero_();
      return Outcome::stepped;
    }
    if (status == Status::nonfinite || !finite(projected)) return Outcome::skipped;
    if (known && refresh_.moments == Moments::keep) align_signs_(basis, projected, x.basis);
    if (known && refresh_.moments == Moments::rotate && x.step > 0) {
      const at::Tensor s = basis.mT().matmul(x.basis.to(basis.scalar_type()));
      const at::Tensor mean = loaded(x.exp_avg, MomentKind::exp_avg, s.scalar_type());
      const at::Tensor square = loaded(x.exp_avg_sq, MomentKind::exp_avg_sq, s.scalar_type());
      rotate_moments_out(mean, square, mean, square, s, 1 - std::pow(adamw_.beta1, x.step),
                         1 - std::pow(adamw_.beta2, x.step));
      store(x.exp_avg, mean, MomentKind::exp_avg);
      store(x.exp_avg_sq, square, MomentKind::exp_avg_sq);
    }
    x.basis.copy_(basis);
    return Outcome::refreshed;
  }

  // Moments, and one product into the weight: W <- beta W + alpha Q N.
  void apply(const Matrix& x, const at::Tensor& projected) const {
    const AdamWStep step = adamw_step(adamw_, x.step + 1);
    kernels_for(x.grad).adam(projected, x.exp_avg, x.exp_avg_sq, step.element);
    add_product_(x.weight, x.basis.to(projected.scalar_type()), projected, step.decay, step.alpha);
  }

  void decay(const Matrix& x) const {
    if (adamw_.weight_decay == 0) return;
    at::Tensor weight = x.weight;
    weight.mul_(1 - adamw_.lr * adamw_.weight_decay);
  }

  static bool finite(const at::Tensor& projected) { return kernels_for(projected).all_finite(projected); }

  const AdamWOptions& adamw_;
  const RefreshOptions& refresh_;
};

}  // namespace

std::vector<Outcome> projected_adamw_(const std::vector<ProjectedParameter>& parameters,
                                      const AdamWOptions& adamw, const RefreshOptions& refresh,
                                      const at::Tensor& refresh_seconds) {
  std::vector<Matrix> matrices;
  std::vector<size_t> owner;
  std::vector<double> costs;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const ProjectedParameter& p = parameters[i];
    const int64_t count = p.weight.dim() == 3 ? p.weight.size(0) : 1;
    for (int64_t j = 0; j < count; ++j) {
      matrices.push_back(matrix_of(p, j));
      owner.push_back(i);
      costs.push_back(static_cast<double>(p.basis.size(-1)) *
                      static_cast<double>(matrices.back().grad.numel()) * (p.refresh >= 0 ? 2.5 : 1));
    }
  }

  const Step step(adamw, refresh);
  std::vector<Outcome> outcomes(matrices.size(), Outcome::skipped);
  std::vector<double> seconds(matrices.size(), 0.0);
  std::vector<std::exception_ptr> errors(matrices.size());
  for_each_in_parallel(costs, [&](int64_t i, int64_t abreast) {
    const auto k = static_cast<size_t>(i);
    try {
      outcomes[k] = step(matrices[k], seconds[k]);
    } catch (...) {
      errors[k] = std::current_exception();  // told once the clocks of all others have moved
    }
    seconds[k] /= static_cast<double>(abreast);
  });

  // A stack keeps one clock: it has refreshed or stepped if any of its matrices has.
  const auto rank = [](Outcome o) {
    return o == Outcome::refreshed ? 3 : o == Outcome::stepped ? 2 : o == Outcome::decayed ? 1 : 0;
  };
  std::vector<Outcome> result(parameters.size(), Outcome::skipped);
  for (size_t i = 0; i < matrices.size(); ++i) {
    if (rank(outcomes[i]) > rank(result[owner[i]])) result[owner[i]] = outcomes[i];
    if (refresh_seconds.defined()) refresh_seconds.mutable_data_ptr<double>()[owner[i]] += seconds[i];
  }
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (result[i] == Outcome::stepped || result[i] == Outcome::refreshed) {
      at::Tensor count = parameters[i].step;
      count.add_(1);
    }
  }
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  return result;
}

}  // namespace galore_rrf
