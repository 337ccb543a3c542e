// The test matrix: entries as csrc/cpu/sketch.h has them.
#pragma once

#include <cstdint>

#include "cuda/plane.cuh"
#include "math/float16.h"
#include "math/normal.h"

namespace galore_rrf::cuda {

template <class T>
struct Sketch {
  T* out;  // rows x cols, row-major
  int64_t rows, cols;
  SketchKey key;
  int64_t row_offset, col_offset;  // of the first entry in the whole test matrix

  // Strips of four rows, aligned to multiples of four rows of the whole test matrix wherever the part asked
  // for begins: a thread makes a column of one at a time.
  __host__ __device__ int64_t strips() const { return (row_offset + rows + 3) / 4 - row_offset / 4; }
};

template <class T>
__global__ void __launch_bounds__(kPlaneThreads) fill_sketch(const Sketch<T> sketch) {
  for_each_in_planes(sketch.cols, sketch.strips(), 1, [&](int64_t) {
    return [&](int64_t strip, int64_t j) {
      strip += sketch.row_offset / 4;
      const Normals4 normals = sketch_entries(sketch.key, static_cast<uint32_t>(strip),
                                              static_cast<uint32_t>(sketch.col_offset + j));
      for (int i = 0; i < 4; ++i) {
        const int64_t row = 4 * strip + i - sketch.row_offset;
        if (row >= 0 && row < sketch.rows) sketch.out[row * sketch.cols + j] = static_cast<T>(normals.z[i]);
      }
    };
  });
}

}  // namespace galore_rrf::cuda
