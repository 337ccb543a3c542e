"""What the optimizer says of its subspaces, against what LAPACK says of their bases in fp64."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from matrices import generator
from training import (
    KINDS,
    bias,
    gradient_like,
    optimizer,
    params_of,
    same,
    saved_and_loaded,
    set_gradients,
    snapshot,
    train,
    weight,
)

from galore_rrf import GaLoreAdamW, state_bytes
from galore_rrf.diagnostics import Observations, squared_cosine
from galore_rrf.outcomes import Outcomes, Told
from galore_rrf.subspace import BOTH, RIGHT, TUCKER

pytestmark = pytest.mark.core

MEASURED = ("gradient_norm", "residual_norm", "energy_kept", "squared_cosine", "angle")


def bases(state):
    """By their names: for each matrix of a stack, orthonormal columns in fp64."""
    found = {}
    for name, basis in state.items():
        if name.startswith("basis"):
            q = basis.detach().cpu().double()
            found[name] = [
                torch.linalg.qr(x[:, x.any(0)])[0] for x in (q if q.dim() == 3 else q[None]).unbind()
            ]
    return found


def energies(state, grad):
    """||R||^2 and ||G||^2, of stacks summed."""
    g, found = grad.double().cpu(), bases(state)
    if state["side"] == TUCKER:
        r = g
        for name, (q,) in found.items():
            mode = int(name.removeprefix("basis_"))
            r = torch.tensordot(r, q, dims=([mode], [0])).movedim(-1, mode)
        return float(r.square().sum()), float(g.square().sum())
    kept = 0.0
    for i, a in enumerate(g if g.dim() == 3 else g.flatten(1)[None]):
        if state["side"] == BOTH:
            r = found["basis"][i].mT @ a @ found["basis_right"][i]
        elif state["side"] == RIGHT:
            r = a @ found["basis"][i]
        else:
            r = found["basis"][i].mT @ a
        kept += float(r.square().sum())
    return kept, float(g.square().sum())


def squared_cosine_by_svd(before, after):
    """Of the angles whose cosines are the singular values of Q_old^T Q_new."""
    means = [
        torch.linalg.svdvals(old.mT @ new).square().mean()
        for name, olds in before.items()
        for old, new in zip(olds, after[name], strict=True)
    ]
    return float(sum(means) / len(means))


def only(opt):
    (record,) = opt.diagnostics()
    return record


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "feedback"])  # of more than the gradient
def test_records_are_what_the_bases_say(device, kind):
    """Guards against energies of another basis or step, angles between the wrong bases, and sides, ranks, counts
    or bytes that are not the state's."""
    w, b = weight(kind, device), bias(device)
    opt = optimizer(kind, w, b)
    error = 0.02 if w.dtype == torch.bfloat16 else 2e-5
    keys = KINDS[kind][2]
    before = None
    for step in range(1, 9):
        old = {k: copy.deepcopy(v) for k, v in opt.state[w].items()}
        refreshes = opt.state[w]["refreshes"] if step > 1 else 0
        set_gradients([w, b], step)
        opt.step()
        record, state = only(opt), opt.state[w]
        assert (record.name, record.shape) == ("w", tuple(w.shape))
        assert record.side == ("right", "left", "both", "tucker")[state["side"]]
        steps = (step - 1) % 3 + 1 if keys.get("moments") == "reset" else step
        assert (record.rank, record.refreshes, record.steps) == (state["rank"], state["refreshes"], steps)
        assert record.since_refresh == steps - 1 - state["last_refresh"]
        assert record.state_bytes == sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))
        if state["refreshes"] > refreshes:
            served = old if old and keys.get("refresh_at") == "end" else state
            kept, energy = energies(served, w.grad)
            assert record.measured_after == 0
            assert record.gradient_norm == pytest.approx(math.sqrt(energy), rel=error)
            assert record.energy_kept == pytest.approx(kept / energy, rel=error)
            assert record.residual_norm**2 == pytest.approx(energy - kept, abs=2 * error * energy)
            assert (before is None) == math.isnan(record.angle)
            if before is not None:
                expected = squared_cosine_by_svd(before, bases(state))
                assert record.squared_cosine == pytest.approx(expected, abs=error)
                assert math.cos(math.radians(record.angle)) ** 2 == pytest.approx(expected, abs=error)
            before = bases(state)
    assert record.refreshes > 1 or kind == "published"


