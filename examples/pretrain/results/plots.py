"""PNGs of runs, of their spectra, of their ranks and of their subspaces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from pretrain.errors import UserError
from pretrain.results.curves import curves_figure
from pretrain.results.diagnostics import diagnostics_figure
from pretrain.results.read import Run
from pretrain.results.subspaces import ranks_figure, spectra_figure


def plot_curves(runs: Sequence[Run], path: Path) -> None:
    """Loss, perplexity and step time: of one run, with its learning rates and gradient norm, or of several."""
    save(curves_figure(runs), path)


def plot_spectra(run_folder: Path, path: Path, kinds: Sequence[str] = ("gradient",)) -> None:
    """Singular values and the energy they keep at each saved step, a row for every layer and kind.

    Args:
        kinds: of ``"gradient"``, ``"momentum"`` and ``"variance"``.

    Raises:
        UserError: where the run has saved none of these.
    """
    save(spectra_figure(run_folder, kinds), path)


def plot_ranks(run: Run, path: Path) -> None:
    """The rank of every projected matrix over time; UserError where the run has written none."""
    save(ranks_figure(run), path)


def plot_diagnostics(run_folders: Sequence[Path], path: Path, labels: Sequence[str] | None = None) -> None:
    """Energy kept, residual norm, angle, rank, count and time of refreshes over training: of one run by kind, and as
    a map of layers and steps; of several the means, a line a run.

    Args:
        labels: what the runs are called; by default like their folders.

    Raises:
        UserError: where no run has noted any.
    """
    save(diagnostics_figure(run_folders, labels), path)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG; UserError where that cannot be."""
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from error
