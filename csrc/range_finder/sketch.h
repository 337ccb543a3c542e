// The Gaussian test matrix as a tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include "math/normal.h"

namespace galore_rrf {

// Columns first to first + cols of the test matrix of a key, on the device and in the compute dtype of
// `like`: rows x cols, row-major.
at::Tensor test_matrix(const at::Tensor& like, int64_t rows, int64_t cols, SketchKey key, int64_t first = 0);

}  // namespace galore_rrf
