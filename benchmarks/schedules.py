"""Slowest over median optimizer step of each schedule, over the 56 matrices of the 60M Llama at an interval of 200."""

from __future__ import annotations

import time
from statistics import median

from benchmarks.llama_60m import RANK, parameters
from benchmarks.timing import table
from galore_rrf import GaLoreAdamW

GAP, ROUNDS = 200, 5


def step_seconds(schedule: str) -> list[float]:
    """Of every step of an interval, the quickest of all rounds: what else the machine does only slows a step."""
    group = {"params": parameters(), "rank": RANK, "schedule": schedule, "update_proj_gap": GAP}
    opt = GaLoreAdamW([group], lr=1e-3, weight_decay=0.0)
    opt.step()  # the first bases, all at once
    rounds: list[list[float]] = []
    for _ in range(ROUNDS):
        taken = []
        for _ in range(GAP):
            start = time.perf_counter()
            opt.step()
            taken.append(time.perf_counter() - start)
        rounds.append(taken)
    return [min(step) for step in zip(*rounds, strict=True)]


def main() -> None:
    rows = []
    for schedule in ("fixed", "staggered"):
        seconds = step_seconds(schedule)
        middle, slowest = median(seconds), max(seconds)
        rows.append((schedule, f"{1e3 * middle:.1f}", f"{1e3 * slowest:.1f}", f"{slowest / middle:.2f}"))
    print(table(("schedule", "median ms", "slowest ms", "ratio"), rows))


if __name__ == "__main__":
    main()
