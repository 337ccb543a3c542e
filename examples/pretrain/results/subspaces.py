"""The figures of spectra and of ranks over time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from pretrain.errors import UserError
from pretrain.results.read import Array, Run, read_config
from pretrain.results.spectra import KINDS, LayerSpectra, energy_kept, rank_keeping, read_spectra
from pretrain.results.style import COLOURS, heading, style

SHARE = 0.9  # of the energy, marked
ROWS = 8  # more are too small to read


def spectra_figure(run_folder: Path, kinds: Sequence[str] = ("gradient",)) -> Figure:
    """See `plots.plot_spectra`."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"Invalid kinds: {kinds!r} (must be of {', '.join(KINDS)})")
    config = read_config(run_folder)
    layers = read_spectra(Path(run_folder) / "spectra")
    rows = [(layer, kind) for layer in layers for kind in kinds if layer.of(kind)]
    if not rows:
        raise UserError(
            f"{run_folder} has saved no spectra of {' or '.join(kinds)} (spectra_at says when to)"
        )
    shown = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(ROWS, len(rows))).astype(int))]
    figure = Figure(figsize=(14, 0.9 + 4.6 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False)
    for (layer, kind), (left, right) in zip(shown, axes, strict=True):
        _decay(left, layer, kind)
        _energy(right, layer, kind)
    some = "" if len(shown) == len(rows) else f" ({len(shown)} of {len(rows)} spectra)"
    figure.suptitle(heading(Path(run_folder).resolve().name, config) + some, fontsize=14)
    return figure


def _subspace_rank(layer: LayerSpectra) -> int | None:
    """The rank that the gradient was projected to, where it was and the rank is always the same."""
    ranks = {len(values) for values in layer.momentum.values()}
    return ranks.pop() if len(ranks) == 1 and max(ranks) < min(layer.shape) else None


def short_name(name: str) -> str:
    """A parameter's name without what all names share."""
    name = name.replace("_orig_mod.", "").replace("base_model.model.", "").removesuffix(".weight")
    return name.removeprefix("model.")


def _colours(count: int) -> list[tuple[float, ...]]:
    """From first, dark, to last, light."""
    along = np.linspace(0, 0.85, count) if count > 1 else [0.3]
    return [colormaps["viridis"](x) for x in along]


def _title(layer: LayerSpectra, kind: str) -> str:
    m, n = layer.shape
    count = max(map(len, layer.of(kind).values()))
    low = f", in a subspace of rank {count}" if count < min(m, n) else ""
    return f"{kind.capitalize()} of {short_name(layer.name)}, {m} x {n}{low}"


def _decay(ax: Axes, layer: LayerSpectra, kind: str) -> None:
    """Singular values over the largest."""
    spectra = layer.of(kind)
    lowest = 1.0
    for (step, values), colour in zip(spectra.items(), _colours(len(spectra)), strict=True):
        good = rank_keeping(values) is not None
        relative = values / values[0] if good else np.full(len(values), np.nan)
        label = _after(kind, step) + ("" if good else f": {_why(values)}")
        shown = np.where(relative > 0, relative, np.nan)
        ax.plot(np.arange(1, len(values) + 1), shown, label=label, **_line(colour, len(values)))
        if good:
            lowest = min(lowest, float(np.nanmin(shown)))
    ax.set_yscale("log")
    ax.set_ylim(max(lowest, 1e-8) / 1.5, 1.5)  # below is rounding
    ax.set_xlim(left=0)
    ax.legend(loc="upper right")
    title = f"{_title(layer, kind)}:\nits singular values, relative to the largest"
    style(
        ax,
        title,
        "number i of the singular value, from the largest",
        "singular value i / largest (log scale)",
    )


def _energy(ax: Axes, layer: LayerSpectra, kind: str) -> None:
    """Energy kept against rank, and the rank that keeps most of it."""
    spectra = layer.of(kind)
    ax.axhline(100 * SHARE, color="grey", linewidth=1, linestyle="--")
    for (step, values), colour in zip(spectra.items(), _colours(len(spectra)), strict=True):
        n, k = len(values), rank_keeping(values, SHARE)
        kept = 100 * np.append(0.0, energy_kept(values))
        says = _why(values) if k is None else f"k = {k} of n = {n} keeps {SHARE:.0%}"
        ax.plot(np.arange(n + 1), kept, label=f"{_after(kind, step)}: {says}", **_line(colour, n))
        if k is not None:
            ax.plot([k, k], [0, kept[k]], color=colour, linewidth=1, linestyle=":")
            ax.plot([k], [kept[k]], "o", color=colour, markersize=9, markeredgecolor="white", zorder=3)
    rank = _subspace_rank(layer)
    if kind == "gradient" and rank is not None:
        ax.axvline(
            rank, color=COLOURS[1], linewidth=1.2, linestyle="-.", label=f"rank {rank} of its subspace"
        )
    ax.set_xlim(left=0)
    ax.set_ylim(0, 103)
    ax.set_yticks([0, 20, 40, 60, 80, 90, 100])
    ax.legend(loc="lower right")  # a concave curve leaves this corner free
    title = f"{_title(layer, kind)}:\nenergy (sum of squares) kept by its k largest singular values"
    style(ax, title, "k", "energy kept (%)")


def _line(colour: Any, points: int) -> dict[str, Any]:
    return {"color": colour, "linewidth": 1.9, "marker": "." if points <= 24 else None}


def _after(kind: str, step: int) -> str:
    """The moments have taken in one gradient more than the weights that it is of."""
    steps = step if kind == "gradient" else step + 1
    return f"after {steps:,} step{'s' if steps != 1 else ''}"


def _why(values: Array) -> str:
    """No energy to speak of."""
    return "zero" if np.all(values == 0) else "not finite"


def ranks_figure(run: Run) -> Figure:
    """See `plots.plot_ranks`."""
    if not run.ranks:
        raise UserError(f"{run.label} has no ranks over time (only runs with a tolerance have)")
    panels: dict[str, list[tuple[int, str]]] = {}
    for name in run.ranks:
        kind, depth = kind_and_depth(name)
        panels.setdefault(kind, []).append((depth, name))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.5 + 4 * columns, 1.4 + 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    depths = sorted({depth for panel in panels.values() for depth, _ in panel})
    colours = dict(zip(depths, _colours(len(depths)), strict=True))
    optimizer = run.config.get("optimizer") or {}
    last, cap = int(run.steps[-1]), optimizer.get("rank")
    for i, (ax, (kind, panel)) in enumerate(zip(axes, panels.items(), strict=False)):
        for depth, name in sorted(panel):
            steps, ranks = run.ranks[name]
            # A rank holds until it changes.
            along = np.append(steps, max(last, steps[-1]))
            ax.step(along, np.append(ranks, ranks[-1]), where="post", color=colours[depth], label=str(depth))
        if cap is not None:
            ax.axhline(cap, color="grey", linewidth=1, linestyle="--")
            ax.text(0, cap, f" cap {cap}", va="bottom")
        style(ax, kind, "step", "rank")
        ax.label_outer()
        if i + columns >= len(panels):  # nothing below
            ax.set_xlabel("step")
            ax.tick_params(labelbottom=True)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    axes[0].set_ylim(0, 1.1 * max(cap or 0, *(int(ranks.max()) for _, ranks in run.ranks.values())))
    axes[0].set_xlim(0, last * 1.03)
    if len(depths) > 1:
        bar = ScalarMappable(
            BoundaryNorm(np.arange(len(depths) + 1) - 0.5, len(depths)),
            ListedColormap(list(colours.values())),
        )
        every = -(-len(depths) // 16)
        shown = figure.colorbar(bar, ax=list(axes[: len(panels)]), ticks=range(0, len(depths), every))
        shown.ax.set_yticklabels([str(depth) for depth in depths[::every]])
        shown.set_label("depth of the layer, 0 nearest the embedding")
    found = "Rank of every projected matrix over time, the smallest within the tolerance at each refresh"
    figure.suptitle(f"{found}\n{heading(run.label, run.config)}", fontsize=14)
    return figure


def kind_and_depth(name: str) -> tuple[str, int]:
    """``self_attn.q_proj`` and 3 for ``model.layers.3.self_attn.q_proj.weight``."""
    found = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", short_name(name))
    return (found[2], int(found[1])) if found else (short_name(name), 0)
