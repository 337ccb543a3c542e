// Block reflectors H = I - V T V^T, found and applied.
#pragma once

#include <ATen/core/Tensor.h>

#include "range_finder/types.h"

namespace galore_rrf {

// A panel (p x w) as H [r; 0], H orthogonal, r (k x w) upper triangular, k = min(p, w).
struct ReflectedPanel {
  BlockReflector h;
  at::Tensor r;
};

// The T that makes I - V T V^T orthogonal, without a loop over columns: the UT transform (Joffrain et al.
// 2006), T^-1 = striu(V^T V) + diag(V^T V) / 2.  Zero where a column of V is.
at::Tensor triangular_factor(const at::Tensor& v);

// The Householder QR factorisation of a panel; one made orthonormal otherwise becomes a block reflector
// by reconstruction.
ReflectedPanel panel_qr(const at::Tensor& panel, Panel method = Panel::householder);

// The kernel of that name for stacks of any width, by blocks whose rest is left to products.
void signed_lu_(const at::Tensor& q, const at::Tensor& signs);

// Householder reconstruction (Ballard et al. 2014): the H whose first w columns are those of the
// orthonormal q (p x w), column j times signs[j] = +-1, which keeps its LU factorisation from pivoting.
struct Reconstruction {
  BlockReflector h;
  at::Tensor signs;
};
Reconstruction householder_reconstruction(const at::Tensor& q);

// a <- H a, or H^T a; `a` has as many rows as V.
void apply_block_reflector_(const BlockReflector& h, const at::Tensor& a, bool transpose);

// The first `columns` of H, p x columns, column-major.
at::Tensor explicit_basis(const BlockReflector& h, int64_t columns);

}  // namespace galore_rrf
