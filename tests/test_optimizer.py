"""GaLoreAdamW while it trains: plain groups, the refresh schedule, tolerance, state, memory, learning."""

import copy
import itertools
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from torch.optim import AdamW
from training import (
    KINDS,
    STEPPING_OUTSIDE,
    assert_same_on_a_cpu,
    bias,
    check_state,
    gradient,
    gradient_like,
    optimizer,
    same,
    saved_and_loaded,
    settled,
    train,
    weight,
)

from galore_rrf import GaLoreAdamW, ops, reference
from galore_rrf.subspace import SCHEMA_VERSION, as_matrices, bases_of

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


# --- Plain groups -------------------------------------------------------------------------------------


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


# --- The schedule of refreshes ------------------------------------------------------------------------


@pytest.mark.parametrize("projector", ["range_finder", "svd"])
@pytest.mark.parametrize("gap", [1, 3, 10])
@pytest.mark.parametrize("steps", [1, 9, 10, 11, 21])
def test_number_of_refreshes(gap, steps, projector, device):
    """Guards against a schedule off by one: refreshes come before steps 0, gap, 2 gap, ..."""
    w = weight("default", device)
    opt = GaLoreAdamW([{"params": [w], "rank": 5, "update_proj_gap": gap, "projector": projector}])
    train(opt, [w], range(steps))
    state = settled(opt)[w]
    assert state["refreshes"] == 1 + (steps - 1) // gap
    assert state["last_refresh"] == (steps - 1) // gap * gap
    assert state["step"].item() == steps


@pytest.mark.parametrize("kind", KINDS)
def test_subspace_changes_at_a_refresh_alone(device, kind):
    """Guards against a basis that drifts between refreshes, or does not change at one."""
    w, b = weight(kind, device), bias(device)
    opt = optimizer(kind, w, b)
    gap = opt.param_groups[0]["update_proj_gap"]
    train(opt, [w, b], range(gap))
    before = {name: basis.clone() for name, basis in bases_of(opt.state[w]).items()}
    if gap > 1:
        copy = weight(kind, device)
        again = optimizer(kind, copy, bias(device))
        train(again, [copy], range(1))
        assert same(bases_of(again.state[copy]), before)
    train(opt, [w, b], [gap])
    assert not any(same(basis, before[name]) for name, basis in bases_of(opt.state[w]).items())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in STEPPING_OUTSIDE])
def test_update_lies_in_the_subspace(device, kind):
    """Guards against a back-projection with the wrong basis or on the wrong side."""
    w, b = weight(kind, device), bias(device)
    opt = optimizer(kind, w, b, weight_decay=0.0)
    before = w.detach().clone()
    train(opt, [w, b], [0])
    change = w.detach().double() - before.double()
    matrix = as_matrices(change)
    fibers = {"basis": matrix if opt.state[w]["side"] else matrix.mT, "basis_right": matrix.mT}
    fibers |= {f"basis_{i}": change.movedim(i, 0).flatten(1) for i in range(w.dim())}
    for name, basis in bases_of(opt.state[w]).items():
        q = basis.double()
        left = (fibers[name] - q @ (q.mT @ fibers[name])).norm() / change.norm()
        assert left < (0.1 if w.dtype == torch.bfloat16 else 1e-4)


def test_published_preset_has_the_published_values():
    """Guards against a preset that drifts from the paper's schedule."""
    w = weight("default")
    group = GaLoreAdamW([{"params": [w], "rank": 4, "preset": "published"}]).param_groups[0]
    assert {k: group[k] for k in ("update_proj_gap", "moments", "scale", "sketch", "oversampling")} == {
        "update_proj_gap": 200,
        "moments": "keep",
        "scale": 0.25,
        "sketch": "half_power",
        "oversampling": 8,
    }
    assert (group["rank"], group["projector"], group["proj_type"]) == (4, "range_finder", "std")


def test_best_preset_has_the_measured_values():
    """Guards against a preset that drifts from what docs/evidence.md measured."""
    group = GaLoreAdamW([{"params": [weight("default")], "rank": 4, "preset": "best"}]).param_groups[0]
    names = ("residual", "residual_scale", "state_dtype", "update_proj_gap", "moments", "sketch")
    assert [group[name] for name in names] == ["orthogonalized", 2.0, torch.uint8, 10, "rotate", "warm"]


