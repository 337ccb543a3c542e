"""One parameter's subspace: its side, its state, and how it is refreshed.

Matrices are m x n as in the papers; the *projected side* is the one the basis lives on: n of a right
projection (R = G Q, basis n x r), m of a left one (R = Q^T G, basis m x r).
"""

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
from galore_rrf.schedule import MEASURES

RIGHT, LEFT, BOTH, TUCKER = 0, 1, 2, 3
_MODES = {RIGHT: {"basis": -1}, LEFT: {"basis": -2}, BOTH: {"basis": -2, "basis_right": -1}}

SCHEMA_VERSION = 1
"""Version of the per-parameter state; every group carries it as ``schema_version``."""

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "basis", "rank", "side", "key", "refreshes", "last_refresh")
"""Of a projection of one side: tensors `step` to `basis`, then ints.  Others have more bases, by the names of
`modes_of`; see docs/checkpoints.md."""

RESIDUAL_STATES = {"scaled": "residual_norm", "feedback": "error"}
"""The tensor more that a state has where `residual` needs one."""

OPTION_TENSORS = (*RESIDUAL_STATES.values(), "average")
OPTION_NUMBERS = ("interval", *MEASURES)
"""Entries of a state that are there only where an option asks for them."""


def as_matrices(p: Tensor) -> Tensor:
    """A matrix, or a stack of them: 4-D and higher (convolutions) unfold to (out, rest)."""
    return p if p.dim() <= 3 else p.flatten(1)


def matrix_count(p: Tensor) -> int:
    return p.shape[0] if p.dim() == 3 else 1


def matrix_ids(groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, int]:
    """The id of every parameter's (first) matrix, which chooses its test matrices: its position among all."""
    ids, count = {}, 0
    for p in (p for group in groups for p in group["params"]):
        ids[p] = count
        count += matrix_count(p)
    return ids


def rank_of(p: Tensor, options: SubspaceOptions) -> int | None:
    """The rank that a parameter is projected to; None: it is plain AdamW.

    So are 1-D parameters and matrices with min(m, n) <= rank, but in the arithmetics of other packages, which
    project these onto all of their shorter side; with ``"tucker"`` what has no mode to project.
    """
    if options.rank is None or p.dim() < 2 or p.numel() == 0:
        return None
    if side_of(p, options.proj_type) == TUCKER:
        return options.rank if modes_of(p, TUCKER, options.rank) else None
    m, n = projected_shape(p)[-2:]
    if min(m, n) <= options.rank and options.arithmetic == "torch":
        return None
    return min(m, n, options.rank)


def is_projected(p: Tensor, options: SubspaceOptions) -> bool:
    return rank_of(p, options) is not None


def is_torchs(p: Tensor, options: SubspaceOptions) -> bool:
    """Whether torch's own AdamW can take the step of a plain parameter."""
    dtype = moments.kept_dtype(p.numel(), options.state_dtype, compute_dtype(p))
    return options.arithmetic == "torch" and (options.state_dtype is None or dtype == p.dtype)


def side_of(p: Tensor, proj_type: str) -> int:
    if proj_type == "full":
        return BOTH
    if proj_type == "tucker" and p.dim() > 3:
        return TUCKER
    if proj_type in ("right", "left"):
        return RIGHT if proj_type == "right" else LEFT
    m, n = projected_shape(p)[-2:]
    return RIGHT if (m >= n) == (proj_type != "reverse_std") else LEFT


def projected_form(p: Tensor, side: int) -> Tensor:
    """What of a parameter is projected: with TUCKER itself, else a matrix or a stack of them."""
    return p if side == TUCKER else as_matrices(p)


def projected_shape(p: Tensor, side: int = RIGHT) -> tuple[int, ...]:
    """Of the projected form."""
    return tuple(p.shape) if p.dim() <= 3 or side == TUCKER else (p.shape[0], math.prod(p.shape[1:]))


def modes_of(p: Tensor, side: int, rank: int) -> dict[str, int]:
    """The names of a state's bases, and which mode of the projected form each is of, counted from the last."""
    if side == TUCKER:
        lengths = enumerate(p.shape)
        return {f"basis_{i}": i - p.dim() for i, n in lengths if min(n, p.numel() // n) > rank}
    return dict(_MODES[side])


def bases_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith("basis")}


def compute_dtype(p: Tensor) -> torch.dtype:
    """fp64 for fp64 weights, else fp32: the dtype of moments and of all arithmetic."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def state_shapes(p: Tensor, side: int, rank: int) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Shapes of the moments, and of the bases by their names."""
    shape = projected_shape(p, side)
    stack = shape[:-2] if side != TUCKER else ()
    modes = modes_of(p, side, rank)
    core = (rank if i - len(shape) in modes.values() else n for i, n in enumerate(shape))
    return tuple(core), {name: (*stack, shape[mode], rank) for name, mode in modes.items()}


def new_state(p: Tensor, options: SubspaceOptions, key: int) -> dict[str, Any]:
    """Zeros at the rank cap; ``refreshes`` 0 says that there is no basis yet."""
    side = side_of(p, options.proj_type)
    rank = rank_of(p, options)
    assert rank is not None
    shape, bases = state_shapes(p, side, rank)
    entries = option_entries(p, options)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=p.device),
        **zero_moments(p, shape, options.state_dtype),
        # In the weight's dtype: half precision products take them as they are.
        **{name: torch.zeros(basis, dtype=p.dtype, device=p.device) for name, basis in bases.items()},
        **{name: entry for name, entry in entries.items() if name in OPTION_TENSORS},
        "rank": rank,
        "side": side,
        "key": key,
        "refreshes": 0,
        "last_refresh": 0,
        **{name: entry for name, entry in entries.items() if name in OPTION_NUMBERS},
    }


