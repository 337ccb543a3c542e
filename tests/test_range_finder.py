"""The public range finders: what their results hold, for a matrix and for a batch."""

import math

import pytest
import torch

from galore_rrf import RangeFinderResult, Status, adaptive_range_finder, range_finder

pytestmark = pytest.mark.core

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def decaying(*shape, decay=0.8, seed=0, device="cpu", dtype=torch.float64):
    """Known singular values, decay^i."""
    generator = torch.Generator().manual_seed(seed)
    k = min(shape[-2:])
    u = torch.linalg.qr(torch.randn(*shape[:-1], k, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(*shape[:-2], shape[-1], k, generator=generator, dtype=torch.float64))[0]
    a = (u * decay ** torch.arange(k, dtype=torch.float64)) @ v.mT
    return a.to(device, dtype)


def tail(rank, k, decay=0.8):
    """The best relative residual of a rank."""
    s2 = decay ** (2 * torch.arange(k, dtype=torch.float64))
    return float((s2[rank:].sum() / s2.sum()).sqrt())


def residual_of(a, q):
    a, q = a.double(), q.double()
    return (a - q @ (q.mT @ a)).flatten(-2).norm(dim=-1) / a.flatten(-2).norm(dim=-1)


def find(method, a, **keys):
    if method == "fixed":
        return range_finder(a, **{"rank": 6, **keys})
    return adaptive_range_finder(a, **{"tolerance": 0.2, "block": 8, **keys})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (3, 40, 30), (2, 3, 30, 40)], ids=str)
@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_fields_of_the_result(method, shape, dtype, device):
    """Guards against fields whose types, shapes or values depend on the path taken."""
    a = decaying(*shape, device=device, dtype=dtype)
    before = a.clone()
    result = find(method, a)
    assert torch.equal(a, before)
    assert isinstance(result, RangeFinderResult)
    *batch, m, n = shape
    width = int(torch.as_tensor(result.rank).max())
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert (tuple(result.basis.shape), result.basis.dtype) == ((*batch, m, width), compute)
    assert (tuple(result.coefficients.shape), result.coefficients.dtype) == ((*batch, width, n), compute)
    if batch:
        assert (tuple(result.rank.shape), result.rank.dtype) == (tuple(batch), torch.int64)
        assert (tuple(result.residual.shape), result.residual.dtype) == (tuple(batch), torch.float64)
        assert result.residuals.shape[:-1] == tuple(batch)
        assert result.residuals.dtype == torch.float64
        assert (tuple(result.status.shape), result.status.dtype) == (tuple(batch), torch.uint8)
        assert (result.status == Status.converged).all()
    else:
        assert type(result.rank) is int
        assert type(result.residual) is float
        assert isinstance(result.residuals, list)
        assert all(type(x) is float for x in result.residuals)
        assert result.status is Status.converged
    error = 1e-10 if compute == torch.float64 else 1e-4
    torch.testing.assert_close(
        result.coefficients, result.basis.mT @ a.to(compute), rtol=0, atol=error * float(a.double().norm())
    )
    measured = residual_of(a, result.basis)
    torch.testing.assert_close(
        torch.as_tensor(result.residual, dtype=torch.float64, device=device), measured, rtol=1e-3, atol=error
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_basis_is_orthonormal(method, dtype, device):
    """Guards against a basis that shrinks or stretches what it projects; zero beyond each rank of a batch."""
    batch = torch.stack([decaying(40, 30, decay=d, device=device, dtype=dtype) for d in (0.5, 0.8, 0.9)])
    for a in (batch, batch[1]):
        result = find(method, a)
        gram = result.basis.mT @ result.basis
        rank = torch.as_tensor(result.rank, device=device)
        inside = torch.arange(gram.shape[-1], device=device) < rank[..., None]
        expected = torch.diag_embed(inside.to(dtype))
        torch.testing.assert_close(gram, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("sketch", ["plain", "half_power", "power", "warm"])
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_fixed_rank_is_near_the_best_of_that_rank(rank, sketch, device):
    """Guards against a sketch that misses what a rank can hold."""
    a = decaying(40, 30, device=device)
    warm = range_finder(a, rank, sketch="plain", seed=9).basis if sketch == "warm" else None
    result = range_finder(a, rank, sketch=sketch, warm=warm)
    assert (result.rank, result.basis.shape) == (rank, (40, rank))
    assert result.residuals == [result.residual]
    factor = {"plain": 7.0, "half_power": 2.2, "power": 1.5, "warm": 2.2}[sketch]
    best = tail(rank, 30)
    assert best * (1 - 1e-9) <= result.residual <= factor * best


def test_more_work_is_rewarded(device):
    """Guards against oversampling or power steps that are accepted and ignored."""
    a = decaying(60, 50, decay=0.93, device=device)
    plain, more, power, power2 = (
        range_finder(a, 8, **keys).residual
        for keys in (
            {"sketch": "plain"},
            {"sketch": "plain", "oversampling": 16},
            {"sketch": "power", "power": 1},
            {"sketch": "power", "power": 3},
        )
    )
    assert more < 0.95 * plain
    assert power2 < power < plain


def test_oversampled_columns_are_ordered_by_energy(device):
    """Guards against a cut that drops the better columns."""
    result = range_finder(decaying(40, 30, device=device), 8, oversampling=6)
    energy = result.coefficients.norm(dim=1)
    assert (energy.diff() <= 1e-12).all()


@pytest.mark.parametrize("shape", [(40, 30), (3, 40, 30)], ids=str)
def test_without_coefficients_there_is_no_residual(shape, device):
    """Guards against a residual that was never measured."""
    a = decaying(*shape, device=device)
    result = range_finder(a, 5, coefficients=False)
    assert result.coefficients is None
    assert torch.as_tensor(result.residual).isnan().all()
    assert torch.equal(result.basis, range_finder(a, 5).basis)


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (70, 70)], ids=str)
@pytest.mark.parametrize("sketch", ["plain", "half_power"])
def test_tolerance_is_met_with_nearly_the_smallest_rank(sketch, shape, tolerance, device):
    """Guards against a false stop, and against columns that the tolerance does not need."""
    a = decaying(*shape, decay=0.9, device=device)
    result = adaptive_range_finder(a, tolerance, block=8, sketch=sketch)
    best = next(r for r in range(71) if tail(r, 70, 0.9) <= tolerance)
    assert result.status is Status.converged
    assert float(residual_of(a, result.basis)) <= tolerance * (1 + 1e-9)
    assert best <= result.rank <= 1.2 * best + 1


