// The steps of the optimizer, and moments rotated and coded, as operators.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "ops/checks.h"
#include "ops/ops.h"
#include "optimizer/adamw.h"
#include "optimizer/projected_adamw.h"
#include "optimizer/rotate.h"
#include "range_finder/product.h"

namespace galore_rrf {
namespace {

Side side_from_int(int64_t side) {
  TORCH_CHECK_VALUE(side == 0 || side == 1, "Invalid side: ", side, " (must be 0, right, or 1, left)");
  return static_cast<Side>(side);
}

Arithmetic arithmetic_from_name(c10::string_view name) {
  return choice_from_name<Arithmetic>("arithmetic", text(name),
                                      {{"torch", Arithmetic::torch},
                                       {"galore_torch", Arithmetic::galore_torch},
                                       {"bitsandbytes", Arithmetic::bitsandbytes}});
}

Moments moments_from_name(c10::string_view name) {
  return choice_from_name<Moments>(
      "moments", text(name),
      {{"keep", Moments::keep}, {"rotate", Moments::rotate}, {"reset", Moments::reset}});
}

RefreshAt refresh_at_from_name(c10::string_view name) {
  return choice_from_name<RefreshAt>("refresh_at", text(name),
                                     {{"start", RefreshAt::start}, {"end", RefreshAt::end}});
}

Residual residual_from_name(c10::string_view name) {
  return choice_from_name<Residual>("residual", text(name),
                                    {{"drop", Residual::drop},
                                     {"scaled", Residual::scaled},
                                     {"sign", Residual::sign},
                                     {"normalized", Residual::normalized},
                                     {"orthogonalized", Residual::orthogonalized},
                                     {"feedback", Residual::feedback}});
}

// Blocks of codes that one scale each belongs to: of every matrix of a stack, else of all entries.
std::vector<int64_t> scale_shape(at::IntArrayRef moment) {
  const auto blocks = [](int64_t entries) { return (entries + kCodeBlock - 1) / kCodeBlock; };
  if (moment.size() == 3) return {moment[0], blocks(moment[1] * moment[2])};
  return {blocks(c10::multiply_integers(moment))};
}

void check_moment(const StoredMoment& moment, at::IntArrayRef shape, at::IntArrayRef scales,
                  const at::Tensor& weight, size_t index) {
  const at::Tensor& values = moment.values;
  const at::ScalarType dtype = values.scalar_type();
  TORCH_CHECK_VALUE(values.sizes() == shape && values.is_contiguous() && values.device() == weight.device() &&
                        (dtype == compute_dtype(weight) || dtype == at::kFloat || dtype == at::kBFloat16 ||
                         dtype == at::kByte),
                    "Invalid moment: ", values.sizes(), " ", dtype, " on ", values.device(),
                    values.is_contiguous() ? "" : ", not contiguous", " (must be contiguous, ", shape, " ",
                    compute_dtype(weight), ", Float, BFloat16 or Byte on ", weight.device(),
                    ") for parameter ", index);
  TORCH_CHECK_VALUE(
      dtype != at::kByte || (moment.scale.scalar_type() == at::kFloat && moment.scale.sizes() == scales &&
                             moment.scale.is_contiguous() && moment.scale.device() == weight.device()),
      "Invalid scale of a moment: ", moment.scale.sizes(), " ", moment.scale.scalar_type(),
      " (must be contiguous, ", scales, " Float) for parameter ", index);
}

// Both moments of one parameter are kept in one way.
void check_moments(const StoredMoment& exp_avg, const StoredMoment& exp_avg_sq, at::IntArrayRef shape,
                   at::IntArrayRef scales, const at::Tensor& weight, size_t index) {
  check_moment(exp_avg, shape, scales, weight, index);
  check_moment(exp_avg_sq, shape, scales, weight, index);
  TORCH_CHECK_VALUE(exp_avg.values.scalar_type() == exp_avg_sq.values.scalar_type(),
                    "exp_avg and exp_avg_sq must have one dtype, got ", exp_avg.values.scalar_type(), " and ",
                    exp_avg_sq.values.scalar_type(), " for parameter ", index);
}

bool has_state(Residual mode) { return mode == Residual::scaled || mode == Residual::feedback; }

void check_residual_state(const ProjectedParameter& p, Residual mode, size_t index) {
  if (!has_state(mode)) return;
  const at::Tensor &w = p.weight, &state = p.residual_state;
  const bool feedback = mode == Residual::feedback;
  const at::IntArrayRef shape = feedback ? w.sizes() : w.sizes().slice(0, w.dim() - 2);
  const at::ScalarType dtype = feedback ? w.scalar_type() : at::kFloat;
  TORCH_CHECK_VALUE(state.sizes() == shape && state.scalar_type() == dtype && state.is_contiguous() &&
                        state.device() == w.device(),
                    "Invalid residual state: ", state.sizes(), " ", state.scalar_type(), " on ",
                    state.device(), state.is_contiguous() ? "" : ", not contiguous", " (must be contiguous, ",
                    shape, " ", dtype, " on ", w.device(), ") for parameter ", index);
}

void check_step(const at::Tensor& step, const at::Tensor& weight, size_t index) {
  const at::ScalarType dtype = step.scalar_type();
  TORCH_CHECK_VALUE(
      step.numel() == 1 && step.device() == weight.device() && (dtype == at::kFloat || dtype == at::kDouble),
      "Invalid step: ", step.numel(), " numbers, ", dtype, " on ", step.device(),
      " (must be one Float or Double on ", weight.device(), ") for parameter ", index);
}

// Kernels, streams and the order of work are those of one device.
void check_one_device(const char* op, at::TensorList params) {
  for (size_t i = 1; i < params.size(); ++i) {
    TORCH_CHECK_VALUE(params[i].device() == params[0].device(), op, " expects weights on one device, got ",
                      params[0].device(), " and ", params[i].device(), " for parameter ", i);
  }
}

void check_lr(const at::Tensor& lr) {
  TORCH_CHECK_VALUE(lr.numel() == 1 && at::isFloatingType(lr.scalar_type()), "Invalid lr: ", lr.numel(),
                    " numbers, ", lr.scalar_type(), " (must be one real floating-point number)");
}

// f(stored, values) for all of a moment, or every matrix of a stack.
template <class F>
void for_each_coded(const at::Tensor& codes, const at::Tensor& scale, const at::Tensor& values, const F& f) {
  if (codes.dim() != 3) return f({codes, scale}, values);
  for (int64_t i = 0; i < codes.size(0); ++i) {
    f({codes.select(0, i), scale.select(0, i)}, values.select(0, i));
  }
}

void check_lengths(const char* op, size_t count, std::initializer_list<size_t> sizes) {
  for (const size_t size : sizes) {
    TORCH_CHECK_VALUE(size == count, op, " expects lists of one length, got ", size, " and ", count);
  }
}

void check_gradient(const char* op, const at::Tensor& w, const at::Tensor& grad, size_t index) {
  TORCH_CHECK_TYPE(at::isFloatingType(w.scalar_type()), op, " expects real floating-point weights, got ",
                   w.scalar_type(), " for parameter ", index);
  TORCH_CHECK_VALUE(
      grad.sizes() == w.sizes() && grad.scalar_type() == w.scalar_type() && grad.device() == w.device(),
      "gradient and weight differ: ", grad.sizes(), " ", grad.scalar_type(), " on ", grad.device(), " and ",
      w.sizes(), " ", w.scalar_type(), " on ", w.device(), " for parameter ", index);
}

// The work is done below autograd, which must still see that these have changed.
void bump_versions(std::initializer_list<at::TensorList> lists) {
  for (const at::TensorList list : lists) {
    for (const at::Tensor& t : list) {
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
    }
  }
}

void check_parameter(const ProjectedParameter& p, size_t index) {
  const at::Tensor& w = p.weight;
  const auto at_index = [&] { return c10::str(" for parameter ", index); };
  TORCH_CHECK_VALUE(w.dim() == 2 || w.dim() == 3,
                    "projected_adamw_ expects matrices or stacks of matrices, got shape ", w.sizes(),
                    at_index());
  check_gradient("projected_adamw_", w, p.grad, index);
  TORCH_CHECK_VALUE(p.basis.dim() == w.dim(), "Invalid basis: ", p.basis.dim(), " dimensions (must be ",
                    w.dim(), " as of the weight)", at_index());
  TORCH_CHECK_VALUE(p.basis.device() == w.device(), "Invalid basis: on ", p.basis.device(), " (must be on ",
                    w.device(), " as the weight is)", at_index());
  TORCH_CHECK_TYPE(at::isFloatingType(p.basis.scalar_type()), "Invalid basis: ", p.basis.scalar_type(),
                   " (must be real floating-point)", at_index());
  const int64_t m = w.size(-2), n = w.size(-1), r = p.basis.size(-1);
  const bool right = p.side == Side::right;
  auto moments = w.sizes().vec(), basis = w.sizes().vec();
  moments[moments.size() - (right ? 1 : 2)] = r;
  basis[basis.size() - 2] = right ? n : m;
  basis[basis.size() - 1] = r;
  // Without a refresh due, a shard may have fewer rows than the rank.
  const int64_t most = p.refresh >= 0 && w.numel() > 0 ? std::min(m, n) : right ? n : m;
  TORCH_CHECK_VALUE(r >= 1 && r <= most, "Invalid rank: ", r, " (must be from 1 to ", most,
                    ") in a basis of shape ", p.basis.sizes(), at_index());
  TORCH_CHECK_VALUE(p.basis.sizes() == at::IntArrayRef(basis), "Invalid basis: shape ", p.basis.sizes(),
                    " (must be ", at::IntArrayRef(basis), ")", at_index());
  check_moments(p.exp_avg, p.exp_avg_sq, moments, scale_shape(moments), w, index);
  TORCH_CHECK_VALUE(!p.coefficients.defined() || p.coefficients.sizes() == at::IntArrayRef(moments),
                    "Invalid coefficients: shape ", p.coefficients.sizes(), " (must be ",
                    at::IntArrayRef(moments), ")", at_index());
  check_step(p.step, w, index);
}

}  // namespace

at::Tensor projected_adamw_op(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                              at::TensorList exp_avg_sqs, at::TensorList exp_avg_scales,
                              at::TensorList exp_avg_sq_scales, at::TensorList bases, at::TensorList steps,
                              at::TensorList residual_states,
                              const c10::List<std::optional<at::Tensor>>& coefficients, at::IntArrayRef sides,
                              at::IntArrayRef keys, at::IntArrayRef refreshes,
                              const std::optional<at::Tensor>& refresh_seconds,
                              const std::optional<at::Tensor>& measures, const at::Tensor& lr, double beta1,
                              double beta2, double eps, double weight_decay, double scale, bool maximize,
                              bool correct_bias, c10::string_view arithmetic, c10::string_view sketch,
                              int64_t power, int64_t oversampling, c10::string_view moments, int64_t seed,
                              bool stochastic_rounding, c10::string_view residual, double residual_scale,
                              c10::string_view refresh_at, std::optional<bool> asynchronous) {
  const OperatorScope scope(params);
  const size_t count = params.size();
  check_lengths("projected_adamw_", count,
                {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), exp_avg_scales.size(),
                 exp_avg_sq_scales.size(), bases.size(), steps.size(), residual_states.size(),
                 coefficients.size(), sides.size(), keys.size(), refreshes.size()});
  check_one_device("projected_adamw_", params);
  check_lr(lr);
  TORCH_CHECK_VALUE(oversampling >= 0, "Invalid oversampling: ", oversampling, " (must not be negative)");
  TORCH_CHECK_VALUE(power >= 0, "Invalid power: ", power, " (must not be negative)");
  if (moments == "reset") {
    TORCH_CHECK_VALUE(refresh_at == "start", "moments='reset' goes with refresh_at='start', got refresh_at='",
                      refresh_at, "'");
    TORCH_CHECK_VALUE(!stochastic_rounding,
                      "stochastic_rounding, whose random numbers go by the count of steps, goes with "
                      "moments='rotate' or 'keep', got moments='reset'");
  }
  TORCH_CHECK_VALUE(residual != "feedback" || refresh_at == "start",
                    "residual='feedback' goes with refresh_at='start', got refresh_at='", refresh_at, "'");
  const at::Tensor seconds = refresh_seconds.value_or(at::Tensor());
  TORCH_CHECK_VALUE(!seconds.defined() || (seconds.device().is_cpu() &&
                                           seconds.scalar_type() == at::kDouble && seconds.is_contiguous() &&
                                           seconds.sizes() == at::IntArrayRef(static_cast<int64_t>(count))),
                    "refresh_seconds must be ", count, " contiguous float64 numbers on the CPU");
  const at::Tensor measured = measures.value_or(at::Tensor());
  TORCH_CHECK_VALUE(
      !measured.defined() || (measured.scalar_type() == at::kDouble &&
                              measured.sizes() == at::IntArrayRef({static_cast<int64_t>(count), 3}) &&
                              (count == 0 || measured.device() == params[0].device())),
      "measures must be ", count, " x 3 float64 numbers on the device of the weights");
  const Residual mode = residual_from_name(residual);
  std::vector<ProjectedParameter> parameters(count);
  for (size_t i = 0; i < count; ++i) {
    sketch_key(seed, keys[i], std::max<int64_t>(refreshes[i], 0));
    parameters[i] = {.weight = params[i],
                     .grad = grads[i],
                     .exp_avg = {exp_avgs[i], exp_avg_scales[i]},
                     .exp_avg_sq = {exp_avg_sqs[i], exp_avg_sq_scales[i]},
                     .basis = bases[i],
                     .step = steps[i],
                     .side = side_from_int(sides[i]),
                     .key = keys[i],
                     .refresh = refreshes[i],
                     .coefficients = coefficients.get(i).value_or(at::Tensor())};
    check_parameter(parameters[i], i);
    if (has_state(mode)) parameters[i].residual_state = residual_states[i];
    check_residual_state(parameters[i], mode, i);
  }
  const at::Tensor outcomes = projected_adamw_(parameters, lr,
                                               {.beta1 = beta1,
                                                .beta2 = beta2,
                                                .eps = eps,
                                                .weight_decay = weight_decay,
                                                .scale = scale,
                                                .maximize = maximize,
                                                .correct_bias = correct_bias,
                                                .arithmetic = arithmetic_from_name(arithmetic)},
                                               {.sketch = sketch_from_name(text(sketch)),
                                                .power = power,
                                                .oversampling = oversampling,
                                                .moments = moments_from_name(moments),
                                                .seed = static_cast<uint64_t>(seed),
                                                .stochastic_rounding = stochastic_rounding,
                                                .residual = mode,
                                                .residual_scale = residual_scale,
                                                .refresh_at = refresh_at_from_name(refresh_at)},
                                               seconds, measured, asynchronous);
  bump_versions(
      {params, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, bases, steps, residual_states});
  if (measured.defined()) bump_versions({measured});
  return outcomes;
}

