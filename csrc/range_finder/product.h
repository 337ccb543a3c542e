// Matrix products with a large matrix of any strides and dtype as one operand.
//
// fp32 and fp64 matrices that BLAS can read go to it as they are.  Half precision ones (and those
// with two strides over 1) are cast by tiles of their outer dimension, so that no full-size copy
// ever exists; a CPU without bf16 instructions multiplies bf16 two hundred times slower than fp32.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace galore_rrf {

// fp64 for fp64, fp32 for all else: the dtype of everything that is computed.
at::ScalarType compute_dtype(const at::Tensor& a);

// Of products with a stack, in fp32 or fp64, that need not be accurate: bf16 instead of fp32 where the device
// has instructions for it and the matrices are large enough to gain by them.
at::ScalarType quick_dtype(const at::Tensor& a);

// The entries of a matrix from which on that is so on this CPU, if it is.
std::optional<int64_t> quick_entries();

// out <- (2^-exponent a) b, the power of two on the narrow factor, where it is cheap and exact.  `a` is the
// large operand (p x k); b (k x q) and out (p x q) have its compute dtype; all may be transposed views.
void multiply_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, int exponent = 0);

// The same in column-major order, as LAPACK wants its panels.
at::Tensor multiply(const at::Tensor& a, const at::Tensor& b, int exponent = 0);

// w <- beta w + x y, the large operand w (p x q) of any strides and dtype; beta: a number, or a scalar on the
// device of w, which then nobody waits for.
void add_product_(const at::Tensor& w, const at::Tensor& x, const at::Tensor& y, const at::Tensor& beta);

// A list of matrices of one shape, strides and dtype.
using Matrices = std::vector<at::Tensor>;

// Of a stack (B x p x q).
Matrices each(const at::Tensor& stack);
Matrices transposed(Matrices matrices);

// The matrices as a stack in `dtype`: a view of a single one that has it, else a row-major copy.
at::Tensor stacked(const Matrices& matrices, at::ScalarType dtype);

// out <- a b, stacks.
void multiply_stacks_out(at::Tensor out, const at::Tensor& a, const at::Tensor& b);
at::Tensor multiply_stacks(const at::Tensor& a, const at::Tensor& b);

// c <- c - a b, stacks.
void subtract_products_(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b);

// out[i] <- a[i] b[i], a the large operands.
void multiply_out(const Matrices& out, const Matrices& a, const Matrices& b);

// w[i] <- w[i] + x[i] y[i], y a stack; w the large operands.
void add_products_(const Matrices& w, const Matrices& x, const at::Tensor& y);

// 2^-exponents b of a stack; exponents as in scaling.h.
at::Tensor scaled_down(const at::Tensor& b, const at::Tensor& exponents);

// 2^-exponents[i] a[i] b[i] as a stack of column-major matrices, b a stack.  For sketches: where lists are
// multiplied together b is rounded to the dtype of a.
at::Tensor multiply(const Matrices& a, const at::Tensor& b, const at::Tensor& exponents);

}  // namespace galore_rrf
