"""Reading diagnostics.jsonl, and the figure of subspaces over training and layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from pretrain.diagnostics import QUANTITIES
from pretrain.errors import UserError
from pretrain.results.curves import DASHES
from pretrain.results.read import Array, json_lines, read_config
from pretrain.results.style import COLOURS, heading, style
from pretrain.results.subspaces import kind_and_depth

COLUMNS = 400  # of a heat map: more are thinner than a pixel
_LABELS = {
    "energy_kept": ("Energy kept by the subspace", "energy kept (%)", "viridis"),
    "residual_norm": ("Norm of what the subspace leaves", "residual norm", "viridis"),
    "angle": ("Angle to the subspace before", "angle (degrees)", "magma"),
    "rank": ("Rank", "rank", "cividis"),
    "refreshes": ("Refreshes so far", "refreshes", "cividis"),
    "refresh_seconds": ("Time of refreshes so far", "seconds", "cividis"),
}
_NUMBERS = (*QUANTITIES, "gradient_norm", "squared_cosine", "state_bytes")


@dataclass(frozen=True)
class Subspace:
    """What a run noted of one projected parameter.

    Attributes:
        steps: those that refreshed its subspace, from 1; the arrays are as long, NaN where nothing was measured.
        values: by the names of `galore_rrf.diagnostics.SubspaceRecord`.
    """

    steps: NDArray[np.int64]
    values: dict[str, Array]

    def at(self, steps: NDArray[np.int64], quantity: str) -> Array:
        """Of the last refresh noted up to each of `steps`; NaN before the first."""
        index = np.searchsorted(self.steps, steps, side="right") - 1
        return np.where(index < 0, np.nan, self.values[quantity][index])


def read_diagnostics(folder: Path) -> dict[str, Subspace]:
    """By parameter, in the optimizer's order; empty where a run has noted nothing."""
    path = Path(folder) / "diagnostics.jsonl"
    points: dict[str, dict[int, dict[str, Any]]] = {}
    for where, line in json_lines(path) if path.exists() else ():
        name, step = line.get("name"), line.get("refreshed_at")
        numbers = {key: line.get(key) for key in _NUMBERS}
        if not isinstance(name, str) or not isinstance(step, int):
            raise UserError(f"{where} has no name or no step: {line}")
        for key, value in numbers.items():
            if not isinstance(value, (int, float, type(None))):
                raise UserError(f"{where}: invalid {key} {value!r}")
        points.setdefault(name, {})[step] = numbers
    return {
        name: Subspace(
            np.array(sorted(lines), dtype=np.int64),
            {key: np.array([lines[s][key] for s in sorted(lines)], dtype=np.float64) for key in _NUMBERS},
        )
        for name, lines in points.items()
    }


def diagnostics_figure(run_folders: Sequence[Path], labels: Sequence[str] | None = None) -> Figure:
    """See `plots.plot_diagnostics`."""
    names = labels or [Path(folder).resolve().name for folder in run_folders]
    noted = [
        (heading(name, read_config(folder)), subspaces)
        for name, folder in zip(names, run_folders, strict=True)
        if (subspaces := read_diagnostics(folder))
    ]
    if not noted:
        raise UserError(
            f"{' and '.join(map(str, run_folders))}: no subspaces noted (galore runs with diagnostics_every do)"
        )
    return _figure_of_one(*noted[0]) if len(run_folders) == 1 else _figure_of_several(noted)


def _figure_of_one(name: str, subspaces: dict[str, Subspace]) -> Figure:
    """Lines by kind beside a map of all layers, a row for every quantity."""
    shown = [q for q in _LABELS if _is_shown(subspaces, q)] or ["rank"]
    rows = _by_kind(subspaces)
    height = 2 + len(shown) * max(4.0, 1.5 + 0.07 * len(subspaces))
    figure = Figure(figsize=(15, height), layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(1, 1.25))
    steps = _grid(subspaces)
    for quantity, (left, right) in zip(shown, axes, strict=True):
        _lines(left, rows, steps, quantity)
        _map(figure, right, rows, steps, quantity)
    figure.legend(
        [Line2D([], [], linewidth=2.5, **_look(i)) for i in range(len(rows))],
        list(rows),
        title="left: mean over the layers of a kind; areas: from the least to the largest",
        loc="outside lower center",
        ncols=min(7, len(rows)),
    )
    figure.suptitle(f"Subspaces of {len(subspaces)} matrices, each from its refresh on\n{name}", fontsize=14)
    return figure


