"""The optimizer against independent references, step by step, over dtypes, shapes and options.

AdamW elementwise in a subspace is in general another method than AdamW on the matrix.  They coincide

- where the singular vectors of the gradients are coordinate axes: the basis then picks columns (or rows) out of
  the gradient, and the others have none;
- where eps is so large that the step is linear in the gradient, and the gradients lie in the subspace.

Both are compared with torch.optim.AdamW.  What is between them is compared with the readable step.
"""

import math

import pytest
import torch
from training import gradient, gradient_like, params_of, settled

from galore_rrf import GaLoreAdamW, reference

pytestmark = pytest.mark.core

SHAPES = {
    "tall": (24, 16),
    "wide": (16, 24),
    "square": (18, 18),
    "long": (40, 9),
    "stack": (3, 14, 12),
    "conv": (12, 3, 2, 2),
    "conv3d": (9, 2, 2, 2, 3),
}
RANK = 4


@pytest.fixture(autouse=True)
def exact_ranks(monkeypatch):
    """By tolerance the smallest rank, not its multiple of 8: these matrices are too small for several of those."""
    monkeypatch.setattr("galore_rrf.refresh._RANK_MULTIPLE", 1)


def matrices(x):
    """As the optimizer sees it: a matrix or a stack."""
    return x if x.dim() <= 3 else x.flatten(1)


def projects_right(shape, proj_type):
    m, n = shape if len(shape) <= 2 else shape[1:] if len(shape) == 3 else (shape[0], math.prod(shape[1:]))
    return {"right": True, "left": False, "std": m >= n, "reverse_std": m < n}[proj_type]


def orthonormal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64))[0]


def low_rank(shape, keys, axes, step):
    """An fp64 gradient of the group's rank whose row space (projected on the left: column space) is fixed.

    With `axes` its singular vectors there are coordinate axes, with a new order of singular values each step.
    """
    rank = keys["rank"]
    right = projects_right(shape, keys.get("proj_type", "std"))
    *stack, m, n = matrices(torch.empty(shape)).shape
    inner, outer = (n, m) if right else (m, n)
    if axes:
        chosen = torch.randperm(inner, generator=torch.Generator().manual_seed(5))[:rank]
        fixed = torch.eye(inner, dtype=torch.float64)[:, chosen].expand(*stack, inner, rank)
        values = 2.0 ** torch.randperm(rank, generator=torch.Generator().manual_seed(step))
        moving = orthonormal(*stack, outer, rank, seed=step) * values
    else:
        fixed = orthonormal(*stack, inner, rank, seed=5)
        generator = torch.Generator().manual_seed(step)
        moving = torch.randn(*stack, outer, rank, generator=generator, dtype=torch.float64)
    g = moving @ fixed.mT
    return (g if right else g.mT).reshape(shape)


def follow_adamw(device, shape, dtype, keys, options, axes, tolerance, steps=8):
    """Trains this optimizer and torch.optim.AdamW on the same gradients and compares after every step.

    A factor `scale` is one on torch's rate, with the same decay.
    """
    initial = gradient(shape, 99, dtype, device=device)
    ours_p, theirs_p = (torch.nn.Parameter(initial.clone()) for _ in range(2))
    ours = GaLoreAdamW([{"params": [ours_p], **keys}], **options)
    scale = keys.get("scale", 1.0)
    decay = options["weight_decay"] / scale
    theirs = torch.optim.AdamW([theirs_p], **{**options, "lr": options["lr"] * scale, "weight_decay": decay})
    for step in range(steps):
        g = low_rank(shape, keys, axes, step).to(device, dtype)
        ours_p.grad, theirs_p.grad = g, g.clone()
        ours.step()
        theirs.step()
        moved = (theirs_p - initial).norm()
        assert (ours_p - theirs_p).norm() <= tolerance * moved, step
    gap = keys.get("update_proj_gap", 10)
    assert settled(ours)[ours_p]["refreshes"] == 1 + (steps - 1) // gap


# --- Gradients along axes ------------------------------------------------------------------------------

