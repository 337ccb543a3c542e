"""Fakes of the operators: shapes and dtypes for torch.compile, from the arguments alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from galore_rrf import _binding  # noqa: F401  (loads the operators)


def _compute_dtype(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


@torch.library.register_fake("galore_rrf::gaussian_sketch")
def _(rows: int, cols: int, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    return torch.empty(rows, cols, dtype=dtype, device=device)


def _column_major(a: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Empty (..., rows, cols), as LAPACK lays matrices out."""
    *batch, rows, cols = shape
    return a.new_empty((*batch, cols, rows), dtype=dtype or _compute_dtype(a)).mT


@torch.library.register_fake("galore_rrf::range_finder")
def _(a: Tensor, rank: int, *, coefficients: bool = True, **_: Any) -> tuple[Tensor, ...]:
    *batch, m, n = a.shape
    return (
        _column_major(a, *batch, m, rank),
        a.new_empty((*batch, rank if coefficients else 0, n), dtype=_compute_dtype(a)),
        a.new_empty(batch, dtype=torch.float64),
        a.new_empty(batch, dtype=torch.uint8),
    )


def _adaptive_shapes(
    a: Tensor, max_rank: int | None, block: int, sketch: str, trim: bool, extra_blocks: int, implicit: bool
) -> tuple[int, int]:
    """Rank cap, and blocks at most (`block_cap` in csrc/range_finder/adaptive.cpp)."""
    m, n = a.shape[-2:]
    block = min(block, n) if sketch == "half_power" else block
    cap = min(m, n) if max_rank is None else min(m, n, max_rank)
    full = min(m, n + 16) if m > n and not implicit else min(m, n)
    columns = full if cap == min(m, n) else min(full, cap + (extra_blocks * block if trim else 0))
    return cap, (columns + block - 1) // block


@torch.library.register_fake("galore_rrf::adaptive_range_finder")
def _(
    a: Tensor,
    tolerance: float,
    *,
    block: int = 64,
    max_rank: int | None = None,
    sketch: str = "half_power",
    trim: bool = True,
    extra_blocks: int = 1,
    implicit: bool = False,
    **_: Any,
) -> tuple[Tensor, ...]:
    *batch, m, n = a.shape
    cap, blocks = _adaptive_shapes(a, max_rank, block, sketch, trim, extra_blocks, implicit)
    dtype, t = _compute_dtype(a), cap if implicit else 0
    return (
        _column_major(a, *batch, m, cap),
        a.new_empty((*batch, cap, n), dtype=dtype),
        a.new_empty(batch, dtype=torch.int64),
        a.new_empty(batch, dtype=torch.float64),
        a.new_empty((*batch, blocks), dtype=torch.float64),
        a.new_empty(batch, dtype=torch.uint8),
        a.new_empty((*batch, t, t), dtype=dtype),
    )


@torch.library.register_fake("galore_rrf::adaptive_range_finders")
def _(matrices: Sequence[Tensor], tolerance: float, max_rank: int, *_: Any, **__: Any) -> tuple[Any, ...]:
    caps = [min(*a.shape[-2:], max_rank) for a in matrices]
    sized = list(zip(matrices, caps, strict=True))
    return (
        [_column_major(a, *a.shape[:-1], cap) for a, cap in sized],
        [a.new_empty((*a.shape[:-2], cap, a.shape[-1]), dtype=_compute_dtype(a)) for a, cap in sized],
        [a.new_empty(a.shape[:-2], dtype=torch.int64) for a in matrices],
        [a.new_empty(a.shape[:-2], dtype=torch.uint8) for a in matrices],
    )


@torch.library.register_fake("galore_rrf::panel_qr")
def _(panel: Tensor, **_: Any) -> tuple[Tensor, ...]:
    *batch, p, w = panel.shape
    k = min(p, w)
    return tuple(_column_major(panel, *batch, *size) for size in ((p, k), (k, k), (k, w)))


@torch.library.register_fake("galore_rrf::orthonormal_panel")
def _(panel: Tensor, **_: Any) -> tuple[Tensor, ...]:
    *batch, p, w = panel.shape
    k = min(p, w)
    q, r = (_column_major(panel, *batch, *size) for size in ((p, k), (k, w)))
    return q, r, panel.new_empty(batch, dtype=torch.bool)


@torch.library.register_fake("galore_rrf::householder_reconstruction")
def _(q: Tensor) -> tuple[Tensor, ...]:
    *batch, p, w = q.shape
    v, t = (_column_major(q, *batch, *size) for size in ((p, w), (w, w)))
    return v, t, q.new_empty((*batch, w), dtype=_compute_dtype(q))


@torch.library.register_fake("galore_rrf::apply_block_reflector")
def _(v: Tensor, t: Tensor, a: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.register_fake("galore_rrf::explicit_basis")
def _(v: Tensor, t: Tensor) -> Tensor:
    return _column_major(v, *v.shape)


@torch.library.register_fake("galore_rrf::svd_of_product")
def _(basis: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
    *batch, m, r = basis.shape
    u, v = (_column_major(basis, *batch, rows, r) for rows in (m, coefficients.shape[-1]))
    return u, basis.new_empty((*batch, r)), v


@torch.library.register_fake("galore_rrf::projected_adamw_")
def _(params: Sequence[Tensor], *_: Any, **__: Any) -> Tensor:
    return torch.empty(len(params), dtype=torch.uint8, device=params[0].device if params else None)


@torch.library.register_fake("galore_rrf::adamw_")
def _(*_: Any, **__: Any) -> None:
    return None


@torch.library.register_fake("galore_rrf::quantize_moment")
def _(moment: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    shape = moment.shape
    stack = shape[:1] if len(shape) == 3 else ()
    blocks = (moment[0] if stack else moment).numel() + 255
    return moment.new_empty(shape, dtype=torch.uint8), moment.new_empty(
        (*stack, blocks // 256), dtype=torch.float32
    )


@torch.library.register_fake("galore_rrf::dequantize_moment")
def _(codes: Tensor, scale: Tensor, is_signed: bool) -> Tensor:
    return scale.new_empty(codes.shape)


@torch.library.register_fake("galore_rrf::rotate_moments")
def _(
    exp_avg: Tensor, exp_avg_sq: Tensor, basis: Tensor, new_basis: Tensor, side: int, *_: Any
) -> tuple[Tensor, Tensor]:
    shape = list(exp_avg.shape)
    shape[-1 if side == 0 else -2] = new_basis.shape[-1]
    return exp_avg.new_empty(shape), exp_avg.new_empty(shape)
