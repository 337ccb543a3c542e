#include "cuda/residual.cuh"

#include "calls.h"

using namespace galore_rrf;

namespace {

// type of the list, matrices, rows, cols, from row to row of the list, blocks at most; stack, list, factors.
template <class T, class Listed>
void run(void (*kernel)(cuda::StackAndList<T, Listed>), const kernels::Arguments& a) {
  cuda::StackAndList<T, Listed> pair = {};
  pair.stack = a.buffer<T>(0);
  pair.matrices = a.whole[1];
  pair.rows = a.whole[2];
  pair.cols = a.whole[3];
  pair.row_stride = a.whole[4];
  for (int64_t i = 0; i < pair.matrices; ++i) {
    pair.list[i] = a.buffer<Listed>(1) + i * pair.rows * pair.row_stride;
  }
  pair.factors = a.buffer<double>(2);
  shim::launch(kernel, cuda::plane_grid(pair.cols, pair.rows, pair.matrices, a.whole[5]),
               cuda::plane_block(pair.cols), 0, pair);
}

template <class Listed>
using Wide = std::conditional_t<std::is_same_v<Listed, double>, double, float>;

const kernels::Registered signs("signs_of_difference", [](const kernels::Arguments& a) {
  kernels::with_type<float, double, Half, Bfloat16>(a.whole[0], [&]<class Listed>(Listed*) {
    run<Wide<Listed>, const Listed>(cuda::signs_of_difference, a);
  });
});

const kernels::Registered add("add_stack", [](const kernels::Arguments& a) {
  kernels::with_type<float, double, Half, Bfloat16>(
      a.whole[0], [&]<class Listed>(Listed*) { run<Wide<Listed>, Listed>(cuda::add_stack, a); });
});

}  // namespace
