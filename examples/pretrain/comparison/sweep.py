"""Which learning rates are tried."""

from __future__ import annotations

import math
from collections.abc import Callable

from pretrain.comparison.config import Row

Point = tuple[float, float]  # lr, plain_lr


class Sweep:
    """The trainings of one row, by the learning rates.

    First that of the matrices is swept, at the middle one of the others; then, at its best, that of the others.  A
    sweep whose best value lies at an end goes on up to `beyond` times beyond it.
    """

    def __init__(self, row: Row, beyond: int) -> None:
        self._row = row
        self._beyond = beyond
        self._middle = row.plain_lr[len(row.plain_lr) // 2]
        self.losses: dict[Point, float] = {}

    def wanted(self) -> list[Point]:
        """What is to be trained next; nothing when the best is known."""
        missing, lr = self._line(self._row.lr, lambda lr: (lr, self._middle))
        if not missing:
            missing, _ = self._line(self._row.plain_lr, lambda plain: (lr, plain))
        return missing

    def best(self) -> Point | None:
        """None where nothing has ended in a finite loss."""
        point = min(self.losses, key=self.losses.__getitem__, default=None)
        return point if point is not None and math.isfinite(self.losses[point]) else None

    def lines(self) -> dict[str, dict[float, float]]:
        """Losses by lr at the middle plain_lr, and by plain_lr at the best of these."""
        by_lr = {lr: loss for (lr, plain), loss in sorted(self.losses.items()) if plain == self._middle}
        at = min(by_lr, key=by_lr.__getitem__, default=None)
        by_plain = {plain: loss for (lr, plain), loss in sorted(self.losses.items()) if lr == at}
        return {"lr": by_lr, "plain_lr": by_plain}

    def at_an_end(self) -> list[str]:
        """The rates that were swept and whose best value is the least or the largest tried."""
        return [
            name
            for name, line in self.lines().items()
            if len(line) > 1 and min(line, key=line.__getitem__) in (min(line), max(line))
        ]

    def _line(self, values: list[float], point: Callable[[float], Point]) -> tuple[list[Point], float]:
        """The points of a line that are missing, and its best value where none is."""
        line = sorted(values)
        best = math.nan
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
