"""Trains a tiny Llama by each of the Trainer's GaLore names and by hand, and prints, as JSON, what was found.

A program of its own, since `install` is for a whole process: started by test_galore_torch_install.py.
"""

import copy
import json
import math
import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.optimization import AdafactorSchedule
from transformers.utils import is_galore_torch_available

from galore_rrf.compat import galore_torch

STEPS, LR = 3, 0.01
KEYS = {"rank": 4, "update_proj_gap": 2, "scale": 0.5, "proj_type": "std"}
CLASSES = {
    "galore_adamw": (galore_torch.GaLoreAdamW, {}),
    "galore_adamw_8bit": (galore_torch.GaLoreAdamW8bit, {}),
    "galore_adafactor": (galore_torch.GaLoreAdafactor, {"scale_parameter": False, "relative_step": False}),
}
EXAMPLE = {"input_ids": [1, 5, 2, 7, 3, 11, 4, 13], "labels": [1, 5, 2, 7, 3, 11, 4, 13]}


def by_hand(model, cls, options):
    targets = [
        p for name, p in model.named_parameters() if p.dim() == 2 and ("attn" in name or "mlp" in name)
    ]
    rest = [p for p in model.parameters() if all(p is not q for q in targets)]
    opt = cls([{"params": rest}, {"params": targets, **KEYS}], lr=LR, **options)
    batch = {key: torch.tensor([value] * 2) for key, value in EXAMPLE.items()}
    for _ in range(STEPS):
        opt.zero_grad()
        model(**batch).loss.backward()
        opt.step()
    return model


def by_trainer(model, name, folder):
    args = TrainingArguments(
        folder,
        optim=name,
        optim_target_modules=["attn", "mlp"],
        optim_args=",".join(f"{key}={value}" for key, value in KEYS.items()),
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=[EXAMPLE] * 8)
    trainer.train()
    return trainer


def distance(a, b):
    """Euclidean, of all weights."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return math.sqrt(sum(float((p - q).detach().double().square().sum()) for p, q in pairs))


found = {}
sys.modules["galore_torch"] = None  # as if there were none
found["available"] = [is_galore_torch_available()]
galore_torch.install()
found["available"].append(is_galore_torch_available())

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,  # 4 x 16: the rank reaches the shorter side
)
start = LlamaForCausalLM(config)
with tempfile.TemporaryDirectory() as folder:
    for name, (cls, options) in CLASSES.items():
        expected = by_hand(copy.deepcopy(start), cls, options)
        for optim in (name, f"{name}_layerwise"):
            model = copy.deepcopy(start)
            try:
                trainer = by_trainer(model, optim, folder)
            except ValueError as error:
                found[optim] = str(error)
                continue
            found[optim] = distance(model, expected) / distance(start, expected)
            if optim == name:
                found[f"{name} class"] = (
                    getattr(trainer.optimizer, "optimizer", trainer.optimizer).__class__ is cls
                )

weight = torch.nn.Parameter(torch.ones(4, 4))
adafactor = galore_torch.GaLoreAdafactor([{"params": [weight], "rank": 2}])
schedule = AdafactorSchedule(adafactor)
weight.grad = torch.ones(4, 4)
adafactor.step()
schedule.step()
found["lr"] = float(schedule.get_last_lr()[0])  # .01 times the RMS of ones

print(json.dumps(found))
