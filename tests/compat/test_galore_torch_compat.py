"""galore_rrf.compat.galore_torch against galore_torch 1.0 itself, and what ours adds."""

import inspect
import math

import pytest
import torch
from published_galore_torch import PublishedAdafactor, PublishedAdamW
from training import gradient, params_of, same, saved_and_loaded, snapshot, train

from galore_rrf.checkpoint import from_galore_torch
from galore_rrf.compat.galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from galore_rrf.subspace import STATE_KEYS

pytestmark = pytest.mark.filterwarnings("ignore:moments='keep' with a new subspace")

RANK = 5
SHAPES = {
    "wide": (16, 24),
    "tall": (24, 16),
    "square": (20, 20),
    "row": (1, 24),
    "column": (24, 1),
    "short": (4, 24),  # the rank reaches the shorter side
}
PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
# The package fails where reverse_std projects a wide matrix onto all of its shorter side.
PROJECTED = [(s, t) for s in SHAPES for t in PROJ_TYPES if t != "reverse_std" or s not in ("row", "short")]
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 0.02}  # of the distance moved

ADAMW = {
    "defaults": ({"lr": 0.02}, {"scale": 0.25, "update_proj_gap": 7}),
    "decay_and_eps": (
        {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 0.1},
        {"scale": 1.0, "update_proj_gap": 1},
    ),
    "no_bias_correction": (
        {"lr": 0.003, "weight_decay": 0.01, "eps": 0.01, "correct_bias": False},
        {"scale": 0.5, "update_proj_gap": 200},
    ),
}
ADAFACTOR = {
    "defaults": ({}, {"scale": 0.25, "update_proj_gap": 7}),
    "own_lr": (
        {"lr": 0.02, "relative_step": False, "scale_parameter": False, "weight_decay": 0.1},
        {"scale": 1.0, "update_proj_gap": 1},
    ),
    "warmup": ({"warmup_init": True, "beta1": 0.9}, {"scale": 1.0, "update_proj_gap": 200}),
    "all": (
        {
            "lr": 0.02,
            "relative_step": False,
            "eps": (1e-4, 30.0),
            "clip_threshold": 0.3,
            "decay_rate": -0.5,
            "beta1": 0.8,
        },
        {"scale": 0.5, "update_proj_gap": 7},
    ),
}


def check_trajectory(theirs, ours, shapes, options, keys, dtype, steps=20):
    """The same weights from the same gradients, in groups of parameters that `keys` belong to.

    The gradients are given, not those of a loss: the SVD turns a last bit into much more.
    """
    initial = [gradient(shape, 99, dtype) for shape in shapes]
    a, b = ([torch.nn.Parameter(x.clone()) for x in initial] for _ in range(2))
    quiet = {"no_deprecation_warning": True} if theirs is PublishedAdamW else {}
    expected = theirs([{"params": a, **keys}], **options, **quiet)
    mine = ours([{"params": b, **keys}], **options)
    for step in range(steps):
        for opt, params in ((expected, a), (mine, b)):
            train(opt, params, [step])
        for p, q, start in zip(a, b, initial, strict=True):
            error, moved = (p - q).double().norm(), (p - start).double().norm()
            rounding = (step + 1) * torch.finfo(dtype).eps * start.double().norm()
            assert error <= TOLERANCE[dtype] * moved + rounding, (step, tuple(p.shape))
    for p, start in zip(a, initial, strict=True):
        assert not torch.equal(p, start)
    return mine


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("options", "keys"), ADAMW.values(), ids=ADAMW)
@pytest.mark.parametrize(("shape", "proj_type"), PROJECTED)
def test_projected_adamw_takes_their_trajectory(shape, proj_type, options, keys, dtype):
    """Guards against another side, eps, decay order, bias correction, schedule, scale or rank than theirs."""
    keys = {"rank": RANK, "proj_type": proj_type, **keys}
    opt = check_trajectory(PublishedAdamW, GaLoreAdamW, [SHAPES[shape]], options, keys, dtype)
    (p,) = params_of(opt)
    assert opt.state[p]["rank"] == min(RANK, *SHAPES[shape])
    assert opt.state[p]["refreshes"] == math.ceil(20 / keys["update_proj_gap"])


