"""What makes no sense is an error that says so, and leaves everything as it was."""

import copy
import math

import pytest
import torch
from torch.optim import AdamW
from training import (
    KINDS,
    bias,
    check_state,
    gradient,
    gradient_like,
    optimizer,
    params_of,
    same,
    settled,
    snapshot,
    train,
    weight,
)

from galore_rrf import GaLoreAdamW
from galore_rrf.subspace import bases_of

pytestmark = pytest.mark.core

# --- Arguments ----------------------------------------------------------------------------------------

REFUSED = {
    "rank_zero": ({"rank": 0}, ValueError, r"Invalid rank: 0 \(must be a positive integer or None\)"),
    "rank_negative": ({"rank": -3}, ValueError, r"Invalid rank: -3"),
    "rank_float": ({"rank": 4.0}, TypeError, r"Invalid rank: 4\.0 \(must be a positive integer or None\)"),
    "rank_bool": ({"rank": True}, TypeError, r"Invalid rank: True"),
    "rank_str": ({"rank": "4"}, TypeError, r"Invalid rank: '4'"),
    "gap_zero": ({"update_proj_gap": 0}, ValueError, r"Invalid update_proj_gap: 0"),
    "gap_float": ({"update_proj_gap": 2.0}, TypeError, r"Invalid update_proj_gap: 2\.0"),
    "gap_bool": ({"update_proj_gap": True}, TypeError, r"Invalid update_proj_gap: True"),
    "gap_none": ({"update_proj_gap": None}, TypeError, r"Invalid update_proj_gap: None"),
    "schedule": ({"schedule": "often"}, ValueError, r"Invalid schedule: 'often' .*'staggered', 'adaptive'"),
    "schedule_callable": (
        {"schedule": "staggered", "update_proj_gap": callable},
        ValueError,
        "goes with an integer update_proj_gap, got schedule='staggered' and update_proj_gap=<",
    ),
    "basis_from": (
        {"basis_from": "weights"},
        ValueError,
        r"Invalid basis_from: 'weights' .*'average', 'momentum'",
    ),
    "basis_from_full": (
        {"basis_from": "average", "proj_type": "full"},
        ValueError,
        "basis_from='average' and proj_type='full'",
    ),
    "power": ({"power": -1}, ValueError, r"Invalid power: -1"),
    "oversampling": ({"oversampling": -1}, ValueError, r"Invalid oversampling: -1"),
    "seed_negative": ({"seed": -1}, ValueError, r"Invalid seed: -1"),
    "seed_large": ({"seed": 2**63}, ValueError, r"Invalid seed: 9223372036854775808"),
    "seed_none": ({"seed": None}, TypeError, r"Invalid seed: None"),
    "scale_nan": ({"scale": math.nan}, ValueError, r"Invalid scale: nan"),
    "scale_inf": ({"scale": math.inf}, ValueError, r"Invalid scale: inf"),
    "scale_str": ({"scale": "1"}, TypeError, r"Invalid scale: '1'"),
    "projector": ({"projector": "qr"}, ValueError, r"Invalid projector: 'qr' .*'range_finder', 'svd'"),
    "proj_type": ({"proj_type": "both"}, ValueError, r"Invalid proj_type: 'both' .*'std', 'reverse_std'"),
    "sketch": ({"sketch": "cold"}, ValueError, r"Invalid sketch: 'cold' .*'warm'"),
    "moments": ({"moments": "forget"}, ValueError, r"Invalid moments: 'forget' .*'rotate', 'keep'"),
    "arithmetic": ({"arithmetic": "jax"}, ValueError, r"Invalid arithmetic: 'jax' .*'torch'"),
    "nonfinite": ({"nonfinite": "ignore"}, ValueError, r"Invalid nonfinite: 'ignore' .*'skip', 'raise'"),
    "preset": ({"preset": "fast"}, ValueError, r"Invalid preset: 'fast' .*'default', 'published'"),
    "tolerance_zero": ({"tolerance": 0.0}, ValueError, r"Invalid tolerance: 0\.0"),
    "tolerance_one": ({"tolerance": 1.0}, ValueError, r"Invalid tolerance: 1\.0"),
    "tolerance_nan": ({"tolerance": math.nan}, ValueError, r"Invalid tolerance: nan"),
    "tolerance_str": ({"tolerance": "0.1"}, TypeError, r"Invalid tolerance: '0\.1'"),
    "tolerance_without_rank": ({"rank": None, "tolerance": 0.1}, ValueError, "tolerance needs a rank"),
    "tolerance_svd": ({"tolerance": 0.1, "projector": "svd"}, ValueError, "tolerance goes with"),
    "tolerance_keep": ({"tolerance": 0.1, "moments": "keep"}, ValueError, "tolerance goes with"),
    "min_rank_zero": (
        {"tolerance": 0.1, "min_rank": 0},
        ValueError,
        r"Invalid min_rank: 0 \(must be a positive",
    ),
    "min_rank_float": ({"tolerance": 0.1, "min_rank": 2.0}, TypeError, r"Invalid min_rank: 2\.0"),
    "min_rank_alone": (
        {"min_rank": 2},
        ValueError,
        "min_rank goes with tolerance, got min_rank=2 and tolerance=None",
    ),
    "min_rank_large": (
        {"rank": 4, "tolerance": 0.1, "min_rank": 5},
        ValueError,
        "min_rank must be at most rank, the cap, got min_rank=5 and rank=4",
    ),
    "refresh_at": ({"refresh_at": "once"}, ValueError, r"Invalid refresh_at: 'once' .*'start', 'end'"),
    "feedback_at_end": (
        {"residual": "feedback", "refresh_at": "end"},
        ValueError,
        "residual='feedback' goes with refresh_at='start', got residual='feedback' and refresh_at='end'",
    ),
    "feedback_long": (
        {"residual": "feedback", "residual_scale": 1.5},
        ValueError,
        "residual='feedback' goes with a residual_scale from 0 to 1 .*, got residual='feedback' and residual_scale=1.5",
    ),
    "preset_full": (
        {"preset": "best", "proj_type": "full"},
        ValueError,
        r"got residual='orthogonalized' and proj_type='full' \(by preset='best'\)",
    ),
    "preset_tolerance": (
        {"preset": "published", "tolerance": 0.1},
        ValueError,
        r"got tolerance=0.1, .* and moments='keep' \(by preset='published'\)",
    ),
    "reset_at_end": (
        {"moments": "reset", "refresh_at": "end"},
        ValueError,
        "moments='reset' goes with refresh_at='start', got moments='reset' and refresh_at='end'",
    ),
    "reset_rounding": (
        {"moments": "reset", "stochastic_rounding": True},
        ValueError,
        "stochastic_rounding, .* goes with moments='rotate' or 'keep', got .*=True and moments='reset'",
    ),
    "rounding_int": ({"stochastic_rounding": 1}, TypeError, r"Invalid stochastic_rounding: 1 \(must be True"),
    "scale_long": ({"scale": 10**400}, ValueError, r"Invalid scale: 1000"),
    "residual_scale_long": ({"residual_scale": -(10**400)}, ValueError, r"Invalid residual_scale: -1000"),
    "preset_list": ({"preset": ["best"]}, ValueError, r"Invalid preset: \['best'\]"),
    "moments_tensor": ({"moments": torch.zeros(2)}, ValueError, r"Invalid moments: tensor\("),
    "unhashable": ({"sketch": ["warm"]}, (ValueError, TypeError), r"Invalid sketch: \['warm'\]"),
}


