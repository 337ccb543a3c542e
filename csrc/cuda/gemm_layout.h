// How a BLAS, which knows column-major matrices only, is asked for a product of matrices of any layout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

namespace galore_rrf::cuda {

struct MatrixLayout {
  int64_t rows, cols, row_stride, col_stride;

  MatrixLayout transposed() const { return {cols, rows, col_stride, row_stride}; }
};

// c <- a b as c (m x n) <- op(first) op(second), all column-major.
struct GemmLayout {
  bool swapped;  // c is row-major: its transpose is b^T a^T, and b the first operand
  bool transpose_first, transpose_second;
  int m, n, k, ld_first, ld_second, ld_c;
};

// What lies from one column to the next of a matrix whose columns lie in one piece each; nothing if they do
// not, or overlap.  The stride of a dimension of one entry means nothing.
inline std::optional<int> leading_dimension(const MatrixLayout& a) {
  const int64_t least = std::max<int64_t>(1, a.rows);
  const int64_t ld = a.cols > 1 ? a.col_stride : least;
  const bool one_piece = a.rows <= 1 || a.row_stride == 1;
  if (!one_piece || ld < least || ld > std::numeric_limits<int>::max()) return std::nullopt;
  return static_cast<int>(ld);
}

// Nothing where BLAS cannot read a matrix: two strides over 1, rows or columns that overlap, sides of 2^31
// and more; nor of empty ones.
inline std::optional<GemmLayout> gemm_layout(const MatrixLayout& c, const MatrixLayout& a,
                                             const MatrixLayout& b) {
  const auto ld_c = leading_dimension(c);
  if (!ld_c) {
    if (!leading_dimension(c.transposed())) return std::nullopt;
    auto result = gemm_layout(c.transposed(), b.transposed(), a.transposed());
    if (result) result->swapped = true;
    return result;
  }
  const auto plain_a = leading_dimension(a), plain_b = leading_dimension(b);
  const auto ld_a = plain_a ? plain_a : leading_dimension(a.transposed());
  const auto ld_b = plain_b ? plain_b : leading_dimension(b.transposed());
  constexpr int64_t kLargest = std::numeric_limits<int>::max();
  if (!ld_a || !ld_b || std::min({c.rows, c.cols, a.cols}) < 1) return std::nullopt;
  if (std::max({c.rows, c.cols, a.cols}) > kLargest) return std::nullopt;
  return GemmLayout{
      false, !plain_a, !plain_b, static_cast<int>(c.rows), static_cast<int>(c.cols), static_cast<int>(a.cols),
      *ld_a, *ld_b,    *ld_c};
}

}  // namespace galore_rrf::cuda