@pytest.mark.parametrize(("ours", "options"), [(GaLoreAdamW, {"lr": 0.02}), (GaLoreAdafactor, {})])
@pytest.mark.parametrize("shape", ["row", "short"])
def test_reverse_std_of_a_wide_matrix_at_full_rank_is_right(shape, ours, options):
    """Guards against their failure there: back-projection is told by shapes alone, which are those of left."""
    ends = []
    for proj_type in ("reverse_std", "right"):
        p = torch.nn.Parameter(gradient(SHAPES[shape], 99))
        opt = ours([{"params": [p], "rank": RANK, "proj_type": proj_type}], **options)
        train(opt, [p], range(3))
        ends.append(p.detach())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], gradient(SHAPES[shape], 99))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [options for options, _ in ADAMW.values()], ids=ADAMW)
def test_plain_adamw_takes_their_trajectory(options, dtype):
    """Guards against groups without rank in torch's arithmetic: its eps, and decay first."""
    opt = check_trajectory(PublishedAdamW, GaLoreAdamW, [(7,), (16, 24), (3, 4, 5), ()], options, {}, dtype)
    assert all("basis" not in opt.state[p] for p in params_of(opt))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("options", "keys"), ADAFACTOR.values(), ids=ADAFACTOR)
@pytest.mark.parametrize(("shape", "proj_type"), PROJECTED)
def test_projected_adafactor_takes_their_trajectory(shape, proj_type, options, keys, dtype):
    """Guards against another factored moment, clipping, step length or projection than theirs."""
    keys = {"rank": RANK, "proj_type": proj_type, **keys}
    check_trajectory(PublishedAdafactor, GaLoreAdafactor, [SHAPES[shape]], options, keys, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [options for options, _ in ADAFACTOR.values()], ids=ADAFACTOR)
def test_plain_adafactor_takes_their_trajectory(options, dtype):
    """Guards against vectors and scalars that are factored, and stacks over other dimensions than theirs."""
    shapes = [(7,), (16, 24), (3, 4, 5), ()]
    check_trajectory(PublishedAdafactor, GaLoreAdafactor, shapes, options, {}, dtype)


@pytest.mark.parametrize("keys", [{}, {"rank": RANK, "proj_type": "std", **ADAFACTOR["all"][1]}], ids=str)
def test_adafactor_of_bf16_weights_computes_in_fp32_as_theirs(keys):
    """Guards against moments or steps rounded to the dtype of the weights."""
    options = {"lr": 0.1, "relative_step": False, "beta1": 0.9}
    opt = check_trajectory(
        PublishedAdafactor, GaLoreAdafactor, [(16, 24), (24, 16)], options, keys, torch.bfloat16
    )
    for p in params_of(opt):
        assert {t.dtype for t in opt.state[p].values() if isinstance(t, torch.Tensor)} == {torch.float32}


@pytest.mark.parametrize("ours", [GaLoreAdamW, GaLoreAdafactor])
def test_matrices_among_others_take_their_trajectory(ours):
    """Guards against weights that depend on their neighbours in a group, full ranks included."""
    theirs = PublishedAdamW if ours is GaLoreAdamW else PublishedAdafactor
    keys = {"rank": RANK, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    options = {} if ours is GaLoreAdafactor else {"lr": 0.02, "weight_decay": 0.1}
    check_trajectory(theirs, ours, SHAPES.values(), options, keys, torch.float32)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(GaLoreAdamW, PublishedAdamW), (GaLoreAdafactor, PublishedAdafactor)]
)
def test_signatures_are_theirs(ours, theirs):
    """Guards against an argument that has another name, place or default, and group keys without theirs."""
    assert [(p.name, p.default) for p in inspect.signature(ours).parameters.values()] == [
        (p.name, p.default) for p in inspect.signature(theirs).parameters.values()
    ]
    w = torch.nn.Parameter(torch.ones(3))
    quiet = {"no_deprecation_warning": True} if theirs is PublishedAdamW else {}
    ours_group, theirs_group = ours([w]).param_groups[0], theirs([w], **quiet).param_groups[0]
    assert {key: ours_group[key] for key in theirs_group} == theirs_group


