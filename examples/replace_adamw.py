"""Trains a small byte-level Transformer twice; the one line that differs is marked."""

import argparse
import inspect

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import galore_rrf


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y = self.norm1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def train(name: str, steps: int = 100, width: int = 128) -> None:
    torch.manual_seed(0)
    text = torch.tensor(list(inspect.getsource(argparse).encode()))
    model = nn.Sequential(nn.Embedding(256, width), Block(width), Block(width), nn.Linear(width, 256))
    if name == "AdamW":
        opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    else:
        opt = galore_rrf.GaLoreAdamW(galore_rrf.param_groups(model, rank=16), lr=4e-3)  # the one line
    for _ in range(steps):
        start = torch.randint(len(text) - 65, (16, 1))
        batch = text[start + torch.arange(65)]
        loss = cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f"{name:12} loss {loss.item():.3f}, optimizer state {galore_rrf.state_bytes(opt):,} bytes")


if __name__ == "__main__":
    train("AdamW")
    train("GaLoreAdamW")
