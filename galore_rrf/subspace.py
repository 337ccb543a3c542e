"""One parameter's subspace: its options, its side, its state, when it is refreshed and how.

Matrices are m x n as in the papers; the *projected side* is the one the basis lives on: n of a right
projection (R = G Q, basis n x r), m of a left one (R = Q^T G, basis m x r).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict

import torch
from torch import Tensor

from galore_rrf import ops
from galore_rrf.range_finder import Status

RIGHT, LEFT = 0, 1

SCHEMA_VERSION = 1
"""Version of the per-parameter state; every group carries it as ``schema_version``."""

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "basis", "rank", "side", "key", "refreshes", "last_refresh")
"""Tensors `step` to `basis`, then ints; see docs/architecture.md."""


class RefinementKeys(TypedDict, total=False):
    """The keys of a projected group beside its rank."""

    update_proj_gap: int
    scale: float
    proj_type: str
    projector: str
    sketch: str
    power: int
    oversampling: int
    moments: str
    tolerance: float | None
    nonfinite: str
    seed: int
    arithmetic: str
    preset: str | None


class SubspaceKeys(RefinementKeys, total=False):
    """The keys of a parameter group, and keywords of the optimizer, that concern the subspace."""

    rank: int | None


PRESETS: dict[str, SubspaceKeys] = {
    "default": {},
    "published": {
        "update_proj_gap": 200,
        "scale": 0.25,
        "moments": "keep",
        "sketch": "half_power",
        "oversampling": 8,
    },
}

_CHOICES = {
    "proj_type": ("std", "reverse_std", "left", "right"),
    "projector": ("range_finder", "svd"),
    "sketch": ("warm", "plain", "half_power", "power"),
    "moments": ("rotate", "keep"),
    "nonfinite": ("skip", "raise"),
    "arithmetic": ("torch", "galore_torch"),
}


def _invalid(name: str, value: object, allowed: str, kind: type[Exception] = ValueError) -> Exception:
    return kind(f"Invalid {name}: {value!r} (must be {allowed})")


def _check_int(name: str, value: object, least: int, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid(name, value, allowed, TypeError)
    if value < least:
        raise _invalid(name, value, allowed)


def _check_number(name: str, value: object, valid: Any, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _invalid(name, value, allowed, TypeError)
    if not valid(value):
        raise _invalid(name, value, allowed)


@dataclass(frozen=True)
class SubspaceOptions:
    """The subspace of a group's parameters.

    Attributes:
        rank: columns of the basis; None: the group is plain AdamW.  With `tolerance` the cap.
        update_proj_gap: steps from one refresh to the next; 1: every step.
        scale: factor on the update, GaLore's alpha.
        proj_type: ``"std"`` projects the shorter side (right where m >= n), ``"reverse_std"`` the longer;
            ``"right"``, ``"left"``.
        projector: ``"range_finder"``, or ``"svd"`` (exact, for comparison).
        sketch: of the range finder: ``"warm"`` starts from the previous basis, ``"plain"``,
            ``"half_power"``, ``"power"`` from a Gaussian test matrix.
        power: power steps of ``sketch="power"``.
        oversampling: columns sketched beyond the rank and cut off again.
        moments: at a refresh, ``"rotate"`` into the new basis or ``"keep"`` as they are (published).
        tolerance: at each refresh, the smallest rank whose relative residual is within it.
        nonfinite: a gradient with NaN or infinity leaves its matrix alone (``"skip"``) or, before anything
            is written, raises FloatingPointError (``"raise"``).
        seed: of all test matrices.
        arithmetic: ``"torch"``: torch.optim.AdamW's; ``"galore_torch"``: that package's (eps on the
            uncorrected root, decay last, exact SVD in fp32).
        preset: ``"default"``, ``"published"``: a set of the above that explicit keys override.
    """

    rank: int | None = None
    update_proj_gap: int = 10
    scale: float = 1.0
    proj_type: str = "std"
    projector: str = "range_finder"
    sketch: str = "warm"
    power: int = 1
    oversampling: int = 0
    moments: str = "rotate"
    tolerance: float | None = None
    nonfinite: str = "skip"
    seed: int = 0
    arithmetic: str = "torch"
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            _check_int("rank", self.rank, 1, "a positive integer or None")
        _check_int("update_proj_gap", self.update_proj_gap, 1, "a positive integer")
        _check_int("power", self.power, 0, "an integer, not negative")
        _check_int("oversampling", self.oversampling, 0, "an integer, not negative")
        _check_int("seed", self.seed, 0, "an integer from 0 to 2**63 - 1")
        if self.seed >= 2**63:
            raise _invalid("seed", self.seed, "an integer from 0 to 2**63 - 1")
        _check_number("scale", self.scale, math.isfinite, "a finite number")
        if self.tolerance is not None:
            _check_number("tolerance", self.tolerance, lambda x: 0 < x < 1, "between 0 and 1, or None")
            if self.projector != "range_finder" or self.moments != "rotate":
                raise ValueError(
                    f"tolerance goes with projector='range_finder' and moments='rotate' (ranks change), "
                    f"got {self.projector!r} and {self.moments!r}"
                )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise _invalid(name, getattr(self, name), "one of " + ", ".join(map(repr, allowed)))

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> SubspaceOptions:
        return cls(**{f.name: group[f.name] for f in fields(cls) if f.name in group})


def resolve(keys: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All subspace keys: those given, then those of a preset given with them, then `defaults`."""
    names = [f.name for f in fields(SubspaceOptions)]
    explicit = {name: keys[name] for name in names if name in keys}
    preset = explicit.get("preset")
    if preset is not None and preset not in PRESETS:
        raise _invalid("preset", preset, "one of " + ", ".join(map(repr, PRESETS)) + " or None")
    base = {name: value for name, value in (defaults or {}).items() if name in names}
    if preset is not None:
        base = {"rank": base.get("rank")}
    return asdict(SubspaceOptions(**{**base, **PRESETS.get(preset or "default", {}), **explicit}))