def test_signature_of_adamw8bit_is_theirs():
    """Guards against an argument of another name, place or default; that module imports bitsandbytes."""
    assert str(inspect.signature(GaLoreAdamW8bit)).replace(" ", "") == (
        "(params:'Any',lr:'float'=0.001,betas:'tuple[float,float]'=(0.9,0.999),eps:'float'=1e-08,"
        "weight_decay:'float'=0.01,amsgrad:'bool'=False,optim_bits:'int'=32,args:'None'=None,"
        "min_8bit_size:'int'=4096,percentile_clipping:'int'=100,block_wise:'bool'=True,is_paged:'bool'=False)->'None'"
    )


# --- What ours adds ------------------------------------------------------------------------------------

KINDS = {
    "adamw": (GaLoreAdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "uncorrected": (GaLoreAdamW, {"lr": 0.02, "correct_bias": False}),
    "8bit": (GaLoreAdamW8bit, {"lr": 0.02}),
    "adafactor": (GaLoreAdafactor, {"beta1": 0.9}),
}
MODEL = [(96, 128), (24, 16), (4, 24), (3, 12, 16), (12, 3, 3, 3), (7,)]  # the last plain among projected


def build(kind, dtype=torch.float32, **keys):
    """An optimizer over a projected and a plain group, and its parameters."""
    cls, options = KINDS[kind]
    params = [torch.nn.Parameter(gradient(shape, 99, dtype)) for shape in (*MODEL, (64, 80), (5,))]
    keys = {"rank": 48 if kind == "8bit" else RANK, "update_proj_gap": 3, **keys}
    opt = cls([{"params": params[: len(MODEL)], **keys}, {"params": params[len(MODEL) :]}], **options)
    return opt, params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projector", ["svd", "range_finder"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_is_the_one_never_stopped(kind, projector, dtype):
    """Guards against state that weights_only refuses, that loading rounds, or that says too little."""
    opt, params = build(kind, dtype, projector=projector)
    train(opt, params, range(5))
    weights, saved = [p.detach().clone() for p in params], saved_and_loaded(opt.state_dict())
    train(opt, params, range(5, 9))
    again, resumed = build(kind, dtype, projector=projector)
    for p, w in zip(resumed, weights, strict=True):
        p.data.copy_(w)
    again.load_state_dict(saved)
    train(again, resumed, range(5, 9))
    assert same(snapshot(again), snapshot(opt))
    for p in params[:5]:
        assert opt.state[p]["refreshes"] == 3


def test_run_begun_by_theirs_goes_on_here():
    """Guards against an import that leaves out the subspace, the moments or when the next refresh is due."""
    keys = {"rank": RANK, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    a, b = (
        [torch.nn.Parameter(gradient(shape, 99)) for shape in ((16, 24), (4, 24), (7,))] for _ in range(2)
    )
    theirs = PublishedAdamW(
        [{"params": a[:2], **keys}, {"params": a[2:]}], lr=0.02, no_deprecation_warning=True
    )
    ours = GaLoreAdamW([{"params": b[:2], **keys}, {"params": b[2:]}], lr=0.02)
    train(theirs, a, range(5))
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p)
    ours.load_state_dict(from_galore_torch(ours, theirs.state_dict()))
    train(theirs, a, range(5, 12))
    train(ours, b, range(5, 12))
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_of_tensors_and_ints(kind):
    """Guards against pickled objects in checkpoints, and against a state unlike this package's."""
    opt, params = build(kind)
    train(opt, params, range(2))
    for p in params:
        assert all(isinstance(v, torch.Tensor) or type(v) is int for v in opt.state[p].values())
    for p in params[:5]:
        keys = (*STATE_KEYS[4:], "step", "basis") if kind == "adafactor" else STATE_KEYS
        assert set(keys) <= set(opt.state[p])
    assert [opt.state[p]["key"] for p in params[:5]] == [0, 1, 2, 3, 6]
    ranks = [48, 16, 4, 12, 12] if kind == "8bit" else [RANK, RANK, 4, RANK, RANK]
    assert [opt.state[p]["rank"] for p in params[:5]] == ranks


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_state_that_does_not_fit_changes_nothing(kind):
    """Guards against an optimizer that a failed load leaves half loaded, matrices at full rank included."""
    opt, params = build(kind)
    train(opt, params, range(2))
    before = snapshot(opt)
    bad = opt.state_dict()
    bad["param_groups"] = bad["param_groups"][:1]
    with pytest.raises(ValueError, match="parameter groups"):
        opt.load_state_dict(bad)
    assert same(snapshot(opt), before)


def test_full_rank_state_that_does_not_fit_names_its_parameter():
    """Guards against a moment of another shape, met only in the step."""
    opt, params = build("adamw")
    train(opt, params, range(2))
    before, bad = snapshot(opt), saved_and_loaded(opt.state_dict())
    bad["state"][2]["exp_avg"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="exp_avg of parameter 2 has shape"):
        opt.load_state_dict(bad)
    assert same(snapshot(opt), before)


BAD_ADAFACTORS = {
    "version": (lambda d: d["param_groups"][0].update(schema_version=7), "Invalid schema_version: 7"),
    "groups_of_another": (lambda d: d["param_groups"][1].pop("clip_threshold"), "lacks clip_threshold of"),
    "moments": (lambda d: d["param_groups"][0].update(moments="rotate"), "Invalid moments: 'rotate'"),
    "rank": (lambda d: d["param_groups"][0].update(rank=4), "Invalid rank of parameter 0: 4 .must be 5"),
    "plain": (
        lambda d: d["param_groups"][0].update(rank=None),
        "Invalid rank of parameter 0: None .must be 5",
    ),
    "projected": (
        lambda d: d["param_groups"][1].update(rank=9),
        "parameter 6, which is projected, lacks basis",
    ),
    "missing": (
        lambda d: d["state"][2].pop("exp_avg_sq_col"),
        "parameter 2, which is .* lacks exp_avg_sq_col",
    ),
    "unknown": (lambda d: d["state"][5].update(projector=1), "parameter 5 has unknown keys projector"),
    "basis": (lambda d: d["state"][1].update(basis=torch.zeros(3, 3)), "basis of parameter 1 has shape"),
    "row": (
        lambda d: d["state"][3].update(exp_avg_sq_row=torch.zeros(2)),
        "exp_avg_sq_row of parameter 3 has shape",
    ),
    "first_moment": (
        lambda d: d["state"][6].update(exp_avg=torch.zeros(2)),
        "exp_avg of parameter 6 has shape",
    ),
    "kind": (lambda d: d["state"][7].update(RMS=1.0), "RMS of parameter 7 must be a .*floating-point tensor"),
    "step": (lambda d: d["state"][0].update(step=torch.tensor(1.5)), "step of parameter 0 must be a whole"),
    "refreshes": (
        lambda d: d["state"][0].update(refreshes=-1),
        "refreshes of parameter 0 must be an integer",
    ),
    "refresh_to_come": (
        lambda d: d["state"][0].update(last_refresh=9),
        "last_refresh of parameter 0 must be",
    ),
    "side": (lambda d: d["state"][0].update(side=3), "side of parameter 0 must be 0"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_ADAFACTORS.values(), ids=BAD_ADAFACTORS)
def test_adafactor_refuses_a_state_that_does_not_fit(spoil, message):
    """Guards against a state that loads and fails in the step, or is half loaded before it is refused."""
    opt, params = build("adafactor")
    train(opt, params, range(2))
    before, bad = snapshot(opt), saved_and_loaded(opt.state_dict())
    spoil(bad)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(bad)
    assert same(snapshot(opt), before)
    assert not opt._optimizer_load_state_dict_pre_hooks


def test_loaded_adafactor_is_apart_from_its_source():
    """Guards against a copy whose steps move the clock, or anything else, of the original."""
    opt, params = build("adafactor")
    train(opt, params, range(2))
    before = snapshot(opt)
    again, others = build("adafactor")
    again.load_state_dict(opt.state_dict())
    train(again, others, range(2, 4))
    assert same(snapshot(opt), before)
    assert float(again.state[others[0]]["step"]) == 4


def test_load_hooks_of_the_user_see_and_change_what_adafactor_loads():
    """Guards against tensors read again from the dict that a hook has replaced, and hooks after the check."""
    opt, params = build("adafactor")
    train(opt, params, range(2))
    saved = opt.state_dict()
    saved["param_groups"][0]["schema_version"] = 7

    def hook(_, loaded):
        groups = [{**group, "schema_version": 1} for group in loaded["param_groups"]]
        state = {
            i: {**s, "RMS": torch.full((), 3.0), "step": torch.tensor(9.0)}
            for i, s in loaded["state"].items()
        }
        return {**loaded, "param_groups": groups, "state": state}

    again, others = build("adafactor")
    again.register_load_state_dict_pre_hook(hook)
    again.load_state_dict(saved)
    assert all(float(again.state[p]["RMS"]) == 3 and float(again.state[p]["step"]) == 9 for p in others)


@pytest.mark.parametrize(
    ("group", "keys", "message"),
    [
        (0, {"rank": 4}, r"Invalid rank of 'w': 4 \(must be 5"),
        (0, {"rank": None}, r"Invalid rank of 'w': None \(must be 5"),
        (1, {"rank": 4}, r"Invalid rank of 'plain': 4 \(must be None"),
        (1, {"beta1": 0.9}, r"Invalid beta1 of 'plain': 0.9 \(must stay None"),
    ],
)
def test_changed_keys_of_adafactor_raise_before_anything_is_written(group, keys, message):
    """Guards against a factored moment of another shape, met after other weights have moved."""
    params = [torch.nn.Parameter(gradient((16, 24), i)) for i in range(2)]
    opt = GaLoreAdafactor([{"params": [("w", params[0])], "rank": RANK}, {"params": [("plain", params[1])]}])
    train(opt, params, range(2))
    opt.param_groups[group].update(keys)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=message):
        train(opt, params, [2])
    assert same(snapshot(opt), before)


@pytest.mark.parametrize(
    ("cls", "options"),
    [(GaLoreAdamW, {"betas": (0.0, 0.9)}), (GaLoreAdafactor, {})],
    ids=["adamw", "adafactor"],
)
def test_range_finder_follows_the_svd(cls, options):
    """Guards against columns in another order than the SVD's, where kept second moments belong to others.

    Signs differ, so there is no first moment.
    """
    spectrum = torch.diag(2.0 ** -torch.arange(24))
    left, right = (
        torch.linalg.qr(torch.randn(n, 24, generator=torch.Generator().manual_seed(n)))[0] for n in (32, 48)
    )
    runs = []
    for projector in ("svd", "range_finder"):
        p = torch.nn.Parameter(torch.zeros(32, 48))
        opt = cls([{"params": [p], "rank": RANK, "update_proj_gap": 3, "projector": projector}], **options)
        for step in range(9):
            p.grad = (1 + 0.1 * step) * left @ spectrum @ right.T
            opt.step()
        runs.append(p.detach())
    assert (runs[1] - runs[0]).norm() <= 1e-3 * runs[0].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_without_a_direction_do_no_harm(kind):
    """Guards against NaN in weights or state from a gradient of zeros (whose SVD says nothing) or NaN."""
    opt, params = build(kind)
    projected = params[:5]
    for p in projected:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(opt.state[p]["refreshes"] == 0 for p in projected)
    train(opt, params, range(3))
    before = [p.detach().clone() for p in projected]
    state = [{k: torch.as_tensor(v).clone() for k, v in opt.state[p].items()} for p in projected]
    for p in projected:
        p.grad = torch.full_like(p, math.nan)
    for p in params[5:]:
        p.grad = None
    opt.step()
    assert all(torch.equal(p, b) for p, b in zip(projected, before, strict=True))
    assert all(
        torch.equal(torch.as_tensor(v), s[k])
        for p, s in zip(projected, state, strict=True)
        for k, v in opt.state[p].items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_closure_may_compute_gradients(kind):
    """Guards against a closure that runs without autograd, as theirs does."""
    opt, params = build(kind)
    before = [p.detach().clone() for p in params]

    def closure():
        opt.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    assert opt.step(closure).item() == pytest.approx(sum(float(b.square().sum()) for b in before), rel=1e-5)
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_groups_say_less_than_theirs_must():
    """Guards against a group of rank alone that fails, or that has our defaults in place of GaLore's."""
    for kind in KINDS:
        cls, options = KINDS[kind]
        (group,) = cls(
            [{"params": [torch.nn.Parameter(torch.ones(8, 8))], "rank": 2}], **options
        ).param_groups
        assert (group["update_proj_gap"], group["scale"], group["proj_type"]) == (200, 0.25, "std")
        assert (group["projector"], group["moments"]) == ("svd", "keep")


def matrix():
    return torch.nn.Parameter(torch.ones(8, 8))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaLoreAdamW([{"params": [matrix()], "rank": 0}]), "Invalid rank: 0"),
        (lambda: GaLoreAdamW([matrix()], lr=-1.0), "Invalid learning rate"),
        (lambda: GaLoreAdamW8bit([matrix()], is_paged=True), r"Invalid is_paged: True \(must be False\)"),
        (lambda: GaLoreAdamW8bit([matrix()], min_8bit_size=1), r"Invalid min_8bit_size: 1 \(must be 4096\)"),
        (lambda: GaLoreAdafactor([matrix()], lr=0.1), r"Invalid lr: 0.1 \(must be None"),
        (lambda: GaLoreAdafactor([matrix()], relative_step=False), r"Invalid lr: None \(must be a number"),
        (
            lambda: GaLoreAdafactor([matrix()], lr=0.1, relative_step=False, warmup_init=True),
            "Invalid warmup_init: True",
        ),
        (
            lambda: GaLoreAdafactor([{"params": [matrix()], "rank": 2, "moments": "rotate"}]),
            r"Invalid moments: 'rotate' \(must be 'keep'",
        ),
        (lambda: GaLoreAdafactor([{"params": [matrix()], "rank": -1}]), "Invalid rank: -1"),
    ],
)
def test_what_makes_no_sense_is_refused(build, message):
    """Guards against an argument that is silently ignored, or fails only in a later step."""
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdafactor])
def test_sparse_gradients_are_refused(cls):
    """Guards against a sparse gradient that fails somewhere within."""
    p = matrix()
    p.grad = torch.ones(8, 8).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        cls([{"params": [p], "rank": 2}]).step()


