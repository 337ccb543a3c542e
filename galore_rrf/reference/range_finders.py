"""The range finders, at a fixed rank and to a tolerance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from galore_rrf.reference.panels import compute_dtype, orth, panel_qr
from galore_rrf.reference.sketch import gaussian_sketch

CONVERGED, RANK_CAP, FLOOR, ZERO, NONFINITE = range(5)  # the status of a range finder

_UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def _scale(a: Tensor, exponent: int) -> Tensor:
    """2^exponent a, in two steps since one factor may overflow."""
    half = exponent // 2
    return a * 2.0**half * 2.0 ** (exponent - half)


def _by_energy(q: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q U, U^T B and the squared singular values of B, U its left singular vectors (signs are arbitrary)."""
    u, sigma, _ = torch.linalg.svd(b.double(), full_matrices=False)
    return q @ u.to(q.dtype), (u.mT @ b.double()).to(b.dtype), sigma.square()


def _relative_residual(a: Tensor, q: Tensor, b: Tensor) -> float:
    a = a.double()
    return float(torch.linalg.norm(a - q.double() @ b.double()) / torch.linalg.norm(a))


def _fixed_rank(
    a: Tensor,
    rank: int,
    oversampling: int,
    sketch: str,
    power: int,
    warm: Tensor | None,
    ordered: bool,
    seed: int,
    key: int,
    refresh: int,
) -> tuple[Tensor, Tensor, float, int]:
    """Algorithms 4.1 (plain) and 4.4 (power) of Halko, Martinsson, Tropp 2011; half a power step."""
    m, n = a.shape
    dtype = compute_dtype(a)
    largest = float(a.abs().max())
    q, b = torch.zeros(m, rank, dtype=dtype), torch.zeros(rank, n, dtype=dtype)
    if not math.isfinite(largest):
        return q, b, math.nan, NONFINITE
    if largest == 0:
        return q.fill_diagonal_(1), b, 0.0, ZERO
    exponent = math.frexp(largest)[1]
    a = _scale(a.to(dtype), -exponent)

    width = min(rank + oversampling, m, n)

    def omega(rows: int, first: int = 0) -> Tensor:
        return gaussian_sketch(
            rows, width - first, seed=seed, key=key, refresh=refresh, col_offset=first, dtype=dtype
        )

    if sketch in ("half_power", "warm"):
        left = omega(m)
        if sketch == "warm":
            assert warm is not None
            known = warm[:, :width].to(dtype)
            left = torch.cat([known, omega(m, known.shape[1])], 1)
            if not (a.mT @ left).any():  # the previous basis is orthogonal to all of a
                left = omega(m)
        y = a @ orth(a.mT @ left)
    else:
        y = a @ omega(n)
        for _ in range(power if sketch == "power" else 0):
            y = a @ orth(a.mT @ orth(y))

    q = orth(y)
    b = q.mT @ a
    if ordered or width > rank:
        q, b, _ = _by_energy(q, b)
        q, b = q[:, :rank], b[:rank]
    return q, _scale(b, exponent), _relative_residual(a, q, b), CONVERGED


