"""Checkpoints on disk: whole or not there, the newest that is sound is loaded."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import UserError


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """`write` fills a binary file; `path` holds all of it afterwards, or what it held before."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a power cut
    finally:
        os.close(folder)


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
            raise UserError(f"cannot write the checkpoint {path}: {reason} ({kept})") from error
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)

    def load_newest(self, warn: Callable[[str], object]) -> dict[str, Any] | None:
        """The newest checkpoint that is sound, those that are not named to `warn`; None where there is none.

        UserError if there are some and none is sound.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.path(step)
            try:
                with zipfile.ZipFile(path) as archive:  # torch.load checks no checksums
                    damaged = archive.testzip()
                if damaged is not None:
                    raise zipfile.BadZipFile(f"bad checksum of {damaged}")
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever a damaged file leads to
                warn(
                    f"the checkpoint {path} is damaged ({type(error).__name__}: {error}); trying the one before"
                )
        if steps:
            raise UserError(f"no checkpoint in {self.folder} can be read")
        return None


def _causes(error: BaseException | None) -> list[BaseException]:
    causes = []
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes
