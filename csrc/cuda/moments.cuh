// Moments: the Adam element over them as they are kept, their way into fp32 or fp64 and back, and their
// rotation's elements.  Lists of matrices of one shape, a block of 256 threads for the 256 entries that share
// a scale.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/plane.cuh"
#include "math/adam.h"
#include "math/dynamic_code.h"
#include "math/float16.h"
#include "math/rotation.h"

namespace galore_rrf::cuda {

constexpr int kListed = 64;  // matrices a launch takes: its parameters have 4 KB

__device__ const DynamicCode kSignedDeviceCode(true), kUnsignedDeviceCode(false);

// A moment in memory: double, float, Bfloat16, or uint8_t, the codes.
template <class Kept>
struct KeptMoment {
  Kept* values;
  float* scale;  // of codes, one a block
};

template <class T, class Kept>
__device__ __forceinline__ T load_entry(const KeptMoment<Kept>& moment, int64_t block,
                                        const DynamicCode& code) {
  const Kept kept = moment.values[block * kCodeBlock + threadIdx.x];
  if constexpr (std::is_same_v<Kept, uint8_t>) {
    return static_cast<T>(code.value(kept) * moment.scale[block]);
  } else if constexpr (std::is_same_v<Kept, Bfloat16>) {
    return static_cast<T>(static_cast<float>(kept));
  } else {
    return static_cast<T>(kept);
  }
}

template <class T, class Kept>
__device__ __forceinline__ void store_entry(const KeptMoment<Kept>& moment, int64_t block, T x) {
  using Wide = std::conditional_t<std::is_same_v<Kept, Bfloat16>, float, Kept>;
  moment.values[block * kCodeBlock + threadIdx.x] = static_cast<Kept>(static_cast<Wide>(x));
}

__device__ __forceinline__ void store_code(const KeptMoment<uint8_t>& moment, int64_t block, bool inside,
                                           float x, uint32_t largest, const DynamicCode& code) {
  const float scale = code_scale(largest);
  if (inside) moment.values[block * kCodeBlock + threadIdx.x] = code.nearest(x / code_divisor(scale));
  if (threadIdx.x == 0) moment.scale[block] = scale;
}

// Magnitudes compare as their bits do.
__device__ __forceinline__ uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7FFFFFFFu; }

template <class T>
dim3 moment_grid(const Stack<T>& stack, int64_t most) {
  const int64_t blocks = (stack.entries + kCodeBlock - 1) / kCodeBlock;
  return dim3{static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, most)),
              static_cast<unsigned>(stack.matrices), 1};
}

// Calls f(block, entry's index in the matrix, whether it has such an entry) for all blocks that are this
// block's.
template <class F>
__device__ __forceinline__ void for_each_code_block(int64_t entries, const F& f) {
  for (int64_t block = blockIdx.x; block * kCodeBlock < entries; block += gridDim.x) {
    const int64_t i = block * kCodeBlock + threadIdx.x;
    f(block, i, i < entries);
  }
}

template <class T, class Kept>
struct AdamStack {
  Stack<T> gradients;  // become steps
  KeptMoment<Kept> exp_avg[kListed], exp_avg_sq[kListed];
  const double* factors;    // B x 3: StepFactors
  const uint8_t* outcomes;  // B
  AdamWOptions options;
};

template <class T, class Kept>
__global__ void __launch_bounds__(kCodeBlock) adam(const AdamStack<T, Kept> a) {
  const unsigned b = blockIdx.y;
  T* const gradient = a.gradients.data + b * a.gradients.stride;
  if (!moves(a.outcomes[b])) {
    for_each_code_block(a.gradients.entries, [&](int64_t, int64_t i, bool inside) {
      if (inside) gradient[i] = 0;
    });
    return;
  }
  const KeptMoment<Kept> exp_avg = a.exp_avg[b], exp_avg_sq = a.exp_avg_sq[b];
  const double* const f = a.factors + 3 * b;
  const AdamElement<T> element(a.options, StepFactors{f[0], f[1], f[2]});
  for_each_code_block(a.gradients.entries, [&](int64_t block, int64_t i, bool inside) {
    T mean = 0, variance = 0;
    if (inside) {
      mean = load_entry<T>(exp_avg, block, kSignedDeviceCode);
      variance = load_entry<T>(exp_avg_sq, block, kUnsignedDeviceCode);
      gradient[i] = element(gradient[i], mean, variance);
    }
    if constexpr (std::is_same_v<Kept, uint8_t>) {
      // The largest of both at once.
      const float m = static_cast<float>(mean), v = static_cast<float>(variance);
      const uint64_t both =
          join_over_block(uint64_t{magnitude_bits(m)} << 32 | magnitude_bits(v), [](uint64_t x, uint64_t y) {
            const uint64_t high = (x > y ? x : y) >> 32 << 32;
            const uint64_t low_x = x & 0xFFFFFFFFu, low_y = y & 0xFFFFFFFFu;
            return high | (low_x > low_y ? low_x : low_y);
          });
      store_code(exp_avg, block, inside, m, static_cast<uint32_t>(both >> 32), kSignedDeviceCode);
      store_code(exp_avg_sq, block, inside, v, static_cast<uint32_t>(both), kUnsignedDeviceCode);
    } else if (inside) {
      store_entry(exp_avg, block, mean);
      store_entry(exp_avg_sq, block, variance);
    }
  });
}

