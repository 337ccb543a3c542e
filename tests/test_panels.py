"""The building blocks of the range finders, each alone: panels, block reflectors, the SVD of Q B."""

import math

import pytest
import torch
from matrices import UNIT_ROUNDOFF, assert_orthonormal, gaussian, generator, layout, one_norm, with_spectrum

from galore_rrf import ops, reference

pytestmark = pytest.mark.core

METHODS = ["householder", "cholesky_qr", "gram_schmidt"]
DTYPES = [torch.float32, torch.float64]
SHAPES = [(40, 7), (7, 40), (12, 12), (1, 1), (30, 1), (1, 5), (300, 33), (520, 64)]


def normalised(a):
    """2^-k a in fp64, with entries up to 1, exactly; and k."""
    a = a.double()
    largest = float(a.abs().max())
    exponent = math.frexp(largest)[1] if largest else 0
    half = exponent // 2
    return a * 2.0**-half * 2.0 ** (half - exponent), exponent


def scaled(a, exponent):
    half = exponent // 2
    return a.double() * 2.0**half * 2.0 ** (exponent - half)


def reflector_matrix(v, t):
    v, t = v.double(), t.double()
    return torch.eye(v.shape[0], dtype=torch.float64) - v @ t @ v.mT


def assert_trapezoidal(v, t):
    """V unit lower trapezoidal, or zero in a column that reflects nothing; T upper triangular."""
    assert not v.triu(1).any()
    diagonal = v.diagonal()
    assert ((diagonal == 1) | (diagonal == 0)).all()
    assert not v[:, diagonal == 0].any()
    assert not t.tril(-1).any()
    assert not t[:, diagonal == 0].any()
    assert not t[diagonal == 0].any()


def check_triangle(r, q, panel, u):
    """Assertion 2 of the specification, and that Q R is the panel."""
    y, exponent = normalised(panel)
    r, q, size = scaled(r.double(), -exponent), q.double(), one_norm(y)
    # Entries of R among the denormals are right to the last of them.
    smallest = 2.0**-149 if u == 2.0**-24 else 2.0**-1074
    rounded = 2 * panel.shape[0] * math.ldexp(smallest, -exponent) if exponent < -100 else 0.0
    assert not r.tril(-1).any()
    assert one_norm(r - q.mT @ y) <= 30 * panel.shape[0] * u * size + rounded
    assert one_norm(q @ r - y) <= 30 * panel.shape[0] * u * size + rounded


def check_qr(panel, v, t, r):
    u = UNIT_ROUNDOFF[panel.dtype]
    p, w = panel.shape
    k = min(p, w)
    assert (v.shape, t.shape, r.shape) == ((p, k), (k, k), (k, w))
    assert v.dtype == t.dtype == r.dtype == (torch.float64 if panel.dtype == torch.float64 else torch.float32)
    assert_trapezoidal(v, t)
    h = reflector_matrix(v, t)
    assert_orthonormal(h, u)
    check_triangle(r, h[:, :k], panel, u)


def check_orthonormal(panel, q, r):
    u = UNIT_ROUNDOFF[panel.dtype]
    p, w = panel.shape
    k = min(p, w)
    assert (q.shape, r.shape) == ((p, k), (k, w))
    assert q.dtype == r.dtype == (torch.float64 if panel.dtype == torch.float64 else torch.float32)
    assert_orthonormal(q, u)
    check_triangle(r, q, panel, u)


