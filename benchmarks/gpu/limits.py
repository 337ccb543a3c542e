"""What a step must take at least: what it moves over the bandwidth, and its products at the rate of their shapes.

Both are measured, in the same run as the steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import Model

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Rates:
    """Bytes a second of a copy, read and written; flops a second of a product, by what it is in a step."""

    bandwidth: float
    project: dict[tuple[int, int], float]
    back: dict[tuple[int, int], float]
    panel: dict[tuple[int, int], float]


def measured_rates(report: Report, model: Model) -> Rates:
    """Of a large copy; of bf16 G Q and of N Q^T added to the weight, and of fp32 Y^T Y, batched by shape."""
    device = report.device
    project, back, panel = {}, {}, {}
    r = model.rank
    for shape, count in model.matrices.items():
        m, n = max(shape), min(shape)
        batch = count if report.quick else 8
        g, q = (torch.randn(batch, *s, device=device).to(BF16) for s in ((m, n), (n, r)))
        steps = torch.randn(batch, m, r, device=device).to(BF16)
        y = torch.randn(batch, n, r, device=device)
        ms = report.measure(
            {
                "project": partial(torch.bmm, g, q),
                "back": partial(g.baddbmm_, steps, q.mT, alpha=1e-9),
                "panel": partial(torch.bmm, y.mT, y),
            },
            2.0,
        )
        project[shape] = 2 * batch * m * n * r / (1e-3 * ms["project"])
        back[shape] = 2 * batch * m * n * r / (1e-3 * ms["back"])
        panel[shape] = 2 * batch * n * r * r / (1e-3 * ms["panel"])
    return Rates(_bandwidth(report), project, back, panel)


def _bandwidth(report: Report) -> float:
    source = torch.empty(2**20 if report.quick else 2**28, dtype=FP32, device=report.device)
    copy = report.measure({"copy": partial(torch.empty_like(source).copy_, source)}, 2.0)["copy"]
    return 2 * source.nbytes / (1e-3 * copy)


def adamw_limit(model: Model, rates: Rates) -> float:
    """Milliseconds of AdamW on everything: seven bf16 entries a parameter, read or written."""
    return 1e3 * 7 * 2 * (model.layers * model.entries + model.plain_entries) / rates.bandwidth


def step_limit(
    model: Model, rates: Rates, moment_bytes: float, plain_moment_bytes: float, refresh: bool
) -> float:
    """Milliseconds of this optimizer's step.

    The products at the rates of their shapes, which have their reading and writing in them; the moments,
    read and written, and the projected gradient and step between the products (fp32 out, bf16 in), over the
    bandwidth.  A refresh with a warm start adds G^T (G Q) and G Q_new, the panel's QR (4 n r^2), the inner
    factor (2 m r^2 at most), and the rotation: 2 n r^2 for S and 2 m r^2 for each moment.
    """
    r = model.rank
    seconds = 0.0
    for shape, count in model.matrices.items():
        m, n = max(shape), min(shape)
        seconds += (
            count * 2 * m * n * r * ((3 if refresh else 1) / rates.project[shape] + 1 / rates.back[shape])
        )
        if refresh:
            seconds += count * (6 * n * r * r + 6 * m * r * r) / rates.panel[shape]
    moved = model.moment_entries * (4 * moment_bytes + 2 * (4 + 2))
    moved_plain = model.plain_entries * (3 * 2 + 4 * plain_moment_bytes)
    return 1e3 * (model.layers * (seconds + moved / rates.bandwidth) + moved_plain / rates.bandwidth)
