"""Look-ahead on and off: one table, quick.

    OMP_WAIT_POLICY=passive python -m benchmarks.look_ahead [--page docs/range_finders.md]

On and off in turn, medians: wall-clock milliseconds, and the processor time of all threads, which other programs
on the machine disturb less, if threads that wait do so asleep: hence OMP_WAIT_POLICY.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.range_finders import put_into_page
from benchmarks.timing import table
from galore_rrf import adaptive_range_finder

# Rows, columns, rank, block: to full rank, and to a quarter of it.
CASES = ((512, 512, 512, 64), (1024, 1024, 1024, 128), (2048, 2048, 512, 128))


def look_ahead(rounds: int = 7) -> str:
    rows: list[tuple[str, ...]] = []
    for m, n, rank, block in CASES:
        a = torch.randn(m, n)
        times: dict[tuple[int, bool], list[tuple[float, float]]] = {}
        for round_ in range(rounds + 1):
            for threads, ahead in ((1, False), (1, True), (2, False), (2, True)):
                torch.set_num_threads(threads)
                start = time.perf_counter(), time.process_time()
                adaptive_range_finder(
                    a, 0.0, sketch="plain", method="right_looking", block=block, max_rank=rank,
                    trim=False, implicit=True, look_ahead=ahead,
                )  # fmt: skip
                took = 1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1])
                if round_ > 0:
                    times.setdefault((threads, ahead), []).append(took)
        wall, processor = (
            {key: statistics.median(sample[i] for sample in samples) for key, samples in times.items()}
            for i in (0, 1)
        )
        for threads in (1, 2):
            off, on = (threads, False), (threads, True)
            rows.append((
                f"{m} x {n}", str(rank), str(block), str(threads), f"{wall[off]:.0f}", f"{wall[on]:.0f}",
                f"{processor[off]:.0f}", f"{processor[on]:.0f}", f"{processor[on] / processor[off]:.2f}",
            ))  # fmt: skip
    header = ("matrix", "rank", "block", "threads", "off, ms", "on, ms", "off, processor ms", "on", "ratio")
    return table(header, rows)


def main(page: Path | None = None) -> None:
    torch.manual_seed(0)
    found = look_ahead()
    torch.set_num_threads(2)
    print(f"\nLook-ahead, plain sketches\n\n{found}", flush=True)
    if page is not None:
        put_into_page(page, {"look_ahead": found})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the table into this Markdown page")
    main(**vars(parser.parse_args()))
