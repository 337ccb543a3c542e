"""torch.distributed.checkpoint reads into tensors that are there already: they must have the right shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from galore_rrf import moments

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    from galore_rrf.optimizer import GaLoreAdamW


def match_shapes(model: nn.Module, optimizer: GaLoreAdamW, metadata: Metadata) -> None:
    """Gives the optimizer's state the shapes that a distributed checkpoint has, for ``dcp.load``.

    Needed where ranks differ from parameter to parameter, as a tolerance chooses them.  Zeros take the
    place of the optimizer's state, which is made first where there is none.

    Args:
        model: whose parameters the optimizer trains; names them as it did for the checkpoint.
        optimizer: its state is replaced.
        metadata: of the checkpoint, ``FileSystemReader(path).read_metadata()``.

    Raises ValueError where the checkpoint has no state for a parameter, or 8-bit codes where the optimizer
    has none, or the reverse.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    own: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    saved = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    steps = (f"state.{name}.step" for name in own["state"])
    prefix = next((k.removesuffix(step) for step in steps for k in saved if k.endswith(step)), "")
    own["state"] = {
        name: _matched(name, state, saved, f"{prefix}state.{name}.") for name, state in own["state"].items()
    }
    set_optimizer_state_dict(model, optimizer, own)


def _matched(
    name: str, state: dict[str, Any], saved: dict[str, TensorStorageMetadata], prefix: str
) -> dict[str, Any]:
    matched = dict(state)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        found = saved.get(prefix + key)
        if found is None:
            raise ValueError(f"the checkpoint has no {key} of {name!r}")
        if (found.properties.dtype == moments.CODES) != (value.dtype == moments.CODES):
            raise ValueError(
                f"{key} of {name!r} is {found.properties.dtype} in the checkpoint, {value.dtype} in the "
                "optimizer: they need the same state_dtype"
            )
        matched[key] = torch.zeros(found.size, dtype=value.dtype, device=value.device)
    if "basis" in matched:
        matched["rank"] = matched["basis"].shape[-1]
    return matched
