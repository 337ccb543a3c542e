"""The optimizer's state dict: its schema, and validation before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from galore_rrf.subspace import (
    LEFT,
    RIGHT,
    SCHEMA_VERSION,
    STATE_KEYS,
    as_matrices,
    compute_dtype,
    is_projected,
    resolve,
    state_shapes,
)

_TENSORS = STATE_KEYS[:4]
_INTS = STATE_KEYS[4:]


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
                f"Invalid schema_version: {version!r} (this version of galore_rrf reads {SCHEMA_VERSION})"
            )
        completed.append({**loaded, **resolve(loaded)})
    return completed


def projected_states(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Checks every saved state against its parameter and yields those of projected ones, ready for use.

    `groups` are the optimizer's own, `saved_groups` complete, `state` that of the state dict.  Tensors are
    copies, on the parameter's device and in the dtype that they have while training.
    Raises ValueError naming the parameter and what is wrong.
    """
    for own, saved in zip(groups, saved_groups, strict=True):
        names = own.get("param_names") or saved.get("param_names") or []
        for i, (p, saved_id) in enumerate(zip(own["params"], saved["params"], strict=True)):
            if saved_id not in state:
                continue
            name = repr(names[i]) if i < len(names) else f"parameter {saved_id}"
            if is_projected(p, saved["rank"]):
                yield p, _projected_state(name, p, state[saved_id])
            else:
                _check_plain_state(name, p, state[saved_id])


def check_sizes(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where the groups or their numbers of parameters differ."""
    sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state dict has parameter groups of {sizes[1]} parameters, the optimizer of {sizes[0]}"
        )
    ids = list(chain.from_iterable(g["params"] for g in saved))
    if len(set(ids)) != len(ids):
        raise ValueError("the state dict names a parameter in two places")


def _projected_state(name: str, p: Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
    missing = [key for key in STATE_KEYS if key not in saved]
    if missing:
        known = "; it looks like plain AdamW's" if "exp_avg" in saved and "basis" in missing else ""
        raise ValueError(f"the state of {name}, which is projected, lacks {', '.join(missing)}{known}")
    unknown = [str(key) for key in saved if key not in STATE_KEYS]
    if unknown:
        raise ValueError(f"the state of {name} has unknown keys {', '.join(unknown)}")
    for key in _TENSORS:
        if not isinstance(saved[key], Tensor) or not saved[key].is_floating_point():
            raise ValueError(f"{key} of {name} must be a floating-point tensor, got {_kind(saved[key])}")
    for key in _INTS:
        value = saved[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{key} of {name} must be an integer, not negative, got {value!r}")
    if saved["step"].numel() != 1:
        raise ValueError(f"step of {name} must be one number, got shape {tuple(saved['step'].shape)}")
    if saved["side"] not in (RIGHT, LEFT):
        raise ValueError(f"side of {name} must be 0 (right) or 1 (left), got {saved['side']}")
    if saved["rank"] < 1:
        raise ValueError(f"rank of {name} must be positive, got {saved['rank']}")
    moments, basis = state_shapes(as_matrices(p), saved["side"], saved["rank"])
    for key, shape in (("exp_avg", moments), ("exp_avg_sq", moments), ("basis", basis)):
        if tuple(saved[key].shape) != shape:
            raise ValueError(
                f"{key} of {name} has shape {tuple(saved[key].shape)}, but a parameter of shape "
                f"{tuple(p.shape)} at rank {saved['rank']} needs {shape}"
            )

    def copy(value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.detach().to(device=p.device, dtype=dtype, copy=True).contiguous()

    return {
        "step": saved["step"].detach().to(device="cpu", dtype=torch.float32, copy=True).reshape(()),
        "exp_avg": copy(saved["exp_avg"], compute_dtype(p)),
        "exp_avg_sq": copy(saved["exp_avg_sq"], compute_dtype(p)),
        "basis": copy(saved["basis"], p.dtype),
        **{key: saved[key] for key in _INTS},
    }


def _check_plain_state(name: str, p: Tensor, saved: Mapping[str, Any]) -> None:
    if "basis" in saved:
        raise ValueError(f"the state of {name} is projected, but the parameter is plain here")
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        if key in saved and isinstance(saved[key], Tensor) and saved[key].shape != p.shape:
            raise ValueError(
                f"{key} of {name} has shape {tuple(saved[key].shape)}, but the parameter has {tuple(p.shape)}"
            )


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
