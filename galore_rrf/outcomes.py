"""What the host knows of steps that a device decides on: nobody waits for them, so it lags behind by one."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_STEPPED, _REFRESHED = 2, 3  # outcomes of ops.projected_adamw_, which are ordered


class Outcomes:
    """Counts steps and refreshes of the states of projected parameters.

    On a CPU an outcome is known at once.  On CUDA it is copied to pinned memory behind the step, and read
    before the next one, or before the state is saved.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[torch.cuda.Event, Tensor, list[dict[str, Any]]]] = []
        self._taken: MutableMapping[Tensor, int] = WeakIdKeyDictionary()  # by the count on the device

    def taken(self, state: dict[str, Any]) -> int:
        """Steps taken before, as far as known."""
        step: Tensor = state["step"]
        if step.device.type == "cpu":
            return int(step)
        if step not in self._taken:
            self._taken[step] = int(step)  # waits; once, after loading
        return self._taken[step]

    def add(self, outcomes: Tensor, states: Sequence[dict[str, Any]]) -> None:
        """The outcomes (uint8, one a state) of a step that has been enqueued."""
        if outcomes.device.type == "cpu":
            _count(outcomes, states, lambda state: int(state["step"]) - 1)
        elif torch.cuda.is_current_stream_capturing():
            self._taken.clear()  # a graph's replays are counted on the device alone
        else:
            copy = torch.empty(outcomes.shape, dtype=outcomes.dtype, device="cpu", pin_memory=True)
            with torch.cuda.device(outcomes.device):
                copy.copy_(outcomes, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._pending.append((event, copy, list(states)))

    def settle(self) -> None:
        """Waits for the steps enqueued before, and counts them; not while a graph is captured."""
        if not self._pending or torch.cuda.is_current_stream_capturing():
            return
        for event, outcomes, states in self._pending:
            event.synchronize()
            _count(outcomes, states, self.taken)
            for state, outcome in zip(states, outcomes.tolist(), strict=True):
                self._taken[state["step"]] = self.taken(state) + (outcome >= _STEPPED)
        self._pending.clear()


def _count(
    outcomes: Tensor, states: Sequence[dict[str, Any]], taken: Callable[[dict[str, Any]], int]
) -> None:
    """`taken`: the steps of a state before this one."""
    for state, outcome in zip(states, outcomes.tolist(), strict=True):
        if outcome == _REFRESHED:
            state["refreshes"] += 1
            state["last_refresh"] = taken(state)
