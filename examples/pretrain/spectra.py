"""Saving singular values of gradients and moments during a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.errors import UserError
from pretrain.files import write_atomically

Array = NDArray[np.floating]

_MOMENTS = {"momentum": "exp_avg", "variance": "exp_avg_sq"}


def check_layers(named_parameters: Iterable[tuple[str, Tensor]], layers: Sequence[str]) -> None:
    """Raises UserError unless each of `layers` is part of the name of a matrix that is trained."""
    names = [name for name, p in named_parameters if p.dim() == 2 and p.requires_grad]
    unmatched = [layer for layer in layers if not any(layer in name for name in names)]
    if unmatched or not layers:
        # One name stands for all depths.
        known = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names)
        raise UserError(
            f"Invalid spectra_layers: {', '.join(map(repr, unmatched)) or '(none)'} (must be parts of the names "
            f"of matrices that are trained: {', '.join(known) or '(none)'})"
        )


def save_spectra(
    folder: Path,
    step: int,
    named_parameters: Iterable[tuple[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    layers: Sequence[str],
) -> Path | None:
    """Saves singular values of the matrices with one of `layers` in their names, to step-NNNNNN.npz in `folder`.

    To be called right after `optimizer.step()`, gradients still there: they are saved as the optimizer saw
    them, clipping included.  In the file, for each parameter, `name/shape` and the singular values
    `name/gradient`, `name/momentum` and `name/variance`, largest first; parameters in the order of `layers`.

    The moments of projected parameters are those in the subspace, one singular value a column of the
    basis.  The basis is orthonormal, so those of the momentum are the nonzero ones of the full-size
    momentum; the variance is that of the projected gradient and has no full-size counterpart.

    Args:
        folder: made if it is not there; of a run, its folder "spectra".
        step: updates before the gradients were computed; the moments have taken them in.
        optimizer: any with AdamW's state.

    Returns:
        The file; None where no such matrix has a gradient.  Matrices with NaN or infinity have NaN for
        singular values.
    """
    arrays: dict[str, Array | NDArray[np.int64]] = {}
    named = [(name, p) for name, p in named_parameters if p.dim() == 2 and p.grad is not None]
    for name, p in sorted(named, key=lambda item: _position(item[0], layers)):
        if _position(name, layers) == len(layers):
            continue
        assert p.grad is not None
        arrays[f"{name}/shape"] = np.array(p.shape)
        arrays[f"{name}/gradient"] = _singular_values(p.grad)
        state = optimizer.state.get(p, {})
        for kind, key in _MOMENTS.items():
            if key in state:  # not where no step was taken yet: all gradients so far overflowed
                arrays[f"{name}/{kind}"] = _singular_values(state[key])
    if not arrays:
        return None
    path = Path(folder) / f"step-{step:06d}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: np.savez(file, **arrays))
    return path


def _position(name: str, layers: Sequence[str]) -> int:
    """The first of `layers` in `name`; their number where none is."""
    return next((i for i, layer in enumerate(layers) if layer in name), len(layers))


@torch.no_grad()
def _singular_values(matrix: Tensor) -> Array:
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    if bool(torch.isfinite(matrix).all()):
        try:
            return torch.linalg.svdvals(matrix).cpu().numpy()
        except torch.linalg.LinAlgError:  # not converged: no reason to end a run
            pass
    return np.full(min(matrix.shape), np.nan, dtype=np.float32)
