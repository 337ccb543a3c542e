#include "cuda/sketch.cuh"

#include "calls.h"

using namespace galore_rrf;

namespace {

// type, matrices, rows, cols, row_offset, col_offset, blocks at most, then seed, matrix, refresh of each; out
// of each.
const kernels::Registered fill_sketches("fill_sketches", [](const kernels::Arguments& a) {
  kernels::with_type<float, double, Half, Bfloat16>(a.whole[0], [&]<class T>(T*) {
    const int64_t matrices = a.whole[1];
    cuda::Sketches<T> sketches;
    sketches.rows = a.whole[2];
    sketches.cols = a.whole[3];
    sketches.row_offset = a.whole[4];
    sketches.col_offset = a.whole[5];
    for (int i = 0; i < matrices; ++i) {
      const int64_t* key = a.whole + 7 + 3 * i;
      sketches.out[i] = a.buffer<T>(i);
      sketches.key[i] = {static_cast<uint64_t>(key[0]), static_cast<uint32_t>(key[1]),
                         static_cast<uint32_t>(key[2])};
    }
    shim::launch(cuda::fill_sketches<T>, cuda::sketch_grid(sketches, matrices, a.whole[6]),
                 cuda::sketch_block(sketches.cols), 0, sketches);
  });
});

}  // namespace
