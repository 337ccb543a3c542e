// What an approximation leaves of a matrix, measured.
#pragma once

#include <ATen/core/Tensor.h>

namespace galore_rrf {

// By how much Q B, B = Q^T a 2^-exponent, shrinks ||a||_F^2: sum_j (2 - ||q_j||^2) ||b_j||^2.  Columns of Q
// are of unit length to some 30 u only, which a dominant row of B would turn into an error of the same size.
double kept_energy(const at::Tensor& basis, const at::Tensor& coefficients, int exponent = 0);

// A relative residual that the difference of squared norms gives to 1 per cent, fp32 included.
constexpr double kDifferenceTells = 0.01;

// ||a - Q B||_F / ||a||_F in fp64, from norms where that tells, else from the difference itself by tiles.  B
// must be Q^T a, Q orthonormal.
double relative_residual(const at::Tensor& a, const at::Tensor& basis, const at::Tensor& coefficients);

}  // namespace galore_rrf
