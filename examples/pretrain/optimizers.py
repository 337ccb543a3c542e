"""The optimizers: every one with a learning rate for the matrices inside attention and MLP and one for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import galore_rrf
from pretrain.config import Config
from pretrain.errors import UserError

STATE_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}
_SUBSPACE_KEYS = ("tolerance", "update_proj_gap", "scale", "sketch", "moments", "proj_type")


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of ``config.optimizer`` over `model`, with groups ``matrices`` and ``plain``."""
    o = config.optimizer
    common = {
        "lr": o.lr,
        "betas": (o.beta1, o.beta2),
        "eps": o.eps,
        "weight_decay": o.weight_decay,
        "fused": True,
    }
    keys: dict[str, Any] = {key: getattr(o, key) for key in _SUBSPACE_KEYS if getattr(o, key) is not None}
    if o.preset is not None:
        keys["preset"] = o.preset
    if o.name == "galore_svd":
        keys = {**keys, "preset": "published", "projector": "svd"}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    try:
        if o.name == "lora":
            adapters = [(name, p) for name, p in trained if "lora_" in name]
            others = [(name, p) for name, p in trained if "lora_" not in name]
            groups = [{"params": adapters}, {"params": others}]
        else:
            groups = galore_rrf.param_groups(model, o.rank, **keys)
            largest = max(min(p.shape) for _, p in groups[0]["params"])
            if o.name != "adamw" and o.rank >= largest:
                raise UserError(
                    f"Invalid optimizer.rank: {o.rank} (must be below {largest}, the matrices' shorter side)"
                )
        groups[-1]["lr"] = o.lr if o.plain_lr is None else o.plain_lr
        if o.name in ("adamw", "lora"):
            return torch.optim.AdamW(
                [{k: g[k] for k in ("params", "lr") if k in g} for g in groups], **common
            )
        return galore_rrf.GaLoreAdamW(groups, **common, state_dtype=STATE_DTYPES[o.state_dtype])
    except (ValueError, TypeError) as error:
        raise UserError(f"Invalid optimizer: {error}") from error


def ranks(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The rank of every projected parameter."""
    named = ((name, optimizer.state.get(p, {})) for name, p in model.named_parameters())
    return {name: state["rank"] for name, state in named if "rank" in state}
