"""torch.distributed.checkpoint reads into tensors that are there already: they must have the right shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from galore_rrf import moments
from galore_rrf.subspace import bases_of

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    from galore_rrf.optimizer import GaLoreAdamW


def match_shapes(
    model: nn.Module, optimizer: GaLoreAdamW, metadata: Metadata, prefix: str | None = None
) -> None:
    """Gives the optimizer's state the shapes that a distributed checkpoint has, for ``dcp.load``.

    Needed where ranks differ from parameter to parameter, as a tolerance chooses them.  Zeros take the
    place of the optimizer's state, which is made first where there is none.

    Args:
        model: whose parameters the optimizer trains; names them as it did for the checkpoint.
        optimizer: its state is replaced.
        metadata: of the checkpoint, ``FileSystemReader(path).read_metadata()``.
        prefix: where the optimizer is in the checkpoint, such as ``"optim"`` or ``"train.gen"``; needed only
            where it holds more than one with parameters of these names.

    Raises ValueError where the checkpoint has no state for a parameter, 8-bit codes where the optimizer has
    none, or the reverse, or more than one optimizer that may be meant.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    own: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    saved = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    start = _start(list(own["state"]), saved, prefix)
    own["state"] = {
        name: _matched(name, state, saved, f"{start}state.{name}.") for name, state in own["state"].items()
    }
    set_optimizer_state_dict(model, optimizer, own)


def _start(names: list[str], saved: Iterable[str], prefix: str | None) -> str:
    """What the keys of the optimizer's state start with."""
    steps = [f".{key}" for key in saved if key.endswith(".step")]
    ends = [f".state.{name}.step" for name in names]
    found = {step.removesuffix(end)[1:] for end in ends for step in steps if step.endswith(end)}
    if prefix is None:
        # "state.w" of an optimizer ends as "w" of one within its state would.
        found = {a for a in found if not any(_below(a, b) for b in found)}
    known = ", ".join(map(repr, sorted(found)))
    if prefix is None and len(found) > 1:
        raise ValueError(
            f"the checkpoint holds more than one optimizer with parameters of these names ({known}): pass "
            "prefix=, the one that is meant"
        )
    if prefix is not None and found and prefix not in found:
        raise ValueError(
            f"Invalid prefix: {prefix!r} (the checkpoint has parameters of these names at {known})"
        )
    start = next(iter(found), "") if prefix is None else prefix
    return f"{start}." if start else ""


def _below(a: str, b: str) -> bool:
    """Whether the place `a` is in the state of an optimizer at `b`."""
    return f".{a}.".startswith(f".{b}.state." if b else ".state.")


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
    bases = list(bases_of(matched).values())
    if bases:
        matched.update(rank=bases[0].shape[-1], refreshes=0, last_refresh=0)
    return matched
