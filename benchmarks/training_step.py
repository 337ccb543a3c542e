"""A training step of the 60M Llama under each preset, against AdamW: ``python -m benchmarks.training_step``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.llama_60m import HIDDEN, INTERMEDIATE, LAYERS
from benchmarks.timing import interleaved, table
from galore_rrf import GaLoreAdamW, param_groups, state_bytes

BATCH, LENGTH, VOCABULARY = 4, 256, 32_000
CYCLE = 10  # steps, of which one refreshes all subspaces
RULES: dict[str, dict[str, Any]] = {
    f"{name}, rank {rank}": {"rank": rank, **keys}
    for rank in (HIDDEN // 4, HIDDEN // 2)
    for name, keys in {
        "default": {"preset": "default"},
        "best": {"preset": "best"},
        "best, normalized": {"preset": "best", "residual": "normalized", "residual_scale": 1.2},
    }.items()
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    model = llama()
    windows = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))

    def forward_and_backward() -> None:
        model.zero_grad(set_to_none=False)
        logits: Tensor = model(input_ids=windows[:, :-1]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()

    # Rates at which weights stay as they are, near enough: all of them step the one model.
    matrices, others = (group["params"] for group in param_groups(model, rank=1, lr=1e-9))
    optimizers: dict[str, list[torch.optim.Optimizer]] = {
        "AdamW, fused": [torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)],
        "Muon": [torch.optim.Muon(matrices, lr=1e-9), torch.optim.AdamW(others, lr=1e-9, fused=True)],
        **{
            name: [GaLoreAdamW(param_groups(model, lr=1e-9, plain_lr=1e-9, **keys), fused=True)]
            for name, keys in RULES.items()
        },
    }

    def cycle(parts: list[torch.optim.Optimizer]) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(CYCLE):
                for part in parts:
                    part.step()

        return steps

    forward_and_backward()
    work = {"forward and backward": forward_and_backward}
    ms = interleaved(work | {name: cycle(parts) for name, parts in optimizers.items()}, rounds=5)
    passes = ms.pop("forward and backward")
    per_step = {name: time / CYCLE for name, time in ms.items()}
    first = next(iter(per_step.values()))
    rows = [
        (
            name,
            f"{step:.0f}",
            f"{(passes + step) / (passes + first):.2f}",
            f"{sum(map(state_bytes, parts)) / 2**20:.0f}",
        )
        for (name, step), parts in zip(per_step.items(), optimizers.values(), strict=True)
    ]
    print(f"\nThe 60M Llama, {BATCH} x {LENGTH} tokens: forward and backward take {passes:.0f} ms\n")
    print(table(("optimizer", "ms a step", "training step over AdamW's", "state MiB"), rows))


if __name__ == "__main__":
    main()
