"""Matrices of over 2^31 entries on the host: only their last entries are computed, and only they have memory."""

import host_kernels
import pytest
import torch
from test_moment_kernels import OPTIONS, STEPPED, normals
from test_sketch_kernel import expected

FAR = 2**31


def test_the_end_of_a_large_test_matrix():
    """Guards against an index of 32 bits."""
    end = torch.zeros(1, 128, dtype=torch.bfloat16)
    host_kernels.call("far_sketch", [FAR // 2**14 + 3, 2**14 + 128, 5, 3, 9], [], [end])
    part = {"row_offset": FAR // 2**14 + 2, "col_offset": 2**14, "dtype": torch.bfloat16}
    assert torch.equal(end, expected(1, 128, **part))


@pytest.mark.parametrize("entries", [FAR + 44, 2 * FAR + 44])
def test_the_end_of_a_large_matrix_is_stepped_as_a_small_one(entries):
    """Guards against an index of 32 bits, of entries or of the blocks that share a scale."""
    factors = torch.tensor([[1.5, -0.01, 0.9]], dtype=torch.float64)
    outcomes = torch.tensor([STEPPED], dtype=torch.uint8)
    codes = [torch.arange(44, dtype=torch.uint8) + 100, torch.arange(44, dtype=torch.uint8) + 150]
    small = [normals(44), factors, outcomes, codes[0], torch.tensor([2.0]), codes[1], torch.tensor([3.0])]
    large = [t.clone() for t in small]
    host_kernels.call("adam", [0, 3, 1, 44, 44, 1, 0, 1, 0], OPTIONS, small)
    host_kernels.call("far_adam", [entries], OPTIONS, large)
    for one, two in zip(small, large, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("entries", [FAR + 44, 2 * FAR + 44])
def test_the_end_of_a_large_matrix_is_summed(entries):
    """Guards against an index of 32 bits."""
    end, part = torch.arange(1.0, 45), torch.zeros(1, dtype=torch.float64)
    host_kernels.call("far_squared_norm", [entries, 44], [], [end, part])
    assert part.item() == sum(i * i for i in range(1, 45))
