"""What the host knows of steps that a device decides on: nobody waits for them, so it lags behind by one."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_STEPPED, _REFRESHED = 2, 3  # outcomes of ops.projected_adamw_, which are ordered
_UNKNOWN = 255


class Outcomes:
    """Counts steps and refreshes of the states of projected parameters.

    On a CPU an outcome is known at once.  On CUDA it is copied to pinned memory behind the step, and read
    before the next one, or before the state is saved.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[torch.cuda.Event, Tensor, list[dict[str, Any]]]] = []
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

    def add(self, outcomes: Tensor, states: Sequence[dict[str, Any]]) -> None:
        """The outcomes (uint8, one a state) of a step that has been enqueued."""
        if outcomes.device.type == "cpu":
            _count(outcomes, states, lambda state: int(state["step"]) - 1)
        elif torch.cuda.is_current_stream_capturing():
            self._captured = True
        else:
            copy = torch.full(outcomes.shape, _UNKNOWN, dtype=outcomes.dtype, device="cpu").pin_memory()
            with torch.cuda.device(outcomes.device):
                copy.copy_(outcomes, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._pending.append((event, copy, list(states)))

    def settle(self) -> None:
        """Waits for the steps enqueued before, and counts them."""
        if not self._pending and not self._captured:
            return
        capturing = torch.cuda.is_current_stream_capturing()
        for event, outcomes, states in self._pending:
            if capturing:  # no event may be asked then: watched is the memory that the outcomes come to
                while bool((outcomes == _UNKNOWN).any()):
                    time.sleep(1e-4)
            else:
                event.synchronize()
            _count(outcomes, states, self.taken)
            for state, outcome in zip(states, outcomes.tolist(), strict=True):
                self._taken[state["step"]] = self.taken(state) + (outcome >= _STEPPED)
        self._pending.clear()
        if self._captured and not capturing:
            self._taken.clear()

    def forget(self, states: Sequence[dict[str, Any]]) -> None:
        """What became of these states' step is not known."""
        for state in states:
            self._taken.pop(state["step"], None)


def _count(
    outcomes: Tensor, states: Sequence[dict[str, Any]], taken: Callable[[dict[str, Any]], int]
) -> None:
    """`taken`: the steps of a state before this one."""
    for state, outcome in zip(states, outcomes.tolist(), strict=True):
        if outcome == _REFRESHED:
            state["refreshes"] += 1
            state["last_refresh"] = taken(state)
