"""Gaussian test matrices by counter-based random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def philox4x32_10(counter: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter of four words (Salmon et al. 2011), all int64 below 2^32.

    A 32 x 32 bit product wraps in int64, but its 64 bits are those of the unsigned product.
    """
    x0, x1, x2, x3 = counter
    key0, key1 = seed & _WORD, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (
            ((p1 >> 32) & _WORD) ^ x1 ^ key0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ x3 ^ key1,
            p0 & _WORD,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return x0, x1, x2, x3


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals in fp64; u alone is rounded to fp32.  The operator computes in fp32 throughout."""
    u = (radius_word.to(torch.float32).double() * 2.0**-32 + 2.0**-33).to(torch.float32).double()
    radius = torch.sqrt(-2 * torch.log(u))
    angle = 2 * math.pi * 2.0**-32 * angle_word.double()
    return radius * torch.cos(angle), radius * torch.sin(angle)


def gaussian_sketch(
    rows: int,
    cols: int,
    *,
    seed: int,
    key: int = 0,
    refresh: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Part of a Gaussian test matrix: Philox words to the bit, Box-Muller in fp64, cast to `dtype`."""
    row = torch.arange(row_offset, row_offset + rows)
    counter = torch.broadcast_tensors(
        row[:, None] // 4,
        torch.arange(col_offset, col_offset + cols)[None, :],
        torch.tensor(key),
        torch.tensor(refresh),
    )
    words = philox4x32_10(counter, seed)
    normals = torch.stack([*_box_muller(*words[:2]), *_box_muller(*words[2:])])  # 4 x rows x cols
    result = normals.gather(0, (row % 4)[None, :, None].expand(1, rows, cols))[0]
    return result.to(dtype=dtype or torch.get_default_dtype(), device=device)
