"""What takes a torch optimizer takes this one: schedulers, hooks, GradScaler, zero_grad, new groups."""

import contextlib
import copy
import inspect
import warnings

import pytest
import torch
from torch.optim import AdamW, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from training import (
    KINDS,
    bias,
    gradient_like,
    optimizer,
    params_of,
    same,
    set_gradients,
    snapshot,
    train,
    weight,
)

from galore_rrf import GaLoreAdamW, param_groups

pytestmark = pytest.mark.core


def test_signature_begins_as_torch_adamws():
    """Guards against an argument of torch.optim.AdamW that is missing, moved or has another default."""
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (GaLoreAdamW, AdamW))
    for name, parameter in theirs.items():
        assert name in ours, name
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name
    assert list(ours)[: len(theirs)] == list(theirs)
    assert issubclass(GaLoreAdamW, AdamW)


SCHEDULERS = {
    lr_scheduler.LambdaLR: lambda o: lr_scheduler.LambdaLR(o, [lambda s: 1 / (s + 1), lambda s: 1.0]),
    lr_scheduler.MultiplicativeLR: lambda o: lr_scheduler.MultiplicativeLR(o, lambda s: 0.9),
    lr_scheduler.StepLR: lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    lr_scheduler.MultiStepLR: lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    lr_scheduler.ConstantLR: lambda o: lr_scheduler.ConstantLR(o, 0.1, 3),
    lr_scheduler.LinearLR: lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    lr_scheduler.ExponentialLR: lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    lr_scheduler.PolynomialLR: lambda o: lr_scheduler.PolynomialLR(o, 7, 2.0),
    lr_scheduler.CosineAnnealingLR: lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    lr_scheduler.CosineAnnealingWarmRestarts: lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    lr_scheduler.CyclicLR: lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    lr_scheduler.OneCycleLR: lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    lr_scheduler.ReduceLROnPlateau: lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    lr_scheduler.SequentialLR: lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    lr_scheduler.ChainedScheduler: lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    swa_utils.SWALR: lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_tested():
    """Guards against a scheduler that a new torch brings."""
    found = {c for c in vars(lr_scheduler).values() if isinstance(c, type)}
    found = {
        c for c in found if issubclass(c, lr_scheduler.LRScheduler) and not c.__name__.endswith("LRScheduler")
    }
    assert found == set(SCHEDULERS) - {swa_utils.SWALR}


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=[c.__name__ for c in SCHEDULERS])
def test_schedulers_set_the_rate_and_betas_of_every_step(device, make, tensor):
    """Guards against numbers fixed at construction: a scheduled run is one with torch.optim.AdamW's set by hand."""
    w, b, v, c = weight("default", device), bias(device), weight("default", device), bias(device)

    def rate():
        return {
            "lr": torch.tensor(0.05) if tensor else 0.05
        }  # a tensor given to the optimizer is all groups' own

    ours = GaLoreAdamW(
        [{"params": [w], "rank": 6, "update_proj_gap": 4, **rate()}, {"params": [b], **rate()}]
    )
    theirs = AdamW([{"params": [weight("default", device)], **rate()}, {"params": [bias(device)], **rate()}])
    by_hand = GaLoreAdamW([{"params": [v], "rank": 6, "update_proj_gap": 4}, {"params": [c]}])
    schedulers = [make(ours), make(theirs)]
    seen = []
    for step in range(9):
        for given, mine in zip(theirs.param_groups, by_hand.param_groups, strict=True):
            mine["lr"], mine["betas"] = copy.deepcopy(given["lr"]), given["betas"]
        seen.append([(float(g["lr"]), *g["betas"]) for g in ours.param_groups])
        assert seen[-1] == [(float(g["lr"]), *g["betas"]) for g in theirs.param_groups]
        for opt, params in ((ours, [w, b]), (theirs, params_of(theirs)), (by_hand, [v, c])):
            train(opt, params, [step])
        for scheduler in schedulers:
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([1.0] if plateau else []))
    assert len(set(map(tuple, seen))) > 1
    assert same([w.detach(), b.detach()], [v.detach(), c.detach()])
    assert same(dict(ours.state[w]), dict(by_hand.state[v]))


