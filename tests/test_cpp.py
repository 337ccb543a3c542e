"""The C++ tests, each case a test here, plainly and under sanitizers; and the C++ library."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from building import ROOT, build, configure_consumer, run

import galore_rrf

# Read from the sources, so that collecting tests compiles nothing; test_cases_are_all_listed compares.
CASES = [
    name
    for source in sorted((ROOT / "tests/cpp").glob("test_*.cpp"))
    for name in re.findall(r'^TEST_CASE\(\s*"([^"]+)"', source.read_text(), re.MULTILINE)
]


@pytest.fixture(
    scope="session",
    params=[
        "plain",
        pytest.param("address,undefined", marks=pytest.mark.slow),
        pytest.param("thread", marks=pytest.mark.slow),
    ],
)
def program(request) -> list[str | Path]:
    """The command that runs the C++ tests, built."""
    sanitizer = "" if request.param == "plain" else request.param
    folder = f"cpp-{sanitizer.replace(',', '-')}" if sanitizer else "cpp"
    built = build(folder, GALORE_RRF_LIBRARY="OFF", GALORE_RRF_SANITIZE=sanitizer)
    return [*(unmoved() if sanitizer == "thread" else []), built / "tests/cpp/galore_rrf_tests"]


def unmoved() -> list[str]:
    """A prefix that turns off address randomization, where allowed: ThreadSanitizer fails on much of it."""
    prefix = ["setarch", "-R"]
    allowed = shutil.which(prefix[0]) and subprocess.run([*prefix, "true"], check=False).returncode == 0
    return prefix if allowed else []


@pytest.mark.parametrize("case", CASES)
def test_case(program, case):
    run(*program, re.sub(r"([\\,\[\]])", r"\\\1", case), "--warn", "NoTests")


def test_cases_are_all_listed(program):
    """Guards against a case that CASES does not see, which would never be run."""
    command = [*program, "--list-test-names-only"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    assert sorted(listed.splitlines()) == sorted(CASES)


@pytest.fixture(scope="session")
def library() -> Path:
    """Where the C++ library is built, for the CPU only; test_cuda_build.py has the other."""
    return build("library", GALORE_RRF_TESTS="OFF", GALORE_RRF_CUDA="0")


@pytest.mark.slow
def test_library_computes_what_the_extension_computes(library):
    """Guards against a source missing from csrc/sources.txt and flags that differ from those of setup.py.

    The library links with -Wl,--no-undefined.
    """
    call = "print(torch.ops.galore_rrf.gaussian_sketch(7, 33, seed=5).tolist())"
    load = f"import torch; torch.ops.load_library('{library / 'libgalore_rrf.so'}')"
    from_library = run(sys.executable, "-c", f"{load}; {call}")
    from_extension = run(sys.executable, "-c", f"import torch, galore_rrf.ops; {call}")
    assert from_library == from_extension


@pytest.mark.slow
def test_another_project_uses_the_installed_library(library, tmp_path):
    """Guards against a public function that is not exported, a header left out, internal headers in public ones.

    The program itself compares with theory, and fails where a bound is violated.
    """
    consumer = configure_consumer(library, tmp_path)
    run("cmake", "--build", consumer)
    assert "Invalid rank: 301 (must be from 1 to 300" in run(consumer / "factor")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("torch/version.py", "__version__ = '9.9.0'", r"version .9\.9., but required is\s+exact version"),
        ("torch.py", "", r"choose another\s+Python with -DPython3_EXECUTABLE"),
    ],
    ids=["another", "none"],
)
def test_consumer_is_told_that_the_torch_does_not_fit(library, tmp_path, monkeypatch, file, text, message):
    """Guards against undefined symbols, or a traceback, as the only message."""
    fake = tmp_path / "fake" / file
    fake.parent.mkdir(parents=True)
    fake.write_text(text)
    (fake.parent / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    with pytest.raises(pytest.fail.Exception, match=message):
        configure_consumer(library, tmp_path)


@pytest.mark.parametrize(
    ("struct", "function"),
    [
        ("RangeFinderOptions", galore_rrf.range_finder),
        ("AdaptiveRangeFinderOptions", galore_rrf.adaptive_range_finder),
        ("QbOptions", galore_rrf.qb),
        ("SvdLowrankOptions", galore_rrf.svd_lowrank),
    ],
)
def test_options_have_the_names_and_defaults_of_python(struct, function):
    """Guards against a keyword that one language has and the other has not, or has with another default."""
    header = (ROOT / "csrc/galore_rrf/galore_rrf.h").read_text()
    (body,) = re.findall(rf"^struct {struct} {{$(.*?)^}};$", header, re.MULTILINE | re.DOTALL)
    words = {"true": "True", "false": "False", "std::nullopt": "None"}
    fields = {
        name: ast.literal_eval(words.get(default, default))
        for name, default in re.findall(r"^  [\w:<>]+ (\w+) = ([^;]+);", body, re.MULTILINE)
    }
    parameters = inspect.signature(function).parameters
    assert fields == {name: p.default for name, p in parameters.items() if p.default is not p.empty}
