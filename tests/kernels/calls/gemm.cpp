#include "calls.h"
#include "cuda/gemm_layout.h"
#include "cuda/gemm_pointers.cuh"

using namespace galore_rrf;

namespace {

// rows, cols and both strides of c, a and b; 1 if BLAS takes them, then the fields of GemmLayout.
const kernels::Registered layout("gemm_layout", [](const kernels::Arguments& a) {
  const auto matrix = [&](int i) {
    return cuda::MatrixLayout{a.whole[4 * i], a.whole[4 * i + 1], a.whole[4 * i + 2], a.whole[4 * i + 3]};
  };
  const auto found = cuda::gemm_layout(matrix(0), matrix(1), matrix(2));
  int64_t* out = a.buffer<int64_t>(0);
  *out++ = found.has_value();
  if (!found) return;
  const cuda::GemmLayout& g = *found;
  for (const int64_t field :
       {int64_t{g.swapped}, int64_t{g.transpose_first}, int64_t{g.transpose_second}, int64_t{g.m},
        int64_t{g.n}, int64_t{g.k}, int64_t{g.ld_first}, int64_t{g.ld_second}, int64_t{g.ld_c}}) {
    *out++ = field;
  }
});

// matrices, bits of one, whether there are outcomes; addresses of the first operands, the second ones, c,
// {scratch}; outcomes; the three arrays and one.
const kernels::Registered pointers("write_gemm_pointers", [](const kernels::Arguments& a) {
  cuda::GemmPointers p = {};
  p.count = static_cast<int>(a.whole[0]);
  for (int i = 0; i < p.count; ++i) {
    p.first[i] = a.buffer<void*>(0)[i];
    p.second[i] = a.buffer<void*>(1)[i];
    p.c[i] = a.buffer<void*>(2)[i];
  }
  p.scratch = *a.buffer<void*>(3);
  if (a.whole[2] != 0) p.outcomes = a.buffer<uint8_t>(4);
  p.first_array = a.buffer<const void*>(5);
  p.second_array = p.first_array + p.count;
  p.c_array = a.buffer<void*>(5) + 2 * p.count;
  p.one = a.buffer<uint64_t>(5) + 3 * p.count;
  p.one_bits = static_cast<uint64_t>(a.whole[1]);
  shim::launch(cuda::write_gemm_pointers<cuda::GemmPointers>, {1, 1, 1}, {cuda::GemmPointers::kMost, 1, 1}, 0,
               p);
});

}  // namespace
