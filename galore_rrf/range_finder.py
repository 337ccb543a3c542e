"""Randomized range finders for everyday use, without any optimizer.

Both find, for a matrix A (m x n), an orthonormal Q (m x r) whose columns nearly span A's, so that A is
nearly Q B with B = Q^T A: Halko, Martinsson and Tropp, "Finding structure with randomness" (2011).  For the
row space pass ``a.mT``.  Neither is differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from galore_rrf import ops


class Status(IntEnum):
    """How a range finder ended; the numbers are those of the operators' uint8 status."""

    converged = 0
    """The tolerance, or the fixed rank, was reached."""
    rank_cap = 1
    """The rank cap was reached first."""
    floor = 2
    """The tolerance is below what the dtype can tell from rounding; the rank is the cap."""
    zero = 3
    """The matrix is zero."""
    nonfinite = 4
    """The matrix has a NaN or infinite entry; basis and coefficients are zero."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class RangeFinderResult:
    """What a range finder returns, of a matrix (m x n) or of a batch (..., m, n).

    Of a batch, `rank`, `residual`, `residuals` and `status` are tensors over the batch dimensions, and
    `basis` and `coefficients` are as wide as the largest rank, zero beyond each matrix's own.
    """

    basis: Tensor
    """Q, (..., m, rank), orthonormal columns; fp64 for fp64 input, else fp32."""
    coefficients: Tensor | None
    """B = Q^T A, (..., rank, n); None where they were not asked for."""
    rank: int | Tensor
    residual: float | Tensor
    """||A - Q B||_F / ||A||_F of what is returned; NaN without coefficients."""
    residuals: list[float] | Tensor
    """The relative residual after every block, before trimming; NaN where a batch's matrix had ended."""
    status: Status | Tensor


def range_finder(
    a: Tensor,
    rank: int,
    *,
    oversampling: int = 0,
    sketch: str = "half_power",
    power: int = 1,
    warm: Tensor | None = None,
    coefficients: bool = True,
    seed: int = 0,
    key: int = 0,
    refresh: int = 0,
) -> RangeFinderResult:
    """An orthonormal basis of exactly `rank` columns for the range of `a`.

    Args:
        a: real floating-point (..., m, n), any strides; unchanged.
        rank: columns, from 1 to min(m, n).
        oversampling: columns sketched beyond the rank; the result is cut to the best `rank` of them, its
            columns ordered by the energy they keep.
        sketch: ``"plain"``, Y = A Omega (HMT algorithm 4.1); ``"half_power"``, Y = A orth(A^T Omega), one
            product more and an error within some per cent of the best; ``"power"``, plain followed by
            `power` orthogonalised power steps (HMT 4.4); ``"warm"``, half power that starts from `warm`.
        power: full power steps of ``sketch="power"``.
        warm: a basis (..., m, any) found for a matrix like `a` before.
        coefficients: whether to compute B = Q^T A, and the residual with it.
        seed, key, refresh: choose the Gaussian test matrix (`ops.gaussian_sketch`); matrix i of a batch
            has that of ``key + i``.  The same arguments give the same result.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    basis, b, residual, status = ops.range_finder(
        a,
        rank,
        oversampling=oversampling,
        sketch=sketch,
        power=power,
        warm=warm,
        coefficients=coefficients,
        seed=seed,
        key=key,
        refresh=refresh,
    )
    kept = b if coefficients else None
    if a.dim() > 2:
        ranks = torch.full_like(status, rank, dtype=torch.int64)
        return RangeFinderResult(basis, kept, ranks, residual, residual.unsqueeze(-1), status)
    error = residual.item()
    return RangeFinderResult(basis, kept, rank, error, [error], Status(int(status)))


def adaptive_range_finder(
    a: Tensor,
    tolerance: float,
    *,
    relative: bool = True,
    block: int = 64,
    max_rank: int | None = None,
    method: str = "auto",
    sketch: str = "plain",
    trim: bool = True,
    seed: int = 0,
    key: int = 0,
    refresh: int = 0,
) -> RangeFinderResult:
    """The smallest orthonormal basis Q, up to `max_rank` columns, with ||A - Q Q^T A||_F within a tolerance.

    A blocked Householder QR of sketches of what is left of A (Penke 2024), the residual measured on what is
    left and so free of cancellation.

    Args:
        a: real floating-point (..., m, n), any strides; unchanged.
        tolerance: bound on the residual, times ||A||_F where `relative`; 0 asks for full rank.
        block: columns added at a time.
        max_rank: rank cap; None: min(m, n).
        method: ``"right_looking"``, or ``"auto"`` to choose.
        sketch: ``"plain"`` or ``"half_power"`` (see `range_finder`).
        trim: compute one block more, then cut to the smallest rank within the tolerance; the basis columns
            are then ordered by the energy they keep.  Without it the rank is a multiple of the block.
        seed, key, refresh: as in `range_finder`.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    basis, b, rank, residual, residuals, status = ops.adaptive_range_finder(
        a,
        tolerance,
        relative=relative,
        block=block,
        max_rank=max_rank,
        method=method,
        sketch=sketch,
        trim=trim,
        seed=seed,
        key=key,
        refresh=refresh,
    )
    largest = int(rank.max()) if rank.numel() else 0
    basis, b = basis[..., :largest], b[..., :largest, :]
    if a.dim() > 2:
        return RangeFinderResult(basis, b, rank, residual, residuals, status)
    blocks = residuals[residuals.isfinite()].tolist()
    return RangeFinderResult(basis, b, largest, residual.item(), blocks, Status(int(status)))
