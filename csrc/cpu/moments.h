// CPU kernels over moments and panels, on raw pointers.
#pragma once

#include <cstdint>

#include "math/adam.h"
#include "math/dynamic_code.h"

namespace galore_rrf::cpu {

void adam_range(float* projected, float* exp_avg, float* exp_avg_sq, int64_t n, AdamElement<float> element);
void adam_range(double* projected, double* exp_avg, double* exp_avg_sq, int64_t n,
                AdamElement<double> element);

// Elementwise parts of a rotation, on n entries in one piece (kernels.h).
void moments_to_variance_range(float* mean, float* variance, const float* m, const float* v, int64_t n,
                               float inverse1, float inverse2);
void moments_to_variance_range(double* mean, double* variance, const double* m, const double* v, int64_t n,
                               double inverse1, double inverse2);
void variance_to_moments_range(float* m, float* v, const float* mean, const float* variance, int64_t n,
                               float correction1, float correction2);
void variance_to_moments_range(double* m, double* v, const double* mean, const double* variance, int64_t n,
                               double correction1, double correction2);

// One block of at most 256 entries, and back: `scale` is the largest magnitude, the largest finite number
// where that is infinite.  A NaN entry makes the block NaN.
void decode_block(float* out, const uint8_t* codes, float scale, int64_t n, const DynamicCode& code);
void encode_block(uint8_t* codes, float* scale, const float* in, int64_t n, const DynamicCode& code);

double squared_norm_range(const float* a, int64_t n);
double squared_norm_range(const double* a, int64_t n);

bool all_finite_range(const float* a, int64_t n);
bool all_finite_range(const double* a, int64_t n);

}  // namespace galore_rrf::cpu
