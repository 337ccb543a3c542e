// CPU kernels of add_rounded on raw pointers.
#pragma once

#include <cstdint>

#include "math/float16.h"
#include "math/stochastic_rounding.h"

namespace galore_rrf::cpu {

// w <- beta w + x, stochastically rounded; w[0] is entry `first_entry` of its weight.
void add_rounded_range(Bfloat16* w, const float* x, int64_t n, float beta, RoundingKey key,
                       int64_t first_entry);
void add_rounded_range(Half* w, const float* x, int64_t n, float beta, RoundingKey key, int64_t first_entry);
void add_rounded_range(float* w, const float* x, int64_t n, float beta, RoundingKey key, int64_t first_entry);

}  // namespace galore_rrf::cpu
