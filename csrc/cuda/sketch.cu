#include "cuda/launch.h"
#include "cuda/launchers.h"
#include "cuda/sketch.cuh"

namespace galore_rrf::cuda {
namespace {

template <class T>
void fill(const at::Tensor& out, SketchKey key, int64_t row_offset, int64_t col_offset) {
  const Sketch<T> sketch{
      static_cast<T*>(out.mutable_data_ptr()), out.size(0), out.size(1), key, row_offset, col_offset};
  launch(fill_sketch<T>, plane_grid(sketch.cols, sketch.strips(), 1, enough_blocks()),
         plane_block(sketch.cols), sketch);
}

}  // namespace

void fill_sketch(const at::Tensor& out, SketchKey key, int64_t row_offset, int64_t col_offset) {
  if (out.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(out.device());
  switch (out.scalar_type()) {
    case at::kFloat:
      return fill<float>(out, key, row_offset, col_offset);
    case at::kDouble:
      return fill<double>(out, key, row_offset, col_offset);
    case at::kHalf:
      return fill<Half>(out, key, row_offset, col_offset);
    case at::kBFloat16:
      return fill<Bfloat16>(out, key, row_offset, col_offset);
    default:
      TORCH_CHECK(false, "gaussian_sketch is not implemented for ", out.scalar_type());
  }
}

}  // namespace galore_rrf::cuda
