"""What groups and gradients must be for a step, told before anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from galore_rrf.options import SubspaceKeys, SubspaceOptions
from galore_rrf.outcomes import Outcomes
from galore_rrf.subspace import is_projected, is_torchs, side_of

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of which our own steps can be taken
_OFTEN = 50  # below this interval kept moments do harm

# What a CUDA graph can capture of projected groups.
_CAPTURED: dict[str, tuple[Any, ...]] = {
    "tolerance": (None,),
    "projector": ("range_finder",),
    "moments": ("rotate", "reset"),
    "oversampling": (0,),
    "proj_type": ("std", "reverse_std", "right", "left"),
    "nonfinite": ("skip",),
    "schedule": ("fixed",),
    "basis_from": ("gradient",),
}
NO_STATE_TO_CAPTURE = (
    "no step can be captured in a CUDA graph before there are states: take some first, also after loading"
)


def did_you_mean(key: str) -> str:
    close = get_close_matches(key, SubspaceKeys.__annotations__, n=1, cutoff=0.75)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_torchs_alone(group: dict[str, Any]) -> str | None:
    """Raises for options that torch's own step has alone; what makes the group's steps ours, if anything does."""
    reason = f"rank={group['rank']}" if group["rank"] is not None else None
    for key in ("state_dtype", "arithmetic"):
        if reason is None and group[key] != getattr(SubspaceOptions, key):
            reason = f"{key}={group[key]!r}"
    for name in ("amsgrad", "differentiable"):
        if reason is not None and group[name]:
            raise ValueError(f"Invalid {name}: True (must be False in a group with {reason})")
    return reason


def check_group(group: dict[str, Any]) -> None:
    """Raises for what makes no sense together, warns of what does harm."""
    reason = check_torchs_alone(group)
    if reason is None:
        return
    params = group["params"]
    options = SubspaceOptions.of(group)
    names: dict[Tensor, str] = {}
    for i, item in enumerate([params] if isinstance(params, Tensor) else params):
        p = item[1] if isinstance(item, tuple) else item
        if not isinstance(p, Tensor) or (is_torchs(p, options) and not is_projected(p, options)):
            continue
        name = item[0] if isinstance(item, tuple) else f"parameter {i}"
        if p.dtype not in _DTYPES:
            raise TypeError(
                f"Invalid dtype of {name}: {p.dtype} (must be float64, float32, bfloat16 or float16 in a group with "
                f"{reason})"
            )
        if p in names:  # a matrix a thread: they would write over each other
            raise ValueError(f"{name} is {names[p]} again (a group with {reason} may hold a matrix once)")
        names[p] = name
    if group["rank"] is None:
        return
    gap = group["update_proj_gap"]
    if group["moments"] != "keep" or callable(gap):
        return
    adaptive = group["schedule"] == "adaptive"
    if adaptive or gap < _OFTEN:
        often = "as often as schedule='adaptive' asks for" if adaptive else f"every {gap} steps"
        warnings.warn(
            f"moments='keep' with a new subspace {often} ruins training: moments='rotate' moves them along; "
            f"keep them only where update_proj_gap is {_OFTEN} or more",
            stacklevel=4,
        )


def gradient_of(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def _names(group: dict[str, Any], params: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    names = dict(zip(group["params"], group.get("param_names", ()), strict=False))
    for p in params:
        yield names.get(p, f"a parameter of shape {tuple(p.shape)}"), p


def check_states(
    group: dict[str, Any],
    state: Mapping[Tensor, dict[str, Any]],
    projected: list[Tensor],
    plain: list[Tensor],
) -> None:
    """Raises where a parameter's state is not of the kind that its group asks for by now."""
    for params, has_bases in ((projected, True), (plain, False)):
        for name, p in _names(group, params):
            known = state.get(p)
            if not known:
                continue
            key = None
            if ("side" in known) != has_bases:
                key = "rank"
            elif has_bases and known["side"] != side_of(p, group["proj_type"]):
                key = "proj_type"
            if key is not None:
                raise ValueError(
                    f"the state of {name} was made under another {key} than the group's {group[key]!r} "
                    "(nothing was written)"
                )


def check_gradients(group: dict[str, Any], params: Iterable[Tensor]) -> None:
    """Raises for gradients that no step can be taken with, before anything is written."""
    for name, p in _names(group, params):
        grad = gradient_of(p)
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"GaLoreAdamW does not support sparse gradients, and that of {name} is {grad.layout}"
            )
        if (grad.shape, grad.dtype, grad.device) != (p.shape, p.dtype, p.device):
            raise ValueError(
                f"the gradient of {name} is {tuple(grad.shape)} {grad.dtype} on {grad.device}, "
                f"the parameter {tuple(p.shape)} {p.dtype} on {p.device} (they must agree)"
            )


def check_finite(group: dict[str, Any], params: Iterable[Tensor]) -> None:
    for name, p in _names(group, params):
        if not bool(torch.isfinite(torch.linalg.vector_norm(gradient_of(p), float("inf")))):
            raise FloatingPointError(f"the gradient of {name} is not finite (nothing was written)")


def check_captured(
    group: dict[str, Any],
    params: Iterable[Tensor],
    states: Mapping[Tensor, dict[str, Any]],
    outcomes: Outcomes,
) -> None:
    """Raises for what a CUDA graph cannot capture: steps that wait for the device, and states yet to be made."""
    for key, captured in _CAPTURED.items():
        if group[key] not in captured:
            raise RuntimeError(
                f"{key}={group[key]!r} cannot be captured in a CUDA graph, since its steps wait for the device "
                f"(captured: {key}={' or '.join(map(repr, captured))})"
            )
    for p in params:
        state = states.get(p)
        if not state or state["step"].device != p.device or not outcomes.is_known(state):
            raise RuntimeError(NO_STATE_TO_CAPTURE)
