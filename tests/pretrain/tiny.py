"""A run of seconds: what the tests of whole runs share."""

import random

import torch
from pretrain.checkpoints import Checkpoints
from pretrain.command_line import checked, merged

TEXT = "the subspace of a gradient turns slowly while its moments follow and weights descend"

FIELDS = {
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "optimizer": {"rank": 4, "lr": 0.01, "plain_lr": 0.02, "update_proj_gap": 3},
    "sequence_length": 16,
    "batch": 4,
    "steps": 8,
    "held_out": 0.2,
    "eval_every": 4,
    "eval_tokens": 100,
    "save_every": 3,
    "threads": 1,
    "device": "cpu",
}


def text_file(folder):
    """A few thousand words with structure to learn."""
    path = folder / "text.jsonl"
    if not path.exists():
        choose = random.Random(0)
        lines = (" ".join(choose.choices(TEXT.split(), k=40)) for _ in range(200))
        path.write_text("".join(f'{{"text": "{line}."}}\n' for line in lines))
    return path


def tiny(folder, name, **fields):
    """The configuration of a run in `folder` / `name`."""
    base = {
        **FIELDS,
        "data": [str(text_file(folder))],
        "cache": str(folder / "cache"),
        "out": str(folder / name),
    }
    return checked(merged(base, fields))


def final_state(out):
    return Checkpoints(out / "checkpoints", 1).load_newest(lambda line: None)


def assert_same(a, b, where="state"):
    """Equal to the bit, tensors within any nesting."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where
