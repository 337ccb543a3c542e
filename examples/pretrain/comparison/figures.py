"""The figures of a comparison: losses over steps and time, at the end, and against memory and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pretrain.comparison.outcome import NOISES, Outcome, Outcomes
from pretrain.results.curves import DASHES, say
from pretrain.results.style import COLOURS, style, text

Looks = dict[str, dict[str, Any]]
_MARKERS = ("o", "s", "^", "D")  # beyond as many rows as colours


def looks_of(outcomes: Outcomes) -> Looks:
    """Colour and dashes of every row, the same in all figures."""
    return {
        row: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
        for i, row in enumerate(outcomes.comparison.rows)
    }


def _shown(outcomes: Outcomes) -> dict[str, list[Outcome]]:
    """By scale, rows with a training that has ended."""
    rows = {scale: [o for o in found.values() if o.runs] for scale, found in outcomes.by_scale.items()}
    return {scale: found for scale, found in rows.items() if found}


def curves_figure(outcomes: Outcomes) -> Figure:
    """Held-out loss over steps and over time, a row of panels for every scale."""
    shown, looks = _shown(outcomes), looks_of(outcomes)
    figure = Figure(figsize=(15, 1.5 + 5 * len(shown) + 0.12 * len(looks)), layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False)
    for (scale, rows), (left, right) in zip(shown.items(), axes, strict=True):
        for outcome in rows:
            steps = next(iter(outcome.runs.values())).held_out_steps
            losses = np.stack([run.held_out_loss for run in outcome.runs.values()])
            _band(left, steps, losses, looks[outcome.row])
            if outcome.timed is not None:
                _band(right, steps * outcome.times["step"] / 60e3, losses, looks[outcome.row])
        name = f", {scale}" if scale else ""
        style(left, text(f"Held-out loss by steps{name}"), "step", "loss (nats per token)")
        style(
            right,
            text(f"Held-out loss by time{name}"),
            "minutes, at the mean step measured alone",
            "loss (nats per token)",
        )
        for ax in (left, right):
            _limit(ax, rows)
        if not right.lines:
            say(right, "no times yet")
    _legend(figure, looks, "mean over seeds; areas: from the least to the largest")
    return figure


def _band(ax: Axes, x: Any, losses: Any, look: dict[str, Any]) -> None:
    ax.plot(x, losses.mean(0), linewidth=1.8, marker=".", **look)
    ax.fill_between(x, losses.min(0), losses.max(0), color=look["color"], alpha=0.2, linewidth=0)


def _limit(ax: Axes, rows: Sequence[Outcome]) -> None:
    """The first validations, steep, must not flatten the last, which are compared."""
    losses = np.concatenate([run.held_out_loss for o in rows for run in o.runs.values()])
    ends = [run.held_out_loss[-1] for o in rows for run in o.runs.values()]
    least, worst = np.nanmin(losses), np.nanmax(ends)
    ax.set_ylim(least - 0.05 * (worst - least + 0.1), worst + 1.0 * (worst - least + 0.1))


def differences_figure(outcomes: Outcomes) -> Figure:
    """The last held-out loss less the baseline's, of every seed, a panel for every scale."""
    shown, looks = _shown(outcomes), looks_of(outcomes)
    most = max(map(len, shown.values()))
    figure = Figure(figsize=(4 + 5 * len(shown), 2.2 + 0.42 * most), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for (scale, rows), ax in zip(shown.items(), axes, strict=True):
        noise = outcomes.noise(scale)
        if math.isfinite(noise):
            ax.axvspan(-NOISES * noise, NOISES * noise, color="grey", alpha=0.2, linewidth=0)
        ax.axvline(0, color="grey", linewidth=1, linestyle="--")
        for i, outcome in enumerate(rows):
            by_seed = outcomes.difference(scale, outcome.row, outcomes.baseline).by_seed
            finite = [d for d in by_seed if math.isfinite(d)]
            if outcome.row != outcomes.baseline and finite:
                ax.plot(
                    finite, [i] * len(finite), "o", color=looks[outcome.row]["color"], markersize=6, alpha=0.7
                )
                ax.plot([np.mean(finite)], [i], "|", color="black", markersize=16)
        ax.set_yticks(range(len(rows)), [text(o.row) for o in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        style(ax, text(scale), "difference in held-out loss (nats per token)", "")
    figure.suptitle(
        text(
            f"Loss at the end less that of {outcomes.baseline}: a dot a seed, bar: mean, grey: {NOISES} times the noise"
        ),
        fontsize=13,
    )
    return figure


def costs_figure(outcomes: Outcomes) -> Figure:
    """Loss less the baseline's against the state of the matrices and time in the optimizer, a row for every scale."""
    shown = _shown(outcomes)
    looks = {
        row: {"color": look["color"], "marker": _MARKERS[i // len(COLOURS) % len(_MARKERS)], "markersize": 9}
        for i, (row, look) in enumerate(looks_of(outcomes).items())
    }
    figure = Figure(figsize=(15, 1.5 + 5 * len(shown) + 0.12 * len(looks)), layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False)
    for (scale, rows), (left, right) in zip(shown.items(), axes, strict=True):
        for outcome in rows:
            mean = outcomes.difference(scale, outcome.row, outcomes.baseline).mean
            state = outcome.state
            share = 100 * state["matrices"] / state["AdamW, matrices"]
            left.plot([share], [mean], **looks[outcome.row])
            if outcome.timed is not None:
                right.plot([outcome.times["optimizer"]], [mean], **looks[outcome.row])
        name = f", {scale}" if scale else ""
        loss = f"held-out loss less that of {outcomes.baseline} (nats)"
        memory = "moments, bases and buffers of the matrices (% of AdamW's)"
        style(left, text(f"Loss against memory{name}"), memory, text(loss))
        style(right, text(f"Loss against time{name}"), "time in the optimizer (ms a step)", text(loss))
        left.set_xlim(left=-3)
        right.set_xlim(left=0)
        if not right.lines:
            say(right, "no times yet")
    handles = [Line2D([], [], linestyle="none", **look) for look in looks.values()]
    figure.legend(handles, [text(row) for row in looks], loc="outside lower center", ncols=4)
    return figure


def _legend(figure: Figure, looks: Looks, title: str) -> None:
    figure.legend(
        [Line2D([], [], linewidth=2.5, **look) for look in looks.values()],
        [text(row) for row in looks],
        title=title,
        loc="outside lower center",
        ncols=4,
    )
