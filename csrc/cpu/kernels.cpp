// Launchers of the CPU kernels: layout, dtype and threads.
#include "kernels.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/geqrf.h>
#include <ATen/ops/linalg_householder_product.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/moments.h"
#include "cpu/residual.h"
#include "cpu/rounding.h"
#include "cpu/sketch.h"
#include "cpu/stored_moment.h"
#include "math/compensated_sum.h"
#include "math/power_of_two.h"

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
template <class T>
double squared_norm_of(const T* data, int64_t n) {
  const int64_t chunks = (n + kGrain - 1) / kGrain;
  std::vector<double> sums(static_cast<size_t>(chunks));
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      sums[static_cast<size_t>(c)] =
          cpu::squared_norm_range(data + c * kGrain, std::min(kGrain, n - c * kGrain));
    }
  });
  CompensatedSum total;
  for (const double sum : sums) total.add(sum);
  return total.value();
}

// f(matrix, entries, b) for every matrix of a stack.
template <class T, class F>
void for_each_matrix(const at::Tensor& stack, const F& f) {
  T* data = stack.mutable_data_ptr<T>();
  const int64_t entries = stack.size(0) == 0 ? 0 : stack.numel() / stack.size(0);
  for (int64_t b = 0; b < stack.size(0); ++b) f(data + b * stack.stride(0), entries, b);
}

void squared_norms(const at::Tensor& sums, const at::Tensor& a) {
  double* sum = sums.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "squared_norms", [&] {
    for_each_matrix<scalar_t>(
        a, [&](const scalar_t* data, int64_t n, int64_t b) { sum[b] = squared_norm_of(data, n); });
  });
}

void all_finite(const at::Tensor& flags, const at::Tensor& a) {
  uint8_t* flag = flags.mutable_data_ptr<uint8_t>();
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "all_finite", [&] {
    for_each_matrix<scalar_t>(
        a, [&](const scalar_t* data, int64_t n, int64_t b) { flag[b] = cpu::all_finite_range(data, n); });
  });
}

void scale_by_powers_(const at::Tensor& a, const at::Tensor& exponents, int sign) {
  const int32_t* exponent = exponents.const_data_ptr<int32_t>();
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "scale_by_powers_", [&] {
    for_each_matrix<scalar_t>(a, [&](scalar_t* data, int64_t n, int64_t b) {
      if (exponent[b] == 0) return;
      const PowerOfTwo<scalar_t> power(sign * exponent[b]);
      for (int64_t i = 0; i < n; ++i) data[i] = power.times(data[i]);
    });
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

void step_factors(const at::Tensor& factors, const std::vector<at::Tensor>& steps, const at::Tensor& lr,
                  const at::Tensor& outcomes, const AdamWOptions& options) {
  double* factor = factors.mutable_data_ptr<double>();
  const uint8_t* outcome = outcomes.const_data_ptr<uint8_t>();
  const double rate = *lr.const_data_ptr<double>();
  for (size_t b = 0; b < steps.size(); ++b, factor += 3) {
    const StepFactors f = step_factors_for(options, rate, steps[b].item().toDouble(), outcome[b]);
    factor[0] = f.root_scale;
    factor[1] = f.step_length;
    factor[2] = f.decay;
  }
}

template <class T>
void adam_matrix(T* g, int64_t n, const StoredMoment& exp_avg, const StoredMoment& exp_avg_sq,
                 const AdamElement<T>& element) {
  if (exp_avg.values.scalar_type() == c10::CppTypeToScalarType<T>::value) {
    T* m = exp_avg.values.mutable_data_ptr<T>();
    T* v = exp_avg_sq.values.mutable_data_ptr<T>();
    at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      cpu::adam_range(g + begin, m + begin, v + begin, end - begin, element);
    });
    return;
  }
  const cpu::MomentBlocks<T> mean(exp_avg, MomentKind::exp_avg);
  const cpu::MomentBlocks<T> square(exp_avg_sq, MomentKind::exp_avg_sq);
  for_each_block(n, [&](int64_t begin, int64_t count) {
    T m[kCodeBlock], v[kCodeBlock];
    mean.load(m, begin, count);
    square.load(v, begin, count);
    cpu::adam_range(g + begin, m, v, count, element);
    mean.store(m, begin, count);
    square.store(v, begin, count);
  });
}

void adam(const at::Tensor& gradients, const StoredMoments& exp_avgs, const StoredMoments& exp_avg_sqs,
          const at::Tensor& factors, const at::Tensor& outcomes, const AdamWOptions& options) {
  const double* factor = factors.const_data_ptr<double>();
  const uint8_t* outcome = outcomes.const_data_ptr<uint8_t>();
  AT_DISPATCH_FLOATING_TYPES(gradients.scalar_type(), "adam", [&] {
    for_each_matrix<scalar_t>(gradients, [&](scalar_t* g, int64_t n, int64_t b) {
      const auto i = static_cast<size_t>(b);
      if (moves(outcome[b])) {
        const StepFactors f{factor[3 * b], factor[3 * b + 1], factor[3 * b + 2]};
        adam_matrix(g, n, exp_avgs[i], exp_avg_sqs[i], AdamElement<scalar_t>(options, f));
      } else {
        std::fill_n(g, n, scalar_t{0});
      }
    });
  });
}

