"""projected_adamw_: step by step against the plain PyTorch reference, and what it leaves alone.

The refreshed basis is a function of the spans of a sketch's first columns (`reference.panels.orth`), so operator
and reference agree column by column to rounding times the condition of the sketch, a few units for Gaussian
gradients.  Adam's division is by sqrt(v) + eps: eps = 0.03 keeps what rounding does to tiny entries small
(and makes an eps at the wrong place show).  Where columns are singular vectors, whose signs are arbitrary
(moments="keep"), the reference is given the operator's basis, after a comparison up to signs.
"""

import itertools
import math
import time

import pytest
import torch
from matrices import UNIT_ROUNDOFF, assert_orthonormal, generator
from projected_state import ADAM, ALIKE, LEFT, MIXED, REFRESHED, RIGHT, STEPPED, State, assert_equal, follow

from galore_rrf import reference
from galore_rrf.ops import projected_adamw_, rotate_moments

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("together")]


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
