"""What a comparison found: the best of every row at every scale, differences, and what is noise."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.comparison.config import Comparison
from pretrain.comparison.sweep import Point, Sweep
from pretrain.comparison.trainings import Training, Trainings, known_loss
from pretrain.config import OURS
from pretrain.results.read import Run

NOISES = 2
"""A difference is one where it is more than as many times the seed noise."""


@dataclass(frozen=True)
class Outcome:
    """A row at a scale.

    Attributes:
        sweep: what was tried; None where it has not begun.
        point: the best rates; None where the sweep has not ended, or all of it diverged.
        losses: the last held-out loss by seed, of the best rates.
        runs, folders: those trainings, without diverged ones.
        timed: the training for times; None where there is none yet.
        missing: trainings that are yet to be made.
    """

    scale: str
    row: str
    sweep: Sweep | None
    point: Point | None
    losses: dict[int, float]
    runs: dict[int, Run]
    folders: dict[int, Path]
    timed: Run | None
    missing: int

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.losses.values()))) if self.losses else math.nan

    @property
    def state(self) -> dict[str, int]:
        """Bytes of the optimizer's state: of the matrices without step counts, of all; and of AdamW's moments."""
        summary: dict[str, Any] = next(iter(self.runs.values())).summary or {}
        parts = summary["state"]
        return {
            "matrices": sum(part["matrices"] for part in parts if part["what"] != "step counts"),
            "all": sum(part["measured"] for part in parts),
            **{f"AdamW, {which}": size for which, size in summary["adamw_moments"].items()},
        }

    @property
    def times(self) -> dict[str, float]:
        """Milliseconds of a step: all of it, in the optimizer, there at the slowest after the first, in refreshes
        (NaN where the optimizer does not tell)."""
        assert self.timed is not None
        run = self.timed
        ours = run.config["optimizer"]["name"] in OURS
        return {
            "step": 1e3 * float(np.mean(run.seconds)),
            "optimizer": 1e3 * float(np.mean(run.optimizer_seconds)),
            "slowest": 1e3 * float(np.max(run.optimizer_seconds[1:], initial=0.0)),
            "refresh": 1e3 * float(np.mean(run.refresh_seconds)) if ours else math.nan,
        }


@dataclass(frozen=True)
class Difference:
    """Of two rows at a scale, over the seeds that both have."""

    by_seed: list[float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.by_seed)) if self.by_seed else math.nan


class Outcomes:
    def __init__(self, trainings: Trainings) -> None:
        self.comparison: Comparison = trainings.comparison
        self.baseline = self.comparison.baseline or next(iter(self.comparison.rows))
        entries = set(trainings.entries)
        self.by_scale = {
            scale: {
                row: _outcome(trainings, scale, row)
                for row in self.comparison.rows
                if (scale, row) in entries
            }
            for scale in self.comparison.scales
        }

    @property
    def missing(self) -> int:
        """Trainings not made yet, of those that can be told by now."""
        return sum(o.missing for rows in self.by_scale.values() for o in rows.values())

    def difference(self, scale: str, row: str, other: str) -> Difference:
        """Losses of `row` less those of `other`."""
        a, b = (self.by_scale[scale].get(name) for name in (row, other))
        if a is None or b is None:
            return Difference([])
        return Difference([loss - b.losses[seed] for seed, loss in a.losses.items() if seed in b.losses])

    def noise(self, scale: str) -> float:
        """Of a difference to the baseline on one seed: its standard deviation over seeds, pooled over all rows.

        NaN where there are not two seeds.
        """
        pairs = [
            self.difference(scale, row, self.baseline) for row in self.by_scale[scale] if row != self.baseline
        ]
        spread = [
            np.var(d.by_seed, ddof=1) for d in pairs if len(d.by_seed) > 1 and np.isfinite(d.by_seed).all()
        ]
        return math.sqrt(float(np.mean(spread))) if spread else math.nan

    def verdict(self, scale: str, row: str, other: str) -> str:
        """Whether `row` is below `other`, by its mean difference and the noise."""
        mean, noise = self.difference(scale, row, other).mean, self.noise(scale)
        if math.isnan(mean):
            return "not known"
        if math.isnan(noise):
            return "one seed"
        return "below" if mean < -NOISES * noise else "above" if mean > NOISES * noise else "within noise"


def _outcome(trainings: Trainings, scale: str, row: str) -> Outcome:
    sweep, point = trainings.sweep(scale, row), trainings.best(scale, row)
    losses: dict[int, float] = {}
    folders: dict[int, Path] = {}
    timed = None
    if point is not None:
        first, *_ = seeds = trainings.comparison.seeds_of(scale)
        for seed in seeds:
            folder = trainings.folder(Training(scale, row, point, seed))
            if (loss := known_loss(folder)) is not None:
                losses[seed] = loss
                if math.isfinite(loss):
                    folders[seed] = folder
        alone = trainings.folder(Training(scale, row, point, first, alone=bool(trainings.timed())))
        timed = _read(alone, row) if (alone / "summary.json").exists() else None
    runs = {seed: _read(folder, row) for seed, folder in folders.items()}
    missing = sum((t.scale, t.row) == (scale, row) for t in trainings.wanted()) + (sweep is None)
    return Outcome(scale, row, sweep, point, losses, runs, folders, timed, missing)


def _read(folder: Path, label: str) -> Run:
    return Run.read(folder, label=label)


def text_of(folder: Path) -> dict[str, Any]:
    """What a run says of its text."""
    described: dict[str, Any] = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return described