void adamw_op(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
              at::TensorList exp_avg_sqs, at::TensorList exp_avg_scales, at::TensorList exp_avg_sq_scales,
              at::TensorList steps, const at::Tensor& lr, double beta1, double beta2, double eps,
              double weight_decay, bool maximize, bool correct_bias, c10::string_view arithmetic) {
  const OperatorScope scope(params);
  check_one_device("adamw_", params);
  check_lr(lr);
  const size_t count = params.size();
  check_lengths("adamw_", count,
                {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), exp_avg_scales.size(),
                 exp_avg_sq_scales.size(), steps.size()});
  std::vector<PlainParameter> parameters(count);
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& w = params[i];
    parameters[i] = {.weight = w,
                     .grad = grads[i],
                     .exp_avg = {exp_avgs[i], exp_avg_scales[i]},
                     .exp_avg_sq = {exp_avg_sqs[i], exp_avg_sq_scales[i]},
                     .step = steps[i]};
    check_gradient("adamw_", w, grads[i], i);
    TORCH_CHECK_VALUE(w.is_contiguous() && grads[i].is_contiguous(),
                      "adamw_ expects contiguous weights and gradients for parameter ", i);
    check_moments(parameters[i].exp_avg, parameters[i].exp_avg_sq, w.sizes(), scale_shape(w.numel()), w, i);
    check_step(steps[i], w, i);
  }
  adamw_(parameters, lr,
         {.beta1 = beta1,
          .beta2 = beta2,
          .eps = eps,
          .weight_decay = weight_decay,
          .scale = 1,
          .maximize = maximize,
          .correct_bias = correct_bias,
          .arithmetic = arithmetic_from_name(arithmetic)});
  bump_versions({params, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, steps});
}

