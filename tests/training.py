"""What the tests of the optimizer share: gradients, steps, comparisons."""

import copy
import io

import torch

from galore_rrf import GaLoreAdamW
from galore_rrf.subspace import OPTION_NUMBERS, STATE_KEYS, compute_dtype, option_shapes, state_shapes

# Shape of the weight, its dtype, the group's keys: one of every way a subspace is found and used.
KINDS = {
    "default": ((24, 16), torch.float32, {"update_proj_gap": 4}),
    "fp64": ((12, 20), torch.float64, {"update_proj_gap": 3}),
    "plain_every_step": ((16, 24), torch.float32, {"update_proj_gap": 1, "sketch": "plain"}),
    "power": ((16, 24), torch.float32, {"update_proj_gap": 3, "sketch": "power", "oversampling": 2}),
    "published": ((24, 16), torch.float32, {"preset": "published", "update_proj_gap": 50}),
    "svd": ((24, 16), torch.float32, {"projector": "svd", "update_proj_gap": 3}),
    "tolerance": ((24, 16), torch.float32, {"tolerance": 0.4, "update_proj_gap": 3}),
    "reset": ((24, 16), torch.float32, {"moments": "reset", "update_proj_gap": 3}),
    "reset_tolerance": (
        (16, 24),
        torch.float32,
        {"moments": "reset", "tolerance": 0.4, "update_proj_gap": 3},
    ),
    "at_end": ((24, 16), torch.float32, {"refresh_at": "end", "update_proj_gap": 3}),
    "at_end_svd": ((24, 16), torch.float32, {"refresh_at": "end", "projector": "svd", "update_proj_gap": 3}),
    "at_end_tolerance": (
        (3, 12, 16),
        torch.float32,
        {"refresh_at": "end", "tolerance": 0.4, "min_rank": 3, "update_proj_gap": 3},
    ),
    "full_at_end": (
        (24, 16),
        torch.float32,
        {"proj_type": "full", "refresh_at": "end", "update_proj_gap": 3},
    ),
    "full_reset": ((24, 16), torch.float32, {"proj_type": "full", "moments": "reset", "update_proj_gap": 3}),
    "best": ((24, 16), torch.float32, {"preset": "best", "update_proj_gap": 3}),
    "sign": ((16, 24), torch.float32, {"residual": "sign", "update_proj_gap": 3}),
    "scaled_tolerance": (
        (24, 16),
        torch.float32,
        {"residual": "scaled", "tolerance": 0.4, "min_rank": 2, "update_proj_gap": 3},
    ),
    "normalized_stack": ((3, 12, 16), torch.float32, {"residual": "normalized", "update_proj_gap": 3}),
    "feedback": ((24, 16), torch.float32, {"residual": "feedback", "update_proj_gap": 3}),
    "bf16": ((24, 16), torch.bfloat16, {"update_proj_gap": 3}),
    "stack": ((3, 12, 16), torch.float32, {"update_proj_gap": 3}),
    "stack_tolerance": ((3, 12, 16), torch.float32, {"tolerance": 0.4, "update_proj_gap": 3}),
    "full": ((24, 16), torch.float32, {"proj_type": "full", "update_proj_gap": 3}),
    "full_stack": ((3, 12, 16), torch.float32, {"proj_type": "full", "update_proj_gap": 3}),
    "tucker": ((12, 8, 3, 3), torch.float32, {"proj_type": "tucker", "update_proj_gap": 3}),
    "conv": ((12, 3, 3, 3), torch.float32, {"update_proj_gap": 3}),
    "conv_channels_last": ((12, 3, 3, 3), torch.float32, {"update_proj_gap": 3}),
}

STEPPING_OUTSIDE = ("best", "sign", "scaled_tolerance", "normalized_stack")
"""Kinds whose residual makes a step too."""


def weight(kind, device="cpu"):
    """The weight of a kind, the same at every call."""
    shape, dtype, _ = KINDS[kind]
    p = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    if kind == "conv_channels_last":
        p = p.to(memory_format=torch.channels_last)
    return torch.nn.Parameter(p)