@pytest.mark.parametrize(
    ("constructor", "group", "key", "value"),
    [
        ({}, {"preset": "published", "scale": 2.0}, "scale", 2.0),
        ({}, {"preset": "published", "scale": 2.0}, "update_proj_gap", 200),
        ({"preset": "published", "update_proj_gap": 60}, {}, "update_proj_gap", 60),
        ({"preset": "published"}, {"scale": 0.5}, "scale", 0.5),
        ({"preset": "published"}, {"scale": 0.5}, "moments", "keep"),
        ({"preset": "published"}, {"preset": "default"}, "moments", "rotate"),
        ({"scale": 0.7}, {"preset": "published"}, "scale", 0.25),
        ({"scale": 0.7}, {}, "scale", 0.7),
        ({"rank": 7}, {"preset": "published"}, "rank", 7),
        ({"rank": 7}, {"rank": None}, "rank", None),
        ({"rank": 7}, {"rank": 3}, "rank", 3),
        ({"preset": "default"}, {"rank": 3}, "state_dtype", torch.uint8),
        ({"preset": "best", "rank": 3}, {}, "state_dtype", torch.uint8),
        ({"preset": "best", "rank": 3}, {"rank": None}, "state_dtype", None),
        ({"preset": "best", "rank": 3, "state_dtype": None}, {}, "state_dtype", None),
        ({"preset": "best", "state_dtype": torch.bfloat16}, {}, "state_dtype", torch.bfloat16),
        ({"state_dtype": torch.bfloat16}, {"preset": "default", "rank": 3}, "state_dtype", torch.uint8),
        ({}, {"preset": "best", "residual": "feedback"}, "residual_scale", 1.0),
        ({"preset": "best"}, {"residual": "sign"}, "residual_scale", 1.0),
        ({"preset": "best"}, {"residual": "orthogonalized"}, "residual_scale", 2.0),
        ({"preset": "best", "residual": "sign", "residual_scale": 2.0}, {}, "residual_scale", 2.0),
    ],
)
def test_precedence_of_keys(constructor, group, key, value):
    """Guards against a preset that beats an explicit key, a default that beats a group's preset, and a preset that
    changes how plain parameters are stepped; in a copy of the optimizer too."""
    opt = GaLoreAdamW([weight("default")], **constructor)
    for one in (opt, copy.deepcopy(opt)):
        one.add_param_group({"params": [weight("default")], **group})
        assert one.param_groups[1][key] == value


@pytest.mark.parametrize(
    ("keys", "often"),
    [
        ({"update_proj_gap": 1}, "every 1 steps"),
        ({"update_proj_gap": 49}, "every 49 steps"),
        ({"update_proj_gap": 200, "schedule": "adaptive"}, "schedule='adaptive'"),
    ],
)
def test_kept_moments_with_frequent_refreshes_warn(keys, often):
    """Guards against the combination that ruins training going unsaid."""
    group = {"params": [weight("default")], "rank": 4, "moments": "keep", **keys}
    with pytest.warns(UserWarning, match=f"moments='keep'.*{often}.*rotate"):
        GaLoreAdamW([group])


@pytest.mark.parametrize(
    "keys",
    [
        *(
            {"moments": "keep", "update_proj_gap": 50},
            {"update_proj_gap": 1},
            {"rank": None, "moments": "keep"},
        ),
        {"tolerance": 0.1, "min_rank": 4},  # as the cap
    ],
    ids=str,
)
def test_harmless_combinations_do_not_warn(keys):
    """Guards against warnings and errors nobody needs: warnings are errors here."""
    GaLoreAdamW([{"params": [weight("default")], "rank": 4, **keys}])