@pytest.mark.parametrize(("keys", "kind", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("where", ["group", "constructor", "add_param_group"])
def test_invalid_keys_name_argument_value_and_what_is_allowed(keys, kind, message, where):
    """Guards against an option that is accepted here and fails, or does nothing, in the middle of a run."""
    keys = {"rank": 4, **keys}
    w = weight("default")
    if where == "add_param_group":
        opt = GaLoreAdamW([bias()])
        before = snapshot(opt)
        with pytest.raises(kind, match=message):
            opt.add_param_group({"params": [w], **keys})
        assert same(snapshot(opt), before)
    elif where == "group":
        with pytest.raises(kind, match=message):
            GaLoreAdamW([{"params": [w], **keys}])
    elif keys["rank"] is not None:  # there the groups may bring it
        with pytest.raises(kind, match=message):
            GaLoreAdamW([w], **keys)


@pytest.mark.parametrize(
    ("key", "meant"), [("update_proj_gaps", "update_proj_gap"), ("ranks", "rank"), ("sketsh", "sketch")]
)
def test_misspelled_keys_are_refused(key, meant):
    """Guards against a misspelled option that is silently ignored."""
    with pytest.raises(TypeError, match=f"{key}.*did you mean '{meant}'"):
        GaLoreAdamW([weight("default")], **{key: 3})
    with pytest.raises(ValueError, match=f"{key}.*did you mean '{meant}'"):
        GaLoreAdamW([{"params": [weight("default")], "rank": 4, key: 3}])


def test_unknown_keyword_is_a_type_error_and_unknown_group_keys_are_kept():
    """Guards against swallowed keywords; groups may carry keys of the user's own."""
    with pytest.raises(TypeError, match="colour"):
        GaLoreAdamW([weight("default")], colour="red")
    assert GaLoreAdamW([{"params": [weight("default")], "note": "mine"}]).param_groups[0]["note"] == "mine"


@pytest.mark.parametrize("option", ["amsgrad", "differentiable"])
@pytest.mark.parametrize("where", ["group", "constructor"])
def test_what_projected_groups_cannot_do_is_refused(option, where):
    """Guards against amsgrad or differentiable being ignored where a group is projected."""
    group = {"params": [weight("default")], "rank": 4}
    with pytest.raises(ValueError, match=f"Invalid {option}: True"):
        GaLoreAdamW([{**group, option: True}]) if where == "group" else GaLoreAdamW([group], **{option: True})
    opt = GaLoreAdamW([group])
    opt.param_groups[0][option] = True
    with pytest.raises(ValueError, match=f"Invalid {option}: True"):
        opt.step()


@pytest.mark.parametrize(
    "options",
    [
        *({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1.0}, {"weight_decay": -1.0}),
        *({"foreach": True, "fused": True}, {"lr": torch.tensor(0.1), "foreach": True}),
        {"lr": torch.ones(2)},
    ],
    ids=str,
)
def test_torchs_own_errors_are_torchs(options):
    """Guards against another exception, or none, for what torch.optim.AdamW refuses."""
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        AdamW([bias()], **options)
    with pytest.raises((ValueError, RuntimeError)) as ours:
        GaLoreAdamW([bias()], **options)
    assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))


