// Rotating a basis so that its columns are ordered by the energy they keep.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace galore_rrf {

// Eigenvalues (fp64, descending, never negative) and eigenvectors of B B^T: the squared singular
// values of Q B and how Q's columns combine to its left singular vectors.
struct EnergyOrder {
  at::Tensor energies;
  at::Tensor rotation;  // r x r, in the dtype of B
};

EnergyOrder energy_order(const at::Tensor& coefficients);

}  // namespace galore_rrf
