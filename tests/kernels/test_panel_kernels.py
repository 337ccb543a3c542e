"""The panel kernels on the host: bases by Householder reflectors and the LU factorisation of signed_lu."""

import itertools
import math

import host_kernels
import pytest
import torch
from matrices import MATRICES, UNIT_ROUNDOFF, assert_orthonormal, gaussian, one_norm

from galore_rrf import reference

DTYPES = [torch.float32, torch.float64]
SHAPES = [(1, 1), (7, 1), (12, 12), (40, 7), (33, 8), (70, 9), (130, 33), (24, 24), (200, 16)]


def bases(panels, *, threads=64, active=None, between_columns=0, between_matrices=0):
    """The kernel on a stack, its columns and matrices apart by so many entries, which stay NaN."""
    count, rows, cols = panels.shape
    ld = rows + between_columns
    memory = panels.new_full((count, cols * ld + between_matrices), torch.nan)
    view = memory.as_strided((count, rows, cols), (memory.shape[1], 1, ld))
    view.copy_(panels)
    flags = torch.ones(count, dtype=torch.uint8) if active is None else active
    whole = [DTYPES.index(panels.dtype), count, rows, cols, ld, memory.shape[1], threads]
    host_kernels.call("householder", whole, [], [memory, flags])
    result = view.clone()
    assert view.fill_(torch.nan) is view
    assert memory.isnan().all()
    return result


def scaled(a, exponent):
    """2^exponent a, also where that power is no number."""
    half = exponent // 2
    return a.double() * 2.0**half * 2.0 ** (exponent - half)


def normalised(a):
    """2^-k a with entries up to 1; and k."""
    exponent = math.frexp(float(a.double().abs().max()))[1]
    return scaled(a, -exponent), exponent


def check(panel, q):
    """Orthonormal, and Q^T A the triangle of which Q R is the panel: assertions 1 and 2 of the specification."""
    u = UNIT_ROUNDOFF[panel.dtype]
    rows = panel.shape[0]
    assert_orthonormal(q, u)
    a, exponent = normalised(panel)
    # Entries among the denormals are right to the last of them.
    smallest = math.ldexp(2.0**-149 if u == 2.0**-24 else 2.0**-1074, -exponent) if exponent < -100 else 0.0
    r = q.double().mT @ a
    bound = 30 * rows * u * one_norm(a) + 2 * rows * smallest
    assert one_norm(r.tril(-1)) <= bound
    assert one_norm(q.double() @ r.triu() - a) <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_bases_are_those_of_lapack(rows, cols, dtype):
    """Guards against another sign than LAPACK's, a block that stops short, and rows of a warp's edge."""
    panel = gaussian(rows, cols)
    (q,) = bases(panel[None].to(dtype), between_columns=3)
    check(panel.to(dtype), q)
    u = UNIT_ROUNDOFF[dtype]
    expected = torch.linalg.qr(panel)[0]
    worst = torch.linalg.cond(panel) if cols > 1 else 1
    torch.testing.assert_close(q.double(), expected, rtol=0, atol=float(30 * u * rows**0.5 * worst))


@pytest.mark.parametrize("threads", [32, 96, 384])
def test_any_number_of_threads(threads):
    """Guards against a row that no thread owns, and sums over warps that are not there."""
    panel = gaussian(150, 21).float()
    (q,) = bases(panel[None], threads=threads)
    check(panel, q)
    torch.testing.assert_close(q, torch.linalg.qr(panel)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 32, 128, 129, 1 << 20, 1 << 31])