def test_residuals_after_every_block_fall(device):
    """Guards against a history that is not one."""
    result = adaptive_range_finder(decaying(90, 70, decay=0.9, device=device), 0.01, block=8, trim=False)
    assert len(result.residuals) * 8 == result.rank
    assert result.residuals == sorted(result.residuals, reverse=True)
    assert result.residuals[-1] <= 0.01 < result.residuals[-2]
    assert result.residuals[-1] == pytest.approx(result.residual, rel=1e-6)


def test_absolute_tolerance(device):
    """Guards against `relative=False` being read as relative."""
    a = 1000 * decaying(60, 50, device=device)
    absolute = adaptive_range_finder(a, 50.0, relative=False, block=8)
    error = float(residual_of(a, absolute.basis) * a.norm())
    assert absolute.status is Status.converged
    assert error <= 50.0
    assert absolute.residual == pytest.approx(error / float(a.norm()), rel=1e-6)


def status_cases(dtype=torch.float32):
    a = decaying(40, 30, dtype=dtype)
    bad = {value: a.clone() for value in (math.nan, math.inf)}
    for value, matrix in bad.items():
        matrix[3, 4] = value
    return {
        "converged": (a, {"tolerance": 0.2}, Status.converged),
        "rank_cap": (a, {"tolerance": 0.01, "max_rank": 5}, Status.rank_cap),
        "floor": (decaying(80, 30, dtype=dtype), {"tolerance": 1e-12}, Status.floor),
        "zero": (torch.zeros(40, 30), {"tolerance": 0.2}, Status.zero),
        "nan": (bad[math.nan], {"tolerance": 0.2}, Status.nonfinite),
        "inf": (bad[math.inf], {"tolerance": 0.2}, Status.nonfinite),
    }


