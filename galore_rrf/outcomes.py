"""What the host knows of steps that a device decides on: nobody waits for them, so it lags behind by one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_STEPPED, _REFRESHED = 2, 3  # outcomes of ops.projected_adamw_, which are ordered
_UNKNOWN = 255


@dataclass(frozen=True)
class Told:
    """What became of a state in one step.

    Attributes:
        taken: steps before it.
        stepped, refreshed: whether a step was taken, and in a new subspace.
        measures: of `ops.projected_adamw_`; NaN where it measured nothing.
    """

    taken: int
    stepped: bool
    refreshed: bool
    measures: tuple[float, float, float]


Listener = Callable[[list[Told]], object]


@dataclass(frozen=True)
class Pending:
    """A step that the device is at: what it tells is in pinned memory after the event."""

    event: torch.cuda.Event
    outcomes: Tensor
    measures: Tensor | None
    states: list[dict[str, Any]]
    resets: bool
    listener: Listener | None


class Outcomes:
    """Counts steps and refreshes of the states of projected parameters.

    On a CPU an outcome is known at once.  On CUDA it is copied to pinned memory behind the step, and read
    before the next one, or before the state is saved.
    """

    def __init__(self) -> None:
        self._pending: list[Pending] = []
        self._taken: MutableMapping[Tensor, int] = WeakIdKeyDictionary()  # by the count on the device
        self._captured = False  # whether a graph may have been replayed, whose steps the device alone counts

    def taken(self, state: dict[str, Any]) -> int:
        """Steps taken before, as far as known."""
        step: Tensor = state["step"]
        if step.device.type == "cpu":
            return int(step)
        if step not in self._taken:
            self._taken[step] = int(step)  # waits; once, after loading
        return self._taken[step]

    def is_known(self, state: dict[str, Any]) -> bool:
        """Whether `taken` need not wait."""
        return state["step"].device.type == "cpu" or state["step"] in self._taken

    def add(
        self,
        outcomes: Tensor,
        states: Sequence[dict[str, Any]],
        measures: Tensor | None = None,
        listener: Listener | None = None,
        *,
        resets: bool = False,
    ) -> None:
        """The outcomes (uint8, one a state) and measures (fp64, three a state) of a step that has been enqueued.

        `resets`: at a refresh steps are counted from 0 again (``moments="reset"``).
        The listener is told of all states, in their order, once the step is known; never, where it is captured.
        """
        if outcomes.device.type == "cpu":

            def taken(state: dict[str, Any], outcome: int) -> int:
                return int(state["step"]) - (outcome >= _STEPPED)

            _count(outcomes, states, taken, measures, listener)
        elif torch.cuda.is_current_stream_capturing():
            self._captured = True
        else:
            with torch.cuda.device(outcomes.device):
                measured = None if measures is None else _on_its_way(measures)
                copy = _on_its_way(outcomes)  # the last to come
                event = torch.cuda.Event()
                event.record()
            self._pending.append(Pending(event, copy, measured, list(states), resets, listener))

    def settle(self) -> None:
        """Waits for the steps enqueued before, and counts them."""
        if not self._pending and not self._captured:
            return
        capturing = torch.cuda.is_current_stream_capturing()
        for step in self._pending:
            if capturing:  # no event may be asked then: watched is the memory that the outcomes come to
                while bool((step.outcomes == _UNKNOWN).any()):
                    time.sleep(1e-4)
            else:
                step.event.synchronize()

            def taken(state: dict[str, Any], outcome: int, resets: bool = step.resets) -> int:
                return 0 if resets and outcome == _REFRESHED else self.taken(state)

            told = _count(step.outcomes, step.states, taken, step.measures, step.listener)
            for state, one in zip(step.states, told, strict=True):
                self._taken[state["step"]] = one.taken + one.stepped
        self._pending.clear()
        if self._captured and not capturing:
            self._taken.clear()

    def forget(self, states: Sequence[dict[str, Any]]) -> None:
        """What became of these states' step is not known."""
        for state in states:
            self._taken.pop(state["step"], None)


def _on_its_way(a: Tensor) -> Tensor:
    """A copy in pinned memory, there when the device has come to it."""
    copy = torch.full(a.shape, _UNKNOWN, dtype=a.dtype, device="cpu").pin_memory()
    return copy.copy_(a, non_blocking=True)


def _count(
    outcomes: Tensor,
    states: Sequence[dict[str, Any]],
    taken: Callable[[dict[str, Any], int], int],
    measures: Tensor | None,
    listener: Listener | None,
) -> list[Told]:
    """`taken`: the steps of a state before one with an outcome."""
    rows = [3 * [math.nan] for _ in states] if measures is None else measures.tolist()
    told = [
        Told(taken(state, outcome), outcome >= _STEPPED, outcome == _REFRESHED, (gradient, projected, cosine))
        for state, outcome, (gradient, projected, cosine) in zip(states, outcomes.tolist(), rows, strict=True)
    ]
    for state, one in zip(states, told, strict=True):
        if one.refreshed:
            state["refreshes"] += 1
            state["last_refresh"] = one.taken
    if listener is not None:
        listener(told)
    return told
