// CPU kernels over moments and panels, on raw pointers.
#pragma once

#include <cstdint>

#include "math/adam.h"

namespace galore_rrf::cpu {

void adam_range(float* projected, float* exp_avg, float* exp_avg_sq, int64_t n, AdamElement<float> element);
void adam_range(double* projected, double* exp_avg, double* exp_avg_sq, int64_t n,
                AdamElement<double> element);

double squared_norm_range(const float* a, int64_t n);
double squared_norm_range(const double* a, int64_t n);

bool all_finite_range(const float* a, int64_t n);
bool all_finite_range(const double* a, int64_t n);

}  // namespace galore_rrf::cpu
