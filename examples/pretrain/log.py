"""What a run says while it goes: metrics.jsonl, diagnostics.jsonl, TensorBoard, a bar or quiet lines for people."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from galore_rrf.diagnostics import SubspaceRecord
from pretrain.config import Config
from pretrain.diagnostics import QUANTITIES, line
from pretrain.files import write_atomically

_QUIET_SECONDS = 30.0  # between lines where there is no terminal


class Log:
    """Begins after `step` steps: what an earlier process logged of later ones is taken back."""

    def __init__(self, config: Config, step: int) -> None:
        assert config.out is not None
        self._metrics = _Lines(config.out / "metrics.jsonl", step)
        self._diagnostics = _Lines(config.out / "diagnostics.jsonl", step)
        self._board = None
        if config.tensorboard:
            self._board = SummaryWriter(str(config.out / "tensorboard"), purge_step=step + 1)
        # None: no bar where there is no terminal.
        self._bar = tqdm(total=config.steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
        self._steps = config.steps
        self._last_line = time.monotonic()

    def write(self, step: int, **values: Any) -> None:
        """A line of metrics.jsonl; null stands for what is no number."""
        self._metrics.write({"step": step, **values})
        if self._board is not None:
            for name, value in values.items():
                for tag, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                    self._board.add_scalar(f"{name}/{tag}" if tag else name, number, step)

    def write_refreshes(self, step: int, records: Sequence[SubspaceRecord]) -> None:
        """A line of diagnostics.jsonl for each."""
        for record in records:
            values = line(record, step)
            self._diagnostics.write(values)
            if self._board is not None:
                for name in QUANTITIES:
                    if math.isfinite(values[name]):
                        self._board.add_scalar(f"{name}/{record.name}", values[name], values["refreshed_at"])

    def progress(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """A step is done."""
        self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self._bar.update()
        if self._bar.disable and (time.monotonic() - self._last_line > _QUIET_SECONDS or step == self._steps):
            self.say(
                f"step {step}/{self._steps}: loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, "
                f"{tqdm.format_interval(seconds_left)} left"
            )

    def say(self, line: str) -> None:
        """A line for people."""
        self._last_line = time.monotonic()
        tqdm.write(line)
        sys.stdout.flush()

    def flush(self) -> None:
        """What a checkpoint is about to rely on is on disk."""
        self._metrics.sync()
        self._diagnostics.sync()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self._bar.close()
        self._metrics.close()
        self._diagnostics.close()
        if self._board is not None:
            self._board.close()


class _Lines:
    """A file of JSON lines, without those of later steps than `step`; there once something is written."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._file: TextIO | None = None
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write_atomically(path, lambda file: file.writelines(f"{line}\n".encode() for line in kept))

    def write(self, values: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
        numbers = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps(numbers) + "\n")
        self._file.flush()

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _step_of(line: str) -> float:
    """A half-written line, of a run that was killed, is of no step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
