#include "optimizer/residual.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>

#include <algorithm>

#include "kernels.h"

namespace galore_rrf {
namespace {

Matrices rows_of(const Matrices& matrices, int64_t first, int64_t count, int64_t start, int64_t height) {
  Matrices rows;
  for (int64_t i = first; i < first + count; ++i) {
    rows.push_back(matrices[static_cast<size_t>(i)].narrow(0, start, height));
  }
  return rows;
}

// c[i] <- beta c[i] + a[i] b[i], beta 0 or 1; a and b of one dtype where lists are multiplied together.
void multiply_(const at::Tensor& c, const Matrices& a, const Matrices& b, int beta) {
  const Matrices targets = each(c);
  const auto products = kernels_for(c).products;
  const at::Tensor one = beta == 0 || !products ? at::Tensor() : at::ones({}, c.options());
  if (products && products(targets, a, b, one, /*outcomes=*/{})) return;
  for (size_t i = 0; i < a.size(); ++i) {
    at::Tensor target = targets[i];
    at::addmm_out(target, target, a[i].to(c.scalar_type()), b[i].to(c.scalar_type()), beta);
  }
}

// Those whose rows do not lie in one piece each, copied.
Matrices with_rows_in_one_piece(Matrices matrices) {
  for (at::Tensor& matrix : matrices) {
    if (matrix.stride(1) != 1 && matrix.size(1) > 1) matrix = matrix.contiguous();
  }
  return matrices;
}

}  // namespace

void add_by_tiles_(const WeightStep& x, const std::optional<RowRounding>& rounding) {
  const at::Tensor& w = x.weights.front();
  const Kernels& kernels = kernels_for(w);
  // Tiles follow the memory, or the rows of the parameter: those of the left form or of its transpose.
  const bool turned = rounding ? rounding->rows_are_columns : w.stride(0) < w.stride(1);
  const Matrices weights = turned ? transposed(x.weights) : x.weights;
  const Matrices grads = turned ? transposed(x.grads) : x.grads;
  const at::ScalarType dtype = kernels.products ? x.bases.front().scalar_type() : x.steps.scalar_type();
  Matrices bases = x.bases;
  for (at::Tensor& basis : bases) basis = basis.to(dtype);
  const auto factors = [&](const at::Tensor& stack) {
    return std::pair{turned ? transposed(each(stack.to(dtype))) : bases,
                     turned ? transposed(bases) : each(stack.to(dtype))};
  };
  const auto [step_left, step_right] = factors(x.steps);
  const auto [projected_left, projected_right] =
      x.projected.defined() ? factors(x.projected) : std::pair<Matrices, Matrices>{};

  const int64_t rows = weights.front().size(0), cols = weights.front().size(1);
  const auto count = static_cast<int64_t>(weights.size());
  // On a CPU a tile stays in the second-level cache; elsewhere launches cost more.
  const int64_t entries = w.is_cpu() ? 1 << 16 : 1 << 26;
  const int64_t most_rows = std::clamp<int64_t>(entries / cols, 1, rows);
  const int64_t most = std::clamp<int64_t>(entries / (most_rows * cols), 1, count);
  const at::Tensor memory = at::empty({most * most_rows * cols}, x.steps.options());
  for (int64_t first = 0; first < count; first += most) {
    const int64_t together = std::min(most, count - first);
    const auto some = [&](const Matrices& list) {
      return rows_of(list, first, together, 0, list[0].size(0));
    };
    for (int64_t start = 0; start < rows; start += most_rows) {
      const int64_t height = std::min(most_rows, rows - start);
      const at::Tensor tile = memory.narrow(0, 0, together * height * cols).view({together, height, cols});
      const auto part = [&](const Matrices& list) { return rows_of(list, first, together, start, height); };
      if (x.projected.defined()) {
        multiply_(tile, part(projected_left), some(projected_right), 0);
        kernels.signs_of_difference_(tile, with_rows_in_one_piece(part(grads)),
                                     x.lengths.narrow(0, first, together));
      }
      multiply_(tile, part(step_left), some(step_right), x.projected.defined() ? 1 : 0);
      const Matrices targets = part(weights), in_one_piece = with_rows_in_one_piece(targets);
      if (rounding) {
        for (int64_t i = 0; i < together; ++i) {
          const auto at = static_cast<size_t>(first + i);
          const SketchKey& key = rounding->keys[at];
          kernels.add_rounded_(in_one_piece[static_cast<size_t>(i)], tile.select(0, i),
                               x.decays.select(0, first + i), key.seed, key.matrix,
                               rounding->counts[at].to(at::kDouble), start * cols);
        }
      } else {
        kernels.add_(in_one_piece, tile, x.decays.narrow(0, first, together));
      }
      for (size_t i = 0; i < targets.size(); ++i) {
        if (!in_one_piece[i].is_same(targets[i])) at::Tensor(targets[i]).copy_(in_one_piece[i]);
      }
    }
  }
}

}  // namespace galore_rrf
