"""Which parameters of a model are projected."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from galore_rrf.options import RefinementKeys

INCLUDE = ("attn", "attention", "mlp", "feed_forward", "experts")
EXCLUDE = ("embed", "head", "norm")

NamedParameter = tuple[str, Tensor]


def param_groups(
    model: nn.Module | Iterable[NamedParameter],
    rank: int,
    *,
    lr: float | Tensor | None = None,
    plain_lr: float | Tensor | None = None,
    include: Sequence[str] = INCLUDE,
    exclude: Sequence[str] = EXCLUDE,
    **keys: Unpack[RefinementKeys],
) -> list[dict[str, Any]]:
    """Two parameter groups: the matrices inside attention and MLP, projected, and all others, plain AdamW.

    Goes by name and number of dimensions alone: a parameter with at least two dimensions is projected if its
    name contains one of `include` and none of `exclude`, in capitals or not, and it is not tied (a tensor under
    two names goes to the plain group).  The groups name their parameters, so errors and checkpoints can.

    Args:
        model: a module, or its named parameters.
        rank: of the projected group; further keys of it in `keys` (`options.SubspaceOptions`).
        lr, plain_lr: learning rates of the projected and of the plain group; None: the optimizer's.
            They want tuning apart: plain AdamW groups like several times what projected ones do.
        include, exclude: parts of names.

    Raises:
        ValueError: where no parameter is projected; it lists the names.
    """
    if isinstance(model, nn.Module):
        named: list[NamedParameter] = list(model.named_parameters(remove_duplicate=False))
    else:
        named = list(model)
    uses = Counter(id(p) for _, p in named)
    projected: list[NamedParameter] = []
    plain: list[NamedParameter] = []
    seen: set[int] = set()
    for name, p in named:
        if id(p) in seen:
            continue
        seen.add(id(p))
        chosen = _has(name, include) and not _has(name, exclude)
        (projected if chosen and p.dim() >= 2 and uses[id(p)] == 1 else plain).append((name, p))
    if not projected:
        raise ValueError(
            f"no parameter is to be projected: none with two dimensions or more has one of {tuple(include)} and "
            f"none of {tuple(exclude)} in its name; the names are {', '.join(name for name, _ in named) or '(none)'}"
        )
    groups: list[dict[str, Any]] = [{"params": projected, "rank": rank, **keys}]
    if lr is not None:
        groups[0]["lr"] = lr
    if plain:
        groups.append({"params": plain, "rank": None})
        if plain_lr is not None:
            groups[1]["lr"] = plain_lr
    return groups


def _has(name: str, parts: Sequence[str]) -> bool:
    return any(part.lower() in name.lower() for part in parts)


def with_rank(params: Any, rank: int | None) -> Any:
    """The groups that the optimizer's own `params` and `rank` mean.

    Named parameters follow the rule of `param_groups`; bare tensors are all projected, with a warning
    about elongated matrices, which are often embeddings; groups are left as they are.
    """
    if rank is None or isinstance(params, Tensor):
        return params
    params = list(params)
    if params and all(isinstance(p, tuple) for p in params):
        return param_groups(params, rank)
    elongated = [
        f"parameter {i} of shape {tuple(p.shape)}"
        for i, p in enumerate(params)
        if isinstance(p, torch.Tensor) and p.dim() == 2 and max(p.shape) > 4 * min(p.shape) > 4 * rank
    ]
    if elongated:
        warnings.warn(
            f"rank={rank} projects all of the tensors given, some with a side over 4 times the other, as "
            f"embeddings have, which are better left plain: {', '.join(elongated)}; pass "
            "galore_rrf.param_groups(model, rank) or model.named_parameters() to choose by name",
            stacklevel=3,
        )
    return params
