"""adaptive_range_finder: section 3 of the specification over its matrices, and how it ends."""

import math

import pytest
import torch
from bounds import CONVERGED, FLOOR, NONFINITE, RANK_CAP, ZERO, check
from matrices import (
    MATRICES,
    UNIT_ROUNDOFF,
    assert_orthonormal,
    exponential,
    gaussian,
    kahan,
    layout,
    norm,
    polynomial,
    projection_error,
    rank_deficient,
    tails,
    with_spectrum,
)

from galore_rrf import reference
from galore_rrf.ops import adaptive_range_finder, gaussian_sketch

pytestmark = pytest.mark.core

SHAPES = [(50, 80, 16), (80, 50, 16), (37, 53, 10), (53, 37, 64), (37, 37, 12), (1, 30, 4), (30, 1, 4)]


def sweep(device, matrix, dtype, shapes, tolerances, seeds, **options):
    for m, n, block in shapes:
        a = MATRICES[matrix](m, n).to(device, dtype)
        for tolerance in tolerances:
            for seed in range(seeds):
                found = adaptive_range_finder(a, tolerance, block=block, seed=seed, **options)
                check(
                    a,
                    found,
                    tolerance,
                    block=block,
                    trim=options.get("trim", True),
                    method=options.get("method", "auto"),
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("matrix", MATRICES)
def test_bounds(device, matrix, dtype):
    """Guards against any departure from section 3: a false stop, lost orthogonality, a wrong residual."""
    sweep(device, matrix, dtype, SHAPES, [0.3, 0.01, 1e-3, 1.3e-5], 1)


@pytest.mark.parametrize("options", [{"trim": False}, {"sketch": "half_power"}, {"method": "right_looking"}])
@pytest.mark.parametrize("matrix", MATRICES)
def test_bounds_of_variants(device, matrix, options):
    """Guards against the same without trimming and with half a power step."""
    sweep(device, matrix, torch.float32, SHAPES, [0.1, 1e-4], 1, **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"trim": False}, {"sketch": "half_power"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("matrix", MATRICES)
def test_bounds_over_seeds(device, matrix, dtype, options):
    """Guards against rare failures: more tolerances, shapes and seeds."""
    shapes = [*SHAPES, (128, 200, 32), (200, 128, 32), (64, 64, 1), (100, 99, 7)]
    sweep(device, matrix, dtype, shapes, [0.3, 0.03, 1e-3, 1.3e-5, 0.0], 2, **options)


@pytest.mark.parametrize("tolerance", [1e-6, 1e-8, 1e-10, 1e-12, 1e-13])
@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("matrix", ["exponential", "fourteen_decades", "stairs", "clustered"])
def test_fp64_far_below_fp32(device, matrix, trim, tolerance):
    """Guards against trimming by eigenvalues of B B^T, which are rounding below 1e-8 of ||A||."""
    a = MATRICES[matrix](80, 100).to(device)
    found = adaptive_range_finder(a, tolerance, block=8, trim=trim)
    check(a, found, tolerance, block=8, trim=trim)
    if trim:
        smallest = int((tails(a.cpu()) > tolerance * norm(a)).sum())
        assert int(found[2]) <= 1.05 * smallest + 2


@pytest.mark.parametrize(("sketch", "factor"), [("plain", 1.2), ("half_power", 1.12)])
@pytest.mark.parametrize("decay", [0.5, 1.0])
@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.03])
def test_trimmed_rank_is_near_the_smallest(device, sketch, factor, decay, tolerance):
    """Guards against ranks too large: without trimming it is up to 3 times the smallest."""
    a = with_spectrum(192, 300, (1.0 + torch.arange(192)) ** -decay).float().to(device)
    smallest = int((tails(a.cpu()) > tolerance * norm(a)).sum())
    ranks = [int(adaptive_range_finder(a, tolerance, block=32, sketch=sketch, seed=s)[2]) for s in range(3)]
    untrimmed = int(adaptive_range_finder(a, tolerance, block=32, sketch=sketch, trim=False)[2])
    assert smallest <= min(ranks)
    assert max(ranks) <= math.ceil(factor * smallest)
    assert max(ranks) <= untrimmed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("matrix", ["polynomial", "spiked", "flat", "low_rank_noise", "row_scaled"])
