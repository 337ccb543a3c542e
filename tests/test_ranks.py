"""How close ranks come to the smallest possible, errors to the best possible, and what a rank cap allows."""

import math

import pytest
import torch
from bounds import CONVERGED, RANK_CAP, check
from matrices import norm, projection_error, tails, with_spectrum

from galore_rrf.ops import adaptive_range_finder, range_finder

pytestmark = pytest.mark.core

I = torch.arange(192, dtype=torch.float64)  # noqa: E741
SPECTRA = {
    "1/i": 1 / (1 + I),
    "i^-1/2": (1 + I) ** -0.5,
    "i^-2": (1 + I) ** -2.0,
    "0.97^i": 0.97**I,
    "0.9^i": 0.9**I,
    "step": torch.where(I < 64, 1.0, 1e-3),
    "s_shaped": 1e-6 + 1 / (1 + torch.exp((I - 96) / 2)),
    "noise": torch.where(I < 32, 1 - I / 64, 2e-2),
    "stairs": 5.0 ** -(I // 8),
    "flat": torch.ones_like(I),
}
SHAPES = [(192, 300), (300, 192)]


def matrix(spectrum, m, n, device):
    return with_spectrum(m, n, SPECTRA[spectrum], seed=3).float().to(device)


def smallest_rank(a, tolerance):
    return int((tails(a.cpu()) > tolerance * norm(a)).sum())


def allowed(sketch, extra_blocks, spectrum):
    """The largest rank over the smallest possible, measured: 1.05 and 1.2 are what half a power step reaches.

    The plain sketch does not, where the spectrum decays slowly: 1.17 and 1.76 were seen for 1/i.
    """
    if sketch == "half_power":
        return 1.05 if extra_blocks else 1.2
    if spectrum in ("1/i", "i^-1/2"):
        return 1.2 if extra_blocks else 1.8
    return 1.05 if extra_blocks else 1.6


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("sketch", ["plain", "half_power"])
@pytest.mark.parametrize("extra_blocks", [0, 1])
def test_rank_is_near_the_smallest(device, extra_blocks, sketch, spectrum):
    """Guards against extra blocks that are not computed, or trimming that stops early."""
    for m, n in SHAPES:
        a = matrix(spectrum, m, n, device)
        for tolerance in (0.3, 0.1, 0.01):
            smallest = smallest_rank(a, tolerance)
            for seed in range(2):
                found = adaptive_range_finder(
                    a, tolerance, block=32, sketch=sketch, extra_blocks=extra_blocks, seed=seed
                )
                assert int(found[5]) == CONVERGED
                rank = int(found[2])
                assert smallest <= rank <= math.ceil(allowed(sketch, extra_blocks, spectrum) * smallest)


def test_more_extra_blocks_do_more(device):
    """Guards against `extra_blocks` being read as a flag."""
    a = matrix("1/i", 192, 300, device)
    ranks = [
        int(adaptive_range_finder(a, 0.1, block=8, sketch="plain", extra_blocks=e)[2])
        for e in (0, 1, 2, 4, 8)
    ]
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) >= 4
    assert ranks[-1] <= math.ceil(1.03 * smallest_rank(a, 0.1))
    found = adaptive_range_finder(a, 0.1, block=8, sketch="plain", extra_blocks=3)
    first = int((found[4] <= 0.1).nonzero()[0])
    assert int(found[4].isfinite().sum()) == first + 1 + 3


