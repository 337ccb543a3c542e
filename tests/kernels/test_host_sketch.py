"""The sketch kernel on the host: the bits of the operator on the CPU."""

import host_kernels
import pytest
import torch

from galore_rrf import ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BLOCKS = 1 << 20  # more than are needed


def fill(rows, cols, *, dtype, keys, seed=5, row_offset=0, col_offset=0, blocks=BLOCKS, entries_past=0):
    """The matrices that one launch makes for these (key, refresh)."""
    outs = [host_kernels.misaligned(torch.full((rows, cols), 7.0, dtype=dtype), entries_past) for _ in keys]
    which = [x for key, refresh in keys for x in (seed, key, refresh)]
    numbers = [DTYPES.index(dtype), len(keys), rows, cols, row_offset, col_offset, blocks, *which]
    host_kernels.call("fill_sketches", numbers, [], outs)
    return outs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (1, 7), (7, 1), (4, 32), (5, 33), (3, 127), (12, 129), (33, 3)]
)
def test_the_bits_are_those_of_the_cpu(rows, cols, dtype):
    """Guards against another stream, a lost row or column at an edge, and another rounding to 16 bits."""
    (out,) = fill(rows, cols, dtype=dtype, keys=[(3, 9)])
    assert torch.equal(out, ops.gaussian_sketch(rows, cols, seed=5, key=3, refresh=9, dtype=dtype))
