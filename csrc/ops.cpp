// Every operator: its schema, its argument checks, and the call into the algorithm.
#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "optimizer/projected_adamw.h"
#include "optimizer/rotate.h"
#include "parallel.h"
#include "range_finder/adaptive.h"
#include "range_finder/fixed_rank.h"
#include "range_finder/product.h"

namespace galore_rrf {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

SketchKey sketch_key(int64_t seed, int64_t key, int64_t refresh) {
  constexpr int64_t kWords = int64_t{1} << 32;
  TORCH_CHECK_VALUE(seed >= 0, "Invalid seed: ", seed, " (must be from 0 to 2^63 - 1)");
  TORCH_CHECK_VALUE(key >= 0 && key < kWords, "Invalid key: ", key, " (must be from 0 to 2^32 - 1)");
  TORCH_CHECK_VALUE(refresh >= 0 && refresh < kWords, "Invalid refresh: ", refresh,
                    " (must be from 0 to 2^32 - 1)");
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(key), static_cast<uint32_t>(refresh)};
}

// Keeps autocast out of the products inside an operator.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

void check_matrix(const char* op, const at::Tensor& a) {
  TORCH_CHECK_VALUE(a.dim() >= 2, op, " expects a matrix or a batch of matrices, got ", a.dim(),
                    " dimensions");
  TORCH_CHECK_TYPE(at::isFloatingType(a.scalar_type()), op, " expects a real floating-point matrix, got ",
                   a.scalar_type());
  TORCH_CHECK_VALUE(a.size(-2) > 0 && a.size(-1) > 0, op,
                    " expects at least one row and one column, got shape ", a.sizes());
}

// A batch seen as a list of matrices, and its leading dimensions.
struct Batch {
  at::Tensor matrices;  // count x m x n
  std::vector<int64_t> dims;
  explicit Batch(const at::Tensor& a)
      : matrices(a.dim() == 3   ? a
                 : a.dim() == 2 ? a.unsqueeze(0)
                                : a.flatten(0, -3)),
        dims(a.sizes().begin(), a.sizes().end() - 2) {}
  int64_t count() const { return matrices.size(0); }
  std::vector<int64_t> shape(std::initializer_list<int64_t> last) const {
    std::vector<int64_t> result = dims;
    result.insert(result.end(), last);
    return result;
  }
  // Equal costs: with at least as many matrices as threads, a matrix a thread.
  template <class F>
  void for_each(const F& f) const {
    for_each_in_parallel(std::vector<double>(static_cast<size_t>(count()), 1.0),
                         [&](int64_t i, int64_t) { f(i); });
  }
};

