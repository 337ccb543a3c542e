// Exact scaling by powers of two, so that extreme inputs neither overflow nor vanish.
#pragma once

#include <ATen/core/Tensor.h>

namespace galore_rrf {

// The largest magnitude in `a`; NaN or infinite where any entry is.
double largest_magnitude(const at::Tensor& a);

// The exponent e with 2^e <= magnitude < 2^(e + 1), for a finite magnitude > 0.
int exponent_of(double magnitude);

// The same, cut so far that a factor of 2^-e neither overflows nor loses digits in `dtype`; a matrix
// multiplied by it is then near enough to 1.
int safe_exponent_of(double magnitude, at::ScalarType dtype);

// a <- 2^exponent a, exact while normal; in two steps, since one factor may itself overflow.
void scale_by_power_(const at::Tensor& a, int exponent);

}  // namespace galore_rrf
