"""What takes a torch optimizer takes this one: schedulers, hooks, GradScaler, zero_grad, new groups."""

import copy
import inspect
import warnings

import pytest
import torch
from torch.optim import AdamW, lr_scheduler
from training import KINDS, bias, gradient, optimizer, params_of, same, snapshot, train, weight

from galore_rrf import GaLoreAdamW, param_groups


def test_signature_begins_as_torch_adamws():
    """Guards against an argument of torch.optim.AdamW that is missing, moved or has another default."""
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (GaLoreAdamW, AdamW))
    for name, parameter in theirs.items():
        assert name in ours, name
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name
    assert list(ours)[: len(theirs)] == list(theirs)
    assert issubclass(GaLoreAdamW, AdamW)


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda s: 1 / (s + 1), lambda s: 1.0]),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_set_the_rate_of_every_step(make):
    """Guards against a rate fixed at construction: a run with a scheduler is one with rates set by hand."""
    w, b, v, c = weight("default"), bias(), weight("default"), bias()
    scheduled, by_hand = optimizer("default", w, b), optimizer("default", v, c)
    scheduler = make(scheduled)
    for step in range(6):
        for mine, theirs in zip(scheduled.param_groups, by_hand.param_groups, strict=True):
            theirs["lr"], theirs["betas"] = mine["lr"], mine["betas"]
        train(scheduled, [w, b], [step])
        train(by_hand, [v, c], [step])
        scheduler.step()
    assert same([w.detach(), b.detach()], [v.detach(), c.detach()])
    assert len({float(g["lr"]) for g in scheduled.param_groups}) >= 1
    assert scheduled.param_groups[0]["lr"] != 0.05


def test_reduce_on_plateau():
    """Guards against a scheduler that reads the optimizer otherwise."""
    opt = optimizer("default", weight("default"), bias())
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for loss in (1.0, 2.0, 3.0):
        train(opt, params_of(opt), [0])
        scheduler.step(loss)
    assert opt.param_groups[0]["lr"] < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_rate_equals_the_same_number(kind):
    """Guards against a tensor rate being rounded, or refused where torch takes it."""
    results = []
    for lr in (0.0625, torch.tensor(0.0625)):
        w = weight(kind)
        opt = GaLoreAdamW([{"params": [w], "rank": 6, **KINDS[kind][2]}], lr=lr)
        train(opt, [w], range(3))
        results.append(w.detach().clone())
    assert same(*results)


def test_step_hooks_run_around_every_step():
    """Guards against a step that torch has not wrapped."""
    calls = []
    opt = optimizer("default", weight("default"), bias())
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda o, *_: calls.append(int(o.state[params_of(o)[0]]["step"])))
    train(opt, params_of(opt), range(2))
    assert calls == ["before", 1, "before", 2]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    """Guards against gradients that survive, or that are replaced where torch zeroes them."""
    w, b = weight("default"), bias()
    opt = optimizer("default", w, b)
    train(opt, [w, b], [0])
    opt.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in (w, b))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_gradients_as_they_were(kind):
    """Guards against a step that uses gradients as its workspace: users log and accumulate them."""
    w, b = weight(kind), bias()
    opt = optimizer(kind, w, b)
    for step in range(4):
        w.grad = gradient(tuple(w.shape), step, w.dtype)
        opt.step()
        assert torch.equal(w.grad, gradient(tuple(w.shape), step, w.dtype))
        assert w.requires_grad
        assert w.grad_fn is None


def test_a_step_keeps_the_layout_of_weights():
    """Guards against channels_last weights turning contiguous."""
    w = weight("conv_channels_last")
    opt = GaLoreAdamW([{"params": [w], "rank": 6}])
    before = w.data_ptr()
    train(opt, [w], range(2))
    assert w.is_contiguous(memory_format=torch.channels_last)
    assert w.data_ptr() == before


def test_channels_last_trains_as_contiguous():
    """Guards against a convolution unfolded in the order of its memory."""
    results = []
    for kind in ("conv", "conv_channels_last"):
        w = weight(kind)
        opt = GaLoreAdamW([{"params": [w], "rank": 6, "update_proj_gap": 2}], lr=0.05)
        for step in range(5):
            g = gradient(tuple(w.shape), step)
            w.grad = g if kind == "conv" else g.to(memory_format=torch.channels_last)
            opt.step()
        results.append(w.detach().contiguous())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 5])
def test_groups_added_while_training_begin_at_their_own_step(rank):
    """Guards against a new group that disturbs the old one, or takes over its clock."""
    w, b, new = weight("default"), bias(), weight("default")
    opt, alone = optimizer("default", w, b), optimizer("default", weight("default"), bias())
    train(opt, [w, b], range(3))
    opt.add_param_group({"params": [("new", new)], "rank": rank, "lr": 0.1})
    train(opt, [w, b, new], range(3, 7))
    train(alone, params_of(alone), range(7))
    assert same(snapshot(opt)[0][:2], snapshot(alone)[0])
    assert opt.state[new]["step"].item() == 4
    assert ("basis" in opt.state[new]) == (rank is not None)


def test_frozen_weights_and_weights_without_gradients_stay():
    """Guards against decay of what takes no part in a step."""
    w, v = weight("default"), weight("default").requires_grad_(False)
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


