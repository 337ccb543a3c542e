#include "optimizer/residual.h"

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>

#include "kernels.h"
#include "optimizer/orthogonalized.h"

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

// Successive tiles of matrices of one shape, the same rows of several.  Those of the left form, or of its
// transpose where `turned`.
class Tiles {
 public:
  Tiles(const Matrices& matrices, bool turned)
      : count_(static_cast<int64_t>(matrices.size())),
        rows_(matrices.front().size(turned ? 1 : 0)),
        cols_(matrices.front().size(turned ? 0 : 1)) {
    // On a CPU a tile stays in the second-level cache; elsewhere launches cost more.
    const int64_t entries = matrices.front().is_cpu() ? 1 << 16 : 1 << 26;
    most_rows_ = std::clamp<int64_t>(entries / cols_, 1, rows_);
    most_ = std::clamp<int64_t>(entries / (most_rows_ * cols_), 1, count_);
  }

  int64_t cols() const { return cols_; }
  int64_t most_entries() const { return most_ * most_rows_ * cols_; }

  // A tile in `memory`, which has most_entries().
  at::Tensor of(const at::Tensor& memory, int64_t count, int64_t height) const {
    return memory.narrow(0, 0, count * height * cols_).view({count, height, cols_});
  }

  // Calls f(first matrix, how many, first row, how many).
  template <class F>
  void for_each(const F& f) const {
    for (int64_t first = 0; first < count_; first += most_) {
      for (int64_t start = 0; start < rows_; start += most_rows_) {
        f(first, std::min(most_, count_ - first), start, std::min(most_rows_, rows_ - start));
      }
    }
  }

 private:
  int64_t count_, rows_, cols_, most_rows_, most_;
};

// Of fp32 and fp64.
double roundoff(const at::Tensor& a) { return a.scalar_type() == at::kDouble ? 0x1p-53 : 0x1p-24; }

// One over the roots of squared norms (fp64) in a dtype, 0 where there is not `some`.
at::Tensor inverse_roots(const at::Tensor& squares, const at::Tensor& some, at::ScalarType dtype) {
  constexpr double kMost = 1e37;  // within fp32
  return at::where(some, squares.rsqrt().clamp_max_(kMost), 0.0).to(dtype);
}

// Whether memory follows the columns of the left form.
bool is_turned(const at::Tensor& matrix) { return matrix.stride(0) < matrix.stride(1); }

// Those whose rows do not lie in one piece each, copied.
Matrices with_rows_in_one_piece(Matrices matrices) {
  for (at::Tensor& matrix : matrices) {
    if (matrix.stride(1) != 1 && matrix.size(1) > 1) matrix = matrix.contiguous();
  }
  return matrices;
}

// Q X of the left form for each matrix, or its transpose where `turned`, by tiles.
class Product {
 public:
  // bases: of `dtype`.
  Product(const Matrices& bases, const at::Tensor& x, at::ScalarType dtype, bool turned)
      : left_(turned ? transposed(each(x.to(dtype))) : bases),
        right_(turned ? transposed(bases) : each(x.to(dtype))) {}

  // tile <- beta tile + the product's rows from `start`, of the matrices from `first`.
  void into_(const at::Tensor& tile, int64_t first, int64_t start, int beta) const {
    multiply_(tile, rows_of(left_, first, tile.size(0), start, tile.size(1)),
              rows_of(right_, first, tile.size(0), 0, right_.front().size(0)), beta);
  }

 private:
  Matrices left_, right_;
};