def as_matrices(p: Tensor) -> Tensor:
    """A matrix, or a stack of them: 4-D and higher (convolutions) unfold to (out, rest)."""
    return p if p.dim() <= 3 else p.flatten(1)


def matrix_count(p: Tensor) -> int:
    return p.shape[0] if p.dim() == 3 else 1


def is_projected(p: Tensor, rank: int | None) -> bool:
    """1-D parameters and matrices with min(m, n) <= rank are plain AdamW."""
    if rank is None or p.dim() < 2:
        return False
    m, n = (p.shape[-2], p.shape[-1]) if p.dim() <= 3 else (p.shape[0], math.prod(p.shape[1:]))
    return p.numel() > 0 and min(m, n) > rank


def side_of(matrix: Tensor, proj_type: str) -> int:
    if proj_type in ("right", "left"):
        return RIGHT if proj_type == "right" else LEFT
    tall = matrix.shape[-2] >= matrix.shape[-1]
    return RIGHT if tall == (proj_type == "std") else LEFT


def compute_dtype(p: Tensor) -> torch.dtype:
    """fp64 for fp64 weights, else fp32: the dtype of moments and of all arithmetic."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def state_shapes(matrix: Tensor, side: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the moments and of the basis."""
    *stack, m, n = matrix.shape
    if side == RIGHT:
        return (*stack, m, rank), (*stack, n, rank)
    return (*stack, rank, n), (*stack, m, rank)


def new_state(p: Tensor, options: SubspaceOptions, key: int) -> dict[str, Any]:
    """Zeros at the rank cap; ``refreshes`` 0 says that there is no basis yet."""
    matrix = as_matrices(p)
    side = side_of(matrix, options.proj_type)
    assert options.rank is not None
    moments, basis = state_shapes(matrix, side, options.rank)
    dtype = compute_dtype(p)
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros(moments, dtype=dtype, device=p.device),
        "exp_avg_sq": torch.zeros(moments, dtype=dtype, device=p.device),
        # In the weight's dtype: half precision products take it as it is.
        "basis": torch.zeros(basis, dtype=p.dtype, device=p.device),
        "rank": options.rank,
        "side": side,
        "key": key,
        "refreshes": 0,
        "last_refresh": 0,
    }


