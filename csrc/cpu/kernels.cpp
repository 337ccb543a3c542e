// Launchers of the CPU kernels: layout, dtype and threads.
#include "kernels.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/moments.h"
#include "cpu/sketch.h"
#include "cpu/stored_moment.h"
#include "math/compensated_sum.h"

namespace galore_rrf {
namespace {

constexpr int64_t kGrain = 1 << 15;  // entries a thread takes at least

// Rows of one strip that lie inside the matrix: strips are aligned to multiples of four rows of
// the whole test matrix, wherever the part asked for begins.
template <class T>
void copy_strip(const float* strip, int64_t strip_stride, T* out, int64_t out_stride, int64_t rows,
                int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      out[i * out_stride + j] = static_cast<T>(strip[i * strip_stride + j]);
    }
  }
}

template <class T>
void fill_sketch_typed(T* out, int64_t rows, int64_t cols, SketchKey key, int64_t row_offset,
                       int64_t col_offset) {
  constexpr int64_t kCols = 512;  // columns generated at a time where they are cast or cut
  const int64_t first_block = row_offset / 4;
  const int64_t last_block = (row_offset + rows - 1) / 4;
  const int64_t grain = std::max<int64_t>(1, kGrain / (4 * cols));
  at::parallel_for(first_block, last_block + 1, grain, [&](int64_t begin, int64_t end) {
    float strip[4 * kCols];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t from = std::max(4 * block, row_offset);
      const int64_t to = std::min(4 * block + 4, row_offset + rows);
      T* target = out + (from - row_offset) * cols;
      if constexpr (std::is_same_v<T, float>) {
        if (to - from == 4) {
          cpu::sketch_strip(target, cols, static_cast<uint32_t>(block), static_cast<uint32_t>(col_offset),
                            cols, key);
          continue;
        }
      }
      for (int64_t j = 0; j < cols; j += kCols) {
        const int64_t width = std::min(kCols, cols - j);
        cpu::sketch_strip(strip, kCols, static_cast<uint32_t>(block), static_cast<uint32_t>(col_offset + j),
                          width, key);
        copy_strip(strip + (from - 4 * block) * kCols, kCols, target + j, cols, to - from, width);
      }
    }
  });
}

void fill_sketch(const at::Tensor& out, SketchKey key, int64_t row_offset, int64_t col_offset) {
  if (out.numel() == 0) return;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, out.scalar_type(), "gaussian_sketch", [&] {
    fill_sketch_typed(out.mutable_data_ptr<scalar_t>(), out.size(0), out.size(1), key, row_offset,
                      col_offset);
  });
}

// Partial sums over fixed chunks, added in order: independent of how threads share the chunks.
double squared_norm(const at::Tensor& a) {
  const int64_t n = a.numel();
  const int64_t chunks = (n + kGrain - 1) / kGrain;
  std::vector<double> sums(static_cast<size_t>(chunks));
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "squared_norm", [&] {
    const scalar_t* data = a.const_data_ptr<scalar_t>();
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        sums[static_cast<size_t>(c)] =
            cpu::squared_norm_range(data + c * kGrain, std::min(kGrain, n - c * kGrain));
      }
    });
  });
  CompensatedSum total;
  for (const double sum : sums) total.add(sum);
  return total.value();
}

bool all_finite(const at::Tensor& a) {
  return AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "all_finite", [&] {
    return cpu::all_finite_range(a.const_data_ptr<scalar_t>(), a.numel());
  });
}

// f(begin, n) for every block of entries that share a scale, on ATen's threads.
template <class F>
void for_each_block(int64_t entries, const F& f) {
  const int64_t blocks = (entries + kCodeBlock - 1) / kCodeBlock;
  at::parallel_for(0, blocks, kGrain / kCodeBlock, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      f(b * kCodeBlock, std::min(kCodeBlock, entries - b * kCodeBlock));
    }
  });
}

void adam(const at::Tensor& gradient, const StoredMoment& exp_avg, const StoredMoment& exp_avg_sq,
          const AdamElement<double>& e) {
  AT_DISPATCH_FLOATING_TYPES(gradient.scalar_type(), "adam", [&] {
    const AdamElement<scalar_t> element{
        static_cast<scalar_t>(e.gradient_sign), static_cast<scalar_t>(e.beta1_complement),
        static_cast<scalar_t>(e.beta2),         static_cast<scalar_t>(e.beta2_complement),
        static_cast<scalar_t>(e.root_scale),    static_cast<scalar_t>(e.eps)};
    scalar_t* g = gradient.mutable_data_ptr<scalar_t>();
    if (exp_avg.values.scalar_type() == gradient.scalar_type()) {
      scalar_t* m = exp_avg.values.mutable_data_ptr<scalar_t>();
      scalar_t* v = exp_avg_sq.values.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, gradient.numel(), kGrain, [&](int64_t begin, int64_t end) {
        cpu::adam_range(g + begin, m + begin, v + begin, end - begin, element);
      });
      return;
    }
    const cpu::MomentBlocks<scalar_t> mean(exp_avg, MomentKind::exp_avg);
    const cpu::MomentBlocks<scalar_t> square(exp_avg_sq, MomentKind::exp_avg_sq);
    for_each_block(gradient.numel(), [&](int64_t begin, int64_t n) {
      scalar_t m[kCodeBlock], v[kCodeBlock];
      mean.load(m, begin, n);
      square.load(v, begin, n);
      cpu::adam_range(g + begin, m, v, n, element);
      mean.store(m, begin, n);
      square.store(v, begin, n);
    });
  });
}

