// The projected step and the rotation of moments as operators.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "ops/checks.h"
#include "ops/ops.h"
#include "optimizer/projected_adamw.h"
#include "optimizer/rotate.h"
#include "range_finder/product.h"

namespace galore_rrf {
namespace {

Side side_from_int(int64_t side) {
  TORCH_CHECK_VALUE(side == 0 || side == 1, "Invalid side: ", side, " (must be 0, right, or 1, left)");
  return static_cast<Side>(side);
}

void check_parameter(const ProjectedParameter& p, size_t index) {
  const at::Tensor& w = p.weight;
  const auto at_index = [&] { return c10::str(" for parameter ", index); };
  TORCH_CHECK_VALUE(w.dim() == 2 || w.dim() == 3,
                    "projected_adamw_ expects matrices or stacks of matrices, got shape ", w.sizes(),
                    at_index());
  TORCH_CHECK_TYPE(at::isFloatingType(w.scalar_type()),
                   "projected_adamw_ expects real floating-point weights, got ", w.scalar_type(), at_index());
  TORCH_CHECK_VALUE(
      p.grad.sizes() == w.sizes() && p.grad.scalar_type() == w.scalar_type() && p.grad.device() == w.device(),
      "gradient and weight differ: ", p.grad.sizes(), " ", p.grad.scalar_type(), " on ", p.grad.device(),
      " and ", w.sizes(), " ", w.scalar_type(), " on ", w.device(), at_index());
  TORCH_CHECK_VALUE(p.basis.dim() == w.dim(), "Invalid basis: ", p.basis.dim(), " dimensions (must be ",
                    w.dim(), " as of the weight)", at_index());
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
  for (const at::Tensor& moment : {p.exp_avg, p.exp_avg_sq}) {
    TORCH_CHECK_VALUE(moment.sizes() == at::IntArrayRef(moments) && moment.is_contiguous() &&
                          moment.scalar_type() == compute_dtype(w) && moment.device() == w.device(),
                      "Invalid moment: ", moment.sizes(), " ", moment.scalar_type(), " on ", moment.device(),
                      moment.is_contiguous() ? "" : ", not contiguous", " (must be contiguous, ",
                      at::IntArrayRef(moments), " ", compute_dtype(w), " on ", w.device(), ")", at_index());
  }
  TORCH_CHECK_VALUE(!p.coefficients.defined() || p.coefficients.sizes() == at::IntArrayRef(moments),
                    "Invalid coefficients: shape ", p.coefficients.sizes(), " (must be ",
                    at::IntArrayRef(moments), ")", at_index());
  TORCH_CHECK_VALUE(p.step.numel() == 1 && p.step.device().is_cpu(), "Invalid step: ", p.step.numel(),
                    " numbers on ", p.step.device(), " (must be one number on the CPU)", at_index());
}

}  // namespace

at::Tensor projected_adamw_op(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                              at::TensorList exp_avg_sqs, at::TensorList bases, at::TensorList steps,
                              const c10::List<std::optional<at::Tensor>>& coefficients, at::IntArrayRef sides,
                              at::IntArrayRef keys, at::IntArrayRef refreshes,
                              const std::optional<at::Tensor>& refresh_seconds, double lr, double beta1,
                              double beta2, double eps, double weight_decay, double scale, bool maximize,
                              c10::string_view arithmetic, c10::string_view sketch, int64_t power,
                              int64_t oversampling, c10::string_view moments, int64_t seed) {
  const NoAutocast no_autocast;
  const size_t count = params.size();
  for (const size_t size : {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), bases.size(), steps.size(),
                            coefficients.size(), sides.size(), keys.size(), refreshes.size()}) {
    TORCH_CHECK_VALUE(size == count, "projected_adamw_ expects lists of one length, got ", size, " and ",
                      count);
  }
  TORCH_CHECK_VALUE(oversampling >= 0, "Invalid oversampling: ", oversampling, " (must not be negative)");
  TORCH_CHECK_VALUE(power >= 0, "Invalid power: ", power, " (must not be negative)");
  const at::Tensor seconds = refresh_seconds.value_or(at::Tensor());
  TORCH_CHECK_VALUE(!seconds.defined() || (seconds.device().is_cpu() &&
                                           seconds.scalar_type() == at::kDouble && seconds.is_contiguous() &&
                                           seconds.sizes() == at::IntArrayRef(static_cast<int64_t>(count))),
                    "refresh_seconds must be ", count, " contiguous float64 numbers on the CPU");
  std::vector<ProjectedParameter> parameters(count);
  for (size_t i = 0; i < count; ++i) {
    sketch_key(seed, keys[i], std::max<int64_t>(refreshes[i], 0));
    parameters[i] = {.weight = params[i],
                     .grad = grads[i],
                     .exp_avg = exp_avgs[i],
                     .exp_avg_sq = exp_avg_sqs[i],
                     .basis = bases[i],
                     .step = steps[i],
                     .side = side_from_int(sides[i]),
                     .key = keys[i],
                     .refresh = refreshes[i],
                     .coefficients = coefficients.get(i).value_or(at::Tensor())};
    check_parameter(parameters[i], i);
  }
  const auto outcomes = projected_adamw_(parameters,
                                         {.lr = lr,
                                          .beta1 = beta1,
                                          .beta2 = beta2,
                                          .eps = eps,
                                          .weight_decay = weight_decay,
                                          .scale = scale,
                                          .maximize = maximize,
                                          .arithmetic = arithmetic_from_name(text(arithmetic))},
                                         {.sketch = sketch_from_name(text(sketch)),
                                          .power = power,
                                          .oversampling = oversampling,
                                          .moments = moments_from_name(text(moments)),
                                          .seed = static_cast<uint64_t>(seed)},
                                         seconds);
  // The work is done below autograd, which must still see that these have changed.
  for (const at::TensorList list : {params, exp_avgs, exp_avg_sqs, bases, steps}) {
    for (const at::Tensor& t : list) {
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
    }
  }
  const at::Tensor result = at::empty({static_cast<int64_t>(count)}, at::kByte);
  std::transform(outcomes.begin(), outcomes.end(), result.mutable_data_ptr<uint8_t>(),
                 [](Outcome outcome) { return static_cast<uint8_t>(outcome); });
  return result;
}

