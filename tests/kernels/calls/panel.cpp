#include "cuda/panel.cuh"

#include "calls.h"

using namespace galore_rrf;

namespace {

// type, matrices, rows, cols, from column to column, from matrix to matrix, threads; panels, flags.
const kernels::Registered householder("householder", [](const kernels::Arguments& a) {
  kernels::with_type<float, double>(a.whole[0], [&]<class T>(T*) {
    const cuda::PanelStack<T> stack = {a.buffer<T>(0), a.whole[2], a.whole[3],
                                       a.whole[4],     a.whole[5], a.buffer<uint8_t>(1)};
    shim::launch(cuda::householder_kernel<T>, {a.size(1), 1, 1}, {a.size(6), 1, 1}, 0, stack);
  });
});

// rows; threads.
const kernels::Registered threads("panel_threads", [](const kernels::Arguments& a) {
  *a.buffer<int64_t>(0) = cuda::panel_threads(a.whole[0]);
});

// type, width, threads, matrices; q, signs.
const kernels::Registered signed_lu("signed_lu", [](const kernels::Arguments& a) {
  kernels::with_type<float, double>(a.whole[0], [&]<class T>(T*) {
    shim::launch(cuda::signed_lu_kernel<T>, {a.size(3), 1, 1}, {a.size(2), 1, 1}, 0, a.buffer<T>(0),
                 a.buffer<T>(1), a.whole[1]);
  });
});

}  // namespace
