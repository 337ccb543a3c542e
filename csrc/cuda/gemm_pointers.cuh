// The pointer arrays of a batched product, written on the device: a kernel's parameters are part of a CUDA
// graph, a copy from the host's memory is not.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "math/adam.h"

namespace galore_rrf::cuda {

struct GemmPointers {
  static constexpr int kMost = 128;  // matrices a launch: parameters stay under 4 KB

  const void *first[kMost], *second[kMost];
  void* c[kMost];
  int count;
  // A skipped matrix is left alone, its product goes to `scratch`; null: none is.
  const uint8_t* outcomes;
  void* scratch;
  // What is written: the arrays, and 1 in the dtype of sums, as its bits.
  const void **first_array, **second_array;
  void** c_array;
  uint64_t *one, one_bits;
};

template <class Pointers>
__global__ void write_gemm_pointers(const Pointers p) {
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0) *p.one = p.one_bits;
  if (i >= p.count) return;
  const bool skipped = p.outcomes != nullptr && p.outcomes[i] == static_cast<uint8_t>(Outcome::skipped);
  p.first_array[i] = p.first[i];
  p.second_array[i] = p.second[i];
  p.c_array[i] = skipped ? p.scratch : p.c[i];
}

}  // namespace galore_rrf::cuda
