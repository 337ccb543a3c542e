"""Convolutions: Tucker against unfolding at the same bytes of state, on images made up here.

``python -m benchmarks.convolutions`` (ten minutes on one core).  Four convolutions tell which of ten patterns an
image of noise has twice, beside another one; every batch is new.  The three convolutions with 48 channels on both
sides are projected, their learning rate is swept; that of all other parameters is .003.
"""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.timing import table
from galore_rrf import GaLoreAdamW

CHANNELS, SIDE, CLASSES, BATCH, STEPS, WARM_UP, PLAIN_LR = 48, 14, 10, 64, 250, 20, 3e-3
SEEDS = 2
RUNS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "AdamW": ({"rank": None}, (3e-4, 1e-3, 3e-3)),
    "unfolded, rank 8": ({"rank": 8}, (3e-4, 1e-3, 3e-3)),
    "Tucker, rank 17": ({"rank": 17, "proj_type": "tucker"}, (1e-3, 3e-3, 1e-2)),
}


def images(count: int, generator: torch.Generator, patterns: Tensor) -> tuple[Tensor, Tensor]:
    """Noise with three patterns of 5 x 5 at random places, two of them of the image's class."""
    kinds = torch.randint(CLASSES, (count,), generator=generator)
    x = 0.8 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    for k in range(3):
        rows, cols = (torch.randint(SIDE - 4, (count,), generator=generator) for _ in range(2))
        other = torch.randint(CLASSES, (count,), generator=generator)
        for image, i, j, kind in zip(x, rows, cols, kinds if k < 2 else other, strict=True):
            image[0, i : i + 5, j : j + 5] += patterns[kind]
    return x, kinds


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, CHANNELS, 3), nn.GroupNorm(4, CHANNELS), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.GroupNorm(4, CHANNELS), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * CHANNELS, CLASSES))


def train(keys: dict[str, Any], lr: float, seed: int) -> tuple[float, int, float]:
    """Held-out loss, bytes of the convolutions' state, milliseconds a step of the optimizer."""
    patterns = torch.randn(CLASSES, 5, 5, generator=torch.Generator().manual_seed(5))
    held_out, kinds = images(1000, torch.Generator().manual_seed(999), patterns)
    model = network(seed)
    wide = [m.weight for m in model if isinstance(m, nn.Conv2d) and m.in_channels == CHANNELS]
    others = [p for p in model.parameters() if not any(p is w for w in wide)]
    opt = GaLoreAdamW(
        [{"params": wide, "lr": lr, **keys}, {"params": others, "rank": None, "lr": PLAIN_LR}],
        weight_decay=0.0,
    )
    generator = torch.Generator().manual_seed(seed)
    milliseconds = []
    for step in range(STEPS):
        factor = min(1.0, (step + 1) / WARM_UP) * (1 - 0.9 * step / STEPS)
        opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = lr * factor, PLAIN_LR * factor
        x, y = images(BATCH, generator, patterns)
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        start = time.perf_counter()
        opt.step()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    with torch.no_grad():
        loss = float(cross_entropy(model(held_out), kinds))
    state = sum(t.nbytes for w in wide for t in opt.state[w].values() if isinstance(t, Tensor))
    return loss, state, statistics.median(milliseconds)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # bare tensors that are elongated
    rows: list[tuple[str, ...]] = []
    for name, (keys, rates) in RUNS.items():
        for lr in rates:
            runs = [train(keys, lr, seed) for seed in range(SEEDS)]
            losses = ", ".join(f"{loss:.3f}" for loss, _, _ in runs)
            rows.append((name, f"{lr:g}", losses, f"{runs[0][1] / 1024:.0f}", f"{runs[0][2]:.1f}"))
            print(*rows[-1], sep="  ", flush=True)
    print()
    print(table(("convolutions", "lr", "held-out loss of each seed", "state KiB", "optimizer ms"), rows))


if __name__ == "__main__":
    main()
