"""gaussian_sketch: the test matrix is one pure function of position, and its numbers are normal."""

import itertools
import math

import pytest
import torch

from galore_rrf import reference
from galore_rrf.ops import gaussian_sketch

pytestmark = pytest.mark.core

ULP = 2.0**-23


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5), (4, 513), (129, 64), (1000, 37)])
def test_same_bits_for_every_thread_count(device, threads, rows, cols):
    """Guards against a stream that depends on how threads share the work."""
    results = []
    for count in (1, 2, 4):
        threads(count)
        results.append(gaussian_sketch(rows, cols, seed=11, device=device))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_pieces_assemble_to_the_whole(device, dtype):
    """Guards against numbers that depend on the block they are made in: odd offsets, strips cut anywhere."""
    whole = gaussian_sketch(43, 1201, seed=5, key=2, refresh=3, dtype=dtype, device=device)
    rows, cols = [0, 1, 4, 11, 12, 43], [0, 3, 515, 516, 1201]
    for i, j in itertools.pairwise(rows):
        for k, n in itertools.pairwise(cols):
            piece = gaussian_sketch(
                j - i, n - k, seed=5, key=2, refresh=3, row_offset=i, col_offset=k, dtype=dtype, device=device
            )
            assert torch.equal(piece, whole[i:j, k:n])


@pytest.mark.parametrize(
    "place",
    [
        {"seed": 0},
        {"seed": 2**63 - 1, "key": 2**32 - 1, "refresh": 2**32 - 1},
        {"seed": 0x123456789ABCDEF, "key": 77, "refresh": 5, "row_offset": 6, "col_offset": 9},
        {"seed": 1, "row_offset": 2**34 - 301, "col_offset": 2**32 - 203},
    ],
)
def test_numbers_are_those_of_the_reference(device, place):
    """Guards against wrong words (other rounds, keys, counters, a word cut short) and inexact normals.

    The reference has its own Philox and exact normals: wrong words differ in the first digit.
    """
    got = gaussian_sketch(301, 203, **place, device=device).double().cpu()
    exact = reference.gaussian_sketch(301, 203, **place, dtype=torch.float64)
    torch.testing.assert_close(got, exact, rtol=4 * ULP, atol=1e-14)


def test_philox_known_answers():
    """Guards against a slip that operator and reference share: the vectors published with Random123."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    vectors = [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, 0x299F31D0A4093822, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]
    for counter, key, words in vectors:
        got = reference.philox4x32_10([torch.tensor(c) for c in counter], key)
        assert [int(w) for w in got] == words


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_casts(device, dtype):
    """Guards against a stream of its own for each dtype."""
    single = gaussian_sketch(61, 530, seed=8, dtype=torch.float32, device=device)
    assert torch.equal(gaussian_sketch(61, 530, seed=8, dtype=dtype, device=device), single.to(dtype))


def test_default_dtype(device):
    """Guards against fp32 where the program has chosen fp64."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert gaussian_sketch(2, 2, seed=0, device=device).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_seed_key_and_refresh_each_change_every_number(device):
    """Guards against an argument that is dropped, cut to 32 bits or mixed with another."""
    places = [
        {"seed": 1}, {"seed": 2}, {"seed": 1 + 2**32}, {"seed": 1, "key": 1}, {"seed": 1, "refresh": 1},
        {"seed": 1, "key": 1, "refresh": 1}, {"seed": 1, "key": 2**31},
        {"seed": 1, "row_offset": 4000}, {"seed": 1, "col_offset": 4000},
    ]  # fmt: skip
    results = [gaussian_sketch(64, 64, **place, device=device) for place in places]
    for i, x in enumerate(results):
        for y in results[:i]:
            assert (x == y).double().mean() < 1e-3


def test_empty(device):
    """Guards against a crash on no rows or no columns."""
    for shape in ((0, 5), (5, 0), (0, 0)):
        assert gaussian_sketch(*shape, seed=0, device=device).shape == shape


@pytest.fixture(scope="module")
def sample(device):
    return (
        gaussian_sketch(3200, 3125, seed=20, dtype=torch.float32, device=device).double().cpu()
    )  # 10^7 numbers


def test_moments(sample):
    """Guards against numbers that are not standard normals: five standard errors of each sample moment."""
    count = sample.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float(sample.pow(power).mean()) - mean) < 5 * math.sqrt(variance / count)


@pytest.mark.parametrize("sigmas", [0.1, 1, 2, 3, 4, 5])
def test_tails(sample, sigmas):
    """Guards against thin or cut tails, on either side, within five standard errors."""
    p = math.erfc(sigmas / math.sqrt(2)) / 2
    expected = sample.numel() * p
    for side in (sample > sigmas, sample < -sigmas):
        assert abs(int(side.sum()) - expected) < 5 * math.sqrt(expected) + 1


def test_independence(device):
    """Guards against numbers repeated or correlated across rows, columns, the words of a counter, or keys."""
    x = gaussian_sketch(4000, 60, seed=3, device=device).double()
    wide = gaussian_sketch(60, 4000, seed=3, device=device).double().mT
    other = gaussian_sketch(4000, 60, seed=3, key=1, device=device).double()
    bound = 5.5 / math.sqrt(4000)
    for values in (x, x.square() - 1, wide, wide.square() - 1):
        correlation = values.mT @ values / 4000 / values.square().mean()
        assert float((correlation - torch.diag(correlation.diagonal())).abs().max()) < bound
    assert float((x.mT @ other).abs().max()) / 4000 < bound
    for shift in (1, 2, 3, 4, 8):
        assert abs(float((x[shift:] * x[:-shift]).mean())) < 5 / math.sqrt(x[shift:].numel())


def test_global_generator_is_left_alone(device):
    """Guards against a sketch that moves the state of torch's generator, or depends on it."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = gaussian_sketch(9, 9, seed=4, device=device)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(gaussian_sketch(9, 9, seed=4, device=device), first)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", -1), ("cols", -1), ("seed", -1), ("key", -1), ("key", 2**32), ("refresh", -1),
        ("refresh", 2**32), ("row_offset", -1), ("col_offset", -1), ("row_offset", 2**34),
        ("col_offset", 2**32), ("row_offset", 2**63 - 1), ("col_offset", 2**63 - 1),
    ],
)  # fmt: skip
def test_bad_numbers(device, name, value):
    """Guards against a counter that wraps, silently repeating numbers, and messages that name no argument."""
    arguments = {"rows": 2, "cols": 3, "seed": 0, name: value}
    with pytest.raises(ValueError, match=name):
        gaussian_sketch(**arguments, device=device)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_bad_dtype(device, dtype):
    """Guards against an integer or complex test matrix."""
    with pytest.raises(TypeError, match="dtype"):
        gaussian_sketch(2, 2, seed=0, dtype=dtype, device=device)


def test_opcheck(device):
    """Guards against a fake implementation or schema at odds with the operator."""
    torch.library.opcheck(
        torch.ops.galore_rrf.gaussian_sketch.default,
        (5, 7),
        {"seed": 3, "row_offset": 1, "dtype": torch.float64, "device": device},
    )


def test_compile(device):
    """Guards against a graph break."""

    @torch.compile(fullgraph=True, backend="eager")
    def f(x):
        return x + gaussian_sketch(3, 4, seed=1, device=x.device)

    assert torch.equal(f(torch.zeros(3, 4, device=device)), gaussian_sketch(3, 4, seed=1, device=device))