def test_angles_that_are_known():
    """Guards against a mean over columns that are none, or divided by the wrong rank."""
    q, _ = torch.linalg.qr(torch.randn(12, 6, generator=generator(1), dtype=torch.float64))
    angles = torch.tensor([0.1, 0.5, 1.2], dtype=torch.float64)
    turned = q[:, :3] * angles.cos() + q[:, 3:] * angles.sin()
    expected = float(angles.cos().square().mean())
    assert float(squared_cosine(q[:, :3], turned)) == pytest.approx(expected)
    mixed = turned @ torch.linalg.qr(torch.randn(3, 3, generator=generator(2), dtype=torch.float64))[0]
    assert float(squared_cosine(q[:, :3], mixed)) == pytest.approx(expected), "whatever the columns"
    # A subspace within the other has turned by nothing.
    assert float(squared_cosine(q[:, :5], q[:, :2])) == pytest.approx(1)
    wide = torch.cat([turned, torch.zeros(12, 2, dtype=torch.float64)], 1)
    assert float(squared_cosine(torch.zeros_like(wide) + q[:, :3].new_zeros(12, 5), wide).isnan())
    assert float(squared_cosine(wide, q[:, :3])) == pytest.approx(expected)
    stack = torch.stack([wide, torch.zeros_like(wide), wide])
    old = torch.stack([q[:, :5], q[:, :5], torch.zeros_like(wide)])
    assert float(squared_cosine(old, stack)) == pytest.approx(float(squared_cosine(q[:, :5], wide)))
    rounded = q[:, :3].bfloat16(), turned.bfloat16()
    assert float(squared_cosine(*rounded)) == pytest.approx(
        float(squared_cosine(*(x.double() for x in rounded)))
    )


def test_what_is_not_measured_is_no_number():
    """Guards against numbers that are made up: before a basis, at its first refresh, after loading, of a gradient
    of zero or NaN."""
    w, b = weight("default"), bias()
    opt = optimizer("default", w, b)
    assert opt.diagnostics() == []
    w.grad = torch.zeros_like(w)
    opt.step()
    record = only(opt)
    assert (record.steps, record.refreshes, record.since_refresh, record.measured_after) == (0, 0, None, None)
    assert all(math.isnan(getattr(record, name)) for name in MEASURED)
    train(opt, [w, b], [1])
    record = only(opt)
    assert record.energy_kept > 0
    assert math.isnan(record.angle)
    w.grad = torch.full_like(w, math.nan)
    opt.step()
    assert only(opt) == record if not math.isnan(record.angle) else str(only(opt)) == str(record)
    train(opt, [w, b], range(2, 6))
    assert only(opt).angle > 0
    twin = optimizer("default", copy.deepcopy(w), bias())
    twin.load_state_dict(saved_and_loaded(opt.state_dict()))
    copies = copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))
    opt.load_state_dict(opt.state_dict())
    for other in (twin, *copies, opt):
        record = only(other)
        assert (record.refreshes, record.since_refresh, record.refresh_seconds) == (2, 0, 0.0)
        assert all(math.isnan(getattr(record, name)) for name in MEASURED)


