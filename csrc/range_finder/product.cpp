#include "range_finder/product.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>

#include "kernels.h"
#include "range_finder/tiles.h"

namespace galore_rrf {
namespace {

constexpr int64_t kLargeEntries = 1 << 21;
constexpr int64_t kQuickEntries = 1 << 15;  // below, what oneDNN does around a product takes longer than it

bool blas_reads(const at::Tensor& a) {
  const auto fits = [&](int64_t inner, int64_t outer) {
    return a.stride(inner) == 1 && a.stride(outer) >= std::max<int64_t>(1, a.size(inner));
  };
  return a.scalar_type() == compute_dtype(a) && (fits(1, 0) || fits(0, 1));
}

bool cpu_multiplies_bf16() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512bf16");  // which those with AMX have too
#else
  return false;
#endif
}

}  // namespace

at::ScalarType compute_dtype(const at::Tensor& a) {
  return a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::optional<int64_t> quick_entries() {
  static const bool does = cpu_multiplies_bf16();
  return does ? std::optional(kQuickEntries) : std::nullopt;
}

at::ScalarType quick_dtype(const at::Tensor& a) {
  const std::optional<int64_t> least = quick_entries();
  const bool does = !a.is_cpu() || (least && a.size(1) * a.size(2) >= *least);
  return does && a.scalar_type() == at::kFloat ? at::kBFloat16 : a.scalar_type();
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
    for_each_tile(a, 0, 0, [&](int64_t start, int64_t width, const at::Tensor& tile) {
      at::Tensor rows = result.narrow(0, start, width);
      at::mm_out(rows, tile, b);
    });
  } else {
    for_each_tile(a, 1, 0, [&](int64_t start, int64_t width, const at::Tensor& tile) {
      at::addmm_out(result, result, tile, b.narrow(0, start, width), /*beta=*/start == 0 ? 0 : 1);
    });
  }
}

at::Tensor multiply(const at::Tensor& a, const at::Tensor& b, int exponent) {
  const at::Tensor out = at::empty({b.size(1), a.size(0)}, b.options()).mT();
  multiply_out(out, a, b, exponent);
  return out;
}

void add_product_(const at::Tensor& w, const at::Tensor& x, const at::Tensor& y, const at::Tensor& beta) {
  if (w.numel() == 0) return;
  const auto add = [&](at::Tensor target, const at::Tensor& rows, const at::Tensor& cols) {
    if (beta.is_cpu()) {
      target.addmm_(rows, cols, beta.item());
    } else {
      target.mul_(beta).addmm_(rows, cols);
    }
  };
  if (blas_reads(w)) return add(w, x, y);
  const int64_t dim = outer_dim(w);
  for_each_tile(w, dim, 0, [&](int64_t start, int64_t width, at::Tensor& tile) {
    add(tile, dim == 0 ? x.narrow(0, start, width) : x, dim == 0 ? y : y.narrow(1, start, width));
    w.narrow(dim, start, width).copy_(tile);
  });
}

Matrices each(const at::Tensor& stack) { return stack.unbind(0); }

Matrices transposed(Matrices matrices) {
  for (at::Tensor& matrix : matrices) matrix = matrix.mT();
  return matrices;
}

at::Tensor stacked(const Matrices& matrices, at::ScalarType dtype) {
  const at::Tensor stack = matrices.size() == 1 ? matrices.front().unsqueeze(0) : at::stack(matrices);
  return stack.to(dtype);
}

void multiply_stacks_out(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
  if (a.size(0) == 1) {  // bmm on a CPU copies what is not in order
    at::Tensor single = out.select(0, 0);
    at::mm_out(single, a.select(0, 0), b.select(0, 0));
  } else {
    at::bmm_out(out, a, b);
  }
}

at::Tensor multiply_stacks(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor out = at::empty({a.size(0), a.size(1), b.size(2)}, a.options());
  multiply_stacks_out(out, a, b);
  return out;
}

void subtract_products_(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b) {
  if (c.size(0) == 1) {
    c.select(0, 0).addmm_(a.select(0, 0), b.select(0, 0), /*beta=*/1, /*alpha=*/-1);
  } else {
    at::Tensor target = c;
    target.baddbmm_(a, b, /*beta=*/1, /*alpha=*/-1);
  }
}

void multiply_out(const Matrices& out, const Matrices& a, const Matrices& b) {
  const auto products = kernels_for(a.front()).products;
  if (products && products(out, a, b, /*beta=*/{}, /*outcomes=*/{})) return;
  for (size_t i = 0; i < a.size(); ++i) multiply_out(out[i], a[i], b[i].to(compute_dtype(a[i])));
}

void add_products_(const Matrices& w, const Matrices& x, const at::Tensor& y) {
  const at::Tensor one = at::ones({}, y.options());
  const auto products = kernels_for(y).products;
  if (products && products(w, x, each(y.to(x.front().scalar_type())), one, /*outcomes=*/{})) return;
  for (size_t i = 0; i < w.size(); ++i) {
    add_product_(w[i], x[i].to(y.scalar_type()), y.select(0, static_cast<int64_t>(i)), one);
  }
}

at::Tensor scaled_down(const at::Tensor& b, const at::Tensor& exponents) {
  if (!exponents.defined()) return b;
  const at::Tensor result = b.clone();
  kernels_for(b).scale_by_powers_(result, exponents, -1);
  return result;
}

at::Tensor multiply(const Matrices& a, const at::Tensor& b, const at::Tensor& exponents) {
  at::Tensor factor = scaled_down(b, exponents);
  if (kernels_for(b).products) factor = factor.to(a.front().scalar_type());
  const at::Tensor out = at::empty({b.size(0), b.size(2), a.front().size(0)}, b.options()).mT();
  multiply_out(each(out), a, each(factor));
  return out;
}

}  // namespace galore_rrf