PARAMS = {
    "empty": lambda: [],
    "empty_group": lambda: [{"params": []}],
    "empty_iterator": lambda: iter(()),
    "tensor": lambda: bias(),
    "none": lambda: None,
    "number": lambda: 3,
    "numbers": lambda: [1, 2],
    "set": lambda: {bias()},
    "group_with_set": lambda: [{"params": {bias(), weight("default")}}],
    "group_without_params": lambda: [{"lr": 0.1}],
    "non_leaf": lambda: [bias() * 2],
    "twice_in_groups": lambda: [{"params": [p]} for p in [bias()] * 2],
    "generator": lambda: (bias() for _ in range(2)),
    "mixed_names": lambda: [("a", bias()), bias()],
}


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_odd_params_do_as_with_torch_adamw(params, rank):
    """Guards against other errors than torch's for params it refuses, and refusals of what it takes.

    With a rank there may be another message, as of the rule by names; never acceptance of what torch refuses.
    """

    def outcome(make):
        try:
            return make().param_groups[0]["params"] is None
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            return type(error)

    theirs = outcome(lambda: AdamW(params()))
    ours = outcome(lambda: GaLoreAdamW(params(), rank=rank))
    if rank is None:
        assert ours == theirs
    else:
        assert isinstance(ours, type) == isinstance(theirs, type)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 8, 8), (3, 0, 8), (0, 3, 3, 3)], ids=str)
def test_empty_tensors_are_trained_as_torch_does(device, shape):
    """Guards against a division by no entries; mixture-of-experts layers can be empty on a rank."""
    p, w = torch.nn.Parameter(torch.zeros(shape, device=device)), weight("default", device)
    opt = GaLoreAdamW([{"params": [p, w], "rank": 4}])
    for step in range(3):
        p.grad, w.grad = torch.zeros(shape, device=device), gradient_like(w, step)
        opt.step()
    assert opt.state[w]["step"].item() == 3
    assert opt.state[p]["exp_avg"].shape == p.shape


# --- Parameters and gradients of other kinds ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("named", [False, True])
def test_complex_matrices_are_refused_where_projected(dtype, named):
    """Guards against projecting the real part of what torch.optim.AdamW treats as pairs."""
    p = torch.nn.Parameter(torch.zeros(8, 8, dtype=dtype))
    with pytest.raises(TypeError, match="w.*complex" if named else "parameter 0.*complex"):
        GaLoreAdamW([{"params": [("w", p) if named else p], "rank": 4}])
    GaLoreAdamW([{"params": [p], "rank": 8}])  # plain: nothing to project


