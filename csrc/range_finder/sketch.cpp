#include "range_finder/sketch.h"

#include <ATen/ops/empty.h>

#include "kernels.h"
#include "range_finder/product.h"

namespace galore_rrf {

at::Tensor test_matrix(const at::Tensor& like, int64_t rows, int64_t cols, SketchKey key, int64_t first) {
  const at::Tensor omega = at::empty({rows, cols}, like.options().dtype(compute_dtype(like)));
  kernels_for(like).fill_sketch(omega, key, 0, first);
  return omega;
}

}  // namespace galore_rrf