// E = G - Q R with its columns, then its rows, in the left form, divided by their root mean squares,
// kNormalizations times: the gradient multi-normalization of Scetbon et al. 2025 (arXiv 2502.06742).  What is
// known of it are scales of memory's rows and columns, one pass over E a time.
class Normalized {
 public:
  Normalized(const WeightStep& x, const Matrices& grads, const Tiles& tiles, const at::Tensor& memory,
             at::ScalarType dtype, const Matrices& bases, bool turned)
      : grads_(grads),
        projected_(bases, x.projected.neg(), dtype, turned),
        moving_(x.lengths.ne(0).to(x.projected.scalar_type()).unsqueeze(1).expand({-1, tiles.cols()})),
        lengths_(x.lengths.to(x.projected.scalar_type()).view({-1, 1, 1})),
        rows_first_(turned),
        columns_(at::ones({x.projected.size(0), 1, tiles.cols()}, x.projected.options())),
        rows_(at::ones({x.projected.size(0), grads.front().size(0), 1}, x.projected.options())) {
    // What rounding leaves of a gradient within the subspace is no direction.
    const double u = roundoff(x.projected);
    const auto entries = static_cast<double>(grads.front().numel());
    const at::Tensor inside = at::empty({x.projected.size(0)}, lengths_.options().dtype(at::kDouble));
    kernels_for(inside).squared_norms(inside, x.projected);
    least_ = inside.mul_(64 * u * 64 * u / entries).view({-1, 1, 1});
    const auto all_rows = static_cast<double>(grads.front().size(0));
    for (int i = 0; i < kNormalizations; ++i) {
      const bool rows = i > 0 || rows_first_;
      const at::Tensor sums = at::zeros(columns_.sizes(), least_.options());
      tiles.for_each([&](int64_t first, int64_t count, int64_t start, int64_t height) {
        const at::Tensor tile = tiles.of(memory, count, height);
        residual_into_(tile, first, start);
        if (rows) normalize_rows_(tile, first, start, i == 0);
        kernels_for(tile).add_squares_(sums.narrow(0, first, count).squeeze(1), each(tile), 0);
      });
      sums.div_(all_rows);
      columns_.mul_(inverse_roots(sums, rows ? sums.gt(0) : sums.gt(least_), columns_.scalar_type()));
    }
  }

  // tile <- lengths times the rows from `start`.
  void into_(const at::Tensor& tile, int64_t first, int64_t start) const {
    residual_into_(tile, first, start);
    if (!rows_first_) normalize_rows_(tile, first, start, false);
    const at::Tensor lengths = lengths_.narrow(0, first, tile.size(0));
    if (rows_first_) {
      at::Tensor(tile).mul_(rows_.narrow(0, first, tile.size(0)).narrow(1, start, tile.size(1)).mul(lengths));
    } else {
      at::Tensor(tile).mul_(lengths);
    }
  }

 private:
  static constexpr int kNormalizations = 2;

  // With the scales of its columns so far.
  void residual_into_(const at::Tensor& tile, int64_t first, int64_t start) const {
    const int64_t count = tile.size(0);
    projected_.into_(tile, first, start, 0);
    kernels_for(tile).add_scaled_(tile,
                                  with_rows_in_one_piece(rows_of(grads_, first, count, start, tile.size(1))),
                                  moving_.narrow(0, first, count).contiguous(), 1);
    at::Tensor(tile).mul_(columns_.narrow(0, first, count));
  }

  // `raw`: nothing was normalized before.
  void normalize_rows_(const at::Tensor& tile, int64_t first, int64_t start, bool raw) const {
    const int64_t count = tile.size(0), height = tile.size(1);
    const at::Tensor sums = at::zeros({count, height, 1}, least_.options());
    kernels_for(tile).add_squares_(sums.squeeze(2), each(tile), 1);
    sums.div_(static_cast<double>(tile.size(2)));
    at::Tensor rows = rows_.narrow(0, first, count).narrow(1, start, height);
    const at::Tensor some = raw ? sums.gt(least_.narrow(0, first, count)) : sums.gt(0);
    rows.copy_(inverse_roots(sums, some, rows.scalar_type()));
    at::Tensor(tile).mul_(rows);
  }

  const Matrices& grads_;
  const Product projected_;
  const at::Tensor moving_, lengths_;
  const bool rows_first_;  // whether memory's rows are the columns of the left form
  at::Tensor columns_, rows_, least_;
};

// E orthogonalized, in memory's order, times lengths; 0 where E is but rounding.
at::Tensor orthogonalized_residual(const WeightStep& x, const Matrices& grads, at::ScalarType dtype,
                                   const Matrices& bases, bool turned) {
  const at::Tensor idle = x.lengths.eq(0).view({-1, 1, 1});
  const at::Tensor e =
      at::empty({x.lengths.size(0), grads.front().size(0), grads.front().size(1)}, x.projected.options());
  const Matrices each_e = each(e);
  for (size_t i = 0; i < grads.size(); ++i) at::Tensor(each_e[i]).copy_(grads[i]);
  at::Tensor(e).masked_fill_(idle, 0);
  Product(bases, x.projected.neg(), dtype, turned).into_(e, 0, 0, 1);
  const at::Tensor inside = at::empty(x.lengths.sizes(), x.lengths.options());
  const at::Tensor outside = at::empty_like(inside);
  kernels_for(e).squared_norms(inside, x.projected);
  kernels_for(e).squared_norms(outside, e);
  const double least = 64 * roundoff(e);
  const at::Tensor some = outside.gt(inside.mul_(least * least));
  const auto of_matrix = [&](const at::Tensor& t) { return t.to(e.scalar_type()).view({-1, 1, 1}); };
  at::Tensor(e).mul_(of_matrix(inverse_roots(outside, some, e.scalar_type())));
  // Products of half precision where those are fast.
  const at::Tensor narrow = dtype == e.scalar_type() ? e : e.to(at::kBFloat16);
  return orthogonalized(narrow).to(e.scalar_type()).mul_(of_matrix(x.lengths));
}

}  // namespace