def _figure_of_several(noted: Sequence[tuple[str, dict[str, Subspace]]]) -> Figure:
    """Means over all matrices, a panel for every quantity, a line for every run."""
    looks = [_look(i) for i in range(len(noted))]
    figure = Figure(figsize=(15, 9 + 0.35 * len(noted)), layout="constrained")
    for ax, quantity in zip(figure.subplots(2, 3).flat, _LABELS, strict=True):
        for (_, subspaces), look in zip(noted, looks, strict=True):
            steps = _grid(subspaces)
            _mean(ax, _table(list(subspaces.values()), steps, quantity), steps, look)
        title, unit, _ = _LABELS[quantity]
        style(ax, title, "step", unit)
        ax.set_xlim(left=0)
        _limit(ax, quantity)
    figure.legend(
        [Line2D([], [], linewidth=2.5, **look) for look in looks],
        [name for name, _ in noted],
        loc="outside lower center",
    )
    figure.suptitle(f"Subspaces of {len(noted)} runs, means over all matrices", fontsize=14)
    return figure


Rows = dict[str, list[Subspace]]  # by kind of matrix, then by depth


def _by_kind(subspaces: Mapping[str, Subspace]) -> Rows:
    rows: dict[str, list[tuple[int, Subspace]]] = {}
    for name, subspace in subspaces.items():
        kind, depth = kind_and_depth(name)
        rows.setdefault(kind, []).append((depth, subspace))
    return {kind: [s for _, s in sorted(row, key=lambda item: item[0])] for kind, row in rows.items()}


def _is_shown(subspaces: Mapping[str, Subspace], quantity: str) -> bool:
    """What was measured; ranks where there is more than one, refreshes where they are not all at once."""
    if quantity == "refreshes":
        return len({tuple(s.steps) for s in subspaces.values()}) > 1
    values = np.concatenate([s.values[quantity] for s in subspaces.values()])
    return len(set(values)) > 1 if quantity == "rank" else bool(np.isfinite(values).any())


def _grid(subspaces: Mapping[str, Subspace]) -> NDArray[np.int64]:
    """The steps with a refresh of any, or as many of them as a figure has room for."""
    steps = np.unique(np.concatenate([s.steps for s in subspaces.values()]))
    if len(steps) <= COLUMNS:
        return steps
    return np.unique(np.linspace(steps[0], steps[-1], COLUMNS).astype(np.int64))


def _table(row: Sequence[Subspace], steps: NDArray[np.int64], quantity: str) -> Array:
    """A row a matrix, a column a step."""
    table = np.stack([subspace.at(steps, quantity) for subspace in row])
    return 100 * table if quantity == "energy_kept" else table


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}


def _lines(ax: Axes, rows: Rows, steps: NDArray[np.int64], quantity: str) -> None:
    """By kind: the mean over the layers, and from the least to the largest."""
    for i, row in enumerate(rows.values()):
        table, look = _table(row, steps, quantity), _look(i)
        _mean(ax, table, steps, look)
        if len(row) > 1:
            measured = np.isfinite(table).any(axis=0)
            ends = (extreme(table[:, measured], axis=0) for extreme in (np.nanmin, np.nanmax))
            ax.fill_between(steps[measured], *ends, color=look["color"], alpha=0.13, linewidth=0)
    title, unit, _ = _LABELS[quantity]
    style(ax, f"{title}, by kind", "step", unit)
    ax.set_xlim(0, steps[-1] * 1.03)
    _limit(ax, quantity)


def _mean(ax: Axes, table: Array, steps: NDArray[np.int64], look: dict[str, Any]) -> None:
    """Over the rows, where there is something in them."""
    measured = np.isfinite(table).any(axis=0)
    at, means = steps[measured], np.nanmean(table[:, measured], axis=0)
    ax.plot(at, means, **look, linewidth=1.8, marker="." if len(at) <= 24 else None)


def _limit(ax: Axes, quantity: str) -> None:
    low, high = ax.get_ylim()
    if quantity == "energy_kept":
        ax.set_ylim(max(0, low), min(100.5, high))
    else:
        ax.set_ylim(0, high)


def _map(figure: Figure, ax: Axes, rows: Rows, steps: NDArray[np.int64], quantity: str) -> None:
    """Every matrix a row, by kind and within a kind by depth; every step with a refresh begins a column."""
    title, unit, colours = _LABELS[quantity]
    table = np.concatenate([_table(row, steps, quantity) for row in rows.values()])
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    edges = np.append(steps, steps[-1] + width)
    map_ = colormaps[colours].with_extremes(bad="0.85")
    mesh = ax.pcolormesh(edges, np.arange(len(table) + 1), np.ma.masked_invalid(table), cmap=map_)
    figure.colorbar(mesh, ax=ax, label=unit)
    ends = np.cumsum([len(row) for row in rows.values()])
    for end in ends[:-1]:
        ax.axhline(end, color="white", linewidth=1.5)
    middles = ends - np.array([len(row) for row in rows.values()]) / 2
    deep = any(len(row) > 1 for row in rows.values())
    order = ", the first layer of each kind on top" if deep else ""
    style(ax, f"{title}, by layer{order}", "step", "")
    ax.set_yticks(middles, list(rows))
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False)
    ax.invert_yaxis()
