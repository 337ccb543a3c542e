"""projected_adamw_ on gradients and arguments that no step can be taken with: nothing is written."""

import math

import pytest
import torch
from matrices import generator
from projected_state import (
    ADAM,
    ALIKE,
    DECAYED,
    LEFT,
    MIXED,
    REFRESHED,
    RIGHT,
    SKIPPED,
    STEPPED,
    State,
    assert_equal,
    project,
)

from galore_rrf import reference
from galore_rrf.ops import projected_adamw_

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("together")]


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("moments", ["rotate", "keep"])
def test_at_the_end_bad_gradients_refresh_nothing(device, moments, value):
    """Guards against a basis of NaN, or lost to a zero gradient, beside those of others that move."""
    state = State(ALIKE, torch.float32, device=device)
    state.step(projected_adamw_, state.grads(0), 0)
    before, clean = state.copy(), state.copy()
    grads = state.grads(1)
    options = {"moments": moments, "refresh_at": "end"}
    clean.step(projected_adamw_, [g.clone() for g in grads], 1, **options)
    bad = STEPPED if value == 0 else SKIPPED
    for i in (0, 1):
        if value == 0:
            grads[i].zero_()
        else:
            grads[i][2, 3] = value
    if value != 0:
        grads[3][1, 4, 4] = value
    outcomes = state.step(projected_adamw_, grads, 1, **options)
    assert outcomes == [bad, bad, *[REFRESHED] * (len(ALIKE) - 2)]
    for name, mine in state.lists().items():
        for i in (0, 1):
            if value != 0 or name == "bases":
                assert torch.equal(mine[i], getattr(before, name)[i])
        for i in (2, 4):
            torch.testing.assert_close(mine[i], getattr(clean, name)[i], rtol=0, atol=1e-5)
        if value != 0 and name != "steps":
            assert torch.equal(mine[3][1], getattr(before, name)[3][1])


@pytest.mark.parametrize("refresh", [-1, 1])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["rotate", "keep"])
def test_nonfinite_gradient_changes_nothing(device, together, dtype, value, known, refresh, moments):
    """Guards against NaN in a weight, moment or basis: that matrix is skipped to the bit, the others step."""
    state = State(MIXED, dtype, device=device)
    if known:
        state.step(projected_adamw_, state.grads(0), 0)
    before, clean = state.copy(), state.copy()
    grads = state.grads(1)
    clean.step(projected_adamw_, [g.clone() for g in grads], refresh, moments=moments)
    for i in (0, 1):
        grads[i][2, 3] = value
    grads[3][1, 4, 4] = value  # one of a stack of three
    stepped = REFRESHED if refresh >= 0 or not known else STEPPED
    if together and not known and refresh < 0:
        stepped = DECAYED  # none has a basis, and nobody knows
    outcomes = state.step(projected_adamw_, grads, refresh, moments=moments)
    assert outcomes == [SKIPPED, SKIPPED, stepped, stepped, stepped]
    for name, mine in state.lists().items():
        theirs, expected = getattr(before, name), getattr(clean, name)
        for i in (0, 1):
            assert torch.equal(mine[i], theirs[i])
        for i in (2, 4):
            assert torch.equal(mine[i], expected[i])
        if name != "steps":
            assert torch.equal(mine[3][1], theirs[3][1])
            for j in (0, 2):
                torch.testing.assert_close(mine[3][j], expected[3][j], rtol=1e-5, atol=1e-5)
    assert float(state.steps[3]) == float(clean.steps[3])


