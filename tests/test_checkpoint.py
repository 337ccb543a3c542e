"""State dicts: a run that stops and resumes is the run that never stopped; what does not fit is refused."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from state_v1 import write as state_v1
from torch.optim import AdamW
from training import (
    KINDS,
    bias,
    check_state,
    gradient,
    optimizer,
    params_of,
    same,
    saved_and_loaded,
    snapshot,
    train,
    weight,
)

from galore_rrf import GaLoreAdamW, moments
from galore_rrf.subspace import SCHEMA_VERSION, STATE_KEYS

pytestmark = pytest.mark.core


def started(kind, steps, device="cpu"):
    w, b = weight(kind, device), bias(device)
    opt = optimizer(kind, w, b, weight_decay=0.1)
    train(opt, [w, b], range(steps))
    return opt


def copied_params(opt):
    return [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params_of(opt)]


def gap_of(kind):
    return KINDS[kind][2].get("update_proj_gap", 200)


# --- Resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-1, 0, 1], ids=["before", "at", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_equals_the_run_that_never_stopped(kind, offset, device):
    """Guards against state that a checkpoint loses: the step before a refresh, the refresh, and the next."""
    gap = gap_of(kind)
    opt = started(kind, gap + offset, device)
    params = copied_params(opt)
    resumed = optimizer(kind, *params)  # its own options differ; the checkpoint's count
    resumed.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert same(snapshot(opt), snapshot(resumed))
    rest = range(gap + offset, gap + offset + 3 + min(gap, 5))
    train(opt, params_of(opt), rest)
    train(resumed, params, rest)
    assert same(snapshot(opt), snapshot(resumed))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_copied_optimizer_continues_as_the_original(kind, how):
    """Guards against attributes of ours that copies and pickles do not carry."""
    opt = started(kind, 2)
    twin = copy.deepcopy(opt) if how == "deepcopy" else pickle.loads(pickle.dumps(opt))
    assert not {id(p) for p in params_of(opt)} & {id(p) for p in params_of(twin)}
    for each in (opt, twin):
        extra = torch.nn.Parameter(torch.ones(14, 10))
        each.add_param_group({"params": [("extra", extra)], "rank": 3})
        train(each, params_of(each), range(2, 7))
    assert same(snapshot(opt), snapshot(twin))


def test_state_dict_loads_without_arbitrary_objects_and_has_plain_types():
    """Guards against str, None or lists in a parameter's state, which distributed checkpoints refuse."""
    state_dict = saved_and_loaded(started("default", 3).state_dict())
    assert tuple(state_dict["state"][0]) == STATE_KEYS
    for state in state_dict["state"].values():
        assert all(isinstance(v, (torch.Tensor, int)) for v in state.values())
    assert all(g["schema_version"] == SCHEMA_VERSION for g in state_dict["param_groups"])


def test_fp32_moments_of_bf16_weights_stay_fp32_to_the_bit():
    """Guards against torch's load_state_dict, which casts the state to the weight's dtype."""
    opt = started("bf16", 5)
    before = {k: copy.deepcopy(v) for k, v in opt.state[params_of(opt)[0]].items()}
    assert not same(before["exp_avg"], before["exp_avg"].bfloat16().float())
    other = optimizer("bf16", weight("bf16"), bias())
    other.load_state_dict(opt.state_dict())
    state = other.state[params_of(other)[0]]
    assert state["exp_avg"].dtype == torch.float32
    assert same(dict(state), before)


@pytest.mark.parametrize(
    ("weights", "options", "kept"),
    [
        (torch.float32, {"state_dtype": torch.bfloat16}, torch.bfloat16),
        (torch.float32, {"state_dtype": torch.uint8}, torch.uint8),
        (torch.bfloat16, {"state_dtype": torch.float32}, torch.float32),
        (torch.bfloat16, {"arithmetic": "galore_torch"}, torch.float32),
    ],
    ids=["bf16", "8bit", "fp32", "galore_torch"],
)
@pytest.mark.parametrize("shape", [(80, 96), (2, 80, 96)], ids=["matrix", "stack"])
def test_moments_of_any_dtype_resume_to_the_bit(shape, weights, options, kept):
    """Guards against moments cast on the way to the dtype of the weights, plain ones among them."""

    def pair():
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(s, generator=generator).to(weights)) for s in (shape, (2, 50, 44))
        ]
        groups = [{"params": params[:1], "rank": 64, "update_proj_gap": 3}, {"params": params[1:]}]
        return params, GaLoreAdamW(groups, lr=0.05, **options)

    params, opt = pair()
    train(opt, params, range(4))
    assert all(opt.state[p]["exp_avg"].dtype == kept for p in params)
    others, resumed = pair()
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    resumed.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert same(snapshot(opt), snapshot(resumed))
    for each, its in ((params, opt), (others, resumed)):
        train(its, each, range(4, 8))
    assert same(snapshot(opt), snapshot(resumed))


