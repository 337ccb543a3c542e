"""qb, svd_lowrank and the range finders of many matrices at once."""

import inspect
import math

import pytest
import torch
from bounds import CONVERGED, NONFINITE, ZERO
from matrices import (
    MATRICES,
    UNIT_ROUNDOFF,
    assert_orthonormal,
    gaussian,
    generator,
    layout,
    norm,
    polynomial,
    rank_deficient,
    tails,
    with_spectrum,
)

from galore_rrf import ops, qb, reference, svd_lowrank

pytestmark = pytest.mark.core

DTYPES = [torch.float32, torch.float64]
ALL_DTYPES = [*DTYPES, torch.bfloat16, torch.float16]


def compute(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- qb -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (1, 9), (9, 1), (3, 20, 30), (2, 2, 30, 20)])
def test_qb(device, shape, dtype):
    """Guards against a Q that is not orthonormal, a B that is not Q^T A, or an error far from the best."""
    u = UNIT_ROUNDOFF[dtype]
    flat = [polynomial(*shape[-2:], seed=s) for s in range(max(1, math.prod(shape[:-2])))]
    a = torch.stack(flat).view(shape).to(device, dtype)
    before = a.clone()
    rank = min(shape[-2:]) // 3 + 1
    for arguments in ({"rank": rank}, {"tolerance": 0.3}):
        q, b = qb(a, **arguments)
        r = q.shape[-1]
        assert q.dtype == b.dtype == compute(dtype)
        assert (q.shape, b.shape) == ((*shape[:-1], r), (*shape[:-2], r, shape[-1]))
        assert r == rank or "rank" not in arguments
        for x, y, z in zip(*(t.reshape(-1, *t.shape[-2:]).double().cpu() for t in (a, q, b)), strict=True):
            kept = y[:, y.any(0)]
            assert_orthonormal(kept, u)
            assert norm(z - y.mT @ x) <= 64 * u * norm(x)
            error = norm(x - y @ z)
            if "rank" in arguments:
                assert error <= 1.5 * float(tails(x)[rank]) + 64 * u * norm(x)
            else:
                assert error <= (0.3 + 64 * u) * norm(x)
    assert torch.equal(a, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of rank .None. and tolerance .None."),
        ({"rank": 2, "tolerance": 0.1}, "exactly one of rank .2. and tolerance .0.1."),
        ({"rank": 0}, "Invalid rank: 0"),
        ({"rank": 6}, "Invalid rank: 6"),
        ({"tolerance": -0.1}, "Invalid tolerance: -0.1"),
        ({"tolerance": math.nan}, "Invalid tolerance: nan"),
        ({"rank": 2, "seed": -1}, "Invalid seed: -1"),
    ],
)
def test_qb_bad_arguments(device, arguments, message):
    """Guards against a rank that is silently preferred to the tolerance, or neither."""
    with pytest.raises(ValueError, match=message):
        qb(torch.ones(6, 5, device=device), **arguments)


# --- svd_lowrank --------------------------------------------------------------------------------------


def check_svd(a, u, s, v, roundoff):
    """Orthonormal factors, values in order, and U diag(S) V^T a projection of A."""
    n = a.shape[-1]
    q = s.shape[-1]
    assert (u.shape, s.shape, v.shape) == ((*a.shape[:-1], q), (*a.shape[:-2], q), (*a.shape[:-2], n, q))
    assert u.dtype == s.dtype == v.dtype == compute(a.dtype)
    assert (s[..., :-1] >= s[..., 1:]).all()
    assert (s >= 0).all()
    assert_orthonormal(u, roundoff)
    assert_orthonormal(v, roundoff)
    for x, y, z, w in zip(
        *(t.reshape(-1, *t.shape[-2:]).double().cpu() for t in (a, u, s[..., None], v)), strict=True
    ):
        size = norm(x) or 1.0
        assert norm(y.mT @ x - z * w.mT) <= 100 * roundoff * size
        best = torch.linalg.svdvals(x)[:q]
        assert (z[:, 0] <= best * (1 + 1e-6) + 64 * roundoff * size).all()


