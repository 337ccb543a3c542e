"""rotate_moments: LDAdam's rule, written out in fp64."""

import pytest
import torch
from matrices import generator

from galore_rrf import reference
from galore_rrf.ops import rotate_moments

pytestmark = pytest.mark.core


def problem(shape, rank, new_rank, side, dtype=torch.float64, device="cpu"):
    """Moments of a gradient of this shape in one random basis, and another basis."""
    *batch, m, n = shape
    g = generator(7)
    space = n if side == 0 else m
    bases = [
        torch.linalg.qr(torch.randn(*batch, space, r, dtype=torch.float64, generator=g))[0]
        for r in (rank, new_rank)
    ]
    moments = (*batch, m, rank) if side == 0 else (*batch, rank, n)
    exp_avg = 0.1 * torch.randn(moments, dtype=torch.float64, generator=g)
    exp_avg_sq = 0.01 * torch.rand(moments, dtype=torch.float64, generator=g)
    return [t.to(device, dtype) for t in (exp_avg, exp_avg_sq, *bases)]


SHAPES = [(20, 31), (31, 20), (1, 9), (9, 1), (3, 15, 12), (2, 3, 11, 14), (10, 700), (700, 10)]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [(1, 1), (5, 5), (5, 3), (3, 7)])
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_formula(device, shape, side, ranks, dtype, accuracy):
    """Guards against a wrong side, no bias correction, S for S^2, tiles or ranks mixed up."""
    ranks = [min(r, shape[-1] if side == 0 else shape[-2]) for r in ranks]
    m, v, q, p = problem(shape, *ranks, side, dtype, device)
    inputs = [t.clone() for t in (m, v, q, p)]
    got = rotate_moments(m, v, q, p, side, 0.3, 0.02)
    assert all(torch.equal(x, y) for x, y in zip((m, v, q, p), inputs, strict=True))

    m, v, q, p = (t.double().cpu() for t in inputs)
    mean, square = m / 0.3, v / 0.02
    if side == 0:
        s = torch.einsum("...ij,...ik->...jk", q, p)
        new_mean = torch.einsum("...ij,...jk->...ik", mean, s)
        variance = torch.einsum("...ij,...jk->...ik", square - mean**2, s**2)
    else:
        s = torch.einsum("...ij,...ik->...jk", p, q)
        new_mean = torch.einsum("...ij,...jk->...ik", s, mean)
        variance = torch.einsum("...ij,...jk->...ik", s**2, square - mean**2)
    for x, y in zip(got, (0.3 * new_mean, 0.02 * (variance + new_mean**2).abs()), strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double().cpu(), y, rtol=0, atol=accuracy)

    expected = reference.rotate_moments(m, v, q, p, side, 0.3, 0.02)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double().cpu(), y, rtol=0, atol=accuracy)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("shape", [(20, 31), (3, 15, 12)])
def test_identity_keeps_moments(device, shape, side):
    """Guards against moments that change although the subspace does not."""
    m, v, q, _ = problem(shape, 4, 4, side, device=device)
    new_m, new_v = rotate_moments(m, v, q, q, side, 0.7, 0.4)
    torch.testing.assert_close(new_m, m, rtol=0, atol=1e-15)
    torch.testing.assert_close(new_v, v, rtol=0, atol=1e-15)


@pytest.mark.parametrize("side", [0, 1])
def test_permutation_and_signs(device, side):
    """Guards against a transposed S: permuted columns permute the moments, a sign flips the mean alone."""
    m, v, q, _ = problem((13, 17), 4, 4, side, device=device)
    order = torch.tensor([2, 0, 3, 1], device=device)
    signs = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64, device=device)
    new_m, new_v = rotate_moments(m, v, q, q[:, order] * signs, side, 1.0, 1.0)
    expected_m = m[:, order] * signs if side == 0 else m[order] * signs[:, None]
    torch.testing.assert_close(new_m, expected_m, rtol=0, atol=1e-15)
    torch.testing.assert_close(new_v, v[:, order] if side == 0 else v[order], rtol=0, atol=1e-15)


@pytest.mark.parametrize("side", [0, 1])
def test_half_precision_bases_and_strides(device, side):
    """Guards against bases of another dtype than the moments, and inputs that are not contiguous."""
    m, v, q, p = problem((20, 24), 5, 3, side, torch.float32, device)
    expected = rotate_moments(m, v, q.bfloat16().float(), p.bfloat16().float(), side, 0.5, 0.5)
    turned = [t.mT.contiguous().mT for t in (m, v, q.bfloat16(), p.bfloat16())]
    for x, y in zip(rotate_moments(*turned, side, 0.5, 0.5), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("side", {"side": 2}),
        ("exp_avg", {"exp_avg_sq": torch.ones(6, 2)}),
        ("basis", {"basis": torch.ones(5, 2)}),
        ("new_basis", {"new_basis": torch.ones(4, 3)}),
        ("new_basis", {"new_basis": torch.ones(1, 5, 3)}),
    ],
)
def test_bad_arguments(device, message, change):
    """Guards against shapes that do not fit but crash, or broadcast."""
    arguments = {
        "exp_avg": torch.ones(6, 3), "exp_avg_sq": torch.ones(6, 3), "basis": torch.ones(5, 3),
        "new_basis": torch.ones(5, 3), "side": 0, "bias_correction1": 1.0, "bias_correction2": 1.0,
    }  # fmt: skip
    arguments = {k: x.to(device) if torch.is_tensor(x) else x for k, x in {**arguments, **change}.items()}
    with pytest.raises(ValueError, match=message):
        rotate_moments(**arguments)


def test_batches_that_differ(device):
    """Guards against reads beyond a stack of bases shorter than that of the moments."""
    m, v, q, p = problem((3, 15, 12), 4, 4, 0, device=device)
    for bases in ((q[:2], p), (q, p[:2])):
        with pytest.raises(ValueError, match="basis"):
            rotate_moments(m, v, *bases, 0, 1.0, 1.0)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("shape", [(9, 12), (2, 9, 12)])
def test_opcheck(device, shape, side):
    """Guards against a fake implementation or schema at odds with the operator."""
    inputs = problem(shape, 3, 4, side, torch.float32, device)
    torch.library.opcheck(torch.ops.galore_rrf.rotate_moments.default, (*inputs, side, 0.5, 0.2))
