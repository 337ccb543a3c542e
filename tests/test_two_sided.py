"""proj_type="full": R = P^T G Q, with moments r x r, in the optimizer."""

import itertools
import math

import pytest
import torch
from matrices import UNIT_ROUNDOFF, assert_orthonormal, generator
from training import gradient, set_gradients, settled, train

from galore_rrf import GaLoreAdamW, moments
from galore_rrf.two_sided import BASES

pytestmark = pytest.mark.core

RANK, LR, BETAS, EPS, DECAY, SCALE = 5, 0.03, (0.8, 0.9), 1e-3, 0.1, 0.5
SHAPES = [(24, 16), (16, 24), (20, 20), (3, 12, 16), (12, 3, 3, 3)]


def make(device, shape, dtype=torch.float64, **keys):
    w = torch.nn.Parameter(torch.randn(shape, generator=generator(3)).to(device, dtype))
    group = {"params": [("w", w)], "rank": RANK, "proj_type": "full", "scale": SCALE, **keys}
    return w, GaLoreAdamW([group], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


def matrices(x):
    return x if x.dim() <= 3 else x.flatten(1)


@pytest.mark.parametrize("arithmetic", ["torch", "galore_torch", "bitsandbytes"])
@pytest.mark.parametrize("projector", ["range_finder", "svd"])
@pytest.mark.parametrize("rotated", ["rotate", "keep"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_follows_the_formula(device, shape, rotated, projector, arithmetic):
    """Guards against a side taken for the other, moments that are not moved, decay or eps at another place."""
    keys = {"moments": rotated, "projector": projector, "arithmetic": arithmetic, "update_proj_gap": 2}
    with pytest.warns(UserWarning, match="moments='keep'") if rotated == "keep" else torch.no_grad():
        w, opt = make(device, shape, **keys)
    expected = matrices(w.detach().clone())
    m = v = p = q = None
    for t in range(1, 7):
        w.grad = gradient(shape, t, torch.float64, device=device)
        opt.step()
        state = opt.state[w]
        new_p, new_q = state["basis"], state["basis_right"]
        r = new_p.mT @ matrices(w.grad) @ new_q
        if m is None:
            m, v = torch.zeros_like(r), torch.zeros_like(r)
        elif rotated == "rotate" and t % 2 == 1:
            correction1, correction2 = 1 - BETAS[0] ** (t - 1), 1 - BETAS[1] ** (t - 1)
            s, z = new_p.mT @ p, new_q.mT @ q
            mean, variance = m / correction1, v / correction2 - (m / correction1).square()
            mean, variance = s @ mean @ z.mT, s.square() @ variance @ z.square().mT
            m, v = mean * correction1, (variance + mean.square()).abs() * correction2
        p, q = new_p.clone(), new_q.clone()
        m, v = BETAS[0] * m + (1 - BETAS[0]) * r, BETAS[1] * v + (1 - BETAS[1]) * r.square()
        root = math.sqrt(1 - BETAS[1] ** t)
        eps = EPS / root if arithmetic == "galore_torch" else EPS
        n = SCALE * p @ (m / (1 - BETAS[0] ** t) / (v.sqrt() / root + eps)) @ q.mT
        decay = 1 - LR * DECAY
        expected = decay * expected - LR * n if arithmetic == "torch" else decay * (expected - LR * n)
        torch.testing.assert_close(matrices(w.detach()), expected, rtol=0, atol=1e-9)
        assert settled(opt)[w]["refreshes"] == (t + 1) // 2


@pytest.mark.parametrize("sketch", ["warm", "plain", "half_power", "power"])
def test_bases_span_what_the_gradient_does(device, sketch):
    """Guards against bases of other matrices: a gradient of the rank is kept whole."""
    w, opt = make(device, (40, 30), sketch=sketch, update_proj_gap=1)
    for step in range(3):
        factors = (
            torch.randn(k, RANK, generator=generator(10 * step + k), dtype=torch.float64) for k in (40, 30)
        )
        left, right = factors
        w.grad = (left @ right.mT).to(device)
        opt.step()
        p, q = opt.state[w]["basis"], opt.state[w]["basis_right"]
        for basis in (p, q):
            assert_orthonormal(basis.cpu(), UNIT_ROUNDOFF[torch.float64])
        torch.testing.assert_close(p @ (p.mT @ w.grad @ q) @ q.mT, w.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_are_kept_as_asked(device, dtype, state_dtype):
    """Guards against moments that a step or a refresh leaves in another dtype."""
    w, opt = make(device, (90, 100), dtype, rank=70, state_dtype=state_dtype, update_proj_gap=2)
    reference, exact = make(device, (90, 100), dtype, rank=70, update_proj_gap=2)
    start = w.detach().clone()
    for step in range(5):
        set_gradients([w], step)
        set_gradients([reference], step)
        opt.step()
        exact.step()
        assert {opt.state[w][name].dtype for name in moments.NAMES} == {state_dtype}
    assert float((w - reference).detach().norm()) <= 0.1 * float((reference - start).detach().norm())


def test_columns_and_sketches_of_refreshes(device):
    """Guards against kept columns that change sign, and one test matrix for every refresh."""
    u, _, vh = torch.linalg.svd(
        torch.randn(40, 30, generator=generator(5), dtype=torch.float64), full_matrices=False
    )
    g = (u * 2.0 ** -torch.arange(30)) @ vh
    with pytest.warns(UserWarning, match="moments='keep'"):
        kept, opt = make(
            device, (40, 30), moments="keep", sketch="half_power", oversampling=8, update_proj_gap=1
        )
    fresh, other = make(device, (40, 30), sketch="plain", update_proj_gap=1)
    bases = []
    for step in range(5):
        for w, o in ((kept, opt), (fresh, other)):
            w.grad = (1 + step) * g.to(device)
            o.step()
        bases.append([o.state[w][name].clone() for w, o in ((kept, opt), (fresh, other)) for name in BASES])
    for before, after in itertools.pairwise(bases):
        for p, q in zip(before[:2], after[:2], strict=True):
            assert float((p * q).sum(0).min()) > 0.99
        for p, q in zip(before[2:], after[2:], strict=True):
            assert float((p @ p.mT - q @ q.mT).norm()) > 1e-6


def test_rank_may_change(device):
    """Guards against moments of the old shape beside bases of the new."""
    w, opt = make(device, (24, 16), update_proj_gap=2)
    train(opt, [w], range(2))
    opt.param_groups[0]["rank"] = 8
    train(opt, [w], range(2, 4))
    assert opt.state[w]["rank"] == 8
    assert opt.state[w]["exp_avg"].shape == (8, 8)
    opt.load_state_dict(opt.state_dict())
    train(opt, [w], range(4, 6))
    assert w.isfinite().all()


def test_bad_gradients_leave_all_as_it_was(device):
    """Guards against a NaN that reaches bases or moments, and a zero gradient that counts as a step."""
    w, opt = make(device, (24, 16))
    before = w.detach().clone()
    w.grad = torch.zeros_like(w)
    opt.step()
    torch.testing.assert_close(w.detach(), before * (1 - LR * DECAY))
    assert float(opt.state[w]["step"]) == settled(opt)[w]["refreshes"] == 0
    train(opt, [w], range(3))
    kept = {key: value.clone() for key, value in opt.state[w].items() if isinstance(value, torch.Tensor)}
    before = w.detach().clone()
    w.grad = torch.full_like(w, math.nan)
    opt.step()
    assert torch.equal(w, before)
    assert all(torch.equal(opt.state[w][key], value) for key, value in kept.items())


def test_tolerance_is_refused(device):
    """Guards against a rank for each side in moments that have one."""
    with pytest.raises(ValueError, match="tolerance goes with a projection of one side"):
        make(device, (24, 16), tolerance=0.1)