# --- Eight bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("projected", [True, False])
def test_small_moments_of_adamw8bit_follow_bitsandbytes(projected):
    """Guards against eps on another root, decay first or on another scale, and codes below 4096 entries."""
    lr, betas, eps, decay, scale = 0.02, (0.8, 0.95), 0.1, 0.1, 0.25 if projected else 1.0
    gradients = [gradient((16, 24), step, torch.float64) for step in range(12)]
    start = gradient((16, 24), 99, torch.float64)
    p = torch.nn.Parameter(start.clone())
    group = {"params": [p], **({"rank": RANK, "update_proj_gap": 200, "scale": scale} if projected else {})}
    opt = GaLoreAdamW8bit([group], lr=lr, betas=betas, eps=eps, weight_decay=decay)
    # Its SVD is in fp32 whatever the dtype.
    basis = torch.linalg.svd(gradients[0].float())[0][:, :RANK] if projected else torch.eye(16)
    basis = basis.double()
    w, m, v = start, 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        p.grad = g
        opt.step()
        r = basis.T @ g
        m, v = betas[0] * m + (1 - betas[0]) * r, betas[1] * v + (1 - betas[1]) * r.square()
        n = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        w = (w - lr * scale * basis @ n) * (1 - lr * decay)
        assert (p - w).norm() <= 1e-12 * (w - start).norm(), t
    assert opt.state[p]["exp_avg"].dtype == torch.float64


