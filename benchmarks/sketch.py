"""The Gaussian test matrix against torch.randn."""

from __future__ import annotations

import torch

from benchmarks.timing import interleaved, table
from galore_rrf.ops import gaussian_sketch

SIZES = ((512, 128), (1376, 128), (4096, 1024))


def main() -> None:
    rows = []
    for m, n in SIZES:
        ms = interleaved(
            {"ours": lambda m=m, n=n: gaussian_sketch(m, n, seed=0), "randn": lambda m=m, n=n: torch.randn(m, n)},
            51,
        )
        rows.append((f"{m} x {n}", f"{ms['ours']:.2f}", f"{ms['randn']:.2f}", f"{ms['randn'] / ms['ours']:.1f}", ">= 5"))
    print("\nGaussian test matrix, fp32\n")
    print(table(("shape", "gaussian_sketch ms", "torch.randn ms", "times faster", "reach"), rows))


if __name__ == "__main__":
    main()
