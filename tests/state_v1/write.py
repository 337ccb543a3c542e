"""Wrote the files beside it: ``python tests/state_v1/write.py KIND``.

They stand for the checkpoints that users have and are not to be written again: a file that exists is an error.
The test that reads them takes the gradients from here.
"""

import copy
import sys
from math import prod
from pathlib import Path

import torch

from galore_rrf import GaLoreAdamW

# The weight's shape and dtype, the group's keys.
KINDS = {
    "fp32": ((12, 8), torch.float32, {}),
    "fp64": ((8, 12), torch.float64, {"sketch": "plain"}),
    "bf16": ((12, 8), torch.bfloat16, {}),
    "stack": ((2, 8, 6), torch.float32, {}),
    "tolerance": ((12, 8), torch.float32, {"tolerance": 0.3, "rank": 5}),
    "published": ((12, 8), torch.float32, {"preset": "published", "update_proj_gap": 3}),
    "8bit": ((2048, 3), torch.bfloat16, {"rank": 2, "state_dtype": torch.uint8}),
}
BEFORE, AFTER = 4, 4  # steps to the checkpoint and from it; a refresh falls into both


def gradient(shape, dtype, step):
    """A signal of rank 2 and a little noise, by a formula that gives the same on any machine."""
    *lead, n = shape
    row, column = (torch.arange(1, k + 1, dtype=torch.float64) for k in (prod(lead), n))
    signal = torch.outer(row.sin(), (2 * column).cos()) + torch.outer((3 * row).cos(), (5 * column).sin())
    noise = (7 * (step + 1) * torch.arange(1, prod(shape) + 1, dtype=torch.float64)).sin()
    return (signal.reshape(shape) + 0.05 * noise.reshape(shape)).to(dtype)


def train(opt, steps):
    for step in steps:
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = gradient(p.shape, p.dtype, step)
        opt.step()


def optimizer(weights, keys):
    w, b = weights
    groups = [
        {"params": [("mlp.weight", w)], "rank": 3, "update_proj_gap": 3, **keys},
        {"params": [("head.bias", b)], "state_dtype": keys.get("state_dtype")},
    ]
    return GaLoreAdamW(groups, lr=0.05, weight_decay=0.1)


def write(kind, path):
    shape, dtype, keys = KINDS[kind]
    weights = [torch.nn.Parameter(gradient(s, dtype, 99)) for s in (shape, (5,))]
    opt = optimizer(weights, keys)
    train(opt, range(BEFORE))
    # State dicts hold the optimizer's own tensors, which change.
    saved = {"state_dict": copy.deepcopy(opt.state_dict()), "weights": [p.detach().clone() for p in weights]}
    train(opt, range(BEFORE, BEFORE + AFTER))
    torch.save({**saved, "continued": [p.detach() for p in weights]}, path)


if __name__ == "__main__":
    target = Path(__file__).parent / f"{sys.argv[1]}.pt"
    if target.exists():
        raise SystemExit(f"{target} exists and stays as it is")
    write(sys.argv[1], target)