@pytest.mark.parametrize("case", status_cases())
def test_status_of_the_adaptive_range_finder(case, device):
    """Guards against a result that looks converged and is not."""
    a, keys, expected = status_cases()[case]
    result = adaptive_range_finder(a.to(device), block=8, **keys)
    assert result.status is expected
    if expected is Status.rank_cap:
        assert result.rank == 5
        assert result.residual > 0.01
    if expected is Status.floor:
        assert result.rank == 30
        assert result.residual < 1e-5
    if expected in (Status.zero, Status.nonfinite):
        assert not result.basis.any()
        assert not result.coefficients.any()


@pytest.mark.parametrize("shape", [(80, 30), (40, 30), (30, 80), (30, 30)], ids=str)
def test_tolerance_below_the_dtype_is_not_called_reached(shape, device):
    """Guards against `converged`, and a residual of the order of the tolerance, that fp32 cannot hold."""
    a = decaying(*shape, device=device, dtype=torch.float32)
    result = adaptive_range_finder(a, 1e-12, block=8)
    left = a.double() - result.basis.double() @ result.coefficients.double()
    assert left.norm() > 1e-9 * a.double().norm()
    assert result.rank == 30
    assert result.status is Status.floor


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_autocast_does_not_reach_inside(method, device):
    """Guards against products in half precision where the caller's forward runs under torch.autocast."""
    a = decaying(40, 30, dtype=torch.float32).to(device)
    expected = find(method, a)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = find(method, a)
    assert torch.equal(result.basis, expected.basis)
    assert torch.equal(result.coefficients, expected.coefficients)