@pytest.mark.parametrize("rank", [None, 4])
def test_sparse_gradients_are_refused(device, rank):
    """Guards against a sparse gradient read as a dense one; torch.optim.AdamW refuses them too."""
    w, v = weight("default", device), weight("default", device)
    opt = GaLoreAdamW([{"params": [("v", v), ("w", w)], "rank": rank}])
    train(opt, [v, w], [0])
    v.grad, w.grad = gradient_like(v, 1), gradient_like(w, 1).to_sparse()
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert same(snapshot(opt)[0], before[0])
    if rank is not None:
        assert same(snapshot(opt), before)


@pytest.mark.parametrize("mismatch", ["shape", "dtype"])
def test_gradient_unlike_its_parameter_is_refused(device, mismatch):
    """Guards against reading a gradient past its end, or as another type, after `p.data` was replaced."""
    w, b = weight("default", device), bias(device)
    opt = optimizer("default", w, b)
    train(opt, [w, b], range(2))
    train_gradient = gradient((24, 16), 2, device=device)
    w.grad, b.grad = train_gradient, torch.ones_like(b)
    w.data = torch.ones(25, 16, device=device) if mismatch == "shape" else w.data.double()
    before = snapshot(opt)
    with pytest.raises(ValueError, match="gradient of w"):
        opt.step()
    assert same(snapshot(opt), before)


# --- Gradients that are zero or not finite ------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "when"), [(k, w) for k in KINDS for w in (0, 2, 4)] + [("published", 50)])
def test_nonfinite_gradient_is_skipped_and_others_proceed(device, kind, when, value):
    """Guards against one bad entry that poisons a weight, its moments or its neighbours."""
    w, b = weight(kind, device), bias(device)
    other = weight("default", device)
    opt = optimizer(kind, w, b)
    opt.add_param_group({"params": [("other", other)], "rank": 4})
    train(opt, [w, b, other], range(when))
    known = bool(opt.state[w])
    before = w.detach().clone(), {k: copy.deepcopy(v) for k, v in opt.state[w].items()}
    beside = b.detach().clone(), other.detach().clone()
    for _ in range(2):
        for p in (w, b, other):
            p.grad = gradient_like(p, when)
        bad = w.grad if w.dim() == 3 else w.grad[None]
        bad.flatten(1)[:, 17] = value  # in every matrix of a stack
        opt.step()
        assert same(w.detach(), before[0])
        if known:
            assert same(dict(opt.state[w]), before[1])
        check_state(w, opt.state[w], 6)
        assert not same(b.detach(), beside[0])
        assert not same(other.detach(), beside[1])
    refreshes = settled(opt)[w]["refreshes"]
    train(opt, [w, b, other], [when])
    assert not same(w.detach(), before[0])
    gap = opt.param_groups[0]["update_proj_gap"]
    assert settled(opt)[w]["refreshes"] == refreshes + (when % gap == 0)
    reset = KINDS[kind][2].get("moments") == "reset"
    assert opt.state[w]["step"].item() == (when % gap if reset else when) + 1


