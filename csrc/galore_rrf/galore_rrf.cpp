// The public interface, over the operators.
#include "galore_rrf/galore_rrf.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/full_like.h>

#include <algorithm>
#include <string>
#include <string_view>

#include "ops/ops.h"

namespace galore_rrf {
namespace {

// By way of the dispatcher, as Python calls an operator: it refuses tensors of no backend of ours, and keeps
// what happens inside out of autograd's graph.
template <class Function, class... Arguments>
auto call(const char* op, const Arguments&... arguments) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(op, "");
  return handle.typed<Function>().call(arguments...);
}

void check_single(const char* function, const at::Tensor& a) {
  TORCH_CHECK_VALUE(a.dim() <= 2, function, " expects a matrix, got ", a.dim(), " dimensions (", function,
                    "_batch takes batches)");
}

void check_nonfinite(std::string_view choice) {
  TORCH_CHECK_VALUE(choice == "status" || choice == "raise", "Invalid nonfinite: '", choice,
                    "' (must be 'status' or 'raise')");
}

void raise_nonfinite(const at::Tensor& status) {
  const at::Tensor bad = status.eq(static_cast<int64_t>(Status::nonfinite)).flatten().nonzero();
  if (bad.numel() == 0) return;
  const std::string which =
      status.dim() > 0 ? c10::str("matrix ", bad[0].item<int64_t>(), " of the batch") : "the matrix";
  TORCH_CHECK(false, which, " has a NaN or infinite entry");
}

RangeFinderResult single(const RangeFinderBatch& found) {
  const at::Tensor residuals = found.residuals.masked_select(found.residuals.isfinite()).cpu();
  const double* first = residuals.const_data_ptr<double>();
  return {.basis = found.basis,
          .coefficients = found.coefficients,
          .rank = found.rank.item<int64_t>(),
          .residual = found.residual.item<double>(),
          .residuals = {first, first + residuals.numel()},
          .status = static_cast<Status>(found.status.item<uint8_t>()),
          .reflector = found.reflector};
}

void check_one_of(const char* name, std::optional<int64_t> rank, std::optional<double> tolerance) {
  TORCH_CHECK_VALUE(rank.has_value() != tolerance.has_value(), "exactly one of ", name,
                    " and tolerance must be given, got ", rank ? "both" : "neither");
}

}  // namespace

RangeFinderBatch range_finder_batch(const at::Tensor& a, int64_t rank, const RangeFinderOptions& options) {
  check_nonfinite(options.nonfinite);
  const auto [basis, coefficients, residual, status] = call<decltype(range_finder_op)>(
      "galore_rrf::range_finder", a, rank, options.oversampling, options.sketch, options.power, options.warm,
      options.coefficients, /*ordered=*/false, options.panel, options.seed, options.key, options.refresh,
      /*asynchronous=*/std::nullopt);
  if (options.nonfinite == "raise") raise_nonfinite(status);
  return {.basis = basis,
          .coefficients = options.coefficients ? coefficients : at::Tensor(),
          .rank = at::full_like(status, rank, at::kLong),
          .residual = residual,
          .residuals = residual.unsqueeze(-1),
          .status = status,
          .reflector = std::nullopt};
}

RangeFinderResult range_finder(const at::Tensor& a, int64_t rank, const RangeFinderOptions& options) {
  check_single("range_finder", a);
  return single(range_finder_batch(a, rank, options));
}

RangeFinderBatch adaptive_range_finder_batch(const at::Tensor& a, double tolerance,
                                             const AdaptiveRangeFinderOptions& options) {
  check_nonfinite(options.nonfinite);
  const auto [basis, coefficients, rank, residual, residuals, status, t] =
      call<decltype(adaptive_range_finder_op)>(
          "galore_rrf::adaptive_range_finder", a, tolerance, options.relative, options.block,
          options.max_rank, options.method, options.sketch, options.trim, options.extra_blocks,
          options.between, options.panel, options.look_ahead, options.implicit, options.seed, options.key,
          options.refresh);
  if (options.nonfinite == "raise") raise_nonfinite(status);
  // Not the whole results of the operator, as wide as the rank cap.
  const int64_t largest = rank.numel() > 0 ? rank.max().item<int64_t>() : 0;
  RangeFinderBatch result{.basis = basis.narrow(-1, 0, largest).mT().contiguous().mT(),
                          .coefficients = coefficients.narrow(-2, 0, largest).contiguous(),
                          .rank = rank,
                          .residual = residual,
                          .residuals = residuals,
                          .status = status,
                          .reflector = std::nullopt};
  if (options.implicit) {
    result.reflector = {result.basis, t.narrow(-2, 0, largest).narrow(-1, 0, largest)};
    result.basis = at::Tensor();
  }
  return result;
}

RangeFinderResult adaptive_range_finder(const at::Tensor& a, double tolerance,
                                        const AdaptiveRangeFinderOptions& options) {
  check_single("adaptive_range_finder", a);
  return single(adaptive_range_finder_batch(a, tolerance, options));
}

at::Tensor apply_block_reflector(const BlockReflector& h, const at::Tensor& a, bool transpose) {
  return call<decltype(apply_block_reflector_op)>("galore_rrf::apply_block_reflector", h.v, h.t, a,
                                                  transpose);
}

at::Tensor explicit_basis(const BlockReflector& h) {
  return call<decltype(explicit_basis_op)>("galore_rrf::explicit_basis", h.v, h.t);
}

std::tuple<at::Tensor, at::Tensor> qb(const at::Tensor& a, const QbOptions& options) {
  check_one_of("rank", options.rank, options.tolerance);
  const RangeFinderBatch found =
      options.rank
          ? range_finder_batch(a, *options.rank, {.nonfinite = "raise", .seed = options.seed})
          : adaptive_range_finder_batch(a, *options.tolerance, {.nonfinite = "raise", .seed = options.seed});
  return {found.basis, found.coefficients};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> svd_lowrank(const at::Tensor& a,
                                                           const SvdLowrankOptions& options) {
  const auto& [q, niter, mean, tolerance, seed] = options;
  const at::Tensor centered = mean ? a.sub(*mean) : a;
  TORCH_CHECK_VALUE(niter >= 0, "Invalid niter: ", niter, " (must not be negative)");
  RangeFinderBatch found;
  if (tolerance) {
    check_one_of("q", q, tolerance);
    found = adaptive_range_finder_batch(centered, *tolerance, {.nonfinite = "raise", .seed = seed});
  } else {
    // The range finder refuses what is no matrix.
    const int64_t smaller = centered.dim() >= 2 ? std::min(centered.size(-2), centered.size(-1)) : 0;
    TORCH_CHECK_VALUE(!q || smaller == 0 || (*q >= 1 && *q <= smaller), "Invalid q: ", *q,
                      " (must be from 1 to ", smaller, ", the smaller side)");
    found = range_finder_batch(
        centered, q.value_or(std::min<int64_t>(6, smaller)),
        {.sketch = niter == 0 ? "plain" : "power", .power = niter, .nonfinite = "raise", .seed = seed});
  }
  return call<decltype(svd_of_product_op)>("galore_rrf::svd_of_product", found.basis, found.coefficients);
}

}  // namespace galore_rrf
