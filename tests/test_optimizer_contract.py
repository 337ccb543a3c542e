"""What any torch optimizer promises: torch.optim.AdamW's own options and errors, parameters of every kind.

Groups of every mix are in test_any_options.py.
"""

import copy
import math
import pickle
import weakref

import pytest
import torch
from torch.optim import AdamW
from training import (
    KINDS,
    assert_same_on_a_cpu,
    bias,
    check_state,
    gradient,
    gradient_like,
    optimizer,
    params_of,
    same,
    set_gradients,
    settled,
    snapshot,
    train,
    weight,
)

from galore_rrf import GaLoreAdamW
from galore_rrf.options import SubspaceKeys

pytestmark = pytest.mark.core

# --- Plain groups: the options that PyTorch's own tests give AdamW ---------------------------------------

GRID = {
    "default": {},
    "lr": {"lr": 0.01},
    "weight_decay": {"weight_decay": 0.1},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "amsgrad": {"weight_decay": 0.1, "amsgrad": True},
    "capturable": {"weight_decay": 0.9, "amsgrad": True, "capturable": True},
    "tensor_lr": {"lr": torch.tensor(0.01)},
    "tensor_lr_fp64": {"lr": torch.tensor([0.01], dtype=torch.float64)},
    "tensor_betas": {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
    "tensor_lr_and_betas": {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.9), torch.tensor(0.99))},
}
PATHS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"differentiable": True}]
DTYPES = [
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64),
    torch.complex128,
]


def plain_run(device, cls, dtype, options, in_groups):
    """Weights and state after four steps, the last parameter without a gradient in one; or the error."""
    generator = torch.Generator().manual_seed(2)
    draw = torch.float64 if dtype.is_floating_point else torch.complex128
    shapes = [(7, 5), (5,), (2, 3, 4), (), (0, 3)]
    params = [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=draw).to(device, dtype)) for s in shapes
    ]
    eps = 0.1 if dtype == torch.float16 else 1e-8
    options = {"eps": eps, **copy.deepcopy(options)}
    try:
        opt = cls([{"params": params, **options}]) if in_groups else cls(params, **options)
        for step in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=draw).to(device, dtype)
            if step == 2:
                params[-2].grad = None
            opt.step()
    except (ValueError, RuntimeError, AssertionError) as error:
        return type(error), str(error)
    return [p.detach() for p in params], [dict(opt.state[p]) for p in params]


@pytest.mark.parametrize("in_groups", [False, True], ids=["arguments", "group_keys"])
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("options", GRID.values(), ids=GRID)
def test_plain_parameters_do_with_every_option_as_with_torch(device, options, path, in_groups):
    """Guards against an option that plain groups hear otherwise than torch.optim.AdamW, errors included."""
    for dtype in DTYPES:
        ours, theirs = (
            plain_run(device, c, dtype, {**options, **path}, in_groups) for c in (GaLoreAdamW, AdamW)
        )
        assert same(ours, theirs), (dtype, ours, theirs)


def test_the_grid_of_options_mostly_trains(device):
    """Guards against a grid that only compares errors."""
    runs = [
        plain_run(device, AdamW, torch.float32, {**options, **path}, False)
        for options in GRID.values()
        for path in PATHS[:4]
    ]
    assert sum(isinstance(run[0], list) for run in runs) >= 30


# --- Projected groups: the same options ------------------------------------------------------------------

