"""Other packages' optimizers as published, made to resume: checkpoints hold tensors and numbers only."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec, module_from_spec
from typing import Any
from unittest import mock

import torch

from pretrain.errors import UserError

# What its optimizer is, by field `name`: package and pinned version, modules and classes of optimizer and projector.
_PEERS = {
    "galore_torch": ("galore-torch==1.0", ("adamw", "AdamW"), ("galore_projector", "GaLoreProjector")),
    "apollo": ("apollo-torch==1.0.3", ("apollo", "AdamW"), ("random_projector", "GradientProjector")),
}
_PEERS["apollo_mini"] = _PEERS["apollo"]

# The published numbers of its projected group, which fields of the configuration override.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "galore_torch": {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    "apollo": {"update_proj_gap": 200, "scale": 1.0, "proj_type": "std"},
    "apollo_mini": {"update_proj_gap": 200, "scale": 128.0, "proj_type": "std"},
}
_PUBLISHED["apollo"] |= {"proj": "random", "scale_type": "channel"}
_PUBLISHED["apollo_mini"] |= {"proj": "random", "scale_type": "tensor"}

PEERS = tuple(_PEERS)


def peer(name: str, matrices: dict[str, Any], plain: dict[str, Any], **common: Any) -> torch.optim.Optimizer:
    """The optimizer over a projected group, published numbers in it where it has none, and a plain one.

    UserError where the package is not installed.
    """
    requirement, optimizer, projector = _PEERS[name]
    package = requirement.partition("==")[0].replace("-", "_")
    published = _published(package, *optimizer, requirement)
    resumable = type(published.__name__, (_Resumable, published), {})
    resumable.projector = _published(package, *projector, requirement)
    groups = [{**_PUBLISHED[name], **matrices}, plain]
    made: torch.optim.Optimizer = resumable(groups, no_deprecation_warning=True, **common)
    return made


def _published(package: str, module: str, name: str, requirement: str) -> Any:
    """A class of one of its modules; the package's __init__, which asks for bitsandbytes, is not executed."""
    spec = find_spec(package)
    if spec is None:
        raise UserError(f"{package} is not installed: pip install --no-deps {requirement}")
    with mock.patch.dict(sys.modules, {package: module_from_spec(spec)}):
        return getattr(importlib.import_module(f"{package}.{module}"), name)


class _Resumable:
    """Projectors, objects of the package's own, are dicts in its state dicts."""

    projector: type

    def state_dict(self) -> dict[str, Any]:
        whole = super().state_dict()
        states = {i: {k: _plain(v) for k, v in state.items()} for i, state in whole["state"].items()}
        return {**whole, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, state in state_dict["state"].items():
            if "projector" in state:  # as saved: the base class takes words in it apart
                made = object.__new__(self.projector)
                vars(made).update(state["projector"])
                self.state[params[i]]["projector"] = made


def _plain(value: Any) -> Any:
    return vars(value) if hasattr(value, "ortho_matrix") else value