def test_signature_is_torchs():
    """Guards against positional arguments of torch.svd_lowrank that mean something else here."""
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (svd_lowrank, torch.svd_lowrank))
    assert [p.name for p in ours[1:4]] == [p.name for p in theirs[1:4]] == ["q", "niter", "M"]
    assert ours[2].default == theirs[2].default == 2
    assert ours[3].default is theirs[3].default is None
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[4:])


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (4, 3), (1, 9), (9, 1), (3, 20, 30), (2, 2, 30, 20)])
@pytest.mark.parametrize("niter", [0, 1, 2, 5])
@pytest.mark.parametrize("q", [None, 1, 6])
def test_svd_lowrank_against_torch(device, q, niter, shape, dtype):
    """Guards against worse singular values than torch's, another number of them, or factors in another order."""
    if q is not None and q > min(shape[-2:]):
        q = min(shape[-2:])
    a = torch.randn(shape, dtype=torch.float64, generator=generator(1)).to(device, dtype)
    before = a.clone()
    u, s, v = svd_lowrank(a, q, niter)
    assert torch.equal(a, before)
    check_svd(a, u, s, v, UNIT_ROUNDOFF[dtype])
    assert s.shape[-1] == (min(6, *shape[-2:]) if q is None else q)
    x = a.double()
    torch.manual_seed(0)
    theirs = torch.svd_lowrank(x, q, niter)
    assert [t.shape for t in theirs] == [u.shape, s.shape, v.shape]
    ours = sum(float(svd_lowrank(x, q, niter, seed=i)[1].norm()) for i in range(8))
    expected = sum(float(torch.svd_lowrank(x, q, niter)[1].norm()) for _ in range(8))
    assert ours >= 0.95 * expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("niter", [1, 2])
@pytest.mark.parametrize("shape", [(50, 70), (70, 50)])
def test_svd_lowrank_finds_the_leading_singular_vectors(device, shape, niter, dtype):
    """Guards against singular values of another matrix, U for V, or signs of U and V that do not belong."""
    a = with_spectrum(*shape, 0.5 ** torch.arange(50, dtype=torch.float64)).to(device, dtype)
    u, s, v = svd_lowrank(a, 8, niter)
    y, t, wh = torch.linalg.svd(a.double(), full_matrices=False)
    torch.testing.assert_close(s[:4].double(), t[:4], rtol=1e-3, atol=0)
    signs = (u[:, :4].double() * y[:, :4]).sum(0).sign()
    torch.testing.assert_close(u[:, :4].double() * signs, y[:, :4], rtol=0, atol=2e-2)
    torch.testing.assert_close(v[:, :4].double() * signs, wh.mT[:, :4], rtol=0, atol=2e-2)
    full = svd_lowrank(a, 50, niter)
    torch.testing.assert_close(full[1].double(), t, rtol=0, atol=64 * UNIT_ROUNDOFF[dtype])


def test_svd_lowrank_subtracts_m(device):
    """Guards against M that is added, ignored or not broadcast."""
    a = gaussian(20, 30).to(device)
    mean = a.mean(0, keepdim=True)
    for m in (mean, mean.expand(20, 30)):
        for x, y in zip(svd_lowrank(a, 5, 2, m), svd_lowrank(a - mean, 5, 2), strict=True):
            torch.testing.assert_close(x, y)
    batch = torch.stack([a, 2 * a])
    found = svd_lowrank(batch, 5, M=batch.mean(-2, keepdim=True))
    check_svd(batch - batch.mean(-2, keepdim=True), *found, 2.0**-53)
    assert svd_lowrank(a, 5, M=a)[1].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tolerance", [0.3, 0.01, 0.0])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("matrix", ["polynomial", "exponential", "rank_deficient", "flat"])
def test_svd_lowrank_to_a_tolerance(device, matrix, shape, tolerance, dtype):
    """Guards against a tolerance missed or met with more values than it takes."""
    u = UNIT_ROUNDOFF[dtype]
    a = MATRICES[matrix](*shape).to(device, dtype)
    x, s, y = svd_lowrank(a, tolerance=tolerance)
    check_svd(a, x, s, y, u)
    error = norm(a.double() - (x.double() * s.double()) @ y.double().mT) / norm(a)
    assert error <= tolerance + 100 * u  # 64 u of the range finder, the rest of the SVD
    if tolerance:
        assert s.shape[0] <= math.ceil(1.2 * int((tails(a.cpu()) > tolerance * norm(a)).sum()))


