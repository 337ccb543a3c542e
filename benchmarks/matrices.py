"""Matrices that range finders are compared on: known spectra, and gradients of a small language model."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M, N = 512, 1376  # as the MLP of a 60M Llama has


def _gaussian(m: int, n: int, seed: int) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _with_spectrum(values: Tensor) -> Tensor:
    """M x N, in fp32, with these singular values and random singular vectors."""
    u = torch.linalg.qr(_gaussian(M, M, 0))[0]
    v = torch.linalg.qr(_gaussian(N, M, 1))[0]
    return ((u * values) @ v.mT).float()


def _kahan(m: int, n: int) -> Tensor:
    """Kahan's matrix: triangular, its rows shrinking, its spectrum led by one large value."""
    c, s = math.cos(1.2), math.sin(1.2)
    upper = torch.ones(m, n, dtype=torch.float64).triu(1).mul(-c)
    upper.diagonal().fill_(1)
    return (s ** torch.arange(m, dtype=torch.float64)[:, None] * upper).float()


def decaying() -> dict[str, Tensor]:
    """What errors and ranks are compared on, 512 x 1376 each."""
    i = torch.arange(M, dtype=torch.float64)
    signal = _gaussian(M, 85, 2) @ _gaussian(85, N, 3)
    return {
        "1 / i": _with_spectrum(1 / (1 + i)),
        "exponential, .95^i": _with_spectrum(0.95**i),
        "stairs of 32, a fifth each": _with_spectrum(5.0 ** -(i // 32)),
        "rank 85 + 1% noise": (signal + 0.01 * signal.std() * _gaussian(M, N, 4)).float(),
        "fourteen decades": _with_spectrum(torch.logspace(0, -14, M, dtype=torch.float64)),
    }


def hard() -> dict[str, Tensor]:
    """Those where orthogonality or the tracking of the residual goes wrong first."""
    return {
        "Kahan": _kahan(M, N),
        "rank 128": (_gaussian(M, 128, 5) @ _gaussian(128, N, 6)).float(),
    }


class _Block(nn.Module):
    """Attention and MLP of a Llama, without its rotary embedding."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class _ByteModel(nn.Module):
    """The next byte, from those before it."""

    def __init__(self, length: int, width: int = M, inner: int = N, layers: int = 2, heads: int = 8) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, inner, heads) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.position.weight)))


def gradients(steps: int = 20, batch: int = 8, length: int = 256) -> dict[str, Tensor]:
    """Gradients of the second layer's matrices after some steps of AdamW.

    The text is the source of Python's standard library, so the numbers differ with its version.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    source = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _ByteModel(length)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(steps):
            start = torch.randint(len(text) - length - 1, (batch, 1))
            window = text[start + torch.arange(length + 1)].long()
            logits = model(window[:, :-1])
            opt.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
            opt.step()
    layer = model.blocks[1]
    assert isinstance(layer, _Block)
    chosen = {
        "attention query": layer.q,
        "attention output": layer.o,
        "MLP up": layer.up,
        "MLP down": layer.down,
    }
    result = {}
    for name, linear in chosen.items():
        g = linear.weight.grad
        assert g is not None
        result[f"gradient, {name}"] = g
    return result
