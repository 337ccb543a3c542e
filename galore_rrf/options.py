"""The options of a group's subspace: keys, presets, and what goes together."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch

from galore_rrf.schedule import SCHEDULES, Due


class RefinementKeys(TypedDict, total=False):
    """The keys of a projected group beside its rank."""

    update_proj_gap: int | Due
    schedule: str
    basis_from: str
    scale: float
    proj_type: str
    projector: str
    sketch: str
    power: int
    oversampling: int
    moments: str
    refresh_at: str
    tolerance: float | None
    min_rank: int | None
    nonfinite: str
    seed: int
    stochastic_rounding: bool
    residual: str
    residual_scale: float
    arithmetic: str
    state_dtype: torch.dtype | None
    preset: str | None


class SubspaceKeys(RefinementKeys, total=False):
    """The keys of a parameter group, and keywords of the optimizer, that concern the subspace."""

    rank: int | None


# In 8-bit moments twice the rank takes fewer bytes than fp32 (as many of a square matrix), and trains far better.
PRESETS: dict[str, SubspaceKeys] = {
    "default": {"state_dtype": torch.uint8},
    "published": {
        "update_proj_gap": 200,
        "scale": 0.25,
        "moments": "keep",
        "sketch": "half_power",
        "oversampling": 8,
    },
    "best": {"state_dtype": torch.uint8, "residual": "orthogonalized", "residual_scale": 2.0},
}

_CHOICES = {
    "schedule": SCHEDULES,
    "basis_from": ("gradient", "average", "momentum"),
    "proj_type": ("std", "reverse_std", "left", "right", "full", "tucker"),
    "projector": ("range_finder", "svd"),
    "sketch": ("warm", "plain", "half_power", "power"),
    "moments": ("rotate", "keep", "reset"),
    "refresh_at": ("start", "end"),
    "nonfinite": ("skip", "raise"),
    "residual": ("drop", "scaled", "sign", "normalized", "orthogonalized", "feedback"),
    "arithmetic": ("torch", "galore_torch", "bitsandbytes"),
    "state_dtype": (None, torch.float32, torch.bfloat16, torch.uint8),
}


# What proj_type="full" and "tucker" do not have.
_OF_ONE_SIDE = ("stochastic_rounding", "residual", "tolerance", "basis_from")


def _invalid(name: str, value: object, allowed: str, kind: type[Exception] = ValueError) -> Exception:
    return kind(f"Invalid {name}: {value!r} (must be {allowed})")


class ExcludedOptions(ValueError):
    """Options that do not go together, `names`."""

    names: tuple[str, ...] = ()


def _check_int(name: str, value: object, least: int, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid(name, value, allowed, TypeError)
    if value < least:
        raise _invalid(name, value, allowed)


def _check_number(name: str, value: object, valid: Any, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _invalid(name, value, allowed, TypeError)
    if abs(value) > sys.float_info.max or not valid(value):
        raise _invalid(name, value, allowed)


@dataclass(frozen=True)
class SubspaceOptions:
    """The subspace of a group's parameters.

    Not together: `min_rank` without `tolerance`; ``proj_type="full"`` or ``"tucker"`` with `tolerance`,
    `residual`, `basis_from` or `stochastic_rounding`; `tolerance` with ``projector="svd"`` or ``moments="keep"``;
    ``refresh_at="end"`` with ``residual="feedback"`` or ``moments="reset"``; the former with a `residual_scale`
    outside 0 to 1, the latter with `stochastic_rounding`; a callable `update_proj_gap` with a `schedule` other
    than ``"fixed"``.

    Attributes:
        rank: columns of the basis; None: the group is plain AdamW.  With `tolerance` the cap.
        update_proj_gap: steps from one refresh to the next; 1: every step.  Or a callable that is asked before
            each step of each parameter whether it is to be refreshed (`galore_rrf.schedule.Progress`); no part of
            a state dict, where 0 stands for it.
        schedule: ``"fixed"``: refreshes of all parameters at once; ``"staggered"``: as often, but spread over
            the parameters by cost, so that no step stalls; ``"adaptive"``: of each parameter twice as far apart
            while its basis hardly turns, up to 16 times, and half as far while it turns a lot (`galore_rrf.schedule`).
        basis_from: what the subspace is found of: the ``"gradient"``; an exponential ``"average"`` of gradients
            (beta1), kept beside the moments at the size and in the dtype of the weight; ``"momentum"``: the first
            moment after this step, b1 Q M + (1 - b1) G.  What is projected is the gradient in any case.
        scale: factor on the update, GaLore's alpha.
        proj_type: ``"std"`` projects the shorter side (right where m >= n), ``"reverse_std"`` the longer;
            ``"right"``, ``"left"``; ``"full"`` both, R = P^T G Q (`tucker`); ``"tucker"``: parameters with
            four dimensions or more (convolutions; others as with ``"std"``) in each mode that is longer than
            the rank, and so is the product of the others.
        projector: ``"range_finder"``, or ``"svd"`` (exact, for comparison).
        sketch: of the range finder: ``"warm"`` starts from the previous basis, ``"plain"``,
            ``"half_power"``, ``"power"`` from a Gaussian test matrix.
        power: power steps of ``sketch="power"``.
        oversampling: columns sketched beyond the rank and cut off again.
        moments: at a refresh, ``"rotate"`` into the new basis, ``"keep"`` as they are (published) or ``"reset"``
            to zero, their count of steps (``state["step"]``) too.
        refresh_at: whether a new basis serves in the step that finds it (``"start"``) or from the next one on
            (``"end"``): a warm start then needs one more product with the gradient, not three.
        tolerance: at each refresh, the smallest multiple of 8 as rank whose relative residual is within it,
            by half power sketches whatever `sketch`, `power` and `oversampling` say; of the matrices of a stack
            the largest that one of them needs.
        min_rank: the least rank with `tolerance`; like the cap it need be no multiple of 8.
        nonfinite: a gradient with NaN or infinity leaves its matrix alone (``"skip"``) or, before anything
            is written, raises FloatingPointError (``"raise"``).
        seed: of all test matrices, and of rounding.
        stochastic_rounding: of projected weights in bf16 and fp16, up or down so that the mean is right:
            steps much smaller than the distance of two numbers still add up.
        residual: what is done with the gradient's part outside the subspace, E = G - Q R: ``"drop"``
            (published); ``"scaled"``, every column as the subspace's share of it is scaled by Adam, its growth
            limited (Fira), a number of state; ``"sign"``, the sign of every entry (FRUGAL), no state;
            ``"normalized"``, its columns and rows divided by their root mean squares in turn (SinkGD), no state;
            ``"orthogonalized"``, with its singular values made about equal (Muon's step, without momentum), no
            state; ``"feedback"``, added to the next gradient (LDAdam), which needs a tensor as large as the
            weight.  docs/residuals.md compares them.
        residual_scale: factor on the residual's step, beside 1 for the step within the subspace.  With
            ``"sign"`` every entry of a weight moves by ``lr * scale * residual_scale``; with ``"normalized"`` that
            is the root mean square, with ``"orthogonalized"`` about sqrt((m - r) / m) of it, m the projected
            side.  With ``"feedback"`` factor on what is fed back, from 0 to 1.
        arithmetic: ``"torch"``: torch.optim.AdamW's; ``"galore_torch"``: that package's (eps on the
            uncorrected root, decay last, exact SVD in fp32); ``"bitsandbytes"``: decay last.  Concerns plain
            parameters too.
        state_dtype: of the moments, those of plain parameters included: ``torch.float32``, ``torch.bfloat16``
            or ``torch.uint8``, 8-bit codes with an fp32 scale for every 256 entries; None: fp32 (fp64 for
            fp64 weights) where projected, as torch does where plain.
        preset: ``"default"``, ``"published"``, ``"best"`` (uses the residual): a set of the above that
            explicit keys override, for groups with a rank.  The first and the last keep moments in 8 bits: give them
            half the shorter side as rank.
    """

    rank: int | None = None
    update_proj_gap: int | Due = 10
    schedule: str = "fixed"
    basis_from: str = "gradient"
    scale: float = 1.0
    proj_type: str = "std"
    projector: str = "range_finder"
    sketch: str = "warm"
    power: int = 1
    oversampling: int = 0
    moments: str = "rotate"
    refresh_at: str = "start"
    tolerance: float | None = None
    min_rank: int | None = None
    nonfinite: str = "skip"
    seed: int = 0
    stochastic_rounding: bool = False
    residual: str = "drop"
    residual_scale: float = 1.0
    arithmetic: str = "torch"
    state_dtype: torch.dtype | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, (str, torch.dtype, type(None))) or value not in allowed:
                raise _invalid(name, value, "one of " + ", ".join(map(repr, allowed)))
        if self.rank is not None:
            _check_int("rank", self.rank, 1, "a positive integer or None")
        if not callable(self.update_proj_gap):
            _check_int("update_proj_gap", self.update_proj_gap, 1, "a positive integer or a callable")
        elif self.schedule != "fixed":
            raise self._excluded(
                "a schedule other than 'fixed' goes with an integer update_proj_gap",
                "schedule",
                "update_proj_gap",
            )
        _check_int("power", self.power, 0, "an integer, not negative")
        _check_int("oversampling", self.oversampling, 0, "an integer, not negative")
        _check_int("seed", self.seed, 0, "an integer from 0 to 2**63 - 1")
        if self.seed >= 2**63:
            raise _invalid("seed", self.seed, "an integer from 0 to 2**63 - 1")
        _check_number("scale", self.scale, math.isfinite, "a finite number")
        if not isinstance(self.stochastic_rounding, bool):
            raise _invalid("stochastic_rounding", self.stochastic_rounding, "True or False", TypeError)
        _check_number("residual_scale", self.residual_scale, math.isfinite, "a finite number")
        for name in _OF_ONE_SIDE if self.proj_type in ("full", "tucker") else ():
            if getattr(self, name) != getattr(SubspaceOptions, name):
                raise self._excluded(f"{name} goes with a projection of one side", name, "proj_type")
        if self.tolerance is not None:
            _check_number("tolerance", self.tolerance, lambda x: 0 < x < 1, "between 0 and 1, or None")
            if self.projector != "range_finder" or self.moments == "keep":
                raise self._excluded(
                    "tolerance goes with projector='range_finder' and moments='rotate' or 'reset' (ranks change)",
                    "tolerance",
                    "projector",
                    "moments",
                )
        if self.min_rank is not None:
            _check_int("min_rank", self.min_rank, 1, "a positive integer or None")
            if self.tolerance is None:
                raise self._excluded("min_rank goes with tolerance", "min_rank", "tolerance")
            if self.rank is not None and self.min_rank > self.rank:
                raise self._excluded("min_rank must be at most rank, the cap", "min_rank", "rank")
        if self.residual == "feedback":
            if self.refresh_at == "end":
                raise self._excluded(
                    "residual='feedback' goes with refresh_at='start'", "residual", "refresh_at"
                )
            if not 0 <= self.residual_scale <= 1:
                raise self._excluded(
                    "residual='feedback' goes with a residual_scale from 0 to 1 (over 1 the error grows without bound)",
                    "residual",
                    "residual_scale",
                )
        if self.moments == "reset":
            if self.refresh_at == "end":
                raise self._excluded("moments='reset' goes with refresh_at='start'", "moments", "refresh_at")
            if self.stochastic_rounding:
                raise self._excluded(
                    "stochastic_rounding, whose random numbers go by the count of steps, goes with "
                    "moments='rotate' or 'keep'",
                    "stochastic_rounding",
                    "moments",
                )

    def _excluded(self, why: str, *names: str) -> ExcludedOptions:
        *first, last = (f"{name}={getattr(self, name)!r}" for name in names)
        error = ExcludedOptions(f"{why}, got {', '.join(first)} and {last}")
        error.names = names
        return error

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> SubspaceOptions:
        return cls(**{f.name: group[f.name] for f in fields(cls) if f.name in group})


def resolve(keys: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All subspace keys: those given, then those of a preset given with them, then `defaults`.

    A preset among the defaults comes after them.  What concerns plain parameters too is none of a preset's business
    where there is no rank, and its `residual_scale` goes with its `residual` alone: each has a length of its own.
    """
    names = [f.name for f in fields(SubspaceOptions)]
    explicit = {name: keys[name] for name in names if name in keys}
    base = {name: value for name, value in (defaults or {}).items() if name in names}
    if explicit.get("preset") is not None:
        base = {"rank": base.get("rank")}
    chosen = {**base, **explicit}
    preset = chosen.get("preset")
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise _invalid("preset", preset, "one of " + ", ".join(map(repr, PRESETS)) + " or None")
    of_preset = dict(PRESETS[preset]) if preset is not None else {}
    if chosen.get("rank") is None:
        of_preset.pop("state_dtype", None)
    if chosen.get("residual", of_preset.get("residual")) != of_preset.get("residual"):
        of_preset.pop("residual_scale", None)
    try:
        options = SubspaceOptions(**{**of_preset, **chosen})
    except ExcludedOptions as error:
        if any(name in of_preset and name not in chosen for name in error.names):
            raise ExcludedOptions(f"{error} (by preset={preset!r})") from None
        raise
    return {name: getattr(options, name) for name in names}  # asdict would copy a callable


def given(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The least of these keys that, given to an optimizer, resolve to all of them."""
    least = {name: resolved[name] for name in ("preset", "rank", "residual")}
    return least | {name: resolved[name] for name, value in resolve(least).items() if resolved[name] != value}
