"""The pictures of docs/range_finders.md.  Made without pyplot: no global state, no display needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.llama_60m import decaying_gradient
from benchmarks.range_finders import (
    BETWEEN,
    LARGE,
    METHODS,
    PANELS,
    UNIT,
    WORDS,
    ResidualHistory,
    best_errors,
    fixed_rank_work,
    orthogonality,
    relative_error,
    size,
    smallest_rank,
)
from benchmarks.timing import interleaved
from galore_rrf import adaptive_range_finder

# Okabe and Ito's, told apart by the colour-blind too.
BLUE, RED, GREEN, PINK, BLACK, ORANGE, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#000000",
    "#E69F00",
    "#999999",
)
MARKS = "os^Dv*"


def style(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=12)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(visible=True, alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def plain_ticks(ax: Axes, ranks: list[int]) -> None:
    ax.set_xticks(ranks, [str(r) for r in ranks])
    ax.minorticks_off()


def time_figure(ranks: tuple[int, ...] = (32, 64, 128, 256, 512)) -> Figure:
    """Time against rank, of one matrix."""
    a = decaying_gradient(*LARGE)
    svd = interleaved({"svd": partial(torch.linalg.svd, a, full_matrices=False)}, 1)["svd"]
    times = [interleaved(fixed_rank_work(a, rank), 7) for rank in ranks]
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    ax = figure.subplots()
    ax.axhline(svd, color=BLACK, label="torch.linalg.svd, whatever the rank")
    shown = {
        "torch.svd_lowrank(niter=2)": (GREY, "s-"),
        "half power, basis and coefficients": (RED, "D-"),
        "half power, basis": (RED, "D--"),
        "plain, basis and coefficients": (BLUE, "o-"),
        "plain, basis": (BLUE, "o--"),
    }
    for name, (colour, mark) in shown.items():
        ax.plot(ranks, [ms[name] for ms in times], mark, color=colour, label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    plain_ticks(ax, list(ranks))
    style(ax, f"{size(a)}, fp32, two threads", "rank", "milliseconds (logarithmic)")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def forgetful_basis(a: Tensor, block: int) -> Tensor:
    """Gram-Schmidt between blocks, each cleared of those before it once: for the picture, not offered."""
    m, n = a.shape
    torch.manual_seed(0)
    q = a.new_empty(m, 0)
    while q.shape[1] < m:
        y = a @ torch.randn(n, block)
        q = torch.cat([q, torch.linalg.qr(y - q @ (q.mT @ y))[0]], 1)
    return q


def mixes_figure(decaying: dict[str, Tensor]) -> Figure:
    """Residual against time left- and right-looking, and orthogonality against rank."""
    a, block, ranks = decaying_gradient(1024, 2736), 128, (128, 256, 384, 512)
    colours = dict(zip(product(BETWEEN, PANELS), (BLUE, GREEN, GREY, RED, ORANGE, PINK), strict=True))
    figure = Figure(figsize=(15, 5.8), layout="constrained")
    *by_method, last = figure.subplots(1, 3)
    residual: dict[int, float] = {}
    for ax, method in zip(by_method, METHODS, strict=True):
        find = partial(adaptive_range_finder, a, 0.0, block=block, trim=False, sketch="plain", method=method)
        work = {
            (pair, rank): partial(find, max_rank=rank, between=pair[0], panel=pair[1])
            for rank in ranks
            for pair in colours
        }
        ms = interleaved(work, 5)
        for (pair, colour), mark in zip(colours.items(), MARKS, strict=True):
            for rank in ranks:
                found = work[pair, rank]()
                residual[rank] = relative_error(a, found.basis, found.coefficients)
            x = [ms[pair, rank] for rank in ranks]
            y = [residual[rank] for rank in ranks]
            label = f"{WORDS[pair[0]]} between, {WORDS[pair[1]]} within" if ax is by_method[0] else None
            ax.plot(x, y, mark + "-", color=colour, label=label, markersize=7)
        ax.set_yscale("log")
        ax.set_ylim(0.9 * min(residual.values()), 1.12 * max(residual.values()))
        levels = sorted(residual.values())
        ax.set_yticks(
            levels, [f"{level:.3f}\nrank {rank}" for level, rank in zip(levels, reversed(ranks), strict=True)]
        )
        ax.minorticks_off()
        ax.set_xlim(left=0)
        style(
            ax,
            f"{WORDS[method]}-looking, {size(a)}, blocks of {block}",
            "milliseconds",
            "residual / norm of A",
        )
    # One matrix whose later blocks are all rounding beside the first.
    matrix, block = decaying["fourteen decades"], 32
    at = list(range(block, matrix.shape[0] + 1, block))

    def curve(q: Tensor) -> list[float]:
        return [orthogonality(q[:, :r]) for r in at]

    for (pair, colour), mark in zip(colours.items(), MARKS, strict=True):
        found = adaptive_range_finder(
            matrix, 0.0, block=block, trim=False, method="left_looking", between=pair[0], panel=pair[1]
        )
        last.plot(at, curve(found.basis), mark + "-", color=colour, markersize=4)
    label = "Gram-Schmidt between, once and not again (not offered)"
    last.plot(at, curve(forgetful_basis(matrix, block)), "--", color=BLACK, label=label)
    last.axhline(30, color=BLACK, linewidth=1, linestyle=":", label="what tests allow: 30 m u")
    last.set_yscale("log")
    style(last, f"left-looking, {size(matrix)}, fourteen decades", "rank", "loss of orthogonality, in m u")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def tracking_figure(decaying: dict[str, Tensor]) -> Figure:
    """Why the printed running difference fails: it, and ours, against the true residual."""
    a = decaying["exponential, .95^i"]
    h = ResidualHistory(a)
    figure = Figure(figsize=(14, 5.8), layout="constrained")
    left, right = figure.subplots(1, 2)

    def positive(squares: Tensor) -> Tensor:
        return torch.where(squares > 0, squares, torch.nan).sqrt()

    curves = (
        ("right-looking: norm of what is left", h.ranks[:-1], h.trailing[:-1], h.true[:-1], BLUE, "o-"),
        (
            "left-looking: corrected difference",
            h.ranks[:-1],
            positive(h.corrected.square()),
            h.true_left[:-1],
            GREEN,
            "^-",
        ),
        ("as printed: running difference, fp32", h.ranks, positive(h.printed), h.true, RED, "s-"),
    )
    left.plot(h.ranks, h.true, color=BLACK, linewidth=4, alpha=0.35, label="true, evaluated in fp64")
    for name, ranks, estimate, true, colour, mark in curves:
        left.plot(ranks, estimate, mark, color=colour, markersize=5, label=name)
        right.plot(true, (estimate / true - 1).abs().clamp(min=1e-9), mark, color=colour, markersize=5)
    negative = h.printed <= 0
    if negative.any():
        first = int(negative.int().argmax())
        left.annotate(
            f"negative from rank {int(h.ranks[first])} on:\nwhatever the tolerance, it stops here",
            (float(h.ranks[first - 1]), float(positive(h.printed)[first - 1])),
            xytext=(0.42, 0.82),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "->", "color": RED},
            color=RED,
        )
    left.set_yscale("log")
    left.set_ylim(bottom=1e-8)
    style(left, f"{size(a)}, singular values .95^i, fp32", "rank", "residual / norm of A")
    right.set_xscale("log")
    right.set_yscale("log")
    right.invert_xaxis()
    right.axhline(0.01, color=BLACK, linewidth=1, linestyle=":")
    right.annotate("1 per cent wrong", (1, 0.01), xytext=(0, 4), textcoords="offset points")
    for floor, name in (
        (8 * UNIT**0.5, "left-looking floor\n8 sqrt(u)"),
        (200 * UNIT, "right-looking floor\n200 u"),
    ):
        right.axvline(floor, color=GREY, linestyle="--")
        right.annotate(
            name, (floor, 0.02), xycoords=("data", "axes fraction"), xytext=(5, 0),
            textcoords="offset points", va="bottom", rotation=90, color="#555555",
        )  # fmt: skip
    right.set_ylim(bottom=1e-11)
    style(
        right,
        "how wrong each estimate is",
        "true residual / norm of A, falling",
        "relative error of the estimate",
    )
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def rank_figure(decaying: dict[str, Tensor], gradients: dict[str, Tensor]) -> Figure:
    """Rank against tolerance: trimmed, untrimmed and the smallest possible."""
    shown = {"1 / i": decaying["1 / i"], "gradient, MLP up": gradients["gradient, MLP up"]}
    tolerances = torch.logspace(-0.3, -2, 18).tolist()
    ways: dict[str, tuple[dict[str, Any], str, str]] = {
        "untrimmed, plain": ({"trim": False, "sketch": "plain"}, RED, "s-"),
        "untrimmed, half power": ({"trim": False}, ORANGE, "D-"),
        "trimmed, plain, no extra block": ({"extra_blocks": 0, "sketch": "plain"}, GREEN, "^-"),
        "trimmed, plain, one extra block": ({"sketch": "plain"}, PINK, "*-"),
        "trimmed, half power, one extra block (default)": ({}, BLUE, "o-"),
    }
    figure = Figure(figsize=(14, 5.6), layout="constrained")
    for i, (ax, (name, a)) in enumerate(zip(figure.subplots(1, 2), shown.items(), strict=True)):
        best = best_errors(a)
        for way, (keys, colour, mark) in ways.items():
            found = [int(adaptive_range_finder(a, t, **keys).rank) for t in tolerances]
            ax.plot(tolerances, found, mark, color=colour, markersize=5, label=None if i else way)
        smallest = [smallest_rank(best, t) for t in tolerances]
        ax.plot(
            tolerances, smallest, "--", color=BLACK, linewidth=2, label=None if i else "smallest possible"
        )
        ax.set_xscale("log")
        ax.invert_xaxis()
        ax.set_xticks([0.5, 0.3, 0.1, 0.03, 0.01], ["0.5", "0.3", "0.1", "0.03", "0.01"])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        style(ax, f"{name}, {size(a)}, blocks of 64", "tolerance (relative, falling)", "rank")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_all(folder: Path, decaying: dict[str, Tensor], gradients: dict[str, Tensor]) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[], Figure]] = {
        "rank_against_tolerance": partial(rank_figure, decaying, gradients),
        "residual_tracking": partial(tracking_figure, decaying),
        "mixes": partial(mixes_figure, decaying),
        "time_against_rank": time_figure,
    }
    for name, make in figures.items():
        path = folder / f"range_finders_{name}.png"
        make().savefig(path, dpi=110)
        yield path
