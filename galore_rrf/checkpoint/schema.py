"""The schema of a state dict, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from galore_rrf import moments
from galore_rrf.options import SubspaceOptions, resolve
from galore_rrf.schedule import MEASURES
from galore_rrf.subspace import (
    BOTH,
    LEFT,
    OPTION_NUMBERS,
    OPTION_TENSORS,
    RIGHT,
    SCHEMA_VERSION,
    STATE_KEYS,
    TUCKER,
    bases_of,
    compute_dtype,
    is_projected,
    is_torchs,
    modes_of,
    option_shapes,
    projected_shape,
    state_shapes,
)

INTS = STATE_KEYS[4:]
_IMPORT = (
    "galore_rrf.checkpoint.from_torch_adamw and from_galore_torch make a state dict that loads of those "
    "optimizers'"
)


CALLABLE = 0
"""What stands in a state dict for a callable `update_proj_gap`."""

# Keys that files of version 1 may be without: they are as the optimizer has them.
_LATER = (
    "stochastic_rounding",
    "residual",
    "residual_scale",
    "refresh_at",
    "min_rank",
    "schedule",
    "basis_from",
)


def completed_groups(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The saved groups, those of a plain torch.optim.AdamW with the subspace keys of `groups` added.

    Raises ValueError for a schema version that this package does not know.
    """
    completed = []
    for own, loaded in zip(groups, saved, strict=True):
        version = loaded.get("schema_version")
        if version is None:
            keys = {**resolve(own), "schema_version": SCHEMA_VERSION}
            completed.append({**loaded, **keys})
            continue
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"Invalid schema_version: {version!r} (this galore_rrf reads {SCHEMA_VERSION}; later ones "
                "need the galore_rrf that wrote them)"
            )
        later = {key: own[key] for key in _LATER if key in own and key not in loaded}
        if loaded.get("update_proj_gap") == CALLABLE:
            if not callable(own["update_proj_gap"]):
                raise ValueError(
                    "the state dict was saved with a callable update_proj_gap, which it does not hold: give the "
                    f"optimizer that loads it one (its group has update_proj_gap={own['update_proj_gap']!r})"
                )
            loaded = {**loaded, "update_proj_gap": own["update_proj_gap"]}
        completed.append({**loaded, **resolve({**later, **loaded})})
    return completed


