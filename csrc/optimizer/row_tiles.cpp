#include "optimizer/row_tiles.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>

#include "kernels.h"

namespace galore_rrf {
namespace {

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

}  // namespace

Matrices RowTile::rows(const Matrices& matrices) const {
  Matrices result;
  for (int64_t i = first; i < first + count; ++i) {
    result.push_back(matrices[static_cast<size_t>(i)].narrow(0, start, height));
  }
  return result;
}

RowTiles::RowTiles(const at::Tensor& like, int64_t m, bool whole)
    : matrices_(m), rows_(like.size(0)), cols_(like.size(1)) {
  // On a CPU a block stays in the second-level cache; elsewhere launches cost more.
  const int64_t entries = like.is_cpu() ? 1 << 16 : 1 << 26;
  block_rows_ = std::clamp<int64_t>(entries / cols_, 1, rows_);
  most_rows_ = whole ? rows_ : block_rows_;
  most_ = std::clamp<int64_t>(entries / (most_rows_ * cols_), 1, matrices_);
}

at::Tensor RowTiles::memory(const at::TensorOptions& options) const {
  return at::empty({most_ * most_rows_ * cols_}, options);
}

bool is_turned(const at::Tensor& matrix) { return matrix.stride(0) < matrix.stride(1); }

Matrices with_rows_in_one_piece(Matrices matrices) {
  for (at::Tensor& matrix : matrices) {
    if (matrix.stride(1) != 1 && matrix.size(1) > 1) matrix = matrix.contiguous();
  }
  return matrices;
}

BasisProduct::BasisProduct(const Matrices& bases, const at::Tensor& x, at::ScalarType dtype, bool turned)
    : left_(turned ? transposed(each(x.to(dtype))) : bases),
      right_(turned ? transposed(bases) : each(x.to(dtype))) {}

void BasisProduct::into_(const RowTile& tile, int beta) const {
  const auto from = right_.begin() + tile.first;
  multiply_(tile.values, tile.rows(left_), Matrices(from, from + tile.count), beta);
}

}  // namespace galore_rrf
