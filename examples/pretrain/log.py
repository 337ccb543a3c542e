"""What a run says while it goes: metrics.jsonl, TensorBoard, and a bar or quiet lines for people."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pretrain.config import Config
from pretrain.files import write_atomically

_QUIET_SECONDS = 30.0  # between lines where there is no terminal


class Log:
    """Begins after `step` steps: what an earlier process logged of later ones is taken back."""

    def __init__(self, config: Config, step: int) -> None:
        assert config.out is not None
        path = config.out / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write_atomically(path, lambda file: file.writelines(f"{line}\n".encode() for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
        self._board = None
        if config.tensorboard:
            self._board = SummaryWriter(str(config.out / "tensorboard"), purge_step=step + 1)
        # None: no bar where there is no terminal.
        self._bar = tqdm(total=config.steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
        self._steps = config.steps
        self._last_line = time.monotonic()

    def write(self, step: int, **values: Any) -> None:
        """A line of metrics.jsonl; null stands for what is no number."""
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                for tag, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                    self._board.add_scalar(f"{name}/{tag}" if tag else name, number, step)

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
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> float:
    """A half-written line, of a run that was killed, is of no step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
