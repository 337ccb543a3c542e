// What is done with the gradient's part outside the subspace, and steps added to weights of any dtype: twins
// of cpu/residual.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/plane.cuh"
#include "math/float16.h"
#include "math/residual.h"

namespace galore_rrf::cuda {

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
