// The CPU kernels compiled for one instruction set, in the namespace GALORE_RRF_LEVEL instead of `cpu`.
#define cpu GALORE_RRF_LEVEL
#include "cpu/kernels_simd.cpp"
#undef cpu

#include "levels.h"

namespace galore_rrf::GALORE_RRF_LEVEL {

extern const Level level;
const Level level = {
    "",
    sketch_strip,
    decode_block,
    encode_block,
    {adam_range, squared_norm_range, all_finite_range, moments_to_variance_range, variance_to_moments_range},
    {adam_range, squared_norm_range, all_finite_range, moments_to_variance_range, variance_to_moments_range}};

}  // namespace galore_rrf::GALORE_RRF_LEVEL
