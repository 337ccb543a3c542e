// What the launchers of csrc/cuda share.  They are called with a stack's or list's device current:
// `on_device`.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/plane.cuh"
#include "math/float16.h"

namespace galore_rrf::cuda {

// Blocks of a launch that fill the device several times over; the rest of the work is loops within them.
inline int64_t enough_blocks() {
  return int64_t{32} * at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, const Arguments&... arguments) {
  static_assert((sizeof(Arguments) + ...) <= 4096, "a launch takes 4 KB of parameters");
  kernel<<<grid, block, 0, c10::cuda::getCurrentCUDAStream()>>>(arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
Stack<T> stack_of(const at::Tensor& a) {
  const int64_t matrices = a.size(0);
  T* const data = static_cast<T*>(a.mutable_data_ptr());
  return {data, matrices, matrices == 0 ? 0 : a.numel() / matrices, a.stride(0)};
}

}  // namespace galore_rrf::cuda
