// The nearest matrix with orthonormal rows or columns, nearly, by the iteration of Newton and Schulz.
#pragma once

#include <ATen/core/Tensor.h>

namespace galore_rrf {

// Of a stack X (B x m x n) in fp32, fp64 or bf16, each of Frobenius norm 1, in whose square nothing overflows
// or is lost, or 0, with the singular value decompositions U S V^T: U f(S) V^T.  f is two steps of the
// quintic iteration of Muon (Jordan et al. 2024): from .7 to 1.2 for singular values over a tenth of the
// bound ||X X^T||_F^(1/2), linear towards 0 with slope 12.  Zeros stay.  Nobody waits for a device.
at::Tensor orthogonalized(const at::Tensor& x);

}  // namespace galore_rrf
