// Matrices of one shape by tiles of rows, for what is as large as they are and must not exist of all at once.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "range_finder/product.h"

namespace galore_rrf {

// The same rows of several matrices.
struct RowTile {
  int64_t first, count;   // matrices
  int64_t start, height;  // rows
  at::Tensor values;      // count x height x columns; undefined where tiles have no memory

  Matrices rows(const Matrices& matrices) const;

  // Of a stack with an entry, or some, for each matrix: what belongs to the tile's.
  at::Tensor of_matrices(const at::Tensor& stack) const { return stack.narrow(0, first, count); }

  // Of a stack with an entry, in dimension 1, for each row: what belongs to the tile's.
  at::Tensor of_rows(const at::Tensor& stack) const { return of_matrices(stack).narrow(1, start, height); }
};

// All tiles, one after the other; a tile is of all rows where matrices are to stay whole, and taken in
// blocks.
class RowTiles {
 public:
  // Of matrices of the form of `like`, m of them.
  RowTiles(const at::Tensor& like, int64_t m, bool whole = false);

  // One tile's memory, in which each has its values.
  at::Tensor memory(const at::TensorOptions& options) const;

  int64_t cols() const { return cols_; }

  // Calls f(const RowTile&).
  template <class F>
  void for_each(const at::Tensor& memory, const F& f) const {
    for (int64_t first = 0; first < matrices_; first += most_) {
      for (int64_t start = 0; start < rows_; start += most_rows_) {
        RowTile tile{
            first, std::min(most_, matrices_ - first), start, std::min(most_rows_, rows_ - start), {}};
        if (memory.defined()) {
          tile.values =
              memory.narrow(0, 0, tile.count * tile.height * cols_).view({tile.count, tile.height, cols_});
        }
        f(tile);
      }
    }
  }

  // Calls f(const RowTile&) for blocks of a tile's rows: the tile itself where matrices do not stay whole.
  template <class F>
  void for_each_block(const RowTile& tile, const F& f) const {
    for (int64_t start = 0; start < tile.height; start += block_rows_) {
      const int64_t height = std::min(block_rows_, tile.height - start);
      f(RowTile{tile.first, tile.count, tile.start + start, height, tile.values.narrow(1, start, height)});
    }
  }

 private:
  int64_t matrices_, rows_, cols_, block_rows_, most_rows_, most_;
};

// Whether a matrix's memory follows its columns.
bool is_turned(const at::Tensor& matrix);

// Those whose rows do not lie in one piece each, copied.
Matrices with_rows_in_one_piece(Matrices matrices);

// Q X of each matrix, or its transpose where `turned`, by tiles of its rows.
class BasisProduct {
 public:
  // bases: s x r each, in `dtype`; x: B x r x l.
  BasisProduct(const Matrices& bases, const at::Tensor& x, at::ScalarType dtype, bool turned);

  // The tile's values <- beta times themselves + the product's, beta 0 or 1.
  void into_(const RowTile& tile, int beta) const;

 private:
  Matrices left_, right_;
};

}  // namespace galore_rrf
