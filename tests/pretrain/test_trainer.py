"""One training step and validation against loops written out by hand and against transformers' own loss."""

import math
from importlib.util import find_spec

import pytest
import torch
from pretrain.data.corpus import load_corpus
from pretrain.errors import UserError
from pretrain.model import build_model, token_losses
from pretrain.schedule import lr_factor
from pretrain.trainer import Trainer
from tiny import tiny

import galore_rrf

OPTIMIZERS = {
    "adamw": {"name": "adamw"},
    "galore": {"name": "galore"},
    "galore by tolerance": {"name": "galore", "tolerance": 0.3},
    "published": {"name": "galore", "preset": "published", "update_proj_gap": 50},
    "galore_svd": {"name": "galore_svd", "update_proj_gap": 50},
    "lora": {"name": "lora"},
}
OTHERS = {
    "galore_torch": {"name": "galore_torch", "update_proj_gap": 3},
    "apollo": {"name": "apollo", "update_proj_gap": 3},
    "apollo_mini": {"name": "apollo_mini", "update_proj_gap": 3, "rank": 1},
    "muon": {"name": "muon"},
    "lion": {"name": "lion", "lr": 0.002},
    "sign": {"name": "sign", "lr": 0.002},
}


def skip_without_apollo(optimizer):
    """It is compared with, not needed."""
    if optimizer.get("name", "").startswith("apollo") and find_spec("apollo_torch") is None:
        pytest.skip("apollo-torch is not installed")


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "trainer"


@pytest.fixture(autouse=True)
def _made(folder):
    folder.mkdir(exist_ok=True)


def trainer_of(folder, **fields):
    config = tiny(folder, "unused", **fields)
    corpus = load_corpus(config)
    return Trainer(config, corpus), corpus


