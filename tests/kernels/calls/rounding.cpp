#include "cuda/rounding.cuh"

#include "calls.h"
#include "cpu/kernels_simd.cpp"  // the twin

using namespace galore_rrf;

namespace {

// type, rows, cols, from row to row of w and of x, number of the first entry, seed, matrix, blocks along both
// axes; w, x, {beta, step}.
const kernels::Registered add_rounded("add_rounded", [](const kernels::Arguments& a) {
  kernels::with_type<float, Half, Bfloat16>(a.whole[0], [&]<class T>(T*) {
    const double* scalars = a.buffer<double>(2);
    const cuda::RoundedSum<T> sum = {a.buffer<T>(0),
                                     a.buffer<float>(1),
                                     a.whole[1],
                                     a.whole[2],
                                     a.whole[3],
                                     a.whole[4],
                                     a.whole[5],
                                     scalars,
                                     scalars + 1,
                                     static_cast<uint64_t>(a.whole[6]),
                                     static_cast<uint32_t>(a.whole[7])};
    shim::launch(cuda::add_rounded_kernel<T>, {a.size(8), a.size(9), 1}, {64, 1, 1}, 0, sum);
  });
});

// type, entries, number of the first entry, seed, matrix; w, x, {beta, step}.
const kernels::Registered on_cpu("add_rounded_on_cpu", [](const kernels::Arguments& a) {
  kernels::with_type<float, Half, Bfloat16>(a.whole[0], [&]<class T>(T*) {
    const double* scalars = a.buffer<double>(2);
    const RoundingKey key = {static_cast<uint64_t>(a.whole[3]), static_cast<uint32_t>(a.whole[4]),
                             static_cast<uint32_t>(scalars[1])};
    cpu::add_rounded_range(a.buffer<T>(0), a.buffer<float>(1), a.whole[1], static_cast<float>(scalars[0]),
                           key, a.whole[2]);
  });
});

}  // namespace