def test_threads_of_a_launch(rows):
    """Guards against more threads than the registers allow, or none."""
    threads = torch.zeros(1, dtype=torch.int64)
    host_kernels.call("panel_threads", [rows], [], [threads])
    assert int(threads) % 32 == 0
    assert int(threads) == min(384, 32 * -(-rows // 128))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("matrix", MATRICES)
def test_any_spectrum(matrix, dtype):
    """Guards against a loss of orthogonality where columns nearly depend on one another."""
    panel = MATRICES[matrix](60, 19).to(dtype)
    check(panel, bases(panel[None])[0])


def dependent(rows, cols):
    panel = gaussian(rows, cols, 3)
    zero, first, middle, repeated, top = (panel.clone() for _ in range(5))
    zero.zero_()
    first[:, 0] = 0
    middle[:, cols // 2] = 0
    repeated[:, -1] = repeated[:, 0]
    top[cols:] = 0
    single = torch.zeros_like(panel)
    single[rows // 2, cols // 2] = 3
    graded = panel * torch.logspace(0, -30, cols, dtype=torch.float64)
    rank_one = panel[:, :1].expand(rows, cols)
    identity = torch.eye(rows, cols, dtype=torch.float64)
    return torch.stack(
        [zero, first, middle, repeated, top, single, graded, graded.flip(1), rank_one, identity, -identity]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(30, 6), (11, 11), (40, 17)])
def test_any_rank(rows, cols, dtype):
    """Guards against 0/0, and a basis with rounding for columns, where a column is zero or depends on others."""
    panels = dependent(rows, cols).to(dtype)
    for panel, q in zip(panels, bases(panels, between_matrices=5), strict=True):
        check(panel, q)
    assert torch.equal(bases(panels)[0], torch.eye(rows, cols, dtype=dtype))  # no reflection at all


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.float32, e) for e in (-145, -126, -72, 60, 122)]
    + [(torch.float64, e) for e in (-1070, -1000, -520, -460, -440, 440, 460, 520, 1018)],
    ids=str,
)
def test_any_scale(dtype, exponent):
    """Guards against squares that overflow or vanish, and lengths rounded to a denormal."""
    panel = gaussian(24, 5, 7)
    whole, column, row = (panel.clone() for _ in range(3))
    whole[:] = scaled(panel, exponent)
    column[:, 2] = whole[:, 2]
    row[0] = whole[0]
    panels = torch.stack([whole, column, row]).to(dtype)
    for a, q in zip(panels, bases(panels), strict=True):
        check(a, q)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_panels(monkeypatch, value, dtype):
    """Guards against an infinity or a NaN taken for an orthonormal column, or that reaches another matrix."""
    monkeypatch.delenv("GALORE_RRF_RECORD_CALLS", raising=False)  # a NaN's sign is up to the compiler
    panels = gaussian(27, 9).to(dtype).repeat(3, 1, 1)
    panels[1, 5, 2] = value
    found = bases(panels)
    assert not found[1].isfinite().all()
    assert torch.equal(found[0], found[2])
    check(panels[0], found[0])


def test_others_are_left_alone():
    """Guards against a fallback that writes over the bases that Cholesky QR has found."""
    panels = torch.stack([gaussian(20, 5, seed) for seed in range(4)])
    found = bases(panels, active=torch.tensor([0, 1, 0, 255], dtype=torch.uint8))
    assert torch.equal(found[[0, 2]], panels[[0, 2]])
    for i in (1, 3):
        check(panels[i], found[i])


ORTHONORMAL = {
    "random": lambda width: torch.linalg.qr(gaussian(width + 5, width))[0],
    "square": lambda width: torch.linalg.qr(gaussian(width, width))[0],
    "identity": lambda width: torch.eye(width, dtype=torch.float64),
    "negative": lambda width: -torch.eye(width, dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "width"), [*itertools.product(ORTHONORMAL, [1, 7, 16, 17, 33, 49]), ("random", 150)]
)
def test_signed_lu_has_the_bits_of_columns_one_by_one(case, width, dtype):
    """Guards against blocks that eliminate in another order, or lose rows between them."""
    q = ORTHONORMAL[case](width)[:width].to(dtype)
    expected, signs = q.clone(), torch.empty(width, dtype=dtype)
    for j in range(width):
        signs[j] = 1 if expected[j, j] < 0 else -1
        expected[:j, j] *= signs[j]
        expected[j, j] = signs[j] * expected[j, j] - 1
        expected[j + 1 :, j] = signs[j] * expected[j + 1 :, j] / expected[j, j]
        expected[j + 1 :, j + 1 :] -= expected[j + 1 :, j, None] * expected[None, j, j + 1 :]
    for threads in (64, 384) if width == 49 else (96,):
        found = torch.stack([torch.eye(width, dtype=dtype), q])  # the second of a stack
        found_signs = torch.empty(2, width, dtype=dtype)
        host_kernels.call("signed_lu", [DTYPES.index(dtype), width, threads, 2], [], [found, found_signs])
        assert torch.equal(found_signs[1], signs)
        assert torch.equal(found[1], expected)


def test_signed_lu_rebuilds_reflectors():
    """Guards against factors of another matrix than q diag(signs) - I."""
    q = torch.linalg.qr(gaussian(30, 20))[0]
    top, signs = q[:20].contiguous().clone(), torch.empty(20, dtype=torch.float64)
    host_kernels.call("signed_lu", [1, 20, 64, 1], [], [top, signs])
    v, _, expected_signs = reference.householder_reconstruction(q)
    assert torch.equal(signs, expected_signs)
    torch.testing.assert_close(top.tril(-1), v[:20].tril(-1), rtol=0, atol=1e-12)