@pytest.mark.parametrize(
    ("m", "n", "block"), [(60, 40, 16), (41, 40, 16), (40, 60, 16), (40, 40, 7), (90, 10, 64)]
)
def test_tolerance_zero_is_full_rank(device, m, n, block, matrix, dtype):
    """Guards against a tall matrix left with 2000 u: its last sketch is square without 16 columns more."""
    a = MATRICES[matrix](m, n).to(device, dtype)
    u = UNIT_ROUNDOFF[dtype]
    for seed in range(5):
        found = adaptive_range_finder(a, 0.0, block=block, seed=seed)
        check(a, found, 0.0, block=block)
        assert int(found[2]) == min(m, n)
        assert projection_error(a, found[0]) <= 64 * u
        assert int(found[5]) in (CONVERGED, FLOOR)


@pytest.mark.parametrize(("perturbation", "most"), [(0.0, math.inf), (1e-3, 16.0)])
def test_pythagoras_as_lapacks_reflectors(device, perturbation, most):
    """Guards against reflectors that lose length beyond the rounding of V^T A, where equal columns show it (Kahan's
    matrix: 210 are one), and as much where columns differ."""
    u, ours, lapacks = UNIT_ROUNDOFF[torch.float64], [], []
    for seed in range(8):
        a = kahan(200, 410) * (1 + perturbation * gaussian(200, 410, seed))
        options = {"sketch": "plain", "trim": False, "block": 48, "max_rank": 48, "method": "right_looking"}
        q, b, *_ = (t.cpu() for t in adaptive_range_finder(a.to(device), 0.0, seed=seed, **options))
        ours.append((norm(b) ** 2 + norm(a - q @ b) ** 2) / norm(a) ** 2 - 1)
        sketch = a @ gaussian_sketch(410, 48, seed=seed, dtype=torch.float64, device="cpu")
        lapacks.append(norm(torch.ormqr(*torch.geqrf(sketch), a, transpose=True)) ** 2 / norm(a) ** 2 - 1)
    rms = torch.tensor([ours, lapacks], dtype=torch.float64).square().mean(1).sqrt() / u
    assert rms[0] <= 2 * rms[1] + 2
    assert max(map(abs, ours)) <= most * u


def test_status(device):
    """Guards against a status that hides a tolerance missed."""
    a = polynomial(40, 60).float().to(device)
    assert int(adaptive_range_finder(a, 0.2)[5]) == CONVERGED
    assert int(adaptive_range_finder(a, 0.01, max_rank=8)[5]) == RANK_CAP
    assert int(adaptive_range_finder(a, 1e-6, max_rank=8)[5]) == FLOOR
    assert int(adaptive_range_finder(a.double(), 1e-6, max_rank=8)[5]) == RANK_CAP
    assert int(adaptive_range_finder(a.double(), 1e-14, max_rank=8)[5]) == FLOOR


@pytest.mark.parametrize("max_rank", [1, 7, 16, 17, 39, 40, 1000])
@pytest.mark.parametrize(("m", "n"), [(40, 60), (60, 40)])
@pytest.mark.parametrize("trim", [True, False])
def test_rank_cap(device, m, n, max_rank, trim):
    """Guards against a cap overrun by a block, or reached one early."""
    a = polynomial(m, n).float().to(device)
    for tolerance in (0.0, 1e-3, 0.2):
        found = adaptive_range_finder(a, tolerance, block=16, max_rank=max_rank, trim=trim)
        check(a, found, tolerance, block=16, max_rank=max_rank, trim=trim)
        if tolerance < 0.1:
            assert int(found[2]) == min(40, max_rank)


@pytest.mark.parametrize("trim", [True, False])
def test_absolute_tolerance(device, trim):
    """Guards against a tolerance measured against ||A||, or not scaled with A."""
    a = exponential(40, 60).float().to(device)
    size = norm(a)
    for factor in (1.0, 1e-30, 1e30, 3.7):
        scaled = a * factor
        found = adaptive_range_finder(
            scaled, 0.05 * size * factor, relative=False, block=6, trim=trim, max_rank=30
        )
        expected = adaptive_range_finder(scaled, 0.05, block=6, trim=trim, max_rank=30)
        check(scaled, found, 0.05 * (1 + 1e-5), block=6, max_rank=30, trim=trim)
        assert int(found[2]) == int(expected[2])
    beyond = adaptive_range_finder(a, 2 * size, relative=False, trim=trim)
    assert int(beyond[2]) == 0
    assert int(beyond[5]) == CONVERGED
    assert float(beyond[3]) == pytest.approx(1)
    assert beyond[4].isnan().all() or trim


