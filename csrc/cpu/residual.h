// CPU kernels of what is done with residuals, on raw pointers.
#pragma once

#include <cstdint>

namespace galore_rrf::cpu {

// x <- length sign(a - x), 0 where those are equal or either is NaN.
void signs_of_difference_range(float* x, const float* a, int64_t n, float length);
void signs_of_difference_range(double* x, const double* a, int64_t n, double length);

// x <- x + scales a: one scale an entry, or one for all.
void add_scaled_range(float* x, const float* a, const float* scales, int64_t n);
void add_scaled_range(double* x, const double* a, const double* scales, int64_t n);
void add_scaled_range(float* x, const float* a, float scale, int64_t n);
void add_scaled_range(double* x, const double* a, double scale, int64_t n);

// sums <- sums + a^2, entry by entry.
void add_squares_range(double* sums, const float* a, int64_t n);
void add_squares_range(double* sums, const double* a, int64_t n);

}  // namespace galore_rrf::cpu
