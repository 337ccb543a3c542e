"""What that package's optimizers have in common."""

from __future__ import annotations

from torch import Tensor

from galore_rrf.subspace import SubspaceKeys, as_matrices

PUBLISHED: SubspaceKeys = {"preset": "published", "projector": "svd", "arithmetic": "galore_torch"}
"""Defaults of the group keys: refreshes every 200 steps by an exact SVD, moments kept, scale .25."""


def rank_of(p: Tensor, rank: int | None) -> int | None:
    """The rank that a parameter of a group is projected to: at most its shorter side; None: it is plain."""
    if rank is None or p.dim() < 2 or p.numel() == 0:
        return None
    return min(rank, *as_matrices(p).shape[-2:])
