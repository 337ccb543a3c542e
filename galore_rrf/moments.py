"""How a moment is kept in the state: in fp64, fp32 or bf16, or as 8-bit codes with a scale for every block.

The codes are the dynamic data type of Dettmers et al. 2022 (arXiv 2110.02861): magnitudes relative to the
largest of their block, in seven decades.  The entry beside a coded moment is its name with ``_scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_rrf import ops

NAMES = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
CODES = torch.uint8
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": CODES}
"""The dtypes of the group key `state_dtype`, by the names that configurations have for them."""
BLOCK = 256
"""Entries that share a scale."""
LEAST_CODED = 4096
"""Smaller moments keep the compute dtype: there is little to save, and norms and biases are sensitive."""


def kept_dtype(entries: int, state_dtype: torch.dtype | None, compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype that a moment is kept in under the group key `state_dtype`."""
    if state_dtype is None or (state_dtype == CODES and entries < LEAST_CODED):
        return compute_dtype
    return state_dtype


def kept(name: str, values: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state's entries for the moment `name`; a stack (e, m, n) is coded matrix by matrix."""
    if dtype != CODES:
        return {name: values.to(dtype)}
    codes, scale = ops.quantize_moment(values, name == "exp_avg")
    return {name: codes, f"{name}_scale": scale}


def values(state: Mapping[str, Any], name: str) -> Tensor:
    """The moment `name` of a state, in floating point."""
    moment: Tensor = state[name]
    if moment.dtype != CODES:
        return moment
    return ops.dequantize_moment(moment, state[f"{name}_scale"], name == "exp_avg")


def keep_as(state: dict[str, Any], dtype: torch.dtype, *, flat: bool) -> None:
    """Keeps both moments of a state in another dtype; `flat`: coded in one run, as those of plain parameters."""
    for name in NAMES:
        moment = state[name]
        entries = {**state, name: moment.flatten()} if flat else state
        state |= kept(name, values(entries, name), dtype)
        state[name] = state[name].view(moment.shape)
        if dtype != CODES:
            state.pop(f"{name}_scale", None)


def scale(state: Mapping[str, Any], name: str) -> Tensor:
    """The scale of the moment `name`; empty where it is not coded."""
    found: Tensor | None = state.get(f"{name}_scale")
    return torch.empty(0, device="cpu") if found is None else found