at::Tensor gaussian_sketch(int64_t rows, int64_t cols, int64_t seed, int64_t key, int64_t refresh,
                           int64_t row_offset, int64_t col_offset, std::optional<at::ScalarType> dtype,
                           std::optional<at::Device> device) {
  TORCH_CHECK_VALUE(rows >= 0 && cols >= 0, "Invalid rows, cols: ", rows, ", ", cols,
                    " (must not be negative)");
  TORCH_CHECK_VALUE(row_offset >= 0 && col_offset >= 0, "Invalid row_offset, col_offset: ", row_offset, ", ",
                    col_offset, " (must not be negative)");
  constexpr int64_t kWords = int64_t{1} << 32;
  TORCH_CHECK_VALUE(rows <= 4 * kWords && row_offset <= 4 * kWords - rows, "Invalid rows, row_offset: ", rows,
                    ", ", row_offset, " (their sum must be at most 2^34)");
  TORCH_CHECK_VALUE(cols <= kWords && col_offset <= kWords - cols, "Invalid cols, col_offset: ", cols, ", ",
                    col_offset, " (their sum must be at most 2^32)");
  const at::Tensor out = at::empty({rows, cols}, at::TensorOptions().dtype(dtype).device(device));
  TORCH_CHECK_TYPE(at::isFloatingType(out.scalar_type()), "Invalid dtype: ", out.scalar_type(),
                   " (must be torch.float32, float64, bfloat16 or float16)");
  kernels_for(out).fill_sketch(out, sketch_key(seed, key, refresh), row_offset, col_offset);
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> range_finder(
    const at::Tensor& a, int64_t rank, int64_t oversampling, c10::string_view sketch, int64_t power,
    const std::optional<at::Tensor>& warm, bool coefficients, bool ordered, int64_t seed, int64_t key,
    int64_t refresh) {
  const NoAutocast no_autocast;
  check_matrix("range_finder", a);
  const int64_t m = a.size(-2), n = a.size(-1);
  TORCH_CHECK_VALUE(rank >= 1 && rank <= std::min(m, n), "Invalid rank: ", rank, " (must be from 1 to ",
                    std::min(m, n), ", the smaller side of a ", m, " x ", n, " matrix)");
  TORCH_CHECK_VALUE(oversampling >= 0, "Invalid oversampling: ", oversampling, " (must not be negative)");
  TORCH_CHECK_VALUE(power >= 0, "Invalid power: ", power, " (must not be negative)");
  FixedRankOptions options{.rank = rank,
                           .oversampling = oversampling,
                           .sketch = sketch_from_name({sketch.data(), sketch.size()}),
                           .power = power,
                           .ordered = ordered};
  TORCH_CHECK_VALUE((options.sketch == Sketch::warm) == warm.has_value(),
                    "sketch='warm' and a previous basis `warm` go together, got sketch='", sketch, "' and ",
                    warm.has_value() ? "a basis" : "none");
  const Batch batch(a);
  at::Tensor previous;
  if (warm) {
    TORCH_CHECK_VALUE(warm->dim() == a.dim() && warm->size(-2) == m &&
                          warm->sizes().slice(0, warm->dim() - 2).equals(a.sizes().slice(0, a.dim() - 2)),
                      "Invalid warm: shape ", warm->sizes(), " (must be that of a basis, (..., ", m,
                      ", r), for a of shape ", a.sizes(), ")");
    TORCH_CHECK_VALUE(warm->device() == a.device(), "Invalid warm: on ", warm->device(), " (must be on ",
                      a.device(), " as a is)");
    previous = Batch(*warm).matrices;
  }
  const auto dtype = a.options().dtype(compute_dtype(a));
  const at::Tensor basis = at::zeros({batch.count(), m, rank}, dtype);
  const at::Tensor b = at::zeros({batch.count(), coefficients ? rank : 0, n}, dtype);
  const at::Tensor residual = at::full({batch.count()}, kNaN, a.options().dtype(at::kDouble));
  const at::Tensor status = at::zeros({batch.count()}, a.options().dtype(at::kByte));
  const SketchKey first_key = sketch_key(seed, key, refresh);
  batch.for_each([&](int64_t i) {
    FixedRankOptions mine = options;
    mine.key = first_key;
    mine.key.matrix += static_cast<uint32_t>(i);
    const at::Tensor matrix = batch.matrices.select(0, i), q = basis.select(0, i);
    const at::Tensor kept = coefficients ? b.select(0, i) : at::Tensor();
    const auto [ended, found] =
        fixed_rank_range_finder(matrix, mine, previous.defined() ? previous.select(0, i) : previous, kept);
    status.select(0, i).fill_(static_cast<int>(ended));
    if (found.defined()) q.copy_(found);
    if (ended == Status::zero) q.diagonal().fill_(1);  // every basis is one of the zero matrix
    if (ended == Status::zero) residual.select(0, i).zero_();
    if (ended == Status::converged && coefficients) {
      residual.select(0, i).fill_(relative_residual(matrix, q, kept));
    }
  });
  return {basis.view(batch.shape({m, rank})), b.view(batch.shape({b.size(1), n})), residual.view(batch.dims),
          status.view(batch.dims)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> adaptive_range_finder_op(
    const at::Tensor& a, double tolerance, bool relative, int64_t block, std::optional<int64_t> max_rank,
    c10::string_view method, c10::string_view sketch, bool trim, int64_t seed, int64_t key, int64_t refresh) {
  const NoAutocast no_autocast;
  check_matrix("adaptive_range_finder", a);
  const int64_t m = a.size(-2), n = a.size(-1), full = std::min(m, n);
  TORCH_CHECK_VALUE(tolerance >= 0 && std::isfinite(tolerance), "Invalid tolerance: ", tolerance,
                    " (must be finite and not negative)");
  TORCH_CHECK_VALUE(block >= 1, "Invalid block: ", block, " (must be positive)");
  TORCH_CHECK_VALUE(!max_rank || *max_rank >= 1, "Invalid max_rank: ", *max_rank,
                    " (must be positive or None)");
  TORCH_CHECK_VALUE(method == "auto" || method == "right_looking", "Invalid method: '", method,
                    "' (must be 'auto' or 'right_looking')");
  AdaptiveOptions options{.tolerance = tolerance,
                          .relative = relative,
                          .block = block,
                          .max_rank = std::min(full, max_rank.value_or(full)),
                          .sketch = sketch_from_name({sketch.data(), sketch.size()}),
                          .trim = trim};
  TORCH_CHECK_VALUE(options.sketch == Sketch::plain || options.sketch == Sketch::half_power,
                    "Invalid sketch: '", sketch, "' (adaptive_range_finder takes 'plain' or 'half_power')");
  const Batch batch(a);
  const int64_t count = batch.count(), cap = options.max_rank;
  const int64_t blocks = max_adaptive_blocks(m, n, options);
  const auto dtype = a.options().dtype(compute_dtype(a));
  const auto fp64 = a.options().dtype(at::kDouble);
  const at::Tensor basis = at::zeros({count, m, cap}, dtype);
  const at::Tensor b = at::zeros({count, cap, n}, dtype);
  const at::Tensor rank = at::zeros({count}, a.options().dtype(at::kLong));
  const at::Tensor residual = at::zeros({count}, fp64);
  const at::Tensor residuals = at::full({count, blocks}, kNaN, fp64);
  const at::Tensor status = at::zeros({count}, a.options().dtype(at::kByte));
  const SketchKey first_key = sketch_key(seed, key, refresh);
  batch.for_each([&](int64_t i) {
    AdaptiveOptions mine = options;
    mine.key = first_key;
    mine.key.matrix += static_cast<uint32_t>(i);
    const AdaptiveResult found = adaptive_range_finder(batch.matrices.select(0, i), mine);
    basis.select(0, i).narrow(1, 0, found.rank()).copy_(found.basis);
    b.select(0, i).narrow(0, 0, found.rank()).copy_(found.coefficients);
    rank.select(0, i).fill_(found.rank());
    residual.select(0, i).fill_(found.residual);
    for (size_t j = 0; j < found.residuals.size(); ++j) {
      residuals.select(0, i).select(0, static_cast<int64_t>(j)).fill_(found.residuals[j]);
    }
    status.select(0, i).fill_(static_cast<int>(found.status));
  });
  return {basis.view(batch.shape({m, cap})), b.view(batch.shape({cap, n})),         rank.view(batch.dims),
          residual.view(batch.dims),         residuals.view(batch.shape({blocks})), status.view(batch.dims)};
}

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
  const auto outcomes =
      projected_adamw_(parameters,
                       {.lr = lr,
                        .beta1 = beta1,
                        .beta2 = beta2,
                        .eps = eps,
                        .weight_decay = weight_decay,
                        .scale = scale,
                        .maximize = maximize,
                        .arithmetic = arithmetic_from_name({arithmetic.data(), arithmetic.size()})},
                       {.sketch = sketch_from_name({sketch.data(), sketch.size()}),
                        .power = power,
                        .oversampling = oversampling,
                        .moments = moments_from_name({moments.data(), moments.size()}),
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

std::tuple<at::Tensor, at::Tensor> rotate_moments(const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
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

}  // namespace

TORCH_LIBRARY(galore_rrf, m) {
  m.def("gaussian_sketch(int rows, int cols, *, int seed, int key=0, int refresh=0, int row_offset=0, "
        "int col_offset=0, ScalarType? dtype=None, Device? device=None) -> Tensor");
  m.def(
      "range_finder(Tensor a, int rank, *, int oversampling=0, str sketch=\"half_power\", int power=1, "
      "Tensor? warm=None, bool coefficients=True, bool ordered=False, int seed=0, int key=0, int refresh=0) "
      "-> (Tensor basis, Tensor coefficients, Tensor residual, Tensor status)");
  m.def(
      "adaptive_range_finder(Tensor a, float tolerance, *, bool relative=True, int block=64, "
      "int? max_rank=None, str method=\"auto\", str sketch=\"plain\", bool trim=True, int seed=0, int key=0, "
      "int refresh=0) -> (Tensor basis, Tensor coefficients, Tensor rank, Tensor residual, Tensor residuals, "
      "Tensor status)");
  m.def(
      "projected_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] bases, Tensor(e!)[] steps, Tensor?[] coefficients, int[] sides, int[] keys, "
      "int[] refreshes, Tensor(f!)? refresh_seconds=None, *, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, float scale, bool maximize=False, str arithmetic=\"torch\", str sketch=\"warm\", "
      "int power=1, int oversampling=0, str moments=\"rotate\", int seed=0) -> Tensor");
  m.def("rotate_moments(Tensor exp_avg, Tensor exp_avg_sq, Tensor basis, Tensor new_basis, int side, "
        "float bias_correction1, float bias_correction2) -> (Tensor, Tensor)");
}

namespace {

// One function serves both backends; only the kernel entry points behind it differ (kernels.h).
void implement(torch::Library& m) {
  m.impl("range_finder", range_finder);
  m.impl("adaptive_range_finder", adaptive_range_finder_op);
  m.impl("rotate_moments", rotate_moments);
}

}  // namespace

// Without a tensor among the arguments, or perhaps none in the lists, no backend's key is there to go by.
TORCH_LIBRARY_IMPL(galore_rrf, CompositeExplicitAutograd, m) {
  m.impl("gaussian_sketch", gaussian_sketch);
  m.impl("projected_adamw_", projected_adamw_op);
}
TORCH_LIBRARY_IMPL(galore_rrf, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(galore_rrf, CUDA, m) { implement(m); }

// None is differentiable, and backward through one says so.
TORCH_LIBRARY_IMPL(galore_rrf, Autograd, m) {
  for (const char* op : {"range_finder", "adaptive_range_finder", "projected_adamw_", "rotate_moments"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace galore_rrf