def test_nonfinite_matrix_of_a_stack_leaves_the_others_alone(device):
    """Guards against one expert's NaN stopping the rest of the stack."""
    for kind in ("stack", "stack_tolerance"):
        w, b = weight(kind, device), bias(device)
        opt = optimizer(kind, w, b)
        train(opt, [w, b], range(2))
        for step in range(2, 5):
            before = w.detach().clone()
            old = opt.state[w]["exp_avg"].clone(), opt.state[w]["exp_avg_sq"].clone()
            w.grad = gradient_like(w, step)
            w.grad[1, 2, 3] = math.nan
            opt.step()
            assert same(w[1].detach(), before[1])
            assert same(opt.state[w]["exp_avg"][1], old[0][1])
            assert same(opt.state[w]["exp_avg_sq"][1], old[1][1])
            assert not torch.equal(w[0], before[0])
            assert not torch.equal(w[2], before[2])
            check_state(w, opt.state[w], 6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("steps", [0, 2])
def test_nonfinite_raise_writes_nothing_anywhere(device, value, steps):
    """Guards against a step that is half taken when it raises, in plain groups and earlier ones too."""
    a, w, b = weight("default", device), weight("default", device), bias(device)
    group = {"params": [("a", a), ("w", w)], "rank": 4, "nonfinite": "raise"}
    opt = GaLoreAdamW([{"params": [("b", b)]}, group])
    train(opt, [a, w, b], range(steps))
    for p in (a, w, b):
        p.grad = gradient_like(p, steps)
    w.grad[3, 3] = value
    before, grads = snapshot(opt), [p.grad.clone() for p in (a, w, b)]
    with pytest.raises(FloatingPointError, match="gradient of w is not finite"):
        opt.step()
    assert same(snapshot(opt), before)
    assert same([p.grad for p in (a, w, b)], grads)
    train(opt, [a, w, b], [steps])
    assert opt.state[w]["step"].item() == steps + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nonfinite_raise_takes_large_finite_gradients(device, dtype):
    """Guards against a norm that overflows and calls a finite gradient infinite."""
    p = torch.nn.Parameter(torch.zeros(12, 10, dtype=dtype, device=device))
    opt = GaLoreAdamW([{"params": [p], "rank": 4, "nonfinite": "raise"}])
    p.grad = torch.full_like(p, torch.finfo(dtype).max / 16)
    opt.step()
    assert p.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradients_from_the_first_step_decay_alone_and_do_not_count(device, kind):
    """Guards against a basis of nothing, NaN from 0/0, or a clock that runs while there is no basis."""
    w, v = weight(kind, device), weight(kind, device)
    opt, fresh = (
        optimizer(kind, w, bias(device), weight_decay=0.1),
        optimizer(kind, v, bias(device), weight_decay=0.1),
    )
    for steps in range(1, 4):
        w.grad = torch.zeros_like(w)
        opt.step()
        expected = weight(kind, device).detach().double() * (1 - 0.05 * 0.1) ** steps
        error = 0.02 if w.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(w.detach().double(), expected, rtol=error, atol=error)
        check_state(w, opt.state[w], 6)
        assert (opt.state[w]["step"].item(), settled(opt)[w]["refreshes"]) == (0, 0)
    with torch.no_grad():
        w.copy_(v)
    train(opt, [w], range(5))
    train(fresh, [v], range(5))
    assert same(w.detach(), v.detach())
    assert same(dict(opt.state[w]), dict(fresh.state[v]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "feedback"])  # where G + E is not zero
def test_zero_gradient_at_a_due_refresh_is_retried(device, kind):
    """Guards against a subspace of a zero gradient, or a refresh that is lost until the next one is due."""
    w, b = weight(kind, device), bias(device)
    opt = optimizer(kind, w, b, weight_decay=0.0)
    gap = opt.param_groups[0]["update_proj_gap"]
    train(opt, [w, b], range(gap))
    state = opt.state[w]
    bases = {name: basis.clone() for name, basis in bases_of(state).items()}
    before, moments = w.detach().clone(), state["exp_avg"].clone()
    for extra in range(2):
        w.grad = torch.zeros_like(w)
        opt.step()
        assert same(bases_of(state), bases)
        settled(opt)
        assert (state["refreshes"], state["last_refresh"], state["step"].item()) == (1, 0, gap + extra + 1)
    torch.testing.assert_close(state["exp_avg"], 0.81 * moments, rtol=1e-4, atol=1e-6)
    assert not same(w.detach(), before)
    train(opt, [w, b], [gap])
    assert not any(same(basis, bases[name]) for name, basis in bases_of(state).items())
    settled(opt)
    reset = KINDS[kind][2].get("moments") == "reset"
    assert (state["refreshes"], state["last_refresh"]) == (2, 0 if reset else gap + 2)


@pytest.mark.parametrize("kind", ["stack", "stack_tolerance"])
def test_idle_matrix_of_a_stack_keeps_its_subspace(device, kind):
    """Guards against an expert without tokens losing its basis, or stopping the others'."""
    w, b = weight(kind, device), bias(device)
    opt = optimizer(kind, w, b)
    for step in range(7):
        w.grad = gradient_like(w, step)
        if step >= 2:
            w.grad[1] = 0
        opt.step()
        check_state(w, opt.state[w], 6)
        if step == 2:
            basis = opt.state[w]["basis"].clone()
    rank = min(basis.shape[-1], opt.state[w]["rank"])
    assert same(opt.state[w]["basis"][1, :, :rank], basis[1, :, :rank])
    assert not same(opt.state[w]["basis"][0, :, :rank], basis[0, :, :rank])
    assert settled(opt)[w]["refreshes"] == 3


def test_no_gradient_at_all_is_no_step(device):
    """Guards against state for parameters that were never trained."""
    w, b = weight("default", device), bias(device)
    opt = optimizer("default", w, b)
    opt.step()
    assert not opt.state
    train(opt, [b], [0])
    assert params_of(opt)[0] not in opt.state