def test_whole_stack_nonfinite(device):
    """Guards against a stack whose clock runs although no matrix of it has stepped."""
    state = State([((2, 9, 12), 3, LEFT)], device=device)
    before = state.copy()
    grads = state.grads(0)
    grads[0][:, 1, 1] = math.nan
    assert state.step(projected_adamw_, grads, 0) == [SKIPPED]
    assert_equal(state, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_coefficients_change_nothing(device, value):
    """Guards against moments poisoned by a projected gradient that was made elsewhere."""
    state = State([((9, 12), 3, LEFT)], device=device)
    state.step(projected_adamw_, state.grads(0), 0)
    before = state.copy()
    given = project(state.grads(1)[0], state.bases[0], LEFT)
    given[1, 1] = value
    assert state.step(projected_adamw_, state.grads(1), -1, [given]) == [SKIPPED]
    assert_equal(state, before)


@pytest.mark.parametrize("refresh", [-1, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_gradient_before_the_first_basis(device, together, dtype, refresh):
    """Guards against a clock that runs, or a basis made of nothing: there is decay alone."""
    state = State(MIXED, dtype, device=device)
    before = state.copy()
    grads = [torch.zeros_like(w) for w in state.params]
    assert state.step(projected_adamw_, grads, refresh) == [DECAYED] * len(MIXED)
    assert_equal(state, before, lists=["exp_avgs", "exp_avg_sqs", "bases", "steps"])
    for w, v in zip(state.params, before.params, strict=True):
        torch.testing.assert_close(w, v * (1 - 0.1 * 0.2))
    # Where that can be known, no refresh need be due, if only none has been made.
    again = state.step(projected_adamw_, state.grads(1), 0 if together else -1)
    assert again == [REFRESHED] * len(MIXED)
    assert [float(t) for t in state.steps] == [1.0] * len(MIXED)


@pytest.mark.parametrize("refresh", [-1, 1])
@pytest.mark.parametrize("moments", ["rotate", "keep"])
def test_zero_gradient_after_the_first_basis(device, refresh, moments):
    """Guards against a basis lost to a zero gradient: the old one serves, moments decay, the step counts."""
    state = State(MIXED, device=device)
    state.step(projected_adamw_, state.grads(0), 0)
    theirs = state.on_cpu()
    grads = [torch.zeros_like(w) for w in state.params]
    outcomes = state.step(projected_adamw_, grads, refresh, moments=moments)
    assert outcomes == [STEPPED] * len(MIXED)
    assert outcomes == theirs.step(reference.projected_adamw_, grads, refresh, moments=moments)
    assert_equal(state, theirs, 1e-13)


@pytest.mark.parametrize(("shape", "side", "moments"), [((0, 8), RIGHT, (0, 3)), ((8, 0), LEFT, (3, 0))])
def test_no_rows(device, shape, side, moments):
    """Guards against an error on the empty shard that a rank holds of a small sharded weight."""
    w = torch.zeros(shape, device=device)
    q = torch.linalg.qr(torch.randn(8, 3, generator=generator(1)))[0].to(device)
    t = torch.zeros((), device=device)
    args = (
        [w],
        [w.clone()],
        [torch.zeros(moments, device=device)],
        [torch.zeros(moments, device=device)],
        [q],
        [t],
    )
    outcome = projected_adamw_(*args, [None], [side], [0], [-1], **ADAM)
    assert outcome.tolist() == [STEPPED]
    assert float(t) == 1


@pytest.mark.parametrize(("shape", "side"), [((2, 8), RIGHT), ((8, 2), LEFT)])
def test_fewer_rows_than_rank(device, shape, side):
    """Guards against a shard refused for its few rows: between refreshes its long side may be any length."""
    state = State([(shape, 2, side)], device=device)
    q = torch.linalg.qr(torch.randn(8, 5, dtype=torch.float64, generator=generator(1)))[0].to(device)
    moments = (2, 5) if side == RIGHT else (5, 2)
    state.bases = [q]
    state.exp_avgs, state.exp_avg_sqs = (
        [torch.zeros(moments, dtype=torch.float64, device=device)] for _ in range(2)
    )
    theirs = state.on_cpu()
    assert state.step(projected_adamw_, state.grads(0), -1) == [STEPPED]
    theirs.step(reference.projected_adamw_, state.grads(0), -1)
    assert_equal(state, theirs, 1e-12)


def test_empty_lists(device):
    """Guards against a crash on no parameters."""
    assert projected_adamw_([], [], [], [], [], [], [], [], [], [], **ADAM).tolist() == []


@pytest.mark.parametrize("options", [{"refresh_at": "end"}, {"stochastic_rounding": True}], ids=str)
def test_refused_together(device, options):
    """Guards against a count of steps that begins again after the step, or that random numbers go by."""
    state = State(MIXED, torch.bfloat16, device=device)
    before = state.copy()
    with pytest.raises(ValueError, match=rf"(?=.*{next(iter(options))})(?=.*moments='reset'|.*got moments)"):
        state.step(projected_adamw_, state.grads(0), 0, moments="reset", **options)
    assert_equal(state, before)


def replaced(name, value):
    def change(arguments):
        arguments[name] = value

    return change


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "lists of one length", replaced("grads", [])),
        (ValueError, "lists of one length", replaced("sides", [0, 0])),
        (ValueError, "lists of one length", replaced("coefficients", [])),
        (ValueError, "gradient", replaced("grads", [torch.ones(4, 5)])),
        (ValueError, "gradient", replaced("grads", [torch.ones(5, 4).double()])),
        (ValueError, "moment", replaced("exp_avgs", [torch.zeros(2, 5)])),
        (ValueError, "moment", replaced("exp_avg_sqs", [torch.zeros(5, 2).double()])),
        (ValueError, "moment", replaced("exp_avgs", [torch.zeros(2, 5).mT])),
        (ValueError, "moment", replaced("exp_avgs", [torch.zeros(5, 2).half()])),
        (ValueError, "one dtype", replaced("exp_avgs", [torch.zeros(5, 2).bfloat16()])),
        (ValueError, "scale", replaced("exp_avgs", [torch.zeros(5, 2).byte()])),
        (ValueError, "basis", replaced("bases", [torch.zeros(5, 2)])),
        (ValueError, "rank", replaced("bases", [torch.zeros(4, 0)])),
        (ValueError, "rank", replaced("bases", [torch.zeros(4, 5)])),
        (ValueError, "basis", replaced("bases", [torch.zeros(2)])),
        (ValueError, "basis", replaced("bases", [torch.tensor(1.0)])),
        (TypeError, "basis", replaced("bases", [torch.zeros(4, 2).int()])),
        (ValueError, "coefficients", replaced("coefficients", [torch.zeros(2, 5)])),
        (ValueError, "step", replaced("steps", [torch.zeros(2)])),
        (ValueError, "side", replaced("sides", [2])),
        (ValueError, "key", replaced("keys", [-1])),
        (ValueError, "refresh", replaced("refreshes", [2**32])),
        (ValueError, "arithmetic", replaced("arithmetic", "other")),
        (ValueError, "sketch", replaced("sketch", "other")),
        (ValueError, "moments", replaced("moments", "other")),
        (ValueError, "refresh_at", replaced("refresh_at", "other")),
        (ValueError, "oversampling", replaced("oversampling", -1)),
        (ValueError, "power", replaced("power", -1)),
        (ValueError, "seed", replaced("seed", -1)),
        (ValueError, "refresh_seconds", replaced("refresh_seconds", torch.zeros(1))),
        (ValueError, "refresh_seconds", replaced("refresh_seconds", torch.zeros(2, dtype=torch.float64))),
        (ValueError, "measures", replaced("measures", torch.zeros(1, 3))),
        (ValueError, "measures", replaced("measures", torch.zeros(3, dtype=torch.float64))),
        (ValueError, "matrices", replaced("params", [torch.ones(5)])),
        (TypeError, "floating-point", replaced("params", [torch.ones(5, 4, dtype=torch.complex64)])),
    ],
)  # fmt: skip
def test_bad_arguments(device, error, message, change):
    """Guards against bad arguments that crash or pass, and a weight changed before they are found."""
    arguments = {
        "params": [torch.ones(5, 4)], "grads": [torch.ones(5, 4)], "exp_avgs": [torch.zeros(5, 2)],
        "exp_avg_sqs": [torch.zeros(5, 2)], "bases": [torch.zeros(4, 2)], "steps": [torch.zeros(())],
        "coefficients": [None], "sides": [0], "keys": [0], "refreshes": [0], **ADAM,
    }  # fmt: skip
    change(arguments)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "bases", "steps", "coefficients"):
        arguments[name] = [None if t is None else t.to(device) for t in arguments[name]]
    weights = [w.clone() for w in arguments["params"]]
    with pytest.raises(error, match=message):
        projected_adamw_(**arguments)
    assert all(torch.equal(w, v) for w, v in zip(arguments["params"], weights, strict=True))
