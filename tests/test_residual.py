"""The gradient's part outside the subspace put to use: step by step against the reference, and by its formulae."""

import math

import pytest
import torch
from projected_state import (
    ADAM,
    LEFT,
    REFRESHED,
    RIGHT,
    SKIPPED,
    STEPPED,
    State,
    assert_equal,
    follow,
    project,
)

from galore_rrf.ops import projected_adamw_

pytestmark = pytest.mark.core

# No rank is full: there would be no residual but rounding, whose signs mean nothing.
PARTS = [((24, 37), 6, LEFT), ((37, 24), 5, RIGHT), ((3, 14, 11), 3, RIGHT), ((2, 9, 21), 4, LEFT)]
LARGE = [((300, 450), 8, LEFT), ((450, 300), 8, LEFT), ((300, 450), 8, RIGHT)]
MODES = ["scaled", "sign", "normalized", "orthogonalized", "feedback"]
# Of states and of weights: norms are kept in fp32.
ACCURACY = {
    "scaled": (4e-6, 1e-7),
    "sign": (1e-8, 1e-8),
    "normalized": (1e-8, 1e-8),
    "orthogonalized": (1e-8, 1e-8),
    "feedback": (1e-8, 1e-8),
}


class Put(State):
    """A state whose residuals are put to use."""

    def __init__(self, mode, parts, dtype=torch.float64, *args, **keys):
        super().__init__(parts, dtype, *args, **keys)
        self.mode = mode
        self.residual_states = [
            torch.zeros_like(w, memory_format=torch.contiguous_format)
            if mode == "feedback"
            else torch.zeros(w.shape[:-2] if mode == "scaled" else 0, device=w.device)
            for w in self.params
        ]

    def lists(self):
        return {**super().lists(), "residual_states": self.residual_states}

    def step(self, *args, **options):
        keys = {"residual": self.mode, "residual_states": self.residual_states, **options}
        return super().step(*args, **keys)


@pytest.fixture(params=[False, True], ids=["each", "together"], autouse=True)
def together(request, device, monkeypatch):
    """Matrices one by one, and those of one shape together, as always on CUDA."""
    if not request.param and device.type != "cpu":
        pytest.skip("on CUDA they always are together")
    monkeypatch.setattr(State, "asynchronous", request.param)
    return request.param


def back(x, q, side):
    """Q N or N Q^T."""
    return x @ q.mT if side == RIGHT else q @ x


def outside(g, q, side):
    """E, in fp64."""
    g, q = g.double().cpu(), q.double().cpu()
    return g - back(project(g, q, side), q, side)


def with_spectrum(g, decay):
    """Singular values i^-decay in the place of those of `g`."""
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    return u * torch.arange(1, s.shape[-1] + 1, dtype=g.dtype, device=g.device) ** -decay @ v


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("arithmetic", ["torch", "galore_torch", "bitsandbytes"])
@pytest.mark.parametrize("residual", MODES)
def test_every_arithmetic(device, same_sketch, residual, arithmetic, maximize):
    """Guards against any departure from the formulae, in fp64, over mixed shapes, sides and stacks."""
    state = Put(residual, [*PARTS, *PARTS[:3]], device=device)
    follow(state, *ACCURACY[residual], residual_scale=0.3, arithmetic=arithmetic, maximize=maximize)


@pytest.mark.parametrize("options", [{"moments": "keep"}, {"weight_decay": 0.0}, {"lr": 0.0}, {"beta1": 0.0},
                                     {"correct_bias": False}, {"residual_scale": -2.0}])  # fmt: skip
