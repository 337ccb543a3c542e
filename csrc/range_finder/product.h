// Matrix products with a large matrix of any strides and dtype as one operand.
//
// fp32 and fp64 matrices that BLAS can read go to it as they are.  Half precision ones (and those
// with two strides over 1) are cast by tiles of their outer dimension, so that no full-size copy
// ever exists; a CPU without bf16 instructions multiplies bf16 two hundred times slower than fp32.
#pragma once

#include <ATen/core/Tensor.h>

namespace galore_rrf {

// fp64 for fp64, fp32 for all else: the dtype of everything that is computed.
at::ScalarType compute_dtype(const at::Tensor& a);

// out <- (2^-exponent a) b, the power of two on the narrow factor, where it is cheap and exact.  `a` is the
// large operand (p x k); b (k x q) and out (p x q) have its compute dtype; all may be transposed views.
void multiply_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, int exponent = 0);

// The same in column-major order, as LAPACK wants its panels.
at::Tensor multiply(const at::Tensor& a, const at::Tensor& b, int exponent = 0);

// w <- beta w + alpha x y, the large operand w (p x q) of any strides and dtype.
void add_product_(const at::Tensor& w, const at::Tensor& x, const at::Tensor& y, double beta, double alpha);

}  // namespace galore_rrf