def noise(shape, step):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


WIDE, TALL = (128, 256), (256, 128)


@pytest.mark.parametrize(
    ("shape", "gradient", "rank", "bound"),
    [
        *((shape, noise, rank, 0.03) for shape in (WIDE, TALL) for rank in (32, None)),
        *((WIDE, gradient, rank, 0.03) for rank in (32, None)),
        (TALL, gradient, None, 0.03),
        (TALL, gradient, 32, 0.12),  # a block of moments holds large and small components
    ],
)
def test_8bit_trajectory_stays_by_the_one_in_fp32(shape, gradient, rank, bound):
    """Guards against codes or scales that lose more than docs/galore_torch.md says."""
    keys = {} if rank is None else {"rank": rank, "update_proj_gap": 25, "scale": 0.25, "proj_type": "std"}
    start = noise(shape, 99)
    a, b = (torch.nn.Parameter(start.clone()) for _ in range(2))
    theirs = PublishedAdamW([{"params": [a], **keys}], lr=1e-3, eps=1e-8, no_deprecation_warning=True)
    ours = GaLoreAdamW8bit([{"params": [b], **keys}], lr=1e-3, weight_decay=0.0)
    for step in range(50):
        a.grad, b.grad = gradient(shape, step), gradient(shape, step)
        theirs.step()
        ours.step()
    error = (a - b).norm() / (a - start).norm()
    assert 0 < error <= bound
    assert ours.state[b]["exp_avg"].dtype == torch.uint8


