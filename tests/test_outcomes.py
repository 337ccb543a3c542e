"""Outcomes: steps that a device decides on, counted when it has told.  A pending step is put in by hand, as
`add` does behind a step on CUDA, so that it can be tested without one."""

import copy
import math
import pickle
import threading

import pytest
import torch

from galore_rrf import GaLoreAdamW
from galore_rrf.outcomes import Outcomes, Pending, Told

SKIPPED, DECAYED, STEPPED, REFRESHED = range(4)


class Event:
    """Of a device that is done when asked to be."""

    waited = 0

    def synchronize(self):
        self.waited += 1


def state(step=0.0, refreshes=0, last_refresh=0):
    return {"step": torch.tensor(step), "refreshes": refreshes, "last_refresh": last_refresh}


@pytest.fixture
def _not_capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.usefixtures("_not_capturing")
def test_pending_steps_are_counted_once(monkeypatch):
    """Guards against a refresh that is counted twice, at the wrong step, or for another parameter."""
    states = [state(7, 2, 5), state(7, 2, 5), state(7, 1, 0)]
    outcomes, event = Outcomes(), Event()
    outcomes._taken.update({s["step"]: 7 for s in states})  # counts on a device, as known
    monkeypatch.setattr(Outcomes, "taken", lambda self, s: self._taken[s["step"]])
    told = []
    measures = torch.tensor([[4.0, 3.0, 0.5], [2.0, 1.0, math.nan], [math.nan, math.nan, math.nan]])
    known = torch.tensor([REFRESHED, STEPPED, SKIPPED], dtype=torch.uint8)
    outcomes._pending.append(Pending(event, known, measures, states, False, told.extend))
    for _ in range(2):
        outcomes.settle()
        assert [s["refreshes"] for s in states] == [3, 2, 1]
        assert [s["last_refresh"] for s in states] == [7, 5, 0]
        assert [outcomes.taken(s) for s in states] == [8, 8, 7]
        assert event.waited == 1
        assert [t.taken for t in told] == [7, 7, 7]
        assert [(t.stepped, t.refreshed) for t in told] == [(True, True), (True, False), (False, False)]
        torch.testing.assert_close(torch.tensor([t.measures for t in told]), measures, equal_nan=True)


@pytest.mark.usefixtures("_not_capturing")
def test_pending_resets_begin_again(monkeypatch):
    """Guards against a count that goes on where the device's has begun again."""
    states = [state(1, 2, 5), state(8, 2, 5)]
    outcomes = Outcomes()
    outcomes._taken.update({s["step"]: 7 for s in states})
    monkeypatch.setattr(Outcomes, "taken", lambda self, s: self._taken[s["step"]])
    told = torch.tensor([REFRESHED, STEPPED], dtype=torch.uint8)
    outcomes._pending.append(Pending(Event(), told, None, states, True, None))
    outcomes.settle()
    assert [(s["refreshes"], s["last_refresh"]) for s in states] == [(3, 0), (2, 5)]
    assert [outcomes.taken(s) for s in states] == [1, 8]


def test_a_step_before_a_capture_is_counted_without_a_call(monkeypatch):
    """Guards against a graph that is captured on the decision of the step before last."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    one = state(4, 1, 0)
    outcomes, event = Outcomes(), Event()
    outcomes._captured = True  # of another graph
    outcomes._taken[one["step"]] = 4
    monkeypatch.setattr(Outcomes, "taken", lambda self, s: self._taken[s["step"]])
    told = torch.tensor([255], dtype=torch.uint8)
    outcomes._pending.append(Pending(event, told, None, [one], False, None))
    timer = threading.Timer(0.05, lambda: told.fill_(REFRESHED))
    timer.start()
    outcomes.settle()
    timer.join()
    assert (one["refreshes"], one["last_refresh"], outcomes.taken(one)) == (2, 4, 5)
    assert event.waited == 0


@pytest.mark.usefixtures("_not_capturing")
def test_replays_are_counted_by_the_device(monkeypatch):
    """Guards against a schedule that does not know of steps that a graph has taken."""
    one = state(4, 1, 0)
    outcomes, event = Outcomes(), Event()
    outcomes._captured = True
    outcomes._taken[one["step"]] = 4
    outcomes._pending.append(
        Pending(event, torch.tensor([STEPPED], dtype=torch.uint8), None, [one], False, None)
    )
    outcomes.settle()
    assert len(outcomes._taken) == 0  # read again when asked for
    outcomes._taken[one["step"]] = 5
    outcomes.settle()
    assert len(outcomes._taken) == 0, "after replays alone"


def test_a_count_on_a_device_is_known_once_it_was_read():
    """Guards against a capture that waits for a count."""
    outcomes, one = Outcomes(), {"step": torch.zeros((), device="meta")}  # any but the CPU
    assert not outcomes.is_known(one)
    outcomes._taken[one["step"]] = 4
    assert outcomes.is_known(one)
    assert outcomes.is_known(state())


@pytest.mark.usefixtures("_not_capturing")
def test_a_step_that_failed_is_not_counted():
    """Guards against counts that are off by one for good after an error."""
    states = [state(3), state(3)]
    outcomes = Outcomes()
    outcomes._taken.update({s["step"]: 3 for s in states})
    outcomes.forget(states[:1])
    assert list(outcomes._taken.values()) == [3]


def test_an_optimizer_forgets_what_a_step_that_failed_had_taken(monkeypatch):
    """Guards against a count that goes on from before a step of which nobody knows how far it came."""
    w = torch.nn.Parameter(torch.ones(6, 9))
    opt = GaLoreAdamW([w], rank=2)
    w.grad = torch.rand_like(w)
    opt.step()
    opt._history.outcomes._taken[opt.state[w]["step"]] = 1
    monkeypatch.setattr("galore_rrf.ops.projected_adamw_", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.step()
    assert len(opt._history.outcomes._taken) == 0


def test_on_a_cpu_outcomes_are_known_at_once():
    """Guards against a schedule that lags where nothing has to be waited for."""
    outcomes, states = Outcomes(), [state(8, 2, 5), state(7, 2, 5)]
    outcomes.add(torch.tensor([REFRESHED, DECAYED], dtype=torch.uint8), states)
    assert [(s["refreshes"], s["last_refresh"]) for s in states] == [(3, 7), (2, 5)]
    assert outcomes.taken(states[0]) == 8
    told = []
    outcomes.add(torch.tensor([STEPPED, SKIPPED], dtype=torch.uint8), states, torch.ones(2, 3), told.extend)
    assert told == [Told(7, True, False, (1.0, 1.0, 1.0)), Told(7, False, False, (1.0, 1.0, 1.0))]


@pytest.mark.parametrize("change", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_and_saved_states_count_what_is_pending(device, change):
    """Guards against a copy or a checkpoint that has a step's moments, but not its count."""
    w = torch.nn.Parameter(torch.ones(6, 9, device=device))
    opt = GaLoreAdamW([w], rank=2, update_proj_gap=1)
    for _ in range(3):
        w.grad = torch.rand_like(w)
        opt.step()
    assert opt.state_dict()["state"][0]["refreshes"] == 3
    w.grad = torch.rand_like(w)
    opt.step()
    other = change(opt)
    assert [s["refreshes"] for s in other.state.values()] == [4]