@pytest.mark.parametrize("case", ["zero", "nan", "inf"])
@pytest.mark.parametrize("sketch", ["plain", "half_power", "power"])
def test_status_of_the_fixed_rank_range_finder(case, sketch, device):
    """Guards against a basis made from nothing, or from NaN, that nobody is told of."""
    a, _, expected = status_cases()[case]
    result = range_finder(a.to(device), 5, sketch=sketch)
    assert result.status is expected
    assert result.basis.shape == (40, 5)
    assert result.basis.isfinite().all()
    assert not result.coefficients.any()


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_batch_is_its_matrices_one_by_one(method, device):
    """Guards against matrices of a batch that hear each other, bad ones included; matrix i has key + i."""
    cases = status_cases()
    matrices = [cases[c][0] for c in ("converged", "zero", "nan", "inf")]
    batch = torch.stack([*matrices, decaying(40, 30, decay=0.5).float()])
    together = find(method, batch.to(device), key=7)
    for i, a in enumerate(batch.to(device)):
        alone = find(method, a, key=7 + i)
        r = alone.rank
        assert Status(int(together.status[i])) is alone.status
        assert int(together.rank[i]) == r
        # Products on one thread and on several round differently; the last columns amplify that by the
        # sketch's condition number, some hundreds here.
        torch.testing.assert_close(together.basis[i, :, :r], alone.basis, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.coefficients[i, :r], alone.coefficients, rtol=0, atol=1e-5)
        assert not together.basis[i, :, r:].any()
        own = together.residuals[i]
        if alone.status is Status.converged:
            history = torch.tensor(alone.residuals, dtype=torch.float64)
            torch.testing.assert_close(own[own.isfinite()].cpu(), history, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_strides_do_not_matter(method, device):
    """Guards against reading a transpose, a slice or an expanded tensor as if contiguous."""
    a = decaying(40, 30, device=device)
    expected = find(method, a)
    wide = torch.zeros(80, 90, dtype=a.dtype, device=device)
    wide[::2, ::3] = a
    for other in (a.mT.contiguous().mT, wide[::2, ::3]):
        result = find(method, other)
        torch.testing.assert_close(result.basis, expected.basis, rtol=0, atol=1e-10)
    stacked = find(method, a.expand(3, 40, 30))
    assert stacked.basis.shape[:2] == (3, 40)


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_same_arguments_same_bits(method, device):
    """Guards against torch's generator or the order of threads deciding; seed, key and refresh do."""
    a = decaying(40, 30, device=device)
    torch.manual_seed(1)
    first = find(method, a, seed=3, key=4, refresh=5)
    torch.manual_seed(2)
    assert torch.equal(find(method, a, seed=3, key=4, refresh=5).basis, first.basis)
    for other in ({"seed": 4}, {"key": 5}, {"refresh": 6}):
        changed = find(method, a, **{"seed": 3, "key": 4, "refresh": 5, **other})
        assert changed.basis.shape != first.basis.shape or not torch.allclose(changed.basis, first.basis)


@pytest.mark.parametrize("shape", [(0, 40, 30), (2, 0, 40, 30)], ids=str)
@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_empty_batch(method, shape, device):
    """Guards against a reduction over no ranks."""
    result = find(method, torch.zeros(shape, device=device))
    assert result.basis.shape[:-1] == shape[:-1]
    assert result.rank.shape == shape[:-2]


BAD = {
    "rank_zero": (range_finder, {"rank": 0}, ValueError, "rank"),
    "rank_large": (range_finder, {"rank": 31}, ValueError, "rank"),
    "sketch": (range_finder, {"rank": 3, "sketch": "cold"}, ValueError, "sketch"),
    "power": (range_finder, {"rank": 3, "sketch": "power", "power": -1}, ValueError, "power"),
    "oversampling": (range_finder, {"rank": 3, "oversampling": -1}, ValueError, "oversampling"),
    "no_warm": (range_finder, {"rank": 3, "sketch": "warm"}, ValueError, "warm"),
    "warm_rows": (range_finder, {"rank": 3, "sketch": "warm", "warm": torch.ones(9, 3)}, ValueError, "warm"),
    "seed": (range_finder, {"rank": 3, "seed": -1}, ValueError, "seed"),
    "key": (range_finder, {"rank": 3, "key": -1}, ValueError, "key"),
    "refresh": (range_finder, {"rank": 3, "refresh": -1}, ValueError, "refresh"),
    "tolerance": (adaptive_range_finder, {"tolerance": -0.1}, ValueError, "tolerance"),
    "tolerance_nan": (adaptive_range_finder, {"tolerance": math.nan}, ValueError, "tolerance"),
    "block": (adaptive_range_finder, {"tolerance": 0.1, "block": 0}, ValueError, "block"),
    "max_rank": (adaptive_range_finder, {"tolerance": 0.1, "max_rank": 0}, ValueError, "max_rank"),
    "method": (adaptive_range_finder, {"tolerance": 0.1, "method": "best"}, ValueError, "method"),
    "adaptive_sketch": (adaptive_range_finder, {"tolerance": 0.1, "sketch": "warm"}, ValueError, "sketch"),
}


@pytest.mark.parametrize(("function", "keys", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(function, keys, kind, message, device):
    """Guards against bad arguments that surface as something else, far below."""
    a = decaying(40, 30, device=device)
    keys = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in keys.items()}
    with pytest.raises(kind, match=message):
        function(a, **keys)


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
@pytest.mark.parametrize(
    ("a", "kind"),
    [
        (torch.zeros(5), ValueError),
        (torch.zeros(()), ValueError),
        (torch.zeros(40, 30, dtype=torch.int64), TypeError),
        (torch.zeros(40, 30, dtype=torch.complex64), TypeError),
    ],
    ids=["vector", "scalar", "int", "complex"],
)
def test_what_is_no_real_matrix_is_refused(method, a, kind):
    """Guards against reading bytes of another type."""
    with pytest.raises(kind):
        find(method, a)


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_not_differentiable_and_says_so(method, device):
    """Guards against gradients that are silently zero or wrong."""
    a = decaying(40, 30).to(device).requires_grad_()
    result = find(method, a)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"not implemented|differentiable"):
        result.basis.sum().backward()


def test_status_prints_as_its_name():
    """Guards against a bare number where a person reads it."""
    assert f"{find('adaptive', decaying(40, 30)).status}" == "converged"
