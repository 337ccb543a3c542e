"""The two-sided projection, ``proj_type="full"``: R = P^T G Q, a basis for each side, moments r x r.

Made of the operators of the one-sided one, a parameter at a time: two range finders, a rotation for each side, the
plain step of moments this small.  Stacks (e, m, n) are batches throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_rrf import moments, ops
from galore_rrf.subspace import (
    LEFT,
    RIGHT,
    SubspaceOptions,
    as_matrices,
    compute_dtype,
    rank_of,
    refresh_due,
    sketched,
)

BASES = ("basis", "basis_right")


def step(
    p: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    options: SubspaceOptions,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    **adamw: Any,
) -> None:
    """One projected AdamW step of a parameter, with a refresh where one is due.

    A gradient that is not finite leaves all as it was; a zero one without bases yet decays the weight alone.
    """
    weight, g = as_matrices(p), as_matrices(grad).to(compute_dtype(p))
    rank = rank_of(p, options) or state["rank"]
    found = (
        find(state, g, rank, options)
        if refresh_due(state, int(state["step"]), options.update_proj_gap)
        else None
    )
    if found is None and not state["refreshes"]:
        if not bool(g.any()):
            weight.mul_(1 - lr * weight_decay)
            _write(p, weight)
        return
    bases = found or _bases(state, g.dtype)
    projected = _project(bases, g)
    if not bool(projected.isfinite().all()):
        return
    mean, square = (moments.values(state, name).to(g.dtype) for name in moments.NAMES)
    if found is not None:
        if not state["refreshes"] and rank != state["rank"]:
            mean, square = torch.zeros_like(projected), torch.zeros_like(projected)
        if state["refreshes"] and (options.moments == "rotate" or rank != state["rank"]):
            taken = float(state["step"])
            for side, old, new in zip((LEFT, RIGHT), _bases(state, g.dtype), bases, strict=True):
                mean, square = ops.rotate_moments(
                    mean, square, old, new, side, 1 - betas[0] ** taken, 1 - betas[1] ** taken
                )
        for name, basis in zip(BASES, bases, strict=True):
            state[name] = basis.to(p.dtype)
        state["rank"] = rank
        state["refreshes"] += 1
        state["last_refresh"] = int(state["step"])
    update = torch.zeros_like(projected)
    ops.adamw_(
        [update],
        [projected],
        [mean],
        [square],
        [state["step"]],
        lr=lr * options.scale,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        arithmetic=options.arithmetic,
        **adamw,
    )
    for name, moment in zip(moments.NAMES, (mean, square), strict=True):
        state |= moments.kept(name, moment, state[name].dtype)
    decay = 1 - lr * weight_decay
    left, right = _bases(state, g.dtype)
    stepped = weight.to(g.dtype)  # itself where it is of that dtype
    add_product_ = stepped.addmm_ if stepped.dim() == 2 else stepped.baddbmm_
    add_product_(left, update @ right.mT, beta=decay, alpha=1 if options.arithmetic == "torch" else decay)
    if stepped is not weight:
        weight.copy_(stepped)
    _write(p, weight)


def find(
    state: Mapping[str, Any], grad: Tensor, rank: int, options: SubspaceOptions
) -> tuple[Tensor, Tensor] | None:
    """New bases of both sides, in the compute dtype; None for a gradient that is zero or not finite."""
    if options.projector == "svd":
        if not bool(grad.any()) or not bool(grad.isfinite().all()):
            return None
        single = options.arithmetic != "torch" or grad.dtype != torch.float64
        u, _, vh = torch.linalg.svd(grad.float() if single else grad, full_matrices=False)
        return u[..., :rank].to(grad.dtype).contiguous(), vh[..., :rank, :].mT.to(grad.dtype).contiguous()
    known = state["refreshes"] > 0
    bases = []
    for i, (name, a) in enumerate(zip(BASES, (grad, grad.mT), strict=True)):
        found = sketched(
            a,
            rank,
            options,
            previous=state[name] if known else None,
            key=state["key"],
            refresh=2 * state["refreshes"] + i,
            coefficients=False,
        )
        if found is None:
            return None
        basis, _ = found
        # Singular vectors have no sign: each column gets the one that goes with the previous column.
        if known and options.moments == "keep" and rank == state["rank"]:
            basis = basis * torch.where((basis * state[name]).sum(-2, keepdim=True) < 0, -1, 1)
        bases.append(basis)
    return bases[0], bases[1]


def project(state: Mapping[str, Any], grad: Tensor) -> Tensor:
    """R = P^T G Q in the state's bases."""
    return _project(_bases(state, grad.dtype), grad)


def back_projected(state: Mapping[str, Any], update: Tensor) -> Tensor:
    """P N Q^T of an update N (r x r)."""
    left, right = _bases(state, update.dtype)
    return left @ (update @ right.mT)


def _bases(state: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return state["basis"].to(dtype), state["basis_right"].to(dtype)


def _project(bases: tuple[Tensor, Tensor], grad: Tensor) -> Tensor:
    return (bases[0].mT @ grad @ bases[1]).contiguous()


def _write(p: Tensor, weight: Tensor) -> None:
    if weight.data_ptr() != p.data_ptr():  # unfolded from a layout that has no view as a matrix
        p.copy_(weight.view(p.shape))