WITHIN = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.uint8: 0.02}  # of the largest entry


@pytest.mark.parametrize("before", WITHIN, ids=str)
@pytest.mark.parametrize("after", WITHIN, ids=str)
def test_moments_are_converted_to_the_dtype_that_the_group_asks_for(before, after):
    """Guards against codes read as numbers, or moments kept in a dtype that costs more than was asked for."""
    shapes = (2, 80, 96), (70, 64)
    params = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
    groups = [{"params": params[:1], "rank": 64}, {"params": params[1:]}]
    opt = GaLoreAdamW(groups, lr=0.05, state_dtype=before)
    train(opt, params, range(3))
    saved = opt.state_dict()
    saved["param_groups"] = [{**group, "state_dtype": after} for group in saved["param_groups"]]
    old = [dict(opt.state[p]) for p in params]
    opt.load_state_dict(saved)
    for then, now in zip(old, (opt.state[p] for p in params), strict=True):
        for key in moments.NAMES:
            assert now[key].dtype == after
            assert (f"{key}_scale" in now) == (after == torch.uint8)
            a, b = (moments.values(state, key).float() for state in (then, now))
            assert (b - a).abs().max() <= WITHIN[after] * a.abs().max()
            assert a.abs().max() > 0
    train(opt, params, range(3, 5))
    assert all(p.isfinite().all() for p in params)


def test_state_of_a_parameter_that_was_only_looked_at():
    """Guards against a checkpoint that does not load since opt.state[p] makes an empty state."""
    opt = started("default", 0)
    for p in params_of(opt):
        assert not opt.state[p]
    other = started("default", 0)
    other.load_state_dict(saved_and_loaded(opt.state_dict()))
    for each in (opt, other):
        train(each, params_of(each), range(2))
    assert same(snapshot(opt), snapshot(other))


def test_loaded_tensors_are_copies():
    """Guards against two optimizers that train one state."""
    opt = started("default", 3)
    other = optimizer("default", *copied_params(opt))
    other.load_state_dict(opt.state_dict())
    mine, theirs = (o.state[params_of(o)[0]] for o in (opt, other))
    for key in STATE_KEYS[:4]:
        assert mine[key].data_ptr() != theirs[key].data_ptr()


@pytest.mark.parametrize("kind", ["default", "svd", "tolerance", "bf16", "stack", "conv"])
@pytest.mark.parametrize("rank", [3, 8])
def test_state_of_another_rank_loads_and_trains_on(kind, rank):
    """Guards against a rank fixed by the optimizer that loads; the next refresh moves to a rank set since."""
    opt = started(kind, 4)
    other = GaLoreAdamW([{"params": [weight(kind)], "rank": rank, **KINDS[kind][2]}, {"params": [bias()]}])
    other.load_state_dict(saved_and_loaded(opt.state_dict()))
    w = params_of(other)[0]
    assert same(dict(other.state[w]), dict(opt.state[params_of(opt)[0]]))
    other.param_groups[0]["rank"] = rank
    train(other, params_of(other), range(4, 9))
    check_state(w, other.state[w], rank)
    if kind != "tolerance":
        assert other.state[w]["rank"] == rank
    assert other.state[w]["refreshes"] > opt.state[params_of(opt)[0]]["refreshes"]
    assert w.isfinite().all()


def test_state_dict_hooks_run():
    """Guards against load_state_dict or state_dict bypassing torch's hooks."""
    opt, calls = started("default", 2), []
    opt.register_state_dict_pre_hook(lambda *_: calls.append("save"))
    opt.register_load_state_dict_pre_hook(lambda *_: calls.append("before"))
    opt.register_load_state_dict_post_hook(lambda *_: calls.append("after"))
    opt.load_state_dict(opt.state_dict())
    opt.load_state_dict(opt.state_dict())
    assert calls == ["save", "before", "after"] * 2


# --- Refusals -----------------------------------------------------------------------------------------


def edit(key, value):
    def change(saved):
        saved["state"][0][key] = value

    return change


def edit_plain(key, value):
    def change(saved):
        saved["state"][1][key] = value

    return change


def drop(key, parameter=0):
    def change(saved):
        del saved["state"][parameter][key]

    return change