def range_finder(
    a: Tensor,
    rank: int,
    *,
    oversampling: int = 0,
    sketch: str = "half_power",
    power: int = 1,
    warm: Tensor | None = None,
    coefficients: bool = True,
    ordered: bool = False,
    panel: str = "auto",
    seed: int = 0,
    key: int = 0,
    refresh: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fixed-rank range finder of every matrix of a batch; `panel` makes no difference here."""
    *batch, m, n = a.shape
    matrices = a.reshape(-1, m, n)
    previous = [None] * len(matrices) if warm is None else list(warm.reshape(-1, m, warm.shape[-1]))
    found = [
        _fixed_rank(x, rank, oversampling, sketch, power, w, ordered, seed, key + i, refresh)
        for i, (x, w) in enumerate(zip(matrices, previous, strict=True))
    ]
    q, b, residual, status = map(list, zip(*found, strict=True))
    kept = rank if coefficients else 0
    if not coefficients:
        residual = [r if code == ZERO else math.nan for r, code in zip(residual, status, strict=True)]
    return (
        torch.stack(q).view(*batch, m, rank),
        torch.stack(b)[:, :kept].view(*batch, kept, n),
        torch.tensor(residual, dtype=torch.float64).view(batch),
        torch.tensor(status, dtype=torch.uint8).view(batch),
    )


def _adaptive(
    a: Tensor,
    tolerance: float,
    relative: bool,
    block: int,
    max_rank: int,
    sketch: str,
    trim: bool,
    extra_blocks: int,
    columns: int,
    seed: int,
    key: int,
    refresh: int,
    min_rank: int,
    multiple: int,
) -> tuple[Tensor, Tensor, float, list[float], int]:
    """One matrix, by deflation (randQB, Martinsson and Voronin 2016).

    Penke's Householder form (2024) sketches the trailing rows of H_k ... H_1 A, which are (I - Q Q^T) A in
    another basis of the complement of Q: with the plain sketch every block spans the same space here, with
    half a power step only one of the same quality, since its left test matrix meets other coordinates.
    """
    m, n = a.shape
    dtype = compute_dtype(a)
    largest = float(a.abs().max())
    q, b = torch.zeros(m, 0, dtype=dtype), torch.zeros(0, n, dtype=dtype)
    if not math.isfinite(largest):
        return q, b, math.nan, [], NONFINITE
    if largest == 0:
        return q, b, 0.0, [], ZERO
    exponent = math.frexp(largest)[1]
    rest = _scale(a.to(dtype), -exponent)

    def energy(x: Tensor) -> float:
        return float(x.double().square().sum())

    total = energy(rest)
    tau = tolerance if relative else math.ldexp(tolerance, -exponent) / math.sqrt(total)
    threshold = tau**2 * total
    residuals: list[float] = []
    left = total

    def add_block() -> None:
        nonlocal q, b, rest, left
        new_columns = slice(q.shape[1], min(q.shape[1] + block, columns))
        width = new_columns.stop - new_columns.start
        rows = m if sketch == "half_power" else n
        omega = gaussian_sketch(
            rows, width, seed=seed, key=key, refresh=refresh, col_offset=new_columns.start, dtype=dtype
        )
        y = rest @ omega if sketch == "plain" else rest @ orth(rest.mT @ omega)
        if y.shape[1] < width:  # more columns than n: any will do
            y = torch.cat([y, omega[:, y.shape[1] :]], 1)
        new = orth(torch.cat([q, orth(y)], 1))[:, new_columns]  # reorthogonalised against the earlier blocks
        kept = new.mT @ rest
        rest = rest - new @ kept
        q, b = torch.cat([q, new], 1), torch.cat([b, kept])
        left = energy(rest)
        residuals.append(math.sqrt(left / total))

    while q.shape[1] < columns and (left > threshold or q.shape[1] < min_rank):
        add_block()
    trim = trim and left <= threshold
    for _ in range(extra_blocks if trim else 0):  # so that trimming comes close to the smallest rank
        if q.shape[1] < min(columns, m, n) and left > 0:
            add_block()

    if trim or q.shape[1] > max_rank:
        q, b, energies = _by_energy(q, b)
        rank, beyond = q.shape[1], left
        while rank > max_rank or (trim and rank > 0 and beyond + float(energies[rank - 1]) <= threshold):
            rank -= 1
            beyond += float(energies[rank])
        rank = min(max(min_rank, -(-rank // multiple) * multiple), max_rank, q.shape[1])
        left += float(energies[rank:].sum())
        q, b = q[:, :rank], b[:rank]
    short = FLOOR if tau < 200 * _UNIT_ROUNDOFF[dtype] else RANK_CAP
    status = CONVERGED if left <= threshold else short
    return q, _scale(b, exponent), math.sqrt(left / total), residuals, status


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
    seed: int = 0,
    key: int = 0,
    refresh: int = 0,
    min_rank: int = 0,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Adaptive range finder of every matrix of a batch (Penke 2024); the last two as of `adaptive_range_finders`.

    `method`, `between`, `panel` and `look_ahead` make no difference here, nor to what is found but for rounding.
    """
    *batch, m, n = a.shape
    cap = min(m, n) if max_rank is None else min(m, n, max_rank)
    # The last sketch of a tall matrix of full rank is square: a few columns more, trimmed off again.
    full = min(m, n + 16) if m > n and not implicit else min(m, n)
    block = min(block, n) if sketch == "half_power" else block
    columns = full if cap == min(m, n) else min(full, cap + (extra_blocks * block if trim else 0))
    matrices = a.reshape(-1, m, n)
    count, blocks, dtype = len(matrices), -(-columns // block), compute_dtype(a)
    basis = torch.zeros(count, m, cap, dtype=dtype)
    coefficients = torch.zeros(count, cap, n, dtype=dtype)
    rank = torch.zeros(count, dtype=torch.int64)
    residual = torch.zeros(count, dtype=torch.float64)
    residuals = torch.full((count, blocks), math.nan, dtype=torch.float64)
    status = torch.zeros(count, dtype=torch.uint8)
    factor = torch.zeros(count, cap if implicit else 0, cap if implicit else 0, dtype=dtype)
    for i, x in enumerate(matrices):
        q, b, residual[i], history, status[i] = _adaptive(
            x,
            tolerance,
            relative,
            block,
            cap,
            sketch,
            trim,
            extra_blocks,
            columns,
            seed,
            key + i,
            refresh,
            min(min_rank, cap),
            multiple,
        )
        r = rank[i] = q.shape[1]
        basis[i, :, :r], coefficients[i, :r] = q, b
        residuals[i, : len(history)] = torch.tensor(history, dtype=torch.float64)
        if implicit:
            basis[i, :, :r], factor[i, :r, :r], _ = panel_qr(q)
    return (
        basis.view(*batch, m, cap),
        coefficients.view(*batch, cap, n),
        rank.view(batch),
        residual.view(batch),
        residuals.view(*batch, blocks),
        status.view(batch),
        factor.view(*batch, *factor.shape[1:]),
    )


def adaptive_range_finders(
    matrices: Sequence[Tensor],
    tolerance: float,
    max_rank: int,
    keys: Sequence[int],
    refreshes: Sequence[int],
    *,
    block: int = 64,
    method: str = "auto",
    sketch: str = "half_power",
    seed: int = 0,
    min_rank: int = 0,
    multiple: int = 1,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Adaptive range finders of many matrices or stacks."""
    found = [
        adaptive_range_finder(
            a,
            tolerance,
            max_rank=max_rank,
            block=block,
            sketch=sketch,
            seed=seed,
            key=key,
            refresh=refresh,
            min_rank=min_rank,
            multiple=multiple,
        )
        for a, key, refresh in zip(matrices, keys, refreshes, strict=True)
    ]
    bases, coefficients, ranks, _, _, statuses, _ = map(list, zip(*found, strict=True))
    return bases, coefficients, ranks, statuses
