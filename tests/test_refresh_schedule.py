"""When subspaces are refreshed: staggered, adaptive, and by a callable."""

import copy
import itertools
import math
import pickle
import sys
from collections import Counter

import pytest
import torch
from training import (
    bias,
    gradient,
    params_of,
    same,
    saved_and_loaded,
    set_gradients,
    settled,
    snapshot,
    train,
)

from galore_rrf import GaLoreAdamW
from galore_rrf.outcomes import Told
from galore_rrf.schedule import DROPPED, KEPT, MOST, STEADY, TURNED, is_due, learn, phases

pytestmark = pytest.mark.core

SHAPES = [(24, 16), (16, 24), (3, 12, 16), (40, 16), (16, 16)]


def make(device, keys, shapes=SHAPES, **options):
    params = [torch.nn.Parameter(gradient(s, 99, device=device)) for s in shapes]
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    groups = [{"params": named, "rank": 4, **keys}, {"params": [("b", bias(device))]}]
    return params, GaLoreAdamW(groups, lr=0.05, **options)


def refreshed_at(opt, params, steps):
    """The steps at which each parameter was refreshed."""
    found = [[] for _ in params]
    for step in steps:
        before = [opt.state[p]["refreshes"] if opt.state[p] else 0 for p in params]
        train(opt, params, [step])
        for i, p in enumerate(params):
            if settled(opt)[p]["refreshes"] > before[i]:
                found[i].append(step)
    return found


# --- Staggered ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [1, 2, 7, 200, 10**9])
def test_phases_share_the_cost_evenly(gap):
    """Guards against a step that stalls: the dearest one costs no more than a whole matrix above the mean."""
    costs = tuple(8 * [*4 * [4], *3 * [11]])
    found = phases(costs, gap)
    assert all(0 <= phase < gap for phase in found)
    loads = Counter()
    for cost, phase in zip(costs, found, strict=True):
        loads[phase] += cost
    if gap >= len(costs):
        assert len(loads) == len(costs)
    else:
        assert max(loads.values()) <= sum(costs) / gap + max(costs)
        assert max(loads.values()) - min(loads.values()) <= max(costs)


def test_phases_that_are_known():
    """Guards against a turn for what costs nothing, plain parameters, and against the cheapest first."""
    assert phases((0, 4, 0, 4), 10)[1::2] == (0, 5)
    first, second, both = phases((1, 1, 2), 2)
    assert first == second != both


def test_every_refresh_comes_in_its_turn(device):
    """Guards against refreshes that come too often or rarely, or together: one a step, each every interval."""
    gap = len(SHAPES)
    params, opt = make(device, {"schedule": "staggered", "update_proj_gap": gap})
    found = refreshed_at(opt, params, range(4 * gap))
    assert all(steps[0] == 0 for steps in found)
    assert sorted(steps[1] for steps in found) == list(range(1, gap + 1))
    costs = tuple(p.numel() * 4 for p in params)
    assert tuple(steps[1] % gap for steps in found) == phases(costs, gap)
    assert all(b - a == gap for steps in found for a, b in itertools.pairwise(steps[1:]))


def test_staggered_is_the_same_in_every_process_and_group(device):
    """Guards against turns that hang on what a process has seen: groups apart share the steps as one does."""
    keys = {"schedule": "staggered", "update_proj_gap": 10, "rank": 4}
    one, opt = make(device, keys)
    many = [torch.nn.Parameter(p.detach().clone()) for p in one]
    plain = bias(device)  # one that costs nothing
    other = GaLoreAdamW([{"params": [p], **keys} for p in (*many, plain)], lr=0.05)
    assert refreshed_at(opt, one, range(25)) == refreshed_at(other, many, range(25))


def test_a_late_refresh_is_in_turn_again_with_the_next(device):
    """Guards against turns that drift together: a gradient that is zero for a while makes a refresh late."""
    params, opt = make(device, {"schedule": "staggered", "update_proj_gap": 6}, SHAPES[:3])
    turn = refreshed_at(opt, params, range(8))[2][1]
    for _ in range(8, turn + 8):
        set_gradients(params, 1)
        params[2].grad.zero_()
        opt.step()
    found = refreshed_at(opt, params, range(turn + 8, turn + 26))[2]
    assert found[0] == turn + 8
    assert all(step % 6 == turn % 6 for step in found[1:])