def scaled_run(fused, kind, bad=(), steps=6, nonfinite="skip"):
    """Trains with a loss scaled by a power of two; the steps in `bad` have an infinite gradient."""
    w, b = weight(kind), bias()
    opt = optimizer(kind, w, b, fused=fused)
    opt.param_groups[0]["nonfinite"] = nonfinite
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    for step in range(steps):
        opt.zero_grad()
        g = [gradient(tuple(p.shape), step, p.dtype) for p in (w, b)]
        loss = sum((p * x).sum() for p, x in zip((w, b), g, strict=True))
        scaler.scale(loss).backward()
        if step in bad:
            b.grad[0] = float("inf")
        scaler.step(opt)
        scaler.update()
    return opt, scaler


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("kind", ["default", "svd", "tolerance", "stack"])
def test_scaled_loss_trains_as_the_loss(kind, fused):
    """Guards against projected weights that step along the scaled gradient."""
    w, b = weight(kind), bias()
    expected = optimizer(kind, w, b, fused=fused)
    train(expected, [w, b], range(6))
    opt, _ = scaled_run(fused, kind)
    assert same(snapshot(opt)[:2], snapshot(expected)[:2])


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("bad", [0, 2, 4], ids=["first", "between", "refresh"])
@pytest.mark.parametrize("kind", ["default", "svd", "tolerance", "stack"])
def test_step_that_the_scaler_found_infinite_is_skipped_whole(kind, bad, fused, nonfinite):
    """Guards against a refresh or a step from gradients that overflowed."""
    opt, scaler = scaled_run(fused, kind, bad=(bad,), steps=bad + 1, nonfinite=nonfinite)
    before, _ = scaled_run(fused, kind, steps=bad, nonfinite=nonfinite)
    assert scaler.get_scale() == 2.0**7
    w, v = params_of(opt)[0], params_of(before)[0]
    assert same(w.detach(), v.detach())
    assert same(dict(opt.state.get(w, {})), dict(before.state.get(v, {})))
    assert same(params_of(opt)[1].detach(), params_of(before)[1].detach())


@pytest.mark.parametrize("fused", [None, True])
def test_infinite_projected_gradient_under_a_scaler_with_raise(fused):
    """Guards against FloatingPointError where the scaler takes care of overflow itself."""
    w, b = weight("default"), bias()
    opt = optimizer("default", w, b, fused=fused)
    opt.param_groups[0]["nonfinite"] = "raise"
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        opt.zero_grad()
        scaler.scale((w * gradient(tuple(w.shape), step)).sum() + b.sum()).backward()
        if step == 1:
            w.grad[2, 2] = float("inf")
        scaler.step(opt)
        scaler.update()
    assert opt.state[w]["step"].item() == 2
    assert scaler.get_scale() == 2.0


def test_unscaled_by_hand_is_not_unscaled_again():
    """Guards against clipped gradients being divided by the scale twice."""
    results = []
    for fused in (None, True):
        w, b = weight("default"), bias()
        opt = optimizer("default", w, b, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            opt.zero_grad()
            scaler.scale((w * gradient(tuple(w.shape), step)).sum() + b.sum()).backward()
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_([w, b], 1.0)
            scaler.step(opt)
            scaler.update()
        results.append(w.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


# --- Models -------------------------------------------------------------------------------------------


def test_one_line_change_trains_a_model():
    """Guards against the line that the documentation shows not working."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(24, 24), "norm": torch.nn.LayerNorm(24)})
    opt = GaLoreAdamW(param_groups(model, rank=6), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    x = torch.randn(64, 24)
    losses = []
    for _ in range(60):
        opt.zero_grad(set_to_none=True)
        loss = ((model["norm"](model["mlp"](x)) - x.roll(1, 1)) ** 2).mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_autocast_and_averaged_models():
    """Guards against torch.autocast reaching the step's own products, or a copy of the model training it."""
    results = []
    for cast in (False, True):
        w, b = weight("default"), bias()
        opt = optimizer("default", w, b)
        average = torch.optim.swa_utils.AveragedModel(torch.nn.ParameterList([w, b]))
        for step in range(6):
            w.grad, b.grad = gradient(tuple(w.shape), step), torch.ones_like(b)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
                opt.step()
        average.update_parameters(torch.nn.ParameterList([w, b]))
        results.append(snapshot(opt)[:2])
    assert same(*results)


def test_inference_tensors_and_modes():
    """Guards against a step that depends on the grad mode around it."""
    results = []
    for mode in (torch.enable_grad, torch.no_grad):
        opt = optimizer("tolerance", weight("tolerance"), bias())
        with mode():
            train(opt, params_of(opt), range(5))
        results.append(snapshot(opt))
    assert same(*results)


def test_threads_of_python_train_independently():
    """Guards against state shared between optimizers."""
    from concurrent.futures import ThreadPoolExecutor

    def run(_):
        opt = optimizer("default", weight("default"), bias())
        train(opt, params_of(opt), range(10))
        return snapshot(opt)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    assert all(same(r, results[0]) for r in results)


def test_copy_of_the_model_is_not_trained():
    """Guards against an optimizer that holds on to more than its parameters."""
    opt = optimizer("default", weight("default"), bias())
    train(opt, params_of(opt), range(2))
    twin = copy.deepcopy(params_of(opt)[0])
    before = twin.detach().clone()
    train(opt, params_of(opt), range(2, 4))
    assert same(twin.detach(), before)


def test_no_warnings_in_everyday_use():
    """Guards against noise in the default configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = optimizer("default", weight("default"), bias())
        train(opt, params_of(opt), range(12))
