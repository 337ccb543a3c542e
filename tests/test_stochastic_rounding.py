"""stochastic_rounding of the projected step; the law of the rounding itself is in test_rounding_kernel.py."""

import pytest
import torch
from matrices import generator, layout
from projected_state import ADAM, LEFT, RIGHT, State

from galore_rrf import GaLoreAdamW
from galore_rrf.ops import projected_adamw_

DTYPES = [torch.bfloat16, torch.float16]
PARTS = [((24, 37), 6, LEFT), ((37, 24), 5, RIGHT), ((3, 14, 11), 3, RIGHT), ((300, 450), 8, LEFT)]


def stepped(start: State, dtype, device, asynchronous, **options):
    """A step in `dtype` from the weights and gradients of `start`."""
    state = State(PARTS, dtype, basis_dtype=torch.float32, device=device)
    state.params = [w.to(dtype, copy=True) for w in start.params]
    grads = [g.to(dtype) for g in start.grads(1)]
    # Steps of about half the distance of two numbers.
    state.step(projected_adamw_, grads, 0, lr=2e-3, sketch="plain", asynchronous=asynchronous, **options)
    return state


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_whose_mean_is_the_sum(device, dtype, asynchronous):
    """Guards against a rounding that is biased, or of another sum than the step's in fp32, tiles included."""
    start = State(PARTS, dtype, device=device)
    exact = stepped(start, torch.float32, device, asynchronous)
    total = [torch.zeros_like(w) for w in exact.params]
    runs = 64
    for key in range(runs):
        state = State(PARTS, dtype, basis_dtype=torch.float32, device=device)
        state.params = [w.clone() for w in start.params]
        # Another weight's bits, the same bases: there is but one refresh, given.
        state.bases, state.keys = [q.clone() for q in exact.bases], [1000 * key + k for k in state.keys]
        grads = start.grads(1)
        state.step(projected_adamw_, grads, -1, lr=2e-3, stochastic_rounding=True, asynchronous=asynchronous)
        for w, x, t in zip(state.params, exact.params, total, strict=True):
            distance = (w.float() - x).abs()
            unit = torch.nextafter(w.float().abs().to(dtype), torch.tensor(torch.inf, dtype=dtype)).float()
            assert bool((distance <= (unit - w.float().abs()) * 1.01 + 1e-6).all())
            t += w.float() - x
    for t, x in zip(total, exact.params, strict=True):
        spacing = x.abs().mean() * torch.finfo(dtype).eps
        # Means over all entries and runs: a rounding to nearest of such steps would lose all of each.
        assert (
            abs(float(t.mean()) / runs)
            < 0.02 * float(spacing) + 4 * float(spacing) / (runs * t.numel()) ** 0.5
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_steps_add_up(device, dtype):
    """Guards against weights that stand still: steps of 1/30 of the distance of two numbers, 300 of them."""
    moved = {}
    for rounding in (False, True):
        w = torch.nn.Parameter(torch.full((32, 48), 1.5, dtype=dtype, device=device))
        # Of rank one, all of it in a direction with entries of 32^-1/2, and Adam's direction in it is 1.
        length = torch.finfo(dtype).eps / 30
        opt = GaLoreAdamW(
            [w], lr=length * 32**0.5, rank=1, weight_decay=0.0, stochastic_rounding=rounding, seed=3
        )
        for _ in range(300):
            w.grad = torch.ones_like(w)
            opt.step()
        moved[rounding] = float((1.5 - w.detach().double()).mean()) / length
    assert moved[False] == 0
    assert moved[True] == pytest.approx(300, rel=0.02)


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_bits_belong_to_entries(device, strides, side):
    """Guards against bits that follow tiles, strides, threads or the matrices beside, and against none at all."""
    parts = [((300, 450), 8, side)]
    options = {"stochastic_rounding": True, "sketch": "plain"}
    weights = []
    for seed, form in ((5, "contiguous"), (5, strides), (6, strides)):
        state = State(parts, torch.bfloat16, torch.float32, "contiguous", device)
        state.params = [layout(w, form) for w in state.params]
        state.step(projected_adamw_, state.grads(0), 0, lr=1e-3, seed=5, sketch="plain")
        state.step(projected_adamw_, [layout(g, form) for g in state.grads(1)], -1, **options, seed=seed)
        weights.append(state.params[0].clone())
    first, second, other = weights
    # Products of other layouts differ by rounding, which now and then decides.
    assert float((first != second).float().mean()) < 1e-3
    assert float((second != other).float().mean()) > 0.1


def test_nothing_but_weights_in_half_precision_changes(device):
    """Guards against moments that are rounded too, and fp32 weights that are not left alone."""
    plain = State(PARTS, torch.float32, device=device)
    rounded = plain.copy()
    for state, rounding in ((plain, False), (rounded, True)):
        for number, refresh in enumerate((0, -1)):
            state.step(projected_adamw_, state.grads(number), refresh, stochastic_rounding=rounding)
    for name, mine in plain.lists().items():
        assert all(torch.equal(a, b) for a, b in zip(mine, getattr(rounded, name), strict=True))
    assert ADAM["lr"] == 0.1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_skipped_weights_stay(device, asynchronous):
    """Guards against a skipped matrix that is rounded or decayed all the same."""
    state = State(PARTS, torch.bfloat16, device=device)
    state.step(projected_adamw_, state.grads(0), 0)
    before = state.copy()
    grads = state.grads(1)
    grads[0][1, 2] = torch.nan
    outcomes = state.step(projected_adamw_, grads, -1, stochastic_rounding=True, asynchronous=asynchronous)
    assert outcomes[0] == 0
    for name, mine in state.lists().items():
        assert torch.equal(mine[0], getattr(before, name)[0])
    assert not torch.equal(state.params[1], before.params[1])


def test_bad_values():
    """Guards against a value that is taken for True, and a projection that cannot round."""
    w = [torch.nn.Parameter(torch.randn(8, 9, generator=generator(1)))]
    with pytest.raises(TypeError, match="stochastic_rounding: 1"):
        GaLoreAdamW(w, rank=2, stochastic_rounding=1)
    with pytest.raises(ValueError, match=r"stochastic_rounding.*proj_type='full'"):
        GaLoreAdamW(w, rank=2, stochastic_rounding=True, proj_type="full")