def test_staggered_with_reset_keeps_its_interval(device):
    """Guards against turns by a count of steps that begins again at each refresh."""
    keys = {"schedule": "staggered", "update_proj_gap": 50, "moments": "reset"}
    params, opt = make(device, keys, SHAPES[:2])
    found = refreshed_at(opt, params, range(130))
    assert [steps[1:] for steps in found] in ([[50, 100], [25, 75, 125]], [[25, 75, 125], [50, 100]])


def test_an_interval_changed_while_training_counts_at_once(device):
    """Guards against turns that were fixed when training began."""
    params, opt = make(device, {"schedule": "staggered", "update_proj_gap": 1000}, SHAPES[:2])
    train(opt, params, range(3))
    opt.param_groups[0]["update_proj_gap"] = 2
    found = refreshed_at(opt, params, range(3, 11))
    assert all(steps[0] in (3, 4) for steps in found)
    assert all(b - a == 2 for steps in found for a, b in itertools.pairwise(steps[1:]))
    assert {steps[-1] for steps in found} == {9, 10}


# --- Adaptive -----------------------------------------------------------------------------------------


def turning(angle, size=24, rank=4, step=0):
    """A gradient (size x size) of that rank whose subspace turns by `angle` a step, each direction in a plane."""
    generator = torch.Generator().manual_seed(5)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))
    turned = angle * step
    left = math.cos(turned) * q[:, :rank] + math.sin(turned) * q[:, rank : 2 * rank]
    return left @ v.mT


def intervals(device, angle_at, steps, gap=4, **keys):
    """How far apart the refreshes of a gradient that turns by `angle_at(step)` come."""
    w = torch.nn.Parameter(torch.zeros(24, 24, dtype=torch.float64, device=device))
    group = {"params": [w], "rank": 4, "proj_type": "left", "schedule": "adaptive", "update_proj_gap": gap}
    opt = GaLoreAdamW([{**group, **keys}], lr=0.01)
    found, turned = [], 0.0
    for step in range(steps):
        turned += angle_at(step)
        w.grad = turning(turned, step=1).to(device)
        refreshes = opt.state[w]["refreshes"] if opt.state[w] else 0
        opt.step()
        if settled(opt)[w]["refreshes"] > refreshes:
            found.append(step)
    return [b - a for a, b in itertools.pairwise(found)]


@pytest.mark.parametrize("refresh_at", ["start", "end"])
def test_intervals_grow_while_nothing_turns(device, refresh_at):
    """Guards against refreshes of a basis that is right, and against intervals without end."""
    found = intervals(device, lambda step: 0.0, 400, refresh_at=refresh_at)
    assert found[:5] == [4, 8, 16, 32, 64]
    assert set(found[5:]) == {4 * MOST}


