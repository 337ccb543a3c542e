// The test matrices of up to 128 matrices of one shape in one launch: entries as csrc/cpu/sketch.h has them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device.cuh"
#include "math/float16.h"
#include "math/normal.h"

namespace galore_rrf::cuda {

template <class T>
struct Sketches {
  static constexpr int kMost = 128;

  T* out[kMost];  // each rows x cols, row-major
  SketchKey key[kMost];
  int64_t rows, cols;
  int64_t row_offset, col_offset;  // of the first entry in the whole test matrix
};

// Threads side by side take columns side by side; where there are few, more rows.
inline dim3 sketch_block(int64_t cols) {
  unsigned width = 1;
  while (width < cols && width < 128) width *= 2;
  return dim3{width, 128 / width, 1};
}

// Two axes of blocks, so that no thread divides by the number of columns: at most about `most` for each
// matrix.
template <class T>
dim3 sketch_grid(const Sketches<T>& s, int64_t matrices, int64_t most) {
  const dim3 block = sketch_block(s.cols);
  const int64_t row_blocks = (s.row_offset + s.rows + 3) / 4 - s.row_offset / 4;
  const int64_t x = std::min((s.cols + block.x - 1) / block.x, most);
  const int64_t y = std::min((row_blocks + block.y - 1) / block.y, std::clamp<int64_t>(most / x, 1, 65535));
  return dim3{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(matrices)};
}

// A thread makes four rows of a column at a time: strips are aligned to multiples of four rows of the whole
// test matrix, wherever the part asked for begins.
template <class T>
__global__ void __launch_bounds__(128) fill_sketches(const Sketches<T> sketches) {
  T* const out = sketches.out[blockIdx.z];
  const SketchKey key = sketches.key[blockIdx.z];
  const int64_t begin = sketches.row_offset, end = begin + sketches.rows;
  const int64_t first = begin / 4 + int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
  for (int64_t block = first; 4 * block < end; block += int64_t{gridDim.y} * blockDim.y) {
    const int64_t first_col = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    for (int64_t j = first_col; j < sketches.cols; j += int64_t{gridDim.x} * blockDim.x) {
      const Normals4 normals =
          sketch_entries(key, static_cast<uint32_t>(block), static_cast<uint32_t>(sketches.col_offset + j));
      for (int i = 0; i < 4; ++i) {
        const int64_t row = 4 * block + i;
        if (row >= begin && row < end) out[(row - begin) * sketches.cols + j] = static_cast<T>(normals.z[i]);
      }
    }
  }
}

}  // namespace galore_rrf::cuda
