// CPU kernels of what is done with residuals, on raw pointers.
#pragma once

#include <cstdint>

namespace galore_rrf::cpu {

// x <- length sign(a - x), 0 where those are equal or either is NaN.
void signs_of_difference_range(float* x, const float* a, int64_t n, float length);
void signs_of_difference_range(double* x, const double* a, int64_t n, double length);

}  // namespace galore_rrf::cpu
