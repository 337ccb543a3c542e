// CPU kernel of gaussian_sketch on raw pointers.
#pragma once

#include <cstdint>

#include "math/normal.h"

namespace galore_rrf::cpu {

// Writes the four rows of `row_block` (matrix rows 4 row_block .. 4 row_block + 3), columns
// first_col .. first_col + cols - 1, to out[i * row_stride + j].
void sketch_strip(float* out, int64_t row_stride, uint32_t row_block, uint32_t first_col, int64_t cols,
                  SketchKey key);

}  // namespace galore_rrf::cpu