@pytest.mark.parametrize("residual", MODES)
def test_other_options(device, same_sketch, residual, options):
    """Guards against an option that does not reach the residual's step."""
    if residual == "feedback" and "moments" in options:
        pytest.skip("the projected gradients that `follow` gives are without what is fed back")
    follow(Put(residual, PARTS, device=device), *ACCURACY[residual], **options)


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize(
    ("dtype", "basis_dtype", "accuracy"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        # Two roundings of weights under 8; a wrong sign is an error of .2.
        (torch.bfloat16, torch.bfloat16, 2.0**-5),
        (torch.float16, torch.float32, 2.0**-8),
    ],
    ids=str,
)
@pytest.mark.parametrize("parts", [PARTS, LARGE], ids=["small", "tiles"])
def test_signs(device, parts, dtype, basis_dtype, accuracy, strides):
    """Guards against signs of another residual, of another entry, or left out, whatever the layout and dtype."""
    plain = State(parts, dtype, basis_dtype, strides, device)
    signed = plain.copy()
    for number, refresh in enumerate((0, -1)):
        grads = plain.grads(number)
        signed.params = [w.clone(memory_format=torch.preserve_format) for w in plain.params]
        plain.step(projected_adamw_, grads, refresh)
        signed.step(projected_adamw_, grads, refresh, residual="sign", residual_scale=2.0)
        lengths = []
        for w, v, g, q, side in zip(
            signed.params, plain.params, grads, plain.bases, plain.sides, strict=True
        ):
            e = outside(g, q, side)
            error = (w.double() - v.double()).cpu() + ADAM["lr"] * ADAM["scale"] * 2 * e.sign()
            # In half precision R is that of a basis before it was rounded, or is itself.
            clear = e.abs() > (1e-6 if basis_dtype != torch.bfloat16 else 0.02) * g.double().abs().max().cpu()
            assert float(clear.double().mean()) > 0.85
            assert float(error[clear].abs().max()) <= accuracy
            lengths.append(float((w - v).abs().max()))
        assert min(lengths) > 0.09
    assert_equal(signed, plain, lists=["exp_avgs", "exp_avg_sqs", "bases", "steps"])


@pytest.mark.parametrize("side", [RIGHT, LEFT])
def test_scaled_is_firas(device, side):
    """Guards against another rule than the published one: by its formulae, uncorrected, at a jump and after it."""
    shape = (30, 12) if side == RIGHT else (12, 30)
    state = Put("scaled", [(shape, 4, side)], device=device)
    state.step(projected_adamw_, state.grads(0), 0, lr=0.0)
    q, dim = state.bases[0].clone(), side - 1
    m, v = state.exp_avgs[0].clone(), state.exp_avg_sqs[0].clone()
    w, last = state.params[0].clone(), state.residual_states[0].double()
    limited = 0
    for number in range(1, 7):
        g = state.grads(number)[0] * (5 if number == 3 else 1)
        r = project(g, q, side)
        m = 0.9 * m + 0.1 * r
        v = 0.95 * v + 0.05 * r * r
        n = m / (v.sqrt() + 0.03)
        s = (g - back(r, q, side)) * n.norm(dim=dim, keepdim=True) / (r.norm(dim=dim, keepdim=True) + 1e-8)
        limiter = max(float(s.norm() / (last + 1e-8)), 1.01) / 1.01
        limited += limiter > 1
        s, last = s / limiter, s.norm() / limiter
        w = w - 0.05 * (back(n, q, side) + s)
        state.step(
            projected_adamw_, [g], -1, correct_bias=False, arithmetic="galore_torch", weight_decay=0.0, lr=0.1
        )
        torch.testing.assert_close(state.params[0], w, rtol=0, atol=1e-6)
        assert float(state.residual_states[0]) == pytest.approx(float(last), rel=1e-6)
    assert 0 < limited < 6


def test_growth_is_not_the_learning_rates(device):
    """Guards against a limiter that takes a schedule's warm-up, or a step at rate 0, for a residual that grows."""
    rates = [0.0, 0.001, 0.01, 0.1, 1.0]
    states = [Put("scaled", PARTS, device=device) for _ in range(2)]
    for number, rate in enumerate(rates):
        refresh = 0 if number == 0 else -1
        for state, lr in zip(states, (rate, 0.1), strict=True):
            state.step(projected_adamw_, state.grads(number), refresh, lr=lr, weight_decay=0.0)
    for mine, constant in zip(*(s.residual_states for s in states), strict=True):
        assert torch.equal(mine, constant)
        assert float(mine.min()) > 0


