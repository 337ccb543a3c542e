"""Projections of several modes: of a gradient G the core R = G x_1 P^T x_2 Q^T ..., a basis for each projected mode.

``proj_type="full"`` projects both modes of a matrix, R = P^T G Q; ``"tucker"`` the long ones of a tensor with four
dimensions or more.  The bases are those of the sequentially truncated HOSVD (Vannieuwenhoven et al. 2012) with a
range finder in the place of each SVD: a mode is found in what those before it have left of G, and the last leaves
the core.

Made of the operators of the one-sided projection, a parameter at a time: a range finder and a rotation for each mode,
the plain step of moments as small as the core.  Modes are counted from the last, so stacks (e, m, n) of matrices are
batches throughout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from galore_rrf import moments, ops
from galore_rrf.diagnostics import squared_cosine
from galore_rrf.options import SubspaceOptions
from galore_rrf.refresh import sketched, unless_out_of_memory
from galore_rrf.subspace import (
    BOTH,
    LEFT,
    STATE_KEYS,
    bases_of,
    compute_dtype,
    modes_of,
    projected_form,
    rank_of,
)


def step(
    p: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    options: SubspaceOptions,
    *,
    due: bool,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    **adamw: Any,
) -> float:
    """One projected AdamW step of a parameter, with a refresh where one is `due`; returns the seconds of that.

    A gradient that is not finite leaves all as it was; a zero one without bases yet decays the weight alone.
    """
    weight, g = (projected_form(x, state["side"]) for x in (p, grad))
    g = g.to(compute_dtype(p))
    rank = rank_of(p, options) or state["rank"]
    found, seconds = None, 0.0
    at_end = options.refresh_at == "end" and state["refreshes"] > 0
    if due and not at_end:
        start = time.perf_counter()
        found = unless_out_of_memory(partial(_refreshed, state, g, rank, options, betas))
        seconds = time.perf_counter() - start
    if found is None and not state["refreshes"]:
        if not bool(g.any()):
            p.mul_(1 - lr * weight_decay)
        return seconds
    if found is not None:
        bases, core, mean, square = found
    else:
        bases, core = bases_of(state), project(state, g)
        mean, square = (moments.values(state, name).to(g.dtype) for name in moments.NAMES)
    if not bool(core.isfinite().all()):
        return seconds
    if found is not None:
        _keep_bases(state, bases, p.dtype)
        if options.moments == "reset":
            state["step"].zero_()
        state["last_refresh"] = int(state["step"])
    dtype = g.dtype
    del g  # half precision is cast once more
    update = torch.zeros_like(core)
    ops.adamw_(
        [update],
        [core],
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
    (first, basis), *others = _factors(state, weight.dim(), dtype)
    for mode, other in others:
        update = _product(update, mode, other)
    stepped = _unfolded(weight.to(dtype), first)  # the weight itself where dtype and strides allow it
    add_product_ = stepped.addmm_ if stepped.dim() == 2 else stepped.baddbmm_
    alpha = 1 if options.arithmetic == "torch" else decay
    add_product_(basis, _unfolded(update, first), beta=decay, alpha=alpha)
    if stepped.data_ptr() != p.data_ptr():
        p.copy_(_folded(stepped, weight.shape, first).reshape(p.shape))
    if due and at_end:
        start = time.perf_counter()
        g = projected_form(grad, state["side"]).to(dtype)
        found = unless_out_of_memory(partial(_refreshed, state, g, rank, options, betas))
        if found is not None:
            bases, _, mean, square = found
            _keep_bases(state, bases, p.dtype)
            for name, moment in zip(moments.NAMES, (mean, square), strict=True):
                state |= moments.kept(name, moment, state[name].dtype)
            state["last_refresh"] = int(state["step"]) - 1
        seconds = time.perf_counter() - start
    return seconds


def _refreshed(
    state: Mapping[str, Any], grad: Tensor, rank: int, options: SubspaceOptions, betas: tuple[float, float]
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor] | None:
    """New bases, the core and both moments in them."""
    found = find(state, grad, rank, options)
    if found is None:
        return None
    bases, core = found
    if not state["refreshes"] or options.moments == "reset":
        return bases, core, torch.zeros_like(core), torch.zeros_like(core)
    mean, square = (moments.values(state, name).to(grad.dtype) for name in moments.NAMES)
    if options.moments == "rotate" or rank != state["rank"]:
        taken = float(state["step"])
        corrections = 1 - betas[0] ** taken, 1 - betas[1] ** taken
        mean, square = rotated(mean, square, bases_of(state), bases, corrections)
    return bases, core, mean, square


def rotated(
    mean: Tensor,
    square: Tensor,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    corrections: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Both moments in new bases, mode by mode; one without a basis is whole, before or after."""
    for name, basis in {**old, **new}.items():
        mode, shape = _mode(name, mean.dim()), mean.shape
        whole: dict[str, Tensor] = {}
        if name not in old or name not in new:
            whole[name] = torch.eye(basis.shape[-2]).expand(*basis.shape[:-1], -1)
        before, after = ({**whole, **bases}[name].to(mean) for bases in (old, new))
        mean, square = (
            _folded(moment, shape, mode)
            for moment in ops.rotate_moments(
                _unfolded(mean, mode), _unfolded(square, mode), before, after, LEFT, *corrections
            )
        )
    return mean.contiguous(), square.contiguous()


