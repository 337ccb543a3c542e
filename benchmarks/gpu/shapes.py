"""The parameters of the published Llamas, with gradients, and as much of one as fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

VOCABULARY = 32000


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    intermediate: int
    layers: int
    rank: int
    vocabulary: int = VOCABULARY

    @property
    def matrices(self) -> dict[tuple[int, int], int]:
        """Those of attention and MLP in a layer: shape and number."""
        h, i = self.hidden, self.intermediate
        return {(h, h): 4, (i, h): 2, (h, i): 1}

    @property
    def entries(self) -> int:
        """Of the projected matrices of a layer."""
        return sum(m * n * count for (m, n), count in self.matrices.items())

    @property
    def moment_entries(self) -> int:
        """Of one low-rank moment of a layer."""
        return sum(max(m, n) * self.rank * count for (m, n), count in self.matrices.items())

    @property
    def basis_entries(self) -> int:
        return sum(min(m, n) * self.rank * count for (m, n), count in self.matrices.items())

    @property
    def plain_entries(self) -> int:
        """Embedding, head and norms."""
        return 2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden


MODELS = {
    "1B": Model("1B", 2048, 5461, 24, 512),
    "60M": Model("60M", 512, 1376, 8, 128),
    "7B": Model("7B", 4096, 11008, 32, 1024),
}
TINY = Model("tiny", 48, 80, 2, 8, vocabulary=100)


def parameters(model: Model, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The bf16 weights of its layers and of all else, with gradients that resemble those of training."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).bfloat16()

    def with_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
        p = torch.nn.Parameter(weight)
        p.grad = gradient
        return p

    def decaying(m: int, n: int) -> Tensor:
        """Singular values near 1/i; rank 64 and noise, since a full factorisation would take minutes."""
        k = min(m, n, 64)
        values = 1e-3 / torch.arange(1, k + 1, device=device)
        return (random(m, k) * values).bfloat16() @ random(k, n) + 1e-5 * random(m, n)

    projected = [
        with_gradient(random(m, n), decaying(m, n))
        for _ in range(model.layers)
        for (m, n), count in model.matrices.items()
        for _ in range(count)
    ]
    h = model.hidden
    plain = [(model.vocabulary, h), (model.vocabulary, h), *[(h,)] * (2 * model.layers + 1)]
    return projected, [with_gradient(random(*shape), 1e-3 * random(*shape)) for shape in plain]


def what_fits(model: Model, states: float, device: torch.device) -> Model:
    """The model with as many layers as fit: their bf16 weights and gradients, and `states` bytes an entry.

    A sixth of what is free stays for what a step allocates.
    """
    if device.type == "cpu":
        return model
    free, _ = torch.cuda.mem_get_info(device)
    room = 5 / 6 * free - model.plain_entries * (2 + 2 + 4 * 4)
    layers = max(1, min(model.layers, int(room / (model.entries * (4 + states)))))
    return replace(model, layers=layers)
