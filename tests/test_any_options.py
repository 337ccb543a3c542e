"""The optimizer with whatever hypothesis thinks of: options, and groups of every mix."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import bias, check_state, params_of, same, set_gradients, settled, snapshot, train

from galore_rrf import GaLoreAdamW
from galore_rrf.options import SubspaceOptions


def every_second(progress):
    return progress.step % 2 == 0


def never(progress):
    return False


# --- One group ------------------------------------------------------------------------------------------------

OPTIONS = st.fixed_dictionaries(
    {"rank": st.integers(1, 12)},
    optional={
        "update_proj_gap": st.integers(1, 4) | st.sampled_from([every_second, never]),
        "schedule": st.sampled_from(["fixed", "staggered", "adaptive"]),
        "basis_from": st.sampled_from(["gradient", "average", "momentum"]),
        "scale": st.floats(0, 2),
        "proj_type": st.sampled_from(["std", "reverse_std", "left", "right"]),
        "projector": st.sampled_from(["range_finder", "svd"]),
        "sketch": st.sampled_from(["warm", "plain", "half_power", "power"]),
        "power": st.integers(0, 2),
        "oversampling": st.integers(0, 20),
        "moments": st.sampled_from(["rotate", "keep", "reset"]),
        "refresh_at": st.sampled_from(["start", "end"]),
        "nonfinite": st.sampled_from(["skip", "raise"]),
        "residual": st.sampled_from(["drop", "scaled", "sign", "normalized", "orthogonalized", "feedback"]),
        "residual_scale": st.floats(0, 2),
        "seed": st.integers(0, 2**63 - 1),
        "arithmetic": st.sampled_from(["torch", "galore_torch"]),
        "preset": st.sampled_from([None, "default", "published", "best"]),
    },
)


def agreeing(keys):
    """Without what excludes each other, and is refused with a sentence (test_bad_input)."""
    if keys.get("moments") == "reset" or keys.get("residual") == "feedback":
        keys = {**keys, "refresh_at": "start"}
    if keys.get("residual") == "feedback":
        keys = {**keys, "residual_scale": min(keys.get("residual_scale", 1.0), 1.0)}
    if callable(keys.get("update_proj_gap")):
        keys = {**keys, "schedule": "fixed"}
    return keys


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    keys=OPTIONS,
    tolerance=st.none() | st.floats(0.01, 0.9),
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_any_valid_options_train(device, keys, tolerance, shape, dtype):
    """Guards against a combination of options that crashes or leaves a state out of shape."""
    if tolerance is not None:
        keys = {**keys, "tolerance": tolerance, "projector": "range_finder"}
        keys["moments"] = "reset" if keys.get("moments") == "reset" else "rotate"
    keys = agreeing(keys)
    p = torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # kept moments with frequent refreshes
        opt = GaLoreAdamW([{"params": [p], **keys}], eps=1e-4)  # within fp16
    p.grad = torch.zeros_like(p)
    opt.step()
    train(opt, [p], range(4))
    assert p.isfinite().all()
    if "basis" in opt.state[p]:
        check_state(p, opt.state[p], keys["rank"])
        assert settled(opt)[p]["refreshes"] > 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    keys=OPTIONS,
    proj_type=st.sampled_from(["full", "tucker"]),
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_any_tensor_is_projected_on_several_modes(device, keys, proj_type, shape, dtype):
    """Guards against a mode with fewer fibers than the rank, and a state that does not load."""
    keys = agreeing({**keys, "proj_type": proj_type, "residual": "drop", "basis_from": "gradient"})
    p = torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        opt = GaLoreAdamW([{"params": [p], **keys}], eps=1e-4)
    train(opt, [p], range(4))
    assert p.isfinite().all()
    if "side" in opt.state[p]:
        check_state(p, opt.state[p], keys["rank"])
    opt.load_state_dict(opt.state_dict())
    train(opt, [p], range(4, 6))
    assert p.isfinite().all()


# --- Any mix of groups ----------------------------------------------------------------------------------------

VALUES = {
    "update_proj_gap": st.integers(1, 3),
    "schedule": st.sampled_from(["fixed", "staggered", "adaptive"]),
    "basis_from": st.sampled_from(["gradient", "average", "momentum"]),
    "scale": st.floats(0, 2),
    "proj_type": st.sampled_from(["std", "reverse_std", "left", "right"]),
    "projector": st.sampled_from(["range_finder", "svd"]),
    "sketch": st.sampled_from(["warm", "plain", "half_power", "power"]),
    "power": st.integers(0, 2),
    "oversampling": st.integers(0, 9),
    "moments": st.sampled_from(["rotate", "keep"]),
    "nonfinite": st.sampled_from(["skip", "raise"]),
    "seed": st.integers(0, 2**63 - 1),
    "arithmetic": st.sampled_from(["torch", "galore_torch", "bitsandbytes"]),
    "residual": st.sampled_from(["drop", "scaled", "sign", "normalized", "orthogonalized", "feedback"]),
    "residual_scale": st.floats(0, 1),
    "preset": st.sampled_from([None, "default", "published", "best"]),
    "lr": st.floats(0, 0.1) | st.just(torch.tensor(0.05)),
    "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    "weight_decay": st.floats(0, 0.5),
    "maximize": st.booleans(),
    "foreach": st.sampled_from([None, False]),
}
SHAPE = st.lists(st.integers(1, 9), max_size=4).map(tuple) | st.sampled_from(
    [(0, 4), (9, 9), (2, 7, 8), (8, 3, 2, 2)]
)
TENSOR = st.tuples(SHAPE, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
BY_TOLERANCE = st.fixed_dictionaries(
    {"rank": st.integers(1, 7), "tolerance": st.floats(0.01, 0.9), "update_proj_gap": st.integers(1, 3)}
)
GROUP = st.fixed_dictionaries(
    {"params": st.lists(TENSOR, max_size=4)}, optional={"rank": st.none() | st.integers(1, 7), **VALUES}
) | BY_TOLERANCE.flatmap(
    lambda keys: st.fixed_dictionaries({"params": st.lists(TENSOR, max_size=4)}).map(keys.__or__)
)
CONSTRUCTOR = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.none() | st.integers(1, 7),
        "update_proj_gap": st.integers(1, 3),
        "eps": st.just(1e-3),
    },
)
INVALID = {
    "rank": [0, -1, 2.0, True, "4"],
    "update_proj_gap": [0, 1.5, None],
    "schedule": ["often", None],
    "basis_from": ["weights", 1],
    "scale": [math.nan, math.inf, "1"],
    "proj_type": ["both", None],
    "projector": ["qr"],
    "sketch": ["cold", 0],
    "power": [-1, 0.5],
    "oversampling": [-1, None],
    "moments": ["forget"],
    "tolerance": [0.0, 1.0, -1, "0.1"],
    "nonfinite": ["ignore"],
    "seed": [-1, 2**63, 0.0],
    "arithmetic": ["jax"],
    "preset": ["fast", 1],
    "residual": ["other", None, 1],
    "residual_scale": [math.nan, -math.inf, "1", None],
    "refresh_at": ["once", 0],
    "state_dtype": [torch.float16, "fp32", 8],
    "stochastic_rounding": [1, None],
}


def make_tensors(specs, device):
    generator = torch.Generator().manual_seed(4)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s, dtype in specs]


def with_tensors(device, group, names, number):
    params = make_tensors(
        group["params"] or [((3,), torch.float32)] * names, device
    )  # no names without parameters
    return {**group, "params": [(f"p{number}.{i}", p) for i, p in enumerate(params)] if names else params}


def shorter_side(p):
    """Of the matrices that the optimizer sees; 0: of none."""
    if p.dim() < 2 or p.numel() == 0:
        return 0
    return min(p.shape[-2:]) if p.dim() == 3 else min(p.shape[0], p.numel() // p.shape[0])


def is_projected(p, group):
    """Other packages' arithmetics project onto all of a shorter side that does not exceed the rank."""
    least = (group["rank"] or math.inf) + 1 if group["arithmetic"] == "torch" else 1
    return group["rank"] is not None and shorter_side(p) >= least