# What orders a basis by singular values, so that its columns are axes.
ORDERED = {
    "oversampling": {"oversampling": 2, "update_proj_gap": 3},
    "every_step": {"oversampling": 2, "update_proj_gap": 1},
    "plain": {"oversampling": 3, "sketch": "plain", "update_proj_gap": 3},
    "power": {"oversampling": 2, "sketch": "power", "power": 2, "update_proj_gap": 3},
    "svd": {"projector": "svd", "update_proj_gap": 3},
    "svd_every_step": {"projector": "svd", "update_proj_gap": 1},
    "tolerance": {"tolerance": 1e-3, "update_proj_gap": 3},
    "keep": {"moments": "keep", "update_proj_gap": 50},
    "left": {"oversampling": 2, "update_proj_gap": 3, "proj_type": "left"},
    "right": {"oversampling": 2, "update_proj_gap": 3, "proj_type": "right"},
    "reverse_std": {"projector": "svd", "update_proj_gap": 2, "proj_type": "reverse_std"},
    "scale": {"projector": "svd", "update_proj_gap": 2, "scale": 0.25},
}
ADAM = {"lr": 0.05, "eps": 0.01, "weight_decay": 0.1}


@pytest.mark.parametrize("keys", ORDERED.values(), ids=ORDERED)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_along_axes_train_as_adamw(device, shape, keys):
    """Guards against any departure from AdamW's element: moments, corrections, eps, decay, and their rotation."""
    follow_adamw(device, shape, torch.float64, {"rank": RANK, **keys}, ADAM, axes=True, tolerance=1e-9)


