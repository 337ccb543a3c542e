"""range_finder: the bounds of the specification, evaluated in fp64, and what it does with difficult input."""

import math

import pytest
import torch
from matrices import (
    MATRICES,
    UNIT_ROUNDOFF,
    assert_orthonormal,
    gaussian,
    generator,
    layout,
    norm,
    polynomial,
    projection_error,
    tails,
    with_spectrum,
)

from galore_rrf import reference
from galore_rrf.ops import range_finder

pytestmark = pytest.mark.core

CONVERGED, ZERO, NONFINITE = 0, 3, 4
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SKETCHES = {
    "plain": {"sketch": "plain"},
    "half_power": {"sketch": "half_power"},
    "power": {"sketch": "power"},
    "power2": {"sketch": "power", "power": 2},
    "warm": {"sketch": "warm", "warm": 0},  # a previous basis of the same rank
    "narrow": {"sketch": "warm", "warm": -2},  # narrower, and wider
    "wide": {"sketch": "warm", "warm": 3},
    "oversampled": {"oversampling": 5},
    "ordered": {"ordered": True},
}


def options_for(name: str, a: torch.Tensor, rank: int) -> dict:
    options = dict(SKETCHES[name])
    if "warm" in options:
        width = min(max(1, rank + options["warm"]), a.shape[-2])
        basis = torch.randn(*a.shape[:-1], width, dtype=torch.float64, generator=generator(99))
        options["warm"] = torch.linalg.qr(basis)[0].to(device=a.device, dtype=torch.float32)
    return options


