// w <- beta w + x with stochastic rounding: the CUDA twin of cpu/rounding.h, to the bit.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "math/stochastic_rounding.h"

namespace galore_rrf::cuda {

// A tile whose rows lie in one piece each; entry (i, j) of w is number first_entry + i cols + j.
template <class T>
struct RoundedSum {
  T* w;
  const float* x;
  int64_t rows, cols, w_stride, x_stride, first_entry;
  const double *beta, *step;
  uint64_t seed;
  uint32_t matrix;
};

// A warp takes 256 entries of a row, each lane the eight of one counter; rows go along the grid's y.
template <class T>
__global__ void __launch_bounds__(256) add_rounded_kernel(RoundedSum<T> sum) {
  const RoundingKey key = {sum.seed, sum.matrix, static_cast<uint32_t>(*sum.step)};
  const float beta = static_cast<float>(*sum.beta);
  const int64_t lane = threadIdx.x % kRoundingLanes;
  const int64_t warp = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kRoundingLanes;
  const int64_t warps = int64_t{gridDim.x} * blockDim.x / kRoundingLanes;
  for (int64_t i = blockIdx.y; i < sum.rows; i += gridDim.y) {
    T* row = sum.w + i * sum.w_stride;
    const float* added = sum.x + i * sum.x_stride;
    const int64_t first = sum.first_entry + i * sum.cols, end = first + sum.cols;
    for (int64_t chunk = first / kRoundingChunk + warp; chunk * kRoundingChunk < end; chunk += warps) {
      const Words4 words = rounding_words(key, static_cast<uint64_t>(chunk * kRoundingLanes + lane));
      const int64_t start = chunk * kRoundingChunk + lane - first;
      const auto is_mine = [&](int half) {
        const int64_t j = start + half * kRoundingLanes;
        return j >= 0 && j < sum.cols;
      };
      T w[kRoundingHalves];
      float x[kRoundingHalves];
      GALORE_RRF_UNROLL
      for (int half = 0; half < kRoundingHalves; ++half) {
        if (!is_mine(half)) continue;
        w[half] = row[start + half * kRoundingLanes];
        x[half] = added[start + half * kRoundingLanes];
      }
      GALORE_RRF_UNROLL
      for (int half = 0; half < kRoundingHalves; ++half) {
        if (!is_mine(half)) continue;
        row[start + half * kRoundingLanes] = add_rounded(w[half], x[half], beta, rounding_word(words, half));
      }
    }
  }
}

}  // namespace galore_rrf::cuda
