// What is done with the gradient's part outside the subspace, and steps added to weights of any dtype: twins
// of cpu/residual.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/plane.cuh"
#include "math/float16.h"
#include "math/residual.h"

namespace galore_rrf::cuda {

constexpr unsigned kSquaresThreads = 256;
constexpr int kListedPlanes = 128;  // matrices a launch takes: its parameters have 4 KB

// A dense stack, row-major, beside a list of matrices of its shape whose rows lie in one piece each.
template <class T, class Listed>
struct StackAndList {
  T* stack;
  Listed* list[kListedPlanes];
  int64_t matrices, rows, cols, row_stride;  // the last of the list's
  const double* factors;                     // B
};

// Between a number as it lies in memory and the type that is computed with.
template <class T, class Stored>
__device__ __forceinline__ T widened(Stored x) {
  if constexpr (std::is_same_v<Stored, T>) {
    return x;
  } else {
    return static_cast<T>(static_cast<float>(x));
  }
}

template <class Stored, class T>
__device__ __forceinline__ Stored narrowed(T x) {
  if constexpr (std::is_same_v<Stored, T>) {
    return x;
  } else {
    return Stored(static_cast<float>(x));
  }
}

// stack <- factor sign(listed - stack).
template <class T, class Listed>
__global__ void __launch_bounds__(kPlaneThreads) signs_of_difference(const StackAndList<T, const Listed> a) {
  for_each_in_planes(a.cols, a.rows, a.matrices, [&](int64_t b) {
    T* const x = a.stack + b * a.rows * a.cols;
    const Listed* const given = a.list[b];
    const T length = static_cast<T>(a.factors[b]);
    const int64_t cols = a.cols, stride = a.row_stride;
    return [=](int64_t i, int64_t j) {
      x[i * cols + j] = signed_length(widened<T>(given[i * stride + j]), x[i * cols + j], length);
    };
  });
}

// Scales of the rows or of the columns of every matrix.
template <class T>
struct Scales {
  const T* data;
  int64_t stride, row_stride, col_stride;  // from matrix to matrix, row to row, column to column
};

// stack <- stack + scales listed.
template <class T, class Listed>
__global__ void __launch_bounds__(kPlaneThreads)
    add_scaled_list(const StackAndList<T, const Listed> a, const Scales<T> scales) {
  for_each_in_planes(a.cols, a.rows, a.matrices, [&](int64_t b) {
    T* const x = a.stack + b * a.rows * a.cols;
    const Listed* const added = a.list[b];
    const T* const scale = scales.data + b * scales.stride;
    const int64_t cols = a.cols, stride = a.row_stride, of_row = scales.row_stride,
                  of_col = scales.col_stride;
    return [=](int64_t i, int64_t j) {
      T& entry = x[i * cols + j];
      entry = add_scaled(entry, widened<T>(added[i * stride + j]), scale[i * of_row + j * of_col]);
    };
  });
}

// A list as above, and sums of squares of its rows or columns, `sums_stride` from matrix to matrix.
template <class T, class Listed>
struct ListAndSums {
  const Listed* list[kListedPlanes];
  int64_t matrices, rows, cols, row_stride;
  double* sums;
  int64_t sums_stride;
};

inline dim3 squares_grid(int64_t sums, int64_t matrices, int64_t most) {
  return dim3{static_cast<unsigned>(std::clamp<int64_t>(sums, 1, most)), static_cast<unsigned>(matrices), 1};
}

// sums <- sums + the squares of every column: a thread each.
template <class T, class Listed>
__global__ void __launch_bounds__(kSquaresThreads) add_squares_of_columns(const ListAndSums<T, Listed> a) {
  const Listed* const data = a.list[blockIdx.y];
  double* const sums = a.sums + blockIdx.y * a.sums_stride;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t j = first; j < a.cols; j += int64_t{gridDim.x} * blockDim.x) {
    double sum = 0;
    for (int64_t i = 0; i < a.rows; ++i) {
      const double x = static_cast<double>(widened<T>(data[i * a.row_stride + j]));
      sum += x * x;
    }
    sums[j] += sum;
  }
}

// sums <- sums + the squares of every row: a block each.
template <class T, class Listed>
__global__ void __launch_bounds__(kSquaresThreads) add_squares_of_rows(const ListAndSums<T, Listed> a) {
  const Listed* const data = a.list[blockIdx.y];
  double* const sums = a.sums + blockIdx.y * a.sums_stride;
  for (int64_t i = blockIdx.x; i < a.rows; i += gridDim.x) {
    double part = 0;
    for (int64_t j = threadIdx.x; j < a.cols; j += blockDim.x) {
      const double x = static_cast<double>(widened<T>(data[i * a.row_stride + j]));
      part += x * x;
    }
    const double sum = join_over_block(part, [](double x, double y) { return x + y; });
    if (threadIdx.x == 0) sums[i] += sum;
  }
}

// listed <- factor listed + stack.
template <class T, class Listed>
__global__ void __launch_bounds__(kPlaneThreads) add_stack(const StackAndList<T, Listed> a) {
  for_each_in_planes(a.cols, a.rows, a.matrices, [&](int64_t b) {
    const T* const x = a.stack + b * a.rows * a.cols;
    Listed* const w = a.list[b];
    const T beta = static_cast<T>(a.factors[b]);
    const int64_t cols = a.cols, stride = a.row_stride;
    return [=](int64_t i, int64_t j) {
      Listed& entry = w[i * stride + j];
      entry = narrowed<Listed>(beta * widened<T>(entry) + x[i * cols + j]);
    };
  });
}

}  // namespace galore_rrf::cuda
