// Floating-point numbers as their bits, in constant expressions and device code too, where std::bit_cast is
// not.
#pragma once

#include <cstdint>

#include "math/portable.h"

namespace galore_rrf {

GALORE_RRF_HD constexpr uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
GALORE_RRF_HD constexpr uint64_t bits_of(double x) { return __builtin_bit_cast(uint64_t, x); }
GALORE_RRF_HD constexpr float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

}  // namespace galore_rrf
