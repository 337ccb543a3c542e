// What lies outside the ranges of bases, in coordinates of its own.
#pragma once

#include <ATen/core/Tensor.h>

#include "range_finder/product.h"

namespace galore_rrf {

// Orthonormal bases C (s x (s - r)) of the complements of the ranges of orthonormal Q (s x r), of matrices of
// one shape, never formed.  They are the last columns of the H of Householder reconstruction, whose first are
// Q diag(signs).  In place of V and T of block_reflector.h
//
//     H = I + X X1^-T X^T,  X = Q diag(signs) - [I; 0],  X1 its upper r x r,
//     C = [0; I] + X B^T,   B = Q2 diag(signs) X1^-1,    Q2 the last s - r rows of Q:
//
// in X the products with Q are there already, so that to go over to the complement, and back, takes a product
// with B each.  As the pivots of X1 are 1 at least, B stays small, and little is lost in the difference.  It
// is made anew in each step: kept, it would be state of the size of a basis.
class Complement {
 public:
  // In `dtype`, fp32 or fp64.
  Complement(const Matrices& bases, at::ScalarType dtype);

  // C^T G (B x (s - r) x l), of grads s x l each in any dtype, r: Q^T G.
  at::Tensor coordinates(const Matrices& grads, const at::Tensor& r) const;

  // C Y = [-Z; Y] + Q diag(signs) Z, Z = B^T Y: the first summand into `out` (B x s x l), of which Y are the
  // last s - r rows; the other's coefficients, B x r x l, are returned.
  at::Tensor spread_(const at::Tensor& out) const;

 private:
  at::Tensor b_, signs_;  // B x (s - r) x r, B x r x 1
};

}  // namespace galore_rrf