def check_panel(panel, method):
    """Both forms of a panel; whether the method fell back."""
    before = panel.clone()
    check_qr(panel, *(x.cpu() for x in ops.panel_qr(panel, method=method)))
    q, r, fell_back = (x.cpu() for x in ops.orthonormal_panel(panel, method=method))
    check_orthonormal(panel, q, r)
    assert fell_back.dtype == torch.bool
    assert torch.equal(panel.nan_to_num(), before.nan_to_num())
    return bool(fell_back)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_bounds(device, method, shape, dtype):
    """Guards against a panel that loses orthogonality, or an R that is not Q^T Y: assertions 1 and 2."""
    for seed in range(3):
        panel = gaussian(*shape, seed).to(device, dtype)
        fell_back = check_panel(panel, method)
        # Square Gaussian panels are ill-conditioned now and then.
        if shape[0] < shape[1]:
            assert fell_back == (method != "householder")
        elif shape[0] > shape[1]:
            assert not fell_back


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (12, 12), (1, 1), (300, 33)])
def test_householder_is_lapacks(device, shape):
    """Guards against T, V or R of another convention than LAPACK's: T here column by column."""
    panel = gaussian(*shape)
    v, t, r = (x.cpu() for x in ops.panel_qr(panel.to(device)))
    expected_v, expected_t, expected_r = reference.panel_qr(panel)
    torch.testing.assert_close(r, expected_r, rtol=0, atol=1e-12)
    torch.testing.assert_close(t, expected_t, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        reflector_matrix(v, t), reflector_matrix(expected_v, expected_t), rtol=0, atol=1e-12
    )
    q = torch.linalg.qr(panel)[0]
    torch.testing.assert_close(reflector_matrix(v, t)[:, : q.shape[1]], q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_methods_find_one_basis(device, method):
    """Guards against a triangle or a basis that is another one: of full rank they are unique up to signs."""
    panel = gaussian(60, 9)
    q, r, _ = (x.cpu() for x in ops.orthonormal_panel(panel.to(device), method=method))
    expected_q, expected_r = torch.linalg.qr(panel)
    signs = r.diagonal().sign() * expected_r.diagonal().sign()
    torch.testing.assert_close(q, expected_q * signs, rtol=0, atol=1e-12)
    torch.testing.assert_close(r, expected_r * signs[:, None], rtol=0, atol=1e-12)
    if method != "householder":
        assert (r.diagonal() > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("condition", [1e3, 1e6, 1e8, 1e9, 1e12, 1e15])
@pytest.mark.parametrize("method", METHODS)
def test_condition_numbers(device, method, condition, dtype):
    """Guards against Cholesky QR where it is not orthonormal, or that gives up far too early."""
    for p, w in ((80, 12), (300, 40), (30, 30)):
        values = torch.logspace(0, -math.log10(condition), w, dtype=torch.float64)
        panel = with_spectrum(p, w, values, seed=w).to(device, dtype)
        fell_back = check_panel(panel, method)
        if method == "cholesky_qr" and condition <= 1e6:
            assert not fell_back
        if method == "cholesky_qr" and condition >= 1e9 and dtype == torch.float64:
            assert fell_back  # rounded to fp32 the panel itself has one of 10^7 or so
        if method == "gram_schmidt" and condition <= 1e3:
            assert not fell_back


def dependent_panels(p, w, dtype):
    panel = gaussian(p, w, 3).to(dtype)
    zero, first, middle, last, repeated, combined = (panel.clone() for _ in range(6))
    zero.zero_()
    first[:, 0] = 0
    middle[:, w // 2] = 0
    last[:, -1] = 0
    repeated[:, -1] = repeated[:, 0]
    combined[:, -1] = combined[:, :-1].sum(1)
    rank_one = panel[:, :1].expand(p, w).clone()
    single = torch.zeros(p, w, dtype=dtype)
    single[p // 2, w // 2] = 3
    top = panel.clone()
    top[w:] = 0
    return {
        **{"zero": zero, "first": first, "middle": middle, "last": last, "repeated": repeated},
        **{"combined": combined, "rank_one": rank_one, "single": single, "top": top},
        "identity": torch.eye(p, w, dtype=dtype),
        "negative": -torch.eye(p, w, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", dependent_panels(5, 3, torch.float32))
def test_dependent_columns(device, case, method, dtype):
    """Guards against 0/0, NaN or a basis with rounding for columns, and a fallback that is kept quiet."""
    for p, w in ((30, 6), (6, 6), (6, 2), (40, 17)):
        panel = dependent_panels(p, w, dtype)[case].to(device)
        fell_back = check_panel(panel, method)
        if case not in ("top", "identity", "negative", "repeated", "combined"):
            assert fell_back == (method != "householder")
        if case in ("identity", "negative"):
            assert not fell_back
        if case in ("repeated", "combined", "rank_one"):  # to rounding, where a method may go either way
            assert fell_back or method != "cholesky_qr"
    if case == "zero":
        v, t, r = ops.panel_qr(panel, method=method)
        assert not v.any()  # no reflection at all
        assert not t.any()
        assert not r.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_graded_columns(device, method, dtype):
    """Guards against small columns drowned by large ones: scaling a column is no ill-conditioning."""
    for decades in (6, 12, 30):
        scale = torch.logspace(0, -decades, 9, dtype=torch.float64)
        for factors in (scale, scale.flip(0)):
            panel = (gaussian(50, 9, 5) * factors).to(device, dtype)
            assert not check_panel(panel, method)
            r = ops.orthonormal_panel(panel, method=method)[1].cpu()
            expected = torch.linalg.qr(panel.cpu().double() / factors)[1].diagonal().abs() * factors
            torch.testing.assert_close(r.double().diagonal().abs(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.float32, e) for e in (-145, -140, -126, -100, -72, -68, -60, 60, 100, 122)]
    + [(torch.float64, e) for e in (-1070, -1040, -1000, -520, -300, 300, 520, 1000, 1018)],
)
@pytest.mark.parametrize("method", METHODS)
def test_extreme_scales(device, method, dtype, exponent):
    """Guards against overflow and underflow of squares: of Gram matrices, norms and quotients."""
    for p, w in ((24, 5), (6, 6), (3, 8)):
        check_panel(scaled(gaussian(p, w, 7), exponent).to(device, dtype), method)
    mixed = gaussian(24, 5, 8)
    mixed[:, 2] = scaled(mixed[:, 2], exponent)
    check_panel(mixed.to(device, dtype), method)


@pytest.mark.parametrize("strides", ["transposed", "strided"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("method", METHODS)
def test_strides_and_batches(device, method, batch, strides):
    """Guards against a batch that mixes its matrices, strides read wrongly, and a flag for the whole batch."""
    panels = torch.randn(*batch, 20, 5, dtype=torch.float64, generator=generator(2)).to(device)
    if batch:
        panels.view(-1, 20, 5)[1, :, 2] = 0
    view = layout(panels, strides)
    for op in (ops.panel_qr, ops.orthonormal_panel):
        found = op(view, method=method)
        for x in found[:2]:
            assert x.shape[: len(batch)] == batch
        flat = [x.reshape(-1, *x.shape[len(batch) :]) for x in found]
        for i, panel in enumerate(panels.view(-1, 20, 5)):
            for x, y in zip(flat, op(panel, method=method), strict=True):
                torch.testing.assert_close(x[i], y, rtol=0, atol=1e-13)
    if batch:
        fell_back = ops.orthonormal_panel(view, method=method)[2].flatten()
        assert fell_back.tolist() == [i == 1 and method != "householder" for i in range(len(fell_back))]
        assert ops.orthonormal_panel(panels[:0], method=method)[0].shape == (0, *batch[1:], 20, 5)
        assert ops.panel_qr(panels[:0], method=method)[1].shape == (0, *batch[1:], 5, 5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_nonfinite_panel(device, method, dtype, value):
    """Guards against a crash, a loop that never ends, or a NaN taken for an orthonormal column."""
    for place in ((0, 0), (7, 3), (3, 2)):
        panel = gaussian(8, 4).to(device, dtype)
        panel[place] = value
        if value == 1e30:
            check_panel(panel, method)
            continue
        found = ops.orthonormal_panel(panel, method=method)
        assert bool(found[2]) == (method != "householder")
        found = (*found[:2], *ops.panel_qr(panel, method=method))
        assert not all(x.isfinite().all() for x in found)


# --- Householder reconstruction -----------------------------------------------------------------------


def signed_permutation(p, w):
    q = torch.zeros(p, w, dtype=torch.float64)
    for j in range(w):
        q[(3 * j + 1) % p, j] = (-1.0) ** j
    return q


ORTHONORMAL = {
    "random": lambda p, w: torch.linalg.qr(gaussian(p, w))[0],
    "identity": lambda p, w: torch.eye(p, w, dtype=torch.float64),
    "negative": lambda p, w: -torch.eye(p, w, dtype=torch.float64),
    "permutation": signed_permutation,
    "bottom": lambda p, w: torch.eye(p, w, dtype=torch.float64).roll(p - w, 0),
    "near_identity": lambda p, w: torch.linalg.qr(
        torch.eye(p, w, dtype=torch.float64) + 1e-9 * gaussian(p, w)
    )[0],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(40, 7), (7, 7), (7, 1), (1, 1), (200, 64), (301, 150), (130, 130), (25, 8)]
)
@pytest.mark.parametrize("case", ORTHONORMAL)
def test_reconstruction(device, case, shape, dtype):
    """Guards against cancellation where a column is close to that of the identity: the signs prevent it."""
    u = UNIT_ROUNDOFF[dtype]
    q = ORTHONORMAL[case](*shape).to(device, dtype)
    v, t, signs = (x.cpu() for x in ops.householder_reconstruction(q))
    assert (signs.abs() == 1).all()
    assert_trapezoidal(v, t)
    assert (v.diagonal() == 1).all()
    assert float(v.abs().max()) <= 1 + 30 * shape[0] * u  # pivots of at least 1
    h = reflector_matrix(v, t)
    assert_orthonormal(h, u)
    assert one_norm(h[:, : shape[1]] - q.cpu().double() * signs) <= 30 * shape[0] * u
    if case in ("identity", "negative"):
        assert (signs == (-1 if case == "identity" else 1)).all()


@pytest.mark.parametrize("shape", [(40, 7), (9, 8), (30, 1)])
def test_reconstruction_is_lapacks(device, shape):
    """Guards against another V than that of the Householder QR factorisation, which Ballard et al. rebuild."""
    q = torch.linalg.qr(gaussian(*shape))[0]
    found = ops.householder_reconstruction(q.to(device))
    for x, y in zip(found, reference.householder_reconstruction(q), strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=0, atol=1e-11)


def test_reconstruction_of_batches(device):
    """Guards against signs or factors of another matrix of the batch, and strides."""
    q = torch.linalg.qr(torch.randn(2, 3, 20, 5, generator=generator(4)))[0]
    q[0, 1] = torch.eye(20, 5)
    view = layout(q, "strided").to(device)
    found = ops.householder_reconstruction(view)
    for i in range(6):
        for x, y in zip(found, ops.householder_reconstruction(view[i // 3, i % 3]), strict=True):
            torch.testing.assert_close(x[i // 3, i % 3], y, rtol=0, atol=1e-6)
    assert [x.shape for x in ops.householder_reconstruction(q[:0])] == [
        (0, 3, 20, 5),
        (0, 3, 5, 5),
        (0, 3, 5),
    ]


# --- Block reflectors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("shape", [(40, 7, 11), (6, 6, 1), (5, 1, 30), (1, 1, 1), (90, 33, 0)])
def test_apply_and_explicit_basis(device, shape, batch, strides, dtype):
    """Guards against T for T^T, batches or strides mixed up, and an argument that is written to."""
    p, w, n = shape
    u = UNIT_ROUNDOFF[dtype]
    panels = torch.randn(*batch, p, w, dtype=torch.float64, generator=generator(5)).to(device, dtype)
    v, t, _ = (layout(x, strides) for x in ops.panel_qr(panels))
    a = layout(torch.randn(*batch, p, n, dtype=dtype, generator=generator(6)).to(device), strides)
    before = [x.clone() for x in (v, t, a)]
    x, y, z = v.double(), t.double(), a.double()
    for transpose, factor in ((False, y), (True, y.mT)):
        got = ops.apply_block_reflector(v, t, a, transpose=transpose)
        assert got.dtype == dtype
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), z - x @ factor @ (x.mT @ z), rtol=0, atol=100 * p * u)
        back = ops.apply_block_reflector(v, t, got, transpose=not transpose)
        torch.testing.assert_close(back, a, rtol=0, atol=100 * p * u)
    q = ops.explicit_basis(v, t)
    identity = torch.eye(p, w, dtype=dtype, device=device).expand(v.shape)
    torch.testing.assert_close(q, ops.apply_block_reflector(v, t, identity), rtol=0, atol=100 * p * u)
    assert_orthonormal(q, u)
    for now, then in zip((v, t, a), before, strict=True):
        assert torch.equal(now, then)


def test_no_columns(device):
    """Guards against an error of an inner step where a range finder found rank 0."""
    for batch in ((), (2,), (0,)):
        v, t = torch.zeros(*batch, 5, 0, device=device), torch.zeros(*batch, 0, 0, device=device)
        a = torch.randn(*batch, 5, 3, device=device)
        assert torch.equal(ops.apply_block_reflector(v, t, a), a)
        assert ops.explicit_basis(v, t).shape == (*batch, 5, 0)
        u, s, w = ops.svd_of_product(v, torch.zeros(*batch, 0, 4, device=device))
        assert (u.shape, s.shape, w.shape) == ((*batch, 5, 0), (*batch, 0), (*batch, 4, 0))


# --- The SVD of Q B -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("shape", [(30, 6, 40), (12, 12, 12), (9, 1, 7), (5, 3, 3), (1, 1, 1)])
@pytest.mark.parametrize("condition", [1.0, 1e5, 1e12])
def test_svd_of_product(device, condition, shape, batch, dtype):
    """Guards against singular values out of order or wrong, and vectors that are not orthonormal."""
    m, r, n = shape
    u = UNIT_ROUNDOFF[dtype]
    q = torch.linalg.qr(torch.randn(*batch, m, r, dtype=torch.float64, generator=generator(7)))[0]
    values = torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)
    b = with_spectrum(r, n, values, seed=1).expand(*batch, r, n)
    q, b = q.to(device, dtype), b.to(device, dtype)
    x, s, y = (z.cpu() for z in ops.svd_of_product(q, b))
    assert (x.shape, s.shape, y.shape) == ((*batch, m, r), (*batch, r), (*batch, n, r))
    assert (s[..., :-1] >= s[..., 1:]).all()
    assert_orthonormal(x, u)
    assert_orthonormal(y, u)
    product = (x.double() * s.double()[..., None, :]) @ y.double().mT
    torch.testing.assert_close(product, (q.double() @ b.double()).cpu(), rtol=0, atol=64 * u)
    expected = torch.linalg.svdvals(b.double()).cpu()
    torch.testing.assert_close(s.double(), expected, rtol=0, atol=64 * u)


@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_of_deficient_product(device, dtype):
    """Guards against vectors of a singular value 0 that are zero, NaN or not orthogonal to the others."""
    u = UNIT_ROUNDOFF[dtype]
    q = torch.linalg.qr(gaussian(20, 6))[0].to(device, dtype)
    for b in (
        torch.zeros(6, 9),
        torch.ones(6, 9),
        torch.eye(6, 9).roll(3, 1) * (torch.arange(6) < 2)[:, None],
    ):
        x, s, y = ops.svd_of_product(q, b.to(device, dtype))
        assert_orthonormal(x, u)
        assert_orthonormal(y, u)
        torch.testing.assert_close((x * s) @ y.mT, q @ b.to(device, dtype), rtol=0, atol=64 * u)


# --- Arguments ----------------------------------------------------------------------------------------


V, T, _ = reference.panel_qr(gaussian(5, 3).float())
Q = torch.linalg.qr(gaussian(5, 3).float())[0]
BAD = {
    **{
        f"{op.__name__}_{name}": (op, (panel,), error, message)
        for op in (ops.panel_qr, ops.orthonormal_panel, ops.householder_reconstruction)
        for name, panel, error, message in (
            ("vector", torch.ones(3), ValueError, "expects a matrix"),
            ("no_rows", torch.ones(0, 3), ValueError, "at least one row"),
            ("no_columns", torch.ones(3, 0), ValueError, "at least one row and one column"),
            ("int", torch.ones(3, 2).int(), TypeError, "floating-point.*Int"),
            ("complex", torch.ones(3, 2).cfloat(), TypeError, "floating-point.*Complex"),
        )
    },
    "wide_q": (ops.householder_reconstruction, (torch.eye(2, 3),), ValueError, "as many rows as columns"),
    "wide_v": (ops.explicit_basis, (V.mT, T), ValueError, "as many rows as columns"),
    "t_rows": (ops.explicit_basis, (V, T[:2]), ValueError, "Invalid t.*2, 3.*3, 3"),
    "t_batch": (ops.explicit_basis, (V, T[None]), ValueError, "Invalid t"),
    "t_dtype": (ops.explicit_basis, (V, T.double()), TypeError, "v and t"),
    "half": (ops.explicit_basis, (V.half(), T.half()), TypeError, "v and t"),
    "int_v": (ops.explicit_basis, (V.int(), T.int()), TypeError, "floating-point"),
    "complex_v": (ops.explicit_basis, (V.cfloat(), T.cfloat()), TypeError, "floating-point"),
    "apply_t": (ops.apply_block_reflector, (V, T[:, :2], V), ValueError, "Invalid t"),
    "apply_rows": (ops.apply_block_reflector, (V, T, torch.ones(4, 2)), ValueError, "Invalid a.*4, 2"),
    "apply_vector": (ops.apply_block_reflector, (V, T, torch.ones(5)), ValueError, "Invalid a"),
    "apply_dtype": (ops.apply_block_reflector, (V, T, V.double()), ValueError, "Invalid a.*Double"),
    "apply_batch": (ops.apply_block_reflector, (V, T, V[None]), ValueError, "Invalid a"),
    "svd_rows": (ops.svd_of_product, (Q, torch.ones(2, 4)), ValueError, "Invalid coefficients: .2, 4"),
    "svd_narrow": (ops.svd_of_product, (Q, torch.ones(3, 2)), ValueError, "Invalid coefficients"),
    "svd_dtype": (ops.svd_of_product, (Q, torch.ones(3, 4).double()), ValueError, "coefficients.*Double"),
    "svd_half": (ops.svd_of_product, (Q.half(), torch.ones(3, 4).half()), ValueError, "float32 or float64"),
    "svd_batch": (ops.svd_of_product, (Q, torch.ones(1, 3, 4)), ValueError, "Invalid coefficients"),
    "svd_wide": (ops.svd_of_product, (Q.mT, torch.ones(5, 9)), ValueError, "as many rows as columns"),
    "svd_int": (ops.svd_of_product, (Q.int(), torch.ones(3, 4)), TypeError, "floating-point"),
}


@pytest.mark.parametrize(("op", "arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(device, op, arguments, error, message):
    """Guards against bad arguments that crash, read past an end, or pass."""
    with pytest.raises(error, match=message):
        op(*(x.to(device) for x in arguments))


@pytest.mark.parametrize("op", [ops.panel_qr, ops.orthonormal_panel])
def test_unknown_method(device, op):
    """Guards against an error that names another argument, here the panel itself."""
    with pytest.raises(ValueError, match=r"Invalid method: 'qr'.*householder.*cholesky_qr.*gram_schmidt"):
        op(torch.ones(3, 2, device=device), method="qr")


def test_nonfinite_coefficients_are_refused(device):
    """Guards against singular values made from NaN."""
    with pytest.raises(RuntimeError, match="non-finite"):
        ops.svd_of_product(Q.to(device), torch.full((3, 4), math.nan, device=device))


CALLS = {
    **{f"panel_qr_{m}": (torch.ops.galore_rrf.panel_qr.default, 1, {"method": m}) for m in METHODS},
    **{
        f"orthonormal_{m}": (torch.ops.galore_rrf.orthonormal_panel.default, 1, {"method": m})
        for m in METHODS
    },
    "reconstruction": (torch.ops.galore_rrf.householder_reconstruction.default, "q", {}),
    "apply": (torch.ops.galore_rrf.apply_block_reflector.default, "vta", {}),
    "apply_transposed": (torch.ops.galore_rrf.apply_block_reflector.default, "vta", {"transpose": True}),
    "explicit_basis": (torch.ops.galore_rrf.explicit_basis.default, "vt", {}),
    "svd_of_product": (torch.ops.galore_rrf.svd_of_product.default, "qb", {}),
}


def inputs(kind, shape, dtype, device):
    panel = torch.randn(shape, dtype=torch.float64, generator=generator(8)).to(device, dtype)
    if kind == 1:
        return (panel,)
    panel = panel if shape[-2] >= shape[-1] else panel.mT
    q = torch.linalg.qr(panel)[0]
    v, t, _ = ops.panel_qr(panel)
    named = {"q": q, "v": v, "t": t, "a": panel, "b": panel.mT}
    return tuple(named[name] for name in kind)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (2, 9, 4), (2, 3, 6, 6)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "kind", "options"), CALLS.values(), ids=CALLS)
def test_opcheck(device, op, kind, options, dtype, shape):
    """Guards against a fake implementation, schema or strides at odds with the operator."""
    torch.library.opcheck(op, inputs(kind, shape, dtype, device), options)


@pytest.mark.parametrize(("op", "kind", "options"), CALLS.values(), ids=CALLS)
def test_autograd(device, op, kind, options):
    """Guards against a gradient that is silently zero."""
    arguments = inputs(kind, (9, 4), torch.float32, device)
    arguments[-1].requires_grad_()
    found = op(*arguments, **options)
    first = found if isinstance(found, torch.Tensor) else found[0]
    with pytest.raises(RuntimeError, match=f"{op.name().split('::')[1].split('.')[0]} is not implemented"):
        first.sum().backward()
    with torch.no_grad():
        op(*arguments, **options)


def test_compile(device):
    """Guards against a graph break in any of the building blocks."""

    def blocks(panel, a):
        v, t, r = ops.panel_qr(panel, method="cholesky_qr")
        q, _, _ = ops.orthonormal_panel(panel)
        w, s, _ = ops.householder_reconstruction(q)
        u, sigma, y = ops.svd_of_product(ops.explicit_basis(v, t), r.mT @ r @ panel.mT)
        return ops.apply_block_reflector(v, t, a, transpose=True), w @ s, (u * sigma) @ y.mT

    panel, a = gaussian(12, 4).to(device), gaussian(12, 7, 1).to(device)
    expected = blocks(panel, a)
    torch._dynamo.reset()
    for x, y in zip(
        torch.compile(blocks, fullgraph=True, backend="aot_eager")(panel, a), expected, strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("op", "kind", "options"), CALLS.values(), ids=CALLS)
def test_autocast_does_not_reach_inside(device, op, kind, options):
    """Guards against products in half precision inside an orthogonalisation."""
    arguments = inputs(kind, (9, 4), torch.float32, device)
    expected = op(*arguments, **options)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = op(*arguments, **options)
    for x, y in zip(*((z,) if isinstance(z, torch.Tensor) else z for z in (found, expected)), strict=True):
        assert torch.equal(x, y)
