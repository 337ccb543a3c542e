"""The estimates of several methods as stacked bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from galore_rrf.memory.estimate import MemoryEstimate

# Okabe and Ito's colours, which colour-blind people can tell apart.
_PARTS = {
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "master_weights": "#009E73",
    "momentum": "#F0E442",
    "variance": "#E69F00",
    "bases": "#D55E00",
    "buffers": "#CC79A7",
}
_LEGIBLE = 0.025  # of the tallest bar: lower segments get no number


def unit(sizes: Iterable[int]) -> tuple[float, str]:
    """Decimal, as the papers have it: a divisor and its name."""
    return (1e9, "GB") if max(sizes) >= 5e8 else (1e6, "MB")


def draw(models: Sequence[tuple[str, Mapping[str, MemoryEstimate]]], path: Path) -> None:
    """Writes a PNG with a panel for every model (its title; estimates by the name of the method).

    Raises:
        ModuleNotFoundError: without matplotlib.
        OSError: where the file cannot be written.
    """
    figure = import_module("matplotlib.figure").Figure(figsize=(9 * len(models), 7), layout="constrained")
    for axes, (title, methods) in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        _panel(axes, title, methods)
    columns = 4 if len(models) == 1 else len(_PARTS) + 1
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    figure.savefig(path, dpi=110, format="png")


def _panel(axes: Any, title: str, methods: Mapping[str, MemoryEstimate]) -> None:
    estimates = list(methods.values())
    parameters = estimates[0].parameters
    tallest = max(e.held + e.workspace for e in estimates)
    one, name = unit([tallest])
    x = range(len(estimates))
    look = {"width": 0.6, "edgecolor": "#404040"}
    bottoms = [0] * len(estimates)
    for part, colour in _PARTS.items():
        sizes = [getattr(e, part) for e in estimates]
        axes.bar(
            x,
            [size / one for size in sizes],
            bottom=[b / one for b in bottoms],
            color=colour,
            label=part.replace("_", " "),
            **look,
        )
        for i, (bottom, size) in enumerate(zip(bottoms, sizes, strict=True)):
            if size > _LEGIBLE * tallest:
                ink = "white" if part == "weights" else "black"
                number = f"{round(size / parameters, 2):g}"
                axes.text(i, (bottom + size / 2) / one, number, ha="center", va="center", color=ink)
        bottoms = [b + size for b, size in zip(bottoms, sizes, strict=True)]
    axes.bar(
        x,
        [e.workspace / one for e in estimates],
        bottom=[b / one for b in bottoms],
        color="white",
        hatch="////",
        label="workspace of a step (estimated)",
        **look,
    )
    for i, e in enumerate(estimates):
        text = f"{e.held / one:.3g} {name} held\n{e.held / parameters:.3g} bytes a parameter"
        top = (e.held + e.workspace + 0.01 * tallest) / one
        axes.text(i, top, text, ha="center", va="bottom", fontweight="bold")
    axes.set_xticks(x, methods)
    axes.set_xlim(-0.6, len(estimates) - 0.4)
    axes.set_ylim(0, 1.12 * tallest / one)
    axes.set_ylabel(f"memory ({name} = {one:g} bytes)".replace("e+0", "e"))
    right = axes.secondary_yaxis(
        "right", functions=(lambda y: y * one / parameters, lambda y: y * parameters / one)
    )
    right.set_yticks(range(0, int(1.12 * tallest / parameters) + 1, 2))
    right.set_ylabel("bytes a parameter of the model; so are the numbers in the bars")
    largest = max(e.activations or 0 for e in estimates)
    activations = f" of up to {largest / one:.3g} {name} (estimated)" if largest else ""
    title = title.replace("$", r"\$")  # dollars are no formula
    axes.set_title(f"{title}\nheld from step to step; activations{activations} come on top")