@pytest.mark.parametrize("cls", [lr_scheduler.CyclicLR, lr_scheduler.OneCycleLR], ids=lambda c: c.__name__)
def test_cycled_momentum_is_the_first_beta(device, cls):
    """Guards against the test above passing since betas never moved."""
    opt = optimizer("default", weight("default", device), bias(device))
    scheduler = SCHEDULERS[cls](opt)
    betas = set()
    for step in range(4):
        train(opt, params_of(opt), [step])
        scheduler.step()
        betas.add(opt.param_groups[0]["betas"])
    assert len({first for first, _ in betas}) > 2
    assert {second for _, second in betas} == {0.999}


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_rate_equals_the_same_number(device, kind):
    """Guards against a tensor rate being rounded, or refused where torch takes it."""
    results = []
    for lr in (0.0625, torch.tensor(0.0625)):
        w = weight(kind, device)
        opt = GaLoreAdamW([{"params": [w], "rank": 6, **KINDS[kind][2]}], lr=lr)
        train(opt, [w], range(3))
        results.append(w.detach().clone())
    assert same(*results)


def test_step_hooks_run_around_every_step(device):
    """Guards against a step that torch has not wrapped: an optimizer's own hooks, those of all, their results."""
    calls = []
    opt = optimizer("default", weight("default", device), bias(device))
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: "replaced"), {}))
    opt.register_step_post_hook(lambda o, *_: calls.append(int(o.state[params_of(o)[0]]["step"])))
    everywhere = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("any")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all")),
    ]
    for step in range(2):
        set_gradients(params_of(opt), step)
        assert opt.step(lambda: "given") == "replaced"
    for handle in everywhere:
        handle.remove()
    assert calls == ["any", "before", 1, "all", "any", "before", 2, "all"]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(device, set_to_none):
    """Guards against gradients that survive, or that are replaced where torch zeroes them."""
    w, b = weight("default", device), bias(device)
    opt = optimizer("default", w, b)
    train(opt, [w, b], [0])
    opt.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in (w, b))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_gradients_as_they_were(device, kind):
    """Guards against a step that uses gradients as its workspace: users log and accumulate them."""
    w, b = weight(kind, device), bias(device)
    opt = optimizer(kind, w, b)
    for step in range(4):
        w.grad = gradient_like(w, step)
        opt.step()
        assert torch.equal(w.grad, gradient_like(w, step))
        assert w.requires_grad
        assert w.grad_fn is None


def test_a_step_keeps_the_layout_of_weights(device):
    """Guards against channels_last weights turning contiguous."""
    w = weight("conv_channels_last", device)
    opt = GaLoreAdamW([{"params": [w], "rank": 6}])
    before = w.data_ptr()
    train(opt, [w], range(2))
    assert w.is_contiguous(memory_format=torch.channels_last)
    assert w.data_ptr() == before


def test_channels_last_trains_as_contiguous(device):
    """Guards against a convolution unfolded in the order of its memory."""
    results = []
    for kind in ("conv", "conv_channels_last"):
        w = weight(kind, device)
        opt = GaLoreAdamW([{"params": [w], "rank": 6, "update_proj_gap": 2}], lr=0.05)
        for step in range(5):
            g = gradient_like(w, step)
            w.grad = g if kind == "conv" else g.to(memory_format=torch.channels_last)
            opt.step()
        results.append(w.detach().contiguous())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 5])
def test_groups_added_while_training_begin_at_their_own_step(device, rank):
    """Guards against a new group that disturbs the old one, or takes over its clock."""
    w, b, new = weight("default", device), bias(device), weight("default", device)
    opt, alone = optimizer("default", w, b), optimizer("default", weight("default", device), bias(device))
    train(opt, [w, b], range(3))
    opt.add_param_group({"params": [("new", new)], "rank": rank, "lr": 0.1})
    train(opt, [w, b, new], range(3, 7))
    train(alone, params_of(alone), range(7))
    assert same(snapshot(opt)[0][:2], snapshot(alone)[0])
    assert opt.state[new]["step"].item() == 4
    assert ("basis" in opt.state[new]) == (rank is not None)


