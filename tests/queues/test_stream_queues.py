"""The look-ahead schedule on streams and events, of a device that only keeps account of their order."""

import os
import subprocess
from pathlib import Path

import pytest
from test_host_queues import MISSING, ROOT
from torch.utils import cpp_extension


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("streams") / "streams"
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += [f"-Wl,-rpath,{path}" for path in cpp_extension.library_paths()]
    sources = [ROOT / "tests/queues/streams.cpp", ROOT / "csrc/range_finder/stream_queues.cpp"]
    command = ["g++", "-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", *includes]
    subprocess.run([*command, *sources, *libraries, "-ltorch_cpu", "-lc10", "-o", program], check=True)
    return program


def output(program: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        [program, *arguments], env=os.environ, stdout=subprocess.PIPE, text=True, check=True, timeout=120
    )
    return done.stdout.splitlines()


@pytest.mark.slow
def test_all_is_ordered(streams):
    """Guards against streams that do not begin after the caller's, or that it does not go on after; events kept."""
    assert output(streams) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wait", "racing"),
    [
        ("test_matrix_free", "test matrix"),
        ("test_matrix_filled", "test matrix"),
        ("sketch_made", "sketch"),
        ("panel_factored", "reflectors"),
        ("norm_measured", "norm"),
    ],
)
def test_a_missing_wait_shows(streams, wait, racing):
    """Guards against a wait that only host threads need, and an account that sees nothing."""
    assert any(line.startswith(f"race: {racing} ") for line in output(streams, wait))


def test_all_waits_are_tested():
    """Guards against a wait that the list above leaves out."""
    (tested,) = (m for m in test_a_missing_wait_shows.pytestmark if m.name == "parametrize")
    assert [wait for wait, _ in tested.args[1]] == MISSING


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["random", "panel", "update"])
def test_an_exception_leaves_all_in_order(streams, lane):
    """Guards against memory given away, or a lane's stream left current, while lanes still run."""
    assert output(streams, "throws", lane) == [f"exception from {lane}"]
