// Block reflectors H = I - V T V^T in compact WY form (Schreiber and Van Loan 1989).
#pragma once

#include <ATen/core/Tensor.h>

namespace galore_rrf {

struct BlockReflector {
  at::Tensor v;  // p x w, unit lower trapezoidal
  at::Tensor t;  // w x w, upper triangular
};

// The Householder QR factorisation of a panel (p x w): H^T panel is upper triangular.  T comes
// from the UT transform (Joffrain et al. 2006): T^-1 = diag(1 / tau) + striu(V^T V), a product
// and a triangular solve in place of a loop over columns.  Columns with tau = 0 (H = I) drop out.
BlockReflector panel_qr(const at::Tensor& panel);

// a <- H a, or H^T a; `a` has as many rows as V.
void apply_block_reflector_(const BlockReflector& h, const at::Tensor& a, bool transpose);

}  // namespace galore_rrf