def test_rotated_moments_follow_the_rule(device):
    """Guards against moments read in the wrong basis after a refresh: m goes to m S^T, S = Q_new^T Q_old."""
    w = weight("default", device)
    opt = GaLoreAdamW([{"params": [w], "rank": 6, "update_proj_gap": 3}])
    train(opt, [w], range(3))
    old = {k: v.double() for k, v in opt.state[w].items() if isinstance(v, torch.Tensor)}
    train(opt, [w], [3])
    q = opt.state[w]["basis"].double()
    s = q.mT @ old["basis"]
    r = gradient_like(w, 3).double() @ q
    m = old["exp_avg"] @ s.mT
    torch.testing.assert_close(opt.state[w]["exp_avg"].double(), 0.9 * m + 0.1 * r, rtol=1e-4, atol=1e-5)
    c1, c2 = 1 - 0.9**3, 1 - 0.999**3
    m1, v1 = old["exp_avg"] / c1, old["exp_avg_sq"] / c2
    v = c2 * ((v1 - m1**2) @ (s**2).mT + (m1 @ s.mT) ** 2).abs()
    expected = 0.999 * v + 0.001 * r**2
    torch.testing.assert_close(opt.state[w]["exp_avg_sq"].double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("moments", ["rotate", "keep"])
def test_kept_moments_stay_as_they_are(device, moments):
    """Guards against `keep` rotating, or `rotate` keeping: without a gradient's share they tell apart."""
    w = weight("default", device)
    group = {"params": [w], "rank": 6, "update_proj_gap": 50, "moments": moments, "sketch": "half_power"}
    opt = GaLoreAdamW([group], betas=(0.9, 0.999))
    train(opt, [w], range(50))
    old = opt.state[w]["exp_avg"].clone()
    train(opt, [w], [50])
    r = gradient_like(w, 50) @ opt.state[w]["basis"]
    kept = torch.allclose(opt.state[w]["exp_avg"], 0.9 * old + 0.1 * r, rtol=1e-4, atol=1e-5)
    assert kept == (moments == "keep")


@pytest.mark.parametrize("kind", KINDS)
def test_maximize_mirrors_minimize(device, kind):
    """Guards against a refresh or a moment with the sign of the other direction."""
    weights = []
    for maximize in (False, True):
        w, b = weight(kind, device), bias(device)
        opt = optimizer(kind, w, b, maximize=maximize)
        for step in range(7):
            sign = -1 if maximize else 1
            w.grad = sign * gradient_like(w, step)
            opt.step()
        weights.append(w.detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_fixed_subspace_is_adamw_on_the_projected_gradient(device):
    """Guards against arithmetic that is not torch.optim.AdamW's: in fp64, against it, in the subspace."""
    shape, rank = (20, 14), 5
    w = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64, device=device))
    opt = GaLoreAdamW([{"params": [w], "rank": rank, "update_proj_gap": 1000}], lr=0.1, weight_decay=0.2)
    small = torch.nn.Parameter(torch.zeros(shape[0], rank, dtype=torch.float64, device=device))
    theirs = AdamW([small], lr=0.1, weight_decay=0.2)
    for step in range(12):
        g = gradient(shape, step, torch.float64, device)
        w.grad = g
        opt.step()
        small.grad = g @ opt.state[w]["basis"]
        theirs.step()
    expected = small.detach() @ opt.state[w]["basis"].mT
    torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-13)


# --- Tolerance ----------------------------------------------------------------------------------------


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


# --- State --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True], ids=["gradient", "zero_gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_has_its_keys_from_the_first_step(device, kind, zero):
    """Guards against a state whose keys or types depend on what happened (checkpoints rely on them)."""
    w, b = weight(kind, device), bias(device)
    opt = optimizer(kind, w, b)
    for step in range(5):
        w.grad = torch.zeros_like(w) if zero else gradient_like(w, step)
        opt.step()
        check_state(w, opt.state[w], 6)
        assert (settled(opt)[w]["refreshes"] == 0) == zero
    assert opt.param_groups[0]["schema_version"] == SCHEMA_VERSION
    if zero:
        assert opt.state[w]["step"].item() == 0
        assert not any(basis.any() for basis in bases_of(opt.state[w]).values())


def test_state_key_is_the_position_among_all_matrices(device):
    """Guards against two matrices that share a test matrix, stacks included."""
    a, b, c = (torch.nn.Parameter(torch.zeros(s, device=device)) for s in [(3, 12, 10), (12, 10), (10, 12)])
    opt = GaLoreAdamW(
        [
            {"params": [a, torch.nn.Parameter(torch.zeros(3, device=device))], "rank": 4},
            {"params": [b, c], "rank": 4},
        ]
    )
    train(opt, [c], [0])
    train(opt, [a, b, c], [1])
    assert [opt.state[p]["key"] for p in (a, b, c)] == [0, 4, 5]


def test_matrices_of_a_stack_are_trained_as_if_alone(device):
    """Guards against a stack whose matrices hear each other."""
    stack = weight("stack", device)
    opt = GaLoreAdamW([{"params": [stack], "rank": 6, "update_proj_gap": 3}], lr=0.05)
    singles = [torch.nn.Parameter(x.clone()) for x in stack.detach()]
    alone = GaLoreAdamW([{"params": singles, "rank": 6, "update_proj_gap": 3}], lr=0.05)
    for step in range(7):
        stack.grad = gradient_like(stack, step)
        for p, g in zip(singles, stack.grad, strict=True):
            p.grad = g.clone()
        opt.step()
        alone.step()
    assert_same_on_a_cpu(stack.detach(), torch.stack([p.detach() for p in singles]))


