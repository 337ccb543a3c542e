"""When a subspace is refreshed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heapreplace
from typing import Any

from galore_rrf.outcomes import Told

SCHEDULES = ("fixed", "staggered", "adaptive")

MOST = 16
"""Adaptive intervals are at most this many times update_proj_gap: four doublings."""

STEADY, TURNED = 0.7, 0.3
"""Mean squared cosines of old and new subspace: a basis that hardly turns, and one that turns a lot.

In the training of a small Llama at rank n/4 a warm start moves what lies in the noise: .8 from one step to the next,
and the same over 50 steps once training is steady.  Over the first 50 steps, where all turns, it is .4.  A random
subspace has r/m.
"""

KEPT, DROPPED = 0.9, 0.6
"""Shares of the energy that the basis kept at first: what a steady one keeps to the end of its interval, and what is
so little that the refresh is due at once.

A subspace that turns evenly out of its gradient's loses 1 - cos^2 of the angle: .9 is 18 degrees, and after twice as
long 37 degrees and .64.  So an interval that was doubled is not halved for it, but for short ones, whose first and
last step are not seen: these may go up and down by one doubling.
"""


@dataclass(frozen=True)
class Progress:
    """What a callable `update_proj_gap` is told of a projected parameter before each of its steps.

    The last three are 0 before they are measured, which takes one pass over the gradient a step.

    Attributes:
        name: of the parameter, or its group and its place there.
        step: steps taken; with ``moments="reset"`` since the last refresh.
        refreshes: of its subspace; 0: the next step makes the first, whatever the answer.
        last_refresh: steps taken before the last one.
        energy: ||R||^2 / ||G||^2 of the first step after the last refresh, whose gradient the basis was not found of.
        energy_now: of the last step.
        cosine: mean squared cosine of the angles between the last two subspaces.
    """

    name: str
    step: int
    refreshes: int
    last_refresh: int
    energy: float
    energy_now: float
    cosine: float


Due = Callable[[Progress], bool]

MEASURES = ("energy", "energy_now", "cosine")
"""Entries of a state that is measured in every step: see `Progress`."""


def asked(due: Due, name: str, taken: int, state: Mapping[str, Any]) -> bool:
    """What the callable says of a state (empty: none yet); what it raises names the parameter."""
    measures = {key: state.get(key, 0.0) for key in MEASURES}
    refreshes, last = (state.get(key, 0) for key in ("refreshes", "last_refresh"))
    try:
        answer = due(Progress(name, taken, refreshes, last, **measures))
    except BaseException as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"raised by update_proj_gap for {name} (nothing was written)")
        raise
    if not isinstance(answer, bool):
        raise TypeError(
            f"update_proj_gap returned {answer!r} for {name} (must be True or False; nothing was written)"
        )
    return answer


def is_due(
    state: Mapping[str, Any], taken: int, schedule: str, gap: int, phase: int, *, resets: bool
) -> bool:
    """Whether the step that follows `taken` steps refreshes; a refresh that failed stays due.

    Args:
        phase: of a staggered schedule, whose refreshes after the first come where the step count is `phase`
            modulo `gap`: one that came late, or before the schedule was chosen, is in turn again with the next.
        resets: whether steps are counted from 0 again at each refresh (``moments="reset"``).
    """
    if state["refreshes"] == 0:
        return True
    interval = gap
    if schedule == "adaptive":
        if state["energy_now"] < DROPPED * state["energy"]:
            return True
        interval = min(state["interval"], MOST * gap)
    elif schedule == "staggered" and not (resets and state["refreshes"] > 1):
        interval = gap - (state["last_refresh"] - phase) % gap
    return bool(taken - state["last_refresh"] >= interval)


def learn(state: dict[str, Any], gap: int | Due, told: Told) -> None:
    """Enters what a step has measured into a state that is measured, and adapts its interval."""
    gradient, projected, cosine = told.measures
    if not told.stepped or not 0 < gradient < math.inf:
        return
    now = min(projected / gradient, 1.0)
    if not told.refreshed:
        state["energy"] = state["energy"] or now
    else:
        if not math.isnan(cosine):
            state["cosine"] = min(cosine, 1.0)
            if not callable(gap):
                state["interval"] = _adapted(state, gap)
        state["energy"] = 0.0
    state["energy_now"] = now


def _adapted(state: Mapping[str, Any], gap: int) -> int:
    """The next interval, by what the last one was like."""
    interval = min(int(state["interval"]), MOST * gap)
    if state["cosine"] <= TURNED or state["energy_now"] < DROPPED * state["energy"]:
        return max(interval // 2, 1)
    if state["cosine"] >= STEADY and state["energy_now"] >= KEPT * state["energy"]:
        return min(2 * interval, MOST * gap)
    return interval


@lru_cache(maxsize=64)
def phases(costs: tuple[int, ...], gap: int) -> tuple[int, ...]:
    """Steps (0 to gap - 1) over which refreshes of these costs are spread so that the dearest step is cheap.

    A function of its arguments alone, so the same in every process.  Dearest first, each to the step with the least
    so far (Graham 1969): at most 4/3 of the best possible; no two share a step where there are steps enough.  What
    costs nothing has no turn.
    """
    turns = sorted((i for i, cost in enumerate(costs) if cost), key=lambda i: (-costs[i], i))
    count = min(gap, len(turns))
    loads = [(0, i) for i in range(count)]
    heapify(loads)
    found = [0] * len(costs)
    for i in turns:
        load, place = loads[0]
        found[i] = place * gap // count
        heapreplace(loads, (load + costs[i], place))
    return tuple(found)
