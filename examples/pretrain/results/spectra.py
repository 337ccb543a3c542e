"""Reading the spectra that `spectra` saved, and the energy in them."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import UserError

Array = NDArray[np.floating]

KINDS = ("gradient", "momentum", "variance")


@dataclass
class LayerSpectra:
    """Singular values of one parameter, largest first, by step."""

    name: str
    shape: tuple[int, int]
    gradient: dict[int, Array] = field(default_factory=dict)
    momentum: dict[int, Array] = field(default_factory=dict)
    variance: dict[int, Array] = field(default_factory=dict)

    def of(self, kind: str) -> dict[int, Array]:
        """Those of one of `KINDS`."""
        found: dict[int, Array] = getattr(self, kind)
        return found


def read_spectra(folder: Path) -> list[LayerSpectra]:
    """All that `save_spectra` wrote to `folder`, by layer; empty where it wrote nothing."""
    layers: dict[str, LayerSpectra] = {}
    files = [(int(p.stem.removeprefix("step-")), p) for p in Path(folder).glob("step-*.npz")]
    for step, path in sorted(files):
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                content = dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} does not hold spectra: {error}") from error
        for key, values in content.items():
            name, _, kind = key.rpartition("/")
            if kind == "shape":
                layers.setdefault(name, LayerSpectra(name, (int(values[0]), int(values[1]))))
            elif kind in KINDS and name in layers:
                layers[name].of(kind)[step] = values
    return list(layers.values())


def energy_kept(values: Array) -> NDArray[np.float64]:
    """Share of the energy, the sum of all squared singular values, in the k largest, at index k - 1.

    NaN where the energy is zero or not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or not 0 < values.max() < np.inf:
        return np.full(len(values), np.nan)
    energy = np.cumsum(np.square(values / values.max()))
    return energy / energy[-1]


def rank_keeping(values: Array, share: float = 0.9) -> int | None:
    """The smallest k whose k largest singular values hold `share` of the energy; None where there is none."""
    kept = energy_kept(values)
    if not len(kept) or np.isnan(kept[0]):
        return None
    return int(np.searchsorted(kept, share - 1e-12)) + 1  # less what sums of exact shares may be rounded by
