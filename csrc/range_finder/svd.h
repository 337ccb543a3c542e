// The singular value decomposition of Q B, from range finders.
#pragma once

#include <ATen/core/Tensor.h>

namespace galore_rrf {

struct Svd {
  at::Tensor u;  // m x r
  at::Tensor s;  // r, descending
  at::Tensor v;  // n x r
};

// Q (m x r) orthonormal, B (r x n), r <= n: Q B = U diag(s) V^T, by a QR of B^T and the SVD of its triangle.
Svd svd_of_product(const at::Tensor& basis, const at::Tensor& coefficients);

}  // namespace galore_rrf
