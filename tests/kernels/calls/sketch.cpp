#include "cuda/sketch.cuh"

#include "calls.h"

using namespace galore_rrf;

namespace {

// type, rows, cols, row_offset, col_offset, blocks at most, seed, matrix, refresh; out.
const kernels::Registered fill_sketch("fill_sketch", [](const kernels::Arguments& a) {
  kernels::with_type<float, double, Half, Bfloat16>(a.whole[0], [&]<class T>(T*) {
    const SketchKey key = {static_cast<uint64_t>(a.whole[6]), a.size(7), a.size(8)};
    const cuda::Sketch<T> sketch{a.buffer<T>(0), a.whole[1], a.whole[2], key, a.whole[3], a.whole[4]};
    shim::launch(cuda::fill_sketch<T>, cuda::plane_grid(sketch.cols, sketch.strips(), 1, a.whole[5]),
                 cuda::plane_block(sketch.cols), 0, sketch);
  });
});

}  // namespace
