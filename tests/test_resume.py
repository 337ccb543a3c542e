"""Runs that stop and resume, over every option of a subspace and every argument of AdamW.

test_checkpoint.py has the kinds of weights, and what is refused.
"""

import copy
from dataclasses import fields

import pytest
import torch
from torch.optim import lr_scheduler
from training import (
    bias,
    gradient,
    gradient_like,
    params_of,
    same,
    saved_and_loaded,
    settled,
    snapshot,
    train,
)

from galore_rrf import GaLoreAdamW
from galore_rrf.options import SubspaceOptions

pytestmark = pytest.mark.core

GAP = 3
# Other values than the default of every option.
OPTIONS = {
    "rank": [{"rank": 3}, {"rank": 11}],
    "update_proj_gap": [{"update_proj_gap": 1}, {"update_proj_gap": 5}],
    "schedule": [
        {"schedule": "staggered"},
        {"schedule": "staggered", "moments": "reset"},
        {"schedule": "adaptive", "update_proj_gap": 1},
    ],
    "basis_from": [
        {"basis_from": "average"},
        {"basis_from": "momentum"},
        {"basis_from": "average", "schedule": "adaptive"},
        {"basis_from": "momentum", "refresh_at": "end"},
    ],
    "scale": [{"scale": 0.25}],
    "proj_type": [
        {"proj_type": "reverse_std"},
        {"proj_type": "left"},
        {"proj_type": "right"},
        {"proj_type": "full"},
        {"proj_type": "full", "schedule": "adaptive", "update_proj_gap": 1},
    ],
    "projector": [{"projector": "svd"}, {"projector": "svd", "proj_type": "left"}],
    "sketch": [{"sketch": "plain"}, {"sketch": "half_power"}, {"sketch": "power"}],
    "power": [{"sketch": "power", "power": 0}, {"sketch": "power", "power": 2}],
    "oversampling": [{"oversampling": 3}, {"oversampling": 3, "sketch": "plain"}],
    "moments": [{"moments": "keep", "update_proj_gap": 50}, {"moments": "reset"}],
    "refresh_at": [
        {"refresh_at": "end"},
        {"refresh_at": "end", "projector": "svd"},
        {"refresh_at": "end", "tolerance": 0.3},
    ],
    "min_rank": [{"tolerance": 0.9, "min_rank": 3}],
    "tolerance": [{"tolerance": 0.4}, {"tolerance": 0.2, "proj_type": "reverse_std"}],
    "nonfinite": [{"nonfinite": "raise"}],
    "seed": [{"seed": 2**63 - 1}],
    "stochastic_rounding": [{"stochastic_rounding": True}],
    "residual": [
        {"residual": mode} for mode in ("scaled", "sign", "normalized", "orthogonalized", "feedback")
    ],
    "residual_scale": [{"residual": "sign", "residual_scale": 0.3}],
    "arithmetic": [{"arithmetic": "bitsandbytes"}, {"arithmetic": "galore_torch", "projector": "svd"}],
    "preset": [{"preset": "default"}, {"preset": "published"}, {"preset": "best"}],
    "state_dtype": [{"state_dtype": torch.bfloat16}, {"state_dtype": torch.uint8}],
}
ADAMW = [
    *({"maximize": True}, {"betas": (0.5, 0.7)}, {"eps": 0.01}, {"weight_decay": 0.0}, {"fused": True}),
    *({"foreach": True}, {"lr": torch.tensor(0.05)}, {"betas": (torch.tensor(0.5), torch.tensor(0.7))}),
]


def parameters(device):
    # The first is large enough for 8-bit moments.
    return [torch.nn.Parameter(gradient(s, 99, device=device)) for s in [(700, 16), (3, 12, 14)]] + [
        bias(device)
    ]


def make(params, keys, options):
    *projected, b = params
    return GaLoreAdamW(
        [{"params": projected, "rank": 6, "update_proj_gap": GAP, **keys}, {"params": [b]}],
        **{"lr": 0.05, "weight_decay": 0.1, **options},
    )


def check_resumed(device, keys, options, offset, resumed_keys):
    """Stops `offset` steps from the second refresh (for rare ones: early), resumes and compares to the bit."""
    gap = {"update_proj_gap": GAP, **({"update_proj_gap": 50} if "preset" in keys else {}), **keys}[
        "update_proj_gap"
    ]
    opt = make(parameters(device), {**keys, "update_proj_gap": gap}, copy.deepcopy(options))
    train(opt, params_of(opt), range(gap + offset))
    params = [torch.nn.Parameter(p.detach().clone()) for p in params_of(opt)]
    resumed = make(params, resumed_keys, {})
    resumed.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert same(snapshot(resumed), snapshot(opt))
    rest = range(gap + offset, gap + offset + min(gap, GAP) + 2)
    train(opt, params_of(opt), rest)
    train(resumed, params, rest)
    assert same(snapshot(resumed), snapshot(opt))
    refreshes = settled(opt)[params_of(opt)[0]]["refreshes"]
    assert refreshes >= 2


def test_every_option_is_resumed():
    """Guards against an option that joins the subspace and is not tested here."""
    assert set(OPTIONS) == {field.name for field in fields(SubspaceOptions)}


@pytest.mark.parametrize("offset", [-1, 0, 1], ids=["before", "at", "after"])
@pytest.mark.parametrize("keys", [keys for each in OPTIONS.values() for keys in each], ids=str)
def test_every_option_resumes_to_the_bit(device, keys, offset):
    """Guards against state, or a key of the group, that a checkpoint loses: the resumed run is made without it."""
    check_resumed(device, keys, {}, offset, {})


@pytest.mark.parametrize("offset", [-1, 0, 1], ids=["before", "at", "after"])
@pytest.mark.parametrize("options", ADAMW, ids=str)
def test_every_argument_of_adamw_resumes_to_the_bit(device, options, offset):
    """Guards against the same for torch's own options."""
    check_resumed(device, {"tolerance": 0.4} if "lr" in options else {}, options, offset, {})


@pytest.mark.parametrize("offset", [-1, 0, 1], ids=["before", "at", "after"])
def test_scheduled_and_scaled_run_resumes_to_the_bit(device, offset):
    """Guards against a resumed run whose scheduler or GradScaler meets another optimizer: skipped steps included."""

    def start(params):
        opt = make(params, {}, {"fused": True})
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**6, growth_interval=3)
        return opt, lr_scheduler.OneCycleLR(opt, 0.1, total_steps=30), scaler

    def run(opt, scheduler, scaler, steps):
        params = params_of(opt)
        for step in steps:
            opt.zero_grad()
            loss = sum((p * gradient_like(p, step)).sum() for p in params)
            scaler.scale(loss).backward()
            if step in (1, GAP + 1):
                params[0].grad[2, 3] = float("inf")
            scaler.step(opt)
            scaler.update()
            scheduler.step()

    first = start(parameters(device))
    run(*first, range(GAP + offset))
    second = start([torch.nn.Parameter(p.detach().clone()) for p in params_of(first[0])])
    for one, other in zip(first, second, strict=True):
        other.load_state_dict(saved_and_loaded(one.state_dict()))
    for each in (first, second):
        run(*each, range(GAP + offset, 9))
    assert same(snapshot(first[0]), snapshot(second[0]))
    assert first[2].get_scale() == second[2].get_scale()
    assert first[0].state[params_of(first[0])[0]]["step"].item() == 7
