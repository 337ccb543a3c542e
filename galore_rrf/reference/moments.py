"""Moments: rotated into another basis, and in 8-bit codes."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_moments(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    basis: Tensor,
    new_basis: Tensor,
    side: int,
    bias_correction1: float,
    bias_correction2: float,
) -> tuple[Tensor, Tensor]:
    """LDAdam's rule (Robert et al. 2024): m <- S m, v <- |S^2 (v - m^2) + (S m)^2| with S = Q_new^T Q_old."""
    s = new_basis.mT.to(exp_avg.dtype) @ basis.to(exp_avg.dtype)
    m, v = exp_avg / bias_correction1, exp_avg_sq / bias_correction2
    if side == 0:
        m, v = m.mT, v.mT
    new_m = s @ m
    new_v = (s.square() @ (v - m.square()) + new_m.square()).abs()
    if side == 0:
        new_m, new_v = new_m.mT, new_v.mT
    return new_m * bias_correction1, new_v * bias_correction2


def dynamic_code(is_signed: bool) -> Tensor:
    """The 256 values of the 8-bit codes, ascending (Dettmers et al. 2022): in each of seven decades below 1 the
    middles of equal parts, twice as many as in the decade before; 0 and 1."""
    positive = [torch.zeros(1, dtype=torch.float64)]
    for k in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (k if is_signed else k + 1) + 1, dtype=torch.float64)
        positive.append(10.0 ** (k - 6) * (edges[:-1] + edges[1:]) / 2)
    positive.append(torch.ones(1, dtype=torch.float64))
    values = torch.cat(positive)
    return torch.cat((-values[1:-1].flip(0), values)).float() if is_signed else values.float()


def quantize_moment(moment: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest codes of entries over the largest magnitude of their block of 256, and those magnitudes."""
    pieces = moment.flatten(1) if moment.dim() == 3 else moment.reshape(1, -1)
    padded = torch.nn.functional.pad(pieces.float(), (0, -pieces.shape[1] % 256)).unflatten(1, (-1, 256))
    scale = padded.abs().amax(-1).clamp(max=torch.finfo(torch.float32).max)
    relative = padded / torch.where(scale == 0, 1, scale).unsqueeze(-1)
    magnitudes = dynamic_code(is_signed)[127 if is_signed else 0 :]
    codes = torch.bucketize(relative.abs(), (magnitudes[1:] + magnitudes[:-1]) / 2)
    if is_signed:  # -1 is no code
        codes = torch.where(relative < 0, 127 - codes.clamp(max=127), 127 + codes)
    else:  # a variance must not vanish beside a mean that does not
        codes = torch.where((codes == 0) & (relative > 0), 1, codes)
    codes = codes.to(torch.uint8)
    codes = codes.flatten(1)[:, : pieces.shape[1]].reshape(moment.shape)
    return codes, scale if moment.dim() == 3 else scale[0]


def dequantize_moment(codes: Tensor, scale: Tensor, is_signed: bool) -> Tensor:
    """The values of the codes, times the scale of their block."""
    pieces = codes.flatten(1) if codes.dim() == 3 else codes.reshape(1, -1)
    scales = scale.reshape(len(pieces), -1).repeat_interleave(256, dim=1)[:, : pieces.shape[1]]
    return (dynamic_code(is_signed)[pieces.long()] * scales).reshape(codes.shape)
