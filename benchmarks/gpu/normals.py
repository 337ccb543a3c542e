"""Normal numbers: the test matrix against torch.randn and cuRAND's host interface."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.report import Report, Row
from galore_rrf.ops import gaussian_sketch

SHAPES = ((4096, 1024), (16384, 256), (16384, 4096))
PHILOX = 161  # CURAND_RNG_PSEUDO_PHILOX4_32_10


def measure(report: Report) -> None:
    rows: list[Row] = []
    for shape in ((64, 32),) if report.quick else SHAPES:
        rows += report.attempt(f"normals, {shape[0]} x {shape[1]}", partial(_rows, report, *shape), 5)
    notes = (
        "torch.randn on a GPU is cuRAND's device generator (curand_normal4, Philox) in torch's own kernel."
    )
    report.add("Normal numbers, fp32", rows, notes)


def _rows(report: Report, m: int, n: int) -> list[Row]:
    device = report.device
    work: dict[str, Callable[[], object]] = {
        "gaussian_sketch": partial(gaussian_sketch, m, n, seed=0, dtype=torch.float32, device=device),
        "torch.randn": partial(torch.randn, m, n, device=device),
    }
    if device.type == "cuda":
        work["curandGenerateNormal"] = _curand(m * n, device)
    ms = report.measure(work, 4.0)
    return [
        {
            "shape": f"{m} x {n}",
            **{"": name, "ms": t, "numbers / ns": m * n / (1e6 * t)},
            "over torch.randn": t / ms["torch.randn"],
        }
        for name, t in ms.items()
    ]


def _curand(count: int, device: torch.device) -> Callable[[], object]:
    """cuRAND's Philox on the current stream, from the library that torch has loaded."""
    curand = ctypes.CDLL("libcurand.so.10")
    generator = ctypes.c_void_p()
    _check(curand.curandCreateGenerator(ctypes.byref(generator), ctypes.c_int(PHILOX)))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    _check(curand.curandSetStream(generator, stream))
    _check(curand.curandSetPseudoRandomGeneratorSeed(generator, ctypes.c_ulonglong(0)))
    out = torch.empty(count, device=device)
    mean, deviation = ctypes.c_float(0), ctypes.c_float(1)
    arguments = (ctypes.c_void_p(out.data_ptr()), ctypes.c_size_t(count), mean, deviation)
    return lambda _out=out: _check(curand.curandGenerateNormal(generator, *arguments))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuRAND error {status}")