@pytest.mark.parametrize("tolerance", [1.0, 1.5])
def test_tolerance_of_the_whole(device, tolerance):
    """Guards against a crash on rank 0."""
    a = polynomial(20, 30).float().to(device)
    found = adaptive_range_finder(a, tolerance)
    assert int(found[2]) == 0
    assert int(found[5]) == CONVERGED
    assert not found[0].any()


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (40, 40)])
@pytest.mark.parametrize("tolerance", [0.3, 0.03, 1e-3, 0.0])
def test_agrees_with_the_reference(device, same_sketch, shape, tolerance, trim):
    """Guards against an algorithm that differs from deflation by more than rounding.

    Every block spans the same space, so rank, coefficients' norms and all residuals agree in fp64.
    """
    a = MATRICES["polynomial"](*shape)
    options = {"block": 7, "trim": trim, "seed": 3, "key": 5, "refresh": 2}
    got = adaptive_range_finder(a.to(device), tolerance, **options)
    expected = reference.adaptive_range_finder(a, tolerance, **options)
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
    r = int(expected[2])
    assert int(got[2]) == r
    # In Householder form nothing at all is left of a matrix once all its rows are done: converged.
    assert int(got[5]) == int(expected[5]) or (tolerance == 0 and int(got[5]) == CONVERGED)
    torch.testing.assert_close(got[3].cpu(), expected[3], rtol=1e-8, atol=1e-10)
    if tolerance > 0:
        torch.testing.assert_close(got[4].cpu(), expected[4], rtol=1e-8, atol=8e-8, equal_nan=True)
    q, p = got[0][:, :r].cpu(), expected[0][:, :r]
    torch.testing.assert_close(q @ (q.mT @ a), p @ (p.mT @ a), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_has_a_rank_for_each_matrix(device, dtype):
    """Guards against one rank for the whole batch, and matrices that share a test matrix."""
    kinds = ["polynomial", "exponential", "rank_deficient", "flat", "spiked"]
    stack = [MATRICES[k](30, 44).to(dtype) for k in kinds]
    stack.append(torch.zeros(30, 44, dtype=dtype))
    a = torch.stack(stack).view(2, 3, 30, 44).to(device)
    found = adaptive_range_finder(a, 0.05, block=8, seed=1, key=4)
    assert found[2].shape == found[3].shape == found[5].shape == (2, 3)
    assert found[4].shape == (2, 3, 4)
    flat = [t.flatten(0, 1) for t in found]
    for i in range(5):
        mine = [t[i] for t in flat]
        check(a[i // 3, i % 3], mine, 0.05, block=8)
        alone = adaptive_range_finder(a[i // 3, i % 3], 0.05, block=8, seed=1, key=4 + i)
        assert int(mine[2]) == int(alone[2])
        torch.testing.assert_close(mine[3], alone[3], rtol=1e-3, atol=1e-7)
    assert len({int(r) for r in flat[2]}) >= 4
    assert int(flat[5][5]) == ZERO
    assert [t.shape for t in adaptive_range_finder(a[:0], 0.1)[2:4]] == [(0, 3), (0, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite(device, dtype, value):
    """Guards against `E > thr`, which is false for NaN and calls it converged."""
    a = gaussian(12, 15).to(device, dtype).repeat(2, 1, 1)
    a[1, 7, 14] = value
    found = adaptive_range_finder(a, 0.1, block=4)
    assert found[5].tolist() == [CONVERGED, NONFINITE]
    assert found[2].tolist()[1] == 0
    assert math.isnan(found[3][1])
    assert found[4][1].isnan().all()
    assert not found[0][1].any()


@pytest.mark.parametrize("relative", [True, False])
def test_zero(device, relative):
    """Guards against a division by zero."""
    for shape in ((9, 14), (14, 9), (1, 1)):
        found = adaptive_range_finder(torch.zeros(shape, device=device), 0.1, relative=relative)
        assert int(found[5]) == ZERO
        assert int(found[2]) == 0
        assert float(found[3]) == 0
        assert found[4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tolerance", [0.1, 1e-4, 0.0])
def test_rank_deficient(device, dtype, tolerance):
    """Guards against more columns than the matrix has rank, where the tolerance is over rounding."""
    for m, n in ((48, 70), (70, 48)):
        a = rank_deficient(m, n).to(device, dtype)
        found = adaptive_range_finder(a, tolerance, block=5)
        check(a, found, tolerance, block=5)
        assert tolerance == 0 or int(found[2]) <= 12


@pytest.mark.parametrize("power", [100, -100, 2, -2])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_powers_of_two_change_nothing(device, shape, power):
    """Guards against scaling that rounds, overflows or vanishes: assertion 8."""
    a = polynomial(*shape).float().to(device)
    expected = adaptive_range_finder(a, 0.02, block=16)
    got = adaptive_range_finder(torch.ldexp(a, torch.tensor(power)), 0.02, block=16)
    assert int(got[2]) == int(expected[2])
    assert torch.equal(got[0], expected[0])
    assert torch.equal(torch.ldexp(got[1], torch.tensor(-power)), expected[1])
    assert torch.equal(got[3], expected[3])


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.float64, 1e200), (torch.float64, 1e-200),
     (torch.float64, 1e300), (torch.float64, 1e-310), (torch.float32, 1e-40), (torch.bfloat16, 1e30),
     (torch.float16, 1e-5)],
)  # fmt: skip
@pytest.mark.parametrize("sketch", ["plain", "half_power"])
def test_extreme_scales(device, dtype, factor, sketch):
    """Guards against overflow and underflow of squares and scale factors; denormals included."""
    a = (gaussian(24, 36) * factor).to(device, dtype)
    basis, _, rank, residual, _, status = adaptive_range_finder(a, 0.4, block=4, sketch=sketch)[:6]
    q = basis[:, : int(rank)]
    assert int(status) == CONVERGED
    assert_orthonormal(q, UNIT_ROUNDOFF[dtype])
    reached = projection_error(a.double() / factor, q)
    assert reached <= 0.4 + 1e-6
    assert float(residual) == pytest.approx(reached, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strides", ["transposed", "strided"])
def test_layouts_and_dtypes(device, strides, dtype):
    """Guards against strides read wrongly, another residual than the contiguous one, a changed input."""
    a = polynomial(45, 70).to(device, dtype)
    view = layout(a, strides)
    before = view.clone()
    got, expected = (adaptive_range_finder(x, 0.1, block=8) for x in (view, a))
    check(a, got, 0.1, block=8)
    assert int(got[2]) == int(expected[2])
    torch.testing.assert_close(got[3], expected[3], rtol=0, atol=64 * 2.0**-24)
    assert torch.equal(view, before)


def test_reproducible(device):
    """Guards against randomness from outside the seed."""
    a = polynomial(50, 70).float().to(device)
    first = adaptive_range_finder(a, 0.1, block=8, seed=2)
    torch.manual_seed(0)
    for x, y in zip(first, adaptive_range_finder(a, 0.1, block=8, seed=2), strict=True):
        assert torch.equal(x.nan_to_num(-1.0), y.nan_to_num(-1.0))
    assert not torch.equal(adaptive_range_finder(a, 0.1, block=8, seed=3)[0], first[0])


@pytest.mark.parametrize(
    ("error", "message", "shape", "arguments"),
    [
        (ValueError, "dimensions", (4,), {}),
        (ValueError, "at least one row", (4, 0), {}),
        (ValueError, "tolerance", (4, 5), {"tolerance": -0.1}),
        (ValueError, "tolerance", (4, 5), {"tolerance": math.nan}),
        (ValueError, "tolerance", (4, 5), {"tolerance": math.inf}),
        (ValueError, "block", (4, 5), {"block": 0}),
        (ValueError, "max_rank", (4, 5), {"max_rank": 0}),
        (ValueError, "method", (4, 5), {"method": "other"}),
        (ValueError, "sketch", (4, 5), {"sketch": "other"}),
        (ValueError, "sketch", (4, 5), {"sketch": "warm"}),
        (ValueError, "seed", (4, 5), {"seed": -1}),
        (ValueError, "key", (4, 5), {"key": -1}),
        (ValueError, "refresh", (4, 5), {"refresh": 2**32}),
    ],
)
def test_bad_arguments(device, error, message, shape, arguments):
    """Guards against bad arguments that crash, or pass."""
    arguments = {"tolerance": 0.1, **arguments}
    with pytest.raises(error, match=message):
        adaptive_range_finder(torch.ones(shape, device=device), **arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_bad_dtype(device, dtype):
    """Guards against integers read as numbers, and complex matrices with the transpose for the adjoint."""
    with pytest.raises(TypeError, match="floating-point"):
        adaptive_range_finder(torch.ones(4, 5, device=device).to(dtype), 0.1)


def test_autograd(device):
    """Guards against a gradient that is silently zero."""
    a = gaussian(6, 7).float().to(device).requires_grad_()
    with pytest.raises(RuntimeError, match="adaptive_range_finder"):
        adaptive_range_finder(a, 0.1)[0].sum().backward()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 40, 9)])
@pytest.mark.parametrize("max_rank", [None, 4])
@pytest.mark.parametrize("block", [3, 64])
def test_opcheck(device, shape, max_rank, block):
    """Guards against a fake implementation or schema at odds with the operator.

    With a tolerance of 0 all blocks run and no NaN pads the residuals, which opcheck would find unequal.
    """
    a = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    torch.library.opcheck(
        torch.ops.galore_rrf.adaptive_range_finder.default,
        (a, 0.0),
        {"block": block, "max_rank": max_rank, "seed": 3},
    )