def check(a, q, b, residual, status, u):
    """Assertions 1, 3, 4, 8 of the specification for every matrix of a batch whose entries are finite."""
    n = a.shape[-1]
    assert q.dtype == b.dtype == (torch.float64 if a.dtype == torch.float64 else torch.float32)
    assert residual.dtype == torch.float64
    assert status.dtype == torch.uint8
    assert q.shape[:-1] == a.shape[:-1]
    assert b.shape == (*a.shape[:-2], q.shape[-1], n)
    assert residual.shape == status.shape == a.shape[:-2]
    assert (status == CONVERGED).all()
    assert_orthonormal(q, u)
    batches = zip(
        *(t.double().cpu().reshape(-1, *t.shape[-2:]) for t in (a, q, b)), residual.flatten(), strict=True
    )
    for x, y, z, r in batches:
        size = norm(x)
        assert norm(z - y.mT @ x) <= 64 * u * size
        actual = norm(x - y @ z) / size
        assert abs(actual - float(r)) <= 64 * u
        best = float(tails(x / size)[y.shape[1]])
        assert projection_error(x, y) >= best * (1 - 1e-6) - 64 * u


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((48, 48), 12), ((40, 96), 8), ((96, 40), 8), ((37, 53), 36), ((53, 37), 36), ((1, 30), 1), ((30, 1), 1),
     ((1, 1), 1), ((37, 53), 37), ((2, 3, 20, 17), 5), ((5, 17, 20), 5), ((1, 9, 700), 4), ((700, 9), 4)],
)  # fmt: skip
def test_bounds(device, shape, rank, name, dtype):
    """Guards against a basis, coefficients or residual outside the bounds, for any shape, sketch or dtype."""
    a = torch.randn(shape, dtype=torch.float64, generator=generator(1)).to(device, dtype)
    before = a.clone()
    check(a, *range_finder(a, rank, seed=2, **options_for(name, a, rank)), UNIT_ROUNDOFF[dtype])
    assert torch.equal(a, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["plain", "half_power", "power", "warm", "oversampled"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_bounds_on_difficult_matrices(device, matrix, name, dtype):
    """Guards against matrices whose spectrum breaks an orthogonalisation or the norm of what is left."""
    a = MATRICES[matrix](61, 90).to(device, dtype)
    check(a, *range_finder(a, 23, seed=5, **options_for(name, a, 23)), UNIT_ROUNDOFF[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strides", ["transposed", "strided"])
@pytest.mark.parametrize("shape", [(45, 70), (70, 45), (3, 31, 20)])
@pytest.mark.parametrize("name", ["plain", "half_power", "oversampled"])
def test_layouts(device, shape, strides, name, dtype):
    """Guards against strides read wrongly: bounds hold and the residual is that of the contiguous matrix."""
    u = UNIT_ROUNDOFF[dtype]
    a = torch.randn(shape, dtype=torch.float64, generator=generator(2)).to(device, dtype)
    expected = range_finder(a, 9, seed=3, **options_for(name, a, 9))
    got = range_finder(layout(a, strides), 9, seed=3, **options_for(name, a, 9))
    check(a, *got, u)
    torch.testing.assert_close(got[2], expected[2], rtol=0, atol=64 * u)


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded(device, dtype):
    """Guards against strides of zero, as the gradient of a sum has: rank one, all in one direction."""
    row = gaussian(1, 33).to(device, dtype)
    for a in (row.expand(20, 33), row.mT.expand(33, 20), row.expand(4, 20, 33)):
        q, b, residual, status = range_finder(a, 3)
        check(a, q, b, residual, status, UNIT_ROUNDOFF[dtype])
        assert float(residual.max()) < 64 * 2.0**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tail", [1e-1, 3e-2, 1e-3, 1e-6])
def test_small_residuals(device, tail, dtype):
    """Guards against a residual from a difference of norms, which loses all digits where it is small."""
    values = torch.cat([torch.ones(10), torch.full((30,), tail)])
    a = with_spectrum(40, 75, values).to(device, dtype)
    q, b, residual, _ = range_finder(a, 10, sketch="power", power=2)
    assert (
        abs(float(residual) - norm(a.double() - q.double() @ b.double()) / norm(a))
        <= 64 * UNIT_ROUNDOFF[dtype]
    )
    assert float(residual) == pytest.approx(tail * math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize(("shape", "rank"), [((30, 42), 7), ((42, 30), 7), ((2, 16, 16), 4)])
def test_basis_is_that_of_the_reference(device, same_sketch, shape, rank, name):
    """Guards against any departure from the formulae, the order of the columns included.

    Their signs too, but where they are singular vectors: those have none.
    """
    a = torch.randn(shape, dtype=torch.float64, generator=generator(4))
    options = {**options_for(name, a, rank), "seed": 6, "key": 3, "refresh": 2}
    expected = reference.range_finder(a, rank, **options)
    got = [t.cpu() for t in range_finder(a.to(device), rank, **options)]
    if name in ("ordered", "oversampled"):
        signs = (got[0] * expected[0]).sum(-2).sign()
        got[0] *= signs[..., None, :]
        got[1] *= signs[..., :, None]
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def test_batch_is_its_matrices(device):
    """Guards against a batch that shares one test matrix or mixes its matrices: matrix i has key + i."""
    a = torch.randn(2, 3, 18, 25, generator=generator(5)).to(device)
    q, b, residual, _ = range_finder(a, 6, seed=1, key=10)
    for i in range(6):
        one = range_finder(a[i // 3, i % 3], 6, seed=1, key=10 + i)
        torch.testing.assert_close(q[i // 3, i % 3], one[0])
        torch.testing.assert_close(b[i // 3, i % 3], one[1])
        torch.testing.assert_close(residual[i // 3, i % 3], one[2])
    empty = range_finder(a[:0], 6)
    assert [t.shape for t in empty] == [(0, 3, 18, 6), (0, 3, 6, 25), (0, 3), (0, 3)]


def test_reproducible(device, threads):
    """Guards against randomness from outside the seed, and results that follow the thread count too far."""
    a = gaussian(64, 200).float().to(device)
    first = range_finder(a, 16, seed=9)
    torch.manual_seed(0)
    for x, y in zip(first, range_finder(a, 16, seed=9), strict=True):
        assert torch.equal(x, y)
    for count in (1, 4):
        threads(count)
        torch.testing.assert_close(range_finder(a, 16, seed=9)[0], first[0], rtol=0, atol=1e-4)
    assert (range_finder(a, 16, seed=10)[0] - first[0]).abs().max() > 1e-2
    assert (range_finder(a, 16, seed=9, refresh=1)[0] - first[0]).abs().max() > 1e-2


def test_plain_meets_theorem_10_5(device):
    """Guards against a sketch worse than theory (Halko, Martinsson, Tropp 2011, theorem 10.5 and eq. 1.9)."""
    seeds, width = 24, 16
    for matrix in ("polynomial", "exponential", "low_rank_noise", "fourteen_decades", "step"):
        a = MATRICES[matrix](60, 80).to(device, torch.float32)
        tail, u, size = tails(a.cpu()), 2.0**-24, norm(a)
        bound = min(math.sqrt(1 + k / (width - k - 1)) * float(tail[k]) for k in range(width - 3))
        errors, sigma = [], torch.linalg.svdvals(a.double().cpu())
        for seed in range(seeds):
            q = range_finder(a, width, sketch="plain", seed=seed)[0].double().cpu()
            rest = a.double().cpu() - q @ (q.mT @ a.double().cpu())
            errors.append(norm(rest))
            spectral = (1 + 11 * math.sqrt(width * 60)) * float(sigma[8]) + 64 * u * size
            assert float(torch.linalg.svdvals(rest)[0]) <= spectral
        errors = torch.tensor(errors)
        assert float(errors.mean()) <= bound + 3 * float(errors.std()) / math.sqrt(seeds) + 64 * u * size
        assert float(errors.max()) <= 2 * bound + 64 * u * size


def ratio(a, rank, seeds=8, **options):
    best = float(tails(a.double().cpu())[rank]) / norm(a)
    return (
        sum(projection_error(a, range_finder(a, rank, seed=s, **options)[0]) for s in range(seeds))
        / seeds
        / best
    )


def test_quality_by_sketch(device):
    """Guards against a power step left out or not orthogonalised: measured 1.6, 1.16, 1.06, 1.02."""
    a = with_spectrum(128, 320, (1 + torch.arange(128)) ** -0.5).float().to(device)
    plain, half = ratio(a, 32, sketch="plain"), ratio(a, 32)
    power, twice = ratio(a, 32, sketch="power"), ratio(a, 32, sketch="power", power=2)
    assert 1.2 < plain < 1.8
    assert 1.03 < half < 1.25
    assert 1.0 <= twice < power < 1.1
    assert power < half < plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_power_on_fourteen_decades(device, dtype):
    """Guards against A (A^T Omega) without orthogonalising, which squares the spectrum: 39 against 5."""
    a = with_spectrum(128, 160, torch.logspace(0, -14, 128, dtype=torch.float64)).to(device, dtype)
    assert ratio(a, 40) <= ratio(a, 40, sketch="plain")
    assert ratio(a, 40) < 2


def test_warm_start_improves(device):
    """Guards against a previous basis that is not used: from step to step it comes close to the best."""
    a = with_spectrum(100, 150, (1 + torch.arange(100)) ** -0.5).float().to(device)
    best = float(tails(a.cpu())[20]) / norm(a)
    q = range_finder(a, 20)[0]
    ratios = []
    for _ in range(6):
        q = range_finder(a, 20, sketch="warm", warm=q)[0]
        ratios.append(projection_error(a, q) / best)
    assert ratios[-1] < 1.01
    assert ratios[-1] < ratios[0]
    narrow = range_finder(a, 20, sketch="warm", warm=q[:, :10])[0]
    assert projection_error(a, narrow) / best < 1.25


@pytest.mark.parametrize("name", ["warm", "narrow", "wide"])
def test_warm_basis_orthogonal_to_everything(device, name):
    """Guards against a subspace lost for good once the gradient has left it."""
    a = torch.zeros(50, 40)
    a[25:] = gaussian(25, 40, 7).float()
    width = {"warm": 8, "narrow": 5, "wide": 11}[name]
    previous = torch.eye(50)[:, :width]
    found = range_finder(a.to(device), 8, sketch="warm", warm=previous.to(device))
    check(a, *(t.cpu() for t in found), 2.0**-24)
    assert float(found[2]) < 1.3 * float(tails(a)[8]) / norm(a)


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient(device, name, dtype):
    """Guards against a basis that loses orthogonality where the matrix has less rank than asked for."""
    a = (gaussian(40, 3, 1) @ gaussian(3, 55, 2)).to(device, dtype)
    a[::2] = 0
    found = range_finder(a, 12, **options_for(name, a, 12))
    check(a, *found, UNIT_ROUNDOFF[dtype])
    assert float(found[2]) <= 64 * UNIT_ROUNDOFF[dtype]
    only = torch.zeros(40, 55, dtype=dtype, device=device)
    only[17, 31] = 3
    check(only, *range_finder(only, 12, **options_for(name, only, 12)), UNIT_ROUNDOFF[dtype])


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.float32, 2.0**100), (torch.float32, 2.0**-100),
     (torch.float32, 1e-36), (torch.float32, 2.0**124), (torch.float64, 1e200), (torch.float64, 1e-200),
     (torch.float64, 1e300), (torch.float64, 1e-300), (torch.bfloat16, 1e30), (torch.bfloat16, 1e-30)],
)  # fmt: skip
def test_extreme_scales(device, name, dtype, factor):
    """Guards against overflow and underflow of sketches, squares and scale factors."""
    a = (polynomial(24, 36).to(dtype) * factor).to(device)
    found = range_finder(a, 6, **options_for(name, a, 6))
    u = UNIT_ROUNDOFF[dtype]
    assert (found[3] == CONVERGED).all()
    assert_orthonormal(found[0], u)
    assert abs(float(found[2]) - norm(a.double() - found[0].double() @ found[1].double()) / norm(a)) <= 64 * u
    expected = range_finder((a.double() / factor).to(dtype), 6, **options_for(name, a, 6))
    assert float(found[2]) == pytest.approx(float(expected[2]), rel=0.05 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize(
    ("dtype", "unit"),
    [(torch.float32, 1e-39), (torch.float32, 1e-42), (torch.float64, 1e-310), (torch.bfloat16, 1e-39),
     (torch.float16, 1e-6)],
)  # fmt: skip
def test_denormals(device, name, dtype, unit):
    """Guards against a scale factor that overflows: 2^149 x is infinite in fp32."""
    a = (gaussian(24, 36) * unit).to(device, dtype)
    found = range_finder(a, 6, **options_for(name, a, 6))
    assert int(found[3]) == CONVERGED
    assert_orthonormal(found[0], UNIT_ROUNDOFF[dtype])
    reached = projection_error(a.double() / unit, found[0])
    assert reached < 2 * float(tails(a.double() / unit)[6]) / norm(a.double() / unit)
    assert float(found[2]) == pytest.approx(reached, rel=0.2)  # B itself is made of denormals


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SKETCHES)
def test_zero(device, name, dtype):
    """Guards against a division by zero: status 3, any orthonormal basis, no residual."""
    a = torch.zeros(2, 9, 14, dtype=dtype, device=device)
    q, b, residual, status = range_finder(a, 4, **options_for(name, a, 4))
    assert (status == ZERO).all()
    assert_orthonormal(q, 2.0**-24)
    assert not b.any()
    assert not residual.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (8, 13), (4, 6)])
def test_nonfinite(device, name, dtype, value, place):
    """Guards against a basis from NaN or Inf, and other matrices of the batch that suffer for it."""
    a = torch.randn(2, 9, 14, generator=generator(3)).to(device, dtype)
    a[0][place] = value
    q, b, residual, status = range_finder(a, 4, **options_for(name, a, 4))
    assert status.tolist() == [NONFINITE, CONVERGED]
    assert math.isnan(residual[0])
    assert torch.isfinite(q).all()
    check(a[1], q[1], b[1], residual[1], status[1], UNIT_ROUNDOFF[dtype])


def test_without_coefficients(device):
    """Guards against a basis that changes when its coefficients are not asked for."""
    a = gaussian(30, 40).float().to(device)
    for options in ({}, {"ordered": True}, {"oversampling": 3}):
        q, b, residual, status = range_finder(a, 5, coefficients=False, **options)
        torch.testing.assert_close(q, range_finder(a, 5, **options)[0], rtol=0, atol=1e-5)
        assert b.shape == (0, 40)
        assert math.isnan(residual)
        assert int(status) == CONVERGED


@pytest.mark.parametrize("options", [{"ordered": True}, {"oversampling": 4}])
def test_ordered_by_energy(device, options):
    """Guards against columns in another order than that of the energy they keep, or correlated rows of B."""
    b = range_finder(polynomial(40, 60).to(device), 10, **options)[1].cpu()
    gram = b @ b.mT
    energies = gram.diagonal()
    assert (energies[:-1] >= energies[1:]).all()
    assert float((gram - energies.diag()).abs().max()) < 1e-12 * float(energies[0])


@pytest.mark.parametrize(
    ("error", "message", "shape", "arguments"),
    [
        (ValueError, "dimensions", (4,), {}),
        (ValueError, "at least one row", (0, 4), {}),
        (ValueError, "rank", (4, 5), {"rank": 0}),
        (ValueError, "rank", (4, 5), {"rank": 5}),
        (ValueError, "oversampling", (4, 5), {"oversampling": -1}),
        (ValueError, "power", (4, 5), {"power": -1}),
        (ValueError, "sketch.*plain.*half_power", (4, 5), {"sketch": "other"}),
        (ValueError, "warm", (4, 5), {"sketch": "warm"}),
        (ValueError, "warm", (4, 5), {"warm": torch.eye(4)}),
        (ValueError, "warm", (4, 5), {"sketch": "warm", "warm": torch.eye(5)}),
        (ValueError, "warm", (2, 4, 5), {"sketch": "warm", "warm": torch.eye(4)}),
        (ValueError, "warm", (4, 5), {"sketch": "warm", "warm": torch.ones(4)}),
        (ValueError, "seed", (4, 5), {"seed": -1}),
        (ValueError, "key", (4, 5), {"key": 2**32}),
        (ValueError, "refresh", (4, 5), {"refresh": -1}),
    ],
)
def test_bad_arguments(device, error, message, shape, arguments):
    """Guards against bad arguments that crash, or pass."""
    arguments = {"rank": 2, **arguments}
    with pytest.raises(error, match=message):
        range_finder(torch.ones(shape, device=device), **arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool])
def test_bad_dtype(device, dtype):
    """Guards against integers read as numbers, and complex matrices with the transpose for the adjoint."""
    with pytest.raises(TypeError, match="floating-point"):
        range_finder(torch.ones(4, 5, device=device).to(dtype), 2)


def test_autograd(device):
    """Guards against a gradient that is silently zero: the operator takes the input, backward raises."""
    a = gaussian(6, 7).float().to(device).requires_grad_()
    q = range_finder(a, 2)[0]
    with pytest.raises(RuntimeError, match="range_finder"):
        q.sum().backward()
    with torch.no_grad():
        assert not range_finder(a, 2)[0].requires_grad


@pytest.mark.parametrize("shape", [(6, 9), (2, 9, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(device, shape, dtype):
    """Guards against a fake implementation or schema at odds with the operator."""
    a = torch.randn(shape, generator=generator(1)).to(device, dtype)
    torch.library.opcheck(torch.ops.galore_rrf.range_finder.default, (a, 3), {"seed": 3, "oversampling": 1})


def test_compile(device):
    """Guards against a graph break."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x):
        q, b, _, _ = range_finder(x, 3)
        return q @ b

    a = gaussian(8, 9).float().to(device)
    q, b, _, _ = range_finder(a, 3)
    torch.testing.assert_close(f(a), q @ b)
