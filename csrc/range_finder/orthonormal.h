// Orthonormal bases of panels (tall, narrow matrices in the compute dtype).
#pragma once

#include <ATen/core/Tensor.h>

namespace galore_rrf {

// Q of the Householder QR factorisation: orthonormal to rounding whatever the panel's rank.
at::Tensor householder_basis(const at::Tensor& panel);

// A well-conditioned basis of a panel's range, good enough to multiply by once more: P L of its LU
// factorisation with partial pivoting, no entry over 1.  It serves where a power step needs its
// factor orthogonalised only so that no direction drowns in the rounding of the largest, at a third
// of the time of a Gram matrix in fp64, its Cholesky factor and a triangular solve; and it has full
// rank whatever the rank of the panel, without a fallback.  Overwrites the panel, which
// must be column-major, and returns it.
at::Tensor inner_basis_(const at::Tensor& panel);

// a^T a in fp64, cast by tiles of rows.
at::Tensor gram(const at::Tensor& a);

}  // namespace galore_rrf
