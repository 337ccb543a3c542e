"""projected_adamw_: step by step against the plain PyTorch reference, and what it leaves alone.

The refreshed basis is a function of the spans of a sketch's first columns (`reference.panels.orth`), so operator
and reference agree column by column to rounding times the condition of the sketch, a few units for Gaussian
gradients.  Adam's division is by sqrt(v) + eps: eps = 0.03 keeps what rounding does to tiny entries small
(and makes an eps at the wrong place show).  Where columns are singular vectors, whose signs are arbitrary
(moments="keep"), the reference is given the operator's basis, after a comparison up to signs.
"""

import copy
import itertools
import math
import time

import pytest
import torch
from matrices import UNIT_ROUNDOFF, assert_orthonormal, generator, layout

from galore_rrf import reference
from galore_rrf.ops import projected_adamw_, rotate_moments

pytestmark = pytest.mark.core

SKIPPED, DECAYED, STEPPED, REFRESHED = range(4)
RIGHT, LEFT = 0, 1
ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 0.03, "weight_decay": 0.2, "scale": 0.5}
MIXED = [
    ((24, 37), 6, LEFT),
    ((37, 24), 5, RIGHT),
    ((16, 16), 4, RIGHT),
    ((3, 14, 11), 3, RIGHT),
    ((2, 9, 21), 9, LEFT),
]
ALIKE = [*MIXED, *MIXED[:4], ((14, 11), 3, RIGHT), ((9, 21), 9, LEFT)]


@pytest.fixture(params=[False, True], ids=["each", "together"], autouse=True)
def together(request, device, monkeypatch):
    """Matrices one by one, and those of one shape together, as always on CUDA."""
    if not request.param and device.type != "cpu":
        pytest.skip("on CUDA they always are together")
    monkeypatch.setattr(State, "asynchronous", request.param)
    return request.param


class State:
    """The arguments of a list of parameters: weights and moments random, no basis yet."""

    asynchronous = None

    def __init__(self, parts, dtype=torch.float64, basis_dtype=None, strides="contiguous", device="cpu"):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        g = generator(11)
        self.params, self.exp_avgs, self.exp_avg_sqs, self.bases, self.steps = [], [], [], [], []
        self.sides, self.keys, self.strides = [side for _, _, side in parts], [], strides
        key = 3
        for (*batch, m, n), rank, side in parts:
            w = torch.randn(*batch, m, n, generator=g, dtype=torch.float64)
            self.params.append(layout(w.to(device, dtype), strides))
            moments = (*batch, m, rank) if side == RIGHT else (*batch, rank, n)
            self.exp_avgs.append(torch.zeros(moments, dtype=compute, device=device))
            self.exp_avg_sqs.append(torch.zeros(moments, dtype=compute, device=device))
            rows = n if side == RIGHT else m
            self.bases.append(torch.zeros(*batch, rows, rank, dtype=basis_dtype or compute, device=device))
            self.steps.append(torch.zeros((), dtype=torch.float32, device=device))
            self.keys.append(key)
            key += math.prod(batch) if batch else 1

    def grads(self, seed):
        """Gradients that resemble one another from step to step: a common part, then noise."""
        result = []
        for i, w in enumerate(self.params):
            common = torch.randn(w.shape, dtype=torch.float64, generator=generator(1000 + i))
            noise = torch.randn(w.shape, dtype=torch.float64, generator=generator(100 * seed + i))
            result.append(layout((common + 0.5 * noise).to(w.device, w.dtype), self.strides))
        return result

    def lists(self):
        return {k: getattr(self, k) for k in ("params", "exp_avgs", "exp_avg_sqs", "bases", "steps")}

    def step(self, function, grads, refreshes, coefficients=None, **options):
        if isinstance(refreshes, int):
            refreshes = [refreshes] * len(self.params)
        if function is projected_adamw_:
            options.setdefault("asynchronous", self.asynchronous)
        device = self.params[0].device
        grads = [g.to(device) for g in grads]
        coefficients = [r if r is None else r.to(device) for r in coefficients or [None] * len(grads)]
        with torch.no_grad():
            return function(
                self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.bases, self.steps,
                coefficients, self.sides, self.keys, refreshes,
                **{**ADAM, "seed": 5, **options},
            ).tolist()  # fmt: skip

    def copy(self):
        return copy.deepcopy(self)

    def on_cpu(self):
        """A copy where the reference runs."""
        twin = self.copy()
        for name, tensors in self.lists().items():
            setattr(twin, name, [t.cpu().clone() for t in tensors])
        return twin


