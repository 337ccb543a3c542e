"""What a run of the GPU benchmarks writes: tables to read, the same numbers as JSON, and what was left out."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import galore_rrf
from benchmarks.timing import interleaved, table

Row = dict[str, Any]


@dataclass
class Report:
    """Measures, within a time limit, and keeps every row.

    Attributes:
        device: where everything runs.
        seconds: the time limit; what has not begun by then is left out.
        quick: tiny shapes and few rounds, which tell only that everything runs.
        path: of the JSON, written anew after every section.
    """

    device: torch.device
    seconds: float
    quick: bool
    path: Path
    start: float = field(default_factory=time.perf_counter)
    sections: dict[str, list[Row]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.start)

    def measure(self, work: Mapping[str, Callable[[], object]], seconds: float = 10.0) -> dict[str, float]:
        """Median milliseconds of each, interleaved; less than 21 rounds where `seconds` do not suffice."""
        return interleaved(work, 2 if self.quick else 21, device=self.device, seconds=seconds)

    def attempt(self, name: str, work: Callable[[], list[Row]], needs: float = 0.0) -> list[Row]:
        """The rows of `work`; none where less than `needs` seconds are left or memory does not suffice."""
        if self.left() < needs:
            self.left_out.append(f"{name}: {self.left():.0f} of {needs:.0f} seconds left")
            return []
        try:
            return work()
        except torch.OutOfMemoryError:
            self.left_out.append(f"{name}: not enough memory")
            return []
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def add(self, title: str, rows: list[Row], notes: str = "") -> None:
        """Prints a section and writes it to the file: a row has a value for every column of the first."""
        self.sections[title] = rows
        print(f"\n## {title}\n", flush=True)
        if rows:
            print(table(tuple(rows[0]), [tuple(_shown(value) for value in row.values()) for row in rows]))
        print(f"\n{notes}" if notes else "", flush=True)
        self.write()

    def write(self) -> None:
        content = {
            **environment(self.device),
            "quick": self.quick,
            "seconds": round(time.perf_counter() - self.start, 1),
            "sections": self.sections,
            "left_out": self.left_out,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1) + "\n")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def environment(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": "CPU",
        "driver": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "galore_rrf": galore_rrf.__version__,
        "build": galore_rrf.build_info(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["driver"] = _driver()
    return found


def _driver() -> str | None:
    """The driver's version, from nvidia-smi where there is one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() or None
