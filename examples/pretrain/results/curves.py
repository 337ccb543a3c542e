"""The figure of loss, perplexity and step time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pretrain.results.read import Array, Run, describe_lr, describe_model, describe_optimizer
from pretrain.results.style import COLOURS, heading, log_axis, smoothed, style, text

DASHES = ("-", "--", ":", "-.")  # beyond as many runs as colours
PARTS = ("forward, backward and data", "optimizer: all else", "optimizer: refreshes")  # of a step

Look = dict[str, Any]  # colour and dashes of a run


def curves_figure(runs: Sequence[Run]) -> Figure:
    """See `plots.plot_curves`."""
    one = len(runs) == 1
    figure = Figure(figsize=(14, 11.5 if one else 9), layout="constrained")
    axes = figure.subplots(3 if one else 2, 2).flatten()
    looks = [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
        for i in range(len(runs))
    ]
    _loss(axes[0], runs, looks, [run.steps for run in runs], "by steps", "step")
    _perplexity(axes[1], runs, looks)
    times = [np.nancumsum(run.seconds) for run in runs]
    unit, name = _time_unit(max(t[-1] for t in times))
    _loss(axes[2], runs, looks, [t / unit for t in times], "by time", f"time spent in steps ({name})")
    if one:
        run = runs[0]
        _step_time(axes[3], run)
        _schedule(axes[4], run)
        _gradient_norm(axes[5], run, looks[0])
        figure.suptitle(heading(run.label, run.config), fontsize=14)
    else:
        _step_bars(axes[3], runs, looks)
        models = {describe_model(run.config) for run in runs}
        figure.suptitle(text(f"{len(runs)} runs: {' and '.join(sorted(models))}"), fontsize=14)
        figure.legend(
            [Line2D([], [], linewidth=2.5, **look) for look in looks],
            [text(_legend(run)) for run in runs],
            title="optimizer, learning rate of the matrices / of all else; perplexity of the last validation",
            loc="outside lower center",
            ncols=1 if len(runs) <= 3 else 2,
            fontsize=11,
        )
    return figure


def _legend(run: Run) -> str:
    held_out = f"; perplexity {run.perplexity[-1]:,.1f}" if len(run.perplexity) else ""
    # matplotlib leaves labels with a leading underscore out of legends
    name = run.label if not run.label.startswith("_") else f"./{run.label}"
    return f"{name}:  {describe_optimizer(run.config)}, lr {describe_lr(run.config)}{held_out}"


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds < 180:
        return 1.0, "s"
    return (60.0, "min") if seconds < 3 * 3600 else (3600.0, "h")


def _loss(
    ax: Axes, runs: Sequence[Run], looks: Sequence[Look], x: Sequence[Array], by: str, unit: str
) -> None:
    """Every step faint, the running mean over it; of a single run the held-out loss too."""
    faint = 0.35 if len(runs) <= 4 else 0.15
    for run, look, along in zip(runs, looks, x, strict=True):
        ax.plot(along, run.loss, color=look["color"], linewidth=0.7, alpha=faint)
        ax.plot(along, smoothed(run.loss), linewidth=1.8, **look)
        if len(runs) == 1 and len(run.held_out_steps):
            at = np.interp(run.held_out_steps, run.steps, along)
            ax.plot(at, run.held_out_loss, "o", color=COLOURS[1], markersize=5)
            handles = [
                Line2D([], [], color=look["color"], linewidth=0.7, alpha=faint),
                Line2D([], [], linewidth=1.8, **look),
                Line2D([], [], color=COLOURS[1], marker="o", linestyle="none"),
            ]
            ax.legend(handles, ["every step", "running mean", "held-out text"])
    style(ax, f"Training loss {by} (bold: running mean)", unit, "loss (nats per token)")
    ax.set_xlim(0, max(float(along[-1]) for along in x) * 1.03 or 1)
    _cut(ax, runs)


def _cut(ax: Axes, runs: Sequence[Run]) -> None:
    """A run that diverges must not flatten all others."""
    losses = np.concatenate([run.loss for run in runs])
    losses = losses[np.isfinite(losses)]
    first = np.concatenate([run.loss[np.isfinite(run.loss)][:1] for run in runs])
    if len(first) and losses.max() > 1.5 * first.max() > 0:
        ax.set_ylim(losses.min() - 0.05 * first.max(), 1.2 * first.max())
        ax.set_ylabel(ax.get_ylabel() + f"; cut, up to {losses.max():.3g}")


def _perplexity(ax: Axes, runs: Sequence[Run], looks: Sequence[Look]) -> None:
    drawn = []
    for run, look in zip(runs, looks, strict=True):
        steps, perplexity = run.held_out_steps, run.perplexity
        good = np.isfinite(perplexity) & (perplexity > 0)
        if good.any():
            ax.plot(
                steps, np.where(good, perplexity, np.nan), marker="o", markersize=4, linewidth=1.8, **look
            )
            drawn.append(perplexity[good])
    style(ax, "Perplexity on held-out text (log scale, lower is better)", "step", "perplexity")
    if drawn:
        log_axis(ax, np.concatenate(drawn))
        ax.set_xlim(0, max(run.steps[-1] for run in runs) * 1.03)
    else:
        say(ax, "not validated yet")


def _step_time(ax: Axes, run: Run) -> None:
    """What a step spends its time on, over the run."""
    colours = ("#9ecae1", COLOURS[5], COLOURS[1])
    below = np.zeros(len(run.steps))
    for times, colour in zip(
        (run.refresh_seconds, run.optimizer_seconds, run.seconds), colours[::-1], strict=True
    ):
        above = smoothed(times, part=10)  # over several refreshes
        ax.fill_between(run.steps, below, above, color=colour, linewidth=0)
        below = above
    ax.plot(run.steps, run.seconds, ".", color="black", markersize=2.5, alpha=0.4)
    seconds = run.seconds[np.isfinite(run.seconds)]
    if len(seconds) and seconds.max() > 0:  # few slow steps, such as a first that compiles, are left outside
        ax.set_ylim(0, 1.6 * np.percentile(seconds, 98))
    handles = [Patch(color=colour) for colour in colours]
    handles.append(Line2D([], [], color="black", marker=".", linestyle="none"))
    ax.legend(handles, [*PARTS, "every step"], ncols=2, loc="upper right")
    share = np.nansum(run.optimizer_seconds) / max(np.nansum(run.seconds), 1e-12)
    style(ax, f"Step time (areas: running mean); {share:.1%} in the optimizer", "step", "seconds")
    ax.set_xlim(0, run.steps[-1] * 1.03)


def _step_bars(ax: Axes, runs: Sequence[Run], looks: Sequence[Look]) -> None:
    """The mean step of each run, in its parts."""
    faces = [{"alpha": 0.3}, {}, {"hatch": "xxxx", "edgecolor": "white", "linewidth": 0}]
    longest = 1e-9
    for i, (run, look) in enumerate(zip(runs, looks, strict=True)):
        total, optimizer, refresh = (
            float(np.nansum(a)) / len(run.steps)
            for a in (run.seconds, run.optimizer_seconds, run.refresh_seconds)
        )
        left = 0.0
        for width, face in zip((refresh, optimizer - refresh, total - optimizer), faces[::-1], strict=True):
            ax.barh(i, width, left=left, facecolor=look["color"], **face)
            left += width
        share = optimizer / total if total > 0 else math.nan
        ax.text(total, i, f"  {total:#.3g} s, {share:.1%} optimizer", va="center", fontsize=10)
        longest = max(longest, total)
    ax.set_yticks(range(len(runs)), [text(_short(run.label)) for run in runs])
    ax.invert_yaxis()
    ax.set_xlim(0, longest * 1.5)
    ax.legend(
        [Patch(facecolor="grey", **face) for face in faces],
        PARTS,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        frameon=False,
        columnspacing=1.2,
    )
    style(ax, "Time of a step (mean over the run)", "seconds", "")
    ax.grid(visible=False, axis="y")


def _short(label: str, length: int = 22) -> str:
    return label if len(label) <= length else "…" + label[1 - length :]


def _schedule(ax: Axes, run: Run) -> None:
    lora = (run.config.get("optimizer") or {}).get("name") == "lora"
    what = "adapters" if lora else "matrices of attention and MLP"
    ax.plot(run.steps, run.lr, color=COLOURS[0], linewidth=1.8, label=what)
    ax.plot(run.steps, run.plain_lr, color=COLOURS[1], linewidth=1.8, linestyle="--", label="all else")
    ax.legend()
    style(ax, "Learning rates", "step", "learning rate")
    ax.set_xlim(0, run.steps[-1] * 1.03)
    ax.set_ylim(bottom=0)


def _gradient_norm(ax: Axes, run: Run, look: Look) -> None:
    style(ax, "Gradient norm, of all parameters together (log scale)", "step", "norm")
    norm = np.where(run.grad_norm > 0, run.grad_norm, np.nan)
    finite = norm[np.isfinite(norm)]
    if not len(finite):
        say(ax, "not measured, for lack of clip_norm")
        return
    ax.plot(run.steps, norm, color=look["color"], linewidth=0.7, alpha=0.35)
    ax.plot(run.steps, smoothed(norm), linewidth=1.8, **look)
    ax.set_xlim(0, run.steps[-1] * 1.03)
    log_axis(ax, finite)
    clip = run.config.get("clip_norm")
    if clip is not None and finite.min() < clip < finite.max():
        ax.axhline(clip, color=COLOURS[1], linewidth=1.2, linestyle="--", label=f"clipped to {clip:g}")
        ax.legend()


def say(ax: Axes, why: str) -> None:
    """In place of curves."""
    ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", color="grey")