def test_svd_lowrank_batch_to_a_tolerance(device):
    """Guards against one rank for the whole batch: values beyond a matrix's own are 0."""
    a = torch.stack([MATRICES[k](30, 44) for k in ("polynomial", "rank_deficient", "flat")]).to(device)
    u, s, v = svd_lowrank(a, tolerance=0.1)
    ranks = (s > 1e-9).sum(-1).tolist()
    assert len(set(ranks)) == 3
    for i in range(3):
        error = norm(a[i] - (u[i] * s[i]) @ v[i].mT) / norm(a[i])
        assert error <= 0.1 + 1e-12
        assert_orthonormal(u[i, :, : ranks[i]], 2.0**-53)
        assert_orthonormal(v[i, :, : ranks[i]], 2.0**-53)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("niter", [0, 2])
def test_svd_lowrank_of_deficient_matrices(device, niter, dtype):
    """Guards against U or V with zero or parallel columns beyond the rank, 1/0 in V = A^T U / S."""
    u = UNIT_ROUNDOFF[dtype]
    alone = torch.zeros(20, 30, dtype=dtype)
    alone[3, 4] = 7
    for a in (rank_deficient(20, 30), torch.zeros(20, 30), torch.ones(20, 30), torch.eye(20, 30), alone):
        a = a.to(device, dtype)
        for x in (a, a.mT):
            check_svd(x, *svd_lowrank(x, 12, niter), u)


@pytest.mark.parametrize("shape", [(6, 9), (2, 6, 9), (0, 6, 9)])
def test_svd_lowrank_of_rank_zero(device, shape):
    """Guards against an inner step that refuses what a tolerance leaves of a zero matrix: nothing."""
    for a, tolerance in ((torch.zeros(shape), 0.1), (torch.ones(shape), 1.0), (torch.ones(shape), 2.0)):
        u, s, v = svd_lowrank(a.to(device), tolerance=tolerance)
        assert (u.shape, s.shape, v.shape) == ((*shape[:-1], 0), (*shape[:-2], 0), (*shape[:-2], 9, 0))
        q, b = qb(a.to(device), tolerance=tolerance)
        assert (q.shape, b.shape) == ((*shape[:-1], 0), (*shape[:-2], 0, 9))


def test_same_arguments_same_bits(device):
    """Guards against torch's generator deciding, as it does in torch.svd_lowrank, or being moved."""
    a = gaussian(20, 30).to(device)
    torch.manual_seed(1)
    first, after = svd_lowrank(a, 4), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert all(torch.equal(x, y) for x, y in zip(svd_lowrank(a, 4), first, strict=True))
    assert not torch.equal(svd_lowrank(a, 4, 0, seed=1)[0], svd_lowrank(a, 4, 0)[0])
    view = layout(a, "strided")
    torch.testing.assert_close(svd_lowrank(view, 4)[1], first[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(6, 9), (2, 6, 9)])
def test_nonfinite_is_not_decomposed_in_silence(device, shape, value):
    """Guards against zeros for singular values of NaN: there is no status to tell."""
    a = torch.ones(shape, device=device)
    a[..., 2, 3] = value
    for call in (lambda: qb(a, 2), lambda: qb(a, tolerance=0.1), lambda: svd_lowrank(a, 2),
                 lambda: svd_lowrank(a, tolerance=0.1), lambda: svd_lowrank(a * 0 + 1, 2, M=a)):  # fmt: skip
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": 0}, ValueError, "Invalid q: 0"),
        ({"q": -1}, ValueError, "Invalid q: -1"),
        ({"q": 6}, ValueError, "Invalid q: 6.*1 to 5"),
        ({"q": "2"}, TypeError, "int"),
        ({"niter": -1}, ValueError, "Invalid niter: -1"),
        ({"q": 2, "tolerance": 0.1}, ValueError, "exactly one of q .2. and tolerance"),
        ({"tolerance": -1.0}, ValueError, "Invalid tolerance: -1"),
        ({"tolerance": math.nan}, ValueError, "Invalid tolerance: nan"),
        ({"seed": -1}, ValueError, "Invalid seed: -1"),
        ({"M": torch.ones(7)}, RuntimeError, "must match"),
    ],
)
def test_svd_lowrank_bad_arguments(device, arguments, error, message):
    """Guards against bad arguments that crash, or pass."""
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error, match=message):
        svd_lowrank(torch.ones(6, 5, device=device), **arguments)