@pytest.mark.parametrize("seed", [0, 5])
def test_seed_decides_and_the_global_generator_is_left_alone(device, seed):
    """Guards against results that depend on torch.manual_seed, or that disturb it."""
    results = []
    for global_seed, own in ((1, seed), (2, seed), (1, seed + 1)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        w = weight("default", device)
        opt = GaLoreAdamW([{"params": [w], "rank": 6, "seed": own, "update_proj_gap": 2}])
        train(opt, [w], range(4))
        assert torch.equal(torch.get_rng_state(), before)
        results.append(opt.state[w]["basis"])
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize(
    "keys", [{}, {"basis_from": "average"}, {"proj_type": "full"}, {"tolerance": 0.3}], ids=str
)
def test_what_chooses_the_test_matrices(device, keys):
    """Guards against sketches of one gradient that are the same for two seeds, matrices or refreshes."""
    g = torch.randn(30, 40, generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for seed in (0, 1):
        params = [torch.nn.Parameter(torch.zeros_like(g)) for _ in range(2)]
        opt = GaLoreAdamW(params, rank=12, update_proj_gap=1, sketch="plain", seed=seed, **keys)
        for _ in range(2):
            for p in params:
                p.grad = g
            opt.step()
            found += [opt.state[p]["basis"].clone() for p in params]
    for a, b in itertools.combinations(found, 2):
        assert a.shape != b.shape or float((a - b).abs().max()) > 1e-3


@pytest.mark.parametrize("keys", [{}, {"projector": "svd"}, {"tolerance": 0.3}], ids=str)
def test_refresh_seconds_grow_with_refreshes_alone(device, keys):
    """Guards against a clock that misses a kind of refresh, runs without one, or ends up in the state."""
    w = weight("default", device)
    opt = GaLoreAdamW([{"params": [w], "rank": 6, "update_proj_gap": 3, **keys}])
    assert opt.refresh_seconds == 0
    seconds = []
    for step in range(7):
        start = time.perf_counter()
        train(opt, [w], [step])
        took = time.perf_counter() - start
        seconds.append(opt.refresh_seconds)
        assert sum(seconds[-1:]) - sum(seconds[-2:-1]) < took
    assert seconds[0] > 0
    assert seconds[0] == seconds[2] < seconds[3] == seconds[5] < seconds[6]
    assert copy.deepcopy(opt).refresh_seconds == 0
    assert not any("seconds" in key for key in opt.state[w])


def test_noncontiguous_weights_and_gradients(device):
    """Guards against strides read as if contiguous."""
    w = weight("default", device)
    t = torch.nn.Parameter(w.detach().t().contiguous().t())
    assert not t.is_contiguous()
    results = []
    for p in (w, t):
        opt = GaLoreAdamW([{"params": [p], "rank": 6, "update_proj_gap": 2}], lr=0.05)
        for step in range(5):
            g = gradient_like(p, step)
            p.grad = g if p is w else g.t().contiguous().t()
            opt.step()
        results.append(p.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# --- Memory -------------------------------------------------------------------------------------------

OUT_OF_MEMORY = """
import resource, sys, torch
from galore_rrf import GaLoreAdamW
torch.set_num_threads(1)
sketch, headroom = sys.argv[1], int(sys.argv[2])
w = torch.nn.Parameter(torch.zeros(400_000, 64))
w.grad = torch.randn(400_000, 64, generator=torch.Generator().manual_seed(0))
opt = GaLoreAdamW([{"params": [w], "rank": 32, "update_proj_gap": 2, "sketch": sketch}])
opt.step()
opt.step()
state = opt.state[w]
basis, before = state["basis"].clone(), w.detach()[0].clone()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + headroom * 2**20, limit[1]))
opt.step()
resource.setrlimit(resource.RLIMIT_AS, limit)
print(state["step"].item(), state["refreshes"], state["last_refresh"], torch.equal(basis, state["basis"]),
      torch.equal(before, w[0]))
opt.step()
print(state["step"].item(), state["refreshes"], state["last_refresh"], torch.equal(basis, state["basis"]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
@pytest.mark.parametrize("sketch", ["warm", "half_power"])
def test_refresh_without_memory_keeps_the_old_subspace(sketch):
    """Guards against a step lost, or a state half written, where a refresh runs out of memory.

    The ordinary step needs the projected gradient, 49 MiB; the refresh as much again.
    """
    command = [sys.executable, "-c", OUT_OF_MEMORY, sketch, "75"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["3.0 1 0 True False", "4.0 2 3 False"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_tolerance_refresh_without_memory_keeps_the_old_subspace(device, error, monkeypatch):
    """Guards against the same outside the step operator, where ranks change (the failure is feigned)."""
    w, b = weight("tolerance", device), bias(device)
    opt = optimizer("tolerance", w, b)
    train(opt, [w, b], range(3))
    state = opt.state[w]
    basis = state["basis"].clone()

    def fail(*_, **__):
        raise error("no memory")

    for name in ("adaptive_range_finders", "rotate_moments"):
        with monkeypatch.context() as patched:
            patched.setattr(ops, name, fail)
            train(opt, [w, b], [3])
        assert same(state["basis"], basis)
        check_state(w, state, 6)
    settled(opt)
    assert (state["step"].item(), state["refreshes"], state["last_refresh"]) == (5, 1, 0)
    train(opt, [w, b], [4])
    settled(opt)
    assert (state["step"].item(), state["refreshes"], state["last_refresh"]) == (6, 2, 5)


@pytest.mark.parametrize("kind", ["at_end_svd", "at_end_tolerance", "at_end"])
def test_a_basis_found_at_the_end_serves_from_the_next_step_on(device, kind):
    """Guards against a step in the new basis, a refresh that is not counted, or one too late or too early."""
    w, b = weight(kind, device), bias(device)
    opt = optimizer(kind, w, b, weight_decay=0.0)
    for number in range(10):
        state = opt.state[w]
        basis = state["basis"].clone() if state else None
        before = w.detach().clone()
        train(opt, [w, b], [number])
        state = settled(opt)[w]
        assert (state["refreshes"], state["last_refresh"]) == (number // 3 + 1, number // 3 * 3)
        assert float(state["step"]) == number + 1
        if number > 0:
            moved = (w.detach() - before).double()
            q = basis.double()
            inside = moved @ q @ q.mT if state["side"] == 0 else q @ (q.mT @ moved)
            torch.testing.assert_close(inside, moved, rtol=0, atol=1e-6)
            assert (basis.shape != state["basis"].shape or not same(basis, state["basis"])) == (
                number % 3 == 0
            )


@pytest.mark.parametrize("kind", ["reset", "reset_tolerance", "full_reset"])
def test_reset_counts_again(device, kind):
    """Guards against a schedule that goes by steps from before a reset, or moments left over from there."""
    w, b = weight(kind, device), bias(device)
    opt = optimizer(kind, w, b)
    for number in range(10):
        train(opt, [w, b], [number])
        state = settled(opt)[w]
        assert (float(state["step"]), state["refreshes"], state["last_refresh"]) == (
            number % 3 + 1,
            number // 3 + 1,
            0,
        )
    g, q = w.grad, state["basis"]
    r = q.mT @ g @ state["basis_right"] if kind == "full_reset" else g @ q if state["side"] == 0 else q.mT @ g
    torch.testing.assert_close(state["exp_avg"], 0.1 * r, rtol=1e-4, atol=1e-6)


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


# --- Learning -----------------------------------------------------------------------------------------


def final_loss(make, device, steps=200):
    """Of a small MLP that learns another one."""
    generator = torch.Generator().manual_seed(0)

    def mlp():
        sizes = [(48, 96), (96, 32)]
        return [torch.randn(m, n, generator=generator).to(device) / m**0.5 for m, n in sizes]

    def forward(x, weights):
        return torch.tanh(x @ weights[0]) @ weights[1]

    teacher, student = mlp(), [torch.nn.Parameter(w) for w in mlp()]
    opt = make(student)
    x = torch.randn(256, 48, generator=generator).to(device)
    y = forward(x, teacher)
    for _ in range(steps):
        opt.zero_grad()
        loss = ((forward(x, student) - y) ** 2).mean()
        loss.backward()
        opt.step()
    return loss.item()


def test_default_learns_and_kept_moments_with_fresh_sketches_do_not(device):
    """Guards against subspaces or moments that are handled plausibly and do not train."""

    def galore(**keys):
        return lambda params: GaLoreAdamW([{"params": params, "rank": 8, **keys}], lr=1e-2, weight_decay=0.0)

    full = final_loss(lambda params: AdamW(params, lr=1e-2, weight_decay=0.0), device)
    default = final_loss(galore(), device)
    with pytest.warns(UserWarning, match="keep"):
        kept = final_loss(galore(sketch="plain", update_proj_gap=1, moments="keep"), device)
    assert default < 10 * full
    assert kept > 2 * default
