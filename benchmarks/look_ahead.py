"""Look-ahead on and off: one table, quick.

    python -m benchmarks.look_ahead [--page docs/range_finders.md]

Wall-clock milliseconds, on and off in turn; beside them the processor time of all threads, which other
programs on the machine disturb less: on n cores nothing takes less than an n-th of it.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.range_finders import put_into_page
from benchmarks.timing import interleaved, table
from galore_rrf import adaptive_range_finder

# Rows, columns, rank, block: to full rank, and to a quarter of it.
CASES = ((512, 512, 512, 64), (1024, 1024, 1024, 128), (2048, 2048, 512, 128))


def processor_ms(work: partial[object], rounds: int) -> float:
    start = time.process_time()
    for _ in range(rounds):
        work()
    return 1e3 * (time.process_time() - start) / rounds


def look_ahead(rounds: int = 5) -> str:
    rows: list[tuple[str, ...]] = []
    for m, n, rank, block in CASES:
        a = torch.randn(m, n)
        work = {
            ahead: partial(
                adaptive_range_finder, a, 0.0, sketch="plain", method="right_looking", block=block,
                max_rank=rank, trim=False, implicit=True, look_ahead=ahead,
            )
            for ahead in (False, True)
        }  # fmt: skip
        ms = interleaved(work, rounds)
        cpu = {ahead: processor_ms(run, 3) for ahead, run in work.items()}
        rows.append((
            f"{m} x {n}", str(rank), str(block), f"{ms[False]:.0f}", f"{ms[True]:.0f}",
            f"{ms[True] / ms[False]:.2f}", f"{cpu[False]:.0f}", f"{cpu[True]:.0f}",
        ))  # fmt: skip
    return table(("matrix", "rank", "block", "off, ms", "on, ms", "ratio", "off, processor ms", "on"), rows)


def main(page: Path | None = None) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    found = look_ahead()
    print(f"\nLook-ahead, plain sketches, {torch.get_num_threads()} threads\n\n{found}", flush=True)
    if page is not None:
        put_into_page(page, {"look_ahead": found})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the table into this Markdown page")
    main(**vars(parser.parse_args()))
