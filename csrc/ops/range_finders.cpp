// Test matrices and range finders as operators.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "ops/checks.h"
#include "ops/ops.h"
#include "range_finder/adaptive.h"
#include "range_finder/fixed_rank.h"
#include "range_finder/product.h"

namespace galore_rrf {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

AdaptiveOptions adaptive_options(double tolerance, bool relative, int64_t block,
                                 std::optional<int64_t> max_rank, c10::string_view method,
                                 c10::string_view sketch, bool trim, int64_t extra_blocks,
                                 c10::string_view between, c10::string_view panel,
                                 std::optional<bool> look_ahead, bool implicit) {
  TORCH_CHECK_VALUE(tolerance >= 0 && std::isfinite(tolerance), "Invalid tolerance: ", tolerance,
                    " (must be finite and not negative)");
  TORCH_CHECK_VALUE(block >= 1, "Invalid block: ", block, " (must be positive)");
  TORCH_CHECK_VALUE(!max_rank || *max_rank >= 1, "Invalid max_rank: ", *max_rank,
                    " (must be positive or None)");
  TORCH_CHECK_VALUE(extra_blocks >= 0, "Invalid extra_blocks: ", extra_blocks, " (must not be negative)");
  const AdaptiveOptions options{.tolerance = tolerance,
                                .relative = relative,
                                .block = block,
                                .max_rank = max_rank.value_or(std::numeric_limits<int64_t>::max()),
                                .method = method_from_name(text(method)),
                                .sketch = sketch_from_name(text(sketch)),
                                .between = between_from_name(text(between)),
                                .panel = panel_from_name(text(panel)),
                                .trim = trim,
                                .extra_blocks = extra_blocks,
                                .look_ahead = look_ahead,
                                .implicit = implicit};
  TORCH_CHECK_VALUE(options.sketch == Sketch::plain || options.sketch == Sketch::half_power,
                    "Invalid sketch: '", sketch, "' (adaptive_range_finder takes 'plain' or 'half_power')");
  TORCH_CHECK_VALUE(!implicit || (!trim && options.between == Between::householder),
                    "implicit=True goes with trim=False and between='householder' (a trimmed basis is no "
                    "product of the reflectors), got trim=",
                    trim ? "True" : "False", " and between='", between, "'");
  // Half a power step begins at the trailing matrix that the panel before it leaves: nothing to look ahead
  // at.
  TORCH_CHECK_VALUE(!look_ahead.value_or(false) ||
                        (options.method != Method::left_looking && options.sketch == Sketch::plain &&
                         options.between == Between::householder),
                    "look_ahead=True goes with method='right_looking' (or 'auto'), sketch='plain' and "
                    "between='householder', got method='",
                    method, "', sketch='", sketch, "' and between='", between, "'");
  return options;
}

AdaptiveOptions for_shape(AdaptiveOptions options, int64_t m, int64_t n) {
  // Larger ones mean the same, and their product would overflow.
  options.block = std::min(options.block, std::max(m, n));
  options.extra_blocks = std::min(options.extra_blocks, std::max(m, n));
  options.max_rank = std::min({options.max_rank, m, n});
  options.min_rank = std::min(options.min_rank, options.max_rank);
  return options;
}

// The results of a batch, as wide as the rank cap and zero beyond each matrix's rank.
struct AdaptiveBuffers {
  at::Tensor basis, coefficients, rank, residual, residuals, status, triangular_factor;

  AdaptiveBuffers(const Batch& batch, const AdaptiveOptions& options) {
    const int64_t count = batch.count(), m = batch.matrices.size(1), n = batch.matrices.size(2);
    const int64_t cap = options.max_rank;
    const auto dtype = batch.matrices.options().dtype(compute_dtype(batch.matrices));
    const auto fp64 = dtype.dtype(at::kDouble);
    basis = at::empty({count, cap, m}, dtype).mT();
    coefficients = at::empty({count, cap, n}, dtype);
    rank = at::zeros({count}, dtype.dtype(at::kLong));
    residual = at::zeros({count}, fp64);
    residuals = at::full({count, block_cap(m, n, options)}, kNaN, fp64);
    status = at::zeros({count}, dtype.dtype(at::kByte));
    const int64_t implicit_cap = options.implicit ? cap : 0;
    triangular_factor = at::zeros({count, implicit_cap, implicit_cap}, dtype);
  }