void load_moment(const at::Tensor& out, const StoredMoment& moment, MomentKind kind) {
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "load_moment", [&] {
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    const cpu::MomentBlocks<scalar_t> blocks(moment, kind);
    for_each_block(out.numel(), [&](int64_t begin, int64_t n) { blocks.load(to + begin, begin, n); });
  });
}

void store_moment(const StoredMoment& moment, const at::Tensor& in, MomentKind kind) {
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "store_moment", [&] {
    const scalar_t* from = in.const_data_ptr<scalar_t>();
    const cpu::MomentBlocks<scalar_t> blocks(moment, kind);
    for_each_block(in.numel(), [&](int64_t begin, int64_t n) { blocks.store(from + begin, begin, n); });
  });
}

void gather_rows(const at::Tensor& out, const at::Tensor& a, const at::Tensor& order) {
  const int64_t* source = order.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "gather_rows", [&] {
    for (int64_t j = 0; j < a.size(1); ++j) {
      const scalar_t* from = a.const_data_ptr<scalar_t>() + j * a.stride(1);
      scalar_t* to = out.mutable_data_ptr<scalar_t>() + j * out.stride(1);
      for (int64_t i = 0; i < out.size(0); ++i) to[i] = from[source[i]];
    }
  });
}

void signed_lu(const at::Tensor& q, const at::Tensor& signs) {
  const int64_t width = q.size(0);
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "signed_lu", [&] {
    scalar_t* a = q.mutable_data_ptr<scalar_t>();
    scalar_t* sign = signs.mutable_data_ptr<scalar_t>();
    for (int64_t j = 0; j < width; ++j) {
      const scalar_t* pivot_row = a + j * width;
      sign[j] = pivot_row[j] < 0 ? 1 : -1;
      const scalar_t pivot = sign[j] * pivot_row[j] - 1;
      for (int64_t i = 0; i < j; ++i) a[i * width + j] *= sign[j];
      a[j * width + j] = pivot;
      for (int64_t i = j + 1; i < width; ++i) {
        scalar_t* row = a + i * width;
        const scalar_t factor = row[j] = sign[j] * row[j] / pivot;
        for (int64_t k = j + 1; k < width; ++k) row[k] -= factor * pivot_row[k];
      }
    }
  });
}

// Calls f(run, offset of each tensor) for every run of entries that lies in one piece in all of them.
template <class F, class... Tensors>
void for_each_run(const F& f, const at::Tensor& first, const Tensors&... others) {
  const int64_t inner = first.stride(1) == 1 ? 1 : 0;
  for (int64_t i = 0; i < first.size(1 - inner); ++i) {
    f(first.size(inner), i * first.stride(1 - inner), (i * others.stride(1 - inner))...);
  }
}

void moments_to_variance(const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& exp_avg,
                         const at::Tensor& exp_avg_sq, double correction1, double correction2) {
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "moments_to_variance", [&] {
    const auto run = [&](int64_t n, int64_t a, int64_t b, int64_t c, int64_t d) {
      cpu::moments_to_variance_range(
          mean.mutable_data_ptr<scalar_t>() + a, variance.mutable_data_ptr<scalar_t>() + b,
          exp_avg.const_data_ptr<scalar_t>() + c, exp_avg_sq.const_data_ptr<scalar_t>() + d, n,
          static_cast<scalar_t>(1 / correction1), static_cast<scalar_t>(1 / correction2));
    };
    for_each_run(run, mean, variance, exp_avg, exp_avg_sq);
  });
}

void variance_to_moments(const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& mean,
                         const at::Tensor& variance, double correction1, double correction2) {
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "variance_to_moments", [&] {
    const auto run = [&](int64_t n, int64_t a, int64_t b, int64_t c, int64_t d) {
      cpu::variance_to_moments_range(
          exp_avg.mutable_data_ptr<scalar_t>() + a, exp_avg_sq.mutable_data_ptr<scalar_t>() + b,
          mean.const_data_ptr<scalar_t>() + c, variance.const_data_ptr<scalar_t>() + d, n,
          static_cast<scalar_t>(correction1), static_cast<scalar_t>(correction2));
    };
    for_each_run(run, exp_avg, exp_avg_sq, mean, variance);
  });
}

}  // namespace

const Kernels cpu_kernels = {fill_sketch,         squared_norm,       all_finite,  adam,
                             load_moment,         store_moment,       gather_rows, signed_lu,
                             moments_to_variance, variance_to_moments};

const char* simd_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return "x86-64-v4";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "x86-64-v3";
#endif
  return "baseline";
}

}  // namespace galore_rrf
