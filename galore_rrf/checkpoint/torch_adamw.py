"""The checkpoint of a torch.optim.AdamW, moved into the subspaces of its own first moments."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from galore_rrf import moments, ops, tucker
from galore_rrf.checkpoint.match import Match, imported
from galore_rrf.checkpoint.schema import check_plain_state, flattened
from galore_rrf.range_finder import Status
from galore_rrf.subspace import LEFT, RIGHT, compute_dtype, projected_form, rank_of, side_of

if TYPE_CHECKING:
    from galore_rrf.optimizer import GaLoreAdamW

_OVERSAMPLING = 8


def from_torch_adamw(
    optimizer: GaLoreAdamW, state_dict: Mapping[str, Any], params: Iterable[Any] | None = None
) -> dict[str, Any]:
    """The state dict of a `torch.optim.AdamW` as one for ``optimizer.load_state_dict``.

    That of a `GaLoreAdamW` without projected parameters will do, 8-bit codes included.
    Plain parameters keep their state.  A projected one takes its basis, at the rank of its group, from its
    first moment, and both moments move into it as at any refresh; the next refresh is a full interval away.
    Where the moment is zero or not finite there is nothing to keep: that parameter starts anew.
    Learning rates and all other options stay those of `optimizer`.

    Args:
        optimizer: whose parameters the state is for; unchanged.
        state_dict: of the other optimizer; unchanged.
        params: what the other optimizer was given, such as ``model.parameters()``: tells which state is
            whose.  None: by the names of parameters where both have them, else by position in equal groups.

    Raises:
        ValueError: where parameters cannot be told apart, or a state does not fit its parameter.
    """
    dropped: list[str] = []

    def convert(match: Match) -> Mapping[str, Any] | None:
        if match.is_projected and "max_exp_avg_sq" in match.saved:
            dropped.append(match.name)
        return converted(match)

    result = imported(optimizer, state_dict, params, convert)
    if dropped:
        warnings.warn(
            f"max_exp_avg_sq is left behind (projected parameters have no amsgrad): {', '.join(dropped)}",
            stacklevel=2,
        )
    return result


def converted(match: Match) -> Mapping[str, Any] | None:
    """The state of a parameter that was plain AdamW; None where there is none worth keeping."""
    check_plain_state(match.name, match.p, match.saved)
    return projected_state(match) if match.is_projected else match.saved


def projected_state(match: Match) -> dict[str, Any] | None:
    """Full moments in the subspace of the first; a matrix of a stack without one has a basis of zeros."""
    p, options = match.p, match.options
    rank = rank_of(p, options)
    assert rank is not None
    dtype = compute_dtype(p)
    flat = flattened(match.saved)
    side = side_of(p, options.proj_type)
    exp_avg, exp_avg_sq = (
        projected_form(moments.values(flat, name).detach().view(p.shape), side).to(p.device, dtype)
        for name in moments.NAMES
    )
    steps = float(match.saved["step"])
    beta1, beta2 = map(float, match.saved_group["betas"])
    corrections = 1 - beta1**steps, 1 - beta2**steps
    clock = {"rank": rank, "side": side, "key": match.key, "refreshes": 1, "last_refresh": int(steps)}
    if side not in (RIGHT, LEFT):
        several = tucker.find({**clock, "refreshes": 0}, exp_avg, rank, options)
        if steps == 0 or several is None or not bool(exp_avg_sq.isfinite().all()):
            return None
        bases = {name: basis.to(p.dtype) for name, basis in several[0].items()}
        rotated = tucker.rotated(exp_avg, exp_avg_sq, {}, bases, corrections)
        return {
            "step": torch.tensor(steps),
            **dict(zip(moments.NAMES, rotated, strict=True)),
            **bases,
            **clock,
        }
    oriented = exp_avg.mT if side == RIGHT else exp_avg
    basis, _, _, status = ops.range_finder(
        oriented,
        rank,
        oversampling=_OVERSAMPLING,
        ordered=True,
        coefficients=False,
        seed=options.seed,
        key=match.key,
    )
    known = (status != Status.zero) & (status != Status.nonfinite) & exp_avg_sq.isfinite().all(-1).all(-1)
    if steps == 0 or not bool(known.any()):
        return None
    basis = basis.to(p.dtype)
    length = oriented.shape[-2]
    identity = torch.eye(length, dtype=dtype, device=p.device).expand(*oriented.shape[:-1], length)
    rotated = ops.rotate_moments(exp_avg, exp_avg_sq, identity, basis, side, *corrections)
    found = dict(zip((*moments.NAMES, "basis"), (*rotated, basis), strict=True))
    return {
        "step": torch.tensor(steps),
        **{name: value.where(known[..., None, None], 0) for name, value in found.items()},
        **clock,
    }
