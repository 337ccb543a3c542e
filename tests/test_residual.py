"""The gradient's part outside the subspace put to use: step by step against the reference, and by its formulae."""

import math

import pytest
import torch
from matrices import generator
from test_projected_adamw import ADAM, LEFT, RIGHT, SKIPPED, State, assert_equal, follow, project

from galore_rrf import GaLoreAdamW
from galore_rrf.ops import projected_adamw_

pytestmark = pytest.mark.core

# No rank is full: there would be no residual but rounding, whose signs mean nothing.
PARTS = [((24, 37), 6, LEFT), ((37, 24), 5, RIGHT), ((3, 14, 11), 3, RIGHT), ((2, 9, 21), 4, LEFT)]
LARGE = [((300, 450), 8, LEFT), ((450, 300), 8, LEFT), ((300, 450), 8, RIGHT)]
MODES = ["sign"]
STATELESS = ["sign"]


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


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("arithmetic", ["torch", "galore_torch", "bitsandbytes"])
@pytest.mark.parametrize("residual", MODES)
def test_every_arithmetic(device, same_sketch, residual, arithmetic, maximize):
    """Guards against any departure from the formulae, in fp64, over mixed shapes, sides and stacks."""
    state = State([*PARTS, *PARTS[:3]], device=device)
    follow(state, 1e-8, residual=residual, residual_scale=0.3, arithmetic=arithmetic, maximize=maximize)


@pytest.mark.parametrize("options", [{"moments": "keep"}, {"weight_decay": 0.0}, {"lr": 0.0}, {"beta1": 0.0},
                                     {"correct_bias": False}, {"residual_scale": -2.0}])  # fmt: skip
@pytest.mark.parametrize("residual", MODES)
def test_other_options(device, same_sketch, residual, options):
    """Guards against an option that does not reach the residual's step."""
    follow(State(PARTS, device=device), 1e-8, residual=residual, **options)


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


@pytest.mark.parametrize("refresh", [-1, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", MODES)
def test_nonfinite_gradient_changes_nothing(device, residual, dtype, value, refresh):
    """Guards against NaN that reaches a weight or a state by the residual, and against its neighbours' loss."""
    state = State([*PARTS, PARTS[0]], dtype, device=device)
    state.step(projected_adamw_, state.grads(0), 0, residual=residual)
    before, clean = state.copy(), state.copy()
    grads = state.grads(1)
    clean.step(projected_adamw_, [g.clone() for g in grads], refresh, residual=residual)
    grads[0][2, 3] = value
    grads[2][1, 4, 4] = value
    outcomes = state.step(projected_adamw_, grads, refresh, residual=residual)
    assert outcomes[0] == SKIPPED
    assert SKIPPED not in outcomes[1:]
    for name, mine in state.lists().items():
        assert torch.equal(mine[0], getattr(before, name)[0])
        if name != "steps":
            assert torch.equal(mine[2][1], getattr(before, name)[2][1])
        for i in (1, 3, 4):
            torch.testing.assert_close(mine[i], getattr(clean, name)[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", MODES)
def test_stochastic_rounding_of_the_sum(device, residual, dtype):
    """Guards against a residual's step that is rounded apart, or to nearest: means are those of fp32."""
    parts = [*PARTS, LARGE[2]]
    start = State(parts, dtype, torch.float32, device=device)
    options = {"lr": 2e-4, "residual": residual, "residual_scale": 1.0, "weight_decay": 0.0}
    exact = State(parts, torch.float32, device=device)
    exact.params = [w.float() for w in start.params]
    grads = start.grads(1)
    exact.step(projected_adamw_, [g.float() for g in grads], 0, **options)
    total = [torch.zeros_like(w) for w in exact.params]
    runs = 32
    for key in range(runs):
        state = State(parts, dtype, torch.float32, device=device)
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
        assert float((x - w.float()).abs().mean()) > 1e-4 / 2


@pytest.mark.parametrize("keys", [{}, {"tolerance": 0.5}, {"projector": "svd"}, {"state_dtype": torch.uint8},
                                  {"proj_type": "reverse_std"}, {"update_proj_gap": 1}])  # fmt: skip
@pytest.mark.parametrize("residual", MODES)
def test_in_the_optimizer(device, residual, keys):
    """Guards against a key that does not reach the step, or not with refreshes made elsewhere."""
    moved = []
    for scale in (0.0, 1.0):
        g = generator(3)
        shapes = [(20, 31), (31, 20), (3, 12, 17), (8, 5, 3, 3)]
        params = [torch.nn.Parameter(torch.randn(s, generator=g).to(device)) for s in shapes]
        opt = GaLoreAdamW(
            params, lr=0.01, rank=4, residual=residual, residual_scale=scale, weight_decay=0.0, **keys
        )
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g).to(device)
            opt.step()
        moved.append([p.detach().clone() for p in params])
    for without, with_it in zip(*moved, strict=True):
        assert float((without - with_it).abs().mean()) > 1e-4


@pytest.mark.parametrize("residual", STATELESS)
def test_needs_no_state(residual):
    """Guards against state where the mode needs none."""
    w = torch.nn.Parameter(torch.randn(9, 12, generator=generator(1)))
    opt = GaLoreAdamW([w], rank=2, residual=residual)
    w.grad = torch.ones_like(w)
    opt.step()
    plain = GaLoreAdamW([w], rank=2)
    plain.step()
    assert set(opt.state[w]) == set(plain.state[w])


@pytest.mark.parametrize(
    ("error", "message", "keys"),
    [
        (ValueError, "Invalid residual: 'other'", {"residual": "other"}),
        (ValueError, "Invalid residual_scale: nan", {"residual": "sign", "residual_scale": math.nan}),
        (TypeError, "Invalid residual_scale: '1'", {"residual": "sign", "residual_scale": "1"}),
        (ValueError, "residual='sign' and proj_type='full'", {"residual": "sign", "proj_type": "full"}),
    ],
)
def test_bad_values(error, message, keys):
    """Guards against values and combinations that are taken silently."""
    w = [torch.nn.Parameter(torch.randn(8, 9, generator=generator(1)))]
    with pytest.raises(error, match=message):
        GaLoreAdamW(w, rank=2, **keys)


def test_bad_mode_of_the_operator(device):
    """Guards against an unknown mode that is taken for another."""
    state = State(PARTS, device=device)
    with pytest.raises(ValueError, match="residual"):
        state.step(projected_adamw_, state.grads(0), 0, residual="other")
