"""adaptive_range_finder with all its options mixed: section 3 of the specification, and the implicit form."""

import itertools
import math

import pytest
import torch
from bounds import CONVERGED, FLOOR, NONFINITE, RANK_CAP, ZERO, check
from matrices import (
    MATRICES,
    UNIT_ROUNDOFF,
    assert_orthonormal,
    gaussian,
    generator,
    norm,
    polynomial,
    tails,
)

from galore_rrf import Status, ops, range_finder
from galore_rrf import adaptive_range_finder as find
from galore_rrf.ops import adaptive_range_finder

pytestmark = pytest.mark.core

BETWEEN = ["householder", "gram_schmidt"]
PANELS = ["householder", "cholesky_qr", "gram_schmidt"]
METHODS = ["right_looking", "left_looking"]
SKETCHES = ["plain", "half_power"]
MIXES = [
    {"between": b, "panel": p, "method": m, "sketch": s, "trim": t}
    for b, p, m, s, t in itertools.product(BETWEEN, PANELS, METHODS, SKETCHES, [True, False])
]
# Not divisible by the block, a block over m, one row, one column, m > n, r = min(m, n).
SHAPES = [
    *((50, 80, 16), (80, 50, 16), (37, 53, 64), (53, 37, 10), (37, 37, 12)),
    *((1, 30, 4), (30, 1, 4), (1, 1, 1), (19, 18, 5)),
]


def mix_id(mix):
    return "-".join(str(v) for v in mix.values())


def sweep(device, a, tolerances, block, mix, seed=0, **options):
    a = a.to(device)
    for tolerance in tolerances:
        found = adaptive_range_finder(a, tolerance, block=block, seed=seed, **mix, **options)
        check(
            a,
            found,
            tolerance,
            block=block,
            trim=mix["trim"],
            method=mix["method"],
            max_rank=options.get("max_rank"),
            extra_blocks=options.get("extra_blocks", 1),
        )


@pytest.mark.parametrize("mix", MIXES, ids=mix_id)
@pytest.mark.parametrize("matrix", MATRICES)
def test_bounds(device, matrix, mix):
    """Guards against two choices that are right alone and wrong together: a false stop, a wrong residual."""
    first = (
        MIXES.index(mix) + list(MATRICES).index(matrix)
    ) % 3  # every third shape here, all where it is slow
    for i, (m, n, block) in list(enumerate(SHAPES))[first::3]:
        dtype = [torch.float32, torch.float64][(i + len(matrix)) % 2]
        tolerances = {
            "left_looking": [0.1, 8.1 * UNIT_ROUNDOFF[dtype] ** 0.5],
            "right_looking": [0.1, 1.2e-5 if dtype == torch.float32 else 1e-13],
        }
        sweep(device, MATRICES[matrix](m, n).to(dtype), tolerances[mix["method"]], block, mix)


