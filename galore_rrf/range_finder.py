"""Randomized range finders for everyday use, without any optimizer.

All find, for a matrix A (m x n), an orthonormal Q (m x r) whose columns nearly span A's, so that A is
nearly Q B with B = Q^T A: Halko, Martinsson and Tropp, "Finding structure with randomness" (2011).  For the
row space pass ``a.mT``.  None is differentiable.  What tolerances mean: docs/numerics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

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
class BlockReflector:
    """An orthogonal H = I - V T V^T in compact WY form (Schreiber and Van Loan 1989)."""

    v: Tensor
    """(..., m, r), unit lower trapezoidal."""
    t: Tensor
    """(..., r, r), upper triangular."""

    def apply(self, a: Tensor, *, transpose: bool = False) -> Tensor:
        """H a or H^T a, of a (..., m, any)."""
        return ops.apply_block_reflector(self.v, self.t, a, transpose=transpose)


@dataclass(frozen=True)
class RangeFinderResult:
    """What a range finder returns, of a matrix (m x n) or of a batch (..., m, n).

    Of a batch, `rank`, `residual`, `residuals` and `status` are tensors over the batch dimensions, and
    `basis` and `coefficients` are as wide as the largest rank, zero beyond each matrix's own.
    """

    explicit_basis: Tensor | None
    """`basis`, or None where it was asked for in implicit form."""
    coefficients: Tensor | None
    """B = Q^T A, (..., rank, n); None where they were not asked for."""
    rank: int | Tensor
    residual: float | Tensor
    """||A - Q B||_F / ||A||_F of what is returned; NaN without coefficients."""
    residuals: list[float] | Tensor
    """The relative residual after every block, before trimming; NaN where a batch's matrix had ended."""
    status: Status | Tensor
    reflector: BlockReflector | None = None
    """With ``implicit=True``: H, whose first `rank` columns are Q."""

    @cached_property
    def basis(self) -> Tensor:
        """Q, (..., m, rank), orthonormal columns, laid out column by column; fp64 for fp64 input, else fp32.

        Formed when first asked for where the form is implicit.
        """
        if self.explicit_basis is not None:
            return self.explicit_basis
        assert self.reflector is not None
        q = ops.explicit_basis(self.reflector.v, self.reflector.t)
        if isinstance(self.rank, Tensor):  # columns beyond a matrix's own rank are those of the identity
            q = q * (torch.arange(q.shape[-1], device=q.device) < self.rank[..., None])[..., None, :]
        return q


def _check(a: Tensor, nonfinite: str) -> None:
    """What the operators cannot check."""
    if a.layout != torch.strided:
        raise TypeError(f"Invalid a: a tensor of layout {a.layout} (must be strided: use a.to_dense())")
    if nonfinite not in ("status", "raise"):
        raise ValueError(f"Invalid nonfinite: {nonfinite!r} (must be 'status' or 'raise')")


def _raise_nonfinite(status: Tensor) -> None:
    bad = (status == Status.nonfinite).nonzero().tolist()
    if bad:
        which = f"matrix {bad[0]} of the batch" if status.dim() else "the matrix"
        raise FloatingPointError(f"{which} has a NaN or infinite entry")


