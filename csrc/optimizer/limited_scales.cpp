#include "optimizer/limited_scales.h"

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "kernels.h"
#include "optimizer/row_tiles.h"

namespace galore_rrf {
namespace {

// The squared norms of the columns of matrices in the left form, fp64 [B, columns].
at::Tensor squared_columns(const Matrices& matrices) {
  const at::Tensor& front = matrices.front();
  const bool turned = is_turned(front);
  const Matrices list = turned ? transposed(matrices) : matrices;
  const auto count = static_cast<int64_t>(list.size());
  const at::Tensor sums = at::zeros({count, front.size(1)}, front.options().dtype(at::kDouble));
  RowTiles(list.front(), count).for_each(/*memory=*/{}, [&](const RowTile& tile) {
    kernels_for(front).add_squares_(turned ? tile.of_rows(sums) : tile.of_matrices(sums),
                                    with_rows_in_one_piece(tile.rows(list)), turned ? 1 : 0);
  });
  return sums;
}

}  // namespace

at::Tensor limited_scales(const Matrices& grads, const at::Tensor& directions, const at::Tensor& projected,
                          const at::Tensor& lengths, const Matrices& norms, const at::Tensor& moving) {
  constexpr double kMostGrowth = 1.01, kMostSquared = 1e60;  // phi within fp32
  const at::Tensor within = squared_columns(each(projected));
  const at::Tensor phi_squared =
      at::where(within.gt(0), squared_columns(each(directions)).div_(within), 0.0).clamp_max_(kMostSquared);
  // ||E_j||^2 by Pythagoras: the residual itself is not there yet.
  const at::Tensor outside = squared_columns(grads).sub_(within).clamp_min_(0);
  const at::Tensor norm = at::where(phi_squared.gt(0), outside.mul_(phi_squared), 0.0).sum(1).sqrt_();
  const at::Tensor last = at::stack(norms).to(at::kDouble);
  const at::Tensor limited = at::where(last.gt(0), at::minimum(norm, last.mul(kMostGrowth)), norm);
  const at::Tensor usable = norm.gt(0).logical_and_(norm.isfinite()).logical_and_(moving);
  const at::Tensor factors = at::where(usable, limited.div(norm).mul_(lengths), 0.0);
  at::_foreach_copy_(norms, each(at::where(usable, limited, last).to(at::kFloat)));
  return phi_squared.sqrt().mul_(factors.unsqueeze(1)).to(projected.scalar_type());
}

}  // namespace galore_rrf
