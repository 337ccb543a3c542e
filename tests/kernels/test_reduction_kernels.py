"""Sums of squares, finiteness and powers of two on the host."""

import math

import host_kernels
import pytest
import torch

DTYPES = [torch.float32, torch.float64]
CHUNK = 8192
ENTRIES = [1, 31, 33, 255, 257, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 700]
BLOCKS = 1 << 20


def stack(entries, dtype, matrices=2, gap=0, entries_past=0):
    """Matrices of normals, and between them NaN."""
    memory = torch.full((matrices, entries + gap), math.nan, dtype=dtype)
    memory[:, :entries] = torch.randn(matrices, entries, generator=torch.Generator().manual_seed(entries))
    return host_kernels.misaligned(memory, entries_past)


def reduce(name, memory, entries, results, blocks=BLOCKS):
    matrices, stride = memory.shape
    whole = [DTYPES.index(memory.dtype), matrices, entries, stride, blocks]
    host_kernels.call(name, whole, [], [memory, results])
    return results


def squared_norms(memory, entries, blocks=BLOCKS):
    results = torch.full((memory.shape[0],), math.nan, dtype=torch.float64)
    return reduce("squared_norms", memory, entries, results, blocks)


def all_finite(memory, entries, blocks=BLOCKS):
    results = torch.full((memory.shape[0],), 9, dtype=torch.uint8)
    return reduce("all_finite", memory, entries, results, blocks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entries", ENTRIES)
def test_every_square_is_added_once(entries, dtype):
    """Guards against a lost or repeated entry at the end of a warp, block or chunk: integers add up exactly."""
    memory = torch.full((2, entries + 3), math.nan, dtype=dtype)
    memory[:, :entries] = torch.arange(1, 2 * entries + 1).view(2, entries) % 1001
    expected = memory[:, :entries].double().square().sum(1)
    assert torch.equal(squared_norms(memory, entries), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_exact_to_rounding(dtype):
    """Guards against sums in fp32 and against sums whose error grows with their length."""
    memory = stack(ENTRIES[-1], dtype)
    exact = [math.fsum(x * x for x in row) for row in memory.double().tolist()]
    for value, expected in zip(squared_norms(memory, ENTRIES[-1]).tolist(), exact, strict=True):
        assert abs(value - expected) <= 4 * 2**-53 * expected


def test_sums_neither_overflow_nor_vanish_in_fp32():
    """Guards against squares in fp32."""
    for power in (127, -149):
        memory = torch.full((1, 35), 2.0**power)
        assert squared_norms(memory, 35).tolist() == [35 * 2.0 ** (2 * power)]
    assert squared_norms(torch.full((1, 3), math.inf), 3).tolist() == [math.inf]


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_bits_do_not_depend_on_the_launch(blocks):
    """Guards against an order of additions that follows the number of blocks."""
    memory = stack(2 * CHUNK + 700, torch.float64)
    assert torch.equal(squared_norms(memory, 2 * CHUNK + 700, blocks), squared_norms(memory, 2 * CHUNK + 700))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entries", [1, 33, 257, CHUNK + 1])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_entry_that_is_not_finite_is_found(entries, dtype, bad):
    """Guards against an entry that no thread looks at, and against one that tells of another matrix."""
    extremes = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 5e-324, 0.0], dtype=dtype)
    memory = torch.full((3, entries + 1), math.nan, dtype=dtype)
    memory[:, :entries] = extremes.repeat(entries)[: 3 * entries].view(3, entries)
    assert all_finite(memory, entries).tolist() == [1, 1, 1]
    for at in {0, entries // 2, entries - 1}:
        spoilt = memory.clone()
        spoilt[1, at] = bad
        assert all_finite(spoilt, entries).tolist() == [1, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("entries", "blocks"), [(1, BLOCKS), (3, BLOCKS), (300, 1), (1025, 2)])
def test_powers_of_two_are_exact(entries, blocks, dtype):
    """Guards against a factor that overflows where the product does not, and against another matrix's."""
    memory = stack(entries, dtype, matrices=4, gap=1, entries_past=1)
    huge = 130 if dtype == torch.float32 else 1030
    exponents = torch.tensor([0, 3, -17, -huge], dtype=torch.int32)
    memory[3] *= 2.0 ** (huge - 10)
    expected = torch.ldexp(memory[:, :entries].double(), -exponents.clamp(min=-huge)[:, None]).to(dtype)
    expected[3] = memory[3, :entries] * 2.0**100 * 2.0 ** (huge - 100)
    whole = [DTYPES.index(dtype), 4, entries, entries + 1, blocks, -1]
    host_kernels.call("scale_by_powers", whole, [], [memory, exponents])
    assert torch.equal(memory[:, :entries], expected)
    assert memory[:, entries:].isnan().all()