def test_records_at_the_limits():
    """Guards against roots of negative numbers and shares over 1 where all is kept, but for rounding, numbers of a
    gradient of zero, times of refreshes that were not timed, and angles of the refresh before the last."""
    p, seen = torch.nn.Parameter(torch.zeros(4, 4)), Observations()
    state = {"side": RIGHT, "rank": 2, "refreshes": 2, "last_refresh": 5}

    def record(seconds, *measures):
        seen.note([p], [state], [seconds], [Told(5, stepped=True, refreshed=True, measures=measures)])
        return seen.record("w", p, state, 6)

    found = record(0.5, 4.0, 4.0 + 1e-6, 1.0 + 1e-6)
    assert [getattr(found, name) for name in MEASURED] == [2.0, 0.0, 1.0, 1.0, 0.0]
    assert found.refresh_seconds == 0.5
    found = record(0.0, 0.0, 0.0, math.nan)
    assert (found.gradient_norm, found.residual_norm) == (0.0, 0.0)
    assert all(map(math.isnan, (found.energy_kept, found.squared_cosine, found.angle, found.refresh_seconds)))


def test_between_refreshes():
    """Guards against numbers that move with steps that measure nothing."""
    w, b = weight("default"), bias()
    opt = optimizer("default", w, b)  # every 4 steps
    train(opt, [w, b], range(1, 6))
    first = only(opt)
    train(opt, [w, b], range(6, 8))
    later = only(opt)
    assert (first.since_refresh, later.since_refresh) == (0, 2)
    assert [getattr(later, name) for name in MEASURED] == [getattr(first, name) for name in MEASURED]
    assert later.measured_after == 0


@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_resets_at_every_step(proj_type):
    """Guards against a step that passes for none, since its count begins again, and numbers of one that is none."""
    w = torch.nn.Parameter(torch.randn(12, 8))
    keys = {"proj_type": proj_type, "moments": "reset", "schedule": "adaptive", "update_proj_gap": 1}
    opt = GaLoreAdamW([{"params": [w], "rank": 3, **keys}])
    w.grad = torch.randn_like(w)
    for _ in range(2):
        opt.step()
        record = only(opt)
        assert (record.steps, record.since_refresh, record.measured_after) == (1, 0, 0)
        assert opt.state[w]["energy_now"] == pytest.approx(record.energy_kept)
    w.grad = torch.full_like(w, math.inf)
    opt.step()
    assert only(opt) == record


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"tolerance": 0.3},
        {"projector": "svd"},
        {"projector": "svd", "refresh_at": "end"},
        {"proj_type": "full"},
    ],
)
def test_seconds_add_up(keys):
    """Guards against time that no parameter has, or two."""
    shapes = [(24, 16), (64, 96), (16, 40)]
    named = [(f"w{i}", torch.nn.Parameter(torch.randn(s))) for i, s in enumerate(shapes)]
    opt = GaLoreAdamW([{"params": named, "rank": 6, "update_proj_gap": 2, **keys}])
    train(opt, [p for _, p in named], range(6))
    records = opt.diagnostics()
    assert [r.name for r in records] == ["w0", "w1", "w2"]
    assert all(r.refresh_seconds > 0 for r in records)
    assert sum(r.refresh_seconds for r in records) == pytest.approx(opt.refresh_seconds)
    assert sum(r.state_bytes for r in records) == state_bytes(opt)


@pytest.mark.parametrize("keys", [{"tolerance": 0.3}, {"projector": "svd"}])
def test_seconds_are_shared_by_cost(keys, monkeypatch):
    """Guards against time that several parameters have each in full."""
    named = [(name, torch.nn.Parameter(torch.randn(12, n))) for name, n in (("small", 8), ("large", 24))]
    opt = GaLoreAdamW([{"params": named, "rank": 4, "update_proj_gap": 3, **keys}])
    monkeypatch.setattr("galore_rrf.projected_step.time.perf_counter", itertools.count(step=2.0).__next__)
    train(opt, [p for _, p in named], range(5))
    assert opt.refresh_seconds == pytest.approx(2 * 2.0)
    small, large = opt.diagnostics()
    assert small.refresh_seconds + large.refresh_seconds == pytest.approx(4.0)
    if "projector" in keys:
        assert large.refresh_seconds == pytest.approx(3 * small.refresh_seconds), (
            "of as many times the entries"
        )


