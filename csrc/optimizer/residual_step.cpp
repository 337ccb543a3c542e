#include "optimizer/residual_step.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "optimizer/complement.h"
#include "optimizer/orthogonalized.h"
#include "range_finder/scaling.h"

namespace galore_rrf {
namespace {

// Of each matrix of a stack, fp64 [B].
at::Tensor squared_norms(const at::Tensor& stack) {
  const at::Tensor sums = at::empty({stack.size(0)}, stack.options().dtype(at::kDouble));
  kernels_for(stack).squared_norms(sums, stack);
  return sums;
}

// The squared norm of an E that is but rounding, which is no direction.
at::Tensor squared_rounding(const Outside& x) { return squared_norms(x.r).mul_(x.rounding * x.rounding); }

// One over the roots of squared norms (fp64) in a dtype, 0 where there is not `some`.
at::Tensor inverse_roots(const at::Tensor& squares, const at::Tensor& some, at::ScalarType dtype) {
  constexpr double kMost = 1e37;  // within fp32
  return at::where(some, squares.rsqrt().clamp_max_(kMost), 0.0).to(dtype);
}

// A number a matrix, fp64 [B], to multiply a stack with.
at::Tensor of_matrix(const at::Tensor& numbers, at::ScalarType dtype) {
  return numbers.to(dtype).view({-1, 1, 1});
}

BasisProduct product(const Outside& x, const at::Tensor& r) {
  return BasisProduct(x.bases, r, x.bases.front().scalar_type(), x.turned);
}

class Signs : public ResidualStep {
 public:
  explicit Signs(const Outside& x) : grads_(x.grads), lengths_(x.lengths), projected_(product(x, x.r)) {}

  void into_(const RowTile& tile) const override {
    projected_.into_(tile, 0);
    kernels_for(tile.values)
        .signs_of_difference_(tile.values, with_rows_in_one_piece(tile.rows(grads_)),
                              tile.of_matrices(lengths_));
  }

 private:
  const Matrices grads_;
  const at::Tensor lengths_;
  const BasisProduct projected_;
};

// The columns, then the rows of E, in the left form, are divided by their root mean squares, kNormalizations
// times: the gradient multi-normalization of Scetbon et al. 2025 (arXiv 2502.06742).  Tiles are of whole
// matrices: passes over a tile are a fraction of the product that would make it anew.
class Normalized : public ResidualStep {
 public:
  explicit Normalized(const Outside& x)
      : grads_(x.grads),
        negative_(product(x, x.r.neg())),
        tiles_(x.tiles),
        turned_(x.turned),
        lengths_(of_matrix(x.lengths, x.r.scalar_type())),
        moving_(x.lengths.ne(0).to(x.r.scalar_type()).unsqueeze(1).repeat({1, x.tiles.cols()})),
        rounding_(squared_rounding(x).div_(static_cast<double>(x.grads.front().numel())).unsqueeze(1)) {}

  void into_(const RowTile& tile) const override {
    tiles_.for_each_block(tile, [&](const RowTile& block) {
      negative_.into_(block, 0);
      kernels_for(block.values)
          .add_scaled_(block.values, with_rows_in_one_piece(block.rows(grads_)), block.of_matrices(moving_),
                       1);
    });
    const int columns = turned_ ? 1 : 0;
    for (int i = 0; i < kNormalizations; ++i) {
      const at::Tensor squares = mean_squares(tile, columns);
      if (i == 0) {
        // What is but rounding; and of gradients near the dtype's most E may not be finite.
        const at::Tensor none =
            squares.le(tile.of_matrices(rounding_)).logical_or_(squares.isfinite().logical_not_());
        at::Tensor(tile.values).masked_fill_(none.unsqueeze(1 + columns), 0);
        squares.masked_fill_(none, 0);
      }
      divide_(tile, columns, squares);
      divide_(tile, 1 - columns, mean_squares(tile, 1 - columns));
    }
    at::Tensor(tile.values).mul_(tile.of_matrices(lengths_));
  }

 private:
  static constexpr int kNormalizations = 2;

  // Over `dim`, 0 or 1, of each matrix, fp64.
  static at::Tensor mean_squares(const RowTile& tile, int dim) {
    const auto options = tile.values.options().dtype(at::kDouble);
    const at::Tensor sums = at::zeros({tile.count, tile.values.size(2 - dim)}, options);
    kernels_for(tile.values).add_squares_(sums, each(tile.values), dim);
    return sums.div_(static_cast<double>(tile.values.size(1 + dim)));
  }

  static void divide_(const RowTile& tile, int dim, const at::Tensor& squares) {
    const at::Tensor scales = inverse_roots(squares, squares.gt(0), tile.values.scalar_type());
    at::Tensor(tile.values).mul_(scales.unsqueeze(1 + dim));
  }

  const Matrices grads_;
  const BasisProduct negative_;
  const RowTiles tiles_;
  const bool turned_;  // whether the tiles' rows are the columns of the left form
  const at::Tensor lengths_, moving_, rounding_;
};

// E lies in s - r dimensions, and that is where it is made and orthogonalized.
class Orthogonalized : public ResidualStep {
 public:
  explicit Orthogonalized(const Outside& x) : turned_(x.turned) {
    const at::ScalarType dtype = x.r.scalar_type();
    const Complement complement(x.bases, dtype);
    const Matrices grads = turned_ ? transposed(x.grads) : x.grads;
    const int64_t rows = grads.front().size(0), cols = grads.front().size(1), rank = x.r.size(1);
    step_ = at::empty({x.r.size(0), rows, cols}, x.r.options());
    at::Tensor e = complement.coordinates(grads, x.r);
    const at::Tensor squared = squared_norms(e);
    // Matrices left alone; and of gradients near the dtype's most E may not be finite.
    const at::Tensor none = x.lengths.eq(0).logical_or_(squared.isfinite().logical_not_());
    const at::Tensor some = squared.gt(squared_rounding(x)).logical_and_(none.logical_not());
    e.masked_fill_(none.view({-1, 1, 1}), 0).mul_(inverse_roots(squared, some, dtype).view({-1, 1, 1}));
    e = e.to(quick_dtype(e));
    // Entries of a root mean square of 1 at most.
    const double length = std::sqrt(static_cast<double>(std::max(rows, cols)));
    step_.narrow(1, rank, rows - rank).copy_(orthogonalized(e)).mul_(of_matrix(x.lengths, dtype).mul(length));
    within_ = complement.spread_(step_);
  }

  void into_(const RowTile& tile) const override {
    at::Tensor(tile.values).copy_(tile.of_rows(turned_ ? step_.mT() : step_));
  }

  void add_within_(const at::Tensor& coefficients) const override { at::Tensor(coefficients).add_(within_); }

 private:
  const bool turned_;
  at::Tensor step_, within_;
};

}  // namespace

void ResidualStep::add_within_(const at::Tensor& /*coefficients*/) const {}

std::unique_ptr<const ResidualStep> residual_step(Residual residual, const Outside& x) {
  switch (residual) {
    case Residual::sign:
      return std::make_unique<Signs>(x);
    case Residual::normalized:
      return std::make_unique<Normalized>(x);
    case Residual::orthogonalized:
      return std::make_unique<Orthogonalized>(x);
    default:
      return nullptr;
  }
}

}  // namespace galore_rrf