def test_steps_are_adamws(folder):
    """Guards against a wrong loss, schedule, clipping, rates or data order: the loop by hand, torch's AdamW."""
    trainer, _ = trainer_of(folder, optimizer={"name": "adamw", "weight_decay": 0.1}, batch=4, micro_batch=2)
    model = build_model(trainer.config)
    matrices = [p for n, p in model.named_parameters() if ("attn" in n or "mlp" in n) and p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    groups = [{"params": matrices, "lr": 0.01}, {"params": rest, "lr": 0.02}]
    optimizer = torch.optim.AdamW(groups, eps=1e-8, weight_decay=0.1, fused=False)
    length = trainer.config.sequence_length
    order = trainer._batches
    for step in range(4):
        windows = order(4 * step, 4)
        loss = model(
            input_ids=windows[:, :length], labels=windows[:, :length]
        ).loss  # of all but the last token
        logits = model(input_ids=windows[:, :length]).logits
        loss = torch.stack(
            [-logits[b, t].log_softmax(-1)[windows[b, t + 1]] for b in range(4) for t in range(length)]
        ).mean()
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, peak in zip(optimizer.param_groups, (0.01, 0.02), strict=True):
            group["lr"] = peak * lr_factor(trainer.config, step)
        optimizer.step()
        metrics = trainer.train_step()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert (metrics["lr"], metrics["plain_lr"]) == tuple(group["lr"] for group in optimizer.param_groups)
        assert metrics["tokens"] == (step + 1) * 4 * length
    for mine, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", (OPTIMIZERS | OTHERS).values(), ids=OPTIMIZERS | OTHERS)
def test_every_optimizer_learns(folder, optimizer):
    """Guards against an optimizer that is wired up wrongly: none of its parameters may stand still, loss must fall."""
    skip_without_apollo(optimizer)
    trainer, _ = trainer_of(folder, optimizer=optimizer, steps=40, clip_norm=1.0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    losses = [trainer.train_step()["loss"] for _ in range(40)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.3)
    assert losses[-1] < losses[0] - 1.0
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name
    frozen = [n for n, p in trainer.model.named_parameters() if not p.requires_grad]
    assert len(frozen) == (14 if optimizer["name"] == "lora" else 0)


def test_optimizers_are_what_their_names_say(folder):
    """Guards against a comparison of an optimizer with itself."""

    def built(**optimizer):
        return trainer_of(folder, optimizer=optimizer)[0].optimizer

    assert type(built(name="adamw")) is type(built(name="lora")) is torch.optim.AdamW
    ours = built(name="galore")
    published = built(preset="published", update_proj_gap=60)
    svd = built(name="galore_svd", scale=0.5, update_proj_gap=60)
    assert all(type(o) is galore_rrf.GaLoreAdamW for o in (ours, published, svd))
    keys = ("rank", "projector", "moments", "scale", "update_proj_gap", "lr")
    assert [ours.param_groups[0][k] for k in keys] == [4, "range_finder", "rotate", 1.0, 3, 0.01]
    assert [published.param_groups[0][k] for k in keys] == [4, "range_finder", "keep", 0.25, 60, 0.01]
    assert [svd.param_groups[0][k] for k in keys] == [4, "svd", "keep", 0.5, 60, 0.01]
    assert all(
        o.param_groups[1]["rank"] is None and o.param_groups[1]["lr"] == 0.02 for o in (ours, published, svd)
    )
    assert len(ours.param_groups[0]["params"]) == 14
    coded = built(name="adamw", state_dtype="8bit")
    assert type(coded) is galore_rrf.GaLoreAdamW
    assert [(g["rank"], g["state_dtype"], g["lr"]) for g in coded.param_groups] == [
        (None, torch.uint8, 0.01),
        (None, torch.uint8, 0.02),
    ]


def stepped(folder, steps=4, **optimizer):
    """A trainer after some steps, and for each of its parameters before: name, whether it is a matrix inside
    attention or MLP, value and the gradients of the steps; no clipping, rates constant."""
    fields = {"clip_norm": None, "warmup": 0, "final_lr": 1.0}
    trainer, _ = trainer_of(folder, optimizer=optimizer, **fields)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    grads = {name: [] for name in before}
    for _ in range(steps):
        trainer.train_step()
        for name, p in trainer.model.named_parameters():
            grads[name].append(p.grad.clone())
    inside = {n: ("attn" in n or "mlp" in n) and v.dim() == 2 for n, v in before.items()}
    return trainer, [(name, inside[name], before[name], grads[name]) for name in before]


def replayed(make, value, grads):
    """What an optimizer makes of a parameter, given its gradients."""
    p = torch.nn.Parameter(value.clone())
    optimizer = make([p])
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


class BySign:
    """Up where the gradient is negative, down where it is positive."""

    def __init__(self, params):
        self.p = params[0]

    def step(self):
        g = self.p.grad
        self.p.data = self.p.data + 0.002 * ((g < 0).float() - (g > 0).float())


class ByLion:
    """Lion's formula in the order of its paper's algorithm 1."""

    def __init__(self, params):
        self.p, self.m = params[0], 0.0

    def step(self):
        g = self.p.grad
        update = (0.9 * self.m + 0.1 * g).sign()
        self.p.data = self.p.data - 0.002 * update
        self.m = 0.99 * self.m + 0.01 * g


CONTROLS = {
    "muon": (0.01, lambda params: torch.optim.Muon(params, lr=0.01, weight_decay=0.0)),
    "lion": (0.002, ByLion),
    "sign": (0.002, BySign),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_are_their_rule_on_matrices_and_adamw_on_all_else(folder, name):
    """Guards against a control that is another rule, takes the wrong parameters, or mixes up the two rates."""
    lr, make = CONTROLS[name]
    trainer, parameters = stepped(folder, name=name, lr=lr, plain_lr=0.02)
    now = dict(trainer.model.named_parameters())
    assert sum(inside for _, inside, _, _ in parameters) == 14
    for parameter, inside, before, grads in parameters:
        rule = make if inside else lambda p: torch.optim.AdamW(p, lr=0.02, eps=1e-8, weight_decay=0.0)
        expected = replayed(rule, before, grads)
        torch.testing.assert_close(now[parameter].detach(), expected, rtol=1e-4, atol=2e-6)


def test_galore_torch_is_the_package_on_two_rates(folder):
    """Guards against a peer that gets other numbers than its own: each parameter by the published class alone."""
    from pretrain.peers import _published

    published = _published("galore_torch", "adamw", "AdamW", "")
    optimizer = {"name": "galore_torch", "update_proj_gap": 2, "lr": 0.01, "plain_lr": 0.02}
    trainer, parameters = stepped(folder, **optimizer)
    now = dict(trainer.model.named_parameters())
    keys = {"rank": 4, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std", "lr": 0.01}

    for parameter, inside, before, grads in parameters:

        def rule(params, inside=inside):
            group = {"params": params, **(keys if inside else {"lr": 0.02})}
            return published([group], eps=1e-8, no_deprecation_warning=True)

        torch.testing.assert_close(now[parameter].detach(), replayed(rule, before, grads), rtol=0, atol=0)


def test_a_peer_that_is_missing_is_named(folder, monkeypatch):
    """Guards against a traceback, or another optimizer in its place, where a package is not installed."""
    monkeypatch.setattr("pretrain.peers.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"apollo_torch is not installed: pip install --no-deps apollo-torch=="
    ):
        trainer_of(folder, optimizer=OTHERS["apollo"])


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulation_is_the_whole_batch(folder, micro_batch):
    """Guards against a loss or gradient that is scaled by the number of passes."""
    whole, _ = trainer_of(folder)
    parts, _ = trainer_of(folder, micro_batch=micro_batch)
    for _ in range(3):
        a, b = whole.train_step(), parts.train_step()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "bf16_mixed", "fp16_mixed"])
@pytest.mark.parametrize("optimizer", ["adamw", "galore", "lora"])
def test_precisions(folder, precision, optimizer):
    """Guards against a precision that trains in another one, or strays from fp32 by more than its rounding."""
    exact, _ = trainer_of(folder, optimizer={"name": optimizer})
    rough, _ = trainer_of(folder, optimizer={"name": optimizer}, precision=precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {p.dtype for p in rough.model.parameters()} == {dtype}
    first, rough_first = exact.train_step()["loss"], rough.train_step()["loss"]
    assert first != rough_first
    assert first == pytest.approx(rough_first, abs=0.01)
    for _ in range(10):
        exact_loss, rough_loss = exact.train_step()["loss"], rough.train_step()["loss"]
    assert rough._scaler.is_enabled() == (precision == "fp16_mixed")
    # The scaler of fp16 skips the first steps, until it has found its scale.
    assert exact_loss == pytest.approx(rough_loss, abs=0.1) or (
        precision == "fp16_mixed" and rough_loss < first - 0.5
    )


def test_activation_checkpointing_changes_nothing(folder):
    """Guards against other gradients, and against an option that does nothing."""
    saved = {}
    for checkpointing in (False, True):
        trainer, _ = trainer_of(folder, activation_checkpointing=checkpointing)
        count = 0

        def pack(t):
            nonlocal count
            count += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            saved[checkpointing] = (trainer.train_step()["loss"], trainer.train_step()["loss"])
        saved[checkpointing] += (count,)
    assert saved[True][:2] == pytest.approx(saved[False][:2], rel=1e-6)
    assert saved[True][2] != saved[False][2]


@pytest.mark.slow
def test_compiled(folder):
    """Guards against torch.compile of the model changing the training."""
    plain, _ = trainer_of(folder)
    compiled, _ = trainer_of(folder, compile=True)
    for _ in range(3):
        assert plain.train_step()["loss"] == pytest.approx(compiled.train_step()["loss"], rel=1e-4)
    assert plain.held_out_loss() == pytest.approx(compiled.held_out_loss(), rel=1e-4)
    assert plain.state_dict()["model"].keys() == compiled.state_dict()["model"].keys()


@pytest.mark.parametrize("eval_tokens", [1, 16, 17, 100])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_held_out_loss_is_the_mean_over_its_tokens(folder, eval_tokens, micro_batch):
    """Guards against means of means, tokens counted twice or left out, and training tokens among them."""
    trainer, corpus = trainer_of(folder, eval_tokens=eval_tokens, micro_batch=micro_batch)
    tokens = torch.from_numpy(corpus.held_out[: eval_tokens + 1].astype("int64"))
    total = 0.0
    for start in range(0, eval_tokens, 16):
        window = tokens[start : start + 17]
        logits = trainer.model(input_ids=window[None, :-1]).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert trainer.held_out_loss() == pytest.approx(total / eval_tokens, rel=1e-5)
    before = trainer.state_dict()["model"]["lm_head.weight"].clone()
    assert trainer.held_out_loss() == trainer.held_out_loss()
    assert torch.equal(before, trainer.model.lm_head.weight)


def test_a_loss_that_is_no_number_stops_before_the_weights_move(folder):
    """Guards against weights and checkpoints ruined by a divergence."""
    trainer, _ = trainer_of(folder)
    trainer.train_step()
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = math.nan
    before = trainer.model.model.embed_tokens.weight.clone()
    with pytest.raises(UserError, match=r"loss of step 2 is nan.*optimizer\.lr"):
        trainer.train_step()
    assert torch.equal(before, trainer.model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("model", "said"),
    [({"head_dimm": 4}, "Unknown field: model.head_dimm"), ({"num_key_value_heads": "x"}, "Invalid model")],
)
def test_fields_that_llama_has_not(folder, model, said):
    """Guards against a misspelt field of the model that is quietly ignored."""
    with pytest.raises(UserError, match=said):
        build_model(tiny(folder, "unused", model=model))


def test_attention_is_one_function_in_two_forms(folder):
    """Guards against a form that is not the one asked for, and one that sees tokens to come."""
    windows = torch.randint(60, (3, 17), generator=torch.Generator().manual_seed(1))
    losses = []
    for attention in ("sdpa", "eager"):
        model = build_model(tiny(folder, "unused", attention=attention))
        assert model.config._attn_implementation == attention
        losses.append(token_losses(model, windows))
    torch.testing.assert_close(losses[1], losses[0])
    later = windows.clone()
    later[:, 9:] = (later[:, 9:] + 1) % 60
    torch.testing.assert_close(token_losses(model, later).view(3, -1)[:, :8], losses[1].view(3, -1)[:, :8])