@pytest.mark.slow
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("panel", PANELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("matrix", MATRICES)
def test_bounds_over_seeds(device, matrix, dtype, panel, between):
    """Guards against rare failures: some 40 seeded runs for every mix and matrix, below the floor too."""
    tolerances = [0.3, 0.03, 3e-3, 1.2e-5, 1e-6, 0.0]
    if dtype == torch.float64:
        tolerances += [1e-7, 1e-10, 1e-13, 1e-15]
    seed = 0
    for m, n, block in [*SHAPES, (128, 200, 32), (200, 128, 32), (64, 64, 1), (100, 99, 7)]:
        a = MATRICES[matrix](m, n, seed).to(dtype)
        for method, sketch, trim in itertools.product([*METHODS, "auto"], SKETCHES, [True, False]):
            mix = {"between": between, "panel": panel, "method": method, "sketch": sketch, "trim": trim}
            seed += 1
            chosen = [tolerances[(seed + i) % len(tolerances)] for i in range(2)]
            sweep(device, a, chosen, block, mix, seed=seed)


@pytest.mark.parametrize("tolerance", [1.1e-5, 1e-6, 1e-9, 0.0])
@pytest.mark.parametrize("mix", MIXES, ids=mix_id)
def test_below_the_floor(device, mix, tolerance):
    """Guards against a tolerance that fp32 cannot hold being called reached, or a residual made of rounding."""
    for matrix, (m, n) in itertools.product(("polynomial", "exponential", "flat"), ((40, 60), (60, 40))):
        a = MATRICES[matrix](m, n).float()
        sweep(device, a, [tolerance], 9, mix)
        found = adaptive_range_finder(a.to(device), tolerance, block=9, **mix)
        assert int(found[5]) == FLOOR
        assert float(found[3]) > 0 or m <= n


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("matrix", ["polynomial", "exponential", "low_rank_noise"])
def test_mixes_find_the_same(device, matrix, dtype):
    """Guards against a mix that spans another space: with the plain sketch all are one algorithm."""
    a = MATRICES[matrix](60, 90).to(device, dtype)
    for trim in (True, False):
        runs = [
            adaptive_range_finder(
                a, 0.05, block=7, sketch="plain", trim=trim, between=b, panel=p, method=m, seed=3
            )
            for b, p, m in itertools.product(BETWEEN, PANELS, METHODS)
        ]
        ranks = [int(run[2]) for run in runs]
        assert max(ranks) - min(ranks) <= (1 if dtype == torch.float32 else 0)
        for run in runs:
            if int(run[2]) == ranks[0]:
                accuracy = 1e-3 if dtype == torch.float32 else 1e-9
                torch.testing.assert_close(run[3], runs[0][3], rtol=accuracy, atol=0)
                p, q = (x[0][:, : ranks[0]].double() for x in (run, runs[0]))
                assert norm(p @ p.mT - q @ q.mT) <= (2e-2 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("mix", MIXES, ids=mix_id)
def test_scales(device, mix):
    """Guards against overflow or underflow in one of the mixes: every power of two gives the same rank."""
    a = polynomial(40, 60).float().to(device)
    tolerance = 0.02 if mix["method"] == "left_looking" else 1e-4
    expected = adaptive_range_finder(a, tolerance, block=7, **mix)
    for power in (-100, -65, -50, -45, -40, -20, 20, 45, 60, 100):
        scaled = torch.ldexp(a, torch.tensor(power))
        found = adaptive_range_finder(scaled, tolerance, block=7, **mix)
        check(scaled, found, tolerance, block=7, trim=mix["trim"], method=mix["method"])
        assert int(found[2]) == int(expected[2])
        torch.testing.assert_close(found[3], expected[3], rtol=1e-4, atol=64 * 2.0**-24)


@pytest.mark.parametrize("mix", MIXES, ids=mix_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_beside_small(device, mix, dtype):
    """Guards against one scale for entries of 1e30 and denormals in one matrix."""
    large, small = (1e30, 1e-40) if dtype == torch.float32 else (1e300, 1e-310)
    a = gaussian(24, 36).to(dtype)
    a[:8] *= large
    a[8:16] *= small
    check(a, adaptive_range_finder(a.to(device), 0.3, block=5, **mix), 0.3, block=5, trim=mix["trim"],
          method=mix["method"])  # fmt: skip
    alone = torch.zeros(24, 36, dtype=dtype)
    alone[3, 5], alone[20, 30] = large, small
    basis, _, rank, residual, _, status = adaptive_range_finder(alone.to(device), 0.3, block=5, **mix)[:6]
    assert (int(status), float(residual)) == (CONVERGED, pytest.approx(0, abs=1e-6))
    assert_orthonormal(basis[:, : int(rank)], UNIT_ROUNDOFF[dtype])


@pytest.mark.parametrize("mix", MIXES, ids=mix_id)
def test_bad_matrix_of_a_batch(device, mix):
    """Guards against a zero or NaN in one matrix that reaches the others, or a loop that never ends."""
    a = torch.stack([polynomial(20, 30, s).float() for s in range(4)]).to(device)
    a[1, 3, 4], a[2] = math.nan, 0
    found = adaptive_range_finder(a, 0.1, block=6, seed=2, key=5, **mix)
    assert found[5].tolist() == [CONVERGED, NONFINITE, ZERO, CONVERGED]
    assert found[2][1:3].tolist() == [0, 0]
    assert not found[0][1:3].any()
    for i in (0, 3):
        check(a[i], [x[i] for x in found], 0.1, block=6, trim=mix["trim"], method=mix["method"])
        alone = adaptive_range_finder(a[i], 0.1, block=6, seed=2, key=5 + i, **mix)
        assert int(alone[2]) == int(found[2][i])
        torch.testing.assert_close(found[3][i], alone[3], rtol=1e-3, atol=0)


@pytest.mark.parametrize("mix", MIXES, ids=mix_id)
def test_deficient_to_the_cap(device, mix):
    """Guards against columns made of rounding once the range is exhausted: tolerance 0 runs on to the cap."""
    for m, n, rank in ((30, 44, 3), (44, 30, 3), (25, 25, 1), (12, 40, 11)):
        a = (gaussian(m, rank, 1) @ gaussian(rank, n, 2)).float()
        sweep(device, a, [0.1, 0.0], 7, mix)
        a[:, n // 2 :] = 0
        a[: m // 2] = 0
        sweep(device, a, [0.1, 0.0], 7, mix)
        sweep(device, torch.eye(m, n), [0.1, 0.0], 7, mix)


# --- Implicit form ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("panel", PANELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sketch", SKETCHES)
def test_implicit_is_the_explicit_basis(device, sketch, method, panel, dtype):
    """Guards against a V or T of several blocks put together wrongly."""
    for matrix, (m, n, block) in itertools.product(("polynomial", "rank_deficient", "row_scaled"), SHAPES):
        a = MATRICES[matrix](m, n).to(device, dtype)
        options = {"block": block, "trim": False, "panel": panel, "method": method, "sketch": sketch}
        result = find(a, 0.05, implicit=True, **options)
        explicit = find(a, 0.05, **options)
        u = UNIT_ROUNDOFF[dtype]
        v, t, r = result.reflector.v, result.reflector.t, result.rank
        assert result.explicit_basis is None
        assert result.basis is result.basis  # formed once
        assert (v.shape, t.shape, result.basis.shape) == ((m, r), (r, r), (m, r))
        assert not v.triu(1).any()
        assert not t.tril(-1).any()
        check(a, [x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64) for x in (
            torch.nn.functional.pad(result.basis, (0, min(m, n) - r)),
            torch.nn.functional.pad(result.coefficients, (0, 0, 0, min(m, n) - r)),
            r, result.residual, result.residuals, result.status,
        )], 0.05, block=block, trim=False, method=method)  # fmt: skip
        if m <= n:  # else some columns more are found and trimmed off
            assert (result.rank, result.status) == (explicit.rank, explicit.status)
            torch.testing.assert_close(result.basis, explicit.basis, rtol=0, atol=1e4 * u)
            torch.testing.assert_close(result.coefficients, explicit.coefficients)
        for columns in (1, 5):
            x = torch.randn(m, columns, dtype=v.dtype, generator=generator(3)).to(device)
            y = result.reflector.apply(x, transpose=True)
            torch.testing.assert_close(y[:r], result.basis.mT @ x, rtol=0, atol=100 * m * u)
            torch.testing.assert_close(result.reflector.apply(y), x, rtol=0, atol=100 * m * u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_implicit_batch(device, dtype):
    """Guards against columns of the identity, or of another matrix, beyond a matrix's own rank."""
    kinds = ["polynomial", "exponential", "flat", "step"]  # columns beyond an exact rank would be noise
    a = torch.stack([*(MATRICES[k](30, 44) for k in kinds), torch.zeros(30, 44), gaussian(30, 44)])
    a[5, 2, 3] = math.nan
    a = a.view(2, 3, 30, 44).to(device, dtype)
    options = {"block": 5, "sketch": "plain", "trim": False, "seed": 2}
    implicit, explicit = find(a, 0.05, implicit=True, key=3, **options), find(a, 0.05, key=3, **options)
    assert torch.equal(implicit.rank, explicit.rank)
    assert len(set(implicit.rank.flatten().tolist())) >= 4
    assert torch.equal(implicit.status, explicit.status)
    torch.testing.assert_close(implicit.basis, explicit.basis, rtol=0, atol=1e4 * UNIT_ROUNDOFF[dtype])
    for i in range(6):
        alone = find(a[i // 3, i % 3], 0.05, implicit=True, key=3 + i, **options)
        r = alone.rank
        assert r == int(implicit.rank[i // 3, i % 3])
        for mine, own in zip(
            (implicit.basis, implicit.reflector.v), (alone.basis, alone.reflector.v), strict=True
        ):
            torch.testing.assert_close(mine[i // 3, i % 3, :, :r], own, rtol=0, atol=1e-4)
            assert not mine[i // 3, i % 3, :, r:].any()
    x = torch.randn(2, 3, 30, 4, dtype=dtype, generator=generator(1)).to(device)
    back = implicit.reflector.apply(implicit.reflector.apply(x), transpose=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e4 * UNIT_ROUNDOFF[dtype])


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (0, 5, 6)])
def test_implicit_of_rank_zero(device, shape):
    """Guards against an error where there is nothing to reflect: a zero matrix, or no matrix."""
    result = find(torch.zeros(shape, device=device), 0.1, implicit=True, trim=False)
    assert result.basis.shape == (*shape[:-1], 0)
    x = torch.randn(*shape[:-1], 3, device=device)
    assert torch.equal(result.reflector.apply(x), x)
    nan = find(torch.full((5, 6), math.nan, device=device), 0.1, implicit=True, trim=False)
    assert (nan.rank, nan.status) == (0, Status.nonfinite)
    assert nan.basis.shape == (5, 0)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("implicit.*trim=True", {"implicit": True}),
        ("implicit.*between='gram_schmidt'", {"implicit": True, "trim": False, "between": "gram_schmidt"}),
        ("Invalid extra_blocks: -1", {"extra_blocks": -1}),
        ("Invalid block: 0", {"block": 0}),
        ("Invalid between: 'qr'.*householder.*gram_schmidt", {"between": "qr"}),
        ("Invalid panel: 'qr'.*householder.*cholesky_qr.*gram_schmidt", {"panel": "qr"}),
        ("Invalid method: 'up'.*auto.*right_looking.*left_looking", {"method": "up"}),
        ("Invalid tolerance: -1", {"tolerance": -1.0}),
    ],
)
def test_bad_options(device, message, options):
    """Guards against options that do not go together passing, or named wrongly."""
    for op in (find, adaptive_range_finder):
        with pytest.raises(ValueError, match=message):
            op(gaussian(5, 6).to(device), **{"tolerance": 0.1, **options})
    if "panel" in options:
        with pytest.raises(ValueError, match=message):
            range_finder(gaussian(5, 6).to(device), 2, **options)


def test_enormous_blocks(device):
    """Guards against a product of counts that overflows: the most that makes sense is all columns."""
    a = polynomial(20, 30).float().to(device)
    for block, extra in ((2**62, 5), (2**63 - 1, 1), (2, 2**62), (2**62, 2**62), (3, 2**63 - 1)):
        for max_rank in (None, 7):
            options = {"block": block, "extra_blocks": extra, "max_rank": max_rank}
            found = adaptive_range_finder(a, 0.3, **options)
            check(a, found, 0.3, block=block, max_rank=max_rank, extra_blocks=extra)


# --- Fixed rank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sketch", ["plain", "half_power", "power"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("matrix", MATRICES)
def test_panels_of_the_fixed_rank(device, matrix, dtype, sketch):
    """Guards against a panel method that loses orthogonality where the sketch is ill-conditioned."""
    u = UNIT_ROUNDOFF[dtype]
    for m, n, rank in ((61, 90, 23), (90, 61, 23), (30, 30, 30), (1, 9, 1), (9, 1, 1)):
        a = MATRICES[matrix](m, n).to(device, dtype)
        for panel in PANELS:
            for oversampling in (0, 5):
                q, b, residual, status = ops.range_finder(
                    a, rank, sketch=sketch, panel=panel, oversampling=oversampling, seed=4
                )
                x, y, size = a.double(), q.double(), norm(a)
                assert int(status) == CONVERGED
                assert_orthonormal(q, u)
                assert norm(b.double() - y.mT @ x) <= 64 * u * size
                assert abs(norm(x - y @ b.double()) - float(residual) * size) <= 64 * u * size
                assert float(residual) >= float(tails(x / size)[rank]) * (1 - 1e-6) - 64 * u


@pytest.mark.parametrize("panel", PANELS)
def test_every_panel_meets_theorem_10_5(device, panel):
    """Guards against a block worse than theory (Halko, Martinsson, Tropp 2011, theorem 10.5 and eq. 1.9).

    Of the fixed rank, and of the first block of the adaptive range finder, however it is made.
    """
    seeds, width, u = 24, 16, 2.0**-24
    runs = {
        "fixed": lambda a, s: ops.range_finder(a, width, sketch="plain", panel=panel, seed=s)[0],
        **{
            f"{method}-{between}": lambda a, s, m=method, b=between: adaptive_range_finder(
                a, 0.0, block=width, max_rank=width, method=m, between=b, panel=panel, trim=False, seed=s
            )[0]
            for method, between in itertools.product(METHODS, BETWEEN)
        },
    }
    for matrix in ("polynomial", "exponential", "low_rank_noise", "fourteen_decades", "step", "stairs"):
        a = MATRICES[matrix](60, 80).to(device, torch.float32)
        x = a.double().cpu()
        tail, size, sigma = tails(x), norm(a), torch.linalg.svdvals(x)
        bound = min(math.sqrt(1 + k / (width - k - 1)) * float(tail[k]) for k in range(width - 3))
        spectral = (1 + 11 * math.sqrt(width * 60)) * float(sigma[8]) + 64 * u * size
        for run in runs.values():
            rest = [x - q @ (q.mT @ x) for q in (run(a, s).double().cpu() for s in range(seeds))]
            assert max(float(torch.linalg.matrix_norm(y, 2)) for y in rest) <= spectral
            errors = torch.tensor([norm(y) for y in rest])
            assert float(errors.mean()) <= bound + 3 * float(errors.std()) / math.sqrt(seeds) + 64 * u * size
            assert float(errors.max()) <= 2 * bound + 64 * u * size


# --- What torch asks of operators ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 9, 6)])
@pytest.mark.parametrize("mix", MIXES[::11], ids=mix_id)
@pytest.mark.parametrize("extra_blocks", [0, 2])
def test_opcheck(device, shape, mix, extra_blocks):
    """Guards against a fake implementation whose shapes follow the options otherwise than the operator's."""
    a = torch.randn(shape, generator=generator(1)).to(device)
    for max_rank in (None, 3):
        options = {**mix, "block": 2, "max_rank": max_rank, "extra_blocks": extra_blocks}
        found = torch.ops.galore_rrf.adaptive_range_finder(a, 0.0, **options)
        if not found[4].isnan().any():  # opcheck would find the padding unequal
            torch.library.opcheck(torch.ops.galore_rrf.adaptive_range_finder.default, (a, 0.0), options)
        fake = torch.ops.galore_rrf.adaptive_range_finder(a.to("meta"), 0.0, **options)
        assert [(x.shape, x.dtype, x.stride()) for x in fake] == [
            (x.shape, x.dtype, x.stride()) for x in found
        ]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 9, 6)])
def test_opcheck_implicit(device, shape):
    """Guards against the same in implicit form: T, and no columns more than n."""
    a = torch.randn(shape, generator=generator(1)).to(device)
    options = {"block": 4, "implicit": True, "trim": False}
    torch.library.opcheck(torch.ops.galore_rrf.adaptive_range_finder.default, (a, 0.0), options)


def test_compile(device):
    """Guards against a graph break, or options that the compiler drops."""

    def f(a):
        options = {"block": 3, "max_rank": 8, "between": "gram_schmidt", "panel": "cholesky_qr"}
        q, b, *_ = adaptive_range_finder(a, 0.1, method="left_looking", extra_blocks=2, **options)
        v, _, _, _, _, _, t = adaptive_range_finder(a, 0.1, block=3, trim=False, implicit=True)
        return q @ b, ops.explicit_basis(v, t)

    a = polynomial(12, 20).to(device)
    torch._dynamo.reset()
    for x, y in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(a), f(a), strict=True):
        torch.testing.assert_close(x, y)


def test_statuses_of_a_cap(device):
    """Guards against a status that hides a tolerance missed, in any mix."""
    a = polynomial(40, 60).float().to(device)
    for mix in MIXES:
        assert int(adaptive_range_finder(a, 0.01, max_rank=8, **mix)[5]) == RANK_CAP
        assert int(adaptive_range_finder(a, 0.3, **mix)[5]) == CONVERGED
        assert int(adaptive_range_finder(a, 1e-6, max_rank=8, **mix)[5]) == FLOOR
