// A matrix of any strides and dtype, seen a tile at a time in its compute dtype: no full-size copy is made.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "range_finder/product.h"
#include "range_finder/scaling.h"

namespace galore_rrf {

// The dimension with the larger stride.
inline int64_t outer_dim(const at::Tensor& a) { return a.stride(0) >= a.stride(1) ? 0 : 1; }

// Rows of a tile along `dim`.
inline int64_t tile_extent(const at::Tensor& a, int64_t dim) {
  // On a CPU an fp32 tile of 512 KiB stays in the second-level cache; elsewhere launches cost more.
  const int64_t entries = a.is_cpu() ? 1 << 17 : 1 << 24;
  return std::clamp<int64_t>(entries / std::max<int64_t>(1, a.size(1 - dim)), 1,
                             std::max<int64_t>(1, a.size(dim)));
}

// How many tiles that makes.
inline int64_t tile_count(const at::Tensor& a, int64_t dim) {
  const int64_t most = tile_extent(a, dim);
  return (a.size(dim) + most - 1) / most;
}

// Calls f(start, width, tile) for successive parts of `a` along `dim`; `tile`, f's own to change, holds
// 2^-exponent times the part.
template <class F>
void for_each_tile(const at::Tensor& a, int64_t dim, int exponent, const F& f) {
  const int64_t extent = a.size(dim);
  const int64_t across = std::max<int64_t>(1, a.size(1 - dim));
  const int64_t most = tile_extent(a, dim);
  const at::Tensor rows = at::empty({most, across}, a.options().dtype(compute_dtype(a)));
  for (int64_t start = 0; start < extent; start += most) {
    const int64_t width = std::min(most, extent - start);
    const at::Tensor piece = rows.narrow(0, 0, width);
    at::Tensor tile = dim == 0 ? piece : piece.mT();
    tile.copy_(a.narrow(dim, start, width));
    scale_by_power_(tile, -exponent);
    f(start, width, tile);
  }
}

}  // namespace galore_rrf