def _keep_bases(state: dict[str, Any], found: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Puts new bases in place of the old; where they are of other modes, before the ints as in a new state."""
    bases = {name: basis.to(dtype) for name, basis in found.items()}
    if bases.keys() != bases_of(state).keys():
        ints = {key: state.pop(key) for key in STATE_KEYS[4:]}
        for name in bases_of(state):
            del state[name]
        state |= {**bases, **ints}
    state |= bases
    state["rank"] = next(iter(bases.values())).shape[-1]
    state["refreshes"] += 1


def find(
    state: Mapping[str, Any], grad: Tensor, rank: int, options: SubspaceOptions
) -> tuple[dict[str, Tensor], Tensor] | None:
    """New bases, in the compute dtype, and the core in them; None for a gradient that is zero or not finite."""
    modes = modes_of(grad, state["side"], rank)
    if options.projector == "svd":
        return _find_by_svd(state["side"], grad, modes, rank, options)
    bases: dict[str, Tensor] = {}
    for i, (name, mode) in enumerate(modes.items()):
        known = state.get(name) if state["refreshes"] else None
        found = sketched(
            _unfolded(grad, mode),
            rank,
            options,
            previous=known,
            key=state["key"],
            refresh=len(modes) * state["refreshes"] + i,
        )
        if found is None:
            return None
        basis, left = found
        # Singular vectors have no sign: each column gets the one that goes with the previous column.
        if known is not None and options.moments == "keep" and rank == state["rank"]:
            signs = torch.where((basis * known).sum(-2, keepdim=True) < 0, -1, 1)
            basis, left = basis * signs, left * signs.mT
        bases[name] = basis
        grad = _folded(left, grad.shape, mode)
    return bases, grad.contiguous()


def _find_by_svd(
    side: int, grad: Tensor, modes: Mapping[str, int], rank: int, options: SubspaceOptions
) -> tuple[dict[str, Tensor], Tensor] | None:
    if not bool(grad.any()) or not bool(grad.isfinite().all()):
        return None
    single = options.arithmetic != "torch" or grad.dtype != torch.float64
    left = grad.float() if single else grad
    bases: dict[str, Tensor] = {}
    for name, mode in modes.items():
        u, _, vh = torch.linalg.svd(_unfolded(left, mode), full_matrices=False)
        bases[name] = u[..., :rank].to(grad.dtype).contiguous()
        if side == BOTH:  # one decomposition has both, with signs that belong together
            bases["basis_right"] = vh[..., :rank, :].mT.to(grad.dtype).contiguous()
            break
        left = _product(left, mode, u[..., :rank].mT)
    core = grad
    for name, mode in modes.items():
        core = _product(core, mode, bases[name].mT)
    return bases, core.contiguous()


def project(state: Mapping[str, Any], grad: Tensor) -> Tensor:
    """The core of a gradient in the state's bases."""
    for mode, basis in _factors(state, grad.dim(), grad.dtype):
        grad = _product(grad, mode, basis.mT)
    return grad.contiguous()


def measures(
    state: Mapping[str, Any], grad: Tensor, before: Mapping[str, Tensor], used: Mapping[str, Tensor]
) -> tuple[float, float, float]:
    """Of a refresh, what `ops.projected_adamw_` measures; the angles are the mean over modes with a basis `before`.

    `used`: the bases of the step.
    """
    core = project(used, grad.to(compute_dtype(grad)))
    energy, kept = _squared_norm(grad), _squared_norm(core)
    now = bases_of(state)
    cosines = [float(squared_cosine(before[name], now[name])) for name in now if name in before]
    return energy, kept, sum(cosines) / len(cosines) if cosines else math.nan


def _squared_norm(tensor: Tensor) -> float:
    """In fp64, a part of the tensor after the other cast to that."""
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in tensor.chunk(16)]
    return float(torch.stack(norms).square().sum())


def back_projected(state: Mapping[str, Any], core: Tensor) -> Tensor:
    """core x_1 P x_2 Q ..., of the shape of the gradient."""
    for mode, basis in _factors(state, core.dim(), core.dtype):
        core = _product(core, mode, basis)
    return core


def _factors(state: Mapping[str, Any], dims: int, dtype: torch.dtype) -> list[tuple[int, Tensor]]:
    """The state's bases, each with its mode."""
    return [(_mode(name, dims), basis.to(dtype)) for name, basis in bases_of(state).items()]


def _mode(name: str, dims: int) -> int:
    """The mode that a basis is of, as `modes_of` names them."""
    sides = {"basis": -2, "basis_right": -1}
    return sides[name] if name in sides else int(name.removeprefix("basis_")) - dims


# --- Tensors of any number of modes; with three, stacks of matrices ------------------------------------


def _unfolded(tensor: Tensor, mode: int) -> Tensor:
    """The matrix whose columns are the fibers of a mode; of a stack one each."""
    stack = int(tensor.dim() == 3)
    return tensor.movedim(mode, stack).flatten(stack + 1)


def _folded(matrix: Tensor, shape: Sequence[int], mode: int) -> Tensor:
    """The way back to `shape`, but for the length of the mode."""
    stack = int(len(shape) == 3)
    others = list(shape)
    del others[mode]
    return matrix.unflatten(stack + 1, others[stack:]).movedim(stack, mode)


def _product(tensor: Tensor, mode: int, matrix: Tensor) -> Tensor:
    """tensor x_mode matrix, which multiplies every fiber of the mode."""
    if mode == -1:  # those are rows: nothing is moved
        return tensor @ matrix.mT
    return _folded(matrix @ _unfolded(tensor, mode), tensor.shape, mode)