CHANGES_NOTHING = [
    *({"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}, {"capturable": True}),
    {"lr": torch.tensor(0.0625)},
    {"lr": torch.tensor(0.0625, dtype=torch.float64)},
    {"lr": torch.tensor([0.0625])},
    {"betas": (torch.tensor(0.5), torch.tensor(0.75))},
    {"betas": (torch.tensor([0.5]), torch.tensor(0.75, dtype=torch.float64))},
]


@pytest.mark.parametrize("options", CHANGES_NOTHING, ids=str)
@pytest.mark.parametrize("kind", ["default", "svd", "tolerance", "bf16", "stack"])
def test_torchs_paths_and_tensor_options_leave_projected_groups_alone(device, kind, options):
    """Guards against an argument for plain groups, or the form of a number, that changes a projected one."""
    runs = []
    for changed in ({}, copy.deepcopy(options)):
        w = weight(kind, device)
        keys = {"params": [w], "rank": 6, **KINDS[kind][2]}
        opt = GaLoreAdamW([keys], **{"lr": 0.0625, "betas": (0.5, 0.75), **changed})
        train(opt, [w], range(5))
        runs.append({"weight": w.detach(), **opt.state[w]})
    for key, value in runs[0].items():  # capturable=True counts steps on the GPU
        assert_same_on_a_cpu(value, runs[1][key])


@pytest.mark.parametrize(
    "make", [float, torch.tensor, lambda x: torch.tensor([x])], ids=["float", "0d", "1d"]
)
def test_options_changed_between_steps_count_from_the_next(device, make):
    """Guards against options read once: rates (in place too), betas, eps, decay, direction, subspace keys."""
    changes = [
        *({"lr": 0.125}, {"betas": (0.5, 0.75)}, {"eps": 0.5}, {"weight_decay": 0.25}, {"maximize": True}),
        *({"scale": 0.25}, {"update_proj_gap": 1}, {"sketch": "plain"}, {"seed": 7}),
    ]
    w, v, b = weight("default", device), weight("default", device), bias(device)
    opt = GaLoreAdamW([{"params": [w], "rank": 6}, {"params": [b]}], lr=make(0.0625))
    group = opt.param_groups[0]
    for step, change in enumerate(({}, *changes)):
        if "lr" in change and isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(change["lr"])
        else:
            group.update(change)
        # One constructed with what counts now, in the state and place that the other has come to.
        keys = {k: group[k] for k in SubspaceKeys.__annotations__}
        arguments = {k: group[k] for k in ("betas", "eps", "weight_decay", "maximize")}
        fresh = GaLoreAdamW([{"params": [v]}], lr=float(group["lr"]), **arguments, **keys)
        if step:
            fresh.state[v].update({k: copy.deepcopy(x) for k, x in settled(opt)[w].items()})
            v.data.copy_(w.data)
        before = w.detach().clone()
        train(opt, [w], [step])
        train(fresh, [v], [step])
        assert same(w.detach(), v.detach())
        assert same(dict(opt.state[w]), dict(fresh.state[v]))
        assert not same(w.detach(), before)


# --- Errors --------------------------------------------------------------------------------------------------

WRONG = [
    *({"lr": -1}, {"lr": math.nan}, {"lr": "0.1"}, {"lr": None}, {"lr": torch.ones(2)}),
    *(
        {"betas": (1.0, 0.0)},
        {"betas": (0.0, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"betas": (0.9,)},
        {"betas": 0.9},
    ),
    *({"betas": (0.9, torch.tensor(0.99))}, {"betas": (torch.tensor(0.9), 0.99)}, {"betas": (0.9, 0)}),
    {"betas": (torch.ones(2) * 0.9, torch.tensor(0.99))},
    {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True},
    *({"eps": -1e-8}, {"eps": "small"}, {"eps": math.nan}, {"weight_decay": -1}, {"weight_decay": None}),
    *({"lr": torch.tensor(0.001), "foreach": True}, {"fused": True, "foreach": True}),
    *({"fused": True, "differentiable": True}, {"momentum": 0.9}, {"decoupled_weight_decay": True}),
]


def error_of(make):
    """Type and message, the class's name apart; None where nothing is raised."""
    try:
        make()
    except Exception as error:
        return type(error), str(error).replace("GaLoreAdamW", "AdamW").replace("AdamW.__init__()", "AdamW")
    return None


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_wrong_arguments_are_refused_as_torch_refuses_them(options):
    """Guards against another exception or message, or none, whether anything is projected or not."""
    theirs = error_of(lambda: AdamW([weight("default")], **options))
    assert theirs is not None
    assert error_of(lambda: GaLoreAdamW([weight("default")], **options)) == theirs or "momentum" in options
    ours = error_of(lambda: GaLoreAdamW([weight("default")], rank=4, **options))
    if "differentiable" in options:
        assert ours[0] is ValueError
    elif "momentum" in options:
        assert ours == (
            TypeError,
            "AdamW got an unexpected keyword argument 'momentum' (did you mean 'moments'?)",
        )
    else:
        assert ours == theirs


P = weight("default")
WRONG_PARAMS = {
    "tensor": lambda: P,
    "twice_in_groups": lambda: [{"params": P}, {"params": P}],
    "some_names": lambda: [("w", P), weight("default")],
    "names_in_one_group": lambda: [{"params": [P]}, {"params": [("w", weight("default"))]}],
    "no_names_in_one_group": lambda: [{"params": [("w", P)]}, {"params": [weight("default")]}],
    "set": lambda: [{"params": {P}}],
    "list": lambda: [[P]],
    "number": lambda: [P, 3],
    "non_leaf": lambda: [P * 2],
    "no_params": lambda: [{"lr": 0.1}],
    "mapping": lambda: {"w": P},
    "none": lambda: None,
    "empty": lambda: [],
}


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("params", WRONG_PARAMS.values(), ids=WRONG_PARAMS)
def test_wrong_params_are_refused_as_torch_refuses_them(params, rank):
    """Guards against other messages than torch's for parameters that no optimizer takes."""
    theirs = error_of(lambda: AdamW(params()))
    assert theirs is not None
    assert error_of(lambda: GaLoreAdamW(params(), rank=rank)) == theirs


@pytest.mark.parametrize("rank", [None, 2])
def test_params_of_a_group_may_be_an_iterator(rank):
    """Guards against parameters that a check has used up, so that nobody trains them."""
    params = [torch.nn.Parameter(torch.ones(4, 5)) for _ in range(2)]
    opt = GaLoreAdamW([{"params": iter(params), "rank": rank}])
    assert list(map(id, params_of(opt))) == list(map(id, params))


def test_parameter_twice_in_a_plain_group_warns_as_torch_does(device):
    """Guards against a difference to torch, which warns and trains it twice."""
    runs = []
    for cls in (AdamW, GaLoreAdamW):
        p = weight("default", device)
        with pytest.warns(UserWarning, match="duplicate parameters"):
            opt = cls([p, p], foreach=False)
        train(opt, [p], range(2))
        runs.append((p.detach(), dict(opt.state[p])))
    assert same(*runs)


@pytest.mark.parametrize("where", ["group", "constructor", "add_param_group"])
def test_matrix_twice_in_a_projected_group_is_refused(where):
    """Guards against two threads that step one matrix at once."""
    p = weight("default")
    opt = GaLoreAdamW([bias()])
    make = {
        "group": lambda: GaLoreAdamW([{"params": [p, p], "rank": 4}]),
        "constructor": lambda: GaLoreAdamW([p, bias(), p], rank=4),
        "add_param_group": lambda: opt.add_param_group({"params": [bias(), p, p], "rank": 4}),
    }[where]
    with pytest.raises(
        ValueError, match="parameter 2 is parameter [01] again" if where != "group" else "again"
    ):
        make()
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("given", [3, "loss", torch.tensor(1.0)], ids=str)
def test_closure_that_is_none_is_refused_as_torch_refuses_it(device, given):
    """Guards against step(loss), as users of other libraries write it, being taken for a step."""
    opt = optimizer("default", weight("default", device), bias(device))
    set_gradients(params_of(opt), 0)
    before = snapshot(opt)
    assert error_of(lambda: opt.step(given)) == error_of(
        lambda: AdamW([weight("default", device)]).step(given)
    )
    assert same(snapshot(opt), before)


# --- Closures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["default", "tolerance", "svd"])
def test_closure_is_called_once_before_anything_is_written(device, kind):
    """Guards against a closure called twice, as LBFGS does, or after the refresh; its value may be anything."""
    w, b, v, c = weight(kind, device), bias(device), weight(kind, device), bias(device)
    opt, plain = optimizer(kind, w, b), optimizer(kind, v, c)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = sum((p * gradient_like(p, len(calls))).sum() for p in (w, b))
        loss.backward()
        calls.append(snapshot(opt))
        return "any value", loss

    for step in range(5):
        before = snapshot(opt)
        with torch.no_grad():
            assert opt.step(closure)[0] == "any value"
        assert len(calls) == step + 1
        assert same(calls[-1], before)
        train(plain, [v, c], [step])
        assert same(snapshot(opt)[:2], snapshot(plain)[:2])
    assert opt.step(lambda: None) is None


def test_closure_that_raises_leaves_all_as_it_was(device):
    """Guards against a step from half a backward, or a grad mode that stays behind."""
    opt = optimizer("default", weight("default", device), bias(device))
    train(opt, params_of(opt), range(4))
    before = snapshot(opt)

    def closure():
        raise KeyError("a batch that is not there")

    with pytest.raises(KeyError, match="a batch"):
        opt.step(closure)
    assert torch.is_grad_enabled()
    assert same(snapshot(opt), before)


# --- Parameters of every kind --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_without_gradients_in_some_steps_has_its_own_clock(device, kind):
    """Guards against a refresh, decay or bias correction by other parameters' steps."""
    w, v, b = weight(kind, device), weight("default", device), bias(device)
    opt = optimizer(kind, w, b)
    opt.add_param_group({"params": [("v", v)], "rank": 5, "update_proj_gap": 2})
    alone = optimizer(kind, weight(kind, device), bias(device))
    for step in range(8):
        set_gradients([w, v, b], step)
        if step % 3 == 1:
            w.grad = None
        opt.step()
        if step % 3 != 1:
            train(alone, params_of(alone)[:1], [step])
    other = params_of(alone)[0]
    assert same(w.detach(), other.detach())
    assert same(dict(opt.state[w]), dict(alone.state[other]))
    assert opt.state[v]["step"].item() == 8


def test_dtypes_mixed_in_one_group_train_as_apart(device):
    """Guards against one dtype's arithmetic for all of a list."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)

    def weights():
        return [
            torch.nn.Parameter(gradient((16, 12), i, device=device).to(d))
            for i, d in enumerate((*dtypes, *dtypes))
        ]

    keys = {"rank": 5, "update_proj_gap": 2, "seed": 3}
    together = weights()
    one = GaLoreAdamW([{"params": together, **keys}, {"params": [bias(device)]}], lr=0.05, eps=1e-4)
    apart = weights()
    many = GaLoreAdamW([{"params": [p], **keys} for p in apart], lr=0.05, eps=1e-4)
    for opt, params in ((one, params_of(one)), (many, apart)):
        train(opt, params, range(5))
    for p, q in zip(together, apart, strict=True):
        assert_same_on_a_cpu(p.detach(), q.detach())
        for key, value in one.state[p].items():
            assert_same_on_a_cpu(value, many.state[q][key])
        check_state(p, one.state[p], 5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64], ids=str)
@pytest.mark.parametrize("keys", [{"rank": 4}, {"arithmetic": "galore_torch"}], ids=str)
def test_dtypes_that_no_step_of_ours_takes_are_refused(dtype, keys):
    """Guards against a parameter that some options train and others fail at, after the first half of a step."""
    p = torch.zeros(8, 8).to(dtype)
    with pytest.raises(TypeError, match=r"Invalid dtype of p: .*float64, float32, bfloat16 or float16"):
        GaLoreAdamW([{"params": [("p", p)], **keys}])


@pytest.mark.parametrize("kind", ["default", "tolerance", "svd", "bf16"])
@pytest.mark.parametrize("setting", ["dtype", "device"])
def test_torchs_defaults_for_new_tensors_do_not_reach_the_state(device, kind, setting):
    """Guards against state in fp64, or on another device, by set_default_dtype or set_default_device."""
    runs = []
    for changed in (False, True):
        w, b = weight(kind, device), bias(device)
        groups = [
            {"params": [w], "rank": 6, **KINDS[kind][2]},
            {"params": [b], "state_dtype": torch.bfloat16},
        ]
        opt = GaLoreAdamW(groups, lr=0.05)
        gradients = [[gradient_like(p, step) for p in (w, b)] for step in range(5)]
        try:
            if changed and setting == "dtype":
                torch.set_default_dtype(torch.float64)
            if changed and setting == "device":
                torch.set_default_device("meta")
            for w.grad, b.grad in gradients:
                opt.step()
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        runs.append(snapshot(opt)[:2])
    assert same(*runs)


@pytest.mark.parametrize("rank", [None, 4])
def test_uninitialized_parameters(rank):
    """Guards against a lazy layer whose shape decides nothing, or a plain one that torch would take."""
    layer = torch.nn.LazyLinear(12)
    if rank is None:
        opt = GaLoreAdamW(layer.parameters())
        layer(torch.ones(2, 16)).sum().backward()
        opt.step()
        assert opt.state[layer.weight]["exp_avg"].shape == (12, 16)
    else:
        with pytest.raises(ValueError, match="uninitialized"):
            GaLoreAdamW([{"params": layer.parameters(), "rank": rank}])


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"]
)
def test_groups_added_to_a_copy_have_the_constructors_keys(clone):
    """Guards against defaults that copies lose, so that a new group is plain or has other options."""
    opt = clone(GaLoreAdamW([weight("default")], lr=0.3, rank=5, update_proj_gap=7, scale=0.5))
    opt.add_param_group({"params": [weight("default")]})
    first, second = ({k: v for k, v in g.items() if k != "params"} for g in opt.param_groups)
    assert first == second
    assert (second["rank"], second["update_proj_gap"], second["scale"], second["lr"]) == (5, 7, 0.5, 0.3)


def test_parameters_are_freed_with_the_optimizer(device):
    """Guards against references that outlive it."""
    opt = optimizer("tolerance", weight("tolerance", device), bias(device))
    train(opt, params_of(opt), range(4))
    left = [weakref.ref(p) for p in params_of(opt)]
    del opt
    assert not any(ref() is not None for ref in left)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *(({"rank": None}, {"rank": 4}), ({"rank": 4}, {"rank": None}), ({"rank": 4}, {"rank": 20})),
        ({"rank": 4, "arithmetic": "bitsandbytes"}, {"rank": None}),
        ({"rank": 4, "proj_type": "std"}, {"proj_type": "left"}),
        ({"rank": 4, "proj_type": "full", "residual": "drop"}, {"proj_type": "std", "residual": "feedback"}),
    ],
    ids=str,
)
def test_change_to_another_kind_of_state_is_refused(device, before, after):
    """Guards against moments of one kind read as the other's: nothing is written, the parameter is named."""
    w, v = weight("default", device), weight("default", device)
    opt = GaLoreAdamW([{"params": [("v", v)]}, {"params": [("w", w)], **before}])
    train(opt, [v, w], range(2))
    state = snapshot(opt)[:2]
    opt.param_groups[1].update(after)
    set_gradients([v, w], 2)
    with pytest.raises(ValueError, match=f"state of w was made under another {next(iter(after))} than"):
        opt.step()
    assert same(snapshot(opt)[:2], state)
    opt.param_groups[1].update(before)
    opt.step()
