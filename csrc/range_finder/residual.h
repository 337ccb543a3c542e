// What an approximation leaves of a matrix, measured.
#pragma once

#include <ATen/core/Tensor.h>

#include "range_finder/scaling.h"

namespace galore_rrf {

// By how much Q B, B = Q^T A, shrinks ||A||_F^2: sum_j (2 - ||q_j||^2) ||b_j||^2.  Columns of Q are of unit
// length to some 30 u only, which a dominant row of B would turn into an error of the same size.
double kept_energy(const at::Tensor& basis, const at::Tensor& coefficients);

// A relative residual that the difference of squared norms gives to 1 per cent, fp32 included.
constexpr double kDifferenceTells = 0.01;

// ||A - Q B||_F / ||A||_F in fp64 of a scaled matrix A, from norms where that tells, else from the
// difference itself by tiles.  B must be Q^T A, Q orthonormal.
double relative_residual(const ScaledMatrix& matrix, const at::Tensor& basis, const at::Tensor& coefficients);

}  // namespace galore_rrf