@pytest.mark.parametrize("f", [lambda a: qb(a, 2), svd_lowrank, lambda a: svd_lowrank(a, tolerance=0.1)])
def test_what_is_no_dense_real_matrix_is_refused(device, f):
    """Guards against sparse or complex matrices, which torch.svd_lowrank takes, read as something else."""
    with pytest.raises(TypeError, match="floating-point"):
        f(torch.ones(6, 5, dtype=torch.complex64, device=device))
    with pytest.raises(TypeError, match="floating-point"):
        f(torch.ones(6, 5, dtype=torch.int64, device=device))
    with pytest.raises((TypeError, NotImplementedError), match=r"[Ss]parse"):
        f(torch.eye(6, 5, device=device).to_sparse())
    with pytest.raises(ValueError, match="expects a matrix"):
        f(torch.ones(6, device=device))
    for shape in ((0, 5), (5, 0), (2, 0, 3)):
        with pytest.raises(ValueError, match="at least one row"):
            f(torch.ones(shape, device=device))


@pytest.mark.parametrize(
    "f",
    [
        lambda a: qb(a, 2),
        lambda a: qb(a, tolerance=0.3),
        svd_lowrank,
        lambda a: svd_lowrank(a, tolerance=0.3),
    ],
)
def test_autograd(device, f):
    """Guards against a gradient that is silently zero; torch.svd_lowrank has one."""
    a = gaussian(6, 7).to(device).requires_grad_()
    with pytest.raises(RuntimeError, match="not implemented"):
        f(a)[0].sum().backward()


# --- Many matrices at once ----------------------------------------------------------------------------


def many(device):
    """Matrices and stacks of mixed shapes, dtypes, strides and spectra."""
    stack = torch.stack(
        [MATRICES[k](20, 31) for k in ("polynomial", "exponential", "flat", "rank_deficient")]
    )
    return [
        x.to(device)
        for x in (
            polynomial(40, 60).float(),
            stack.float(),
            polynomial(33, 20),
            exponential_bf16(),
            layout(gaussian(18, 25).float(), "strided"),
            layout(stack, "transposed"),
            gaussian(1, 9),
            gaussian(9, 1).float(),
            torch.zeros(0, 5, 7),
        )
    ]


def exponential_bf16():
    return MATRICES["exponential"](30, 30).bfloat16()


@pytest.mark.parametrize("threads_used", [1, 4])
@pytest.mark.parametrize("sketch", ["plain", "half_power"])
@pytest.mark.parametrize("method", ["auto", "left_looking", "right_looking"])
@pytest.mark.parametrize("tolerance", [0.3, 0.02])
def test_list_is_one_by_one(device, threads, tolerance, method, sketch, threads_used):
    """Guards against matrices of a list that mix up keys, refreshes or results, on however many threads."""
    threads(threads_used)
    matrices = many(device)
    before = [a.clone() for a in matrices]
    keys, refreshes = [10 * i for i in range(len(matrices))], [i % 3 for i in range(len(matrices))]
    options = {"block": 6, "method": method, "sketch": sketch, "seed": 4}
    found = ops.adaptive_range_finders(matrices, tolerance, 17, keys, refreshes, **options)
    assert [len(x) for x in found] == [len(matrices)] * 4
    for i, a in enumerate(matrices):
        assert torch.equal(a, before[i])
        basis, b, rank, _, _, status, _ = ops.adaptive_range_finder(
            a, tolerance, max_rank=17, key=keys[i], refresh=refreshes[i], **options
        )
        alone = (basis, b, rank, status)
        for x, y in zip((found[j][i] for j in range(4)), alone, strict=True):
            assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
        assert torch.equal(found[2][i], rank)
        assert torch.equal(found[3][i], status)
        # Products on one thread and on several round differently; late columns amplify that.
        p, q = found[0][i].double(), basis.double()
        torch.testing.assert_close(p @ p.mT, q @ q.mT, rtol=0, atol=2e-3)


