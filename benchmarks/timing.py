"""Timing that a noisy machine cannot bend: everything compared runs in turn, medians are reported."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

K = TypeVar("K", bound=Hashable)
CPU = torch.device("cpu")


def milliseconds(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Of one run, on a GPU from the first kernel's turn on the current stream to the last one's end."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def interleaved(
    work: Mapping[K, Callable[[], object]],
    rounds: int,
    *,
    device: torch.device = CPU,
    seconds: float = math.inf,
) -> dict[K, float]:
    """Median milliseconds of each piece of work over `rounds` rounds of all of them, after one unmeasured.

    No round but the first begins once `seconds` are over.
    """
    start = time.perf_counter()
    for run in work.values():
        milliseconds(run, device)
    times: dict[K, list[float]] = {name: [] for name in work}
    for round_ in range(rounds):
        if round_ > 0 and time.perf_counter() - start > seconds:
            break
        for name, run in work.items():
            times[name].append(milliseconds(run, device))
    return {name: statistics.median(samples) for name, samples in times.items()}


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, aligned for reading in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, tuple("-" * w for w in widths), *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
    )