def test_a_zero_gradient_resets_no_limiter(device):
    """Guards against a residual that may jump after a step without one."""
    state = Put("scaled", PARTS, device=device)
    state.step(projected_adamw_, state.grads(0), 0)
    before = state.copy()
    state.step(projected_adamw_, [torch.zeros_like(w) for w in state.params], -1)
    assert_equal(state, before, lists=["residual_states"])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_feedback_loses_nothing(device, beta1, maximize):
    """Guards against any loss: of all gradients, what is not in the steps is in the momentum or in the error.

    With M the first moment: sum G = sum Q M + beta1 / (1 - beta1) Q M + E (LDAdam), whatever the refreshes.
    """
    state = Put("feedback", PARTS, device=device)
    sums = [torch.zeros_like(w) for w in state.params]
    for number, refresh in enumerate((0, 1, -1, -1, 2, 3, -1)):
        grads = state.grads(number)
        state.step(projected_adamw_, grads, refresh, beta1=beta1, maximize=maximize)
        for i, g in enumerate(grads):
            sums[i] += (-g if maximize else g) - back(state.exp_avgs[i], state.bases[i], state.sides[i])
    for i, total in enumerate(sums):
        momentum = beta1 / (1 - beta1) * back(state.exp_avgs[i], state.bases[i], state.sides[i])
        error = -state.residual_states[i] if maximize else state.residual_states[i]
        torch.testing.assert_close(total, momentum + error, rtol=0, atol=1e-11)


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize(
    ("dtype", "accuracy", "weight_accuracy"),
    # Of states two units of the last place of what has been fed back, which is under 16.
    [(torch.float32, 5e-4, 1e-4), (torch.bfloat16, 2.0**-3, 2.0**-5), (torch.float16, 2.0**-6, 2.0**-8)],
    ids=str,
)
@pytest.mark.parametrize("parts", [PARTS, LARGE], ids=["small", "tiles"])
@pytest.mark.parametrize("residual", ["scaled", "feedback"])
def test_dtypes_and_layouts(device, same_sketch, residual, parts, dtype, accuracy, weight_accuracy, strides):
    """Guards against strides or a dtype taken for another, and weights and gradients cut into tiles."""
    state = Put(residual, parts, dtype, torch.float32, strides=strides, device=device)
    follow(state, accuracy, weight_accuracy, schedule=(0, -1, 1))


def test_of_nothing(device):
    """Guards against a step of noise where the residual is exactly zero: a gradient of zeros, rows of zeros."""
    state = State([((20, 12), 3, RIGHT), ((12, 20), 3, LEFT)], device=device)
    state.step(projected_adamw_, state.grads(0), 0)
    grads = state.grads(1)
    grads[0][4], grads[1][:, 4] = 0, 0
    plain = state.copy()
    options = {"weight_decay": 0.0}
    plain.step(projected_adamw_, grads, -1, **options)
    state.step(projected_adamw_, grads, -1, residual="sign", **options)
    torch.testing.assert_close(state.params[0][4], plain.params[0][4], rtol=0, atol=1e-14)
    torch.testing.assert_close(state.params[1][:, 4], plain.params[1][:, 4], rtol=0, atol=1e-14)
    assert not torch.equal(state.params[0], plain.params[0])
    before = state.copy()
    zeros = [torch.zeros_like(w) for w in state.params]
    before.step(projected_adamw_, zeros, -1, **options)
    state.step(projected_adamw_, zeros, -1, residual="sign", **options)
    assert_equal(state, before, 1e-14)