def check_groups(opt, untouched):
    """What holds after any number of steps."""
    for group in opt.param_groups:
        SubspaceOptions.of(group)
        for p in group["params"]:
            if p in untouched:
                assert p not in opt.state
                assert same(p.detach(), untouched[p])
            elif is_projected(p, group):
                check_state(p, opt.state[p], group["rank"])
            else:
                assert set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
                assert all(opt.state[p][k].shape == p.shape for k in ("exp_avg", "exp_avg_sq"))
            assert p.isfinite().all()


def train_some(opt, idle, steps):
    params = params_of(opt)
    untouched = {p: p.detach().clone() for i, p in enumerate(params) if idle and i % idle == 0}
    for step in steps:
        set_gradients([p for p in params if p not in untouched], step)
        opt.step()
    return untouched


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    groups=st.lists(GROUP, min_size=1, max_size=3),
    added=GROUP,
    constructor=CONSTRUCTOR,
    names=st.booleans(),
    idle=st.sampled_from([0, 2, 3]),
)
def test_any_mix_of_groups_trains(device, groups, added, constructor, names, idle):
    """Guards against a combination that crashes, or a group, an order or a name that touches another's state."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "moments='keep'")
        opt = GaLoreAdamW([with_tensors(device, g, names, i) for i, g in enumerate(groups)], **constructor)
        untouched = train_some(opt, idle, range(3))
        check_groups(opt, untouched)
        opt.add_param_group(with_tensors(device, added, names, "new"))
    untouched = train_some(opt, 0, range(3, 5))
    check_groups(opt, {})
    copied = copy.deepcopy(opt)
    copied.load_state_dict(opt.state_dict())
    assert same(snapshot(copied), snapshot(opt))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    groups=st.lists(GROUP, min_size=1, max_size=2),
    bad=GROUP,
    wrong=st.sampled_from([(k, v) for k, values in INVALID.items() for v in values]),
    where=st.sampled_from(["constructor", "group", "add_param_group"]),
)
def test_any_mix_with_an_invalid_key_is_refused_naming_it(device, groups, bad, wrong, where):
    """Guards against an invalid group that is accepted, or that leaves its traces behind."""
    key, value = wrong
    first = [with_tensors(device, g, False, 0) for g in groups]
    valid = {"rank": 3, "projector": "range_finder", "moments": "rotate", "tolerance": None, "preset": None}
    invalid = {**with_tensors(device, bad, False, 1), **valid, key: value}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "moments='keep'")
        opt = GaLoreAdamW(first)
        train_some(opt, 2, range(2))
        before, given_keys = snapshot(opt), dict(invalid)
        refused = {
            "constructor": lambda: GaLoreAdamW([bias(device)], **{key: value}),
            "group": lambda: GaLoreAdamW([{"params": [bias(device)]}, invalid]),
            "add_param_group": lambda: opt.add_param_group(invalid),
        }
        with pytest.raises((ValueError, TypeError), match=f"Invalid {key}: "):
            refused[where]()
    assert same(snapshot(opt), before)
    assert len(invalid) == len(given_keys)
    assert all(invalid[k] is v for k, v in given_keys.items())
    train_some(opt, 0, range(2, 3))
    check_groups(opt, {})
