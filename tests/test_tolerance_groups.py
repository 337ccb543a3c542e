"""Groups with a tolerance: ranks, and moments that follow them."""

import math

import pytest
import torch
from training import check_state

from galore_rrf import GaLoreAdamW, reference

pytestmark = pytest.mark.core


def spectrum_gradient(shape, decay, seed, device):
    """A gradient with known singular values."""
    generator = torch.Generator().manual_seed(seed)
    k = min(shape[-2:])
    u = torch.linalg.qr(torch.randn(*shape[:-1], k, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(*shape[:-2], shape[-1], k, generator=generator))[0]
    return ((u * decay ** torch.arange(k, dtype=torch.float32)) @ v.mT).to(device)


def best_rank(g, tolerance):
    """The smallest rank within the tolerance."""
    s2 = torch.linalg.svdvals(g.cpu().double()) ** 2
    tails = torch.cat([s2.flip(-1).cumsum(-1).flip(-1)[..., 1:], s2.new_zeros(*s2.shape[:-1], 1)], -1)
    return int((tails > tolerance**2 * s2.sum(-1, keepdim=True)).sum(-1).max()) + 1


def relative_residual(g, q, side):
    a = (g.mT if side == 0 else g).cpu().double()
    q = q.cpu().double()
    return float(((a - q @ (q.mT @ a)).flatten(-2).norm(dim=-1) / a.flatten(-2).norm(dim=-1)).max())


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [(150, 110), (110, 150), (3, 80, 70)], ids=str)
@pytest.mark.parametrize("tolerance", [0.3, 0.05])
def test_tolerance_is_met_with_nearly_the_smallest_rank(device, tolerance, shape, proj_type):
    """Guards against a rank too small for the tolerance, or wastefully large."""
    w = torch.nn.Parameter(torch.zeros(shape, device=device))
    cap = min(shape[-2:]) - 5
    group = {"params": [w], "rank": cap, "tolerance": tolerance, "update_proj_gap": 1, "proj_type": proj_type}
    opt = GaLoreAdamW([group])
    for step, decay in enumerate((0.88, 0.8)):
        g = spectrum_gradient(shape, decay, step, device)
        w.grad = g.clone()
        opt.step()
        state = opt.state[w]
        check_state(w, state, cap)
        best = best_rank(g, tolerance)
        assert best <= state["rank"] <= min(cap, 8 * math.ceil((1.2 * best + 1) / 8))
        assert state["rank"] % 8 == 0 or state["rank"] == cap
        assert relative_residual(g, state["basis"], state["side"]) <= tolerance * (1 + 1e-4)


def test_tolerance_stops_at_the_cap(device):
    """Guards against a state larger than the rank cap."""
    w = torch.nn.Parameter(torch.zeros(40, 30, device=device))
    opt = GaLoreAdamW([{"params": [w], "rank": 7, "tolerance": 0.01}])
    w.grad = spectrum_gradient((40, 30), 0.99, 0, device)
    opt.step()
    assert opt.state[w]["rank"] == 7
    check_state(w, opt.state[w], 7)


def test_matrices_of_a_stack_have_one_rank(device):
    """Guards against columns of zeros in a basis, beside others that need more: what is outside it would be cut off
    too."""

    def bases_after(*ranks):
        g = [spectrum_gradient((48, 64), 0.9, i, device) for i in range(2)]
        factors = [torch.linalg.svd(x, full_matrices=False) for x in g]
        w.grad = torch.stack(
            [(u[:, :r] * s[:r]) @ vh[:r] for (u, s, vh), r in zip(factors, ranks, strict=True)]
        )
        opt.step()
        return w.grad, opt.state[w]["basis"].double().cpu()

    w = torch.nn.Parameter(torch.zeros(2, 48, 64, device=device))
    opt = GaLoreAdamW([{"params": [w], "rank": 40, "tolerance": 0.3, "update_proj_gap": 1}])
    widths = []
    for ranks in ((2, 48), (48, 48), (48, 0), (2, 3), (0, 48)):  # 0: no gradient
        grad, basis = bases_after(*ranks)
        widths.append(basis.shape[-1])
        eye = torch.eye(basis.shape[-1], dtype=torch.float64).expand(2, -1, -1)
        torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-5)
        moving = [i for i, r in enumerate(ranks) if r]
        assert relative_residual(grad[moving], basis[moving], opt.state[w]["side"]) <= 0.3 * (1 + 1e-4)
    assert min(widths) < max(widths)  # so that idle matrices have been cut and completed


@pytest.mark.parametrize(
    "changed", [{}, {"tolerance": None, "rank": 20, "moments": "keep"}], ids=["by_tolerance", "by_the_group"]
)
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)], ids=str)
def test_moments_are_rotated_into_another_rank(device, shape, changed):
    """Guards against moments lost or misread where the rank changes, kept ones too."""
    w = torch.nn.Parameter(torch.zeros(shape, device=device))
    opt = GaLoreAdamW([{"params": [w], "rank": 30, "tolerance": 0.1, "update_proj_gap": 2}])
    for step in range(2):
        w.grad = spectrum_gradient(shape, 0.85, step, device)
        opt.step()
    old = {k: v.double() for k, v in opt.state[w].items() if isinstance(v, torch.Tensor)}
    opt.param_groups[0].update(changed)
    w.grad = spectrum_gradient(shape, 0.7, 3, device)
    opt.step()
    state = opt.state[w]
    assert state["rank"] != old["basis"].shape[1]
    q, g = state["basis"].double(), w.grad.double()
    mean, square = reference.rotate_moments(
        *(old[key] for key in ("exp_avg", "exp_avg_sq", "basis")), q, state["side"], 1 - 0.9**2, 1 - 0.999**2
    )
    r = g @ q if state["side"] == 0 else q.mT @ g
    torch.testing.assert_close(state["exp_avg"].double(), 0.9 * mean + 0.1 * r, rtol=1e-4, atol=1e-6)
    expected = 0.999 * square + 0.001 * r.square()
    torch.testing.assert_close(state["exp_avg_sq"].double(), expected, rtol=1e-4, atol=1e-8)


def test_ranks_by_tolerance_are_multiples_of_eight(device):
    """Guards against ranks that products do not like, and a least rank that is not kept."""
    for keys, allowed in (({}, {8, 16, 24, 32, 40}), ({"min_rank": 20}, {20, 24, 32, 40})):
        w = torch.nn.Parameter(torch.zeros(60, 90, device=device))
        opt = GaLoreAdamW([{"params": [w], "rank": 40, "tolerance": 0.3, "update_proj_gap": 1, **keys}])
        ranks = []
        for rank in (3, 9, 17, 30, 60, 1):
            g = torch.randn(60, rank, generator=torch.Generator().manual_seed(rank))
            w.grad = (g @ torch.randn(rank, 90, generator=torch.Generator().manual_seed(1))).to(device)
            opt.step()
            ranks.append(opt.state[w]["rank"])
        assert set(ranks) <= allowed
        assert ranks[0] == ranks[-1] == min(allowed)
        assert max(ranks) == 32