def test_list_agrees_with_the_reference(device, same_sketch):
    """Guards against a list of another order than the formulae's: ranks and statuses, in fp64."""
    matrices = [a.double() for a in many("cpu")]
    keys, refreshes = list(range(5, 5 + len(matrices))), [2] * len(matrices)
    got = ops.adaptive_range_finders(
        [a.to(device) for a in matrices], 0.1, 12, keys, refreshes, block=5, seed=1
    )
    expected = reference.adaptive_range_finders(matrices, 0.1, 12, keys, refreshes, block=5, seed=1)
    for i in range(len(matrices)):
        for x, y in zip((got[j][i].cpu() for j in range(4)), (expected[j][i] for j in range(4)), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert torch.equal(got[2][i].cpu(), expected[2][i])
        assert torch.equal(got[3][i].cpu(), expected[3][i])


@pytest.mark.parametrize(("min_rank", "multiple"), [(0, 4), (7, 1), (7, 2), (12, 4)])
@pytest.mark.parametrize("sketch", ["plain", "half_power"])
@pytest.mark.parametrize("method", ["left_looking", "right_looking"])
def test_ranks_are_multiples_and_no_less_than_the_least(device, method, sketch, min_rank, multiple):
    """Guards against a rank rounded down, beyond the cap, or taken from columns that were never computed."""
    matrices = [a.double() for a in many(device)]
    keys, refreshes = list(range(len(matrices))), [1] * len(matrices)
    options = {"block": 4, "method": method, "sketch": sketch}
    for tolerance in (0.7, 0.3, 0.05):
        plain = ops.adaptive_range_finders(matrices, tolerance, 14, keys, refreshes, **options)
        found = ops.adaptive_range_finders(
            matrices, tolerance, 14, keys, refreshes, min_rank=min_rank, multiple=multiple, **options
        )
        for a, q, b, ranks, without in zip(matrices, *found[:3], plain[2], strict=True):
            cap = min(14, *a.shape[-2:])
            expected = (-(-without // multiple) * multiple).clamp(min=min(min_rank, cap), max=cap)
            assert bool((ranks <= expected).all())  # more columns to choose from may do with fewer
            assert bool(((ranks % multiple == 0) | (ranks == min(min_rank, cap)) | (ranks == cap)).all())
            assert bool((ranks >= min(min_rank, cap)).all())
            x = a.unsqueeze(0) if a.dim() == 2 else a
            for i, rank in enumerate(ranks.reshape(-1).tolist()):
                basis = q.reshape(-1, *q.shape[-2:])[i, :, :rank]
                assert_orthonormal(basis.cpu(), UNIT_ROUNDOFF[torch.float64])
                coefficients = b.reshape(-1, *b.shape[-2:])[i]
                torch.testing.assert_close(coefficients[:rank], basis.mT @ x[i], rtol=0, atol=1e-9)
                assert not coefficients[rank:].any()
                if rank < cap:
                    left = float(torch.linalg.norm(x[i] - basis @ coefficients[:rank]))
                    assert left <= tolerance * float(torch.linalg.norm(x[i])) * (1 + 1e-9)


def test_least_ranks_agree_with_the_reference(device, same_sketch):
    """Guards against blocks that stop before the least rank, by ranks and statuses of the formulae in fp64."""
    matrices = [a.double() for a in many("cpu")]
    keys, refreshes = list(range(len(matrices))), [2] * len(matrices)
    for options in ({"min_rank": 9}, {"multiple": 4}, {"min_rank": 11, "multiple": 2}):
        got = ops.adaptive_range_finders(
            [a.to(device) for a in matrices],
            0.5,
            13,
            keys,
            refreshes,
            block=4,
            seed=1,
            sketch="plain",
            **options,
        )
        expected = reference.adaptive_range_finders(
            matrices, 0.5, 13, keys, refreshes, block=4, seed=1, sketch="plain", **options
        )
        for mine, theirs in zip(got[2] + got[3], expected[2] + expected[3], strict=True):
            assert torch.equal(mine.cpu(), theirs)


def test_bad_matrices_of_a_list(device):
    """Guards against one NaN, zero or absurd entry that reaches the other matrices."""
    good = polynomial(20, 30).float().to(device)
    nan, zero, large = good.clone(), torch.zeros_like(good), good.clone()
    nan[3, 4], large[5, 6] = math.nan, 3e38
    stack = torch.stack([good, nan, zero, good])
    bases, b, ranks, statuses = ops.adaptive_range_finders(
        [good, nan, zero, stack, large, good * 1e-40, good], 0.1, 15, [0, 0, 0, 0, 0, 0, 0], [0] * 7, block=5
    )
    assert [int(s) for s in statuses[:3]] == [CONVERGED, NONFINITE, ZERO]
    assert statuses[3].tolist() == [CONVERGED, NONFINITE, ZERO, CONVERGED]
    assert [int(s) for s in statuses[4:]] == [CONVERGED, CONVERGED, CONVERGED]
    assert not any(x.any() for i in (1, 2) for x in (bases[i], b[i], ranks[i]))
    assert int(ranks[4]) == 1
    for basis in (bases[0], bases[3][0], bases[6]):
        torch.testing.assert_close(basis, bases[0], rtol=0, atol=1e-5)


def test_empty_list(device):
    """Guards against a reduction over no matrices."""
    assert ops.adaptive_range_finders([], 0.1, 4, [], []) == ([], [], [], [])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "lists of one length, got 1, 2 and 1", {"keys": [1, 2]}),
        (ValueError, "lists of one length", {"refreshes": []}),
        (ValueError, "Invalid key: -1", {"keys": [-1]}),
        (ValueError, "Invalid refresh", {"refreshes": [2**32]}),
        (ValueError, "Invalid max_rank: 0", {"max_rank": 0}),
        (ValueError, "Invalid tolerance: nan", {"tolerance": math.nan}),
        (ValueError, "Invalid block: 0", {"block": 0}),
        (ValueError, "Invalid sketch", {"sketch": "warm"}),
        (ValueError, "Invalid method", {"method": "up"}),
        (ValueError, "Invalid seed: -1", {"seed": -1}),
        (ValueError, "expects a matrix", {"matrices": [torch.ones(3)]}),
        (ValueError, "at least one row", {"matrices": [torch.ones(3, 0)]}),
        (TypeError, "floating-point", {"matrices": [torch.ones(3, 4).int()]}),
        (TypeError, "floating-point", {"matrices": [torch.ones(3, 4).cfloat()]}),
        (TypeError, "dense", {"matrices": [torch.eye(3, 4).to_sparse()]}),
    ],
)
def test_list_bad_arguments(error, message, arguments):
    """Guards against bad arguments that crash, or pass: of any matrix of the list."""
    arguments = {
        **{"matrices": [torch.ones(3, 4)], "tolerance": 0.1, "max_rank": 2, "keys": [1], "refreshes": [0]},
        **arguments,
    }
    with pytest.raises(error, match=message):
        ops.adaptive_range_finders(**arguments)


