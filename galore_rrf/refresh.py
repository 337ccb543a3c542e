"""How a state moves into a new subspace, where the step operator does not do it itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from galore_rrf import moments, ops
from galore_rrf.options import SubspaceOptions
from galore_rrf.range_finder import Status
from galore_rrf.subspace import RIGHT, as_matrices, compute_dtype, rank_of, state_shapes

_RANK_MULTIPLE = 8  # of ranks by tolerance: widths that products and vector units take well
Found = tuple[Tensor, Tensor] | None  # a new basis and the projected gradient in it, in the compute dtype
T = TypeVar("T")


def take_average(grad: Tensor, state: Mapping[str, Any], beta: float) -> None:
    """Takes a gradient into the average of gradients, unless it is not finite."""
    average = as_matrices(state["average"])
    finite = torch.linalg.vector_norm(grad, math.inf, dim=(-2, -1), keepdim=True).isfinite()
    average.lerp_(torch.where(finite, grad, average), 1 - beta)


def basis_source(
    state: Mapping[str, Any], grad: Tensor, options: SubspaceOptions, beta: float, *, maximize: bool
) -> Tensor:
    """What the subspace is found of, in the projected form of the gradient."""
    if options.basis_from == "average":
        return as_matrices(state["average"])
    if options.basis_from == "gradient" or not state["refreshes"]:
        return grad
    mean = moments.values(state, "exp_avg").to(compute_dtype(grad))
    mean = mean.neg() if maximize else mean.clone()
    if options.refresh_at == "end":  # it has this step's gradient already
        mean.sub_(_projected(state, grad, state["basis"].to(mean.dtype)), alpha=1 - beta)
    else:
        mean.mul_(beta)
    return _back(state, mean).add_(grad, alpha=1 - beta)


def refreshed_in_step(p: Tensor, state: Mapping[str, Any], options: SubspaceOptions) -> bool:
    """Whether the step operator does the refresh itself: a range finder at the rank that the state has."""
    return (
        options.projector == "range_finder"
        and options.tolerance is None
        and options.basis_from == "gradient"
        and state["rank"] == rank_of(p, options)
    )


def refresh(
    states: Sequence[dict[str, Any]],
    grads: Sequence[Tensor],
    options: SubspaceOptions,
    betas: tuple[float, float],
    maximize: bool = False,
) -> list[Tensor | None]:
    """Moves states into new subspaces of their gradients and returns the projected gradients.

    For all refreshes that are not done within the step.  None, and the state as it was, where a gradient
    is zero or not finite or memory runs out: the step then deals with it, and the refresh stays due.
    """
    if options.tolerance is not None:
        return _refreshed(states, grads, options, betas, maximize)
    # One at a time: what a basis is found of may be as large as the weight.
    return [
        projected
        for state, grad in zip(states, grads, strict=True)
        for projected in _refreshed([state], [grad], options, betas, maximize)
    ]


def _refreshed(
    states: Sequence[dict[str, Any]],
    grads: Sequence[Tensor],
    options: SubspaceOptions,
    betas: tuple[float, float],
    maximize: bool,
) -> list[Tensor | None]:
    def find() -> list[Found]:
        sources = [
            basis_source(state, grad, options, betas[0], maximize=maximize)
            for state, grad in zip(states, grads, strict=True)
        ]
        found = (_find_all if options.tolerance is not None else find_each)(states, sources, options)
        if options.basis_from == "gradient":
            return found
        return [
            found_one and (found_one[0], _projected(state, grad, found_one[0]))
            for state, grad, found_one in zip(states, grads, found, strict=True)
        ]

    bases = unless_out_of_memory(find) or [None] * len(states)
    projected: list[Tensor | None] = []
    for state, grad, found in zip(states, grads, bases, strict=True):
        moved = None
        if found is not None and bool(found[1].isfinite().all()):  # products may overflow
            moved = unless_out_of_memory(partial(_moved, state, grad, found, options, betas, maximize))
        state.update(moved or {})
        projected.append(found[1] if found is not None and moved is not None else None)
    return projected


def unless_out_of_memory(work: Callable[[], T]) -> T | None:
    """What `work` returns; None where memory ran out."""
    try:
        return work()
    except (MemoryError, torch.OutOfMemoryError):
        return None
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        return None


def _moved(
    state: Mapping[str, Any],
    grad: Tensor,
    found: tuple[Tensor, Tensor],
    options: SubspaceOptions,
    betas: tuple[float, float],
    maximize: bool,
) -> dict[str, Any]:
    """What of a state changes with its subspace."""
    basis, projected = found
    moved: dict[str, Any] = {"basis": basis.to(state["basis"].dtype), "rank": basis.shape[-1]}
    steps = float(state["step"])
    rotated: Sequence[Tensor] = ()
    if steps == 0 or options.moments == "reset":
        shape, _ = state_shapes(grad, state["side"], basis.shape[-1])
        rotated = [projected.new_zeros(shape) for _ in moments.NAMES]
    elif options.moments == "rotate" or basis.shape[-1] != state["rank"]:
        mean, square = (moments.values(state, name).to(projected.dtype) for name in moments.NAMES)
        rotated = ops.rotate_moments(
            mean,
            square,
            state["basis"],
            basis,
            state["side"],
            1 - betas[0] ** steps,
            1 - betas[1] ** steps,
        )
        if "error" in state:  # what the first moment loses by rotation, as in the step operator
            lost = _back(state, mean) - _back({**state, "basis": basis}, rotated[0])
            share = (-1 if maximize else 1) * betas[0] / (1 - betas[0])
            error = state["error"]
            moved["error"] = (error + (share * lost).view(error.shape).to(error.dtype)).nan_to_num_(0, 0, 0)
    for name, moment in zip(moments.NAMES, rotated, strict=False):
        moved |= moments.kept(name, moment, state[name].dtype)
    return moved


def _find_all(
    states: Sequence[Mapping[str, Any]], grads: Sequence[Tensor], options: SubspaceOptions
) -> list[Found]:
    """By tolerance, all matrices in one call; those of a stack at the largest rank that one of them needs."""
    matrices = [_oriented(state, grad) for state, grad in zip(states, grads, strict=True)]
    keys, refreshes = ([state[name] for state in states] for name in ("key", "refreshes"))
    found = _within_tolerance(matrices, keys, refreshes, options, options.min_rank or 0)
    result: list[Found] = []
    for state, a, basis, b, rank, status in zip(states, matrices, *found, strict=True):
        if bool((status == Status.nonfinite).any()) or bool((status == Status.zero).all()):
            result.append(None)
            continue
        width = int(rank.max())
        basis = basis[..., :width].contiguous()
        b = b[..., :width, :].clone()  # not the whole buffer, as wide as the cap
        if basis.dim() == 3:
            _widen(state, a, (basis, b), rank, status, options)
        result.append((basis, _oriented(state, b)))
    return result


def _widen(
    state: Mapping[str, Any],
    a: Tensor,
    found: tuple[Tensor, Tensor],
    rank: Tensor,
    status: Tensor,
    options: SubspaceOptions,
) -> None:
    """Gives the matrices of a stack that have found lower ranks, or no gradient, bases as wide as the others'.

    Columns of zeros would be no orthonormal basis, which a residual's complement is made of.
    """
    basis, b = found
    width = basis.shape[-1]
    for i in (status == Status.zero).nonzero().flatten().tolist():
        basis[i] = _completed(state, i, width, options)
    short = ((rank < width) & (status != Status.zero)).nonzero().flatten().tolist()
    if short:
        wider = _within_tolerance(
            [a[i] for i in short],
            [state["key"] + i for i in short],
            [state["refreshes"]] * len(short),
            options,
            width,
        )
        for i, wider_basis, wider_b in zip(short, *wider[:2], strict=True):
            basis[i], b[i] = wider_basis[:, :width], wider_b[:width]


def _within_tolerance(
    matrices: Sequence[Tensor],
    keys: Sequence[int],
    refreshes: Sequence[int],
    options: SubspaceOptions,
    min_rank: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    assert options.tolerance is not None
    assert options.rank is not None
    return ops.adaptive_range_finders(
        matrices,
        options.tolerance,
        options.rank,
        keys,
        refreshes,
        seed=options.seed,
        min_rank=min_rank,
        multiple=_RANK_MULTIPLE,
    )


def _completed(state: Mapping[str, Any], i: int, width: int, options: SubspaceOptions) -> Tensor:
    """The basis of matrix `i` of a stack, which has no gradient now, at another rank: cut, or with random columns."""
    old = state["basis"][i]
    known = int(old.any(-2).sum())
    if known == 0:
        return old.new_zeros(old.shape[0], width)  # there is none yet
    old = old[:, : min(known, width)].to(compute_dtype(old))
    if known >= width:
        return old
    random = ops.gaussian_sketch(
        old.shape[0],
        width - old.shape[1],
        seed=options.seed,
        key=state["key"] + i,
        refresh=state["refreshes"],
        dtype=old.dtype,
        device=old.device,
    )
    columns = torch.cat([old, random], dim=-1)
    return torch.cat([old, torch.linalg.qr(columns)[0][:, old.shape[1] :]], dim=-1)


def find_each(
    states: Sequence[Mapping[str, Any]], grads: Sequence[Tensor], options: SubspaceOptions
) -> list[Found]:
    """A new basis for every gradient and the projected gradient in it, at the rank of the options."""
    find = _find_by_svd if options.projector == "svd" else _find_at_rank
    return [find(state, grad, options) for state, grad in zip(states, grads, strict=True)]


def _back(state: Mapping[str, Any], x: Tensor) -> Tensor:
    """Out of the subspace: Q N or N Q^T."""
    basis: Tensor = state["basis"].to(x.dtype)
    return x @ basis.mT if state["side"] == RIGHT else basis @ x


def _projected(state: Mapping[str, Any], grad: Tensor, basis: Tensor) -> Tensor:
    grad = grad.to(basis.dtype)
    return grad @ basis if state["side"] == RIGHT else basis.mT @ grad


def _oriented(state: Mapping[str, Any], a: Tensor) -> Tensor:
    """A gradient as if projected on the left, or its coefficients back as they are of the gradient."""
    return a.mT if state["side"] == RIGHT else a


def _find_by_svd(state: Mapping[str, Any], grad: Tensor, options: SubspaceOptions) -> Found:
    largest = float(torch.linalg.vector_norm(grad, math.inf))
    if largest == 0 or not math.isfinite(largest):
        return None
    single = options.arithmetic != "torch" or grad.dtype != torch.float64
    # Of the gradient as it is: the SVD of its transpose may differ in signs.
    u, _, vh = torch.linalg.svd(grad.float() if single else grad, full_matrices=False)
    right = state["side"] == RIGHT
    basis = vh[..., : options.rank, :].mT if right else u[..., : options.rank]
    # Rounded as the state will hold it, as galore_torch does.
    basis = basis.to(grad.dtype).to(compute_dtype(grad)).contiguous()
    return basis, _projected(state, grad, basis)


def _find_at_rank(state: Mapping[str, Any], grad: Tensor, options: SubspaceOptions) -> Found:
    assert options.rank is not None
    found = sketched(
        _oriented(state, grad),
        min(options.rank, *grad.shape[-2:]),
        options,
        previous=state["basis"] if state["refreshes"] else None,
        key=state["key"],
        refresh=state["refreshes"],
    )
    if found is None:
        return None
    basis, b = found
    return basis, _oriented(state, b)


def sketched(
    a: Tensor,
    rank: int,
    options: SubspaceOptions,
    *,
    previous: Tensor | None,
    key: int,
    refresh: int,
    coefficients: bool = True,
) -> tuple[Tensor, Tensor] | None:
    """Basis and coefficients by the group's range finder; None where a gradient is zero or not finite.

    Without a `previous` basis a warm start begins with a random one: half a power step.
    """
    warm = options.sketch == "warm"
    basis, b, _, status = ops.range_finder(
        a,
        rank,
        oversampling=options.oversampling,
        sketch="half_power" if warm and previous is None else options.sketch,
        power=options.power,
        warm=previous if warm else None,
        coefficients=coefficients,
        ordered=options.moments == "keep",
        seed=options.seed,
        key=key,
        refresh=refresh,
    )
    if bool((status == Status.nonfinite).any()) or bool((status == Status.zero).all()):
        return None
    return basis.contiguous(), b
