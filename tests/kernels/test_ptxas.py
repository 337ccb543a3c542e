"""What the kernels take of a multiprocessor, as ptxas reports it."""

import os
import re
import shutil
import subprocess
from collections import defaultdict

import host_kernels
import pytest

NVCC = shutil.which(
    "nvcc",
    path=os.pathsep.join([f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ["PATH"]]),
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc")]

CUDA = host_kernels.ROOT / "csrc/cuda"
ARCHITECTURES = {"sm_80", "sm_90"}
# Registers a thread and bytes of static shared memory a block.  A multiprocessor has 65536 registers: of these
# kernels, which wait for memory, it is to hold 1024 threads or more.
USUAL = (64, 1024)
# One block of 384 threads to a multiprocessor, which loads sixteen numbers a thread before it uses any.
BUDGETS = {"householder_kernel": (65536 // 384, 6144), "signed_lu_kernel": (65536 // 384, 1024)}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, list[str]]:
    """The lines about each instance of a kernel: (name, architecture) in words."""
    command = [
        NVCC, "-std=c++20", "-fmad=false", "-Xptxas", "-v", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra",
        "-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=[sm_90,compute_90]",
        f"-I{host_kernels.ROOT / 'csrc'}", "-c", host_kernels.FOLDER / "instances.cu",
        "-o", tmp_path_factory.mktemp("ptxas") / "instances.o",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    lines, instance = defaultdict(list), ""
    for line in done.stdout.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            instance = " ".join(entry.groups())
        lines[instance].append(line)
    del lines[""]
    return lines


def kernel_of(instance: str) -> str:
    """The name of a kernel in a mangled one, which puts its length before it."""
    return next(name for name in kernels() if f"{len(name)}{name}" in instance)


def kernels() -> list[str]:
    text = "".join(header.read_text() for header in sorted(CUDA.glob("*.cuh")))
    return re.findall(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", text)


def test_every_kernel_is_compiled_for_every_architecture(report):
    """Guards against a kernel that instances.cu leaves out, whose budget nothing would check."""
    expected = {(name, architecture) for name in kernels() for architecture in ARCHITECTURES}
    assert {(kernel_of(instance), instance.split()[1]) for instance in report} == expected


def test_nothing_is_spilled(report):
    """Guards against registers kept in memory, and arrays that are there since an index is not constant."""
    for instance, lines in report.items():
        sizes = [int(n) for line in lines for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", line)]
        assert sizes, instance
        assert not any(sizes), instance


def test_registers_and_shared_memory_are_within_budgets(report):
    """Guards against kernels of which too few threads fit a multiprocessor to hide the time of its memory."""
    for instance, lines in report.items():
        (used,) = (line for line in lines if "Used" in line)
        registers = int(re.search(r"Used (\d+) registers", used)[1])
        shared = re.search(r"(\d+) bytes smem", used)
        most_registers, most_shared = BUDGETS.get(kernel_of(instance), USUAL)
        assert registers <= most_registers, instance
        assert (int(shared[1]) if shared else 0) <= most_shared, instance