def embedding_gradient(step):
    """That of 500 rows, of which 64 tokens by Zipf's law touch a few: most rows rarely have one."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.multinomial(1 / torch.arange(1, 501), 64, replacement=True, generator=generator)
    return torch.zeros(500, 64).index_add_(0, rows, torch.randn(64, 64, generator=generator) / 64)


@pytest.mark.parametrize("keys", [{}, {"rank": 16, "update_proj_gap": 50, "scale": 1.0}], ids=str)
def test_8bit_steps_of_rarely_touched_rows_are_no_longer_than_in_fp32(keys):
    """Guards against variances coded as 0 beside means that are not: steps of thousands of lr."""
    moves, ends = [], []
    for cls in (GaLoreAdamW, GaLoreAdamW8bit):
        p = torch.nn.Parameter(torch.zeros(500, 64))
        opt = cls([{"params": [p], **keys}], lr=1e-3, eps=1e-8, weight_decay=0.0)
        moves.append(0.0)
        for step in range(200):
            before = p.detach().clone()
            p.grad = embedding_gradient(step)
            opt.step()
            moves[-1] = max(moves[-1], float((p.detach() - before).abs().max()))
        ends.append(p.detach())
    assert opt.state[p]["exp_avg_sq"].dtype == torch.uint8
    assert moves[1] <= 1.1 * moves[0]
    assert (ends[1] - ends[0]).norm() <= 0.05 * ends[0].norm()