def test_list_opcheck(device):
    """Guards against a fake implementation or schema at odds with the operator."""
    matrices = [torch.randn(s, generator=generator(1)).to(device) for s in ((6, 9), (2, 9, 6))]
    torch.library.opcheck(
        torch.ops.galore_rrf.adaptive_range_finders.default,
        (matrices, 0.3, 4, [1, 2], [0, 0]),
        {"block": 2},
    )
    torch.library.opcheck(torch.ops.galore_rrf.adaptive_range_finders.default, ([], 0.3, 4, [], []), {})


def test_list_autograd(device):
    """Guards against a gradient that is silently zero."""
    a = gaussian(6, 7).to(device).requires_grad_()
    with pytest.raises(RuntimeError, match="adaptive_range_finders is not implemented"):
        ops.adaptive_range_finders([a], 0.1, 3, [0], [0])[0][0].sum().backward()


def test_compile(device):
    """Guards against a graph break."""

    def f(a, b):
        bases, coefficients, _, _ = ops.adaptive_range_finders([a, b], 0.1, 5, [1, 2], [0, 0], block=3)
        return [x @ y for x, y in zip(bases, coefficients, strict=True)]

    a, b = gaussian(8, 9).to(device), gaussian(12, 6).to(device)
    torch._dynamo.reset()
    for x, y in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(a, b), f(a, b), strict=True):
        torch.testing.assert_close(x, y)
