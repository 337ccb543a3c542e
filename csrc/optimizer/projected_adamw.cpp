#include "optimizer/projected_adamw.h"

#include <ATen/Context.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/nan_to_num.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <new>
#include <string_view>

#include "kernels.h"
#include "optimizer/group.h"
#include "optimizer/limited_scales.h"
#include "optimizer/measures.h"
#include "optimizer/rotate.h"
#include "optimizer/tiled_update.h"
#include "parallel.h"
#include "range_finder/fixed_rank.h"
#include "range_finder/product.h"
#include "range_finder/scaling.h"

namespace galore_rrf {
namespace {

bool out_of_memory(const c10::Error& error) {
  return dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr ||
         std::string_view(error.what_without_backtrace()).find("DefaultCPUAllocator") !=
             std::string_view::npos;
}

// Does its work; false where memory ran out, before anything was written.
template <class Work>
bool memory_suffices(const Work& work) {
  try {
    work();
    return true;
  } catch (const c10::Error& error) {
    if (!out_of_memory(error)) throw;
  } catch (const std::bad_alloc&) {
  }
  return false;
}

// Which matrices have a basis, as bool [B]: zeros mean none yet, and a unit column may have a zero, not all.
at::Tensor have_bases(const Matrices& bases) {
  if (!bases.front().is_cpu()) {
    Matrices columns;
    for (const at::Tensor& basis : bases) columns.push_back(basis.select(1, 0));
    return at::stack(columns).ne(0).any(1);
  }
  const at::Tensor flags = at::empty({static_cast<int64_t>(bases.size())}, at::kBool);
  bool* flag = flags.mutable_data_ptr<bool>();
  for (const at::Tensor& basis : bases) {
    // One look at the first entry nearly always tells.
    const at::Tensor column = basis.select(1, 0);
    *flag++ = column.select(0, 0).item().toDouble() != 0 || column.ne(0).any().item<bool>();
  }
  return flags;
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

// Singular vectors have no sign: each column, and its row of the projected gradient, gets the one that goes
// with the previous column, since kept moments are read on in it.  `projected` may be undefined.
void align_signs_(const at::Tensor& bases, const at::Tensor& projected, const at::Tensor& previous) {
  const at::Tensor signs = bases.mul(previous).sum(1).lt(0).to(bases.scalar_type()).mul_(-2).add_(1);
  at::Tensor columns = bases, rows = projected;
  columns.mul_(signs.unsqueeze(1));
  if (rows.defined()) rows.mul_(signs.unsqueeze(2));
}

// Whether all of these flags (bool) are `value`, where the host may know.
bool known_to_be(bool value, const at::Tensor& flags, bool asynchronous) {
  if (asynchronous) return false;
  const bool* flag = flags.const_data_ptr<bool>();
  return std::all_of(flag, flag + flags.numel(), [&](bool f) { return f == value; });
}

int64_t code(Outcome outcome) { return static_cast<int64_t>(outcome); }

// Outcomes, uint8 [B], by flags (bool [B]).
at::Tensor chosen(const at::Tensor& flags, Outcome yes, Outcome no) {
  if (!flags.is_cpu()) return at::where(flags, code(yes), code(no)).to(at::kByte);
  const at::Tensor outcomes = at::empty(flags.sizes(), at::kByte);
  const bool* flag = flags.const_data_ptr<bool>();
  std::transform(flag, flag + flags.numel(), outcomes.mutable_data_ptr<uint8_t>(),
                 [&](bool f) { return static_cast<uint8_t>(f ? yes : no); });
  return outcomes;
}

// The outcomes themselves where the flags say so.
at::Tensor chosen(const at::Tensor& flags, const at::Tensor& yes, Outcome no) {
  return known_to_be(true, flags, !flags.is_cpu()) ? yes : at::where(flags, yes, code(no)).to(at::kByte);
}

// Moments begin again where `active` (bool [B]).
void zero_moments(const Group& x, const at::Tensor& active) {
  at::Tensor zeros = stack_like_moments(x, compute_dtype(x.grads.front()));
  zeros.zero_();
  const at::Tensor flags = active.to(at::kByte);
  const Kernels& kernels = kernels_for(zeros);
  kernels.store_moments(x.exp_avgs, zeros, MomentKind::exp_avg, flags);
  kernels.store_moments(x.exp_avg_sqs, zeros, MomentKind::exp_avg_sq, flags);
}

// A stack has one clock: where that begins again, so do the moments of those of its matrices that have not
// been refreshed.  `results`: of the parameters.
void zero_moments_beside(const Group& x, const at::Tensor& outcomes, const at::Tensor& results,
                         bool asynchronous) {
  Matrices of_owners;
  for (const size_t owner : x.owners) of_owners.push_back(results.select(0, static_cast<int64_t>(owner)));
  const int64_t refreshed = code(Outcome::refreshed);
  const at::Tensor beside = at::logical_and(at::stack(of_owners).eq(refreshed), outcomes.ne(refreshed));
  if (!known_to_be(false, beside, asynchronous)) zero_moments(x, beside);
}

class Step {
 public:
  Step(const at::Tensor& lr, const AdamWOptions& adamw, const ProjectionOptions& projection,
       bool asynchronous)
      : lr_(lr), adamw_(adamw), projection_(projection), asynchronous_(asynchronous) {}

  // Outcomes, uint8 [B]; adds the seconds of a refresh to `refresh_seconds`.
  at::Tensor operator()(const Group& x, double& refresh_seconds, const Measures& measures) const {
    if (projection_.residual != Residual::feedback) return step(x, refresh_seconds, measures);
    Group fed = x;
    for (size_t i = 0; i < fed.grads.size(); ++i) {
      fed.grads[i] = at::add(x.grads[i], x.residual_states[i], projection_.residual_scale);
    }
    return step(fed, refresh_seconds, measures);
  }

 private:
  at::Tensor step(const Group& x, double& refresh_seconds, const Measures& measures) const {
    const at::Tensor& grad = x.grads.front();
    if (grad.numel() == 0) {
      if (measures.wanted()) {
        measures.gradient.zero_();
        measures.projected.zero_();
      }
      return at::full({x.count()}, code(Outcome::stepped), grad.options().dtype(at::kByte));
    }
    const at::Tensor projected = stack_like_moments(x, compute_dtype(grad));
    at::Tensor outcomes;
    Successor next;
    if (x.coefficients.empty()) {
      outcomes = project(x, projected, refresh_seconds, measures.turn, next);
    } else {
      for (size_t i = 0; i < x.coefficients.size(); ++i) {
        projected.select(0, static_cast<int64_t>(i)).copy_(x.coefficients[i]);
      }
      outcomes = chosen(finite(projected), Outcome::refreshed, Outcome::skipped);
    }
    if (measures.wanted()) measure_gradients(measures, x, projected, outcomes);
    apply(x, projected, outcomes);
    if (next.bases.defined()) {
      const Stopwatch stopwatch(refresh_seconds);
      if (memory_suffices([&] { move(x, next, /*stepped=*/1, measures.turn); })) {
        return at::where(next.ok, code(Outcome::refreshed), outcomes).to(at::kByte);
      }
    }
    return outcomes;
  }

  // A subspace that serves from the next step on; no bases: none was found.
  struct Successor {
    at::Tensor bases;      // B x s x r
    at::Tensor ok, known;  // bool [B]: whether it was found, and whether there was one before
  };

  // R = Q^T G, in new subspaces where those are due at the start; `next` where at the end.
  at::Tensor project(const Group& x, const at::Tensor& projected, double& refresh_seconds,
                     const at::Tensor& turn, Successor& next) const {
    // Without a basis a matrix is refreshed at once, if that can be known.
    const at::Tensor known = have_bases(x.bases);
    const bool none_known = known_to_be(false, known, asynchronous_);
    at::Tensor outcomes;
    if (x.refresh == Refresh::start || none_known) {
      const Stopwatch stopwatch(refresh_seconds);
      if (none_known) return refresh(x, projected, known, turn);
      // Where there is no memory for new subspaces the old ones serve, and the refresh stays due.
      if (memory_suffices([&] { outcomes = refresh(x, projected, known, turn); })) return outcomes;
    }
    multiply_out(each(projected.mT()), transposed(x.grads), x.bases);
    outcomes = chosen(finite(projected), chosen(known, Outcome::stepped, Outcome::decayed), Outcome::skipped);
    if (x.refresh == Refresh::end) {
      const Stopwatch stopwatch(refresh_seconds);
      memory_suffices([&] { next = successor(x, projected, known, outcomes); });
    }
    return outcomes;
  }

  at::Tensor refresh(const Group& x, const at::Tensor& projected, const at::Tensor& known,
                     const at::Tensor& turn) const {
    const bool none_known = known_to_be(false, known, asynchronous_);
    const FixedRankOptions options = range_finder_options(x, none_known);
    const FixedRankResult found =
        fixed_rank_range_finder(x.grads, options, x.keys, warm_starts(x, known, options), projected);
    const at::Tensor zero = found.status.eq(static_cast<int64_t>(Status::zero));
    const at::Tensor otherwise =
        chosen(zero, chosen(known, Outcome::stepped, Outcome::decayed), Outcome::skipped);
    if (!found.basis.defined()) {
      at::Tensor(projected).zero_();
      return otherwise;
    }
    const at::Tensor ok =
        at::logical_and(found.status.eq(static_cast<int64_t>(Status::converged)), finite(projected));
    if (!known_to_be(true, ok, asynchronous_)) {
      at::Tensor(projected).masked_fill_(ok.logical_not().view({-1, 1, 1}), 0);
    }
    const at::Tensor outcomes = at::where(ok, code(Outcome::refreshed), otherwise).to(at::kByte);
    if (known_to_be(false, ok, asynchronous_)) return outcomes;
    if (!none_known && projection_.moments == Moments::keep) {
      align_signs_(found.basis, projected, stacked(x.bases, projected.scalar_type()));
    }
    move(x, {found.basis, ok, known}, /*stepped=*/0, turn);
    return outcomes;
  }

  // The subspace after this step: a warm start has its product with the old basis, which is R.
  Successor successor(const Group& x, const at::Tensor& projected, const at::Tensor& known,
                      const at::Tensor& outcomes) const {
    const at::Tensor stepping = outcomes.ne(code(Outcome::skipped));
    if (known_to_be(false, stepping, asynchronous_)) return {};
    const bool warm = projection_.sketch == Sketch::warm;
    const FixedRankResult found = fixed_rank_range_finder(
        x.grads, range_finder_options(x, /*none_known=*/false), x.keys, x.bases,
        /*coefficients=*/{}, warm ? or_gaussian(x, projected.mT(), known) : at::Tensor());
    if (!found.basis.defined()) return {};
    const at::Tensor ok = at::logical_and(found.status.eq(static_cast<int64_t>(Status::converged)), stepping);
    if (known_to_be(false, ok, asynchronous_)) return {};
    if (projection_.moments == Moments::keep) {
      align_signs_(found.basis, {}, stacked(x.bases, found.basis.scalar_type()));
    }
    return {found.basis, ok, known};
  }

  FixedRankOptions range_finder_options(const Group& x, bool none_known) const {
    return {
        .rank = x.bases.front().size(1),
        .oversampling = projection_.oversampling,
        // Without a previous basis a warm start begins with a random one: half a power step.
        .sketch = projection_.sketch == Sketch::warm && none_known ? Sketch::half_power : projection_.sketch,
        .power = projection_.power,
        // Kept moments are read in the new basis column by column, so columns need an order that lasts.
        .ordered = projection_.moments == Moments::keep,
        .panel = Panel::automatic,
        .asynchronous = asynchronous_};
  }

  // The previous bases; where some have none yet and which is not to be known, Gaussian columns for those.
  Matrices warm_starts(const Group& x, const at::Tensor& known, const FixedRankOptions& options) const {
    if (options.sketch != Sketch::warm || known_to_be(true, known, asynchronous_)) return x.bases;
    return each(or_gaussian(x, stacked(x.bases, compute_dtype(x.grads.front())), known));
  }

  // The panels, with Gaussian ones in place of those that are not known.
  at::Tensor or_gaussian(const Group& x, const at::Tensor& panels, const at::Tensor& known) const {
    if (known_to_be(true, known, asynchronous_)) return panels;
    const at::Tensor omega = at::empty(panels.sizes(), panels.options());
    for (int64_t i = 0; i < x.count(); ++i) {
      kernels_for(omega).fill_sketch(omega.select(0, i), x.keys[static_cast<size_t>(i)], 0, 0);
    }
    return at::where(known.view({-1, 1, 1}), panels, omega);
  }

  // Moments and bases move to new subspaces; `stepped`: the steps that moments have seen beyond those
  // counted.
  void move(const Group& x, const Successor& to, int64_t stepped, const at::Tensor& turn) const {
    // All that is allocated comes before what is written, here and in rotate.
    at::Tensor bases = to.bases;
    if (!known_to_be(true, to.ok, asynchronous_)) {
      // In the bases' own order, so that all are copied in one launch.
      const at::Tensor cast = bases.to(x.bases.front().scalar_type());
      bases = at::where(to.ok.view({-1, 1, 1}), cast, at::stack(x.bases)).contiguous();
    }
    const bool rotating = projection_.moments == Moments::rotate;
    if ((rotating || turn.defined()) && !known_to_be(false, to.known, asynchronous_)) {
      const at::NoTF32Guard no_tf32;
      const at::Tensor s = to.bases.mT().matmul(stacked(x.bases, to.bases.scalar_type()));
      const at::Tensor moving = at::logical_and(to.ok, to.known);
      const at::Tensor cosines = turn.defined() ? mean_squared_cosines(s, moving) : at::Tensor();
      if (rotating) rotate(x, to.bases, s, moving, stepped);
      if (turn.defined()) at::Tensor(turn).copy_(cosines);
    }
    if (projection_.moments == Moments::reset) zero_moments(x, to.ok);
    at::_foreach_copy_(x.bases, each(bases));
  }

  // Moves the moments by S = Q_new^T Q_old where `moving`, and where there have been steps to rotate.
  void rotate(const Group& x, const at::Tensor& bases, const at::Tensor& s, const at::Tensor& moving,
              int64_t stepped) const {
    const at::Tensor steps = at::stack(x.steps).view(-1).to(at::kDouble).add(stepped);
    const at::Tensor active = at::logical_and(moving, steps.gt(0));
    if (known_to_be(false, active, asynchronous_)) return;
    const at::Tensor corrections = at::stack(
        {at::pow(adamw_.beta1, steps).neg_().add_(1), at::pow(adamw_.beta2, steps).neg_().add_(1)}, 1);
    // A single moment of this dtype that is known to move is rotated where it lies; not before what it loses
    // has been fed back, for which memory may run out.
    const at::ScalarType dtype = s.scalar_type();
    const bool feeds_back = projection_.residual == Residual::feedback;
    const bool in_place = x.count() == 1 && !feeds_back && known_to_be(true, active, asynchronous_) &&
                          x.exp_avgs.front().values.scalar_type() == dtype;
    const auto loaded = [&](const StoredMoments& moments, MomentKind kind) {
      if (in_place) return moments.front().values.unsqueeze(0);
      const at::Tensor out = stack_like_moments(x, dtype);
      kernels_for(out).load_moments(out, moments, kind);
      return out;
    };
    const at::Tensor mean = loaded(x.exp_avgs, MomentKind::exp_avg);
    const at::Tensor square = loaded(x.exp_avg_sqs, MomentKind::exp_avg_sq);
    const at::Tensor two_means = feeds_back ? at::cat({mean, mean}, 1) : at::Tensor();
    rotate_moments_out(mean, square, mean, square, s, corrections);
    if (feeds_back) {
      two_means.narrow(1, s.size(2), s.size(1)).copy_(mean);
      feed_back_momentum(x, bases, two_means, active);
    }
    if (in_place) return;
    const at::Tensor flags = active.to(at::kByte);
    kernels_for(mean).store_moments(x.exp_avgs, mean, MomentKind::exp_avg, flags);
    kernels_for(square).store_moments(x.exp_avg_sqs, square, MomentKind::exp_avg_sq, flags);
  }

  // What the first moment loses by rotation is fed back: to the effect of all steps to come it would have
  // added beta1 / (1 - beta1) times itself.  means: the old over the new (B x 2r x l), overwritten.
  void feed_back_momentum(const Group& x, const at::Tensor& bases, at::Tensor means,
                          const at::Tensor& active) const {
    const double sign = adamw_.maximize ? -1 : 1;  // of the moment, beside the gradient's
    const double share = sign * projection_.residual_scale * adamw_.beta1 / (1 - adamw_.beta1);
    const at::Tensor idle = active.logical_not().view({-1, 1, 1});
    // One product, and what is in half precision is rounded once.
    const at::Tensor old_bases = at::stack(x.bases);
    const at::Tensor both = at::cat({old_bases, bases.to(old_bases.scalar_type())}, 2);
    both.narrow(2, old_bases.size(2), bases.size(2)).neg_();
    add_products_(x.grads, each(both), means.mul_(share).masked_fill_(idle, 0));
  }

  // The steps that the moments have seen.
  std::vector<at::Tensor> steps_seen(const Group& x, const at::Tensor& outcomes) const {
    if (projection_.moments != Moments::reset) return x.steps;
    return each(at::stack(x.steps).view(-1).masked_fill(outcomes.eq(code(Outcome::refreshed)), 0));
  }

  // Moments, and one product into each weight: W <- decay W + Q N; where the residual makes a step too or
  // weights are rounded stochastically, by tiles.
  void apply(const Group& x, const at::Tensor& projected, const at::Tensor& outcomes) const {
    const Kernels& kernels = kernels_for(projected);
    const at::Tensor factors = at::empty({x.count(), 3}, projected.options().dtype(at::kDouble));
    const std::vector<at::Tensor> steps = steps_seen(x, outcomes);
    kernels.step_factors(factors, steps, lr_, outcomes, adamw_);
    const at::Tensor decays = factors.select(1, 2).clone();
    if (!asynchronous_ && !moves(outcomes.const_data_ptr<uint8_t>()[0])) return decay(x, decays);

    const at::Tensor moving = outcomes.ge(code(Outcome::stepped));
    const at::Tensor r = projection_.residual == Residual::drop ? projected : projected.clone();
    at::Tensor rates;  // of directions, where they or the residual have a length of their own
    if (projection_.residual != Residual::drop) {
      r.masked_fill_(moving.logical_not().view({-1, 1, 1}), 0);
      rates = moving.to(at::kDouble).mul_(lr_).mul_(adamw_.scale);
      if (adamw_.arithmetic != Arithmetic::torch) rates.mul_(decays);  // which comes last there
    }
    const double share = (adamw_.maximize ? 1 : -1) * projection_.residual_scale;
    const at::Tensor lengths = rates.defined() ? rates.mul(share) : at::Tensor();
    const std::optional<TiledUpdate> by_tiles = tiled_update(x, r, lengths);  // before moments move

    const bool scaled = projection_.residual == Residual::scaled;
    if (scaled) {
      // Directions first, whose norms are compared: their lengths are not to depend on the learning rate.
      AdamWOptions unit = adamw_;
      unit.scale = 1;
      unit.weight_decay = 0;
      kernels.step_factors(factors, steps, at::ones({}, factors.options()), outcomes, unit);
    }
    kernels.adam(projected, x.exp_avgs, x.exp_avg_sqs, factors, outcomes, adamw_);
    if (projection_.residual == Residual::feedback) keep_errors(x, r, moving);
    at::Tensor column_scales;
    if (scaled) {
      column_scales = limited_scales(x.grads, projected, r, lengths, x.residual_states, moving);
      at::Tensor(projected).mul_(rates.to(projected.scalar_type()).view({-1, 1, 1}));
      // E diag(scales) = G diag(scales) - Q R diag(scales)
      at::Tensor(projected).addcmul_(r, column_scales.unsqueeze(1), -1);
    }
    if (by_tiles) return (*by_tiles)(projected, decays, column_scales);
    if (kernels.products) {
      const at::Tensor decay = lr_.mul(-adamw_.weight_decay).add_(1).to(projected.scalar_type());
      // Without decay what is skipped adds a step of 0, and no one need look.
      const at::Tensor skipping = adamw_.weight_decay == 0 ? at::Tensor() : outcomes;
      const at::ScalarType dtype = x.weights.front().scalar_type();
      if (kernels.products(x.weights, x.bases, each(projected.to(dtype)), decay, skipping)) return;
    }
    for (int64_t i = 0; i < x.count(); ++i) {
      const auto at = static_cast<size_t>(i);
      add_product_(x.weights[at], x.bases[at].to(projected.scalar_type()), projected.select(0, i),
                   decays.select(0, i));
    }
  }

  std::optional<TiledUpdate> tiled_update(const Group& x, const at::Tensor& r,
                                          const at::Tensor& lengths) const {
    const at::ScalarType dtype = x.weights.front().scalar_type();
    std::optional<RowRounding> rounding;
    if (projection_.stochastic_rounding && (dtype == at::kBFloat16 || dtype == at::kHalf)) {
      rounding = {x.keys, x.steps, x.side == Side::right};
    }
    const bool in_products =
        projection_.residual == Residual::drop || projection_.residual == Residual::feedback;
    if (in_products && !rounding) return std::nullopt;
    const WeightsAndGradients matrices{x.weights, x.grads, x.bases};
    return std::make_optional<TiledUpdate>(matrices, projection_.residual, r, lengths, std::move(rounding));
  }

  // Of a single matrix that makes no step.
  static void decay(const Group& x, const at::Tensor& decays) {
    if (decays.item<double>() != 1) at::Tensor(x.weights.front()).mul_(decays.select(0, 0));
  }

  // error <- G - Q R, G with the error that it was fed, where there is a step (`moving`, bool [B]).
  void keep_errors(const Group& x, const at::Tensor& r, const at::Tensor& moving) const {
    const Matrices moving_each = each(moving);
    for (size_t i = 0; i < x.grads.size(); ++i) {
      at::Tensor error = x.residual_states[i];
      error.copy_(asynchronous_ ? at::where(moving_each[i], x.grads[i], error) : x.grads[i]);
    }
    add_products_(x.residual_states, x.bases, r.neg());
    // What the dtype cannot hold is forgotten: kept, it would make all gradients to come infinite.
    for (at::Tensor error : x.residual_states) at::nan_to_num_(error, 0, 0, 0);
  }

  static at::Tensor finite(const at::Tensor& projected) {
    const at::Tensor flags = at::empty({projected.size(0)}, projected.options().dtype(at::kByte));
    kernels_for(projected).all_finite(flags, projected);
    return flags.view(at::kBool);
  }

  const at::Tensor& lr_;
  const AdamWOptions& adamw_;
  const ProjectionOptions& projection_;
  bool asynchronous_;
};

}  // namespace

at::Tensor projected_adamw_(const std::vector<ProjectedParameter>& parameters, const at::Tensor& lr,
                            const AdamWOptions& adamw, const ProjectionOptions& projection,
                            const at::Tensor& refresh_seconds, const at::Tensor& measures,
                            std::optional<bool> asynchronous) {
  const auto byte = at::TensorOptions().dtype(at::kByte);
  if (parameters.empty()) return at::empty({0}, byte);
  const at::Tensor& first = parameters.front().weight;
  const bool waitless = asynchronous.value_or(false) || !first.is_cpu();  // there the host may not look
  const std::vector<Group> groups = groups_of(parameters, projection, waitless);
  std::vector<double> costs;
  for (const Group& x : groups) {
    costs.push_back(static_cast<double>(x.bases.front().size(1)) *
                    static_cast<double>(x.grads.front().numel()) * (x.refresh == Refresh::none ? 1 : 2.5));
  }

  const at::Tensor rate = rate_on_device(lr, first);
  const Step step(rate, adamw, projection, waitless);
  std::vector<at::Tensor> outcomes(groups.size());
  std::vector<double> seconds(groups.size(), 0.0);
  std::vector<Measures> measured(groups.size());
  std::vector<std::exception_ptr> errors(groups.size());
  const auto take = [&](int64_t i, int64_t abreast) {
    const auto k = static_cast<size_t>(i);
    try {
      if (measures.defined()) measured[k] = Measures(groups[k]);
      outcomes[k] = step(groups[k], seconds[k], measured[k]);
    } catch (...) {
      errors[k] = std::current_exception();  // told once the clocks of all others have moved
      outcomes[k] = at::zeros({groups[k].count()}, first.options().dtype(at::kByte));
    }
    seconds[k] /= static_cast<double>(abreast);
  };
  for_each_in_parallel(first.device(), costs, take);

  // A stack keeps one clock: it has refreshed or stepped if any of its matrices has.
  std::vector<at::Tensor> of_parameter(parameters.size());
  for (size_t k = 0; k < groups.size(); ++k) {
    const Matrices one_each = each(outcomes[k]);
    for (size_t i = 0; i < one_each.size(); ++i) {
      at::Tensor& known = of_parameter[groups[k].owners[i]];
      known = known.defined() ? at::maximum(known, one_each[i]) : one_each[i];
    }
    if (refresh_seconds.defined() && !waitless) {
      refresh_seconds.mutable_data_ptr<double>()[groups[k].owners.front()] += seconds[k];
    }
  }
  for (at::Tensor& outcome : of_parameter) {  // of an empty stack
    if (!outcome.defined()) outcome = at::zeros({}, first.options().dtype(at::kByte));
  }
  if (measures.defined()) write_measures(measures, groups, measured);
  const at::Tensor result = at::stack(of_parameter);
  std::vector<at::Tensor> steps;
  for (const ProjectedParameter& p : parameters) steps.push_back(p.step.view(at::IntArrayRef{}));
  if (projection.moments == Moments::reset) {
    const auto of_stack = [&](size_t owner) { return parameters[owner].weight.dim() == 3; };
    for (size_t k = 0; k < groups.size(); ++k) {
      const std::vector<size_t>& owners = groups[k].owners;
      if (std::any_of(owners.begin(), owners.end(), of_stack)) {
        zero_moments_beside(groups[k], outcomes[k], result, waitless);
      }
    }
    const at::Tensor counting = result.ne(code(Outcome::refreshed)).to(steps.front().scalar_type());
    at::_foreach_mul_(steps, each(counting));
  }
  const at::Tensor moved = result.ge(static_cast<int64_t>(Outcome::stepped)).to(steps.front().scalar_type());
  at::_foreach_add_(steps, each(moved));
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  return result;
}

}  // namespace galore_rrf