def codes(scale):
    def change(saved):
        state = saved["state"][0]
        state["exp_avg"] = torch.zeros_like(state["exp_avg"], dtype=torch.uint8)
        if scale is not None:
            state["exp_avg_scale"] = scale

    return change


class Foreign:
    """What a state should not hold."""


def edit_group(**keys):
    def change(saved):
        saved["param_groups"][0].update(keys)

    return change


def edit_plain_group(**keys):
    def change(saved):
        saved["param_groups"][1].update(keys)

    return change


def complex_moment(parameter, key):
    def change(saved):
        saved["state"][parameter][key] = saved["state"][parameter][key] * 1j

    return change


def at_rank(rank):
    def change(saved):
        keys = {"exp_avg": (24, rank), "exp_avg_sq": (24, rank), "basis": (16, rank)}
        saved["state"][0].update(rank=rank, **{key: torch.zeros(shape) for key, shape in keys.items()})

    return change


def another_shape(saved):
    saved["state"][0]["exp_avg"] = torch.zeros(7, 6)


def fewer_parameters(saved):
    saved["param_groups"][1]["params"] = []


def a_group_less(saved):
    saved["param_groups"].pop()


def the_same_parameter_twice(saved):
    saved["param_groups"][1]["params"] = [0]


def plain_adamws(saved):
    moments = {k: torch.zeros(24, 16) for k in ("exp_avg", "exp_avg_sq")}
    saved["state"][0] = {"step": torch.tensor(2.0), **moments}


def a_projected_state_for_a_plain_parameter(saved):
    saved["state"][1] = saved["state"][0]


def a_plain_state_of_another_shape(saved):
    saved["state"][1]["exp_avg"] = torch.zeros(6)


