"""GaLoreAdamW while it trains: schedule, presets, moments, state, learning."""

import copy
import itertools
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
    settled,
    train,
    weight,
)

from galore_rrf import GaLoreAdamW
from galore_rrf.subspace import SCHEMA_VERSION, as_matrices, bases_of

pytestmark = pytest.mark.core


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
