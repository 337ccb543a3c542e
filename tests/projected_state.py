"""The arguments of projected_adamw_, and its steps beside those of the reference."""

import copy
import math

import torch
from matrices import UNIT_ROUNDOFF, assert_orthonormal, generator, layout

from galore_rrf import reference
from galore_rrf.ops import projected_adamw_

SKIPPED, DECAYED, STEPPED, REFRESHED = range(4)
RIGHT, LEFT = 0, 1
ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 0.03, "weight_decay": 0.2, "scale": 0.5}
MIXED = [
    ((24, 37), 6, LEFT),
    ((37, 24), 5, RIGHT),
    ((16, 16), 4, RIGHT),
    ((3, 14, 11), 3, RIGHT),
    ((2, 9, 21), 9, LEFT),
]
ALIKE = [*MIXED, *MIXED[:4], ((14, 11), 3, RIGHT), ((9, 21), 9, LEFT)]


class State:
    """The arguments of a list of parameters: weights and moments random, no basis yet."""

    asynchronous = None

    def __init__(self, parts, dtype=torch.float64, basis_dtype=None, strides="contiguous", device="cpu"):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        g = generator(11)
        self.params, self.exp_avgs, self.exp_avg_sqs, self.bases, self.steps = [], [], [], [], []
        self.sides, self.keys, self.strides = [side for _, _, side in parts], [], strides
        key = 3
        for (*batch, m, n), rank, side in parts:
            w = torch.randn(*batch, m, n, generator=g, dtype=torch.float64)
            self.params.append(layout(w.to(device, dtype), strides))
            moments = (*batch, m, rank) if side == RIGHT else (*batch, rank, n)
            self.exp_avgs.append(torch.zeros(moments, dtype=compute, device=device))
            self.exp_avg_sqs.append(torch.zeros(moments, dtype=compute, device=device))
            rows = n if side == RIGHT else m
            self.bases.append(torch.zeros(*batch, rows, rank, dtype=basis_dtype or compute, device=device))
            self.steps.append(torch.zeros((), dtype=torch.float32, device=device))
            self.keys.append(key)
            key += math.prod(batch) if batch else 1

    def grads(self, seed):
        """Gradients that resemble one another from step to step: a common part, then noise."""
        result = []
        for i, w in enumerate(self.params):
            common = torch.randn(w.shape, dtype=torch.float64, generator=generator(1000 + i))
            noise = torch.randn(w.shape, dtype=torch.float64, generator=generator(100 * seed + i))
            result.append(layout((common + 0.5 * noise).to(w.device, w.dtype), self.strides))
        return result

    def lists(self):
        return {k: getattr(self, k) for k in ("params", "exp_avgs", "exp_avg_sqs", "bases", "steps")}

    def step(self, function, grads, refreshes, coefficients=None, **options):
        if isinstance(refreshes, int):
            refreshes = [refreshes] * len(self.params)
        if function is projected_adamw_:
            options.setdefault("asynchronous", self.asynchronous)
        device = self.params[0].device
        grads = [g.to(device) for g in grads]
        coefficients = [r if r is None else r.to(device) for r in coefficients or [None] * len(grads)]
        with torch.no_grad():
            return function(
                self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.bases, self.steps,
                coefficients, self.sides, self.keys, refreshes,
                **{**ADAM, "seed": 5, **options},
            ).tolist()  # fmt: skip

    def copy(self):
        return copy.deepcopy(self)

    def on_cpu(self):
        """A copy where the reference runs."""
        twin = self.copy()
        for name, tensors in self.lists().items():
            setattr(twin, name, [t.cpu().clone() for t in tensors])
        return twin


def project(g, q, side):
    """R = G Q or Q^T G."""
    return g @ q if side == RIGHT else q.mT @ g


def assert_equal(x: State, y: State, accuracy=0.0, weight_accuracy=None, lists=None):
    for name in lists or x.lists():
        tolerance = weight_accuracy if name == "params" and weight_accuracy is not None else accuracy
        for a, b in zip(getattr(x, name), getattr(y, name), strict=True):
            torch.testing.assert_close(
                a.cpu(), b.cpu(), rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )


def follow(mine: State, accuracy, weight_accuracy=None, schedule=(0, -1, 1, -1, 2), **options):
    """Steps both and compares after every step."""
    theirs = mine.on_cpu()
    for number, refresh in enumerate(schedule):
        grads = mine.grads(number)
        before = [g.clone() for g in grads]
        outcomes = mine.step(projected_adamw_, grads, refresh, **options)
        assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))
        given = None
        # At the end of a step signs are those of the basis before.
        unsigned = refresh == 0 or options.get("refresh_at") != "end"
        if options.get("moments") == "keep" and refresh >= 0 and unsigned:
            probe = theirs.copy()
            probe.step(reference.projected_adamw_, grads, refresh, **options)
            for q, p in zip((q.cpu() for q in mine.bases), probe.bases, strict=True):
                signs = (q * p).sum(-2, keepdim=True).sign()
                torch.testing.assert_close(q * signs, p, rtol=0, atol=max(accuracy, 1e-9))
            theirs.bases = [q.cpu().clone() for q in mine.bases]
            given = [project(*x) for x in zip(grads, mine.bases, mine.sides, strict=True)]
        assert outcomes == theirs.step(reference.projected_adamw_, grads, refresh, given, **options)
        assert outcomes == [REFRESHED if refresh >= 0 else STEPPED] * len(outcomes)
        assert_equal(mine, theirs, accuracy, weight_accuracy)
    for q in mine.bases:
        if q.dtype in (torch.float32, torch.float64):
            assert_orthonormal(q.cpu(), UNIT_ROUNDOFF[q.dtype])