@pytest.mark.parametrize(("degrees", "least", "most"), [(0.3, 32, 64), (2, 8, 16), (6, 4, 8), (30, 1, 2)])
def test_intervals_follow_the_turning_speed(device, degrees, least, most):
    """Guards against an interval that does not settle: it turns 10 to 60 degrees, and doublings alternate at most."""
    found = intervals(device, lambda step: math.radians(degrees), 400)
    settled_at = found[len(found) // 2 :]
    assert least <= min(settled_at)
    assert max(settled_at) <= most
    assert max(settled_at) - min(settled_at) <= max(min(settled_at), 1)


def test_a_sudden_turn_is_noticed_before_the_interval_is_over(device):
    """Guards against a basis that keeps nothing for a long interval."""
    w = torch.nn.Parameter(torch.zeros(24, 24, dtype=torch.float64, device=device))
    group = {"params": [w], "rank": 4, "proj_type": "left", "schedule": "adaptive", "update_proj_gap": 8}
    opt = GaLoreAdamW([group], lr=0.01)
    for step in range(70):
        w.grad = turning(math.pi / 2, step=int(step >= 60)).to(device)
        opt.step()
        if step == 59:
            known = dict(settled(opt)[w])
    state = settled(opt)[w]
    assert known["last_refresh"] + known["interval"] > 70
    assert state["last_refresh"] >= 61  # the step after it was seen
    assert state["interval"] < known["interval"]
    assert state["energy_now"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("cosine", "energy", "now", "expected"),
    [
        (STEADY, 0.5, KEPT * 0.5 + 1e-9, 16),
        (STEADY - 0.01, 0.5, 0.5, 8),
        (STEADY, 0.5, KEPT * 0.5 - 0.01, 8),
        (TURNED, 0.5, 0.5, 4),
        (1.0, 0.5, DROPPED * 0.5 - 1e-9, 4),
        (math.nan, 0.5, 0.1, 8),
        (1.0, 0.0, 0.9, 16),
    ],
)
def test_the_rule(cosine, energy, now, expected):
    """Guards against thresholds taken the wrong way round."""
    state = {"interval": 8, "energy": energy, "energy_now": now, "cosine": 0.0}
    learn(state, 8, Told(5, stepped=True, refreshed=True, measures=(4.0, 3.0, cosine)))
    assert state["interval"] == expected
    assert (state["energy"], state["energy_now"]) == (0.0, 0.75)


def test_intervals_stay_between_one_and_the_most():
    """Guards against an interval of no steps, or one that outgrows a gap made smaller meanwhile."""
    state = {
        "interval": 1,
        "energy": 0.0,
        "energy_now": 0.0,
        "cosine": 0.0,
        "refreshes": 3,
        "last_refresh": 10,
    }
    for cosine, least in ((0.0, 1), *((1.0, 2**i) for i in range(1, 9))):
        learn(state, 2, Told(5, stepped=True, refreshed=True, measures=(1.0, 1.0, cosine)))
        assert state["interval"] == min(least, 2 * MOST)
    assert not is_due(state, 10 + MOST - 1, "adaptive", 1, 0, resets=False)
    assert is_due(state, 10 + MOST, "adaptive", 1, 0, resets=False)
    learn(state, 1, Told(5, stepped=True, refreshed=True, measures=(1.0, 1.0, 0.0)))
    assert state["interval"] == MOST // 2


@pytest.mark.parametrize("measures", [(math.nan, math.nan, math.nan), (0.0, 0.0, math.nan), (math.inf,) * 3])
def test_what_is_not_measured_teaches_nothing(measures):
    """Guards against a NaN in the state of a run, or a gradient of zeros taken for a drop."""
    state = {"interval": 8, "energy": 0.5, "energy_now": 0.4, "cosine": 0.9}
    before = dict(state)
    learn(state, 8, Told(5, stepped=True, refreshed=False, measures=measures))
    learn(state, 8, Told(5, stepped=False, refreshed=False, measures=(1.0, 0.1, math.nan)))
    assert state == before


def test_what_rounding_exceeds_is_one():
    """Guards against shares over 1, with which a state is saved and not loaded."""
    state = {"interval": 8, "energy": 0.0, "energy_now": 0.0, "cosine": 0.0}
    for refreshed in (True, False):
        learn(state, 8, Told(5, stepped=True, refreshed=refreshed, measures=(1.0, 1.0 + 1e-7, 1.0 + 1e-7)))
    assert (state["energy"], state["energy_now"], state["cosine"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("keys", [{"tolerance": 0.3}, {"projector": "svd"}, {"proj_type": "full"}], ids=str)
def test_refreshes_made_elsewhere_are_measured_too(device, keys):
    """Guards against an adaptive schedule that learns nothing outside of the step operator."""
    params, opt = make(device, {"schedule": "adaptive", "update_proj_gap": 3, **keys}, SHAPES[:3])
    train(opt, params, range(5))
    for p in params:
        state = settled(opt)[p]
        assert 0 < state["cosine"] <= 1
        assert 0 < state["energy_now"] == state["energy"] <= 1  # one step after the last refresh


def test_what_was_learned_is_saved(device):
    """Guards against a resumed run that begins at the first interval again, and a file whose numbers are none."""
    keys = {"schedule": "adaptive", "update_proj_gap": 2}
    params, opt = make(device, keys, SHAPES[:2])
    train(opt, params, range(6))
    settled(opt)[params[0]].update(energy_now=1.0, interval=5)
    others, other = make(device, keys, SHAPES[:2])
    other.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert all(same(dict(opt.state[p]), dict(other.state[q])) for p, q in zip(params, others, strict=True))
    for key, value in (("interval", 0), ("interval", 2.0), ("energy", 1.5), ("cosine", 1)):
        saved = opt.state_dict()
        saved["state"][0] = {**saved["state"][0], key: value}
        with pytest.raises(ValueError, match=f"{key} of 'w0' must be a .*, got {value}"):
            other.load_state_dict(saved)


# --- A callable ---------------------------------------------------------------------------------------


class EveryThird:
    """A callable that can be copied and pickled, and remembers what it was told."""

    def __init__(self):
        self.told = []

    def __call__(self, progress):
        self.told.append(progress)
        return progress.step % 3 == 0

    def __repr__(self):
        return "EveryThird()"  # no address in a test's name: names are the same in every process


def never(progress):
    return False


def test_a_callable_decides(device):
    """Guards against a callable that is not asked, is asked about others, or whose answer is another's."""
    every = EveryThird()
    params, opt = make(device, {"update_proj_gap": every}, SHAPES[:2])
    assert refreshed_at(opt, params, range(7)) == 2 * [[0, 3, 6]]
    assert [t.name for t in every.told] == 7 * ["w0", "w1"]
    assert [(t.step, t.refreshes, t.last_refresh) for t in every.told[::2]] == [
        *((0, 0, 0), (1, 1, 0), (2, 1, 0), (3, 1, 0), (4, 2, 3), (5, 2, 3), (6, 2, 3)),
    ]
    assert every.told[0].energy_now == 0
    assert all(0 < t.energy_now <= 1 for t in every.told[2:])
    assert 0 < every.told[-1].energy <= 1
    assert 0 < every.told[-1].cosine <= 1


def test_who_is_asked(device):
    """Guards against parameters of two groups by one name, and a callable asked of a step that is skipped."""
    every = EveryThird()
    params = [torch.nn.Parameter(gradient((8, 6), 99, device=device)) for _ in range(2)]
    opt = GaLoreAdamW([{"params": [p], "rank": 2, "update_proj_gap": every} for p in params], fused=True)
    train(opt, params, range(1))
    assert [t.name for t in every.told] == ["group 0, parameter 0", "group 1, parameter 0"]
    opt.found_inf = torch.ones((), device=device)  # of GradScaler
    train(opt, params, range(1))
    assert len(every.told) == 2


@pytest.mark.parametrize(
    "keys",
    [
        {"update_proj_gap": never},
        {"update_proj_gap": never, "proj_type": "full"},
        {"update_proj_gap": 10**9},
        {"update_proj_gap": 10**9, "schedule": "staggered"},
        {"update_proj_gap": 10**9, "schedule": "adaptive"},
        {"update_proj_gap": 10**9, "proj_type": "full"},
    ],
    ids=lambda keys: "-".join(getattr(value, "__name__", str(value)) for value in keys.values()),
)
def test_a_schedule_that_never_fires_still_makes_the_first_basis(device, keys):
    """Guards against training without a basis, or with none after a first gradient of zeros."""
    params, opt = make(device, keys, SHAPES[:2])
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    before = [p.detach().clone() for p in params]
    assert refreshed_at(opt, params, range(6)) == 2 * [[0]]
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_callable_that_raises_leaves_all_as_it_was(device):
    """Guards against a step that is half taken, or an error that does not say where it comes from."""
    fails = False

    def due(progress):
        if fails and progress.name == "w1":
            raise KeyError("mine")
        return False

    params, opt = make(device, {"update_proj_gap": due}, SHAPES[:2], weight_decay=0.1)
    train(opt, params_of(opt), range(2))
    before, fails = snapshot(opt), True
    set_gradients(params_of(opt), 2)
    with pytest.raises(KeyError, match="mine") as raised:
        opt.step()
    assert sys.version_info < (3, 11) or "for w1 " in raised.value.__notes__[0]
    assert same(snapshot(opt), before)
    fails = False
    opt.step()
    assert int(opt.state[params[0]]["step"]) == 3


@pytest.mark.parametrize("answer", [None, 0, 1.0], ids=str)
def test_an_answer_that_is_no_bool_is_refused(device, answer):
    """Guards against a callable without `return`, which would never refresh, or one that returns an interval."""
    params, opt = make(device, {"update_proj_gap": lambda progress: answer}, SHAPES[:1])
    with pytest.raises(TypeError, match=rf"update_proj_gap returned {answer} for w0 \(must be True or False"):
        train(opt, params, range(1))


def test_a_state_dict_leaves_the_callable_out(device):
    """Guards against files that cannot be loaded, and runs resumed on another schedule than they had."""
    params, opt = make(device, {"update_proj_gap": EveryThird()}, SHAPES[:2])
    train(opt, params, range(4))
    saved = saved_and_loaded(opt.state_dict())
    assert saved["param_groups"][0]["update_proj_gap"] == 0
    mine = EveryThird()
    resumed_params, resumed = make(device, {"update_proj_gap": mine}, SHAPES[:2])
    with torch.no_grad():
        for a, b in zip(resumed_params, params, strict=True):
            a.copy_(b)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["update_proj_gap"] is mine
    assert refreshed_at(opt, params, range(4, 9)) == refreshed_at(resumed, resumed_params, range(4, 9))
    for p, q in zip(params, resumed_params, strict=True):
        assert same([p.detach(), settled(opt)[p]], [q.detach(), settled(resumed)[q]])
    _, other = make(device, {"update_proj_gap": 5}, SHAPES[:2])
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"saved with a callable update_proj_gap.*update_proj_gap=5"):
        other.load_state_dict(saved)
    assert same(snapshot(other), before)
    resumed.load_state_dict(
        saved_and_loaded(make(device, {"update_proj_gap": 5}, SHAPES[:2])[1].state_dict())
    )
    assert resumed.param_groups[0]["update_proj_gap"] == 5  # of the file, as every key


@pytest.mark.parametrize("change", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_have_the_callable(device, change):
    """Guards against copies that refresh otherwise."""
    params, opt = make(device, {"update_proj_gap": EveryThird()}, SHAPES[:2])
    train(opt, params, range(2))
    copied = change(opt)
    others = params_of(copied)[:2]
    assert refreshed_at(opt, params, range(2, 8)) == refreshed_at(copied, others, range(2, 8))
    assert all(same(p.detach(), q.detach()) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("schedule", ["staggered", "adaptive"])
def test_a_callable_is_a_schedule_of_its_own(schedule):
    """Guards against one of two schedules that is silently ignored."""
    with pytest.raises(ValueError, match=f"an integer update_proj_gap, got schedule='{schedule}' and"):
        make("cpu", {"update_proj_gap": never, "schedule": schedule})


@pytest.mark.parametrize(
    "keys", [{"schedule": "staggered"}, {"schedule": "adaptive"}, {"update_proj_gap": EveryThird()}], ids=str
)
def test_a_schedule_chosen_while_training_finds_its_state(device, keys):
    """Guards against states that lack what another schedule keeps, or keep what is of no use."""
    params, opt = make(device, {"update_proj_gap": 2})
    train(opt, params, range(3))
    opt.param_groups[0].update(keys)
    train(opt, params, range(3, 6))
    entries = {"interval", "energy", "energy_now", "cosine"}
    expected = {"adaptive": entries, "staggered": set()}.get(keys.get("schedule"), entries - {"interval"})
    assert all(entries & opt.state[p].keys() == expected for p in params)
    opt.param_groups[0].update(schedule="fixed", update_proj_gap=2)
    train(opt, params, range(6, 8))
    assert not any(entries & opt.state[p].keys() for p in params)
