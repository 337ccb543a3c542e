"""Test matrices with known difficulties, in fp64, each a pure function of shape and seed."""

import math

import torch
from torch import Tensor

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-24,  # computed in fp32
    torch.bfloat16: 2.0**-24,
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=generator(seed))


def with_spectrum(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """Random singular vectors, given singular values."""
    k = min(m, n)
    u = torch.linalg.qr(gaussian(m, k, seed))[0]
    v = torch.linalg.qr(gaussian(n, k, seed + 1))[0]
    return (u * values[:k].double()) @ v.mT


def _index(m: int, n: int) -> Tensor:
    return torch.arange(min(m, n), dtype=torch.float64)


def polynomial(m, n, seed=0):
    return with_spectrum(m, n, 1 / (1 + _index(m, n)), seed)


def exponential(m, n, seed=0):
    return with_spectrum(m, n, 0.7 ** _index(m, n), seed)


def step(m, n, seed=0):
    i = _index(m, n)
    return with_spectrum(m, n, torch.where(i < len(i) / 3, 1.0, 1e-3), seed)


def spiked(m, n, seed=0):
    i = _index(m, n)
    return with_spectrum(m, n, torch.where(i < 3, 100.0, 1.0), seed)


def kahan(m, n, seed=0):
    """Upper trapezoidal, where column pivoting is deceived."""
    c, s = math.cos(1.2), math.sin(1.2)
    upper = torch.ones(m, n, dtype=torch.float64).triu(1).mul(-c)
    upper.diagonal().fill_(1)
    return s ** torch.arange(m, dtype=torch.float64)[:, None] * upper


def rank_deficient(m, n, seed=0):
    k = max(1, min(m, n) // 4)
    return gaussian(m, k, seed) @ gaussian(k, n, seed + 1)


def clustered(m, n, seed=0):
    return with_spectrum(m, n, 10.0 ** -(_index(m, n) // 5), seed)


def row_scaled(m, n, seed=0):
    return 10.0 ** torch.linspace(4, -4, m, dtype=torch.float64)[:, None] * gaussian(m, n, seed)


def collinear(m, n, seed=0):
    """Columns that differ by 1e-4 of their length."""
    return gaussian(m, 1, seed) + 1e-4 * gaussian(m, n, seed + 1)


def hilbert(m, n, seed=0):
    i, j = torch.arange(m, dtype=torch.float64), torch.arange(n, dtype=torch.float64)
    return 1 / (1 + i[:, None] + j)


def s_shaped(m, n, seed=0):
    i = _index(m, n)
    return with_spectrum(m, n, 1e-6 + 1 / (1 + torch.exp((i - len(i) / 2) / 2)), seed)


def stairs(m, n, seed=0):
    """Devil's stairs: plateaus of eight, each a fifth of the one before."""
    return with_spectrum(m, n, 5.0 ** -(_index(m, n) // 8), seed)


def low_rank_noise(m, n, seed=0):
    k = max(1, min(m, n) // 6)
    signal = gaussian(m, k, seed) @ gaussian(k, n, seed + 1)
    return signal + 1e-2 * gaussian(m, n, seed + 2)


def flat(m, n, seed=0):
    return with_spectrum(m, n, torch.ones(min(m, n)), seed)


def fourteen_decades(m, n, seed=0):
    return with_spectrum(m, n, torch.logspace(0, -14, min(m, n), dtype=torch.float64), seed)


MATRICES = {
    f.__name__: f
    for f in (
        polynomial, exponential, step, spiked, kahan, rank_deficient, clustered, row_scaled, collinear,
        hilbert, s_shaped, stairs, low_rank_noise, flat, fourteen_decades,
    )
}  # fmt: skip


def layout(a: Tensor, name: str) -> Tensor:
    """The same numbers at other strides: contiguous, transposed, strided (of both dimensions)."""
    if name == "contiguous":
        return a.contiguous()
    if name == "transposed":
        return a.mT.contiguous().mT
    assert name == "strided"
    wide = a.new_full((*a.shape[:-2], 2 * a.shape[-2], 3 * a.shape[-1]), math.nan)
    wide[..., ::2, ::3] = a
    return wide[..., ::2, ::3]


def norm(a: Tensor) -> float:
    """The Frobenius norm, without overflow; by torch's cascade sum, right to a few u of fp64."""
    a = a.double()
    largest = float(a.abs().max()) if a.numel() else 0.0
    return largest * math.sqrt(float((a / largest).square().sum())) if largest else 0.0


def one_norm(a: Tensor) -> float:
    return float(a.double().abs().sum(-2).max())


def tails(a: Tensor) -> Tensor:
    """Frobenius errors of the best approximations of rank 0 ... min(m, n) (Eckart and Young)."""
    squares = torch.linalg.svdvals(a.double()).square()
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]).sqrt()


def assert_orthonormal(q: Tensor, u: float) -> None:
    """Assertion 1 of the specification: ||Q^T Q - I||_1 <= 30 m u, of every matrix of a batch."""
    q = q.double()
    for x in q.reshape(-1, *q.shape[-2:]):
        departure = one_norm(x.mT @ x - torch.eye(x.shape[1], dtype=torch.float64)) if x.shape[1] else 0.0
        assert departure <= 30 * x.shape[0] * u


def projection_error(a: Tensor, q: Tensor) -> float:
    """||A - Q Q^T A||_F in fp64, as a fraction of ||A||_F."""
    a, q = a.double(), q.double()
    return norm(a - q @ (q.mT @ a)) / norm(a)
