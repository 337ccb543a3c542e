"""The optimizers: every one with a learning rate for the matrices inside attention and MLP and one for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import galore_rrf
from galore_rrf import moments
from pretrain.config import OURS, PROJECTING, Config, OptimizerConfig
from pretrain.controls import Lion, SignSGD, Together
from pretrain.errors import UserError
from pretrain.peers import PEERS, peer

STATE_DTYPES = {None: None, **moments.STATE_DTYPES}

Optimizer = torch.optim.Optimizer | Together


def build_optimizer(model: nn.Module, config: Config) -> Optimizer:
    """The optimizer of ``config.optimizer`` over `model`: first group the matrices, last all else."""
    o = config.optimizer
    matrices, plain = _split(model)
    if o.name in PROJECTING:
        largest = max(min(p.shape) for _, p in matrices)
        if o.rank >= largest:
            raise UserError(
                f"Invalid optimizer.rank: {o.rank} (must be below {largest}, the matrices' shorter side)"
            )
    first = {"params": matrices, "lr": o.lr}
    rest = {"params": plain, "lr": o.lr if o.plain_lr is None else o.plain_lr}
    adam: dict[str, Any] = {"betas": (o.beta1, o.beta2), "eps": o.eps, "weight_decay": o.weight_decay}
    keys = o.group_keys()
    dtype = STATE_DTYPES[o.state_dtype]
    try:
        if o.name in OURS:
            if o.name == "galore_svd":
                keys = {**keys, "preset": "published", "projector": "svd"}
            if dtype is not None:  # over the preset's
                keys = {**keys, "state_dtype": dtype}
            groups = [{**first, "rank": o.rank, **keys}, {**rest, "rank": None}]
            return galore_rrf.GaLoreAdamW(groups, fused=True, state_dtype=dtype, **adam)
        if o.name in PEERS:
            bare = [{**group, "params": [p for _, p in group["params"]]} for group in (first, rest)]
            return peer(o.name, {**bare[0], "rank": o.rank, **keys}, bare[1], **adam)
        if o.name == "adamw" and dtype is not None:  # which torch's has not
            return galore_rrf.GaLoreAdamW([first, rest], fused=True, state_dtype=dtype, **adam)
        if o.name in ("adamw", "lora"):
            return torch.optim.AdamW([first, rest], fused=True, **adam)
        return Together(_control(o, first), torch.optim.AdamW([rest], fused=True, **adam))
    except (ValueError, TypeError) as error:
        raise UserError(f"Invalid optimizer: {error}") from error


def _split(model: nn.Module) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    """What is trained: the matrices inside attention and MLP, or the adapters beside them, and all else."""
    chosen = projected(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [(n, p) for n, p in trained if p in chosen], [(n, p) for n, p in trained if p not in chosen]


def projected(model: nn.Module) -> set[nn.Parameter]:
    """The matrices that GaLore projects, adapters beside them included."""
    return {p for _, p in galore_rrf.param_groups(model, rank=1)[0]["params"]}


def _control(o: OptimizerConfig, group: dict[str, Any]) -> torch.optim.Optimizer:
    rule = {"muon": torch.optim.Muon, "lion": Lion, "sign": SignSGD}[o.name]
    return rule([group], lr=o.lr, weight_decay=o.weight_decay)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of an optimizer's state, or of a part of it, whatever it nests them in."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif hasattr(value, "__dict__"):  # galore_torch's projectors
        yield from tensors(vars(value))


def ranks(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """The rank of every projected parameter."""
    named = ((name, optimizer.state.get(p, {})) for name, p in model.named_parameters())
    return {name: state["rank"] for name, state in named if "rank" in state}
