"""Stochastic rounding: its law, its bits, and the kernel for CUDA, on the host, against the CPU's."""

import host_kernels
import pytest
import torch

from galore_rrf import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
STREAM = 0x9D39247E33776D41


def add(w, x, *, beta=1.0, seed=5, matrix=3, step=11, first_entry=0, blocks=(2, 2)):
    """w <- beta w + x by the kernel, in place; two-dimensional, rows in one piece each."""
    assert w.stride(1) == x.stride(1) == 1
    memory = [t.as_strided((t.stride(0) * (t.shape[0] - 1) + t.shape[1],), (1,)) for t in (w, x)]
    whole = [DTYPES.index(w.dtype), *w.shape, w.stride(0), x.stride(0), first_entry, seed, matrix, *blocks]
    host_kernels.call("add_rounded", whole, [], [*memory, torch.tensor([beta, step], dtype=torch.float64)])
    return w


def add_on_cpu(w, x, *, beta=1.0, seed=5, matrix=3, step=11, first_entry=0):
    whole = [DTYPES.index(w.dtype), w.numel(), first_entry, seed, matrix]
    scalars = torch.tensor([beta, step], dtype=torch.float64)
    host_kernels.call("add_rounded_on_cpu", whole, [], [w, x, scalars])
    return w


def random_words(entries, *, seed=5, matrix=3, step=11):
    """The word of each entry, as math/stochastic_rounding.h deals them out."""
    number = torch.arange(entries)
    counter = number // 256 * 32 + number % 32
    half = number // 32 % 8
    fixed = [torch.full_like(counter, k) for k in (matrix, step)]
    words = reference.philox4x32_10([counter & 0xFFFFFFFF, counter >> 32, *fixed], seed ^ STREAM)
    word = torch.stack(words).gather(0, (half // 2)[None])[0]
    return torch.where(half % 2 == 0, word, (word << 16 | word >> 16) & 0xFFFFFFFF)


def neighbours(x, dtype):
    """The numbers of `dtype` next to those of x (fp64), towards zero and away, and where between them x lies."""
    nearest = x.to(dtype)
    bits = nearest.view(torch.int16).int() & 0x7FFF
    below = torch.where(nearest.double().abs() > x.abs(), bits - 1, bits)
    values = [(b.to(torch.int16).view(dtype).double()) for b in (below, below + 1)]
    return [v * x.sign() for v in values], (x.abs() - values[0]) / (values[1] - values[0])


def values_of_all_sizes(dtype, count):
    """fp32 numbers from under the least of the type to near its largest."""
    largest = 15 if dtype == torch.float16 else 120
    exponent = torch.linspace(-26 if dtype == torch.float16 else -120, largest, count)
    signs = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)
    return (
        signs * torch.exp2(exponent) * (1 + torch.rand(count, generator=torch.Generator().manual_seed(2)) / 2)
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_bits_are_those_of_the_definition(dtype):
    """Guards against another stream, the words dealt out otherwise, and a threshold off by one."""
    x = values_of_all_sizes(dtype, 3000)
    found = add(torch.zeros(1, 3000, dtype=dtype), x[None])[0]
    (towards_zero, away), share = neighbours(x.double(), dtype)
    up = random_words(3000).double() * 2.0**-32 >= 1 - share
    if dtype == torch.float16:  # by a comparison, where numbers are 2^-24 apart
        small = (random_words(3000) >> 1).double() * 2.0**-31 < share
        up = torch.where(x.abs() < 2.0**-14, small, up)
    assert torch.equal(found.double(), torch.where(up, away, towards_zero))
    assert 0.4 < float(up.double().mean()) < 0.6


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mean_is_exact(dtype):
    """Guards against a bias: over many seeds the mean is beta w + x to its statistical error."""
    count, seeds = 512, 64
    w = values_of_all_sizes(dtype, count).to(dtype)
    w = w[w != 0]
    x = (w.float().abs() * 2.0**-9).mul(torch.rand(len(w), generator=torch.Generator().manual_seed(1)) - 0.5)
    exact = 0.9375 * w.double() + x.double()
    (low, high), _ = neighbours(exact, dtype)
    mean, rounded = torch.zeros_like(exact), exact.to(dtype)
    differs = False
    for seed in range(seeds):
        found = add_on_cpu(w.clone(), x, beta=0.9375, seed=seed)
        assert ((found.double() == low) | (found.double() == high)).all()
        differs |= not torch.equal(found, rounded)
        mean += found.double() / seeds
    assert differs
    # In units of the distance of two numbers: of one entry, then of all of them together.
    error = (mean - exact) / (high - low)
    assert float(error.abs().max()) < 5 * 0.5 / seeds**0.5
    assert abs(float(error.mean())) < 5 * 0.5 / (seeds * len(w)) ** 0.5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_entries_are_rounded_independently(dtype):
    """Guards against neighbours, or the halves of one random word, that are rounded up together."""
    n = 1 << 16
    x = torch.full((1, n), 1 + 2.0**-9 if dtype == torch.bfloat16 else 1 + 2.0**-12)
    share = 0.25
    rounds = [add_on_cpu(torch.zeros(n, dtype=dtype), x[0], step=step) > 1 for step in (1, 2)]
    rounds.append(add_on_cpu(torch.zeros(n, dtype=dtype), x[0], matrix=4) > 1)
    up = [(r.double() - share) / (share * (1 - share)) ** 0.5 for r in rounds]
    for a in up:
        assert abs(float(a.mean())) < 5 / n**0.5
    pairs = [(up[0], up[1]), (up[0], up[2])]
    pairs += [(up[0][:-lag], up[0][lag:]) for lag in (1, 2, 32, 64, 128, 256)]
    for a, b in pairs:
        assert abs(float((a * b).mean())) < 5 / n**0.5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_representable_stays(dtype):
    """Guards against a weight that moves by itself, infinities and NaN turned to numbers, and a lost zero's sign."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    w = every.clone()
    add_on_cpu(w, torch.full((len(w),), -0.0))
    numbers = ~every.isnan()
    assert torch.equal(w.view(torch.int16)[numbers], every.view(torch.int16)[numbers])
    assert w[~numbers].isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_overflow_is_that_of_rounding_to_nearest(dtype):
    """Guards against an infinity where the largest number is nearer, or a wrap into another sign."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([1.0, 1 + 2.0**-13, 1 + 2.0**-12, 1 + 2.0**-11, 1.001, 1.003, 1.1, 3.0]) * largest
    x = torch.cat([x, torch.tensor([torch.inf, torch.nan, 3.4e38])])
    x = torch.cat([x, -x]).repeat(20)
    found = add_on_cpu(torch.zeros(len(x), dtype=dtype), x)
    torch.testing.assert_close(found, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert found.isinf().any()
    assert (found == largest).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first_entry", [0, 1, 255, 300, (1 << 40) + 77])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 1), (1, 700), (5, 33), (4, 256), (3, 513)])
def test_the_bits_are_those_of_the_cpu(rows, cols, first_entry, dtype):
    """Guards against entries lost or written twice at the edges of rows, and 32-bit numbers of entries."""
    generator = torch.Generator().manual_seed(rows + cols)
    w = torch.randn(rows, cols, generator=generator).to(dtype)
    x = 0.01 * torch.randn(rows, cols, generator=generator)
    expected = add_on_cpu(w.flatten().clone(), x.flatten(), beta=0.999, first_entry=first_entry)
    found = add(w.clone(), x, beta=0.999, first_entry=first_entry)
    assert torch.equal(found, expected.view(rows, cols))
    if dtype == torch.float32:
        torch.testing.assert_close(found, 0.999 * w + x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_make_no_difference(dtype):
    """Guards against random bits that depend on the tile, the grid or the strides, and writes between rows."""
    generator = torch.Generator().manual_seed(4)
    wide = torch.randn(9, 310, generator=generator).to(dtype)
    x = 0.01 * torch.randn(9, 300, generator=generator)
    whole = add(wide[:, 5:305].contiguous(), x, first_entry=17)
    by_tiles = wide.clone()
    for start in (0, 4, 8):
        rows = slice(start, min(9, start + 4))
        add(by_tiles[rows, 5:305], x[rows], first_entry=17 + 300 * start, blocks=(1, 1 + start))
    assert torch.equal(by_tiles[:, 5:305], whole)
    assert torch.equal(by_tiles[:, :5], wide[:, :5])
    assert torch.equal(by_tiles[:, 305:], wide[:, 305:])
    if dtype != torch.float32:
        assert not torch.equal(whole, add(wide[:, 5:305].contiguous(), x, first_entry=17, step=12))
