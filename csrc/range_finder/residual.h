// What an approximation leaves of a matrix, measured.
#pragma once

#include <ATen/core/Tensor.h>

namespace galore_rrf {

// ||a - Q B||_F / ||a||_F in fp64, from norms where that is accurate, else from the difference itself by
// tiles.  B must be Q^T a, Q orthonormal.
double relative_residual(const at::Tensor& a, const at::Tensor& basis, const at::Tensor& coefficients);

}  // namespace galore_rrf
