// Orthonormal bases of panels (tall, narrow matrices in the compute dtype, column-major).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "range_finder/types.h"

namespace galore_rrf {

// A panel (p x w) as q r: q (p x k) orthonormal, column-major; r (k x w) upper triangular; k = min(p, w).
struct PanelQR {
  at::Tensor q;
  at::Tensor r;
  Panel method;  // that found it
};

// By reflectors: q is orthonormal to rounding whatever the panel's rank.
PanelQR householder_qr(const at::Tensor& panel);

// Cholesky QR twice, the Gram matrices in fp64 (Yamamoto et al. 2015): almost all of it products, and as
// orthonormal as Householder's while the panel's condition number stays under about 10^7.  Nothing where
// it is larger, or the panel has more columns than rows.
std::optional<PanelQR> cholesky_qr(const at::Tensor& panel);

// Classical Gram-Schmidt, every column against those before it twice (Giraud et al. 2005).  Nothing where
// a column depends on those before it to rounding.
std::optional<PanelQR> gram_schmidt_qr(const at::Tensor& panel);

// By the chosen method, by reflectors where that gives nothing.
PanelQR orthonormal_panel(const at::Tensor& panel, Panel method);

// The same of stacks of panels (B x m x w, m >= w, each column-major), q alone; the panels are overwritten.
// asynchronous: nobody waits for the device, where Cholesky QR's fallback is decided too.
at::Tensor orthonormal_bases_(const at::Tensor& panels, Panel method, bool asynchronous);

// A well-conditioned basis of a panel's range, good enough to multiply by once more: P L of its LU
// factorisation with partial pivoting, no entry over 1.  It serves where a power step needs its
// factor orthogonalised only so that no direction drowns in the rounding of the largest, at a third
// of the time of a Gram matrix in fp64, its Cholesky factor and a triangular solve; and it has full
// rank whatever the rank of the panel, without a fallback.  Overwrites the panel, which
// must be column-major, and returns it.  On CUDA an orthonormal basis instead.
at::Tensor inner_basis_(const at::Tensor& panel);

// The same of stacks; asynchronous: orthonormal, since pivots are exchanged by the host.
at::Tensor inner_bases_(const at::Tensor& panels, bool asynchronous);

// a^T a in fp64, cast by tiles of rows; of a matrix or a stack.
at::Tensor gram(const at::Tensor& a);

}  // namespace galore_rrf
