"""Plain groups of GaLoreAdamW: torch.optim.AdamW to the bit."""

import pytest
import torch
from torch.optim import AdamW
from training import same, saved_and_loaded, train, weight

from galore_rrf import GaLoreAdamW

pytestmark = pytest.mark.core

SHAPES = [(7, 5), (5,), (2, 3, 4), (), (6, 8)]
PLAIN = {
    "defaults": {},
    "foreach": {"foreach": True},
    "single": {"foreach": False},
    "foreach_none": {"foreach": None},
    "fused": {"fused": True},
    "not_capturable": {"capturable": False},
    "maximize": {"maximize": True},
    "amsgrad": {"amsgrad": True},
    "tensor_lr": {"lr": torch.tensor(0.02), "foreach": False},
    "tensor_lr_fused": {"lr": torch.tensor(0.02), "fused": True},
    "tensor_betas": {"betas": (torch.tensor(0.8), torch.tensor(0.9)), "foreach": False},
    "no_decay": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.3, "lr": 0.1},
    "betas_and_eps": {"betas": (0.5, 0.7), "eps": 1e-3},
}


def tensors(dtype, device, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_plain_groups_equal_torch_adamw(options, dtype, device):
    """Guards against an option that a plain group hears otherwise than torch.optim.AdamW does."""
    a, b = tensors(dtype, device), tensors(dtype, device)
    ours, theirs = GaLoreAdamW(a, **options), AdamW(b, **options)
    for step in range(5):
        train(ours, a[:-1] if step == 2 else a, [step])
        train(theirs, b[:-1] if step == 2 else b, [step])
    assert same([p.detach() for p in a], [p.detach() for p in b])
    for p, q in zip(a, b, strict=True):
        assert same(dict(ours.state[p]), dict(theirs.state[q]))


def test_plain_complex_parameters_equal_torch_adamw(device):
    """Guards against plain groups refusing complex weights, which torch.optim.AdamW takes."""
    a, b = (torch.nn.Parameter(torch.ones(3, 2, dtype=torch.complex64, device=device)) for _ in range(2))
    ours, theirs = GaLoreAdamW([a]), AdamW([b])
    for p, opt in ((a, ours), (b, theirs)):
        p.grad = torch.full_like(p, 0.3 + 0.2j)
        opt.step()
    assert same(a.detach(), b.detach())


@pytest.mark.parametrize("options", [PLAIN[k] for k in PLAIN if k != "amsgrad"])
def test_plain_group_beside_a_projected_one_equals_torch_adamw(device, options):
    """Guards against the projected group's keys reaching its neighbour."""
    a, b, w = tensors(torch.float32, device), tensors(torch.float32, device), weight("default", device)
    ours, theirs = GaLoreAdamW([{"params": [w], "rank": 4}, {"params": a}], **options), AdamW(b, **options)
    train(ours, [w, *a], range(4))
    train(theirs, b, range(4))
    assert same([p.detach() for p in a], [p.detach() for p in b])


@pytest.mark.parametrize("side", [4, 6, 1])
def test_matrices_no_larger_than_the_rank_are_plain(device, side):
    """Guards against projecting what has nothing to gain; vectors and scalars likewise."""
    shapes = [(side, 9), (9, side), (6, 6), (9,), ()]
    a, b = tensors(torch.float32, device, shapes), tensors(torch.float32, device, shapes)
    ours, theirs = GaLoreAdamW([{"params": a, "rank": 6}]), AdamW(b)
    train(ours, a, range(3))
    train(theirs, b, range(3))
    assert same([p.detach() for p in a], [p.detach() for p in b])


def test_closure_runs_with_gradients_and_its_value_is_returned(device):
    """Guards against a closure under no_grad, whose backward would fail."""
    w, v = (
        torch.nn.Parameter(torch.ones(12, 10, device=device)),
        torch.nn.Parameter(torch.ones(12, 10, device=device)),
    )
    ours = GaLoreAdamW([{"params": [w]}, {"params": [weight("default", device)], "rank": 4}])
    theirs = AdamW([v])

    def closure(p, opt):
        def evaluate():
            opt.zero_grad()
            loss = (p**2).sum()
            loss.backward()
            return loss

        return evaluate

    for _ in range(3):
        assert ours.step(closure(w, ours)).item() == theirs.step(closure(v, theirs)).item()
    assert same(w.detach(), v.detach())


def test_differentiable_plain_step_is_differentiable_as_torchs(device):
    """Guards against a step that cannot be differentiated though `differentiable` was accepted."""
    results = []
    for cls in (GaLoreAdamW, AdamW):
        leaf = torch.linspace(1, 2, 6, requires_grad=True, device=device)
        p = leaf * 2
        p.retain_grad()
        opt = cls([p], lr=0.1, differentiable=True)
        p.grad = torch.linspace(-1, 1, 6, device=device)
        opt.step()
        (p**2).sum().backward()
        results.append(leaf.grad)
    assert results[0] is not None
    assert same(*results)


@pytest.mark.parametrize("there_and_back", [False, True])
def test_plain_state_dict_moves_to_torch_adamw_and_back(device, there_and_back):
    """Guards against checkpoints of AdamW, or for it, that change the run."""
    first, second = (AdamW, GaLoreAdamW) if not there_and_back else (GaLoreAdamW, AdamW)
    a, b = tensors(torch.float32, device), tensors(torch.float32, device)
    one = first(a, lr=0.03, weight_decay=0.1)
    train(one, a, range(4))
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p.data)
    other = second(b)
    other.load_state_dict(saved_and_loaded(one.state_dict()))
    train(one, a, range(4, 8))
    train(other, b, range(4, 8))
    assert same([p.detach() for p in a], [p.detach() for p in b])
    assert all(same(dict(one.state[p]), dict(other.state[q])) for p, q in zip(a, b, strict=True))
