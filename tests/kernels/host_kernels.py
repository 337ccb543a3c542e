"""The sources of the CUDA kernels, compiled for the host with the shim and called from here.

A call is a name (tests/kernels/calls/), whole numbers, real numbers and buffers, which it writes to.  It is made in
both orders of turns, which must agree.  With GALORE_RRF_RECORD_CALLS, a folder, small calls are kept there as files,
arguments and results, for the sanitized programs.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
BUILD = ROOT / "build/kernels"

# What of setup.py's flags changes results; -O1 besides, which compiles in half the time.
FLAGS = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror", "-pthread"]
# Function clones are chosen by the loader, before a sanitizer has begun; and of getcontext, which it takes for
# setjmp, gcc warns under AddressSanitizer.
_NO_CLONES = "-DGALORE_RRF_NO_SIMD_CLONES"
SANITIZE = {
    "plain": [],
    "thread": ["-fsanitize=thread", "-DSHIM_TSAN", _NO_CLONES],
    "address": [
        "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DSHIM_ASAN", "-Wno-clobbered", _NO_CLONES,
    ],
}  # fmt: skip


def sources() -> list[Path]:
    """One file a header of kernels, and what they share."""
    return [FOLDER / "shim/shim.cpp", FOLDER / "calls.cpp", *sorted((FOLDER / "calls").glob("*.cpp"))]


def compile_object(
    source: Path, sanitizer: str = "plain", csrc: Path = ROOT / "csrc", more: Sequence[str] = ()
) -> Path:
    """The object file of a source, from an earlier run where what it is made of is the same."""
    flags = [*FLAGS, *SANITIZE[sanitizer], *more]
    if source.name == "shim.cpp" and "-fsanitize=thread" in flags:
        flags.remove("-fsanitize=thread")  # see there
    command = ["g++", *flags, f"-I{csrc}", f"-I{FOLDER}", f"-I{FOLDER / 'shim'}"]
    preprocessed = subprocess.run([*command, "-E", "-P", source], capture_output=True, check=True).stdout
    content = hashlib.sha256("\0".join(flags).encode() + preprocessed).hexdigest()[:24]
    target = BUILD / f"{source.stem}-{content}.o"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}.part")
        done = subprocess.run(
            [*command, "-c", source, "-o", part], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        part.rename(target)
    return target


def link(objects: Sequence[Path], flags: Sequence[str], suffix: str) -> Path:
    content = hashlib.sha256("\0".join([*map(str, objects), *flags]).encode()).hexdigest()[:24]
    target = BUILD / f"kernels-{content}{suffix}"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}.part")
        subprocess.run(["g++", *flags, *objects, "-pthread", "-o", part], check=True)
        part.rename(target)
    return target


def link_program(objects: Sequence[Path], sanitizer: str) -> Path:
    return link(objects, [flag for flag in SANITIZE[sanitizer] if flag.startswith("-fsanitize")], "")


def compile_all(files: Sequence[Path], sanitizer: str = "plain") -> list[Path]:
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest-xdist build one after another
        return list(pool.map(lambda source: compile_object(source, sanitizer), files))


@cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(link(compile_all(sources()), ["-shared"], ".so")))
    loaded.galore_rrf_call.restype = ctypes.c_char_p
    return loaded


def _bytes(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def _run(name: str, descending: bool, whole: Sequence[int], real: Sequence[float], buffers: Sequence[Tensor]):
    error = library().galore_rrf_call(
        name.encode(),
        ctypes.c_bool(descending),
        (ctypes.c_int64 * len(whole))(*whole),
        (ctypes.c_double * len(real))(*real),
        (ctypes.c_void_p * len(buffers))(*[b.data_ptr() for b in buffers]),
    )
    if error is not None:
        raise RuntimeError(error.decode())


def call(name: str, whole: Sequence[int], real: Sequence[float], buffers: Sequence[Tensor]) -> None:
    """Calls a kernel on the memory of `buffers`: each a tensor in one piece, read, written or both."""
    assert all(b.is_contiguous() for b in buffers)
    whole = [x - (1 << 64) if x >= 1 << 63 else x for x in whole]
    before = [b.clone() for b in buffers]
    other = [b.clone() for b in buffers]
    _run(name, True, whole, real, other)
    _run(name, False, whole, real, buffers)
    for one, two in zip(buffers, other, strict=True):
        assert _bytes(one) == _bytes(two), f"{name} depends on the order in which threads take turns"
    folder = os.environ.get("GALORE_RRF_RECORD_CALLS")
    # A thread costs ThreadSanitizer two milliseconds.
    if folder and library().galore_rrf_most_threads() <= 1024:
        _record(Path(folder), name, whole, real, before, buffers)


def _record(folder: Path, name: str, whole, real, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """A file that replay.cpp reads."""

    def array(values: bytes, count: int) -> bytes:
        return struct.pack("q", count) + values

    parts = [array(name.encode(), len(name))]
    parts.append(array(struct.pack(f"{len(whole)}q", *whole), len(whole)))
    parts.append(array(struct.pack(f"{len(real)}d", *real), len(real)))
    offsets = [tensor.data_ptr() % 16 for tensor in after]
    parts.append(array(struct.pack(f"{len(offsets)}q", *offsets), len(offsets)))
    floats = [b.element_size() if b.dtype in (torch.float32, torch.float64) else 0 for b in after]
    parts.append(array(struct.pack(f"{len(floats)}q", *floats), len(floats)))
    for old, new in zip(before, after, strict=True):
        parts += [array(data, len(data)) for data in (_bytes(old), _bytes(new))]
    content = b"".join(parts)
    (folder / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}.call").write_bytes(content)


def misaligned(tensor: Tensor, entries: int = 1) -> Tensor:
    """A copy that begins `entries` entries past an aligned address."""
    memory = torch.empty(tensor.numel() + entries, dtype=tensor.dtype)
    return memory[entries:].view(tensor.shape).copy_(tensor)


def replay(program: Path, files: Sequence[Path]) -> subprocess.CompletedProcess:
    """Runs a program that `link_program` made of replay.cpp over files that `call` left."""
    # ThreadSanitizer fails on much randomization of addresses.
    prefix = (
        ["setarch", "-R"] if subprocess.run(["setarch", "-R", "true"], check=False).returncode == 0 else []
    )
    return subprocess.run(
        [*prefix, program, *files],
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1 history_size=0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )
