#include "optimizer/tiled_update.h"

#include <algorithm>

#include "kernels.h"
#include "range_finder/scaling.h"

namespace galore_rrf {
namespace {

Outside outside(const WeightsAndGradients& x, Residual residual, const at::Tensor& r,
                const at::Tensor& lengths, bool turned) {
  const auto in_order = [&](const Matrices& matrices) { return turned ? transposed(matrices) : matrices; };
  // Of half precision bf16 alone: gradients and coefficients may exceed what fp16 holds.
  const at::ScalarType stored = x.bases.front().scalar_type();
  const bool narrow = kernels_for(r).products && stored != at::kHalf;
  const at::ScalarType dtype = narrow ? stored : r.scalar_type();
  Matrices bases = x.bases;
  for (at::Tensor& basis : bases) basis = basis.to(dtype);
  const Matrices grads = in_order(x.grads);
  const RowTiles tiles(grads.front(), static_cast<int64_t>(grads.size()), residual == Residual::normalized);
  // What products leave of a gradient within the subspace, and what storing it and the basis does.
  const double products = 64 * unit_roundoff(r.scalar_type());
  const double storage = 2 * std::max(unit_roundoff(stored), unit_roundoff(grads.front().scalar_type()));
  return {grads, bases, r, lengths, products + storage, tiles, tiles.memory(r.options()), turned};
}

}  // namespace

TiledUpdate::TiledUpdate(const WeightsAndGradients& x, Residual residual, const at::Tensor& r,
                         const at::Tensor& lengths, std::optional<RowRounding> rounding)
    : rounding_(std::move(rounding)),
      outside_(outside(x, residual, r, lengths,
                       rounding_ ? rounding_->rows_are_columns : is_turned(x.weights.front()))),
      weights_(outside_.turned ? transposed(x.weights) : x.weights),
      residual_(residual_step(residual, outside_)) {}

void TiledUpdate::operator()(const at::Tensor& steps, const at::Tensor& decays,
                             const at::Tensor& column_scales) const {
  const Outside& x = outside_;
  const Kernels& kernels = kernels_for(steps);
  if (residual_) residual_->add_within_(steps);
  const BasisProduct within(x.bases, steps, x.bases.front().scalar_type(), x.turned);
  const auto move = [&](const RowTile& block) {
    within.into_(block, residual_ ? 1 : 0);
    if (column_scales.defined()) {
      kernels.add_scaled_(block.values, with_rows_in_one_piece(block.rows(x.grads)),
                          x.turned ? block.of_rows(column_scales) : block.of_matrices(column_scales),
                          x.turned ? 0 : 1);
    }
    const Matrices targets = block.rows(weights_), in_one_piece = with_rows_in_one_piece(targets);
    if (rounding_) {
      round_stochastically(in_one_piece, block, decays);
    } else {
      kernels.add_(in_one_piece, block.values, block.of_matrices(decays));
    }
    for (size_t i = 0; i < targets.size(); ++i) {
      if (!in_one_piece[i].is_same(targets[i])) at::Tensor(targets[i]).copy_(in_one_piece[i]);
    }
  };
  x.tiles.for_each(x.memory, [&](const RowTile& tile) {
    if (residual_) residual_->into_(tile);
    x.tiles.for_each_block(tile, move);
  });
}

void TiledUpdate::round_stochastically(const Matrices& weights, const RowTile& tile,
                                       const at::Tensor& decays) const {
  for (int64_t i = 0; i < tile.count; ++i) {
    const auto at = static_cast<size_t>(tile.first + i);
    const SketchKey& key = rounding_->keys[at];
    kernels_for(tile.values)
        .add_rounded_(weights[static_cast<size_t>(i)], tile.values.select(0, i),
                      decays.select(0, tile.first + i), key.seed, key.matrix,
                      rounding_->counts[at].to(at::kDouble), tile.start * outside_.tiles.cols());
  }
}

}  // namespace galore_rrf