STEPS = (-1.0, 0.5, float("nan"), float("inf"))
REFUSED = {
    **{f"no_{key}": (drop(key), f"'w'.*{key}") for key in STATE_KEYS},
    **{f"{key}_list": (edit(key, [1.0]), f"{key} of 'w'") for key in STATE_KEYS},
    **{f"{key}_int": (edit(key, 3), f"{key} of 'w'") for key in STATE_KEYS[:4]},
    **{f"{key}_int_tensor": (edit(key, torch.ones(24, 6).long()), f"{key} of 'w'") for key in STATE_KEYS[:4]},
    **{f"{key}_bool": (edit(key, True), f"{key} of 'w'") for key in STATE_KEYS[4:]},
    **{f"{key}_tensor": (edit(key, torch.tensor(1)), f"{key} of 'w'") for key in STATE_KEYS[4:]},
    **{f"{key}_negative": (edit(key, -1), f"{key} of 'w'") for key in STATE_KEYS[4:]},
    **{f"{key}_object": (edit(key, Foreign()), f"{key} of 'w'.*Foreign") for key in STATE_KEYS},
    **{f"step_{x}": (edit("step", torch.tensor(x)), "step of 'w' must be a whole") for x in STEPS},
    "codes_alone": (codes(None), "exp_avg of 'w' is 8-bit, but the state has no exp_avg_scale"),
    "codes_and_more_scales": (codes(torch.ones(2)), "exp_avg_scale of 'w' has shape"),
    "codes_and_integers": (codes(torch.ones(1, dtype=torch.int32)), "exp_avg_scale of 'w' must be"),
    "scale_alone": (edit("exp_avg_sq_scale", torch.ones(1)), "exp_avg_sq of 'w' is not 8-bit"),
    **{f"plain_no_{key}": (drop(key, 1), f"'b' lacks {key}") for key in STATE_KEYS[:3]},
    **{f"plain_{key}_list": (edit_plain(key, [1.0]), f"{key} of 'b'") for key in STATE_KEYS[:3]},
    **{
        f"plain_{key}_object": (edit_plain(key, Foreign()), f"{key} of 'b'.*Foreign")
        for key in STATE_KEYS[:3]
    },
    **{
        f"plain_step_{x}": (edit_plain("step", torch.tensor(x)), "step of 'b' must be a whole") for x in STEPS
    },
    "plain_int": (edit_plain("exp_avg", torch.ones(5).long()), "exp_avg of 'b'"),
    "plain_codes": (edit_plain("exp_avg", torch.ones(5).byte()), "exp_avg of 'b' is 8-bit"),
    "plain_amsgrad": (edit_plain_group(amsgrad=True), "'b' lacks max_exp_avg_sq"),
    **{
        f"{key}_complex": (
            complex_moment(0, key),
            f"{key} of 'w' must be a floating-point tensor, got a torch.complex64",
        )
        for key in ("exp_avg", "exp_avg_sq", "basis")
    },
    **{
        f"plain_{key}_complex": (
            complex_moment(1, key),
            f"{key} of 'b' must be a floating-point tensor, got a torch.complex64",
        )
        for key in moments.NAMES
    },
    "rank_zero": (edit("rank", 0), "rank of 'w'"),
    "rank_17": (at_rank(17), r"rank of 'w' must be at most 16, .* of shape \(24, 16\), got 17"),
    "refreshed_later": (edit("last_refresh", 6), "last_refresh of 'w' must be at most its step, 5, got 6"),
    "other_rank": (edit("rank", 5), "of 'w' has shape"),
    "side_2": (edit("side", 2), "side of .w. is 2, but the state has no basis_right"),
    "side_3": (edit("side", 3), r"side of .w. is 3 \(Tucker\), but a parameter of shape \(24, 16\)"),
    "side_4": (edit("side", 4), "side of .w. must be 0"),
    "other_side": (edit("side", 1), "of 'w' has shape"),
    "step_whole": (edit("step", torch.tensor(3)), "step of 'w' must be one floating"),
    "steps": (edit("step", torch.zeros(2)), "step of 'w'"),
    "unknown_key": (edit("color", 1), "'w'.*color"),
    "other_shape": (another_shape, "exp_avg of 'w' has shape"),
    "schema": (edit_group(schema_version=SCHEMA_VERSION + 1), "schema_version: 2"),
    "schema_str": (edit_group(schema_version="1"), "schema_version: '1'"),
    "fewer": (fewer_parameters, "groups of"),
    "group": (a_group_less, "groups of"),
    "twice": (the_same_parameter_twice, "two places"),
    "plain_adamw": (plain_adamws, r"'w'.*plain AdamW.*galore_rrf\.checkpoint\.from_torch_adamw"),
    "projected": (a_projected_state_for_a_plain_parameter, "'b'"),
    "plain_shape": (a_plain_state_of_another_shape, "exp_avg of 'b'"),
    "rank_none": (edit_group(rank=None), "'w'"),
    "options": (edit_group(rank=-2), "rank: -2"),
    "option": (edit_group(moments="forget"), "moments: 'forget'"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_state_that_does_not_fit_is_refused_and_nothing_changes(change, message):
    """Guards against a checkpoint of another model, rank or schema that half loads, or fails later."""
    saved = saved_and_loaded(started("default", 5).state_dict())
    change(saved)
    opt = started("default", 3)
    before, tensors = snapshot(opt), [opt.state[p]["exp_avg"] for p in params_of(opt)]
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert same(snapshot(opt), before)
    assert all(opt.state[p]["exp_avg"] is t for p, t in zip(params_of(opt), tensors, strict=True))
    train(opt, params_of(opt), [3])
    twin = started("default", 4)
    assert same(snapshot(opt), snapshot(twin))


def test_rank_of_a_state_is_bounded_by_the_shorter_side_on_either_side():
    """Guards against a bound by the projected side: such a state is never refreshed, and the step fails."""
    for shape, proj_type in (((16, 64), "right"), ((64, 16), "left"), ((3, 16, 64), "right")):
        p = torch.nn.Parameter(gradient(shape, 0))
        opt = GaLoreAdamW([{"params": [("w", p)], "rank": 12, "proj_type": proj_type}])
        train(opt, [p], [0])
        saved = opt.state_dict()
        for rank, fits in ((16, True), (17, False), (40, False)):
            (m, n), stack = shape[-2:], shape[:-2]
            kept = (*stack, m, rank) if proj_type == "right" else (*stack, rank, n)
            basis = (*stack, n if proj_type == "right" else m, rank)
            state = {**saved["state"][0], "rank": rank, "basis": torch.zeros(basis)}
            state |= {key: torch.zeros(kept) for key in moments.NAMES}
            if fits:
                opt.load_state_dict({**saved, "state": {0: state}})
                continue
            with pytest.raises(ValueError, match=f"rank of 'w' must be at most 16.*got {rank}"):
                opt.load_state_dict({**saved, "state": {0: state}})


def test_moments_of_complex_parameters_are_complex():
    """Guards against a refusal of what torch keeps for them, or real moments that fail in the next step."""
    p = torch.nn.Parameter(torch.ones(6, dtype=torch.complex64))
    opt = GaLoreAdamW([("w", p)])
    p.grad = torch.ones_like(p) * (1 + 2j)
    opt.step()
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    assert opt.state[p]["exp_avg"].dtype == torch.complex64
    opt.step()
    real = {**saved["state"][0], "exp_avg": torch.zeros(6)}
    with pytest.raises(ValueError, match="exp_avg of 'w' must be a complex tensor"):
        opt.load_state_dict({**saved, "state": {0: real}})
    coded = {"exp_avg": torch.zeros(6, dtype=torch.uint8), "exp_avg_scale": torch.ones(1)}
    with pytest.raises(ValueError, match="exp_avg of 'w' must be a complex tensor"):
        opt.load_state_dict({**saved, "state": {0: {**saved["state"][0], **coded}}})


def test_refusal_of_an_unnamed_parameter_says_its_number():
    """Guards against an error that leaves open which of many parameters it means."""
    opt = GaLoreAdamW([{"params": [weight("default"), weight("default")], "rank": 6}])
    train(opt, params_of(opt), [0])
    saved = opt.state_dict()
    saved["state"][1] = {**saved["state"][1], "rank": 5}
    with pytest.raises(ValueError, match="parameter 1"):
        opt.load_state_dict(saved)


def test_checkpoint_of_torch_adamw_is_refused_where_parameters_are_projected():
    """Guards against full moments read as projected ones, and a refusal that leaves the user there."""
    w, b = weight("default"), bias()
    theirs = AdamW([{"params": [w]}, {"params": [b]}])
    train(theirs, [w, b], range(2))
    opt = started("default", 1)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"'w'.*plain AdamW.*from_torch_adamw"):
        opt.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"groups of \[2\].*from_torch_adamw"):
        opt.load_state_dict(AdamW([w, b]).state_dict())
    assert same(snapshot(opt), before)