void add_by_tiles_(const WeightStep& x, const std::optional<RowRounding>& rounding) {
  const at::Tensor& w = x.weights.front();
  const Kernels& kernels = kernels_for(w);
  const bool turned = rounding ? rounding->rows_are_columns : is_turned(w);
  const Matrices weights = turned ? transposed(x.weights) : x.weights;
  const Matrices grads = turned ? transposed(x.grads) : x.grads;
  const at::ScalarType dtype = kernels.products ? x.bases.front().scalar_type() : x.steps.scalar_type();
  Matrices bases = x.bases;
  for (at::Tensor& basis : bases) basis = basis.to(dtype);
  const Product steps(bases, x.steps, dtype, turned);
  const Tiles tiles(x.weights, turned);
  const at::Tensor memory = at::empty({tiles.most_entries()}, x.steps.options());
  std::optional<Product> projected;
  std::optional<Normalized> normalized;
  at::Tensor whole;
  if (x.residual == Residual::sign) projected.emplace(bases, x.projected, dtype, turned);
  if (x.residual == Residual::normalized) {
    normalized.emplace(x, grads, tiles, memory, dtype, bases, turned);
  }
  if (x.residual == Residual::orthogonalized) whole = orthogonalized_residual(x, grads, dtype, bases, turned);
  tiles.for_each([&](int64_t first, int64_t count, int64_t start, int64_t height) {
    const at::Tensor tile = tiles.of(memory, count, height);
    const auto rows = [&](const Matrices& list) { return rows_of(list, first, count, start, height); };
    if (projected) {
      projected->into_(tile, first, start, 0);
      kernels.signs_of_difference_(tile, with_rows_in_one_piece(rows(grads)),
                                   x.lengths.narrow(0, first, count));
    } else if (normalized) {
      normalized->into_(tile, first, start);
    } else if (whole.defined()) {
      at::Tensor(tile).copy_(whole.narrow(0, first, count).narrow(1, start, height));
    }
    steps.into_(tile, first, start, projected || normalized || whole.defined() ? 1 : 0);
    if (x.residual == Residual::scaled) {
      const at::Tensor scales = x.column_scales.narrow(0, first, count);
      kernels.add_scaled_(tile, with_rows_in_one_piece(rows(grads)),
                          turned ? scales.narrow(1, start, height) : scales, turned ? 0 : 1);
    }
    const Matrices targets = rows(weights), in_one_piece = with_rows_in_one_piece(targets);
    if (rounding) {
      for (int64_t i = 0; i < count; ++i) {
        const auto at = static_cast<size_t>(first + i);
        const SketchKey& key = rounding->keys[at];
        kernels.add_rounded_(in_one_piece[static_cast<size_t>(i)], tile.select(0, i),
                             x.decays.select(0, first + i), key.seed, key.matrix,
                             rounding->counts[at].to(at::kDouble), start * tiles.cols());
      }
    } else {
      kernels.add_(in_one_piece, tile, x.decays.narrow(0, first, count));
    }
    for (size_t i = 0; i < targets.size(); ++i) {
      if (!in_one_piece[i].is_same(targets[i])) at::Tensor(targets[i]).copy_(in_one_piece[i]);
    }
  });
}

namespace {

// The squared norms of the columns of matrices in the left form, fp64 [B, columns].
at::Tensor squared_columns(const Matrices& matrices) {
  const at::Tensor& front = matrices.front();
  const bool turned = is_turned(front);
  const Matrices list = turned ? transposed(matrices) : matrices;
  const at::Tensor sums =
      at::zeros({static_cast<int64_t>(matrices.size()), front.size(1)}, front.options().dtype(at::kDouble));
  Tiles(matrices, turned).for_each([&](int64_t first, int64_t count, int64_t start, int64_t height) {
    const at::Tensor some = sums.narrow(0, first, count);
    kernels_for(front).add_squares_(turned ? some.narrow(1, start, height) : some,
                                    with_rows_in_one_piece(rows_of(list, first, count, start, height)),
                                    turned ? 1 : 0);
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
