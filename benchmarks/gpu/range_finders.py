"""Range finders of square fp32 matrices: full rank with one queue and three, fixed rank, against torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.report import Report, Row
from galore_rrf import adaptive_range_finder, range_finder
from galore_rrf.ops import gaussian_sketch

SIZES, BLOCKS = (1024, 2048, 4096, 8192, 16384), (64, 128, 256)
RANKS = (128, 512, 1024)
LARGEST_SVD = 2048  # of larger ones torch.linalg.svd takes seconds
# Milliseconds of Penke and Herten 2026: full rank with one queue and three, fixed rank at 16384.
PUBLISHED_FULL = {1024: "6.45 / 7.45", 2048: "15.5 / 15.7", 4096: "43.2 / 37.2", 16384: "735 / 407"}
PUBLISHED_FIXED = {128: 12.7, 512: 30.1, 1024: 49.2}


def measure(report: Report) -> None:
    sizes, blocks, ranks = ((96, 160), (16, 32), (8, 16)) if report.quick else (SIZES, BLOCKS, RANKS)
    full: list[Row] = []
    for n in sizes:
        full += report.attempt(f"full rank, {n}", partial(_full_rank, report, n, blocks), n / 300)
    notes = "Published: 1 and 3 queues, the GPU of Penke and Herten 2026. Tolerance 0, right-looking, Householder."
    report.add("Range finder, full rank, square fp32", full, notes)
    n = max(sizes)
    fixed = report.attempt(f"fixed rank, {n}", partial(_fixed_rank, report, n, ranks), n / 300)
    notes = "QR of the sketch: torch.linalg.qr of an n x k matrix alone, without forming it from A."
    report.add(f"Range finder, fixed rank, {n} x {n} fp32", fixed, notes)


def _matrix(n: int, device: torch.device) -> Tensor:
    return torch.randn(n, n, generator=torch.Generator(device).manual_seed(0), device=device)


def _full_rank(report: Report, n: int, blocks: tuple[int, ...]) -> list[Row]:
    a = _matrix(n, report.device)
    find = partial(adaptive_range_finder, a, 0.0, trim=False, method="right_looking", sketch="plain")
    work: dict[str, Callable[[], object]] = {}
    for block in blocks:
        work[f"1 queue, b = {block}"] = partial(find, block=block, look_ahead=False)
        work[f"3 queues, b = {block}"] = partial(find, block=block, look_ahead=True)
    work["torch.linalg.qr"] = partial(torch.linalg.qr, a)
    if n <= LARGEST_SVD:
        work["torch.linalg.svd"] = partial(torch.linalg.svd, a, full_matrices=False)
    ms = report.measure(work, max(4.0, n / 800))
    return [
        {
            "n": n,
            **{"": name, "ms": t, "over torch.linalg.qr": t / ms["torch.linalg.qr"]},
            "published ms": PUBLISHED_FULL.get(n, "") if "queue" in name else "",
        }
        for name, t in ms.items()
    ]


def _fixed_rank(report: Report, n: int, ranks: tuple[int, ...]) -> list[Row]:
    a = _matrix(n, report.device)
    rows: list[Row] = []
    for k in ranks:
        y = a @ gaussian_sketch(n, k, seed=0, device=a.device, dtype=a.dtype)
        ms = report.measure(
            {
                "plain, basis": partial(range_finder, a, k, sketch="plain", coefficients=False),
                "plain, basis and coefficients": partial(range_finder, a, k, sketch="plain"),
                "half power, basis and coefficients": partial(range_finder, a, k),
                "torch.svd_lowrank(niter=2)": partial(torch.svd_lowrank, a, k, niter=2),
                "QR of the sketch": partial(torch.linalg.qr, y),
            },
            8.0,
        )
        rows += [
            {
                "k": k,
                **{"": name, "ms": t, "over svd_lowrank": t / ms["torch.svd_lowrank(niter=2)"]},
                "published ms": PUBLISHED_FIXED.get(k) if name == "plain, basis" else None,
            }
            for name, t in ms.items()
        ]
    return rows
