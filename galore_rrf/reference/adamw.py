"""The optimizer's step, plain and projected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from galore_rrf.reference.moments import dequantize_moment, quantize_moment, rotate_moments
from galore_rrf.reference.panels import compute_dtype
from galore_rrf.reference.range_finders import CONVERGED, ZERO, range_finder

SKIPPED, DECAYED, STEPPED, REFRESHED = range(4)  # the outcome of a step


class _Stored:
    """Both moments of a parameter as they are computed with, and the way back to how they are kept."""

    def __init__(
        self, mean: Tensor, square: Tensor, scales: tuple[Tensor | None, Tensor | None], dtype: torch.dtype
    ) -> None:
        self.kept = [(mean, scales[0], True), (square, scales[1], False)]
        self.mean, self.square = (
            values.to(dtype) if scale is None else dequantize_moment(values, scale, is_signed).to(dtype)
            for values, scale, is_signed in self.kept
        )

    def write(self) -> None:
        for (values, scale, is_signed), moment in zip(self.kept, (self.mean, self.square), strict=True):
            if scale is None:
                values.copy_(moment)
            else:
                codes, new_scale = quantize_moment(moment, is_signed)
                values.copy_(codes)
                scale.copy_(new_scale)


def _scales(
    values: Tensor, i: int, lists: tuple[Sequence[Tensor] | None, Sequence[Tensor] | None]
) -> tuple[Tensor | None, Tensor | None]:
    """Of parameter i, where its moments are coded."""
    first, second = (None if scales is None or values.dtype != torch.uint8 else scales[i] for scales in lists)
    return first, second


def _direction(
    r: Tensor,
    m: Tensor,
    v: Tensor,
    t: float,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
    correct_bias: bool,
    arithmetic: str,
) -> Tensor:
    """Moves the moments by a gradient and returns what Adam makes of them at step t."""
    r = -r if maximize else r
    m.copy_(beta1 * m + (1 - beta1) * r)
    v.copy_(beta2 * v + (1 - beta2) * r * r)
    correction1, correction2 = (1 - beta1**t, 1 - beta2**t) if correct_bias else (1.0, 1.0)
    if arithmetic == "galore_torch":  # eps beside the uncorrected root
        return m * (math.sqrt(correction2) / correction1) / (v.sqrt() + eps)
    return (m / correction1) / ((v / correction2).sqrt() + eps)


def _decay_and_update(w: Tensor, update: Tensor, decay: float, arithmetic: str) -> None:
    if arithmetic == "torch":
        w.copy_(decay * w.to(update.dtype) - update)
    else:  # decay last
        w.copy_(decay * (w.to(update.dtype) - update))


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    correct_bias: bool = True,
    arithmetic: str = "torch",
) -> None:
    """One AdamW step (Loshchilov and Hutter 2019), in place."""
    for i, w in enumerate(params):
        stored = _Stored(
            exp_avgs[i].view(-1),
            exp_avg_sqs[i].view(-1),
            _scales(exp_avgs[i], i, (exp_avg_scales, exp_avg_sq_scales)),
            compute_dtype(w),
        )
        t = float(steps[i].add_(1))
        g = grads[i].to(stored.mean.dtype).reshape(-1)
        n = _direction(
            g, stored.mean, stored.square, t, beta1, beta2, eps, maximize, correct_bias, arithmetic
        )
        _decay_and_update(w, lr * n.view(w.shape), 1 - lr * weight_decay, arithmetic)
        stored.write()


def _of_matrices(param: Tensor, state: Tensor | None) -> list[Tensor]:
    """A parameter's residual state by matrices; zeros where it has none."""
    count = len(param) if param.dim() == 3 else 1
    if state is None or state.shape == (0,):
        return [param.new_zeros(())] * count
    return list(state) if param.dim() == 3 else [state]


def _root_mean_square(a: Tensor, dim: int | None) -> Tensor:
    return a.square().mean(dim, keepdim=dim is not None).sqrt()


