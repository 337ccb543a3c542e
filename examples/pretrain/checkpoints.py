"""Checkpoints on disk: whole or not there, the newest that is sound is loaded."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import UserError
from pretrain.files import write_atomically


class Checkpoints:
    """The files ``step-*.pt`` of a folder, of which the last `keep` are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        names = (re.fullmatch(r"step-(\d+)\.pt", p.name) for p in self.folder.glob("step-*.pt"))
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.pt"

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Older checkpoints go only when this one is in its place; UserError where it cannot be written."""
        path = self.path(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:  # torch's writer hides the reason in a RuntimeError
            kept = f"that of step {self.steps()[-1]} is whole" if self.steps() else "there is none yet"
            reason = next(
                (e.strerror for e in _causes(error) if isinstance(e, OSError) and e.strerror), error
            )
            raise UserError(
                f"cannot write the checkpoint {path}: {reason} ({kept}; mend that, then --resume the run)"
            ) from error
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)

    def load_newest(self, warn: Callable[[str], object]) -> dict[str, Any] | None:
        """The newest checkpoint that is sound; None where there is none at all.

        Damaged ones are named to `warn` and renamed, so that they neither count nor are lost.  UserError, and
        nothing renamed, if there are some and none is sound.
        """
        for unfinished in self.folder.glob(".step-*.tmp"):  # of a process that was killed
            unfinished.unlink(missing_ok=True)
        damaged: dict[Path, Exception] = {}
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                state = _load(path)
            except Exception as error:  # whatever a damaged file leads to
                damaged[path] = error
                continue
            for bad, error in damaged.items():
                bad.replace(bad.with_suffix(".damaged"))
                warn(f"passing over the checkpoint {bad}, which is damaged ({error}); now {bad.stem}.damaged")
            return state
        if damaged:
            reasons = "; ".join(f"{path.name}: {error}" for path, error in damaged.items())
            raise UserError(f"no checkpoint in {self.folder} can be read ({reasons})")
        return None


def _load(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch.load checks no checksums
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not {"step", "model", "optimizer"} <= state.keys():
        raise ValueError("it holds something else")
    return state


def _causes(error: BaseException | None) -> list[BaseException]:
    causes = []
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes
