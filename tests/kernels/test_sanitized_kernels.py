"""The kernels under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer, and proof that these see errors.

The calls are those of the other tests here, their arguments and results kept as files.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import host_kernels
import pytest

pytestmark = pytest.mark.slow

CUDA = host_kernels.ROOT / "csrc/cuda"


@pytest.fixture(scope="session")
def calls(tmp_path_factory) -> Path:
    """A folder with a file a call that the everyday tests make."""
    folder = tmp_path_factory.mktemp("calls")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        str(host_kernels.FOLDER),
    ]
    environment = {**os.environ, "GALORE_RRF_RECORD_CALLS": str(folder)}
    done = subprocess.run(
        command, cwd=host_kernels.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return folder


@pytest.mark.parametrize("sanitizer", list(host_kernels.SANITIZE))
def test_calls_give_the_same_results_and_no_report(sanitizer, calls):
    """Guards against races within and between blocks, accesses out of bounds, undefined behaviour."""
    objects = host_kernels.compile_all(
        [*host_kernels.sources(), host_kernels.FOLDER / "replay.cpp"], sanitizer
    )
    done = host_kernels.replay(host_kernels.link_program(objects, sanitizer), sorted(calls.iterdir()))
    assert done.returncode == 0, done.stdout


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands once in `header`, replaced by `new`; seen by calls of `module`."""

    header: str
    module: str
    old: str
    new: str

    def __str__(self):
        return f"{self.header}: {self.old} -> {self.new}"


MUTATIONS = [
    Mutation("device.cuh", "reductions", "distance > 0;", "distance > 1;"),
    Mutation("device.cuh", "reductions", "distance = kWarp / 2", "distance = kWarp / 4"),
    Mutation("device.cuh", "reductions", "__shfl_xor_sync(kAllLanes, value", "__shfl_xor_sync(0xFFFFu, value"),
    Mutation("device.cuh", "reductions", "if (threadIdx.x % kWarp == 0) ", ""),
    Mutation("device.cuh", "reductions", "unsigned warp = 1;", "unsigned warp = 2;"),
    Mutation("device.cuh", "reductions", "warp < blockDim.x / kWarp", "warp <= blockDim.x / kWarp"),
    Mutation("plane.cuh", "moments", "row < height", "row <= height"),
    Mutation("plane.cuh", "sketch", "j < width", "j <= width"),
    Mutation("plane.cuh", "moments", "plane < planes", "plane <= planes"),
    Mutation("plane.cuh", "sketch", "row += int64_t{gridDim.y} * blockDim.y", "row += blockDim.y"),
    Mutation("plane.cuh", "sketch", "j += int64_t{gridDim.x} * blockDim.x", "j += blockDim.x"),
    Mutation("plane.cuh", "sketch", "blockIdx.x} * blockDim.x + threadIdx.x", "blockIdx.x} + threadIdx.x"),
    Mutation("sketch.cuh", "sketch", "row >= 0 && ", ""),
    Mutation("sketch.cuh", "sketch", " && row < sketch.rows", ""),
    Mutation("sketch.cuh", "sketch", "row < sketch.rows", "row <= sketch.rows"),
    Mutation("sketch.cuh", "sketch", "row_offset + rows + 3", "row_offset + rows"),
    Mutation("sketch.cuh", "sketch", "static_cast<uint32_t>(sketch.col_offset + j)", "static_cast<uint32_t>(j)"),
    Mutation("reductions.cuh", "reductions", "if (at < a.entries) ", ""),
    Mutation("reductions.cuh", "reductions", "at < a.entries", "at <= a.entries"),
    Mutation("reductions.cuh", "reductions", "chunk < chunks", "chunk <= chunks"),
    Mutation("reductions.cuh", "reductions", "first < begin + kChunk", "first <= begin + kChunk"),
    Mutation("reductions.cuh", "reductions", "if (threadIdx.x == 0) parts", "parts"),
    Mutation("reductions.cuh", "reductions", "c < chunks", "c <= chunks"),
    Mutation("reductions.cuh", "reductions", "if (threadIdx.x == 0) results", "results"),
    Mutation("reductions.cuh", "reductions", "a.data + b * a.stride;\n    for", "a.data;\n    for"),
    Mutation("reductions.cuh", "reductions", "sign * exponents[b]", "sign * exponents[b + 1]"),
    Mutation("moments.cuh", "moments", "f(block, i, i < entries)", "f(block, i, i <= entries)"),
    Mutation("moments.cuh", "moments", "f(block, i, i < entries)", "f(block, i, true)"),
    Mutation("moments.cuh", "moments", "kCodeBlock < entries; block +=", "kCodeBlock <= entries; block +="),
    Mutation("moments.cuh", "moments", "if (inside) gradient[i] = 0", "gradient[i] = 0"),
    Mutation("moments.cuh", "moments", "if (inside) moment.values", "moment.values"),
    Mutation("moments.cuh", "moments", "if (threadIdx.x == 0) moment.scale", "moment.scale"),
    Mutation("moments.cuh", "moments", "if (!moves(a.outcomes[b]))", "if (!moves(a.outcomes[0]))"),
    Mutation("moments.cuh", "moments", "a.active[b] == 0", "a.active[0] == 0"),
    Mutation("moments.cuh", "moments", "static_cast<uint32_t>(both >> 32)", "static_cast<uint32_t>(both)"),
    Mutation("moments.cuh", "moments", "moment.scale[block])", "moment.scale[0])"),
    Mutation("moments.cuh", "moments", "if (b >= a.matrices) return;", "if (b > a.matrices) return;"),
    Mutation("moments.cuh", "far", "const int64_t i = block * kCodeBlock", "const int i = block * kCodeBlock"),
    Mutation("reductions.cuh", "far", "const int64_t begin = chunk", "const int begin = chunk"),
    Mutation("sketch.cuh", "far", "sketch.out[row * sketch.cols + j]", "sketch.out[int(row * sketch.cols + j)]"),
    Mutation("moments.cuh", "moments", "b * stride + row * row_stride + j", "b * stride + row * row_stride + j + 1"),
    Mutation("moments.cuh", "moments", "1 / a.corrections[2 * b + 1]", "1 / a.corrections[2 * b]"),
    Mutation("panel.cuh", "panel", "if (stack.active[matrix] == 0) return;", ""),
    Mutation("panel.cuh", "panel", "kept + __shfl_xor_sync(kAllLanes, given, kOffset)", "kept + given"),
    Mutation("panel.cuh", "panel", "values[0], kOffset", "values[0], kOffset / 2"),
    Mutation("panel.cuh", "panel", "lane / kLanes * kHeld + i]", "lane / kLanes + i]"),
    Mutation("panel.cuh", "panel", "for (int w = 1; w < warps; ++w)", "for (int w = 1; w <= warps; ++w)"),
    Mutation("panel.cuh", "panel", "row < from ? row + threads_ : row", "row"),
    Mutation("panel.cuh", "panel", "i < first + j ? T{0}", "i <= first + j ? T{0}"),
    Mutation("panel.cuh", "panel", "if (i <= j && j < width) f(i, j);", "if (i <= j) f(i, j);"),
    Mutation("panel.cuh", "panel", "if (j < c && c < width) column", "if (j < c) column"),
    Mutation("panel.cuh", "panel", "if (c < count) target(c)[i] = entry;", "target(c)[i] = entry;"),
    Mutation("panel.cuh", "panel", "if (c >= width) continue;", ""),
    Mutation("panel.cuh", "panel", "== 0) {  // H = I", "== 7) {  // H = I"),
    Mutation("panel.cuh", "panel", "if (i < j) row(i)[j] *= sign;", "if (i > j) row(i)[j] *= sign;"),
    Mutation("panel.cuh", "panel", "if (k >= width_) continue;", ""),
    Mutation("panel.cuh", "panel", "int64_t i = end + warp;", "int64_t i = first + warp;"),
    Mutation("panel.cuh", "panel", "if (thread_ < end - first) row(first + thread_)", "row(first + thread_)"),
    Mutation("rounding.cuh", "rounding", "j >= 0 && j < sum.cols", "j < sum.cols"),
    Mutation("rounding.cuh", "rounding", "j >= 0 && j < sum.cols", "j >= 0 && j <= sum.cols"),
    Mutation("rounding.cuh", "rounding", "i += gridDim.y", "i += 1"),
    Mutation("rounding.cuh", "rounding", "chunk += warps", "chunk += warps + 1"),
    Mutation("rounding.cuh", "rounding", "chunk * kRoundingChunk < end", "(chunk + 1) * kRoundingChunk < end"),
    Mutation("residual.cuh", "residual", "given[i * stride + j]), x[", "given[i * cols + j]), x["),
    Mutation("residual.cuh", "residual", "given = a.list[b];", "given = a.list[0];"),
    Mutation("residual.cuh", "residual", "scale[i * of_row + j * of_col]", "scale[i * of_row + j]"),
    Mutation("residual.cuh", "residual", "j += int64_t{gridDim.x} * blockDim.x", "j += blockDim.x"),
    Mutation("residual.cuh", "residual", "if (threadIdx.x == 0) sums[i]", "sums[i]"),
    Mutation("residual.cuh", "residual", "i += gridDim.x", "i += gridDim.x + 1"),
    Mutation("residual.cuh", "residual", "beta * widened<T>(entry)", "widened<T>(entry)"),
    Mutation("residual.cuh", "residual", "entry = w[i * stride + j];", "entry = w[i * stride + j + 1];"),
    Mutation("gemm_pointers.cuh", "gemm", "if (i >= p.count) return;", "if (i > p.count) return;"),
    Mutation("gemm_pointers.cuh", "gemm", "p.outcomes != nullptr && ", ""),
]  # fmt: skip