def bias(device="cpu"):
    return torch.nn.Parameter(torch.linspace(-1, 1, 5, device=device))


def optimizer(kind, w, b, **options):
    """A projected weight beside a plain one."""
    keys = {"rank": 6, **KINDS[kind][2]}
    return GaLoreAdamW([{"params": [("w", w)], **keys}, {"params": [("b", b)]}], lr=0.05, **options)


def gradient(shape, step, dtype=torch.float32, device="cpu"):
    """The gradient of a step: a low-rank signal that turns slowly, and noise."""
    generator = torch.Generator().manual_seed(1000 + step)
    if len(shape) < 2:
        return torch.randn(shape, generator=generator).to(device, dtype)
    fixed = torch.Generator().manual_seed(7)
    *lead, n = shape
    left = torch.randn(*lead, 3, generator=fixed) + 0.05 * step
    signal = left @ torch.randn(3, n, generator=fixed)
    return (signal + 0.3 * torch.randn(shape, generator=generator)).to(device, dtype)


def gradient_like(p, step):
    return gradient(tuple(p.shape), step, p.dtype, p.device)


def set_gradients(params, step):
    for p in params:
        p.grad = gradient_like(p, step)


def train(opt, params, steps):
    for step in steps:
        set_gradients(params, step)
        opt.step()


def params_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def settled(opt):
    """The state with what a GPU has counted: at a step nobody waits for that, but `state_dict` does."""
    opt.state_dict()
    return opt.state


def snapshot(opt):
    """Weights, state and groups, apart from the optimizer."""
    settled(opt)
    state = [
        {k: copy.deepcopy(v) for k, v in opt.state[p].items()} if p in opt.state else None
        for p in params_of(opt)
    ]
    groups = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in opt.param_groups]
    return [p.detach().clone() for p in params_of(opt)], state, groups


def same(a, b):
    """Equality to the bit, dtypes and keys included; NaN equals itself."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
            and torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def assert_same_on_a_cpu(a, b):
    """`same`; on a GPU to rounding, where a product of many matrices is made otherwise than those of fewer."""
    if isinstance(a, torch.Tensor) and "cuda" in (a.device.type, b.device.type):
        error = 0.02 if a.dtype in (torch.bfloat16, torch.float16) else 1e-5
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=error, atol=error)
    else:
        assert same(a, b)


def saved_and_loaded(state_dict):
    """Through torch.save and the loader that takes no arbitrary objects."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def check_state(p, state, rank):
    """The contract of a projected parameter's state; `rank` is the cap."""
    bases = [k for k in state if k.startswith("basis")]
    ints = STATE_KEYS[4:]
    of_options = {k: form for k, form in option_shapes(p).items() if k in state}
    numbers = [k for k in OPTION_NUMBERS if k in state]
    assert tuple(state) == (*STATE_KEYS[:3], *bases, *of_options, *ints, *numbers)
    assert all(type(state[k]) is (int if k == "interval" else float) for k in numbers)
    assert all(isinstance(state[k], torch.Tensor) for k in (*STATE_KEYS[:3], *bases, *of_options))
    assert all(type(state[k]) is int and state[k] >= 0 for k in ints)
    assert 1 <= state["rank"] <= rank
    moments, shapes = state_shapes(p, state["side"], state["rank"])
    assert list(shapes) == bases
    for key, shape, dtype in (
        *((key, moments, compute_dtype(p)) for key in STATE_KEYS[1:3]),
        *((key, shape, p.dtype) for key, shape in shapes.items()),
        *((key, shape, dtype) for key, (shape, dtype) in of_options.items()),
    ):
        assert (tuple(state[key].shape), state[key].dtype) == (shape, dtype), key
        assert state[key].is_contiguous(), key
        assert state[key].isfinite().all(), key
    assert (state["step"].shape, state["step"].dtype) == ((), torch.float32)
