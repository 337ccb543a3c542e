// Launches over stacks of planes, height x width entries each, those of a row side by side in memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device.cuh"

namespace galore_rrf::cuda {

constexpr unsigned kPlaneThreads = 128;
constexpr int64_t kMostInYZ = 65535;  // blocks along these axes of a grid

// B matrices, each `entries` in one piece, `stride` from one to the next.
template <class T>
struct Stack {
  T* data;
  int64_t matrices, entries, stride;
};

// Threads side by side take entries side by side; where there are few, more rows.
inline dim3 plane_block(int64_t width) {
  unsigned x = 1;
  while (x < width && x < kPlaneThreads) x *= 2;
  return dim3{x, kPlaneThreads / x, 1};
}

// At most about `most` blocks a plane.  An axis of blocks for each of the three, so that no thread divides.
inline dim3 plane_grid(int64_t width, int64_t height, int64_t planes, int64_t most) {
  const dim3 block = plane_block(width);
  const int64_t x = std::clamp<int64_t>((width + block.x - 1) / block.x, 1, most);
  const int64_t y =
      std::clamp<int64_t>((height + block.y - 1) / block.y, 1, std::min(most / x + 1, kMostInYZ));
  return dim3{static_cast<unsigned>(x), static_cast<unsigned>(y),
              static_cast<unsigned>(std::min(planes, kMostInYZ))};
}

// Calls of(plane)(row, column) for every entry that is this thread's.
template <class OfPlane>
__device__ __forceinline__ void for_each_in_planes(int64_t width, int64_t height, int64_t planes,
                                                   const OfPlane& of) {
  for (int64_t plane = blockIdx.z; plane < planes; plane += gridDim.z) {
    const auto entry = of(plane);
    const int64_t first_row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
    for (int64_t row = first_row; row < height; row += int64_t{gridDim.y} * blockDim.y) {
      const int64_t first_column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
      for (int64_t j = first_column; j < width; j += int64_t{gridDim.x} * blockDim.x) entry(row, j);
    }
  }
}

}  // namespace galore_rrf::cuda
