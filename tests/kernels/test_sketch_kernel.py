"""The sketch kernel on the host: the bits of the operator on the CPU."""

import os
import subprocess
from pathlib import Path

import host_kernels
import pytest
import torch

from galore_rrf import ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BLOCKS = 1 << 20  # more than are needed


def fill(
    rows,
    cols,
    *,
    dtype=torch.float32,
    row_offset=0,
    col_offset=0,
    blocks=BLOCKS,
    key=(5, 3, 9),
    entries_past=0,
):
    """The matrix that a launch makes for this (seed, key, refresh)."""
    out = host_kernels.misaligned(torch.full((rows, cols), 7.0, dtype=dtype), entries_past)
    whole = [DTYPES.index(dtype), rows, cols, row_offset, col_offset, blocks, *key]
    host_kernels.call("fill_sketch", whole, [], [out])
    return out


def expected(rows, cols, *, key=(5, 3, 9), **others):
    seed, key, refresh = key
    return ops.gaussian_sketch(rows, cols, seed=seed, key=key, refresh=refresh, **others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (1, 7), (7, 1), (4, 32), (5, 33), (3, 127), (12, 129), (33, 3)]
)
def test_the_bits_are_those_of_the_cpu(rows, cols, dtype):
    """Guards against another stream, a lost row or column at an edge, and another rounding to 16 bits."""
    assert torch.equal(fill(rows, cols, dtype=dtype), expected(rows, cols, dtype=dtype))


@pytest.mark.parametrize("row_offset", [1, 2, 3, 4, 4098])
def test_a_part_is_cut_from_the_whole(row_offset):
    """Guards against strips that begin at the part, not at a multiple of four rows."""
    part = {"row_offset": row_offset, "col_offset": 13}
    for rows in (1, 2, 3, 6):
        assert torch.equal(fill(rows, 5, **part), expected(rows, 5, **part))


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_few_blocks_take_turns(blocks):
    """Guards against a loop that leaves out or repeats what one round of the launch does not cover."""
    for rows, cols in ((9, 300), (70, 3), (40, 150)):
        assert torch.equal(fill(rows, cols, blocks=blocks), expected(rows, cols))


def test_offsets_key_and_seed_are_of_full_width():
    """Guards against arithmetic in 32 bits, and against the words of a counter in another order."""
    last = 2**34 - 6
    for key in ((2**63 - 1, 2**32 - 1, 2**32 - 2), (1 << 32, 0, 1), (0, 1, 0)):
        part = {"row_offset": last, "col_offset": 2**32 - 7}
        assert torch.equal(fill(6, 7, key=key, **part), expected(6, 7, key=key, **part))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_matrix_need_not_be_aligned(dtype):
    """Guards against loads and stores of several entries at once."""
    assert torch.equal(fill(5, 33, dtype=dtype, entries_past=1), expected(5, 33, dtype=dtype))


def test_only_what_is_asked_for_is_written():
    """Guards against a mask left out at the last row or column."""
    memory = torch.full((8 + 5 * 33 + 8,), 7.0)
    whole = [0, 5, 33, 2, 0, BLOCKS, 5, 3, 9]
    host_kernels.call("fill_sketch", whole, [], [memory[8:-8]])
    assert (memory[:8] == 7).all()
    assert (memory[-8:] == 7).all()


def toolkit_headers() -> list[Path]:
    """Folders that together have cuRAND's header and what it includes; none without a toolkit."""
    site = Path(torch.__file__).parent.parent
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    folders = [
        folder
        for top in (*site.glob("nvidia/*/include"), toolkit / "include")
        for folder in (top, top / "cccl")
    ]
    needed = ["curand_philox4x32_x.h", "nv/target", "vector_types.h"]
    return folders if all(any((f / name).exists() for f in folders) for name in needed) else []


@pytest.mark.skipif(not toolkit_headers(), reason="no header of cuRAND")
def test_the_stream_is_that_of_curand(tmp_path):
    """Guards against a generator that is Philox in name: another round, constant or order of words."""
    source, program = host_kernels.FOLDER / "curand_philox.cpp", tmp_path / "curand_philox"
    includes = [word for folder in toolkit_headers() for word in ("-isystem", folder)]
    flags = [*host_kernels.FLAGS, f"-I{host_kernels.ROOT / 'csrc'}", *includes]
    subprocess.run(["g++", *flags, source, "-o", program], check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "0\n"
