"""The trainings of a comparison: which are wanted next, where they are kept, and how one is made."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from pretrain.command_line import merged, resumed
from pretrain.comparison.config import Comparison
from pretrain.comparison.sweep import Point, Sweep
from pretrain.errors import UserError
from pretrain.results.read import Run

PROGRAM = Path(__file__).parents[2] / "pretrain_llama.py"
_DIVERGED = "training diverged"


@dataclass(frozen=True)
class Training:
    scale: str
    row: str
    point: Point
    seed: int
    alone: bool = False

    def __str__(self) -> str:
        where = f"{self.row}, {self.scale}" if self.scale else self.row
        return f"{where}: lr {self.point[0]:g}, plain_lr {self.point[1]:g}, seed {self.seed}"


class Trainings:
    """All trainings of a comparison, with the losses of those that are known."""

    def __init__(self, comparison: Comparison, base: Mapping[str, Any]) -> None:
        self.comparison = comparison
        self._base = base
        self.entries = comparison.entries()
        self._losses: dict[Training, float] = {}

    def folder(self, training: Training) -> Path:
        rates = f"lr={training.point[0]:g},plain_lr={training.point[1]:g}"
        first = training.seed == self.comparison.seeds_of(training.scale)[0]
        name = rates if first else f"seed={training.seed},{rates}"
        parts = (part.replace(" ", "_") for part in (training.scale, training.row))
        return self.comparison.out.joinpath(*parts, f"alone,{name}" if training.alone else name)

    def fields(self, training: Training) -> dict[str, Any]:
        comparison = self.comparison
        lr, plain_lr = training.point
        steps = {"steps": comparison.alone_steps} if training.alone and comparison.alone_steps else {}
        scale = comparison.scales[training.scale]
        return merged(
            self._base,
            scale.fields,
            comparison.rows[training.row].fields,
            scale.row_fields.get(training.row, {}),
            {"optimizer": {"lr": lr, "plain_lr": plain_lr}, "seed": training.seed},
            steps,
        )

    def sweep(self, scale: str, row: str) -> Sweep | None:
        """With the losses that are known; None where it has to wait for the first scale's best."""
        comparison, rates = self.comparison, self.comparison.scales[scale].rates
        values = comparison.rows[row]
        if rates != "swept":
            first = self.sweep(next(iter(comparison.scales)), row)
            if first is None or first.wanted() or (best := first.best()) is None:
                return None
            carried = {"plain_lr": [best[1]]} | ({"lr": [best[0]]} if rates == "carried" else {})
            values = values.model_copy(update=carried)
        sweep, seed = Sweep(values, comparison.beyond), comparison.seeds_of(scale)[0]
        for training, loss in self._losses.items():
            if (training.scale, training.row, training.seed) == (scale, row, seed):
                sweep.losses[training.point] = loss
        return sweep

    def best(self, scale: str, row: str) -> Point | None:
        """None where the sweep has not ended, or every training of it diverged."""
        sweep = self.sweep(scale, row)
        return None if sweep is None or sweep.wanted() else sweep.best()

    def diverged(self) -> list[str]:
        """Rows of which every training of a sweep that has ended diverged."""
        found = {(s, row): self.sweep(s, row) for s, row in self.entries}
        return [
            f"{row} ({scale})" if scale else row
            for (scale, row), sweep in found.items()
            if sweep is not None and not sweep.wanted() and sweep.best() is None
        ]

    def wanted(self) -> list[Training]:
        """What can be trained by what is known, the first to be trained first."""
        found = []
        for scale, row in self.entries:
            if (sweep := self.sweep(scale, row)) is None:
                continue
            first, *others = self.comparison.seeds_of(scale)
            if points := sweep.wanted():
                found += [Training(scale, row, point, first) for point in points]
            elif (best := sweep.best()) is not None:
                found += [Training(scale, row, best, seed) for seed in others]
        return [training for training in found if training not in self._losses]

    def timed(self) -> list[Training]:
        """The best of each row once more, alone, where those of the sweep were not."""
        if self.comparison.jobs == 1 and self.comparison.alone_steps is None:
            return []
        best = {(s, r): self.best(s, r) for s, r in self.entries}
        return [
            Training(s, r, point, self.comparison.seeds_of(s)[0], alone=True)
            for (s, r), point in best.items()
            if point is not None
        ]

    def run(self) -> None:
        """Trains all that is wanted, `jobs` at once, then those for times; what is there already is read."""
        running: dict[Future[float], Training] = {}
        with ThreadPoolExecutor(self.comparison.jobs) as pool, tqdm(unit="run", disable=None) as bar:
            while True:
                free = [training for training in self.wanted() if training not in running.values()]
                for training in free[: self.comparison.jobs - len(running)]:
                    future = pool.submit(train, self.folder(training), self.fields(training))
                    running[future] = training
                if not running:
                    break
                bar.total = bar.n + len(self.wanted())
                bar.refresh()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    training = running.pop(future)
                    loss = self._losses[training] = future.result()
                    bar.update()
                    tqdm.write(f"{training}: held-out loss {loss:.4f}")
        for training in tqdm(self.timed(), desc="times", unit="run", disable=None):
            train(self.folder(training), self.fields(training))

    def read(self) -> None:
        """What is there already, and nothing is trained."""
        known = True
        while known:
            known = {t: loss for t in self.wanted() if (loss := known_loss(self.folder(t))) is not None}
            self._losses |= known


def known_loss(folder: Path) -> float | None:
    """The last held-out loss of a run that has ended, infinite where it diverged; None of one that has not."""
    if (folder / "summary.json").exists():
        loss = float(Run.read(folder).held_out_loss[-1])
        return loss if math.isfinite(loss) else math.inf
    log = _log(folder)
    return math.inf if log.exists() and _DIVERGED in log.read_text() else None


def train(folder: Path, fields: dict[str, Any]) -> float:
    """The last held-out loss of a run, made, resumed or read; infinite where it diverged.

    UserError where the folder holds a run of other fields, or training fails.
    """
    log = _log(folder)
    began = (folder / "config.yaml").exists()
    if began:
        resumed(folder, fields)
        if (loss := known_loss(folder)) is not None:
            return loss
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    source = ["--resume", folder] if began else ["--config", path, "--out", folder]
    with log.open("w") as file:
        code = subprocess.run([sys.executable, PROGRAM, *source], stdout=file, stderr=file).returncode
    loss = known_loss(folder)
    if loss is None or (code != 0 and math.isfinite(loss)):
        raise UserError(f"a training failed with status {code}: see {log}")
    return loss


def _log(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.log"
