"""The Trainer of transformers with `galore_optimizer`, against loops by hand and the Trainer's own AdamW."""

import json
import re
import subprocess
import sys

import finetune_hf
import huggingface_hub.constants
import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from training import same
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from galore_rrf import GaLoreAdamW
from galore_rrf.compat.huggingface import galore_optimizer

STEPS, WARMUP, ACCUMULATE, BATCH, LENGTH = 6, 2, 2, 4, 12
LR, PLAIN_LR, DECAY, BETAS, EPS, CLIP = 0.01, 0.02, 0.3, (0.8, 0.95), 1e-4, 0.1


def llama(seed=0):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    # Biases since decay leaves them out.
    return LlamaForCausalLM(LlamaConfig(**shape, attention_bias=True, mlp_bias=True))


def tokens():
    """(sequences, LENGTH), one for every place of the training."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(64, (STEPS * ACCUMULATE * BATCH, LENGTH), generator=generator)


def arguments(folder, **fields):
    base = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATE,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "linear",
        "warmup_steps": WARMUP,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**base, **fields})


def trainer(model, args, optimizer):
    data = [{"input_ids": ids, "labels": ids} for ids in tokens()]
    return Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=optimizer)


def trained_by_hand(model, bf16):
    """What the Trainer is to do."""
    named = dict(model.named_parameters())
    inside = [n for n, p in named.items() if p.dim() == 2 and ("self_attn" in n or "mlp" in n)]
    outside = ["model.embed_tokens.weight", "lm_head.weight"]
    vectors = [n for n, p in named.items() if p.dim() == 1]
    assert len(inside) + len(outside) + len(vectors) == len(named)
    opt = GaLoreAdamW(
        [
            {"params": [named[n] for n in inside], "rank": 4, "update_proj_gap": 2, "lr": LR},
            {"params": [named[n] for n in outside], "lr": PLAIN_LR},
            {"params": [named[n] for n in vectors], "lr": PLAIN_LR, "weight_decay": 0.0},
        ],
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAY,
    )
    peaks = [group["lr"] for group in opt.param_groups]
    batches = tokens().view(STEPS, ACCUMULATE, BATCH, LENGTH)
    for step in range(STEPS):
        for ids in batches[step]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(input_ids=ids).logits.float()
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            (loss / (ACCUMULATE * BATCH * (LENGTH - 1))).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        assert norm > CLIP
        for group, peak in zip(opt.param_groups, peaks, strict=True):
            group["lr"] = peak * min(step / WARMUP, (STEPS - step) / (STEPS - WARMUP))
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_trains_as_a_loop_by_hand(bf16, tmp_path):
    """Guards against arguments of the Trainer that do not reach the optimizer, and against groups, accumulation,
    clipping, autocast or schedules that act on it otherwise than they say."""
    expected = llama()
    trained_by_hand(expected, bf16)
    found = llama()
    args = arguments(tmp_path, bf16=bf16, train_sampling_strategy="sequential")
    optimizer = galore_optimizer(args, rank=4, update_proj_gap=2, plain_lr=PLAIN_LR)
    trainer(found, args, optimizer).train()
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def with_adapters():
    model = llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("make_model", [llama, with_adapters])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_at_full_rank_it_is_the_trainers_own_adamw(make_model, optim, tmp_path):
    """Guards against a change beyond the projection for who changes the one line: decay, fused kernels, frozen
    parameters beside adapters."""
    args = arguments(tmp_path, optim=optim)
    models = []
    for optimizer in (None, galore_optimizer(args, rank=48)):
        model = make_model()
        before = {n: p.clone() for n, p in model.named_parameters()}
        trainer(model, args, optimizer).train()
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
        models.append(model)
    assert same(models[1].state_dict(), models[0].state_dict())


@pytest.mark.parametrize("keys", [{}, {"state_dtype": torch.bfloat16}], ids=["fp32", "bf16"])
def test_resumed_training_is_the_same_to_the_bit(keys, tmp_path):
    """Guards against a subspace, moments or refresh clock that a checkpoint of the Trainer loses, in the middle
    of an interval of refreshes."""

    def train(seed, resume=None):
        model = llama(seed)
        args = arguments(tmp_path, save_strategy="steps", save_steps=3)
        t = trainer(model, args, galore_optimizer(args, rank=4, update_proj_gap=2, **keys))
        t.train(resume_from_checkpoint=resume)
        return model.state_dict(), t.optimizer.state_dict()

    whole = train(seed=0)
    resumed = train(seed=5, resume=str(tmp_path / "checkpoint-3"))
    assert resumed[1]["state"][0]["refreshes"] == 3
    assert same(resumed, whole)


def test_groups_keep_names_and_decay_as_the_trainer_does(tmp_path):
    """Guards against decay of what the Trainer spares, and against frozen or tied parameters that are projected."""
    model = llama()
    first, second = model.model.layers
    first.mlp.gate_proj.weight.requires_grad_(False)
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    # T5 has such a one: a matrix that Trainers do not decay.
    first.mlp.relative_bias = torch.nn.Parameter(torch.zeros(8, 8))
    args = arguments(tmp_path)
    own = trainer(model, args, None).create_optimizer()
    decay = {p: group["weight_decay"] for group in own.param_groups for p in group["params"]}

    optimizer = galore_optimizer(args, rank=4, include=("mlp",), plain_lr=PLAIN_LR)
    args.learning_rate = 0.5  # as a search of hyperparameters sets it
    found = trainer(model, args, optimizer).create_optimizer()
    groups = {n: group for group in found.param_groups for n in group["param_names"]}
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert groups.keys() == named.keys()
    assert {named[n]: group["weight_decay"] for n, group in groups.items()} == decay
    assert [n for n, group in groups.items() if group["rank"] == 4] == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.mlp.relative_bias",
    ]
    assert all(group["lr"] == (PLAIN_LR if group["rank"] is None else 0.5) for group in groups.values())


def test_wrong_values_are_told_before_the_trainer_is_made(tmp_path):
    """Guards against hours of preparing data that end in a wrong rank."""
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match=r"Invalid rank: -3 \(must be a positive integer or None\)"):
        galore_optimizer(args, rank=-3)
    with pytest.raises(ValueError, match="Invalid moments: 'rotated'"):
        galore_optimizer(args, rank=4, moments="rotated")


def test_the_package_imports_none_of_this():
    """Guards against seconds and dependencies that users of other trainers pay for."""
    code = "import sys, galore_rrf; print({'transformers', 'accelerate', 'lightning'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


class TestExample:
    """examples/finetune_hf.py"""

    @pytest.fixture
    def run(self, monkeypatch, capsys):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

        def run(*options):
            monkeypatch.setattr(sys, "argv", ["finetune_hf.py", *map(str, options)])
            finetune_hf.main()
            return capsys.readouterr().out

        return run

    def test_from_nothing_then_its_own_model_on_other_text(self, run, tmp_path):
        """Guards against an example that needs the network, or whose options do not work together."""
        first = tmp_path / "first"
        out = run("--out", first, "--steps", 4, "--batch", 2, "--length", 32)
        assert "made on the spot, random weights" in out
        assert "after 4 steps" in out
        state = torch.load(first / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
        assert any("basis" in parameter for parameter in state.values())
        text = tmp_path / "text.jsonl"
        text.write_text(
            "".join(json.dumps({"text": f"{i} and {i + 1} and so on"}) + "\n" for i in range(100))
        )
        second = ("--model", first, "--data", text, "--out", tmp_path / "second", "--length", 16, "--bf16")
        out = run(*second, "--steps", 4, "--batch", 2, "--accumulate", 2, "--lr", 0.01)
        losses = re.search(r"held-out loss: (\S+) before, (\S+) after 4 steps", out)
        before, after = map(float, losses.groups())
        assert after < before
        assert "after 8 steps" in run(*second, "--steps", 8, "--resume")

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (["--rank", "0"], "Invalid rank: 0 (must be a positive integer or None)"),
            (["--steps", "some"], "argument --steps: 'some' (must be a positive integer)"),
            (["--data", "absent.txt"], "cannot read --data absent.txt: "),
            (["--data", "no_text.jsonl"], 'no_text.jsonl: there is no "text" among words'),
            (["--data", "short.txt"], "--data has 0 sequences of 16 tokens (at least 10 are needed)"),
            (["--model", "absent/model", "--data", "short.txt"], "cannot load --model absent/model: "),
            (["--resume"], "there is no checkpoint in out to --resume from"),
        ],
    )
    def test_wrong_options_are_told_in_a_sentence(
        self, options, sentence, run, tmp_path, monkeypatch, capsys
    ):
        """Guards against tracebacks for what a person can mend."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "no_text.jsonl").write_text('{"words": "a b c"}\n')
        (tmp_path / "short.txt").write_text("a text of a few words, longer than a sequence of 16")
        with pytest.raises(SystemExit, match="2"):
            run(*options, "--out", "out", "--length", 16)
        assert sentence in capsys.readouterr().err.splitlines()[-1]