@pytest.mark.parametrize("strides", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normalized_rows_and_columns(device, dtype, strides):
    """Guards against the wrong side normalized last, a length other than residual_scale, and another direction:
    long vectors have a root mean square of 1, short ones nearly, and E is but scaled by rows and by columns."""
    plain = State([((60, 80), 6, LEFT), ((80, 60), 6, RIGHT)], dtype, dtype, strides, device)
    state = plain.copy()
    for number, refresh in enumerate((0, -1)):
        grads = plain.grads(number)
        state.params = [w.clone(memory_format=torch.preserve_format) for w in plain.params]
        plain.step(projected_adamw_, grads, refresh)
        state.step(projected_adamw_, grads, refresh, residual="normalized", residual_scale=2.0)
        for w, v, g, q, side in zip(state.params, plain.params, grads, plain.bases, plain.sides, strict=True):
            s = (v - w).double().cpu() / (ADAM["lr"] * ADAM["scale"] * 2)
            e = outside(g, q, side)
            long, short = s.square().mean(side).sqrt(), s.square().mean(side - 1).sqrt()
            torch.testing.assert_close(long, torch.ones_like(long), rtol=0, atol=1e-4)
            torch.testing.assert_close(short, torch.ones_like(short), rtol=0, atol=0.1)
            # Rows and columns scaled: every 2 x 2 minor of the quotient is zero.
            scales = (s / e).log()
            rank_one = scales.mean(0, keepdim=True) + scales.mean(1, keepdim=True) - scales.mean()
            clear = e.abs() > 0.03
            assert float((scales - rank_one)[clear].abs().max()) < (1e-8 if dtype == torch.float64 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", ["sign", "normalized", "orthogonalized"])
def test_length_is_not_the_gradients(device, residual, dtype):
    """Guards against a step of the residual that vanishes or is not finite where squares of the gradient's
    entries leave fp32: its length is residual_scale's at any scale."""
    steps = []
    for exponent in (0, -110, -80, 80, 110):
        plain = State(PARTS, dtype, device=device)
        for w in plain.params:
            w.zero_()  # so that no sum is rounded
        state = plain.copy()
        grads = [g * 2.0**exponent for g in plain.grads(0)]
        plain.step(projected_adamw_, grads, 0)
        state.step(projected_adamw_, grads, 0, residual=residual)
        pairs = zip(state.params, plain.params, strict=True)
        steps.append([(w - v).double() for w, v in pairs])
    accuracy = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for others in steps[1:]:
        for one, other in zip(steps[0], others, strict=True):
            assert float((one - other).norm()) < accuracy * float(one.norm())


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("residual", ["normalized", "orthogonalized"])
def test_rounding_is_left_alone(device, residual, size):
    """Guards against rounding blown up to a step: a gradient within the subspace has no residual, at any scale."""
    for dtype in (torch.float64, torch.float32):
        plain = State([((40, 60), 6, LEFT), ((60, 40), 6, RIGHT)], dtype, dtype, device=device)
        grads = [(size * (w[:, :3] @ w[:3])).contiguous() / (10 * w[:, :3].norm() ** 2) for w in plain.params]
        state = plain.copy()
        plain.step(projected_adamw_, grads, 0)
        state.step(projected_adamw_, grads, 0, residual=residual)
        assert_equal(state, plain, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", ["normalized", "orthogonalized"])
def test_rounding_of_half_precision_is_left_alone(device, residual, dtype):
    """Guards against the same by bases that are kept in half precision: of gradients that are exact in it."""
    plain = State([((64, 96), 8, LEFT), ((96, 64), 8, RIGHT)], dtype, dtype, device=device)
    integers = torch.Generator().manual_seed(3)
    grads = [
        torch.randint(-3, 4, (m, 2), generator=integers).to(dtype)
        @ torch.randint(-3, 4, (2, n), generator=integers).to(dtype)
        for m, n in (w.shape for w in plain.params)
    ]
    for w in plain.params:
        w.zero_()  # so that little is rounded off the step
    state = plain.copy()
    for one, options in ((plain, {}), (state, {"residual": residual})):
        assert one.step(projected_adamw_, grads, 0, **options) == [REFRESHED] * 2
    assert_equal(state, plain, 1e-6, weight_accuracy=1e-3)  # a residual's step would be .05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", ["sign", "normalized", "orthogonalized"])
def test_weights_stay_finite_where_the_residual_is_not(device, residual, dtype):
    """Guards against NaN from a finite gradient: near the dtype's most, E may exceed it though R does not."""
    state = State([((4, 40), 1, LEFT)], dtype, dtype, device=device)
    state.bases[0].copy_(torch.tensor([[0.5], [-0.5], [0.5], [0.5]]))
    grads = [torch.full((4, 40), 3e38).to(dtype)]
    assert not (grads[0].float() - state.bases[0].float().cpu() @ torch.full((1, 40), 3e38)).isfinite().all()
    assert state.step(projected_adamw_, grads, -1, residual=residual) == [STEPPED]
    assert state.params[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_error_that_overflows_is_forgotten(device, dtype):
    """Guards against a matrix that is never trained again after a large gradient, fed back for ever as infinity."""
    most = 3e38 if dtype == torch.float32 else 6e4
    state = State([((4, 40), 1, LEFT)], dtype, dtype, device=device)
    state.bases[0].copy_(torch.tensor([[0.5], [-0.5], [0.5], [0.5]]))
    errors = [torch.zeros_like(state.params[0])]
    for size in (most, 1.0):
        grads = [torch.full((4, 40), size).to(dtype)]
        outcomes = state.step(projected_adamw_, grads, -1, residual="feedback", residual_states=errors)
        assert outcomes == [STEPPED]
        assert errors[0].isfinite().all()


@pytest.mark.parametrize(
    "parts", [[((150, 190), 100, LEFT)], [((190, 150), 100, RIGHT)] * 2, [((12, 20), 12, LEFT)]]
)
def test_orthogonalized_of_wide_bases(device, same_sketch, parts):
    """Guards against a complement of another range where its factors are made by blocks, and where it is empty."""
    follow(Put("orthogonalized", parts, device=device), *ACCURACY["orthogonalized"])


@pytest.mark.parametrize("decay", [0, 1, 2])
@pytest.mark.parametrize(
    "parts", [PARTS, [((256, 300), 64, LEFT), ((300, 256), 64, RIGHT)]], ids=["small", "large"]
)
def test_orthogonalized_in_quick_products(device, parts, decay):
    """Guards against an iteration that half precision leads astray, whatever the spectrum: of fp32 matrices products
    may be in bf16, which has 8 bits, and steps are those of fp64 but for a few percent (.055 measured)."""
    exact = State(parts, device=device)
    for w in exact.params:
        w.zero_()
    quick = exact.copy()
    for name, values in quick.lists().items():
        setattr(quick, name, [t.float() if t.dtype == torch.float64 else t for t in values])
    grads = [with_spectrum(g, decay) for g in exact.grads(0)]
    steps = []
    for state in (exact, quick):
        plain = state.copy()
        given = [g.to(w.dtype) for g, w in zip(grads, state.params, strict=True)]
        plain.step(projected_adamw_, given, 0)
        state.step(projected_adamw_, given, 0, residual="orthogonalized")
        steps.append([(w - v).double() for w, v in zip(state.params, plain.params, strict=True)])
    for mine, other in zip(*steps, strict=True):
        assert float((mine - other).norm()) < 0.08 * float(mine.norm())


@pytest.mark.parametrize("refresh", [-1, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", MODES)
def test_nonfinite_gradient_changes_nothing(device, residual, dtype, value, refresh):
    """Guards against NaN that reaches a weight or a state by the residual, and against its neighbours' loss."""
    state = Put(residual, [*PARTS, PARTS[0]], dtype, device=device)
    state.step(projected_adamw_, state.grads(0), 0)
    before, clean = state.copy(), state.copy()
    grads = state.grads(1)
    clean.step(projected_adamw_, [g.clone() for g in grads], refresh)
    grads[0][2, 3] = value
    grads[2][1, 4, 4] = value
    outcomes = state.step(projected_adamw_, grads, refresh)
    assert outcomes[0] == SKIPPED
    assert SKIPPED not in outcomes[1:]
    for name, mine in state.lists().items():
        assert torch.equal(mine[0], getattr(before, name)[0])
        if name != "steps" and mine[2].dim() > 0 and mine[2].numel() > 0:
            assert torch.equal(mine[2][1], getattr(before, name)[2][1])
        for i in (1, 3, 4):
            torch.testing.assert_close(mine[i], getattr(clean, name)[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", MODES)
def test_stochastic_rounding_of_the_sum(device, residual, dtype):
    """Guards against a residual's step that is rounded apart, or to nearest: means are those of fp32."""
    parts = [*PARTS, LARGE[2]]
    start = Put(residual, parts, dtype, torch.float32, device=device)
    options = {"lr": 2e-4, "weight_decay": 0.0}
    exact = Put(residual, parts, torch.float32, device=device)
    exact.params = [w.float() for w in start.params]
    grads = start.grads(1)
    exact.step(projected_adamw_, [g.float() for g in grads], 0, **options)
    total = [torch.zeros_like(w) for w in exact.params]
    runs = 32
    for key in range(runs):
        state = Put(residual, parts, dtype, torch.float32, device=device)
        state.params = [w.clone() for w in start.params]
        state.bases, state.keys = [q.clone() for q in exact.bases], [1000 * key + k for k in state.keys]
        state.step(projected_adamw_, grads, -1, stochastic_rounding=True, **options)
        for w, x, t in zip(state.params, exact.params, total, strict=True):
            t += w.float() - x
    for t, x, w in zip(total, exact.params, start.params, strict=True):
        steps = (x - w.float()).sign()  # a bias is along the steps
        spacing = float(x.abs().mean()) * torch.finfo(dtype).eps
        assert (
            abs(float((t * steps).mean()) / runs) < 5 * spacing / (runs * t.numel()) ** 0.5 + 1e-3 * spacing
        )
        assert float((x - w.float()).abs().mean()) > 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(1),
        torch.zeros((), dtype=torch.float64),
        torch.zeros(24, 36),
        torch.zeros(24, 37, dtype=torch.float64).mT.contiguous().mT,
    ],
    ids=["shape", "dtype", "other", "strides"],
)
@pytest.mark.parametrize("residual", ["scaled", "feedback"])
def test_bad_states_of_the_operator(residual, wrong):
    """Guards against a state of another mode, or of another parameter, that is read all the same."""
    state = Put(residual, PARTS[:1])
    state.residual_states = [wrong]
    before = state.params[0].clone()
    with pytest.raises(ValueError, match="residual state"):
        state.step(projected_adamw_, state.grads(0), 0)
    assert torch.equal(state.params[0], before)


def test_bad_mode_of_the_operator(device):
    """Guards against an unknown mode that is taken for another."""
    state = State(PARTS, device=device)
    with pytest.raises(ValueError, match="residual"):
        state.step(projected_adamw_, state.grads(0), 0, residual="other")
