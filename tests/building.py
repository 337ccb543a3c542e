"""Commands, and builds with CMake, of tests."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command) -> str:
    """The output of a command; where it fails, the test fails with its output."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [shutil.which(command[0], path=path) or command[0], *map(str, command[1:])],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        words = " ".join(map(str, command))
        pytest.fail(f"{words} ended with {done.returncode}:\n{done.stdout}", pytrace=False)
    return done.stdout


def build(folder: str, **definitions: str) -> Path:
    """Configures and builds with CMake in build/<folder>, where only what has changed is compiled again."""
    target = ROOT / "build" / folder
    target.mkdir(parents=True, exist_ok=True)
    with open(target / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest-xdist build one after another
        run(
            "cmake", "-S", ROOT, "-B", target, "-G", "Ninja",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DCMAKE_PREFIX_PATH={Path(sys.prefix) / 'catch2/catch2/install'}",
            *(f"-D{name}={value}" for name, value in definitions.items()),
        )  # fmt: skip
        jobs = os.environ.get("MAX_JOBS", len(os.sched_getaffinity(0)))
        run("cmake", "--build", target, "--parallel", jobs)
    return target


def configure_consumer(library: Path, folder: Path) -> Path:
    """Installs the library and configures examples/cpp against it; returns the folder to build in."""
    run("cmake", "--install", library, "--prefix", folder / "prefix")
    run(
        "cmake", "-S", ROOT / "examples/cpp", "-B", folder / "build", "-G", "Ninja",
        f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}", f"-DPython3_EXECUTABLE={sys.executable}",
        "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Wconversion -Wshadow -Werror",
    )  # fmt: skip
    return folder / "build"
