"""The checkpoints of galore_torch 1.0, without its classes: a pickled projector is read as its attributes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from galore_rrf import moments
from galore_rrf.checkpoint.match import Match, imported
from galore_rrf.checkpoint.schema import kind_of
from galore_rrf.checkpoint.torch_adamw import converted
from galore_rrf.subspace import BOTH, RIGHT, side_of

if TYPE_CHECKING:
    from galore_rrf.optimizer import GaLoreAdamW

_PROJECTOR = "galore_torch.galore_projector.GaLoreProjector"
_PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


_BLOCKS = (256, 2048)  # of bitsandbytes, now and formerly


class _Projector:
    """The attributes of a pickled projector."""


def load_galore_torch(path: str | PathLike[str]) -> Any:
    """What a file written by torch.save holds, galore_torch's projectors included, on the CPU.

    Nothing of galore_torch is needed or run.
    Raises ValueError where the file holds any other class or function.
    """
    with safe_globals([(_Projector, _PROJECTOR)]):
        foreign = get_unsafe_globals_in_checkpoint(path)
        if foreign:
            raise ValueError(
                f"{path} holds {', '.join(sorted(foreign))}, which is not read: only tensors, numbers, "
                f"containers and {_PROJECTOR} are"
            )
        return torch.load(path, map_location="cpu", weights_only=True)


def from_galore_torch(
    optimizer: GaLoreAdamW, state_dict: Mapping[str, Any], params: Iterable[Any] | None = None
) -> dict[str, Any]:
    """The state dict of galore_torch's `GaLoreAdamW` or `GaLoreAdamW8bit` as one that `optimizer` loads.

    Bases, moments (8-bit ones decoded) and step counts are taken over, and the next refresh comes when
    galore_torch would have made it.  Learning rates and all other options stay those of `optimizer`:
    ``projector="svd", moments="keep", arithmetic="galore_torch"`` with the rank, scale, update_proj_gap
    and proj_type of before continues the same run.  A parameter that was plain there and is projected here
    is moved into a subspace as by `from_torch_adamw`.

    Args: as of `from_torch_adamw`; `state_dict` for example from `load_galore_torch`.

    Raises:
        ValueError: where parameters cannot be told apart, or a state does not fit its parameter.
    """
    return imported(optimizer, state_dict, params, _converted)


def _converted(match: Match) -> Mapping[str, Any] | None:
    steps = match.saved.get("step")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"step of {match.name} must be a positive integer, got {steps!r}")
    saved = {"step": torch.tensor(float(steps), device="cpu"), **_moments(match.name, match.saved)}
    if "projector" not in match.saved:
        return converted(match._replace(saved=saved))
    if not match.is_projected:
        raise ValueError(f"the state of {match.name} is projected, but the parameter is plain here")
    projector = match.saved["projector"]
    proj_type = getattr(projector, "proj_type", None)
    if proj_type not in _PROJ_TYPES:
        raise ValueError(
            f"proj_type of the projector of {match.name} is {proj_type!r} "
            f"(can be imported: {', '.join(map(repr, _PROJ_TYPES))})"
        )
    found = getattr(projector, "ortho_matrix", None)  # missing or None in one that was never used
    bases: list[Any] = list(found) if proj_type == "full" and isinstance(found, (list, tuple)) else [found]
    for basis in bases:
        if not isinstance(basis, Tensor) or basis.dim() != 2:
            raise ValueError(
                f"ortho_matrix of the projector of {match.name} must be a matrix, got {kind_of(basis)}"
            )
    if len(bases) != (2 if proj_type == "full" else 1):
        raise ValueError(
            f"ortho_matrix of the projector of {match.name} must be two matrices, got {len(bases)}"
        )
    gap = getattr(projector, "update_proj_gap", None)
    if isinstance(gap, bool) or not isinstance(gap, int) or gap < 1:
        raise ValueError(
            f"update_proj_gap of the projector of {match.name} must be a positive integer, got {gap!r}"
        )
    side = side_of(match.p, proj_type)
    basis = bases[0].mT if side == RIGHT else bases[0]
    # It refreshes where the count of steps taken is a multiple of the interval.
    refreshed = (steps - 1) // gap
    return {
        **saved,
        "basis": basis,
        **({"basis_right": bases[1].mT} if side == BOTH else {}),
        "rank": basis.shape[-1],
        "side": side,
        "key": match.key,
        "refreshes": refreshed + 1,
        "last_refresh": refreshed * gap,
    }


def _moments(name: str, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Both moments in floating point: bitsandbytes names its own state1 and state2."""
    saved = {**saved, **saved.get("__bnb_optimizer_quant_state__", {})}
    if "state1" in saved:
        return {key: _decoded(name, saved, i) for i, key in enumerate(moments.NAMES, 1)}
    missing = [key for key in moments.NAMES if key not in saved]
    if missing:
        raise ValueError(f"the state of {name} lacks {', '.join(missing)}")
    return {key: saved[key] for key in moments.NAMES}


def _decoded(name: str, saved: Mapping[str, Any], i: int) -> Tensor:
    """A moment of bitsandbytes: codes into a table of values, a maximum for every 256 or 2048 entries."""
    codes = _tensor(name, saved, f"state{i}")
    if codes.dtype != torch.uint8:
        return codes
    absmax, table = (_tensor(name, saved, f"{key}{i}") for key in ("absmax", "qmap"))
    if table.shape != (256,):
        raise ValueError(f"qmap{i} of {name} must have 256 entries, got {kind_of(table)}")
    blocks = {ceil(codes.numel() / block): block for block in _BLOCKS}
    block = blocks.get(absmax.numel())
    if block is None:
        raise ValueError(
            f"absmax{i} of {name} must have {' or '.join(map(str, blocks))} entries, one for every "
            f"{' or '.join(map(str, _BLOCKS))}, got {absmax.numel()}"
        )
    values = table[codes.flatten().long()]
    return (values * absmax.repeat_interleave(block)[: codes.numel()]).view(codes.shape)


def _tensor(name: str, saved: Mapping[str, Any], key: str) -> Tensor:
    if key not in saved:
        raise ValueError(f"the state of {name} lacks {key}")
    value = saved[key]
    if not isinstance(value, Tensor):
        raise ValueError(f"{key} of {name} must be a tensor, got {kind_of(value)}")
    return value