std::tuple<at::Tensor, at::Tensor> quantize_moment_op(const at::Tensor& moment, bool is_signed) {
  TORCH_CHECK_TYPE(at::isFloatingType(moment.scalar_type()),
                   "quantize_moment expects a real floating-point tensor, got ", moment.scalar_type());
  const at::Tensor values = moment.to(compute_dtype(moment)).contiguous();
  const at::Tensor codes = at::empty(values.sizes(), values.options().dtype(at::kByte));
  const at::Tensor scale = at::empty(scale_shape(values.sizes()), values.options().dtype(at::kFloat));
  const MomentKind kind = is_signed ? MomentKind::exp_avg : MomentKind::exp_avg_sq;
  for_each_coded(codes, scale, values, [&](const StoredMoment& stored, const at::Tensor& part) {
    kernels_for(part).store_moments({stored}, part.unsqueeze(0), kind, /*active=*/{});
  });
  return {codes, scale};
}

at::Tensor dequantize_moment_op(const at::Tensor& codes, const at::Tensor& scale, bool is_signed) {
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte && scale.scalar_type() == at::kFloat,
                   "dequantize_moment expects Byte codes and a Float scale, got ", codes.scalar_type(),
                   " and ", scale.scalar_type());
  const auto scales = scale_shape(codes.sizes());
  TORCH_CHECK_VALUE(scale.device() == codes.device(), "Invalid scale: on ", scale.device(), " (must be on ",
                    codes.device(), " as the codes are)");
  TORCH_CHECK_VALUE(scale.sizes() == at::IntArrayRef(scales), "Invalid scale: shape ", scale.sizes(),
                    " (must be ", at::IntArrayRef(scales), " for codes of shape ", codes.sizes(), ")");
  const at::Tensor values = at::empty(codes.sizes(), scale.options());
  const MomentKind kind = is_signed ? MomentKind::exp_avg : MomentKind::exp_avg_sq;
  for_each_coded(codes.contiguous(), scale.contiguous(), values,
                 [&](const StoredMoment& stored, const at::Tensor& part) {
                   kernels_for(part).load_moments(part.unsqueeze(0), {stored}, kind);
                 });
  return values;
}

