"""One parameter's subspace: its side and its state.

Matrices are m x n as in the papers; the *projected side* is the one the basis lives on: n of a right
projection (R = G Q, basis n x r), m of a left one (R = Q^T G, basis m x r).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_rrf import moments
from galore_rrf.options import SubspaceOptions
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