@pytest.mark.parametrize("sketch", ["warm", "plain", "half_power", "power"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_column_trains_as_adamw(device, shape, sketch):
    """Guards against the same in a basis of one column, which needs no order; AdamW's own eps."""
    keys = {"rank": 1, "sketch": sketch, "update_proj_gap": 2}
    follow_adamw(device, shape, torch.float64, keys, {**ADAM, "eps": 1e-8}, axes=True, tolerance=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        *({"betas": (0.5, 0.7)}, {"betas": (0.0, 0.9)}, {"betas": (0.9, 0.0)}, {"eps": 1e-8}, {"eps": 1.0}),
        *({"maximize": True}, {"weight_decay": 0.0}, {"lr": torch.tensor(0.05, dtype=torch.float64)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adamws_options_mean_what_they_mean_to_adamw(device, dtype, options):
    """Guards against an argument of torch.optim.AdamW that projected groups read otherwise."""
    options = {**ADAM, "eps": 0.1, **options}
    # Quotients of rounding errors are bounded by eps alone; one column has none.
    keys = {"rank": RANK if options["eps"] > 1e-3 else 1, **ORDERED["oversampling"]}
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    follow_adamw(device, (24, 16), dtype, keys, options, axes=True, tolerance=tolerance)


# --- Steps linear in the gradient ------------------------------------------------------------------------

LINEAR = {
    "default": {"update_proj_gap": 3},
    "every_step": {"update_proj_gap": 1},
    "plain": {"sketch": "plain", "update_proj_gap": 2},
    "half_power": {"sketch": "half_power", "update_proj_gap": 2},
    "power": {"sketch": "power", "oversampling": 2, "update_proj_gap": 3},
    "svd": {"projector": "svd", "update_proj_gap": 3},
    "tolerance": {"tolerance": 1e-3, "update_proj_gap": 2},
    "left": {"proj_type": "left", "update_proj_gap": 3},
    "right": {"proj_type": "right", "update_proj_gap": 3},
    "reverse_std": {"proj_type": "reverse_std", "update_proj_gap": 3},
    "keep": {"moments": "keep", "update_proj_gap": 50},
    "scale": {"scale": 2.0, "update_proj_gap": 2},
    "seed": {"seed": 2**40, "update_proj_gap": 2},
}
VAST = 1e12  # eps beside which the root of the second moment vanishes, in fp64 too


@pytest.mark.parametrize("keys", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_linear_steps_within_the_subspace_are_adamws(device, shape, keys):
    """Guards against a projection, back-projection or rotation that loses part of the gradient it should keep."""
    options = {"lr": 0.05 * VAST, "eps": VAST, "weight_decay": 0.1 / VAST}
    follow_adamw(device, shape, torch.float64, {"rank": RANK, **keys}, options, axes=False, tolerance=1e-9)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_linear_steps_of_fp32_weights_are_adamws(device, shape, maximize):
    """Guards against the same in fp32, and in the other direction."""
    options = {"lr": 0.05 * VAST, "eps": VAST, "weight_decay": 0.1 / VAST, "maximize": maximize}
    follow_adamw(
        device, shape, torch.float32, {"rank": RANK, "update_proj_gap": 2}, options, False, tolerance=1e-4
    )


# --- The readable step -------------------------------------------------------------------------------------


class Readable:
    """GaLoreAdamW of one parameter on the CPU, around the readable step: options by keyword, defaults its own."""

    def __init__(self, p, key, *, lr, rank, gap=10, proj_type="std", projector="range_finder", tolerance=None,
                 betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, **options):  # fmt: skip
        self.p, self.key, self.rank, self.gap, self.lr, self.betas = p, key, rank, gap, lr, betas
        self.svd, self.tolerance = projector == "svd", tolerance
        self.options = {"scale": 1.0, "eps": eps, "weight_decay": weight_decay, **options}
        self.right = projects_right(p.shape, proj_type)
        self.t, self.refreshes, self.last = torch.tensor(0.0), 0, 0
        self.w = matrices(p)
        *stack, m, n = self.w.shape
        compute = torch.float64 if p.dtype == torch.float64 else torch.float32
        moments, rows = ((*stack, m, rank), n) if self.right else ((*stack, rank, n), m)
        self.m, self.v = (torch.zeros(moments, dtype=compute) for _ in range(2))
        self.basis = torch.zeros(*stack, rows, rank, dtype=p.dtype)

    def refresh_by_factorisation(self, g):
        """Exact or by tolerance: perhaps another rank."""
        a = g.mT if self.right else g
        if self.svd:
            basis = torch.linalg.svd(a.to(self.m.dtype), full_matrices=False)[0][..., : self.rank]
            basis = basis.to(self.p.dtype).to(self.m.dtype)  # as the state holds it
        else:
            found = reference.adaptive_range_finder(
                a, self.tolerance, max_rank=self.rank, key=self.key, refresh=self.refreshes
            )
            basis = found[0][..., : int(found[2].max())]
        r = basis.mT @ a.to(basis.dtype)
        r = r.mT if self.right else r
        if self.refreshes == 0:
            self.m, self.v = torch.zeros_like(r), torch.zeros_like(r)
        else:
            corrections = [1 - beta ** float(self.t) for beta in self.betas]
            side = 0 if self.right else 1
            self.m, self.v = reference.rotate_moments(
                self.m, self.v, self.basis.to(basis.dtype), basis, side, *corrections
            )
        self.basis = basis.to(self.p.dtype)
        return r

    @torch.no_grad()
    def step(self, grad):
        g, t = matrices(grad), int(self.t)
        due = self.refreshes == 0 or t - self.last >= self.gap
        apart = due and (self.svd or self.tolerance is not None)
        outcome = reference.projected_adamw_(
            *([self.w], [g]),
            coefficients=[self.refresh_by_factorisation(g) if apart else None],
            **{"exp_avgs": [self.m], "exp_avg_sqs": [self.v], "bases": [self.basis], "steps": [self.t]},
            **{"sides": [0 if self.right else 1], "keys": [self.key]},
            refreshes=[self.refreshes if due and not apart else -1],
            **{"lr": self.lr, "beta1": self.betas[0], "beta2": self.betas[1], **self.options},
        )
        assert outcome.item() == (reference.REFRESHED if due else reference.STEPPED)
        if due:
            self.refreshes, self.last = self.refreshes + 1, t
        self.p.copy_(self.w.reshape(self.p.shape))


def follow_readable(device, shapes, dtype, keys, options, tolerance, steps=7, strides=lambda x: x):
    """Trains a group of parameters and a `Readable` each and compares weights, bases' spans and clocks."""
    params = [torch.nn.Parameter(strides(gradient(s, 99, dtype, device=device))) for s in shapes]
    opt = GaLoreAdamW([{"params": params, "rank": RANK, **keys}], lr=0.05, eps=0.03, **options)
    renamed = {"gap" if k == "update_proj_gap" else k: v for k, v in keys.items()}
    readable, key = [], 0
    for p in params:
        copy = p.detach().cpu().clone(memory_format=torch.contiguous_format)
        readable.append(Readable(copy, key, lr=0.05, eps=0.03, **{"rank": RANK, **renamed, **options}))
        key += p.shape[0] if p.dim() == 3 else 1
    initial = [p.detach().clone().cpu() for p in params]
    for step in range(steps):
        for p, r in zip(params_of(opt), readable, strict=True):
            g = gradient_like(p, step)
            p.grad = strides(g)
            r.step(g.cpu())
        opt.step()
        settled(opt)
        for p, before, r in zip(params, initial, readable, strict=True):
            state = opt.state[p]
            moved = (r.p - before).double().norm()
            assert (p.detach().cpu() - r.p).double().norm() <= tolerance * moved, step
            assert [state[k] for k in ("rank", "refreshes", "last_refresh")] == [
                *(r.basis.shape[-1], r.refreshes, r.last)
            ]
            ours, theirs = ((q @ q.mT) for q in (state["basis"].cpu().double(), r.basis.double()))
            assert (ours - theirs).norm() <= 10 * tolerance * theirs.norm(), step


READABLE = {
    "default": ({}, {}),
    "gap": ({"update_proj_gap": 2}, {}),
    "every_step": ({"update_proj_gap": 1}, {"weight_decay": 0.0}),
    "plain": ({"sketch": "plain", "update_proj_gap": 3}, {"betas": (0.5, 0.7)}),
    "half_power": ({"sketch": "half_power", "update_proj_gap": 3, "seed": 9}, {"maximize": True}),
    "power": ({"sketch": "power", "power": 2, "update_proj_gap": 3}, {"weight_decay": 0.3}),
    "oversampling": ({"sketch": "plain", "oversampling": 3, "update_proj_gap": 3}, {}),
    "svd": ({"projector": "svd", "update_proj_gap": 3}, {}),
    "tolerance": ({"tolerance": 0.3, "rank": 7, "update_proj_gap": 3}, {}),
    "left": ({"proj_type": "left", "update_proj_gap": 3, "scale": 0.25}, {}),
    "reverse_std": ({"proj_type": "reverse_std", "update_proj_gap": 3, "arithmetic": "galore_torch"}, {}),
}


@pytest.mark.parametrize(("keys", "options"), READABLE.values(), ids=READABLE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_trains_as_the_readable_step(device, same_sketch, shape, keys, options):
    """Guards against sides, keys, clocks or options that the optimizer hands on wrongly."""
    follow_readable(device, [shape], torch.float64, keys, options, 1e-7)


@pytest.mark.parametrize("kind", ["default", "gap", "oversampling", "svd", "tolerance"])
@pytest.mark.parametrize("shape", ["tall", "wide", "stack", "conv"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-3), (torch.bfloat16, 0.05), (torch.float16, 0.05)],
    ids=["fp32", "bf16", "fp16"],
)
def test_narrow_weights_train_as_the_readable_step(device, same_sketch, dtype, tolerance, shape, kind):
    """Guards against roundings that the formulae do not have: bases in the weight's dtype, moments in fp32."""
    follow_readable(device, [SHAPES[shape]], dtype, *READABLE[kind], tolerance)


@pytest.mark.parametrize("kind", READABLE)
def test_a_group_of_all_shapes_trains_as_the_readable_step(device, same_sketch, kind):
    """Guards against test matrices that two parameters share, or lists that lose their order."""
    follow_readable(device, list(SHAPES.values()), torch.float64, *READABLE[kind], 1e-7)


@pytest.mark.parametrize("kind", ["default", "gap", "svd", "tolerance"])
@pytest.mark.parametrize("shape", ["tall", "wide", "stack", "conv"])
def test_transposed_memory_trains_as_the_readable_step(device, same_sketch, shape, kind):
    """Guards against strides of weights and gradients read as if contiguous."""
    follow_readable(
        device,
        *([SHAPES[shape]], torch.float64, *READABLE[kind], 1e-7),
        strides=lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    )