def test_frozen_weights_and_weights_without_gradients_stay(device):
    """Guards against decay of what takes no part in a step."""
    w, v = weight("default", device), weight("default", device).requires_grad_(False)
    opt = GaLoreAdamW([{"params": [w, v], "rank": 6}])
    before = w.detach().clone(), v.detach().clone()
    train(opt, [w], [0])
    opt.zero_grad()
    after = w.detach().clone()
    opt.step()
    assert same(v.detach(), before[1])
    assert same(w.detach(), after)
    assert not same(after, before[0])


def test_repr_names_the_subspace():
    """Guards against a log of the optimizer that leaves its rank out."""
    text = repr(optimizer("default", weight("default"), bias()))
    assert text.startswith("GaLoreAdamW (")
    assert "rank: 6" in text
    assert "update_proj_gap: 4" in text


# --- GradScaler ---------------------------------------------------------------------------------------


def scaled_run(device, fused, kind, bad=(), steps=6, nonfinite="skip"):
    """Trains with a loss scaled by a power of two; the steps in `bad` have an infinite gradient."""
    w, b = weight(kind, device), bias(device)
    opt = optimizer(kind, w, b, fused=fused)
    opt.param_groups[0]["nonfinite"] = nonfinite
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, growth_interval=1000)
    for step in range(steps):
        opt.zero_grad()
        g = [gradient_like(p, step) for p in (w, b)]
        loss = sum((p * x).sum() for p, x in zip((w, b), g, strict=True))
        scaler.scale(loss).backward()
        if step in bad:
            b.grad[0] = float("inf")
        scaler.step(opt)
        scaler.update()
    return opt, scaler


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("kind", ["default", "svd", "tolerance", "stack"])
def test_scaled_loss_trains_as_the_loss(device, kind, fused):
    """Guards against projected weights that step along the scaled gradient."""
    w, b = weight(kind, device), bias(device)
    expected = optimizer(kind, w, b, fused=fused)
    train(expected, [w, b], range(6))
    opt, _ = scaled_run(device, fused, kind)
    assert same(snapshot(opt)[:2], snapshot(expected)[:2])


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("bad", [0, 2, 4], ids=["first", "between", "refresh"])
@pytest.mark.parametrize("kind", ["default", "svd", "tolerance", "stack"])
def test_step_that_the_scaler_found_infinite_is_skipped_whole(device, kind, bad, fused, nonfinite):
    """Guards against a refresh or a step from gradients that overflowed."""
    opt, scaler = scaled_run(device, fused, kind, bad=(bad,), steps=bad + 1, nonfinite=nonfinite)
    before, _ = scaled_run(device, fused, kind, steps=bad, nonfinite=nonfinite)
    assert scaler.get_scale() == 2.0**7
    w, v = params_of(opt)[0], params_of(before)[0]
    assert same(w.detach(), v.detach())
    assert same(dict(opt.state.get(w, {})), dict(before.state.get(v, {})))
    assert same(params_of(opt)[1].detach(), params_of(before)[1].detach())


@pytest.mark.parametrize("fused", [None, True])
def test_infinite_projected_gradient_under_a_scaler_with_raise(device, fused):
    """Guards against FloatingPointError where the scaler takes care of overflow itself."""
    w, b = weight("default", device), bias(device)
    opt = optimizer("default", w, b, fused=fused)
    opt.param_groups[0]["nonfinite"] = "raise"
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
    for step in range(3):
        opt.zero_grad()
        scaler.scale((w * gradient_like(w, step)).sum() + b.sum()).backward()
        if step == 1:
            w.grad[2, 2] = float("inf")
        scaler.step(opt)
        scaler.update()
    assert opt.state[w]["step"].item() == 2
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("keys", [{"state_dtype": torch.bfloat16}, {"arithmetic": "galore_torch"}], ids=str)
def test_plain_parameters_that_torch_cannot_step_are_scaled_and_skipped_too(device, keys, fused):
    """Guards against the same where plain parameters are ours: a scaled gradient taken as it is, a clock that ran."""
    results = []
    for scale in (1.0, 2.0**8):
        b = bias(device)
        opt = GaLoreAdamW([{"params": [b], **keys}], lr=0.05, fused=fused)
        scaler = torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=1000)
        for step in range(4):
            opt.zero_grad()
            scaler.scale((b * gradient_like(b, step)).sum()).backward()
            if step == 1:
                b.grad[0] = float("nan")
            scaler.step(opt)
            scaler.update()
        assert opt.state[b]["step"].item() == 3
        results.append(snapshot(opt)[:2])
    assert same(*results)