def test_measured_beside_anothers_refresh():
    """Guards against numbers of another step, or that pass for those of the last refresh."""
    named = [(name, torch.nn.Parameter(torch.randn(12, 8))) for name in "ab"]
    (_, a), (_, b) = named
    opt = GaLoreAdamW([{"params": named, "rank": 3, "update_proj_gap": 3}])
    train(opt, [a], [1])
    train(opt, [a, b], [2, 3, 4])  # a is refreshed in the last of these, b in the first
    first, second = opt.diagnostics()
    assert (first.since_refresh, first.measured_after) == (0, 0)
    assert (second.since_refresh, second.measured_after) == (2, 2)
    kept, energy = energies(opt.state[b], b.grad)
    assert second.gradient_norm == pytest.approx(math.sqrt(energy), rel=1e-5)
    assert second.energy_kept == pytest.approx(kept / energy, rel=1e-5)
    train(opt, [a, b], [5])
    assert [r.measured_after for r in opt.diagnostics()] == [1, 0]


def test_names():
    """Guards against records that cannot be told apart."""
    groups = [
        {"params": [torch.nn.Parameter(torch.randn(8, 6)) for _ in range(2)], "rank": rank} for rank in (2, 3)
    ]
    opt = GaLoreAdamW(groups)
    train(opt, params_of(opt), [1])
    names = [r.name for r in opt.diagnostics()]
    assert names == [f"group {i}, parameter {j}" for i in range(2) for j in range(2)]


def test_a_record_for_people_and_files():
    """Guards against a record that cannot be printed or written."""
    w, b = weight("default"), bias()
    opt = optimizer("default", w, b)
    train(opt, [w, b], range(1, 7))
    record = only(opt)
    fields = record.as_dict()
    assert fields["energy_kept"] == record.energy_kept
    assert set(MEASURED) < set(fields)
    assert str(record) == (
        f"w 24x16: rank 6 (right), energy kept {record.energy_kept:.3f}, turned by {record.angle:.1f} degrees, "
        "2 refreshes, the last 1 steps ago"
    )


class Heard:
    """A hook that keeps what it is told."""

    def __init__(self):
        self.calls = []

    def __call__(self, opt, records):
        self.calls.append((opt, records))

    @property
    def names(self):
        return [[r.name for r in records] for _, records in self.calls]


def two_gaps():
    """A parameter refreshed every 2 steps, another every 3."""
    named = [(name, torch.nn.Parameter(torch.randn(12, 8))) for name in "ab"]
    groups = [
        {"params": [pair], "rank": 3, "update_proj_gap": gap} for pair, gap in zip(named, (2, 3), strict=True)
    ]
    return GaLoreAdamW(groups)


def test_hooks_hear_of_refreshes():
    """Guards against a hook that is called at other steps, for other parameters, or before the state is new."""
    opt, heard, other = two_gaps(), Heard(), Heard()
    handle = opt.register_refresh_hook(heard)
    opt.register_refresh_hook(other)
    for step in range(1, 8):
        before = len(heard.calls)
        train(opt, params_of(opt), [step])
        if len(heard.calls) > before:
            told, records = heard.calls[-1]
            assert told is opt
            now = {r.name: r for r in opt.diagnostics()}
            assert all(str(r) == str(now[r.name]) and r.since_refresh == 0 for r in records)
        if step == 4:
            handle.remove()
    expected = [["a", "b"], ["a"], ["b"], ["a"], ["a", "b"]]  # at steps 1, 3, 4, 5, 7
    assert heard.names == expected[:3]
    assert other.names == expected


def test_hooks_that_come_and_go():
    """Guards against a hook that hears of refreshes from before it was there, and one that may not remove itself."""
    opt, heard, calls = two_gaps(), Heard(), []
    train(opt, params_of(opt), [1])
    handle = opt.register_refresh_hook(lambda *_: (calls.append(1), handle.remove()))
    opt.register_refresh_hook(heard)
    train(opt, params_of(opt), [2])
    assert heard.calls == []
    train(opt, params_of(opt), [3, 4])
    assert heard.names == [["a"], ["b"]]
    assert calls == [1]


