// What there is one of for each matrix of a stack: its sum of squares, whether it is finite; and its scaling
// by a power of two.
//
// Reductions have two stages: chunks of fixed length, a block of threads each, then what they gave. Additions
// have one order whatever the launch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/plane.cuh"
#include "math/bits.h"
#include "math/compensated_sum.h"
#include "math/power_of_two.h"

namespace galore_rrf::cuda {

constexpr unsigned kReductionThreads = 256;
constexpr int64_t kChunk = 32 * kReductionThreads;

struct SumOfSquares {
  using Part = double;
  using Result = double;
  using Total = CompensatedSum;  // of parts
  template <class T>
  static __device__ double part_of(T x) {
    return static_cast<double>(x) * static_cast<double>(x);
  }
  static __device__ double join(double a, double b) { return a + b; }
};

struct AllFinite {
  using Part = int32_t;  // 0 or 1
  using Result = uint8_t;
  class Total {
   public:
    __device__ void add(int32_t part) { all_ &= part; }
    __device__ int32_t value() const { return all_; }

   private:
    int32_t all_ = 1;
  };
  // Infinities and NaNs have an exponent of ones.
  static __device__ int32_t part_of(float x) { return (bits_of(x) & 0x7F800000u) != 0x7F800000u; }
  static __device__ int32_t part_of(double x) {
    return (bits_of(x) & 0x7FF0000000000000u) != 0x7FF0000000000000u;
  }
  static __device__ int32_t join(int32_t a, int32_t b) { return a & b; }
};

// Of a matrix.
__host__ __device__ __forceinline__ int64_t chunks_of(int64_t entries) {
  return (entries + kChunk - 1) / kChunk;
}

template <class T>
dim3 reduction_grid(const Stack<T>& a, int64_t most) {
  return dim3{static_cast<unsigned>(std::clamp<int64_t>(chunks_of(a.entries), 1, most)),
              static_cast<unsigned>(std::min(a.matrices, kMostInYZ)), 1};
}

// parts[b][c] <- chunk c of matrix b.
template <class Reduction, class T>
__global__ void __launch_bounds__(kReductionThreads)
    reduce_chunks(typename Reduction::Part* parts, const Stack<const T> a) {
  using Part = typename Reduction::Part;
  constexpr int kAtOnce = 4;  // independent additions
  const Part nothing = typename Reduction::Total().value();
  const int64_t chunks = chunks_of(a.entries);
  for (int64_t b = blockIdx.y; b < a.matrices; b += gridDim.y) {
    const T* const data = a.data + b * a.stride;
    for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
      Part part[kAtOnce] = {nothing, nothing, nothing, nothing};
      const int64_t begin = chunk * kChunk + threadIdx.x;
      for (int64_t first = begin; first < begin + kChunk; first += kAtOnce * kReductionThreads) {
        for (int64_t i = 0; i < kAtOnce; ++i) {
          const int64_t at = first + i * kReductionThreads;
          if (at < a.entries) part[i] = Reduction::join(part[i], Reduction::part_of(data[at]));
        }
      }
      const Part mine = Reduction::join(Reduction::join(part[0], part[1]), Reduction::join(part[2], part[3]));
      const Part all = join_over_block(mine, [](Part x, Part y) { return Reduction::join(x, y); });
      if (threadIdx.x == 0) parts[b * chunks + chunk] = all;
    }
  }
}

// results[b] <- its parts, `chunks` of them; a block of threads a matrix.
template <class Reduction>
__global__ void __launch_bounds__(kReductionThreads)
    reduce_parts(typename Reduction::Result* results, const typename Reduction::Part* parts, int64_t matrices,
                 int64_t chunks) {
  using Part = typename Reduction::Part;
  for (int64_t b = blockIdx.x; b < matrices; b += gridDim.x) {
    typename Reduction::Total total;
    for (int64_t c = threadIdx.x; c < chunks; c += kReductionThreads) total.add(parts[b * chunks + c]);
    const Part all = join_over_block(total.value(), [](Part x, Part y) { return Reduction::join(x, y); });
    if (threadIdx.x == 0) results[b] = static_cast<typename Reduction::Result>(all);
  }
}

// a[b] <- 2^(sign exponents[b]) a[b].
template <class T>
__global__ void __launch_bounds__(kPlaneThreads)
    scale_by_powers(const Stack<T> a, const int32_t* exponents, int sign) {
  for_each_in_planes(a.entries, 1, a.matrices, [&](int64_t b) {
    const PowerOfTwo<T> power(sign * exponents[b]);
    T* const data = a.data + b * a.stride;
    return [power, data](int64_t, int64_t i) { data[i] = power.times(data[i]); };
  });
}

}  // namespace galore_rrf::cuda
