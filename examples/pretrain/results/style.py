"""What all figures share.  They are made without pyplot: no global state, no display needed."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from pretrain.results.read import Array, describe_model, describe_optimizer

# Okabe and Ito's, told apart by the colour-blind too, without the yellow that is pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#999999")


def text(label: str) -> str:
    """As it is: dollars are no formula."""
    return label.replace("$", r"\$")


def heading(label: str, config: dict[str, Any]) -> str:
    """What a figure of one run is of."""
    return text(f"{label}: {describe_model(config)}; {describe_optimizer(config)}")


def smoothed(values: Array, part: int = 40) -> Array:
    """Mean of the finite values in a window around each step, a part-th of all and at most 1000 long; gaps stay."""
    window = min(max(1, len(values) // part), 1000)
    finite = np.isfinite(values)
    kernel = np.ones(window)
    count = np.convolve(finite, kernel)
    total = np.convolve(np.where(finite, values, 0.0), kernel)
    start = (window - 1) // 2
    inside = slice(start, start + len(values))
    with np.errstate(invalid="ignore"):
        return np.where(finite, total[inside] / count[inside], np.nan)


def log_axis(ax: Axes, values: Array) -> None:
    """A logarithmic y axis with plain numbers on it, however short."""
    ax.set_yscale("log")
    ratio = values.max() / values.min()
    if ratio < 4:
        ax.yaxis.set_major_locator(MaxNLocator(6))
    else:
        subs = (1, 1.5, 2, 3, 5, 7) if ratio < 30 else (1, 2, 5) if ratio < 1000 else (1,)
        ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_minor_locator(NullLocator())


def style(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=12)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(visible=True, alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