def test_loading_leaves_nothing_behind():
    """Guards against loads that check the files of all loads before, and keep their states."""
    opt = started("default", 4)
    hooks = dict(opt._optimizer_load_state_dict_pre_hooks)
    attributes = set(vars(opt))
    opt.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert dict(opt._optimizer_load_state_dict_pre_hooks) == hooks
    assert set(vars(opt)) == attributes


def test_loading_does_not_change_the_dict():
    """Guards against a state dict that can be loaded once."""
    saved = started("default", 3).state_dict()
    before = copy.deepcopy(saved)
    for _ in range(2):
        optimizer("default", weight("default"), bias()).load_state_dict(saved)
    assert same(saved, before)


def test_state_dict_before_the_first_step():
    """Guards against a checkpoint without state being an error."""
    opt = started("default", 0)
    other = started("default", 0)
    other.load_state_dict(saved_and_loaded(opt.state_dict()))
    w = params_of(other)[0]
    w.grad = gradient(tuple(w.shape), 0)
    other.step()
    check_state(w, other.state[w], 6)


def test_load_hooks_see_the_state_as_it_will_train():
    """Guards against post hooks that find fp32 moments already cast to the dtype of the weights."""
    p = torch.randn(12, 8).bfloat16().requires_grad_()
    p.grad = torch.randn(12, 8).bfloat16()
    opt = GaLoreAdamW([{"params": [p], "rank": 4}])
    opt.step()
    expected = opt.state[p]["exp_avg"].clone()
    seen = []
    opt.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["exp_avg"].clone()))
    opt.load_state_dict(opt.state_dict())
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], expected)


# --- Files of version 1 ---------------------------------------------------------------------------------

FILES = sorted((Path(__file__).parent / "state_v1").glob("*.pt"))


def test_every_file_of_version_1_is_there():
    """Guards against files that are lost: parametrised over none, the test below passes."""
    assert {path.stem for path in FILES} == set(state_v1.KINDS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_of_version_1_continues_as_it_did(path, monkeypatch):
    """Guards against a change that leaves behind the checkpoints that users have.

    The bits may differ by machine; a difference is measured against the way that the weights went.  Ranks by
    tolerance were of any size then.
    """
    monkeypatch.setattr("galore_rrf.refresh._RANK_MULTIPLE", 1)
    saved = torch.load(path, weights_only=True)
    assert all(group["schema_version"] == 1 for group in saved["state_dict"]["param_groups"])
    weights = [torch.nn.Parameter(w.clone()) for w in saved["weights"]]
    opt = state_v1.optimizer(weights, {"rank": 2})  # all else is in the file
    opt.load_state_dict(saved["state_dict"])
    state_v1.train(opt, range(state_v1.BEFORE, state_v1.BEFORE + state_v1.AFTER))
    tolerance = 0.05 if weights[0].dtype == torch.bfloat16 else 1e-4
    for w, before, after in zip(weights, saved["weights"], saved["continued"], strict=True):
        assert (w - after).norm() <= tolerance * (after - before).norm()
