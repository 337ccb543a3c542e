// Exact scaling by powers of two, so that extreme inputs neither overflow nor vanish.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace galore_rrf {

// The largest magnitude in `a`; NaN or infinite where any entry is.
double largest_magnitude(const at::Tensor& a);

// The exponent e with 2^e <= magnitude < 2^(e + 1), for a finite magnitude > 0.
int exponent_of(double magnitude);

// The same, cut so far that a factor of 2^-e neither overflows nor loses digits in `dtype`; a matrix
// multiplied by it is then near enough to 1.
int safe_exponent_of(double magnitude, at::ScalarType dtype);

// Half the distance from 1 to the next number.
double unit_roundoff(at::ScalarType dtype);

// Whether a matrix of this squared norm can be factored as it is: squares of its entries neither overflow
// nor, where they matter, underflow.
bool is_safe(double squared_norm, at::ScalarType dtype);

// sum (fp64 [1]) <- ||2^-exponent a||_F^2 for any strides and dtype; infinite or NaN where that is not
// finite. Nobody waits for it.
void squared_norm_out(const at::Tensor& sum, const at::Tensor& a, int exponent = 0);

// The same as a number.
double squared_norm(const at::Tensor& a, int exponent = 0);

// 2^-exponent a, which is safe to factor, and its squared norm: 0 of a zero matrix, NaN of a non-finite one.
struct ScaledMatrix {
  at::Tensor a;
  int exponent;
  double squared_norm;
};
ScaledMatrix scaled(const at::Tensor& a);

// What a list of matrices must be multiplied with to be safe, and what there is to find in them, decided on
// their device: nobody waits for it.
struct Scaling {
  at::Tensor exponents;  // int32 [B], of 2^-exponent; undefined: none is scaled
  at::Tensor status;     // uint8 [B]: converged, or zero or nonfinite; undefined: all can be factored
};
Scaling scaling_of(const std::vector<at::Tensor>& matrices);

// a <- 2^exponent a, exact while normal; in two steps, since one factor may itself overflow.
void scale_by_power_(const at::Tensor& a, int exponent);

}  // namespace galore_rrf