template <class T, class Kept>
struct MomentStack {
  Stack<T> wide;
  KeptMoment<Kept> kept[kListed];
  bool is_signed;
  const uint8_t* active;  // B; null: all

  __device__ const DynamicCode& code() const { return is_signed ? kSignedDeviceCode : kUnsignedDeviceCode; }
};

template <class T, class Kept>
__global__ void __launch_bounds__(kCodeBlock) load_moments(const MomentStack<T, Kept> a) {
  const unsigned b = blockIdx.y;
  for_each_code_block(a.wide.entries, [&](int64_t block, int64_t i, bool inside) {
    if (inside) a.wide.data[b * a.wide.stride + i] = load_entry<T>(a.kept[b], block, a.code());
  });
}

template <class T, class Kept>
__global__ void __launch_bounds__(kCodeBlock) store_moments(const MomentStack<T, Kept> a) {
  const unsigned b = blockIdx.y;
  if (a.active != nullptr && a.active[b] == 0) return;
  const KeptMoment<Kept> kept = a.kept[b];
  for_each_code_block(a.wide.entries, [&](int64_t block, int64_t i, bool inside) {
    const T x = inside ? a.wide.data[b * a.wide.stride + i] : T{0};
    if constexpr (std::is_same_v<Kept, uint8_t>) {
      const float value = static_cast<float>(x);
      const uint32_t largest =
          join_over_block(magnitude_bits(value), [](uint32_t p, uint32_t q) { return p > q ? p : q; });
      store_code(kept, block, inside, value, largest, a.code());
    } else if (inside) {
      store_entry(kept, block, x);
    }
  });
}

// Matrices whose entries of a row lie side by side, of one shape but strides of their own.
template <class T>
struct Rows {
  T* data;
  int64_t row_stride, stride;  // of a row, of a matrix

  __device__ T& at(int64_t b, int64_t row, int64_t j) const {
    return data[b * stride + row * row_stride + j];
  }
};

template <class T>
struct RotatedMoments {
  int64_t matrices, height, width;
  Rows<T> mean, variance, exp_avg, exp_avg_sq;
  const double* corrections;  // B x 2
};

template <class T>
__global__ void __launch_bounds__(kPlaneThreads) to_variance(const RotatedMoments<T> a) {
  for_each_in_planes(a.width, a.height, a.matrices, [&](int64_t b) {
    const T inverse1 = static_cast<T>(1 / a.corrections[2 * b]);
    const T inverse2 = static_cast<T>(1 / a.corrections[2 * b + 1]);
    return [&a, b, inverse1, inverse2](int64_t row, int64_t j) {
      galore_rrf::moments_to_variance(a.exp_avg.at(b, row, j), a.exp_avg_sq.at(b, row, j), inverse1, inverse2,
                                      a.mean.at(b, row, j), a.variance.at(b, row, j));
    };
  });
}

template <class T>
__global__ void __launch_bounds__(kPlaneThreads) from_variance(const RotatedMoments<T> a) {
  for_each_in_planes(a.width, a.height, a.matrices, [&](int64_t b) {
    const T correction1 = static_cast<T>(a.corrections[2 * b]);
    const T correction2 = static_cast<T>(a.corrections[2 * b + 1]);
    return [&a, b, correction1, correction2](int64_t row, int64_t j) {
      galore_rrf::variance_to_moments(a.mean.at(b, row, j), a.variance.at(b, row, j), correction1,
                                      correction2, a.exp_avg.at(b, row, j), a.exp_avg_sq.at(b, row, j));
    };
  });
}

template <class Step>
struct StepsTaken {
  const Step* steps[kListed];
  int matrices;
  const double* lr;
  const uint8_t* outcomes;
  AdamWOptions options;
  double* factors;  // B x 3
};

// A thread a matrix.
template <class Step>
__global__ void __launch_bounds__(kListed) step_factors(const StepsTaken<Step> a) {
  const int b = static_cast<int>(threadIdx.x);
  if (b >= a.matrices) return;
  const StepFactors f = step_factors_for(a.options, *a.lr, static_cast<double>(*a.steps[b]), a.outcomes[b]);
  a.factors[3 * b] = f.root_scale;
  a.factors[3 * b + 1] = f.step_length;
  a.factors[3 * b + 2] = f.decay;
}

}  // namespace galore_rrf::cuda