# Which calls each header with barriers is seen by.
BARRIERS = {"device.cuh": "reductions", "panel.cuh": "panel"}


def barriers() -> list[tuple[str, int]]:
    """Every barrier of every kernel: its header, and which of them it is there."""
    return [
        (header.name, i)
        for header in sorted(CUDA.glob("*.cuh"))
        for i in range(len(re.findall(r"__sync(threads|warp)\w*\(", header.read_text())))
    ]


def mutated(folder: Path, header: str, text: str) -> Path:
    """A copy of what kernels are made of, with another text of one header."""
    for part in ("math", "cpu", "cuda"):
        shutil.copytree(host_kernels.ROOT / "csrc" / part, folder / part)
    (folder / "cuda" / header).write_text(text)
    return folder


def failure(csrc: Path, module: str, sanitizer: str, calls: Path) -> str:
    """What goes wrong with the calls of a module, compiled with these sources; empty if nothing does."""
    source = host_kernels.FOLDER / f"calls/{module}.cpp"
    names = re.findall(r'Registered \w+\(\s*"(\w+)"', source.read_text())
    files = [file for file in sorted(calls.iterdir()) if file.name.rsplit("-", 1)[0] in names]
    assert files, f"no test calls {' or '.join(names)}"
    shared = [host_kernels.FOLDER / name for name in ("shim/shim.cpp", "calls.cpp", "replay.cpp")]
    objects = host_kernels.compile_all(shared, sanitizer)
    objects.append(host_kernels.compile_object(source, sanitizer, csrc, more=["-O0", "-w"]))
    try:
        done = host_kernels.replay(host_kernels.link_program(objects, sanitizer), files)
    except subprocess.TimeoutExpired:
        return "never ends"
    return done.stdout or f"ended with {done.returncode}" if done.returncode != 0 else ""


@pytest.mark.parametrize(("header", "number"), barriers())
def test_a_barrier_that_is_missing_is_a_race(header, number, calls, tmp_path):
    """Guards against a barrier that nothing needs, and against tests that would not see a missing one."""
    text = (CUDA / header).read_text()
    found = list(re.finditer(r"__sync(threads|warp)\w*\([^;]*;", text))[number]
    assert re.match(r"__sync(threads|warp)\(", found[0]), "a barrier with a vote is more than a barrier"
    text = text[: found.start()] + ";" + text[found.end() :]
    seen = failure(mutated(tmp_path, header, text), BARRIERS[header], "thread", calls)
    assert "ThreadSanitizer: data race" in seen, seen


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_seen(mutation, calls, tmp_path):
    """Guards against tests that see no wrong index, mask or shuffle: compared, then under each sanitizer."""
    text = (CUDA / mutation.header).read_text()
    assert text.count(mutation.old) == 1
    csrc = mutated(tmp_path, mutation.header, text.replace(mutation.old, mutation.new))
    assert any(failure(csrc, mutation.module, sanitizer, calls) for sanitizer in host_kernels.SANITIZE)