def project(g, q, side):
    """R = G Q or Q^T G."""
    return g @ q if side == RIGHT else q.mT @ g


def assert_equal(x: State, y: State, accuracy=0.0, weight_accuracy=None, lists=None):
    for name in lists or x.lists():
        tolerance = weight_accuracy if name == "params" and weight_accuracy is not None else accuracy
        for a, b in zip(getattr(x, name), getattr(y, name), strict=True):
            torch.testing.assert_close(
                a.cpu(), b.cpu(), rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )


def follow(mine: State, accuracy, weight_accuracy=None, schedule=(0, -1, 1, -1, 2), **options):
    """Steps both and compares after every step."""
    theirs = mine.on_cpu()
    for number, refresh in enumerate(schedule):
        grads = mine.grads(number)
        before = [g.clone() for g in grads]
        outcomes = mine.step(projected_adamw_, grads, refresh, **options)
        assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))
        given = None
        # At the end of a step signs are those of the basis before.
        unsigned = refresh == 0 or options.get("refresh_at") != "end"
        if options.get("moments") == "keep" and refresh >= 0 and unsigned:
            probe = theirs.copy()
            probe.step(reference.projected_adamw_, grads, refresh, **options)
            for q, p in zip((q.cpu() for q in mine.bases), probe.bases, strict=True):
                signs = (q * p).sum(-2, keepdim=True).sign()
                torch.testing.assert_close(q * signs, p, rtol=0, atol=max(accuracy, 1e-9))
            theirs.bases = [q.cpu().clone() for q in mine.bases]
            given = [project(*x) for x in zip(grads, mine.bases, mine.sides, strict=True)]
        assert outcomes == theirs.step(reference.projected_adamw_, grads, refresh, given, **options)
        assert outcomes == [REFRESHED if refresh >= 0 else STEPPED] * len(outcomes)
        assert_equal(mine, theirs, accuracy, weight_accuracy)
    for q in mine.bases:
        if q.dtype in (torch.float32, torch.float64):
            assert_orthonormal(q.cpu(), UNIT_ROUNDOFF[q.dtype])


def measured(state, grads, refresh, **options):
    """A step's outcomes and measures."""
    out = torch.zeros(len(state.params), 3, dtype=torch.float64, device=state.params[0].device)
    outcomes = state.step(projected_adamw_, grads, refresh, measures=out, **options)
    return outcomes, out.cpu()


def by_formula(before, after, grads, i, only=slice(None)):
    """Parameter i's measures, from bases, gradients and angles in fp64."""

    def matrices(x):
        return (x.unsqueeze(0) if x.dim() == 2 else x).cpu().double()[only]

    g, old, new = matrices(grads[i]), matrices(before.bases[i]), matrices(after.bases[i])
    cosines = torch.linalg.svdvals(new.mT @ old) if bool(old.any()) else torch.tensor(math.nan)
    projected = project(g, new, before.sides[i])
    return [float(g.square().sum()), float(projected.square().sum()), float(cosines.square().mean())]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("arithmetic", ["torch", "galore_torch", "bitsandbytes"])
@pytest.mark.parametrize("moments", ["rotate", "keep", "reset"])
@pytest.mark.parametrize("sketch", ["plain", "half_power", "power", "warm"])
def test_every_option(device, same_sketch, sketch, moments, arithmetic, maximize):
    """Guards against any departure from the formulae, in fp64, over mixed shapes, sides and stacks."""
    follow(
        State(ALIKE, device=device), 1e-8,
        sketch=sketch, moments=moments, arithmetic=arithmetic, maximize=maximize,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{"power": 2, "sketch": "power"}, {"oversampling": 3, "moments": "keep"},
                                     {"weight_decay": 0.0}, {"lr": 0.0}, {"beta1": 0.0}, {"correct_bias": False},
                                     {"correct_bias": False, "arithmetic": "galore_torch"}, {"scale": 0.25},
                                     {"seed": 2**40},
                                     {"oversampling": 3, "moments": "keep", "refresh_at": "end"}])  # fmt: skip
