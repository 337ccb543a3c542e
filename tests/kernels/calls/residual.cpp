#include "cuda/residual.cuh"

#include "calls.h"

using namespace galore_rrf;

namespace {

template <class Listed, class Arguments>
void lay_out(Arguments& to, const kernels::Arguments& a) {
  to.matrices = a.whole[1];
  to.rows = a.whole[2];
  to.cols = a.whole[3];
  to.row_stride = a.whole[4];
  for (int64_t i = 0; i < to.matrices; ++i) to.list[i] = a.buffer<Listed>(1) + i * to.rows * to.row_stride;
}

// type of the list, matrices, rows, cols, from row to row of the list, blocks at most; stack, list, factors.
template <class T, class Listed>
void run(void (*kernel)(cuda::StackAndList<T, Listed>), const kernels::Arguments& a) {
  cuda::StackAndList<T, Listed> pair = {};
  pair.stack = a.buffer<T>(0);
  lay_out<Listed>(pair, a);
  pair.factors = a.buffer<double>(2);
  shim::launch(kernel, cuda::plane_grid(pair.cols, pair.rows, pair.matrices, a.whole[5]),
               cuda::plane_block(pair.cols), 0, pair);
}

template <class T, class Listed>
void run_scaled(const kernels::Arguments& a) {
  cuda::StackAndList<T, const Listed> pair = {};
  pair.stack = a.buffer<T>(0);
  lay_out<Listed>(pair, a);
  const bool of_rows = a.whole[6] == 0;
  const cuda::Scales<T> scales = {a.buffer<T>(2), of_rows ? pair.rows : pair.cols, of_rows, !of_rows};
  shim::launch(cuda::add_scaled_list<T, Listed>,
               cuda::plane_grid(pair.cols, pair.rows, pair.matrices, a.whole[5]),
               cuda::plane_block(pair.cols), 0, pair, scales);
}

// type of the list, matrices, rows, cols, from row to row of the list, blocks at most, summed dim; -, list,
// sums.
template <class T, class Listed>
void run_squares(const kernels::Arguments& a) {
  cuda::ListAndSums<T, Listed> list = {};
  lay_out<Listed>(list, a);
  const bool of_rows = a.whole[6] == 1;
  list.sums = a.buffer<double>(2);
  list.sums_stride = of_rows ? list.rows : list.cols;
  const auto kernel =
      of_rows ? cuda::add_squares_of_rows<T, Listed> : cuda::add_squares_of_columns<T, Listed>;
  const int64_t blocks =
      of_rows ? list.rows : (list.cols + cuda::kSquaresThreads - 1) / cuda::kSquaresThreads;
  shim::launch(kernel, cuda::squares_grid(blocks, list.matrices, a.whole[5]), {cuda::kSquaresThreads, 1, 1},
               0, list);
}

template <class Listed>
using Wide = std::conditional_t<std::is_same_v<Listed, double>, double, float>;

const kernels::Registered signs("signs_of_difference", [](const kernels::Arguments& a) {
  kernels::with_type<float, double, Half, Bfloat16>(a.whole[0], [&]<class Listed>(Listed*) {
    run<Wide<Listed>, const Listed>(cuda::signs_of_difference, a);
  });
});

// As above, and the dim that scales belong to; scales in the place of factors.
const kernels::Registered scaled("add_scaled", [](const kernels::Arguments& a) {
  kernels::with_type<float, double, Half, Bfloat16>(
      a.whole[0], [&]<class Listed>(Listed*) { run_scaled<Wide<Listed>, Listed>(a); });
});

const kernels::Registered squares("add_squares", [](const kernels::Arguments& a) {
  kernels::with_type<float, double, Half, Bfloat16>(
      a.whole[0], [&]<class Listed>(Listed*) { run_squares<Wide<Listed>, Listed>(a); });
});

const kernels::Registered add("add_stack", [](const kernels::Arguments& a) {
  kernels::with_type<float, double, Half, Bfloat16>(
      a.whole[0], [&]<class Listed>(Listed*) { run<Wide<Listed>, Listed>(cuda::add_stack, a); });
});

}  // namespace