std::tuple<at::Tensor, at::Tensor> rotate_moments_op(const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                                                     const at::Tensor& basis, const at::Tensor& new_basis,
                                                     int64_t side, double bias_correction1,
                                                     double bias_correction2) {
  const NoAutocast no_autocast;
  const bool right = side_from_int(side) == Side::right;
  TORCH_CHECK_VALUE(exp_avg.dim() >= 2 && exp_avg.sizes() == exp_avg_sq.sizes(),
                    "exp_avg and exp_avg_sq must be matrices of one shape, got ", exp_avg.sizes(), " and ",
                    exp_avg_sq.sizes());
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
  const auto pick = [&](const at::Tensor& t, int64_t i) {
    return right ? t.select(0, i).mT() : t.select(0, i);
  };
  mean.for_each([&](int64_t i) {
    const at::Tensor s = new_q.matrices.select(0, i)
                             .mT()
                             .to(exp_avg.scalar_type())
                             .matmul(old_q.matrices.select(0, i).to(exp_avg.scalar_type()));
    rotate_moments_out(pick(out_mean, i), pick(out_square, i), pick(mean.matrices, i),
                       pick(square.matrices, i), s, bias_correction1, bias_correction2);
  });
  auto result_shape = exp_avg.sizes().vec();
  result_shape[result_shape.size() - (right ? 1 : 2)] = new_basis.size(-1);
  return {out_mean.view(result_shape), out_square.view(result_shape)};
}

}  // namespace galore_rrf