def range_finder(
    a: Tensor,
    rank: int,
    *,
    oversampling: int = 0,
    sketch: str = "half_power",
    power: int = 1,
    warm: Tensor | None = None,
    coefficients: bool = True,
    panel: str = "auto",
    nonfinite: str = "status",
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
        panel: how the sketch is orthonormalised: ``"householder"``, ``"cholesky_qr"`` or
            ``"gram_schmidt"`` (`ops.orthonormal_panel`); ``"auto"``: as is fastest on the device.
        nonfinite: what a NaN or infinite entry leads to: ``"status"``, `Status.nonfinite` and a basis of
            zeros, or ``"raise"``.
        seed, key, refresh: choose the Gaussian test matrix (`ops.gaussian_sketch`); matrix i of a batch
            has that of ``key + i``.  The same arguments give the same result.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
        FloatingPointError: for a NaN or infinite entry, with ``nonfinite="raise"``.
    """
    _check(a, nonfinite)
    basis, b, residual, status = ops.range_finder(
        a,
        rank,
        oversampling=oversampling,
        sketch=sketch,
        power=power,
        warm=warm,
        coefficients=coefficients,
        panel=panel,
        seed=seed,
        key=key,
        refresh=refresh,
    )
    if nonfinite == "raise":
        _raise_nonfinite(status)
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
    sketch: str = "half_power",
    trim: bool = True,
    extra_blocks: int = 1,
    between: str = "householder",
    panel: str = "householder",
    look_ahead: bool | None = None,
    implicit: bool = False,
    nonfinite: str = "status",
    seed: int = 0,
    key: int = 0,
    refresh: int = 0,
) -> RangeFinderResult:
    """The smallest orthonormal basis Q, up to `max_rank` columns, with ||A - Q Q^T A||_F within a tolerance.

    A blocked Householder QR of sketches of what is left of A (Penke 2024).

    Args:
        a: real floating-point (..., m, n), any strides; unchanged.
        tolerance: bound on the residual, times ||A||_F where `relative`; 0 asks for full rank.
        block: columns added at a time.
        max_rank: rank cap; None: min(m, n).
        method: ``"right_looking"`` takes every block out of a copy of A and measures what is left, right
            to the floor of the dtype; ``"left_looking"`` only reads A and takes differences of norms,
            faster at ranks well below min(m, n), and right down to tolerances of 8 sqrt(u) (2e-3 in
            fp32, 8.4e-8 in fp64);
            ``"auto"`` takes the latter where it is right.
        sketch: ``"half_power"``, or ``"plain"`` (see `range_finder`), faster at a larger rank; of what is left.
        trim: compute `extra_blocks` more, then cut to the smallest rank within the tolerance; the basis
            columns are then ordered by the energy they keep.  Without it the rank is a multiple of the block.
        between: how a block is made orthogonal to those before it: ``"householder"`` or
            ``"gram_schmidt"`` (randQB, Martinsson and Voronin 2016).
        panel: the same within a block: ``"householder"``, ``"cholesky_qr"`` or ``"gram_schmidt"``
            (`ops.panel_qr`).  docs/range_finders.md compares them all.
        look_ahead: whether panels run beside trailing updates, on queues of their own (Penke and Herten
            2026); ``"right_looking"`` (``"auto"`` then takes it), with ``"plain"`` sketches and
            ``between="householder"``.  None: where that pays, on a GPU from 4096 x 4096 on, never on a CPU.
        implicit: return the basis as `reflector`, without forming it; with ``trim=False`` and
            ``between="householder"``.
        nonfinite, seed, key, refresh: as in `range_finder`.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
        FloatingPointError: for a NaN or infinite entry, with ``nonfinite="raise"``.
    """
    _check(a, nonfinite)
    basis, b, rank, residual, residuals, status, t = ops.adaptive_range_finder(
        a,
        tolerance,
        relative=relative,
        block=block,
        max_rank=max_rank,
        method=method,
        sketch=sketch,
        trim=trim,
        extra_blocks=extra_blocks,
        between=between,
        panel=panel,
        look_ahead=look_ahead,
        implicit=implicit,
        seed=seed,
        key=key,
        refresh=refresh,
    )
    if nonfinite == "raise":
        _raise_nonfinite(status)
    largest = int(rank.max()) if rank.numel() else 0
    if largest < basis.shape[-1]:  # not the whole buffers, as wide as the cap
        basis, b = basis[..., :largest].mT.contiguous().mT, b[..., :largest, :].contiguous()
    reflector = BlockReflector(basis, t[..., :largest, :largest]) if implicit else None
    explicit = None if implicit else basis
    if a.dim() > 2:
        return RangeFinderResult(explicit, b, rank, residual, residuals, status, reflector)
    blocks = residuals[residuals.isfinite()].tolist()
    ended = Status(int(status))
    return RangeFinderResult(explicit, b, largest, residual.item(), blocks, ended, reflector)


def _one_of(rank: int | None, tolerance: float | None, name: str) -> None:
    if (rank is None) == (tolerance is None):
        raise ValueError(f"exactly one of {name} ({rank}) and tolerance ({tolerance}) must be given")


def qb(
    a: Tensor, rank: int | None = None, *, tolerance: float | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A nearly as Q B: Q (..., m, r) with orthonormal columns, B = Q^T A (..., r, n).

    Args:
        a: real floating-point (..., m, n).
        rank: r, by half a power step (`range_finder`); or
        tolerance: the smallest r with ||A - Q B||_F <= tolerance ||A||_F (`adaptive_range_finder`); of a
            batch the largest, zeros where a matrix needs fewer.
        seed: of the test matrix.

    Raises:
        ValueError: unless exactly one of rank and tolerance is given; as the range finders.
        FloatingPointError: for a NaN or infinite entry.
    """
    _one_of(rank, tolerance, "rank")
    if rank is not None:
        found = range_finder(a, rank, nonfinite="raise", seed=seed)
    else:
        assert tolerance is not None
        found = adaptive_range_finder(a, tolerance, nonfinite="raise", seed=seed)
    assert found.coefficients is not None
    return found.basis, found.coefficients


def svd_lowrank(
    A: Tensor,
    q: int | None = None,
    niter: int = 2,
    M: Tensor | None = None,
    *,
    tolerance: float | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.svd_lowrank`` on this package's range finders: U, S, V with A nearly U diag(S) V^T.

    Takes what that takes, but for sparse and complex matrices, and is not differentiable; the same arguments
    give the same result, whatever the state of torch's generator.

    Args:
        A: real floating-point (..., m, n).
        q: number of singular values; None, without a tolerance: min(6, m, n).
        niter: power steps, as torch counts them.
        M: subtracted from A first, (..., m, n) or broadcasting to it.
        tolerance: instead of q, the smallest number with ||A - U diag(S) V^T||_F <= tolerance ||A||_F;
            niter is then without use.  Of a batch the largest, with singular values 0 where fewer do.
        seed: of the test matrix.

    Returns:
        U (..., m, q), S (..., q) descending, V (..., n, q); fp64 for fp64 input, else fp32.

    Raises:
        ValueError: where both q and tolerance are given; as the range finders.
        FloatingPointError: for a NaN or infinite entry.
    """
    a = A if M is None else A - M
    if niter < 0:
        raise ValueError(f"Invalid niter: {niter} (must not be negative)")
    if tolerance is None:
        smaller = min(a.shape[-2:]) if a.dim() >= 2 else 0  # the range finder refuses what is no matrix
        if q is not None and smaller and not 1 <= q <= smaller:
            raise ValueError(f"Invalid q: {q} (must be from 1 to {smaller}, the smaller side)")
        rank = min(6, smaller) if q is None else q
        sketch = "power" if niter else "plain"
        found = range_finder(a, rank, sketch=sketch, power=niter, nonfinite="raise", seed=seed)
    else:
        _one_of(q, tolerance, "q")
        found = adaptive_range_finder(a, tolerance, nonfinite="raise", seed=seed)
    assert found.coefficients is not None
    return ops.svd_of_product(found.basis, found.coefficients)