def test_other_options(device, same_sketch, options):
    """Guards against an option that is dropped on its way."""
    follow(State(MIXED, device=device), 1e-8, **options)


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize(
    ("dtype", "basis_dtype", "accuracy", "weight_accuracy"),
    [
        (torch.float64, torch.float64, 1e-8, 1e-8),
        (torch.float32, torch.float32, 1e-4, 1e-4),
        (torch.bfloat16, torch.float32, 1e-4, 2.0**-6),
        # A rounding of the basis that falls the other way is an error of 2^-9 of its entry.
        (torch.bfloat16, torch.bfloat16, 0.02, 0.03),
        (torch.float32, torch.bfloat16, 0.02, 0.02),
        (torch.float16, torch.float16, 3e-3, 4e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", [RIGHT, LEFT])
@pytest.mark.parametrize(
    ("shape", "rank"), [((20, 31), 6), ((31, 20), 6), ((17, 17), 5), ((2, 12, 19), 4), ((300, 450), 8)]
)
def test_dtypes_and_layouts(
    device, same_sketch, shape, rank, side, dtype, basis_dtype, accuracy, weight_accuracy, strides
):
    """Guards against strides, a side or a dtype taken for another, weights and gradients cut into tiles."""
    state = State([(shape, rank, side)], dtype, basis_dtype, strides, device)
    follow(state, accuracy, weight_accuracy, schedule=(0, -1, 1))


@pytest.mark.parametrize("side", [RIGHT, LEFT])
@pytest.mark.parametrize("shape", [(1, 15), (15, 1), (1, 1)])
def test_vectors(device, same_sketch, shape, side):
    """Guards against matrices of one row or column, whose strides mean nothing."""
    follow(State([(shape, 1, side)], device=device), 1e-8)


@pytest.mark.parametrize("sketch", ["plain", "half_power", "power"])
@pytest.mark.parametrize("side", [RIGHT, LEFT])
def test_kept_moments_find_their_columns(device, side, sketch):
    """Guards against columns that change sign from refresh to refresh, under moments that are kept."""
    state = State([((40, 60), 4, side)], device=device)
    g = torch.randn(40, 60, generator=generator(5), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    g = (u * 2.0 ** -torch.arange(40)) @ vh
    for number in range(6):
        before = state.bases[0].clone()
        state.step(
            projected_adamw_, [g.to(device) * (1 + number)], number,
            moments="keep", sketch=sketch, oversampling=8,
        )  # fmt: skip
        if number > 0:
            assert float((before * state.bases[0]).sum(0).min()) > 0.9


@pytest.mark.parametrize("options", [{}, {"maximize": True, "arithmetic": "galore_torch"}], ids=str)
@pytest.mark.parametrize("moments", ["rotate", "keep"])
@pytest.mark.parametrize("sketch", ["plain", "half_power", "power", "warm"])
def test_refreshed_at_the_end(device, same_sketch, sketch, moments, options):
    """Guards against a basis that serves too early, moments rotated by the wrong count or into the wrong basis,
    and a warm start that is not the one of G^T Q.  The first refresh serves at once."""
    follow(
        State(ALIKE, device=device), 1e-7, schedule=(0, -1, 1, 2, -1, 3),
        refresh_at="end", sketch=sketch, moments=moments, **options,
    )  # fmt: skip


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize(
    ("dtype", "basis_dtype", "accuracy"),
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.bfloat16, torch.bfloat16, 0.03),
        (torch.float16, torch.float16, 4e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", [RIGHT, LEFT])
@pytest.mark.parametrize(("shape", "rank"), [((20, 31), 6), ((2, 12, 19), 4), ((300, 450), 8)])
def test_refreshed_at_the_end_in_other_dtypes(
    device, same_sketch, shape, rank, side, dtype, basis_dtype, accuracy, strides
):
    """Guards against a projection that is read as a panel in another order, of another side or dtype."""
    state = State([(shape, rank, side)], dtype, basis_dtype, strides, device)
    follow(state, accuracy, schedule=(0, 1, 2), refresh_at="end")


@pytest.mark.parametrize("size", [1e-150, 1e150])
@pytest.mark.parametrize("sketch", ["warm", "half_power"])
def test_refreshed_at_the_end_by_extreme_gradients(device, same_sketch, sketch, size):
    """Guards against a projection that is taken for one of the scaled gradient."""
    mine = State(MIXED, device=device)
    for number in range(3):
        grads = [g * size for g in mine.grads(number)]
        theirs = mine.on_cpu()
        options = {"refresh_at": "end", "sketch": sketch, "eps": 0.03 * size}
        assert mine.step(projected_adamw_, grads, number, **options) == [REFRESHED] * len(MIXED)
        theirs.step(reference.projected_adamw_, grads, number, **options)
        assert_equal(mine, theirs, 1e-7, lists=["params", "bases", "steps"])


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


def test_at_the_end_a_matrix_without_a_basis_gets_one(device, together):
    """Guards against a matrix of a stack that a NaN left without a basis at its first refresh, and then for good."""
    state = State([((3, 14, 11), 3, RIGHT)], device=device)
    grads = state.grads(0)
    grads[0][1, 2, 2] = math.nan
    assert state.step(projected_adamw_, grads, 0, refresh_at="end") == [REFRESHED]
    assert not bool(state.bases[0][1].any())
    weight = state.params[0][1].clone()
    assert state.step(projected_adamw_, state.grads(1), 1, refresh_at="end") == [REFRESHED]
    assert_orthonormal(state.bases[0].cpu(), UNIT_ROUNDOFF[torch.float64])
    if together:  # which is not known: the basis serves from the next step on
        torch.testing.assert_close(state.params[0][1], weight * (1 - 0.1 * 0.2), rtol=0, atol=1e-12)
    before = state.copy()
    assert state.step(projected_adamw_, state.grads(2), -1) == [STEPPED]
    assert bool((state.exp_avgs[0][1] != before.exp_avgs[0][1]).any())


def test_measures_at_the_end(device):
    """Guards against the energy in the new basis, where the step was made in the old."""
    state = State(ALIKE, device=device)
    state.step(projected_adamw_, state.grads(0), 0)
    grads, before = state.grads(1), state.on_cpu()
    _, found = measured(state, grads, 1, refresh_at="end")
    for i, row in enumerate(found.tolist()):
        old = project(grads[i].cpu(), before.bases[i], before.sides[i])
        expected = by_formula(before, state, grads, i)
        expected[1] = float(old.square().sum())
        assert row == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_a_stack_begins_again_as_one(device, same_sketch, value):
    """Guards against moments of one matrix read at a count of steps that another's refresh has reset."""
    mine = State([((3, 14, 11), 3, RIGHT), ((2, 9, 21), 4, LEFT)], device=device)
    theirs = mine.on_cpu()
    for number, refresh in enumerate((0, -1, 1, -1, -1)):
        grads = mine.grads(number)
        if number == 2:
            grads[0][1] = value
        outcomes = mine.step(projected_adamw_, grads, refresh, moments="reset")
        assert outcomes == theirs.step(reference.projected_adamw_, grads, refresh, moments="reset")
        if number == 2:
            assert [float(t) for t in mine.steps] == [1.0, 1.0]
            assert not bool(mine.exp_avgs[0][1].any())
            assert bool(mine.exp_avgs[0][0].any())
        assert_equal(mine, theirs, 1e-8)


def test_a_step_before_any_reset_is_as_if_there_were_none(device):
    """Guards against a reset where no refresh is due or none succeeds."""
    state = State(ALIKE, device=device)
    state.step(projected_adamw_, state.grads(0), 0)
    other = state.copy()
    state.step(projected_adamw_, state.grads(1), -1, moments="reset")
    other.step(projected_adamw_, state.grads(1), -1)
    zeros = [torch.zeros_like(w) for w in state.params]
    assert state.step(projected_adamw_, zeros, 1, moments="reset") == [STEPPED] * len(ALIKE)
    other.step(projected_adamw_, zeros, 1)
    assert_equal(state, other)
    assert float(state.steps[0]) == 3


def test_full_rank_is_adamw(device):
    """Guards against an arithmetic that only resembles torch.optim.AdamW's: in the basis I they are one."""
    state = State([((9, 9), 9, RIGHT), ((9, 9), 9, LEFT)], device=device)
    for q in state.bases:
        q.copy_(torch.eye(9))
    mirror = [torch.nn.Parameter(w.clone()) for w in state.params]
    options = {**ADAM, "scale": 1.0}
    adamw = torch.optim.AdamW(mirror, lr=0.1, betas=(0.9, 0.95), eps=0.03, weight_decay=0.2, maximize=True)
    for number in range(5):
        grads = state.grads(number)
        state.step(projected_adamw_, grads, -1, **{**options, "maximize": True})
        for w, g in zip(mirror, grads, strict=True):
            w.grad = g.clone()
        adamw.step()
        for w, v in zip(state.params, mirror, strict=True):
            torch.testing.assert_close(w, v.data, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sketch", ["plain", "warm"])
@pytest.mark.parametrize("side", [RIGHT, LEFT])
def test_stack_is_its_matrices(device, side, sketch):
    """Guards against matrices of a stack that share a test matrix or are mixed: matrix i has key + i."""
    stack = State([((4, 12, 17), 5, side)], torch.float32, device=device)
    singles = State([((12, 17), 5, side)] * 4, torch.float32, device=device)
    singles.keys = [stack.keys[0] + i for i in range(4)]
    singles.params = [w.clone() for w in stack.params[0]]
    for number, refresh in enumerate((0, -1, 1, -1)):
        grads = stack.grads(number)
        assert stack.step(projected_adamw_, grads, refresh, sketch=sketch) == [
            REFRESHED if refresh >= 0 else STEPPED
        ]
        singles.step(projected_adamw_, list(grads[0]), refresh, sketch=sketch)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "bases"):
        expected = torch.stack(getattr(singles, name))
        torch.testing.assert_close(getattr(stack, name)[0], expected, rtol=0, atol=1e-5)
    assert [float(t) for t in (*stack.steps, *singles.steps)] == [4.0] * 5


def test_reproducible(device, threads):
    """Guards against randomness from outside, and results that follow the thread count beyond rounding."""
    start = State([*MIXED, ((120, 200), 16, LEFT)], torch.float32, device=device)

    def run():
        state = start.copy()
        for number, refresh in enumerate((0, -1, 1, -1)):
            state.step(projected_adamw_, state.grads(number), refresh)
        return state

    first = run()
    torch.manual_seed(1)
    assert_equal(run(), first)
    for count in (1, 4):
        threads(count)
        assert_equal(run(), first, 1e-4)


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


def test_given_coefficients(device, same_sketch):
    """Guards against a refresh made elsewhere that is made again, or projected with another basis."""
    state = State(MIXED, device=device)
    for number in range(3):
        grads = state.grads(number)
        theirs = state.on_cpu()
        given = []
        for i, (g, side) in enumerate(zip(grads, state.sides, strict=True)):
            turned = (g.mT if side == RIGHT else g).cpu()
            q, b, _, _ = reference.range_finder(
                turned, state.bases[i].shape[-1], seed=5, key=state.keys[i], refresh=number
            )
            q = q.to(device)
            if number > 0:
                corrections = 1 - 0.9**number, 1 - 0.95**number
                rotated = rotate_moments(
                    state.exp_avgs[i], state.exp_avg_sqs[i], state.bases[i], q, side, *corrections
                )
                state.exp_avgs[i].copy_(rotated[0])
                state.exp_avg_sqs[i].copy_(rotated[1])
            state.bases[i].copy_(q)
            given.append(b.mT if side == RIGHT else b)
        outcomes = state.step(projected_adamw_, grads, -1, given)
        assert outcomes == [REFRESHED] * len(MIXED)
        theirs.step(reference.projected_adamw_, grads, number, sketch="half_power")
        assert_equal(state, theirs, 1e-8)


def test_mixed_schedule(device, together, same_sketch):
    """Guards against a refresh of one matrix that is taken for one of another."""
    mine = State(MIXED, device=device)
    theirs = mine.on_cpu()
    first = [0, 0, 0 if together else -1, 0, 0]
    for number, due in enumerate((first, [-1, 1, -1, 4, -1], [2, -1, -1, -1, 7])):
        grads = mine.grads(number)
        outcomes = mine.step(projected_adamw_, grads, due)
        assert outcomes == theirs.step(reference.projected_adamw_, grads, due)
        assert outcomes == [REFRESHED if d >= 0 or number == 0 else STEPPED for d in due]
        assert_equal(mine, theirs, 1e-8)


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


def test_steps_may_be_fp64_or_one_number(device):
    """Guards against a step count of another dtype or shape read wrongly."""
    states = [State(MIXED[:2], device=device) for _ in range(3)]
    states[1].steps = [t.double() for t in states[1].steps]
    states[2].steps = [t.reshape(1) for t in states[2].steps]
    for state in states:
        for number, refresh in enumerate((0, -1, 1)):
            state.step(projected_adamw_, state.grads(number), refresh)
        assert [float(t) for t in state.steps] == [3.0, 3.0]
    assert_equal(states[1], states[0], lists=["params", "exp_avgs", "exp_avg_sqs", "bases"])
    assert_equal(states[2], states[0], lists=["params", "exp_avgs", "exp_avg_sqs", "bases"])


def test_parameters_that_require_grad(device):
    """Guards against autograd: under no_grad a leaf is stepped in place, without it torch refuses."""
    state = State(MIXED, torch.float32, device=device)
    plain = state.copy()
    state.params = [torch.nn.Parameter(w) for w in state.params]
    state.step(projected_adamw_, state.grads(0), 0)
    plain.step(projected_adamw_, plain.grads(0), 0)
    for w, v in zip(state.params, plain.params, strict=True):
        assert torch.equal(w.data, v)
        assert w.is_leaf
    args = (
        state.exp_avgs,
        state.exp_avg_sqs,
        state.bases,
        state.steps,
        [None] * 5,
        state.sides,
        state.keys,
        [-1] * 5,
    )
    with pytest.raises(RuntimeError, match="leaf"):
        projected_adamw_(state.params, state.grads(1), *args, **ADAM)


def test_writes_are_counted(device):
    """Guards against a backward pass through weights changed since its forward pass: autograd must notice."""
    state = State(MIXED[:2], torch.float32, device=device)
    state.params = [torch.nn.Parameter(w) for w in state.params]
    loss = sum((w * w.exp()).sum() for w in state.params)
    state.step(projected_adamw_, state.grads(0), 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refresh_seconds(device, together):
    """Guards against refreshes that are timed where there are none, not added up, or more than the whole call."""
    if together:
        pytest.skip("where nobody waits, nobody knows")
    state = State(MIXED, torch.float32, device=device)
    seconds = torch.zeros(len(MIXED), dtype=torch.float64)
    start = time.perf_counter()
    state.step(projected_adamw_, state.grads(0), 0, refresh_seconds=seconds)
    assert bool((seconds > 0).all())
    assert float(seconds.sum()) < time.perf_counter() - start
    first = seconds.clone()
    state.step(projected_adamw_, state.grads(1), -1, refresh_seconds=seconds)
    assert torch.equal(seconds, first)
    refreshes = [1, *[-1] * (len(MIXED) - 1)]
    state.step(projected_adamw_, state.grads(2), refreshes, refresh_seconds=seconds)
    assert float(seconds[0]) > float(first[0])
    assert torch.equal(seconds[1:], first[1:])


@pytest.mark.parametrize("strides", ["contiguous", "strided"])
@pytest.mark.parametrize("moments", ["rotate", "keep"])
@pytest.mark.parametrize(
    ("dtype", "accuracy"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)], ids=str
)
def test_measures(device, dtype, accuracy, moments, strides):
    """Guards against energies of another step, basis or matrix, and an angle between the wrong subspaces."""
    state = State([*ALIKE, ((300, 450), 8, LEFT)], dtype, strides=strides, device=device)
    for number, refresh in enumerate((0, -1, 1, -1)):
        grads = state.grads(number)
        before = state.on_cpu()
        outcomes, found = measured(state, grads, refresh, moments=moments)
        assert outcomes == [REFRESHED if refresh >= 0 else STEPPED] * len(outcomes)
        for i, row in enumerate(found.tolist()):
            expected = by_formula(before, state, grads, i)
            if refresh < 1:
                expected[2] = math.nan
            assert row == pytest.approx(expected, rel=accuracy, nan_ok=True)


def test_measuring_changes_nothing(device):
    """Guards against a measure that is written where a step is computed."""
    state = State(ALIKE, torch.float32, device=device)
    other = state.copy()
    for number, refresh in enumerate((0, -1, 1)):
        measured(state, state.grads(number), refresh)
        other.step(projected_adamw_, state.grads(number), refresh)
    assert_equal(state, other)


@pytest.mark.parametrize("refresh", [1, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_measures_of_what_is_skipped(device, refresh, value):
    """Guards against a NaN that spoils the measures of a stack, or a skipped matrix that seems to have some."""
    state = State(MIXED, device=device)
    state.step(projected_adamw_, state.grads(0), 0)
    grads = state.grads(1)
    grads[0][2, 3] = grads[3][1, 4, 4] = value
    before = state.on_cpu()
    _, found = measured(state, grads, refresh)
    assert bool(found[0].isnan().all())
    for i, only in ((1, slice(None)), (3, [0, 2])):
        expected = by_formula(before, state, grads, i, only)
        assert found[i, :2].tolist() == pytest.approx(expected[:2], rel=1e-12)
        assert float(found[i, 2]) == pytest.approx(expected[2] if refresh > 0 else math.nan, nan_ok=True)


def test_measures_of_zero_gradients_and_of_given_coefficients(device):
    """Guards against energies where there are none, and an angle to a basis that is there no more."""
    state = State(MIXED, device=device)
    zeros = [torch.zeros_like(w) for w in state.params]
    for refresh in (0, -1):
        _, found = measured(state, zeros, refresh)
        assert found[:, :2].tolist() == [[0.0, 0.0]] * len(MIXED)
        assert bool(found[:, 2].isnan().all())
        state.step(projected_adamw_, state.grads(0), 0)
    grads = state.grads(1)
    given = [2 * project(*x) for x in zip(grads, state.bases, state.sides, strict=True)]
    _, found = measured(state, grads, -1, coefficients=given)
    for g, r, row in zip(grads, given, found, strict=True):
        assert row[:2].tolist() == pytest.approx([float(g.square().sum()), float(r.square().sum())])
        assert bool(row[2].isnan())


@pytest.mark.parametrize("size", [1e-150, 1e150])
def test_measures_of_extreme_gradients(device, size):
    """Guards against squares that leave the range of the gradient's dtype though not that of the measure."""
    state = State([((20, 31), 4, LEFT)], device=device)
    grads = [g * size for g in state.grads(0)]
    before = state.on_cpu()
    _, found = measured(state, grads, 0)
    assert found[0, :2].tolist() == pytest.approx(by_formula(before, state, grads, 0)[:2], rel=1e-9)
    single = State([((20, 31), 4, LEFT)], torch.float32, device=device)
    _, found = measured(single, [g * 1e25 for g in single.grads(0)], 0)
    expected = sum(float((g.double() * 1e25).square().sum()) for g in single.grads(0))
    assert float(found[0, 0]) == pytest.approx(expected, rel=1e-5)
    assert 0 < float(found[0, 1]) < float(found[0, 0])


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


@pytest.mark.parametrize("refresh", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(device, refresh, dtype):
    """Guards against a schema that hides what is written, a fake implementation at odds with the operator."""
    state = State(MIXED[:3], dtype, device=device)
    state.step(projected_adamw_, state.grads(0), 0)
    torch.library.opcheck(
        torch.ops.galore_rrf.projected_adamw_.default,
        (
            state.params, state.grads(1), state.exp_avgs, state.exp_avg_sqs,
            [torch.empty(0) for _ in range(3)], [torch.empty(0) for _ in range(3)],
            state.bases, state.steps, [torch.empty(0) for _ in range(3)], [None] * 3, state.sides, state.keys,
            [refresh] * 3,
        ),
        {
            **ADAM,
            "lr": torch.tensor(ADAM["lr"], dtype=torch.float64),
            "asynchronous": State.asynchronous,
            "measures": torch.zeros(3, 3, dtype=torch.float64, device=device),
        },
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_long_runs_stay_together(device, same_sketch, seed):
    """Guards against errors that grow: forty steps over every combination of options."""
    choices = itertools.product(["half_power", "warm"], ["torch", "galore_torch"])
    for sketch, arithmetic in choices:
        schedule = [number // 4 if number % 4 == 0 else -1 for number in range(40)]
        follow(
            State(MIXED, device=device),
            1e-6,
            schedule=schedule,
            sketch=sketch,
            arithmetic=arithmetic,
            seed=seed,
        )
