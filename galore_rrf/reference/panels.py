"""What the range finders are built of."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


def orth(a: Tensor) -> Tensor:
    """Q of the Householder QR factorisation.

    Column k depends on the span of the first k columns of a alone, not on their lengths or signs.
    """
    return torch.linalg.qr(a)[0]


def panel_qr(panel: Tensor, *, method: str = "householder") -> tuple[Tensor, Tensor, Tensor]:
    """LAPACK's reflectors, T column by column (Schreiber and Van Loan 1989); `method` makes no difference."""
    *_, p, w = panel.shape
    k = min(p, w)
    factored, tau = torch.geqrf(panel.to(compute_dtype(panel)))
    v = factored[..., :k].tril(-1) + torch.eye(p, k, dtype=factored.dtype)
    t = torch.zeros(*panel.shape[:-2], k, k, dtype=v.dtype)
    for j in range(k):
        tau_j, v_j = tau[..., j, None], v[..., j, None]
        t[..., :j, j] = -tau_j * (t[..., :j, :j] @ (v[..., :j].mT @ v_j))[..., 0]
        t[..., j, j] = tau_j[..., 0]
    return v, t, factored[..., :k, :].triu()


def orthonormal_panel(panel: Tensor, *, method: str = "cholesky_qr") -> tuple[Tensor, Tensor, Tensor]:
    """The QR factorisation; `method` makes no difference."""
    q, r = torch.linalg.qr(panel.to(compute_dtype(panel)))
    return q, r, torch.zeros(panel.shape[:-2], dtype=torch.bool)


def householder_reconstruction(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ballard et al. 2014 in other words: V, T of the QR factorisation of q, whose R is diag(signs)."""
    v, t, r = panel_qr(q)
    return v, t, r.diagonal(dim1=-2, dim2=-1).sign()


def apply_block_reflector(v: Tensor, t: Tensor, a: Tensor, *, transpose: bool = False) -> Tensor:
    """H a or H^T a with H = I - V T V^T."""
    return a - v @ ((t.mT if transpose else t) @ (v.mT @ a))


def explicit_basis(v: Tensor, t: Tensor) -> Tensor:
    """The first columns of H."""
    return apply_block_reflector(v, t, torch.eye(*v.shape[-2:], dtype=v.dtype).expand(v.shape))


def svd_of_product(basis: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of B, U rotated by Q."""
    u, s, vh = torch.linalg.svd(coefficients, full_matrices=False)
    return basis @ u, s, vh.mT
