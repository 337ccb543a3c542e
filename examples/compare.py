"""Compares optimizers on one configuration: the same text, seeds and steps, learning rates swept for each.

    python examples/compare.py configs/compare_tiny.yaml

For every row the peak learning rate of the matrices is swept, then, at its best, that of the other parameters;
a sweep whose best value lies at an end goes on beyond it.  Every training is a run of pretrain_llama.py in a
folder of its own; an interrupted comparison takes up where it was.  Where several ran at once, the best of each row
is trained once more, alone, for its times.  The end is a table and an overlay of the best.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import yaml
from pretrain.command_line import merged, read_yaml, resumed, sentence
from pretrain.errors import UserError, in_sentences
from pretrain.results.plots import plot_curves
from pretrain.results.read import Run, runs_table
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from tqdm import tqdm

PROGRAM = Path(__file__).with_name("pretrain_llama.py")
Point = tuple[float, float]  # lr, plain_lr


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid")

    lr: Annotated[list[PositiveFloat], Field(min_length=1)]
    plain_lr: Annotated[list[PositiveFloat], Field(min_length=1)]
    fields: dict[str, Any] = {}


class Comparison(BaseModel):
    """A comparison: `configs` (beside this file) and `fields` of all trainings, `rows` of fields that differ.

    `jobs` trainings run at once; a sweep goes on up to `beyond` times beyond the end of its values.
    """

    model_config = ConfigDict(extra="forbid")

    configs: list[Path]
    out: Path
    rows: dict[str, Row]
    jobs: PositiveInt = 1
    beyond: NonNegativeInt = 2
    fields: dict[str, Any] = {}


class Sweep:
    """The trainings of one row, by the learning rates."""

    def __init__(self, row: Row, beyond: int) -> None:
        self._row = row
        self._beyond = beyond
        self.losses: dict[Point, float] = {}

    def wanted(self) -> list[Point]:
        """What is to be trained next; nothing when the best is known."""
        middle = self._row.plain_lr[len(self._row.plain_lr) // 2]
        missing, lr = self._line(self._row.lr, lambda lr: (lr, middle))
        if not missing:
            missing, _ = self._line(self._row.plain_lr, lambda plain: (lr, plain))
        return missing

    def best(self) -> Point:
        return min(self.losses, key=self.losses.__getitem__)

    def _line(self, values: list[float], point: Any) -> tuple[list[Point], float]:
        """The points of a line that are missing, and its best value where none is."""
        line = sorted(values)
        for _ in range(self._beyond + 1):
            if missing := [point(v) for v in line if point(v) not in self.losses]:
                return missing, math.nan
            best = min(line, key=lambda v: self.losses[point(v)])
            if len(line) > 1 and best == line[-1]:
                line.append(_rounded(line[-1] ** 2 / line[-2]))
            elif len(line) > 1 and best == line[0]:
                line.insert(0, _rounded(line[0] ** 2 / line[1]))
            else:
                return [], best
        return [], best


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")


def train(folder: Path, fields: dict[str, Any]) -> float:
    """The last held-out loss of a run, made, resumed or read; infinite where it diverged.

    UserError where the folder holds a run of other fields, or training fails.
    """
    log = folder.parent / f"{folder.name}.log"
    began = (folder / "config.yaml").exists()
    if began:
        resumed(folder, fields)
    if not (folder / "summary.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = folder.parent / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
        source = ["--resume", folder] if began else ["--config", path, "--out", folder]
        with log.open("w") as file:
            code = subprocess.run([sys.executable, PROGRAM, *source], stdout=file, stderr=file).returncode
        if code != 0:
            if "training diverged" in log.read_text():
                return math.inf
            raise UserError(f"a training failed with status {code}: see {log}")
    loss = Run.read(folder).held_out_loss[-1]
    return loss if math.isfinite(loss) else math.inf


def compare(comparison: Comparison, base: dict[str, Any]) -> dict[str, Path]:
    """Trains all that is wanted, `jobs` at once; the best run of every row."""
    sweeps = {name: Sweep(row, comparison.beyond) for name, row in comparison.rows.items()}

    def folder(name: str, point: Point, alone: bool = False) -> Path:
        rates = f"lr={point[0]:g},plain_lr={point[1]:g}"
        return comparison.out / name.replace(" ", "_") / (f"alone,{rates}" if alone else rates)

    def run(name: str, point: Point, alone: bool = False) -> float:
        rates = {"optimizer": {"lr": point[0], "plain_lr": point[1]}}
        return train(folder(name, point, alone), merged(base, comparison.rows[name].fields, rates))

    with ThreadPoolExecutor(comparison.jobs) as pool, tqdm(unit="run", disable=None) as bar:
        while work := [(name, point) for name, sweep in sweeps.items() for point in sweep.wanted()]:
            bar.total = bar.n + len(work)
            for (name, point), loss in zip(work, pool.map(lambda w: run(*w), work), strict=True):
                sweeps[name].losses[point] = loss
                bar.update()
                tqdm.write(f"{name}: lr {point[0]:g}, plain_lr {point[1]:g}: held-out loss {loss:.4f}")
    for name, sweep in sweeps.items():
        if not math.isfinite(sweep.losses[sweep.best()]):
            raise UserError(f"every training of {name} diverged: lower its lr and plain_lr")
    alone = comparison.jobs > 1
    if alone:
        for name, sweep in sweeps.items():
            run(name, sweep.best(), alone)
    return {name: folder(name, sweep.best(), alone) for name, sweep in sweeps.items()}


@in_sentences("stopped; the same command goes on from here")
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path, help="YAML: configs, out, rows, jobs")
    path = parser.parse_args().comparison
    try:
        comparison = Comparison.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError("\n".join(map(sentence, error.errors()))) from error
    base = merged(*(read_yaml(path.parent / config) for config in comparison.configs), comparison.fields)
    best = compare(comparison, base)
    runs = [Run.read(folder, label=name) for name, folder in best.items()]
    print(runs_table(runs))
    plot_curves(runs, comparison.out / "curves.png")
    print(f"curves: {comparison.out / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
