"""The Gaussian test matrix against torch.randn."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.timing import interleaved, table
from galore_rrf.ops import gaussian_sketch

SIZES = ((512, 128), (1376, 128), (4096, 1024))


def main() -> None:
    rows = []
    for m, n in SIZES:
        work = {"ours": partial(gaussian_sketch, m, n, seed=0), "randn": partial(torch.randn, m, n)}
        ms = interleaved(work, 51)
        ratio = ms["randn"] / ms["ours"]
        rows.append((f"{m} x {n}", f"{ms['ours']:.2f}", f"{ms['randn']:.2f}", f"{ratio:.1f}", ">= 5"))
    print("\nGaussian test matrix, fp32\n")
    print(table(("shape", "gaussian_sketch ms", "torch.randn ms", "times faster", "reach"), rows))


if __name__ == "__main__":
    main()
