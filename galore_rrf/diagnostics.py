"""How well subspaces follow their gradients: what an optimizer has seen of each projected parameter.

`GaLoreAdamW.diagnostics` and `GaLoreAdamW.register_refresh_hook` are the way to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from galore_rrf.outcomes import Told
from galore_rrf.subspace import BOTH, LEFT, RIGHT, TUCKER

_SIDES = {RIGHT: "right", LEFT: "left", BOTH: "both", TUCKER: "tucker"}


@dataclass(frozen=True)
class SubspaceRecord:
    """One projected parameter.

    Norms are Frobenius norms, of a stack of matrices those of all together.  They and the energy are of the last
    step that was measured, every step with a refresh is, and of the basis that this step used.  NaN is what has not
    been measured since this optimizer object was made or loaded a state dict.

    Attributes:
        name: of the parameter, or its group and its place there.
        shape: of the parameter.
        side: the projected one: ``"right"``, ``"left"``, ``"both"``; or ``"tucker"``, each long mode.
        rank: columns of the basis, or of each, now.
        steps: that its moments have taken.
        refreshes: of its subspace, by the state.
        since_refresh: steps taken after the one with the last refresh; None before the first.
        measured_after: as much at the measured step, 0: measured with the refresh; None: not measured.
        gradient_norm: ||G||.
        residual_norm: ||G - Q Q^T G||, by Pythagoras; under a thousandth of ||G|| fp32 does not tell it from 0.
        energy_kept: ||Q^T G||^2 / ||G||^2, from 0 to 1.  Of several bases these are of all together, angles the mean.
        squared_cosine: of the angles between the last two subspaces, the mean: 1 where nothing turned, about
            rank / side where nothing was kept.  Between ranks that differ, of the smaller one's angles.
        angle: whose squared cosine that is, in degrees.
        refresh_seconds: wall-clock time of its refreshes by this optimizer object; of those that share a call its
            part by cost.  NaN where one was not timed, as on CUDA.
        state_bytes: of all tensors of its state now.
    """

    name: str
    shape: tuple[int, ...]
    side: str
    rank: int
    steps: int
    refreshes: int
    since_refresh: int | None
    measured_after: int | None
    gradient_norm: float
    residual_norm: float
    energy_kept: float
    squared_cosine: float
    angle: float
    refresh_seconds: float
    state_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        refreshed = "never" if self.since_refresh is None else f"{self.since_refresh} steps ago"
        return (
            f"{self.name} {'x'.join(map(str, self.shape))}: rank {self.rank} ({self.side}), "
            f"energy kept {self.energy_kept:.3f}, turned by {self.angle:.1f} degrees, "
            f"{self.refreshes} refreshes, the last {refreshed}"
        )


@dataclass
class _Seen:
    """Of one parameter."""

    after: int | None = None
    gradient: float = math.nan  # squared norms
    projected: float = math.nan
    cosine: float = math.nan
    seconds: float = 0.0


class Observations:
    """What steps have told of projected parameters beyond their states; no part of these."""

    def __init__(self) -> None:
        self._seen: MutableMapping[Tensor, _Seen] = WeakIdKeyDictionary()
        self._refreshed: list[Tensor] = []

    def note(
        self,
        params: Sequence[Tensor],
        states: Sequence[Mapping[str, Any]],
        seconds: Sequence[float],
        told: Sequence[Told],
    ) -> None:
        """A step of `params` is known; `seconds` is what each one's refresh took."""
        for p, state, elapsed, one in zip(params, states, seconds, told, strict=True):
            seen = self._seen.setdefault(p, _Seen())
            gradient, projected, cosine = one.measures
            if one.stepped and not math.isnan(gradient):
                seen.after = one.taken - state["last_refresh"]
                seen.gradient, seen.projected = gradient, projected
            if one.refreshed:
                seen.cosine = cosine
                seen.seconds += elapsed or math.nan
                self._refreshed.append(p)

    def refreshed(self) -> set[Tensor]:
        """The parameters with a refresh since this was last asked for."""
        found, self._refreshed = set(self._refreshed), []
        return found

    def record(self, name: str, p: Tensor, state: Mapping[str, Any], taken: int) -> SubspaceRecord:
        """`taken`: the steps of the state."""
        seen = self._seen.get(p, _Seen())
        return SubspaceRecord(
            name=name,
            shape=tuple(p.shape),
            side=_SIDES[state["side"]],
            rank=state["rank"],
            steps=taken,
            refreshes=state["refreshes"],
            since_refresh=taken - 1 - state["last_refresh"] if state["refreshes"] else None,
            measured_after=seen.after,
            gradient_norm=math.sqrt(seen.gradient),
            residual_norm=math.sqrt(max(seen.gradient - seen.projected, 0.0)),
            energy_kept=min(seen.projected / seen.gradient, 1.0) if seen.gradient else math.nan,
            squared_cosine=min(seen.cosine, 1.0),
            angle=math.degrees(math.acos(math.sqrt(min(seen.cosine, 1.0)))),
            refresh_seconds=seen.seconds,
            state_bytes=sum(t.nbytes for t in state.values() if isinstance(t, Tensor)),
        )


def names_of(index: int, group: Mapping[str, Any]) -> dict[Tensor, str]:
    """What the parameters of a group are called, by their names or places."""
    params = group["params"]
    names = group.get("param_names") or [f"group {index}, parameter {j}" for j in range(len(params))]
    return dict(zip(params, names, strict=True))


def named_states(
    groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, dict[str, Any]]
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """The projected parameters that have a state."""
    for i, group in enumerate(groups):
        for p, name in names_of(i, group).items():
            if "refreshes" in states.get(p, ()):
                yield name, p, states[p]


def squared_cosine(old: Tensor, new: Tensor) -> Tensor:
    """The mean squared cosine of the angles between two subspaces, given by orthonormal columns; fp64, a scalar.

    (..., m, r) and (..., m, l).  Columns of zeros are none; NaN where one basis has no others, which the mean over
    a stack leaves out.
    """
    ranks = [basis.any(-2).sum(-1) for basis in (old, new)]
    dtype = torch.promote_types(torch.float32, old.dtype)
    squares = (new.to(dtype).mT @ old.to(dtype)).double().square().sum((-2, -1))
    return (squares / torch.minimum(*ranks)).nanmean()


RefreshHook = Callable[[Any, list[SubspaceRecord]], object]
