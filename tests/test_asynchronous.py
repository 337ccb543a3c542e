"""Batches sketched together, with no decision on the host, as always on CUDA: the bounds of range_finder's
other way, and the same columns to rounding."""

import math

import pytest
import torch
from matrices import (
    MATRICES,
    UNIT_ROUNDOFF,
    assert_orthonormal,
    gaussian,
    generator,
    norm,
    polynomial,
    projection_error,
)

from galore_rrf.ops import range_finder

CONVERGED, ZERO, NONFINITE = 0, 3, 4
SKETCHES = ["plain", "half_power", "power", "warm"]
PANELS = ["auto", "householder", "cholesky_qr", "gram_schmidt"]
OPTIONS = [*({"sketch": s} for s in SKETCHES), {"oversampling": 5}, {"ordered": True}]


def together(a, rank, **options):
    if options.get("sketch") == "warm":
        previous = torch.randn(*a.shape[:-1], rank, dtype=torch.float64, generator=generator(99))
        options["warm"] = torch.linalg.qr(previous)[0].to(a.device, torch.float32)
    return (
        range_finder(a, rank, asynchronous=True, **options),
        range_finder(a, rank, asynchronous=a.device.type != "cpu", **options),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("panel", PANELS)
def test_as_good_as_one_by_one(device, panel, options, dtype):
    """Guards against matrices of a batch that are mixed, and an inner factor or panel that loses directions."""
    u = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    for shape in ((40, 61), (61, 40)):
        a = torch.stack([polynomial(*shape, seed) for seed in range(3)]).to(device, dtype)
        (q, b, residual, status), (p, *_) = together(a, 12, panel=panel, **options)
        assert status.tolist() == [CONVERGED] * 3
        assert_orthonormal(q, u)
        for i in range(3):
            x, mine, theirs = a[i].double(), q[i].double(), p[i].double()
            assert norm(b[i].double() - mine.mT @ x) <= 64 * u * norm(x)
            assert float(residual[i]) == pytest.approx(norm(x - mine @ b[i].double()) / norm(x), abs=64 * u)
            # The inner factors differ, and with them rounding alone.
            assert projection_error(x, mine) <= projection_error(x, theirs) * (1 + 1e-5) + 64 * u * norm(x)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("panel", ["householder", "cholesky_qr"])
def test_difficult_matrices(device, panel, sketch, name):
    """Guards against panels of any rank that break a factorisation, beside others that do not."""
    a = torch.stack([MATRICES[name](33, 50), gaussian(33, 50)]).float().to(device)
    (q, b, _, status), _ = together(a, 20, panel=panel, sketch=sketch)
    assert status.tolist() == [CONVERGED] * 2
    u = UNIT_ROUNDOFF[torch.float32]
    assert_orthonormal(q, u)
    for x, mine, coefficients in zip(a.double(), q.double(), b.double(), strict=True):
        assert norm(coefficients - mine.mT @ x) <= 64 * u * norm(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("panel", ["householder", "cholesky_qr"])
def test_zero_extreme_and_nonfinite_matrices(device, panel, options, dtype):
    """Guards against one matrix that spoils another of its batch, and entries whose squares over- or underflow."""
    plain = polynomial(30, 44)
    small, large = (1e-30, 1e30) if dtype != torch.float64 else (1e-250, 1e250)
    a = torch.stack([plain, 0 * plain, plain * small, plain * large, plain, plain]).to(device, dtype)
    a[4, 3, 7], a[5, 29, 43] = math.nan, -math.inf
    (q, b, residual, status), _ = together(a, 9, panel=panel, **options)
    assert status.tolist() == [CONVERGED, ZERO, CONVERGED, CONVERGED, NONFINITE, NONFINITE]
    u = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    assert_orthonormal(q[:4], u)
    assert float(residual[1]) == 0
    assert not q[4:].any()
    assert not b[[1, 4, 5]].any()
    assert bool(residual[4:].isnan().all())
    for i, size in ((0, 1.0), (2, small), (3, large)):
        x = a[i].double() / size
        assert norm(b[i].double() / size - q[i].double().mT @ x) <= 64 * u * norm(x)
        assert projection_error(x, q[i].double()) <= 1.5 * projection_error(x, q[0].double())