def _rounding(r: Tensor, g: Tensor, q: Tensor) -> float:
    """||E|| / ||R|| of an E that is but rounding: of the products, and of gradient and basis as they are kept."""
    products, *stored = (torch.finfo(x.dtype).eps / 2 for x in (r, g, q))
    return 64 * products + 2 * max(stored)


def _orthogonalized(a: Tensor) -> Tensor:
    """Two steps of Newton and Schulz towards the orthogonal polar factor, on the singular values themselves."""
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    s = s / s.pow(4).sum().pow(1 / 4)  # the root of ||A A^T||_F
    for _ in range(2):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vh * math.sqrt(max(a.shape))


def projected_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    bases: Sequence[Tensor],
    steps: Sequence[Tensor],
    coefficients: Sequence[Tensor | None],
    sides: Sequence[int],
    keys: Sequence[int],
    refreshes: Sequence[int],
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    maximize: bool = False,
    correct_bias: bool = True,
    arithmetic: str = "torch",
    sketch: str = "warm",
    power: int = 1,
    oversampling: int = 0,
    moments: str = "rotate",
    seed: int = 0,
    residual: str = "drop",
    residual_scale: float = 1.0,
    residual_states: Sequence[Tensor] | None = None,
    refresh_at: str = "start",
) -> Tensor:
    """One step of GaLore's projected AdamW (Zhao et al. 2024, algorithm 2) for every matrix, in place."""

    def new_subspace(g: Tensor, q: Tensor, known: bool, key: int, refresh: int) -> tuple[Tensor, Tensor, int]:
        found, b, _, status = range_finder(
            g,
            q.shape[-1],
            oversampling=oversampling,
            sketch="half_power" if sketch == "warm" and not known else sketch,
            power=power,
            warm=q if sketch == "warm" and known else None,
            ordered=moments == "keep",
            seed=seed,
            key=key,
            refresh=refresh,
        )
        if known and moments == "keep":  # singular vectors have no sign: that of the previous ones
            signs = torch.where((found * q).sum(0) < 0, -1, 1)
            found, b = found * signs, b * signs.unsqueeze(1)
        return found, b, int(status)

    def step(
        tensors: Sequence[Tensor], given: Tensor | None, t: float, side: int, key: int, refresh: int
    ) -> int:
        w, g, m, v, q, kept = tensors
        dtype = compute_dtype(w)

        def back(x: Tensor, q: Tensor = q) -> Tensor:
            return x @ q.to(dtype).mT if side == 0 else q.to(dtype) @ x

        if residual == "feedback":
            g = g + residual_scale * kept
        known = bool(q.any())
        at_end = refresh_at == "end" and refresh > 0 and known and given is None
        new_q, outcome = None, STEPPED
        if given is not None:  # of a refresh made elsewhere
            r, outcome = given.to(dtype), REFRESHED
        elif not known or (refresh >= 0 and not at_end):
            new_q, r, status = new_subspace(g.mT if side == 0 else g, q, known, key, max(refresh, 0))
            r = r.mT if side == 0 else r
            outcome = REFRESHED
            if status == ZERO:
                new_q, outcome = None, STEPPED if known else DECAYED
        else:
            r = g.to(dtype) @ q.to(dtype) if side == 0 else q.to(dtype).mT @ g.to(dtype)

        decay = 1 - lr * weight_decay
        if not (g.isfinite().all() and r.isfinite().all()):
            return SKIPPED
        if outcome == DECAYED:
            w.mul_(decay)
            return DECAYED
        if moments == "reset" and outcome == REFRESHED:
            t = 0
        if new_q is not None:
            before = back(m)
            move(tensors, new_q, known, t, side)
            if residual == "feedback" and known and moments == "rotate" and t > 0:
                lost = (before - back(m)) * (-1 if maximize else 1) * beta1 / (1 - beta1)
                g = g + (residual_scale * lost).to(g.dtype)
        n = _direction(r, m, v, t + 1, beta1, beta2, eps, maximize, correct_bias, arithmetic)

        update = back(n)
        outside = g.to(dtype) - back(r)
        if residual == "sign":
            update += residual_scale * (-outside if maximize else outside).sign()
        elif residual == "normalized":
            least = _rounding(r, g, q) * _root_mean_square(back(r), None)
            s = torch.where(_root_mean_square(outside, side - 1) > least, outside, 0)
            for dim in (side - 1, side) * 2:
                lengths = _root_mean_square(s, dim)
                s = torch.where(lengths > 0, s / lengths, 0)
            update += residual_scale * (-s if maximize else s)
        elif residual == "orthogonalized":
            least = _rounding(r, g, q) * r.norm()
            s = _orthogonalized(outside) if outside.norm() > least else torch.zeros_like(outside)
            update += residual_scale * (-s if maximize else s)
        elif residual == "scaled":
            lengths = r.norm(dim=side - 1, keepdim=True)
            phi = torch.where(lengths > 0, n.norm(dim=side - 1, keepdim=True) / lengths, 0)
            s = (-outside if maximize else outside) * phi
            norm = s.norm()
            if 0 < 1.01 * kept < norm:
                s *= 1.01 * kept / norm
            if norm > 0:
                kept.copy_(s.norm())
            update += residual_scale * s
        elif residual == "feedback":
            kept.copy_(outside).nan_to_num_(0, 0, 0)  # an entry that the dtype cannot hold is forgotten
        _decay_and_update(w, lr * scale * update, decay, arithmetic)
        if at_end:
            new_q, _, status = new_subspace(g.mT if side == 0 else g, q, known, key, refresh)
            if status == CONVERGED:
                move(tensors, new_q, known, t + 1, side)
                outcome = REFRESHED
        return outcome

    def move(tensors: Sequence[Tensor], new_q: Tensor, known: bool, t: float, side: int) -> None:
        _, _, m, v, q, _ = tensors
        if moments == "reset":
            m.zero_()
            v.zero_()
        elif known and moments == "rotate" and t > 0:
            rotated = rotate_moments(m, v, q, new_q, side, 1 - beta1**t, 1 - beta2**t)
            m.copy_(rotated[0])
            v.copy_(rotated[1])
        q.copy_(new_q)

    def matrices(x: Tensor) -> list[Tensor]:
        return list(x if x.dim() == 3 else x.unsqueeze(0))

    result = []
    for i, param in enumerate(params):
        stored = _Stored(
            exp_avgs[i],
            exp_avg_sqs[i],
            _scales(exp_avgs[i], i, (exp_avg_scales, exp_avg_sq_scales)),
            compute_dtype(param),
        )
        tensors = list(
            zip(
                *map(matrices, (param, grads[i], stored.mean, stored.square, bases[i])),
                _of_matrices(param, None if residual_states is None else residual_states[i]),
                strict=True,
            )
        )
        given = coefficients[i]
        outcomes = [
            step(
                mine,
                None if given is None else matrices(given)[j],
                float(steps[i]),
                sides[i],
                keys[i] + j,
                refreshes[i],
            )
            for j, mine in enumerate(tensors)
        ]
        # A stack keeps one clock, and has refreshed or stepped if any of its matrices has.
        outcome = next((o for o in (REFRESHED, STEPPED, DECAYED) if o in outcomes), SKIPPED)
        if moments == "reset" and outcome == REFRESHED:
            steps[i].zero_()
            for (_, _, m, v, _, _), mine in zip(tensors, outcomes, strict=True):
                if mine != REFRESHED:
                    m.zero_()
                    v.zero_()
        if outcome in (STEPPED, REFRESHED):
            steps[i].add_(1)
            stored.write()
        result.append(outcome)
    return torch.tensor(result, dtype=torch.uint8)
