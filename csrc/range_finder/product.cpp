#include "range_finder/product.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "range_finder/scaling.h"

namespace galore_rrf {
namespace {

constexpr int64_t kTileEntries = 1 << 17;  // an fp32 tile of 512 KiB stays in the second-level cache
constexpr int64_t kLargeEntries = 1 << 21;

bool blas_reads(const at::Tensor& a) {
  const auto fits = [&](int64_t inner, int64_t outer) {
    return a.stride(inner) == 1 && a.stride(outer) >= std::max<int64_t>(1, a.size(inner));
  };
  return a.scalar_type() == compute_dtype(a) && (fits(1, 0) || fits(0, 1));
}

// Calls f(start, width, tile) with fp32/fp64 buffers for successive tiles along `dim`.
template <class F>
void for_each_tile(const at::Tensor& a, int64_t dim, const F& f) {
  const int64_t extent = a.size(dim);
  const int64_t across = std::max<int64_t>(1, a.size(1 - dim));
  const int64_t width = std::clamp<int64_t>(kTileEntries / across, 1, std::max<int64_t>(1, extent));
  const auto options = a.options().dtype(compute_dtype(a));
  const at::Tensor rows = at::empty({width, across}, options);
  for (int64_t start = 0; start < extent; start += width) {
    const int64_t w = std::min(width, extent - start);
    const at::Tensor tile = rows.narrow(0, 0, w);
    f(start, w, dim == 0 ? tile : tile.mT());
  }
}

int64_t outer_dim(const at::Tensor& a) { return a.stride(0) >= a.stride(1) ? 0 : 1; }

}  // namespace

at::ScalarType compute_dtype(const at::Tensor& a) {
  return a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void multiply_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& factor, int exponent) {
  at::Tensor result = out;
  const at::Tensor b = exponent == 0 ? factor : factor.clone();
  scale_by_power_(b, -exponent);
  if (a.numel() == 0) {
    result.zero_();
  } else if (blas_reads(a) && a.is_cpu() && a.numel() >= kLargeEntries && result.stride(1) != 1) {
    // MKL multiplies large matrices up to 1.7 times as fast into rows as into columns of a narrow result.
    result.copy_(at::mm(a, b));
  } else if (blas_reads(a)) {
    at::mm_out(result, a, b);
  } else if (outer_dim(a) == 0) {
    for_each_tile(a, 0, [&](int64_t start, int64_t width, at::Tensor tile) {
      tile.copy_(a.narrow(0, start, width));
      at::Tensor rows = result.narrow(0, start, width);
      at::mm_out(rows, tile, b);
    });
  } else {
    for_each_tile(a, 1, [&](int64_t start, int64_t width, at::Tensor tile) {
      tile.copy_(a.narrow(1, start, width));
      at::addmm_out(result, result, tile, b.narrow(0, start, width), /*beta=*/start == 0 ? 0 : 1);
    });
  }
}

at::Tensor multiply(const at::Tensor& a, const at::Tensor& b, int exponent) {
  const at::Tensor out = at::empty({b.size(1), a.size(0)}, b.options()).mT();
  multiply_out(out, a, b, exponent);
  return out;
}

void add_product_(const at::Tensor& w, const at::Tensor& x, const at::Tensor& y, double beta, double alpha) {
  if (w.numel() == 0) return;
  if (blas_reads(w)) {
    at::Tensor target = w;
    target.addmm_(x, y, beta, alpha);
    return;
  }
  const int64_t dim = outer_dim(w);
  for_each_tile(w, dim, [&](int64_t start, int64_t width, at::Tensor tile) {
    const at::Tensor part = w.narrow(dim, start, width);
    tile.copy_(part);
    tile.addmm_(dim == 0 ? x.narrow(0, start, width) : x, dim == 0 ? y : y.narrow(1, start, width), beta,
                alpha);
    part.copy_(tile);
  });
}

}  // namespace galore_rrf
