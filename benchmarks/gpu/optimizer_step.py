"""The optimizer step of whole models in bf16: torch's fused AdamW, galore_torch, this package, the derived limit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.limits import Rates, adamw_limit, measured_rates, step_limit
from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.shapes import MODELS, TINY, Model, parameters, what_fits
from benchmarks.peers import galore_torch_adamw
from galore_rrf import GaLoreAdamW

NEVER = 10**9
# By the name of what the moments are kept in: the key, bytes an entry of projected and of plain ones.
MOMENTS: dict[str, tuple[torch.dtype | None, float, float]] = {
    "fp32": (None, 4.0, 2.0),  # plain ones are torch's own: in the dtype of the weights
    "bf16": (torch.bfloat16, 2.0, 2.0),
    "8-bit": (torch.uint8, 1 + 4 / 256, 1 + 4 / 256),
}
# The figures to reach at 1B, over fused AdamW and over the derived limit.
REACH = {
    ("fp32", False): "<= 1.25, 1.3",
    ("bf16", False): "<= 1, 1.3",
    ("8-bit", False): "<= -, 1.3",
    **{(moments, True): "<= -, 1.5" for moments in MOMENTS},
}
PUBLISHED = {  # seconds on an A100: APOLLO (Zhu et al. 2024), table 7
    "1B": "AdamW .036, APOLLO .051, GaLore .371",
    "7B": "AdamW .173, APOLLO .159, GaLore 2.874",
}


def measure(report: Report) -> None:
    for model in (TINY,) if report.quick else MODELS.values():
        rows = report.attempt(
            f"optimizer step, {model.name}", partial(_rows, report, model), 0 if report.quick else 60
        )
        published = PUBLISHED.get(model.name)
        notes = [
            "Weights, gradients and AdamW's moments in bf16. The limit is what a step must take at least: its "
            "products at the rates measured at their shapes, all else it moves over the measured bandwidth.",
            f"Published, A100, seconds: {published}." if published else "",
        ]
        report.add(f"Optimizer step, {model.name}, rank {model.rank}", rows, "\n".join(filter(None, notes)))


def _rows(report: Report, model: Model) -> list[Row]:
    rates = measured_rates(report, model)
    low_rank = model.moment_entries / model.entries
    bases = model.basis_entries / model.entries
    # AdamW's two bf16 moments; galore_torch's and our three: two moments and a bf16 basis.
    states = 4 + 4 * low_rank + 2 * bases + sum(2 * b * low_rank + 2 * bases for _, b, _ in MOMENTS.values())
    part = what_fits(model, states, report.device)
    if part != model:
        report.left_out.append(
            f"optimizer step, {model.name}: {model.layers - part.layers} of {model.layers} layers, for memory"
        )
    return _compare(report, part, rates)


def _compare(report: Report, model: Model, rates: Rates) -> list[Row]:
    projected, plain = parameters(model, report.device)
    fused = torch.optim.AdamW([*projected, *plain], lr=1e-6, fused=True)
    work: dict[str, Callable[[], object]] = {"torch AdamW, fused": fused.step}
    limits = {"torch AdamW, fused": adamw_limit(model, rates)}
    reach: dict[str, str] = {}
    if find_spec("galore_torch"):
        work["galore_torch, no refresh"] = _galore_torch(projected, plain, model.rank)
    else:
        report.left_out.append("galore_torch: not installed")
    for name, (state_dtype, moment_bytes, plain_bytes) in MOMENTS.items():
        opt = GaLoreAdamW(
            [{"params": projected, "rank": model.rank}, {"params": plain}], lr=1e-6, state_dtype=state_dtype
        )
        for refresh in (False, True):
            label = f"{name} moments, {'refresh in every step' if refresh else 'no refresh'}"
            work[label] = partial(_step, opt, 1 if refresh else NEVER)
            limits[label] = step_limit(model, rates, moment_bytes, plain_bytes, refresh)
            reach[label] = REACH[name, refresh] if model.name == "1B" else ""
    ms = report.measure(work, min(60.0, report.left() / 3))
    adamw = ms["torch AdamW, fused"]
    return [
        {
            f"{model.layers} layers": label,
            "ms": t,
            "over fused AdamW": t / adamw,
            "limit ms": limits.get(label),
            "over limit": t / limits[label] if label in limits else None,
            "reach": reach.get(label, ""),
        }
        for label, t in ms.items()
    ]


def _step(opt: GaLoreAdamW, gap: int) -> None:
    opt.param_groups[0]["update_proj_gap"] = gap
    opt.step()


def _galore_torch(projected: list[Tensor], plain: list[Tensor], rank: int) -> Callable[[], object]:
    """Its steps between refreshes, in random bases: finding its own takes an exact SVD of every matrix."""
    cls: Any = galore_torch_adamw()
    keys = {"rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    opt = cls([{"params": projected, **keys}, {"params": plain}], lr=1e-6, no_deprecation_warning=True)

    def random_factors(a: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        u, v = (torch.linalg.qr(torch.randn(n, rank, device=a.device))[0] for n in a.shape)
        return u, torch.ones(rank, device=a.device), v.mT

    with mock.patch("torch.linalg.svd", random_factors):
        opt.step()
    return opt.step