@pytest.mark.parametrize("sketch", ["plain", "half_power"])
@pytest.mark.parametrize("between", ["householder", "gram_schmidt"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_cap_only_just_large_enough(device, spectrum, between, sketch):
    """Guards against a cap on the columns computed, which would miss a tolerance that the rank allows."""
    for m, n in SHAPES:
        a = matrix(spectrum, m, n, device)
        for tolerance in (0.3, 0.1, 0.01):
            smallest = smallest_rank(a, tolerance)
            # The plain sketch may need three times the columns: one block beyond the cap is too few.
            extra = 1 if sketch == "half_power" else 3
            options = {"block": 32, "sketch": sketch, "between": between, "extra_blocks": extra}
            cap = math.ceil(1.1 * smallest)
            for method in ("right_looking", "left_looking"):
                found = adaptive_range_finder(a, tolerance, max_rank=cap, method=method, **options)
                check(a, found, tolerance, block=32, max_rank=cap, method=method, extra_blocks=extra)
                assert int(found[5]) == CONVERGED
                assert int(found[2]) <= cap
            if smallest > 1:
                short = adaptive_range_finder(a, tolerance, max_rank=smallest - 1, **options)
                check(a, short, tolerance, block=32, max_rank=smallest - 1, extra_blocks=extra)
                assert (int(short[5]), int(short[2])) == (RANK_CAP, smallest - 1)


def test_cap_is_used_well(device):
    """Guards against a cut to the first columns where the cap is reached, and not to the best of those known."""
    a = matrix("1/i", 192, 300, device)
    for cap in (8, 20, 50):
        found = adaptive_range_finder(a, 0.01, max_rank=cap, block=16)
        without = adaptive_range_finder(a, 0.01, max_rank=cap, block=16, trim=False)
        assert int(found[2]) == int(without[2]) == cap
        assert float(found[3]) < 0.95 * float(without[3])
        check(a, found, 0.01, block=16, max_rank=cap)


# The largest mean ratio seen; 1.2 is the aim for 1/i, 1.3 elsewhere.  It is not reached where the spectrum
# falls steeply just at the rank, so that what is best there is exceptionally good.
RATIOS = [
    ("1/i", (4, 16, 64), 1.2),
    ("i^-1/2", (4, 16, 64), 1.2),
    ("i^-2", (16, 64), 1.25),
    ("0.97^i", (4, 16, 64), 1.3),
    ("0.9^i", (4, 16, 64), 1.35),
    ("step", (4, 16, 64), 1.02),
    ("s_shaped", (4, 16, 64), 1.02),
    ("noise", (4, 16, 64), 1.3),
    ("flat", (4, 16, 64), 1.02),
    ("stairs", (4, 12, 20), 1.3),
    ("s_shaped", (96, 104), 2.3),
    ("stairs", (8, 16, 32), 2.0),
]


@pytest.mark.parametrize("panel", ["householder", "cholesky_qr", "gram_schmidt"])
@pytest.mark.parametrize(("spectrum", "ranks", "bound"), RATIOS)
def test_half_power_error_is_near_the_best(device, spectrum, ranks, bound, panel):
    """Guards against an inner factor that is not well conditioned, or only plain in disguise."""
    for m, n in SHAPES:
        a = matrix(spectrum, m, n, device)
        best = tails(a.cpu()) / norm(a)
        for rank in ranks:
            ratios = [
                projection_error(a, range_finder(a, rank, panel=panel, seed=s)[0]) / float(best[rank])
                for s in range(8)
            ]
            assert min(ratios) >= 1 - 1e-6
            assert sum(ratios) / 8 <= bound


@pytest.mark.parametrize("method", ["right_looking", "left_looking"])
@pytest.mark.parametrize("between", ["householder", "gram_schmidt"])
def test_adaptive_half_power_error_is_near_the_best(device, between, method):
    """Guards against half a power step of A itself, and not of what is left of it, in later blocks."""
    for spectrum in ("1/i", "i^-1/2", "0.97^i"):
        for m, n in SHAPES:
            a = matrix(spectrum, m, n, device)
            best = tails(a.cpu()) / norm(a)
            for seed in range(3):
                plain, half = (
                    float(adaptive_range_finder(
                        a, 0.0, max_rank=64, block=16, trim=False, sketch=sketch, method=method, between=between,
                        seed=seed,
                    )[3])
                    for sketch in ("plain", "half_power")
                )  # fmt: skip
                assert half <= (1.2 if spectrum != "0.97^i" else 1.3) * float(best[64])
                assert half < 0.95 * plain