def check_sizes(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where the groups or their numbers of parameters differ."""
    sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved]
    if sizes[0] != sizes[1]:
        foreign = not any("schema_version" in g for g in saved)
        raise ValueError(
            f"the state dict has parameter groups of {sizes[1]} parameters, the optimizer of {sizes[0]}"
            + (f"; {_IMPORT}" if foreign else "")
        )
    ids = list(chain.from_iterable(g["params"] for g in saved))
    if len(set(ids)) != len(ids):
        raise ValueError("the state dict names a parameter in two places")


def checked_states(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Checks every saved state against its parameter and yields those that are not torch's, ready for use.

    `groups` are the optimizer's own, `saved_groups` complete, `state` that of the state dict.  Tensors are
    copies, on the parameter's device and in the dtype that they have while training.
    Raises ValueError naming the parameter and what is wrong.
    """
    for own, saved in zip(groups, saved_groups, strict=True):
        names = own.get("param_names") or saved.get("param_names") or []
        for i, (p, saved_id) in enumerate(zip(own["params"], saved["params"], strict=True)):
            if not state.get(saved_id):
                continue
            name = repr(names[i]) if i < len(names) else f"parameter {saved_id}"
            options = SubspaceOptions.of(saved)
            if is_projected(p, options):
                check_projected_state(name, p, state[saved_id])
                yield p, _projected_state(p, state[saved_id], options.state_dtype)
            else:
                check_plain_state(name, p, state[saved_id], amsgrad=saved.get("amsgrad", False))
                # torch's own loading casts moments to the dtype of the weight.
                if not is_torchs(p, options) or state[saved_id]["exp_avg"].dtype == moments.CODES:
                    yield p, _plain_state(p, state[saved_id], options.state_dtype)


# --- Checks -------------------------------------------------------------------------------------------


def check_projected_state(name: str, p: Tensor, saved: Mapping[str, Any]) -> None:
    """Raises ValueError unless `saved` is a state of the projected parameter `p`."""
    is_tucker = isinstance(saved.get("side"), int) and saved["side"] == TUCKER
    missing = [key for key in STATE_KEYS if key not in saved and not (is_tucker and key == "basis")]
    if missing:
        foreign = "exp_avg" in saved and "basis" in missing
        raise ValueError(
            f"the state of {name}, which is projected, lacks {', '.join(missing)}"
            + (f"; it looks like plain AdamW's or galore_torch's: {_IMPORT}" if foreign else "")
        )
    more = ("basis_right", *(f"basis_{i}" for i in range(p.dim())), *OPTION_TENSORS, *OPTION_NUMBERS)
    known = (*STATE_KEYS, *moments.SCALES, *more)
    unknown = [str(key) for key in saved if key not in known]
    if unknown:
        raise ValueError(f"the state of {name} has unknown keys {', '.join(unknown)}")
    for key in INTS:
        value = saved[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{key} of {name} must be an integer, not negative, got {value!r}")
    side = saved["side"]
    if side not in (RIGHT, LEFT, BOTH, TUCKER):
        raise ValueError(f"side of {name} must be 0 (right), 1 (left), 2 (both) or 3 (Tucker), got {side}")
    if side == TUCKER and p.dim() < 4:
        raise ValueError(
            f"side of {name} is 3 (Tucker), but a parameter of shape {tuple(p.shape)} has no four dimensions"
        )
    if saved["rank"] < 1:
        raise ValueError(f"rank of {name} must be positive, got {saved['rank']}")
    if not isinstance(saved["step"], Tensor):
        raise ValueError(f"step of {name} must be a tensor, got {kind_of(saved['step'])}")
    check_step(name, saved["step"])
    if saved["last_refresh"] > float(saved["step"]):
        raise ValueError(
            f"last_refresh of {name} must be at most its step, {float(saved['step']):.0f}, "
            f"got {saved['last_refresh']}"
        )
    _check_rank(name, p, side, saved["rank"])
    shape, bases = state_shapes(p, side, saved["rank"])
    found = bases_of(saved)
    for key in (*bases, *found):
        if (key in bases) != (key in found):
            raise ValueError(
                f"side of {name} is {side}, but the state has {'no' if key in bases else 'a'} {key} "
                f"(rank {saved['rank']})"
            )
    needs = f"a parameter of shape {tuple(p.shape)} at rank {saved['rank']}"
    scale = (ceil(prod(shape) / moments.BLOCK),) if side == TUCKER else None
    _check_moments(name, saved, shape, needs, scale)
    for key, basis in bases.items():
        check_tensor(f"{key} of {name}", saved[key], basis, needs)
    for key, (shape, _) in option_shapes(p).items():
        if key in saved:
            check_tensor(f"{key} of {name}", saved[key], shape, needs)
    _check_numbers(name, saved)


def _check_numbers(name: str, saved: Mapping[str, Any]) -> None:
    interval = saved.get("interval", 1)
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval of {name} must be a positive integer, got {interval!r}")
    for key in MEASURES:
        value = saved.get(key, 0.0)
        if not isinstance(value, float) or not 0 <= value <= 1:
            raise ValueError(f"{key} of {name} must be a float from 0 to 1, got {value!r}")


def _check_rank(name: str, p: Tensor, side: int, rank: int) -> None:
    what = f"of a parameter of shape {tuple(p.shape)}, got {rank}"
    shorter = min(projected_shape(p)[-2:])
    if side != TUCKER and rank > shorter:
        raise ValueError(f"rank of {name} must be at most {shorter}, the shorter side {what}")
    if side == TUCKER and not modes_of(p, side, rank):
        raise ValueError(f"rank of {name} must be less than the length of a mode {what}")


def check_plain_state(name: str, p: Tensor, saved: Mapping[str, Any], *, amsgrad: bool = False) -> None:
    """Raises ValueError unless `saved` is a state of the parameter `p` under AdamW."""
    if bases_of(saved) or "projector" in saved:
        raise ValueError(f"the state of {name} is projected, where one of plain AdamW is expected")
    names = (*moments.NAMES, "max_exp_avg_sq") if amsgrad else moments.NAMES
    missing = [key for key in ("step", *names) if key not in saved]
    if missing:
        raise ValueError(f"the state of {name} lacks {', '.join(missing)}")
    check_step(name, saved["step"])
    shape, scale, of_complex = tuple(p.shape), (ceil(p.numel() / moments.BLOCK),), p.is_complex()
    _check_moments(name, saved, shape, "the parameter", scale=scale, of_complex=of_complex)
    if amsgrad:
        what = f"max_exp_avg_sq of {name}"
        check_tensor(what, saved["max_exp_avg_sq"], shape, "the parameter", of_complex=of_complex)


def check_step(name: str, step: object) -> None:
    """A number will do: torch converts those of old checkpoints."""
    if isinstance(step, Tensor):
        if not step.is_floating_point() or step.numel() != 1:
            raise ValueError(f"step of {name} must be one floating-point number, got {kind_of(step)}")
    elif isinstance(step, bool) or not isinstance(step, (int, float)):
        raise ValueError(f"step of {name} must be a tensor, got {kind_of(step)}")
    if not (float(step) >= 0 and float(step).is_integer()):
        raise ValueError(f"step of {name} must be a whole number, not negative, got {float(step)}")


def _check_moments(
    name: str,
    saved: Mapping[str, Any],
    shape: tuple[int, ...],
    needs: str,
    scale: tuple[int, ...] | None = None,
    *,
    of_complex: bool = False,
) -> None:
    for key in moments.NAMES:
        coded = isinstance(saved[key], Tensor) and saved[key].dtype == moments.CODES
        check_tensor(f"{key} of {name}", saved[key], shape, needs, coded=coded, of_complex=of_complex)
        scale_key = f"{key}_scale"
        if coded != (scale_key in saved):
            is_so = "8-bit" if coded else "not 8-bit"
            raise ValueError(
                f"{key} of {name} is {is_so}, but the state has {'no' if coded else 'a'} {scale_key}"
            )
        if coded:
            blocks = scale or (*shape[:-2], ceil(prod(shape[-2:]) / moments.BLOCK))
            check_tensor(f"{scale_key} of {name}", saved[scale_key], blocks, f"{key} of shape {shape}")


def check_tensor(
    what: str,
    value: object,
    shape: tuple[int, ...],
    needs: str,
    *,
    coded: bool = False,
    of_complex: bool = False,
) -> None:
    if of_complex:
        if not isinstance(value, Tensor) or not value.is_complex():
            raise ValueError(f"{what} must be a complex tensor, as the parameter is, got {kind_of(value)}")
    elif not isinstance(value, Tensor) or not (coded or value.is_floating_point()):
        raise ValueError(f"{what} must be a floating-point tensor, got {kind_of(value)}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}, but {needs} needs {shape}")


def kind_of(value: object) -> str:
    """What a value is, for messages."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return type(value).__name__


# --- Conversion ---------------------------------------------------------------------------------------


def _projected_state(p: Tensor, saved: Mapping[str, Any], state_dtype: torch.dtype | None) -> dict[str, Any]:
    return {
        "step": step_tensor(saved),
        **_moments(p, saved, state_dtype),
        **{key: copied(p, basis, p.dtype) for key, basis in bases_of(saved).items()},
        **{key: copied(p, saved[key], dtype) for key, (_, dtype) in option_shapes(p).items() if key in saved},
        **{key: saved[key] for key in INTS},
        **{key: saved[key] for key in OPTION_NUMBERS if key in saved},
    }


def _plain_state(p: Tensor, saved: Mapping[str, Any], state_dtype: torch.dtype | None) -> dict[str, Any]:
    kept = _moments(p, flattened(saved), state_dtype)
    return {"step": step_tensor(saved), **kept, **{name: kept[name].view(p.shape) for name in moments.NAMES}}


def flattened(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A plain state with its moments flat, as they are coded."""
    return {**saved, **{name: saved[name].reshape(-1) for name in moments.NAMES}}


def _moments(p: Tensor, saved: Mapping[str, Any], state_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Both moments as their group keeps them; codes stay as they are where it keeps codes."""
    entries: dict[str, Tensor] = {}
    for name in moments.NAMES:
        moment = saved[name]
        if moment.dtype == state_dtype == moments.CODES:
            scale = f"{name}_scale"
            entries[name] = copied(p, moment, moment.dtype)
            entries[scale] = copied(p, saved[scale], torch.float32)
            continue
        values = copied(p, moments.values(saved, name), compute_dtype(p))
        dtype = moments.kept_dtype(values.numel(), state_dtype, values.dtype)
        entries |= moments.kept(name, values, dtype)
    return entries


def step_tensor(saved: Mapping[str, Any]) -> Tensor:
    """The step as torch keeps it: an fp32 scalar on the CPU."""
    return torch.tensor(float(saved["step"]), dtype=torch.float32, device="cpu")


def copied(p: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the file for use beside `p`."""
    return value.detach().to(device=p.device, dtype=dtype, copy=True).contiguous()