  void set(int64_t i, const AdaptiveResult& found) const {
    const int64_t r = found.rank();
    const int64_t beyond = coefficients.size(1) - r;
    basis.select(0, i).narrow(1, 0, r).copy_(found.basis);
    basis.select(0, i).narrow(1, r, beyond).zero_();
    coefficients.select(0, i).narrow(0, 0, r).copy_(found.coefficients);
    coefficients.select(0, i).narrow(0, r, beyond).zero_();
    if (triangular_factor.size(1) > 0) {
      triangular_factor.select(0, i).narrow(0, 0, r).narrow(1, 0, r).copy_(found.triangular_factor);
    }
    rank.select(0, i).fill_(r);
    residual.select(0, i).fill_(found.residual);
    const int64_t blocks = static_cast<int64_t>(found.residuals.size());
    residuals.select(0, i).narrow(0, 0, blocks).copy_(at::tensor(found.residuals, at::kDouble));
    status.select(0, i).fill_(static_cast<int>(found.status));
  }
};

}  // namespace

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
  const OperatorScope scope(out);
  kernels_for(out).fill_sketch(out, sketch_key(seed, key, refresh), row_offset, col_offset);
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> range_finder_op(
    const at::Tensor& a, int64_t rank, int64_t oversampling, c10::string_view sketch, int64_t power,
    const std::optional<at::Tensor>& warm, bool coefficients, bool ordered, c10::string_view panel,
    int64_t seed, int64_t key, int64_t refresh, std::optional<bool> asynchronous) {
  const OperatorScope scope(a);
  check_matrix("range_finder", a);
  const int64_t m = a.size(-2), n = a.size(-1);
  TORCH_CHECK_VALUE(rank >= 1 && rank <= std::min(m, n), "Invalid rank: ", rank, " (must be from 1 to ",
                    std::min(m, n), ", the smaller side of a ", m, " x ", n, " matrix)");
  TORCH_CHECK_VALUE(oversampling >= 0, "Invalid oversampling: ", oversampling, " (must not be negative)");
  TORCH_CHECK_VALUE(power >= 0, "Invalid power: ", power, " (must not be negative)");
  FixedRankOptions options{.rank = rank,
                           .oversampling = std::min(oversampling, std::min(m, n) - rank),
                           .sketch = sketch_from_name(text(sketch)),
                           .power = power,
                           .ordered = ordered,
                           .panel = panel_from_name(text(panel)),
                           .measured = coefficients,
                           .asynchronous = asynchronous.value_or(!a.is_cpu())};
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
    TORCH_CHECK_TYPE(at::isFloatingType(warm->scalar_type()), "Invalid warm: ", warm->scalar_type(),
                     " (must be real floating-point)");
    TORCH_CHECK_VALUE(warm->device() == a.device(), "Invalid warm: on ", warm->device(), " (must be on ",
                      a.device(), " as a is)");
    previous = Batch(*warm).matrices;
  }
  const auto dtype = a.options().dtype(compute_dtype(a));
  const at::Tensor basis = at::empty({batch.count(), rank, m}, dtype).mT();
  const at::Tensor b = at::empty({batch.count(), coefficients ? rank : 0, n}, dtype);
  const at::Tensor residual = at::empty({batch.count()}, at::kDouble);
  const at::Tensor status = at::empty({batch.count()}, a.options().dtype(at::kByte));
  const SketchKey first_key = sketch_key(seed, key, refresh, batch.count());
  // A matrix a thread, or all of them together.
  const int64_t together = options.asynchronous ? batch.count() : 1;
  const auto find = [&](int64_t first) {
    std::vector<SketchKey> keys(static_cast<size_t>(together), first_key);
    for (int64_t i = 0; i < together; ++i) {
      keys[static_cast<size_t>(i)].matrix += static_cast<uint32_t>(first + i);
    }
    const auto part = [&](const at::Tensor& stack) { return stack.narrow(0, first, together); };
    const at::Tensor q = part(basis), kept = part(b);
    const FixedRankResult found = fixed_rank_range_finder(
        each(part(batch.matrices)), options, keys, previous.defined() ? each(part(previous)) : Matrices(),
        coefficients ? kept : at::Tensor());
    part(status).copy_(found.status);
    std::copy(found.residuals.begin(), found.residuals.end(), residual.mutable_data_ptr<double>() + first);
    if (found.basis.defined()) q.copy_(found.basis);
    const at::Tensor ended = found.status.cpu();
    for (int64_t i = 0; i < together; ++i) {
      const auto code = static_cast<Status>(ended.const_data_ptr<uint8_t>()[i]);
      if (code == Status::converged) continue;
      q.select(0, i).zero_();
      kept.select(0, i).zero_();
      if (code == Status::zero) {
        q.select(0, i).diagonal().fill_(1);  // every basis is one of the zero matrix
        residual.mutable_data_ptr<double>()[first + i] = 0;
      }
    }
  };
  if (together == 1) {
    batch.for_each(find);
  } else if (together > 0) {
    find(0);
  }
  return {basis.view(batch.shape({m, rank})), b.view(batch.shape({b.size(1), n})),
          residual.to(a.device()).view(batch.dims), status.view(batch.dims)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
adaptive_range_finder_op(const at::Tensor& a, double tolerance, bool relative, int64_t block,
                         std::optional<int64_t> max_rank, c10::string_view method, c10::string_view sketch,
                         bool trim, int64_t extra_blocks, c10::string_view between, c10::string_view panel,
                         std::optional<bool> look_ahead, bool implicit, int64_t seed, int64_t key,
                         int64_t refresh) {
  const OperatorScope scope(a);
  check_matrix("adaptive_range_finder", a);
  const int64_t m = a.size(-2), n = a.size(-1);
  AdaptiveOptions options =
      for_shape(adaptive_options(tolerance, relative, block, max_rank, method, sketch, trim, extra_blocks,
                                 between, panel, look_ahead, implicit),
                m, n);
  const Batch batch(a);
  options.key = sketch_key(seed, key, refresh, batch.count());
  const AdaptiveBuffers out(batch, options);
  batch.for_each([&](int64_t i) {
    AdaptiveOptions mine = options;
    mine.key.matrix += static_cast<uint32_t>(i);
    out.set(i, adaptive_range_finder(batch.matrices.select(0, i), mine));
  });
  const int64_t cap = options.max_rank;
  return {out.basis.view(batch.shape({m, cap})),
          out.coefficients.view(batch.shape({cap, n})),
          out.rank.view(batch.dims),
          out.residual.view(batch.dims),
          out.residuals.view(batch.shape({out.residuals.size(1)})),
          out.status.view(batch.dims),
          out.triangular_factor.view(
              batch.shape({out.triangular_factor.size(1), out.triangular_factor.size(1)}))};
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>>
adaptive_range_finders_op(at::TensorList matrices, double tolerance, int64_t max_rank, at::IntArrayRef keys,
                          at::IntArrayRef refreshes, int64_t block, c10::string_view method,
                          c10::string_view sketch, int64_t seed, int64_t min_rank, int64_t multiple) {
  const OperatorScope scope(matrices);
  const size_t count = matrices.size();
  TORCH_CHECK_VALUE(keys.size() == count && refreshes.size() == count,
                    "adaptive_range_finders expects lists of one length, got ", count, ", ", keys.size(),
                    " and ", refreshes.size());
  AdaptiveOptions common = adaptive_options(tolerance, /*relative=*/true, block, max_rank, method, sketch,
                                            /*trim=*/true, /*extra_blocks=*/1, "householder", "householder",
                                            /*look_ahead=*/std::nullopt, /*implicit=*/false);
  TORCH_CHECK_VALUE(min_rank >= 0 && min_rank <= max_rank, "Invalid min_rank: ", min_rank,
                    " (must be from 0 to max_rank, ", max_rank, ")");
  TORCH_CHECK_VALUE(multiple >= 1 && block % multiple == 0, "Invalid multiple: ", multiple,
                    " (must be positive and divide block, ", block, ")");
  common.min_rank = min_rank;
  common.multiple = std::min(multiple, max_rank);
  struct Piece {
    size_t owner;
    int64_t index;
  };
  std::vector<Batch> batches;
  std::vector<AdaptiveOptions> options;
  std::vector<AdaptiveBuffers> out;
  std::vector<Piece> pieces;
  std::vector<double> costs;
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& a = matrices[i];
    check_matrix("adaptive_range_finders", a);
    TORCH_CHECK_VALUE(a.device() == matrices.front().device(),
                      "adaptive_range_finders expects matrices on one device, got ",
                      matrices.front().device(), " and ", a.device());
    options.push_back(for_shape(common, a.size(-2), a.size(-1)));
    batches.emplace_back(a);
    options.back().key = sketch_key(seed, keys[i], refreshes[i], batches.back().count());
    out.emplace_back(batches.back(), options.back());
    for (int64_t j = 0; j < batches.back().count(); ++j) {
      pieces.push_back({i, j});
      costs.push_back(static_cast<double>(a.size(-2)) * static_cast<double>(a.size(-1)) *
                      static_cast<double>(options.back().max_rank));
    }
  }
  const auto find = [&](int64_t i, int64_t) {
    const Piece piece = pieces[static_cast<size_t>(i)];
    AdaptiveOptions mine = options[piece.owner];
    mine.key.matrix += static_cast<uint32_t>(piece.index);
    out[piece.owner].set(piece.index,
                         adaptive_range_finder(batches[piece.owner].matrices.select(0, piece.index), mine));
  };
  if (count > 0) for_each_in_parallel(matrices.front().device(), costs, find);
  std::vector<at::Tensor> bases, coefficients, ranks, statuses;
  for (size_t i = 0; i < count; ++i) {
    const Batch& batch = batches[i];
    const int64_t cap = options[i].max_rank;
    bases.push_back(out[i].basis.view(batch.shape({matrices[i].size(-2), cap})));
    coefficients.push_back(out[i].coefficients.view(batch.shape({cap, matrices[i].size(-1)})));
    ranks.push_back(out[i].rank.view(batch.dims));
    statuses.push_back(out[i].status.view(batch.dims));
  }
  return {bases, coefficients, ranks, statuses};
}

}  // namespace galore_rrf
