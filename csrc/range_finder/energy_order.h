// Rotating a basis so that its columns are ordered by the energy they keep.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace galore_rrf {

// The squared singular values of B (fp64, descending) and its left singular vectors, which say how
// the columns of Q combine to those of Q B.  As many of both as min(r, n).
struct EnergyOrder {
  at::Tensor energies;
  at::Tensor rotation;  // r x min(r, n), in the dtype of B
};

// From the eigenvalues of B B^T in fp64, right to 1e-8 of the largest singular value and so to the
// rounding of an fp32 B; of an fp64 B by QR and an SVD of the triangle.
EnergyOrder energy_order(const at::Tensor& coefficients);

}  // namespace galore_rrf