def refresh_due(state: Mapping[str, Any], gap: int) -> bool:
    """Whether the coming step refreshes; a refresh that failed stays due."""
    return state["refreshes"] == 0 or int(state["step"]) - state["last_refresh"] >= gap


def refreshed_in_step(state: Mapping[str, Any], options: SubspaceOptions) -> bool:
    """Whether the step operator does the refresh itself: a range finder at the rank that the state has."""
    return options.projector == "range_finder" and options.tolerance is None and state["rank"] == options.rank


def refresh(
    state: dict[str, Any], grad: Tensor, options: SubspaceOptions, betas: tuple[float, float]
) -> Tensor | None:
    """Moves the state into a new subspace of `grad` and returns the projected gradient.

    For all refreshes that are not done within the step.  None, and the state as it was, where the gradient
    is zero or not finite or memory runs out: the step then deals with it, and the refresh stays due.
    """
    try:
        found = _find(state, grad, options)
        if found is None:
            return None
        basis, projected = found
        moved: dict[str, Any] = {"basis": basis.to(state["basis"].dtype), "rank": basis.shape[-1]}
        steps = float(state["step"])
        rotate = options.moments == "rotate" or basis.shape[-1] != state["rank"]
        if steps == 0 or state["refreshes"] == 0:
            shapes = state_shapes(grad, state["side"], basis.shape[-1])
            moved |= {k: projected.new_zeros(shapes[0]) for k in ("exp_avg", "exp_avg_sq")}
        elif rotate:
            moved["exp_avg"], moved["exp_avg_sq"] = ops.rotate_moments(
                state["exp_avg"],
                state["exp_avg_sq"],
                state["basis"],
                basis,
                state["side"],
                1 - betas[0] ** steps,
                1 - betas[1] ** steps,
            )
    except (MemoryError, torch.OutOfMemoryError):
        return None
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        return None
    state.update(moved)
    return projected


def _find(state: Mapping[str, Any], grad: Tensor, options: SubspaceOptions) -> tuple[Tensor, Tensor] | None:
    """A new basis and the projected gradient in it, in the compute dtype."""
    right = state["side"] == RIGHT
    a = grad.mT if right else grad
    random = {"seed": options.seed, "key": state["key"], "refresh": state["refreshes"]}
    assert options.rank is not None
    if options.projector == "svd":
        largest = float(torch.linalg.vector_norm(grad, math.inf))
        if largest == 0 or not math.isfinite(largest):
            return None
        single = options.arithmetic == "galore_torch" or grad.dtype != torch.float64
        # Of the gradient as it is: the SVD of its transpose may differ in signs.
        u, _, vh = torch.linalg.svd(grad.float() if single else grad, full_matrices=False)
        basis = vh[..., : options.rank, :].mT if right else u[..., : options.rank]
        # Rounded as the state will hold it, as galore_torch does.
        basis = basis.to(grad.dtype).to(compute_dtype(grad)).contiguous()
        g = grad.to(basis.dtype)
        return basis, (g @ basis if right else basis.mT @ g)
    if options.tolerance is not None:
        basis, b, rank, _, _, status = ops.adaptive_range_finder(
            a, options.tolerance, max_rank=options.rank, **random
        )
        width = int(rank.max())
        basis, b = basis[..., :width], b[..., :width, :]
        # A matrix of a stack without a gradient keeps what the new rank has room for of its old basis.
        idle = status == Status.zero
        if bool(idle.any()) and not bool(idle.all()):
            old = state["basis"][idle][..., :width]
            basis[idle] = torch.nn.functional.pad(old, (0, width - old.shape[-1])).to(basis.dtype)
    else:
        known = state["refreshes"] > 0
        warm = options.sketch == "warm"
        basis, b, _, status = ops.range_finder(
            a,
            options.rank,
            oversampling=options.oversampling,
            sketch=options.sketch if known or not warm else "half_power",
            power=options.power,
            warm=state["basis"] if warm and known else None,
            ordered=options.moments == "keep",
            **random,
        )
    if bool((status == Status.nonfinite).any()) or bool((status == Status.zero).all()):
        return None
    return basis.contiguous(), (b.mT if right else b)