std::tuple<at::Tensor, at::Tensor> rotate_moments_op(const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                                                     const at::Tensor& basis, const at::Tensor& new_basis,
                                                     int64_t side, double bias_correction1,
                                                     double bias_correction2) {
  const ExactScope scope(exp_avg);
  const bool right = side_from_int(side) == Side::right;
  TORCH_CHECK_VALUE(exp_avg.dim() >= 2 && exp_avg.sizes() == exp_avg_sq.sizes(),
                    "exp_avg and exp_avg_sq must be matrices of one shape, got ", exp_avg.sizes(), " and ",
                    exp_avg_sq.sizes());
  TORCH_CHECK_VALUE(exp_avg_sq.scalar_type() == exp_avg.scalar_type() &&
                        exp_avg_sq.device() == exp_avg.device() && basis.device() == exp_avg.device() &&
                        new_basis.device() == exp_avg.device(),
                    "exp_avg and exp_avg_sq must have one dtype and all be on one device, got ",
                    exp_avg.scalar_type(), ", ", exp_avg_sq.scalar_type(), " on ", exp_avg.device(), ", ",
                    exp_avg_sq.device(), ", ", basis.device(), " and ", new_basis.device());
  TORCH_CHECK_VALUE(basis.dim() == exp_avg.dim() && basis.size(-1) == exp_avg.size(right ? -1 : -2),
                    "Invalid basis: shape ", basis.sizes(), " (must have a column for each of the ",
                    exp_avg.size(right ? -1 : -2), " components of the moments)");
  TORCH_CHECK_VALUE(new_basis.dim() == basis.dim() && new_basis.size(-2) == basis.size(-2),
                    "Invalid new_basis: shape ", new_basis.sizes(), " (must have as many rows as basis, ",
                    basis.sizes(), ")");
  const auto stack = [](const at::Tensor& t) { return t.sizes().slice(0, t.dim() - 2); };
  TORCH_CHECK_VALUE(stack(basis) == stack(exp_avg) && stack(new_basis) == stack(exp_avg),
                    "basis, new_basis and moments must be stacks of one shape, got ", stack(basis), ", ",
                    stack(new_basis), " and ", stack(exp_avg));
  const Batch mean(exp_avg.contiguous()), square(exp_avg_sq.contiguous()), old_q(basis), new_q(new_basis);
  auto shape = mean.matrices.sizes().vec();
  shape[right ? 2 : 1] = new_basis.size(-1);
  const at::Tensor out_mean = at::empty(shape, exp_avg.options()),
                   out_square = at::empty(shape, exp_avg.options());
  const at::Tensor corrections = at::empty({mean.count(), 2}, at::kDouble);
  corrections.select(1, 0).fill_(bias_correction1);
  corrections.select(1, 1).fill_(bias_correction2);
  const at::Tensor corrections_there = corrections.to(exp_avg.device());
  // On a CPU a matrix a thread, elsewhere all of them together.
  const int64_t together = exp_avg.is_cpu() ? 1 : mean.count();
  const auto rotate = [&](int64_t first) {
    const auto part = [&](const at::Tensor& t) { return t.narrow(0, first, together); };
    const auto pick = [&](const at::Tensor& t) { return right ? part(t).mT() : part(t); };
    const auto cast = [&](const Batch& bases) { return part(bases.matrices).to(exp_avg.scalar_type()); };
    rotate_moments_out(pick(out_mean), pick(out_square), pick(mean.matrices), pick(square.matrices),
                       cast(new_q).mT().matmul(cast(old_q)), part(corrections_there));
  };
  if (together == 1) {
    mean.for_each(rotate);
  } else if (together > 0) {
    rotate(0);
  }
  auto result_shape = exp_avg.sizes().vec();
  result_shape[result_shape.size() - (right ? 1 : 2)] = new_basis.size(-1);
  return {out_mean.view(result_shape), out_square.view(result_shape)};
}

}  // namespace galore_rrf