def test_unscaled_by_hand_is_not_unscaled_again(device):
    """Guards against clipped gradients being divided by the scale twice."""
    results = []
    for fused in (None, True):
        w, b = weight("default", device), bias(device)
        opt = optimizer("default", w, b, fused=fused)
        scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
        for step in range(3):
            opt.zero_grad()
            scaler.scale((w * gradient_like(w, step)).sum() + b.sum()).backward()
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_([w, b], 1.0)
            scaler.step(opt)
            scaler.update()
        results.append(w.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


# --- Models -------------------------------------------------------------------------------------------


def test_one_line_change_trains_a_model(device):
    """Guards against the line that the documentation shows not working."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(24, 24), "norm": torch.nn.LayerNorm(24)}).to(device)
    opt = GaLoreAdamW(param_groups(model, rank=6), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    x = torch.randn(64, 24).to(device)
    losses = []
    for _ in range(60):
        opt.zero_grad(set_to_none=True)
        loss = ((model["norm"](model["mlp"](x)) - x.roll(1, 1)) ** 2).mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_autocast_does_not_reach_the_step(device):
    """Guards against torch.autocast casting the step's own products."""
    results = []
    for cast in (False, True):
        w, b = weight("default", device), bias(device)
        opt = optimizer("default", w, b)
        for step in range(6):
            w.grad, b.grad = gradient_like(w, step), torch.ones_like(b)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cast):
                opt.step()
        results.append(snapshot(opt)[:2])
    assert same(*results)


@pytest.mark.parametrize("decay", [None, 0.75], ids=["swa", "ema"])
def test_averaged_models(device, decay):
    """Guards against weights that are replaced, or a copy of the model that is trained: averages by hand."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 20)
    ).to(device)
    opt = GaLoreAdamW([{"params": model.parameters(), "rank": 5, "update_proj_gap": 3}], lr=0.02)
    averaging = {} if decay is None else {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(decay)}
    averaged = swa_utils.AveragedModel(model, **averaging)
    scheduler = swa_utils.SWALR(opt, 0.005, anneal_epochs=3)
    x = torch.randn(32, 20).to(device)
    average = None
    for count in range(6):
        opt.zero_grad()
        ((model(x) - x) ** 2).mean().backward()
        opt.step()
        scheduler.step()
        averaged.update_parameters(model)
        now = [p.detach().clone() for p in model.parameters()]
        share = 1 / (count + 1) if decay is None or count == 0 else 1 - decay
        average = now if average is None else [a + share * (p - a) for a, p in zip(average, now, strict=True)]
    torch.testing.assert_close([p.detach() for p in averaged.parameters()], average, rtol=1e-5, atol=1e-6)
    before = snapshot(opt)
    swa_utils.update_bn([x], averaged)
    assert averaged.module[1].num_batches_tracked == 1
    assert same(snapshot(opt), before)
    with torch.no_grad():
        averaged.eval()(x)


@pytest.mark.parametrize("kind", ["default", "tolerance", "svd"])
def test_step_after_every_gradient(device, kind):
    """Guards against a step that cannot run within backward: an optimizer a parameter, gradients freed at once."""

    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList(weight(kind, device) for _ in range(2))

        def forward(self, step):
            return sum((p * gradient_like(p, step + 7 * i)).sum() for i, p in enumerate(self.weights))

    models = Product(), Product()
    inside, outside = (
        {p: GaLoreAdamW([{"params": [p], "rank": 6, **KINDS[kind][2]}], lr=0.05) for p in m.parameters()}
        for m in models
    )

    def step_and_free(p):
        inside[p].step()
        inside[p].zero_grad()

    for p in inside:
        p.register_post_accumulate_grad_hook(step_and_free)
    for step in range(6):
        for model in models:
            model(step).backward()
        assert all(p.grad is None for p in inside)
        for p, opt in outside.items():
            opt.step()
            p.grad = None
    for p, q in zip(inside, outside, strict=True):
        assert same(p.detach(), q.detach())
        assert same(dict(inside[p].state[p]), dict(outside[q].state[q]))


def test_profiler_shows_the_step_by_name(device):
    """Guards against traces in which the optimizer's share cannot be told."""
    opt = optimizer("default", weight("default", device), bias(device))
    with torch.autograd.profiler.profile() as profile:
        train(opt, params_of(opt), range(2))
        opt.zero_grad()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#GaLoreAdamW.step"] == 2
    assert counts["Optimizer.zero_grad#GaLoreAdamW.zero_grad"] == 1
    assert counts["galore_rrf::projected_adamw_"] == 2