def test_a_hook_that_raises():
    """Guards against a step that is half taken, or told twice, because of a hook."""
    torch.manual_seed(0)
    opt = two_gaps()
    twin, heard = copy.deepcopy(opt), Heard()

    def fails(*_):
        raise ZeroDivisionError("of the hook's own")

    handle = opt.register_refresh_hook(fails)
    set_gradients(params_of(opt), 1)
    with pytest.raises(ZeroDivisionError, match="of the hook's own"):
        opt.step()
    handle.remove()
    opt.register_refresh_hook(heard)
    train(opt, params_of(opt), range(2, 5))
    train(twin, params_of(twin), range(1, 5))
    assert same(snapshot(opt), snapshot(twin))
    assert heard.names == [["a"], ["b"]]


def test_hooks_stay_with_their_optimizer():
    """Guards against hooks that are lost by loading, or pickled and copied along, as torch's own are not."""
    opt, heard = two_gaps(), Heard()
    opt.register_refresh_hook(heard)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        train(other, params_of(other), [1])
        other.register_refresh_hook(Heard())
    assert heard.calls == []
    train(opt, params_of(opt), [1])
    opt.load_state_dict(opt.state_dict())
    train(opt, params_of(opt), [2, 3])
    assert heard.names == [["a", "b"], ["a"]]


class Late(Outcomes):
    """Tells of a step when it is settled, as of one on a GPU."""

    def __init__(self):
        super().__init__()
        self.late = []

    def add(self, outcomes, states, measures=None, listener=None, *, resets=False):
        def keep(told: list[Told]):
            self.late.append((listener, told))

        super().add(outcomes, states, measures, keep, resets=resets)

    def settle(self):
        super().settle()
        late, self.late = self.late, []
        for listener, told in late:
            listener(told)


def test_a_step_that_is_known_later(device):
    """Guards against refreshes that are lost, told twice or with another's numbers where the device decides."""
    torch.manual_seed(0)
    opt, straight = two_gaps(), Heard()
    late, heard = copy.deepcopy(opt), Heard()
    opt.register_refresh_hook(straight)
    late._history.outcomes = Late()
    late.register_refresh_hook(heard)
    for step in range(1, 8):
        train(opt, params_of(opt), [step])
        known = len(heard.calls)
        set_gradients(params_of(late), step)
        late.step()
        assert len(heard.calls) == known + (step in (2, 4, 5, 6)), "at the beginning of the next step"
        if step in (3, 5):
            (late.state_dict if step == 3 else late.__getstate__)()  # settles, and tells no hook
            assert late._history.outcomes.late == []
    assert heard.names == straight.names[:-1]
    said = ("name", "steps", "since_refresh", *MEASURED[:3])
    for (_, found), (_, expected) in zip(heard.calls, straight.calls, strict=False):
        assert [[getattr(r, key) for key in said] for r in found] == [
            [getattr(r, key) for key in said] for r in expected
        ]
    assert [r.refreshes for r in late.diagnostics()] == [r.refreshes for r in opt.diagnostics()]
    assert [r.energy_kept for r in late.diagnostics()] == [r.energy_kept for r in opt.diagnostics()]


def test_gradients_are_only_looked_at(device):
    """Guards against steps that depend on who is watching."""
    w, b = weight("tolerance", device), bias(device)
    opt = optimizer("tolerance", w, b)
    watched_w, watched_b = copy.deepcopy(w), copy.deepcopy(b)
    watched = optimizer("tolerance", watched_w, watched_b)
    watched.register_refresh_hook(Heard())
    for step in range(1, 8):
        for p, q in ((w, watched_w), (b, watched_b)):
            p.grad = gradient_like(p, step)
            q.grad = p.grad.clone()
        opt.step()
        watched.step()
        watched.diagnostics()
    assert same(snapshot(opt), snapshot(watched))
