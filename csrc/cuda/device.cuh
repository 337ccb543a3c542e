// What a kernel's source takes from CUDA beyond the language: compiled by nvcc, these are CUDA's own, by any
// other compiler those of tests/kernels/shim, which runs a kernel on the host.  Kernels include this and
// math/, no ATen.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

namespace galore_rrf::cuda {

// One T in shared memory, the same for every thread of the block and for every call with this T; nothing is
// constructed.
template <class T>
__device__ __forceinline__ T& shared() {
  __shared__ T memory;
  return memory;
}

// The shared memory whose size the launch gives.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

}  // namespace galore_rrf::cuda

#else
#include "shim.h"
#endif

namespace galore_rrf::cuda {

constexpr unsigned kWarp = 32;  // lanes
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Values of all threads of a block joined in one fixed order; every thread gets the result.  `join` is
// commutative; the block is one-dimensional, of whole warps.  A barrier for the block, before and after.
template <class T, class Join>
__device__ T join_over_block(T value, Join join) {
  struct PerWarp {
    T of[32];
  };
  for (unsigned distance = kWarp / 2; distance > 0; distance /= 2) {
    value = join(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  PerWarp& warps = shared<PerWarp>();
  if (threadIdx.x % kWarp == 0) warps.of[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = warps.of[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) value = join(value, warps.of[warp]);
  __syncthreads();  // until all have read, nothing else may be written there
  return value;
}

}  // namespace galore_rrf::cuda
