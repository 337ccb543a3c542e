"""The look-ahead schedule on host threads, compiled with sanitizers from framework-free sources."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["tests/queues/look_ahead.cpp", "csrc/range_finder/queues.cpp"]

# Read from the header, so that none is forgotten.
(WAITS,) = re.findall(
    r"^enum class Wait {$(.*?)^};$",
    (ROOT / "csrc/range_finder/queues.h").read_text(),
    re.MULTILINE | re.DOTALL,
)
MISSING = re.findall(r"^  (\w+),", WAITS, re.MULTILINE)


def compiled(folder: Path, sanitizer: str) -> Path:
    program = folder / f"look_ahead_{sanitizer}"
    command = ["g++", "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]
    command += ["-fno-omit-frame-pointer", f"-fsanitize={sanitizer}", f"-I{ROOT / 'csrc'}", "-pthread"]
    subprocess.run([*command, *(ROOT / s for s in SOURCES), "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def races(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory.mktemp("thread"), "thread")


@pytest.fixture(scope="module")
def leaks(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory.mktemp("address"), "address")


def ended(program: Path, *arguments: str) -> tuple[int, str]:
    """The exit status and output."""
    # ThreadSanitizer fails on much address randomization.
    prefix = ["setarch", "-R"]
    allowed = shutil.which(prefix[0]) and subprocess.run([*prefix, "true"], check=False).returncode == 0
    done = subprocess.run(
        [*(prefix if allowed else []), program, *arguments],
        env={**os.environ, "TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "detect_leaks=1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
def test_no_race_with_all_waits(races):
    """Guards against work of two lanes that nothing orders, and results other than one after another."""
    status, output = ended(races)
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("wait", MISSING)
def test_a_missing_wait_is_reported(races, wait):
    """Guards against a wait that is not needed, and against a test above that could not see one missing."""
    status, output = ended(races, wait)
    assert status == 66, output
    assert "WARNING: ThreadSanitizer: data race" in output


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["random", "panel", "update"])
def test_an_exception_in_a_lane_reaches_the_host(races, leaks, lane):
    """Guards against a hang, an exception lost with its thread, and work or threads left behind."""
    for program in (races, leaks):
        status, output = ended(program, "throws", lane)
        assert (status, output) == (2, f"exception from {lane}\n")


@pytest.mark.slow
def test_nothing_leaks(leaks):
    """Guards against queues that keep what they ran."""
    status, output = ended(leaks)
    assert status == 0, output
