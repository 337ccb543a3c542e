"""The tests on a GPU, what `make gpu-test` runs: with torch, the CUDA toolkit and pytest, nothing else.

First all tests that are marked core, then one case of every test function of the operators under memcheck and
racecheck.  What is not begun in time is skipped, and like everything left out it is listed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The package is where it was built, not installed; for tests that start processes too.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
CORE_SECONDS, SANITIZED_SECONDS = 240, 100
OPERATORS = [
    "sketch",
    "panels",
    "range_finder_ops",
    "adaptive_ops",
    "moments",
    "rotate_moments",
    "projected_adamw",
]


class Deadline:
    """Skips tests that would begin later."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def pytest_collection_finish(self) -> None:
        self.begin = time.monotonic()

    def pytest_runtest_setup(self) -> None:
        if time.monotonic() - self.begin > self.seconds:
            pytest.skip(f"left out: {self.seconds} s are over")


class CoreFiles:
    """Leaves alone files of tests that import what may not be there."""

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
        return True if is_test and "mark.core" not in collection_path.read_text(encoding="utf-8") else None


class OneCaseEach:
    """Keeps the first case of every test function on the device."""

    def __init__(self, device: str):
        self.device = device

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = {item.function: item for item in reversed(items) if self.device in _parameters(item)}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept.values()])
        items[:] = [item for item in items if item in kept.values()]


def _parameters(item: pytest.Item) -> list[str]:
    return [str(value) for value in item.callspec.params.values()] if hasattr(item, "callspec") else []


def core(device: str) -> int:
    return pytest.main(
        ["-q", "-m", "core", "--device", device], plugins=[CoreFiles(), Deadline(CORE_SECONDS)]
    )


def operators(device: str) -> int:
    files = [f"tests/test_{name}.py" for name in OPERATORS]
    plugins = [OneCaseEach(device), Deadline(SANITIZED_SECONDS)]
    return pytest.main(["-q", "-m", "core", "--device", device, *files], plugins=plugins)


def sanitized(tool: str, device: str) -> int:
    path = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        print(f"{tool}: there is no compute-sanitizer in {path}")
        return 1
    print(f"{tool}:", flush=True)
    tests = [sys.executable, __file__, "--operators", "--device", device]
    # Torch's allocator would hide what is written beyond the end of a tensor.
    return subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "1", "--launch-timeout", "60", *tests],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        check=False,
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--operators", action="store_true", help="only these, as under a sanitizer")
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.operators:
        return operators(options.device)
    failed = core(options.device) != 0
    for tool in ("memcheck", "racecheck"):
        failed |= sanitized(tool, options.device) != 0
    print("Left out, since they need more than torch, the CUDA toolkit and pytest:")
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    print(
        *(str(f.relative_to(ROOT)) for f in files if "mark.core" not in f.read_text(encoding="utf-8")),
        sep="\n",
    )
    pytest.main(["-qq", "--collect-only", "-m", "not core"], plugins=[CoreFiles()])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