def option_shapes(p: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Of OPTION_TENSORS, with their dtypes: a number a matrix, an entry an entry."""
    stack = tuple(p.shape[:-2]) if p.dim() == 3 else ()
    return {
        "residual_norm": (stack, torch.float32),
        "error": (tuple(p.shape), p.dtype),
        "average": (tuple(p.shape), p.dtype),
    }


def option_entries(p: Tensor, options: SubspaceOptions) -> dict[str, Any]:
    """The entries of a new state that its options ask for: tensors of zeros, nothing yet, then numbers."""
    wanted = [name for name in (*OPTION_TENSORS, *OPTION_NUMBERS) if _wants(name, options)]
    shapes = option_shapes(p) if wanted else {}
    entries: dict[str, Any] = {}
    for name in wanted:
        if name in shapes:
            shape, dtype = shapes[name]
            entries[name] = torch.zeros(shape, dtype=dtype, device=p.device)
        else:
            entries[name] = options.update_proj_gap if name == "interval" else 0.0
    return entries


def _wants(name: str, options: SubspaceOptions) -> bool:
    """Whether a state has this entry of OPTION_TENSORS or OPTION_NUMBERS."""
    if name in RESIDUAL_STATES.values():
        return RESIDUAL_STATES.get(options.residual) == name
    if name == "average":
        return options.basis_from == "average"
    if name == "interval":
        return options.schedule == "adaptive"
    return is_measured(options)


def zero_moments(p: Tensor, shape: Sequence[int], state_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Both moments of a parameter, as its group keeps them."""
    zeros = torch.zeros(shape, dtype=compute_dtype(p), device=p.device)
    dtype = moments.kept_dtype(zeros.numel(), state_dtype, zeros.dtype)
    return {
        key: value
        for name in moments.NAMES
        for key, value in moments.kept(name, zeros.clone(), dtype).items()
    }


def follow(
    p: Tensor, state: dict[str, Any], options: SubspaceOptions, *, counts_on_device: bool = True
) -> None:
    """Keeps moments and basis as the weight and its group ask for by now: either may have changed.

    counts_on_device: whether torch's own AdamW, where it takes the step, has its count beside the weight
    (fused, capturable); else it is on the CPU.  Ours always has it there.
    """
    plain = "side" not in state
    shape: Sequence[int] = (p.numel(),)
    if not plain:
        shape, _ = state_shapes(p, state["side"], rank_of(p, options) or state["rank"])
        for name in (*OPTION_TENSORS, *OPTION_NUMBERS):
            if (name in state) != _wants(name, options):
                state.pop(name, None)
                state |= {k: v for k, v in option_entries(p, options).items() if k not in state}
        for name in (*bases_of(state), "error", "average"):
            if name in state and state[name].dtype != p.dtype:
                state[name] = state[name].to(p.dtype)
    dtype = moments.kept_dtype(math.prod(shape), options.state_dtype, compute_dtype(p))
    device = p.device
    if plain and is_torchs(p, options):
        dtype = p.dtype
        device = device if counts_on_device else torch.device("cpu")
    if state["step"].device != device:
        state["step"] = state["step"].to(device)
    if state["exp_avg"].dtype != dtype:
        moments.keep_as(state, dtype, flat=plain)


def is_measured(options: SubspaceOptions) -> bool:
    """Whether the schedule asks what every step has measured."""
    return options.schedule == "adaptive" or callable(options.update_proj_gap)


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


_RANK_MULTIPLE = 8  # of ranks by tolerance: widths that products and vector units take well
Found = tuple[Tensor, Tensor] | None  # a new basis and the projected gradient in it, in the compute dtype
T = TypeVar("T")


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
            moved["error"] = error + (share * lost).view(error.shape).to(error.dtype)
    for name, moment in zip(moments.NAMES, rotated, strict=False):
        moved |= moments.kept(name, moment, state[name].dtype)
    return moved


def _find_all(
    states: Sequence[Mapping[str, Any]], grads: Sequence[Tensor], options: SubspaceOptions
) -> list[Found]:
    """By tolerance, all matrices in one call."""
    assert options.tolerance is not None
    assert options.rank is not None
    found = ops.adaptive_range_finders(
        [_oriented(state, grad) for state, grad in zip(states, grads, strict=True)],
        options.tolerance,
        options.rank,
        [state["key"] for state in states],
        [state["refreshes"] for state in states],
        seed=options.seed,
        min_rank=options.min_rank or 0,
        multiple=_RANK_MULTIPLE,
    )
    result: list[Found] = []
    for state, basis, b, rank, status in zip(states, *found, strict=True):
        if bool((status == Status.nonfinite).any()) or bool((status == Status.zero).all()):
            result.append(None)
            continue
        width = int(rank.max())
        basis = basis[..., :width].contiguous()
        # A matrix of a stack without a gradient keeps what the new rank has room for of its old basis.
        idle = status == Status.zero
        if bool(idle.any()):
            old = state["basis"][idle][..., :width]
            basis[idle] = torch.nn.functional.pad(old, (0, width - old.shape[-1])).to(basis.dtype)
        b = b[..., :width, :].clone()  # not the whole buffer, as wide as the cap
        result.append((basis, _oriented(state, b)))
    return result


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