# --- torch.compile --------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    """torch._dynamo, forgetful, in which a recompilation is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["default", "tolerance", "svd", "published"])
def test_compiled_step_is_the_step(device, kind, compiler):
    """Guards against numbers burnt into a compiled step, and a compilation every time that a clock moves."""
    opt, compiled = (optimizer(kind, weight(kind, device), bias(device)) for _ in range(2))
    compiled_step = torch.compile(compiled.step, backend="eager")
    for step in range(14):
        set_gradients(params_of(opt), step)
        set_gradients(params_of(compiled), step)
        if step == 7:
            opt.param_groups[0]["lr"] = compiled.param_groups[0]["lr"] = 0.01
        opt.step()
        compiled_step()
    assert same(snapshot(opt), snapshot(compiled))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_compiled_training_step_trains(device, compiler):
    """Guards against a model that cannot be compiled together with its optimizer."""
    results = []
    for compile in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Tanh(), torch.nn.Linear(16, 24)).to(
            device
        )
        opt = GaLoreAdamW([{"params": model.parameters(), "rank": 4, "update_proj_gap": 3}], lr=0.01)

        @compile
        def train_step(x, model=model, opt=opt):
            opt.zero_grad()
            loss = ((model(x) - x) ** 2).mean()
            loss.backward()
            opt.step()
            return loss.detach()

        x = torch.randn(8, 24).to(device)
        results.append([train_step(x) for _ in range(8)] + snapshot(opt)[0])
    assert same(*results)


# --- Grad modes, threads, copies -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["default", "tolerance", "svd", "stack_tolerance"])
def test_grad_mode_around_a_step_changes_nothing(device, kind, mode):
    """Guards against a step, or a refresh, that needs autograd or is recorded by it; state serves any mode."""
    opt, other = (optimizer(kind, weight(kind, device), bias(device)) for _ in range(2))
    for step in range(8):
        for each in (opt, other):
            set_gradients(
                params_of(each)[:1], step
            )  # of plain ones made in inference mode torch's stays there
        opt.step()
        with mode() if step < 4 else contextlib.nullcontext():
            other.step()
        assert not any(
            p.requires_grad for s in other.state.values() for p in s.values() if torch.is_tensor(p)
        )
    assert same(snapshot(opt), snapshot(other))


def test_threads_of_python_train_independently(device):
    """Guards against state shared between optimizers."""
    from concurrent.futures import ThreadPoolExecutor

    def run(_):
        opt = optimizer("default", weight("default", device), bias(device))
        train(opt, params_of(opt), range(10))
        return snapshot(opt)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    assert all(same(r, results[0]) for r in results)


def test_copy_of_the_model_is_not_trained(device):
    """Guards against an optimizer that holds on to more than its parameters."""
    opt = optimizer("default", weight("default", device), bias(device))
    train(opt, params_of(opt), range(2))
    twin = copy.deepcopy(params_of(opt)[0])
    before = twin.detach().clone()
    train(opt, params_of(opt), range(2, 4))
    assert same(twin.detach(), before)


def test_no_warnings_in_everyday_use(device):
    """Guards against noise in the default configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = optimizer("default", weight("default", device), bias(device))
        train(opt, params_of(opt), range(12))