void load_moments(const at::Tensor& out, const StoredMoments& moments, MomentKind kind) {
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "load_moments", [&] {
    for_each_matrix<scalar_t>(out, [&](scalar_t* to, int64_t n, int64_t b) {
      const cpu::MomentBlocks<scalar_t> blocks(moments[static_cast<size_t>(b)], kind);
      for_each_block(n, [&](int64_t begin, int64_t count) { blocks.load(to + begin, begin, count); });
    });
  });
}

void store_moments(const StoredMoments& moments, const at::Tensor& in, MomentKind kind,
                   const at::Tensor& active) {
  const uint8_t* is_active = active.defined() ? active.const_data_ptr<uint8_t>() : nullptr;
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "store_moments", [&] {
    for_each_matrix<scalar_t>(in, [&](const scalar_t* from, int64_t n, int64_t b) {
      if (is_active && !is_active[b]) return;
      const cpu::MomentBlocks<scalar_t> blocks(moments[static_cast<size_t>(b)], kind);
      for_each_block(n, [&](int64_t begin, int64_t count) { blocks.store(from + begin, begin, count); });
    });
  });
}

void signed_lu(const at::Tensor& q, const at::Tensor& signs) {
  const int64_t width = q.size(1);
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "signed_lu", [&] {
    for (int64_t b = 0; b < q.size(0); ++b) {
      scalar_t* a = q.mutable_data_ptr<scalar_t>() + b * width * width;
      scalar_t* sign = signs.mutable_data_ptr<scalar_t>() + b * width;
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
    }
  });
}

void householder_(const at::Tensor& panels, const at::Tensor& active) {
  const uint8_t* is_active = active.const_data_ptr<uint8_t>();
  for (int64_t b = 0; b < panels.size(0); ++b) {
    if (!is_active[b]) continue;
    const auto [reflectors, tau] = at::geqrf(panels.select(0, b));
    panels.select(0, b).copy_(at::linalg_householder_product(reflectors, tau));
  }
}

// Calls f(b, run, offset of each stack) for every run of entries that lies in one piece in all of them.
template <class F, class... Stacks>
void for_each_run(const F& f, const at::Tensor& first, const Stacks&... others) {
  const int64_t inner = first.stride(2) == 1 ? 2 : 1;
  for (int64_t b = 0; b < first.size(0); ++b) {
    for (int64_t i = 0; i < first.size(3 - inner); ++i) {
      f(b, first.size(inner), b * first.stride(0) + i * first.stride(3 - inner),
        (b * others.stride(0) + i * others.stride(3 - inner))...);
    }
  }
}

void moments_to_variance(const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& exp_avg,
                         const at::Tensor& exp_avg_sq, const at::Tensor& corrections) {
  const double* correction = corrections.const_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "moments_to_variance", [&] {
    const auto run = [&](int64_t stack, int64_t n, int64_t a, int64_t b, int64_t c, int64_t d) {
      cpu::moments_to_variance_range(
          mean.mutable_data_ptr<scalar_t>() + a, variance.mutable_data_ptr<scalar_t>() + b,
          exp_avg.const_data_ptr<scalar_t>() + c, exp_avg_sq.const_data_ptr<scalar_t>() + d, n,
          static_cast<scalar_t>(1 / correction[2 * stack]),
          static_cast<scalar_t>(1 / correction[2 * stack + 1]));
    };
    for_each_run(run, mean, variance, exp_avg, exp_avg_sq);
  });
}

void variance_to_moments(const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const at::Tensor& mean,
                         const at::Tensor& variance, const at::Tensor& corrections) {
  const double* correction = corrections.const_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "variance_to_moments", [&] {
    const auto run = [&](int64_t stack, int64_t n, int64_t a, int64_t b, int64_t c, int64_t d) {
      cpu::variance_to_moments_range(
          exp_avg.mutable_data_ptr<scalar_t>() + a, exp_avg_sq.mutable_data_ptr<scalar_t>() + b,
          mean.const_data_ptr<scalar_t>() + c, variance.const_data_ptr<scalar_t>() + d, n,
          static_cast<scalar_t>(correction[2 * stack]), static_cast<scalar_t>(correction[2 * stack + 1]));
    };
    for_each_run(run, exp_avg, exp_avg_sq, mean, variance);
  });
}

// f(b, i, row i of x[b], of a[b], entries) for every row of a stack and of a list beside it, which is cast to
// the dtype of x where it has another.
template <class T, class F>
void for_each_row(const at::Tensor& x, const std::vector<at::Tensor>& a, const F& f) {
  const int64_t rows = x.size(1), cols = x.size(2);
  if (x.numel() == 0) return;
  for (int64_t b = 0; b < x.size(0); ++b) {
    const at::Tensor wide = a[static_cast<size_t>(b)].to(x.scalar_type());
    const T* from = wide.const_data_ptr<T>();
    T* to = x.mutable_data_ptr<T>() + b * rows * cols;
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(b, i, to + i * cols, from + i * wide.stride(0), cols);
    });
  }
}

