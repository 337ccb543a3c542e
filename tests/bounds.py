"""Section 3 of the specification as one check of what adaptive_range_finder found, evaluated in fp64."""

from matrices import UNIT_ROUNDOFF, assert_orthonormal, norm, tails

CONVERGED, RANK_CAP, FLOOR, ZERO, NONFINITE = range(5)


def looks_left(dtype, tolerance, method):
    """Whether the residual is a difference of squared norms, right to 16 u ||A||^2."""
    return method == "left_looking" or (method == "auto" and tolerance >= 8 * UNIT_ROUNDOFF[dtype] ** 0.5)


def floor(dtype, method):
    """The smallest relative tolerance that can be told from rounding, of a difference of squares or not."""
    u = UNIT_ROUNDOFF[dtype]
    return 8 * u**0.5 if method == "left_looking" else 200 * u


def pythagoras(x):
    """How many u of ||A||^2 may be missing from ||B||^2 + ||A - Q B||^2 (docs/numerics.md): 32, or where columns
    repeat what reflectors do to the length of a single one, since equal columns are rounded equally."""
    rows, columns = x.shape
    return 32 if x.unique(dim=1).shape[1] == columns else max(32, 4 * rows**0.5)


def check(a, found, tolerance, *, block, max_rank=None, trim=True, method="auto", extra_blocks=1):
    """Assertions 1, 3, 4, 5, 6, 8 of section 3 for one matrix; `tolerance` is relative."""
    a = a.cpu()
    u = UNIT_ROUNDOFF[a.dtype]
    left = looks_left(a.dtype, tolerance, method)
    lost = 16 * u if left else 0.0  # of a squared residual that is a difference
    basis, coefficients, rank, residual, residuals, status = (t.cpu() for t in found[:6])
    residual, status, r = float(residual), int(status), int(rank)
    m, n = a.shape
    cap = min(m, n, max_rank or n)
    assert basis.shape == (m, cap)
    assert coefficients.shape == (cap, n)
    assert r <= cap
    assert not basis[:, r:].any()
    assert not coefficients[r:].any()
    q, b, x = basis[:, :r].double(), coefficients[:r].double(), a.double()
    size = norm(x)
    x, b = x / size, b / size
    assert_orthonormal(q, u)
    assert norm(b - q.mT @ x) <= 64 * u
    rest = norm(x - q @ b)
    if left:
        assert abs(rest**2 - residual**2) <= lost
        if residual < 0.01:  # then it is measured
            assert abs(rest - residual) <= 64 * u
    else:
        assert abs(rest - residual) <= 64 * u
    assert abs(1 - norm(b) ** 2 - rest**2) <= pythagoras(x) * u
    error = norm(x - q @ (q.mT @ x))
    best = tails(x)
    assert error >= float(best[r]) * (1 - 1e-6) - 64 * u  # Eckart and Young

    within, surely = residual <= tolerance, residual**2 + lost <= tolerance**2
    if tolerance >= floor(a.dtype, method):
        assert surely or not within or left
        if surely or not within:
            assert status == (CONVERGED if within else RANK_CAP)
        assert status in (CONVERGED, RANK_CAP)
    elif tolerance >= floor(a.dtype, "auto"):  # left-looking all the same: right where it is measured
        assert status == (CONVERGED if within and residual < 0.01 else FLOOR)
    else:
        assert status == FLOOR
    assert status == CONVERGED or r == cap or within
    if status == CONVERGED:
        assert within
        assert error <= tolerance + 64 * u

    history = residuals[~residuals.isnan()]
    assert not residuals[: len(history)].isnan().any()  # NaN only where no block ran
    assert (history[1:].square() <= history[:-1].square() + lost + 64 * u * history[:-1]).all()
    assert r <= len(history) * block
    if status == CONVERGED and tolerance >= floor(a.dtype, method):
        # Stopped at the first block that is surely within, or that many later that trimming asks for.
        passed = (history.square() + lost <= tolerance**2).nonzero()
        if len(passed):
            assert len(history) - 1 - int(passed[0]) <= (extra_blocks if trim else 0)
    if status == CONVERGED and not trim and r < cap:
        assert residual == float(history[-1])