void signs_of_difference_(const at::Tensor& x, const std::vector<at::Tensor>& a, const at::Tensor& lengths) {
  const double* length = lengths.const_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "signs_of_difference_", [&] {
    for_each_row<scalar_t>(x, a, [&](int64_t b, int64_t, scalar_t* to, const scalar_t* from, int64_t n) {
      cpu::signs_of_difference_range(to, from, n, static_cast<scalar_t>(length[b]));
    });
  });
}

void add_scaled_(const at::Tensor& x, const std::vector<at::Tensor>& a, const at::Tensor& scales, int dim) {
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "add_scaled_", [&] {
    const scalar_t* scale = scales.const_data_ptr<scalar_t>();
    for_each_row<scalar_t>(x, a, [&](int64_t b, int64_t i, scalar_t* to, const scalar_t* from, int64_t n) {
      const scalar_t* mine = scale + b * scales.stride(0);
      if (dim == 0) {
        cpu::add_scaled_range(to, from, mine[i], n);
      } else {
        cpu::add_scaled_range(to, from, mine, n);
      }
    });
  });
}

void add_squares_(const at::Tensor& sums, const std::vector<at::Tensor>& a, int dim) {
  const at::ScalarType dtype = a.front().scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  AT_DISPATCH_FLOATING_TYPES(dtype, "add_squares_", [&] {
    for (size_t b = 0; b < a.size(); ++b) {
      const at::Tensor wide = a[b].to(dtype);
      const scalar_t* data = wide.const_data_ptr<scalar_t>();
      double* sum = sums.mutable_data_ptr<double>() + static_cast<int64_t>(b) * sums.stride(0);
      for (int64_t i = 0; i < wide.size(0); ++i) {
        const scalar_t* row = data + i * wide.stride(0);
        if (dim == 1) {
          sum[i] += cpu::squared_norm_range(row, wide.size(1));
        } else {
          cpu::add_squares_range(sum, row, wide.size(1));
        }
      }
    }
  });
}

// One pass over each, through casts where its dtype is not that of x.
void add_(const std::vector<at::Tensor>& w, const at::Tensor& x, const at::Tensor& betas) {
  for (size_t b = 0; b < w.size(); ++b) {
    const auto at = static_cast<int64_t>(b);
    at::Tensor target = w[b];
    at::add_out(target, x.select(0, at), w[b], betas.select(0, at).item());
  }
}

template <class T>
void add_rounded_rows(T* w, const at::Tensor& like, const at::Tensor& x, float beta, RoundingKey key,
                      int64_t first_entry) {
  const int64_t rows = like.size(0), cols = like.size(1);
  const float* added = x.const_data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      cpu::add_rounded_range(w + i * like.stride(0), added + i * x.stride(0), cols, beta, key,
                             first_entry + i * cols);
    }
  });
}

void add_rounded_(const at::Tensor& w, const at::Tensor& x, const at::Tensor& beta, uint64_t seed,
                  uint32_t matrix, const at::Tensor& step, int64_t first_entry) {
  if (w.numel() == 0) return;
  const RoundingKey key = {seed, matrix, static_cast<uint32_t>(step.item<double>())};
  const auto scale = static_cast<float>(beta.item<double>());
  void* data = w.mutable_data_ptr();
  switch (w.scalar_type()) {
    case at::kBFloat16:
      return add_rounded_rows(static_cast<Bfloat16*>(data), w, x, scale, key, first_entry);
    case at::kHalf:
      return add_rounded_rows(static_cast<Half*>(data), w, x, scale, key, first_entry);
    default:
      TORCH_INTERNAL_ASSERT(w.scalar_type() == at::kFloat);
      return add_rounded_rows(static_cast<float*>(data), w, x, scale, key, first_entry);
  }
}

// A QR by reflectors needs fewer operations, and fp64 halves the rate.
bool cholesky_qr_pays() { return false; }

}  // namespace

const Kernels cpu_kernels = {
    .fill_sketch = fill_sketch,
    .squared_norms = squared_norms,
    .all_finite = all_finite,
    .scale_by_powers_ = scale_by_powers_,
    .step_factors = step_factors,
    .adam = adam,
    .load_moments = load_moments,
    .store_moments = store_moments,
    .cholesky_qr_pays = cholesky_qr_pays,
    .signed_lu = signed_lu,
    .householder_ = householder_,
    .moments_to_variance = moments_to_variance,
    .variance_to_moments = variance_to_moments,
    .products = nullptr,
    .signs_of_difference_ = signs_of_difference_,
    .add_scaled_ = add_scaled_,
    .add_squares_ = add_squares_,
    .add_ = add_,
    .add_rounded_ = add_rounded_,
};

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
