"""The optimizer step over the 56 attention and MLP matrices of the 60M Llama, against galore_torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import galore_torch_adamw
from benchmarks.timing import interleaved, table
from galore_rrf import GaLoreAdamW
from galore_rrf.ops import range_finder

LAYERS, HIDDEN, INTERMEDIATE, RANK = 8, 512, 1376, 128
SHAPES = LAYERS * [*4 * [(HIDDEN, HIDDEN)], *2 * [(INTERMEDIATE, HIDDEN)], (HIDDEN, INTERMEDIATE)]
NEVER = 10**9
RESIDUALS = ("sign", "normalized", "orthogonalized", "scaled", "feedback")


def decaying_gradient(m: int, n: int) -> Tensor:
    """A matrix with singular values near 1/i, as gradients have, scaled to entries near 1e-3."""
    k = min(m, n)
    values = 1 / torch.arange(1, k + 1)
    return 1e-3 * (torch.randn(m, k) * values) @ torch.randn(k, n)


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The 56 matrices, with gradients; the same ones at every call."""
    torch.manual_seed(0)
    result = []
    for m, n in SHAPES:
        p = torch.randn(m, n).to(dtype).requires_grad_()
        p.grad = decaying_gradient(m, n).to(dtype)
        result.append(p)
    return result


def stepper(
    dtype: torch.dtype = torch.float32, cls: type[Any] = GaLoreAdamW, **keys: Any
) -> Callable[[], object]:
    """A step of a fresh optimizer, which has taken its first, so has state and a basis."""
    group = {"params": parameters(dtype), "rank": RANK, **keys}
    opt = cls([group], lr=1e-3, weight_decay=0.0)
    opt.step()
    return opt.step


def searcher(sketch: str) -> Callable[[], object]:
    """Finds the bases of all gradients, equal shapes as one batch, as a refresh with kept moments would."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for p in parameters():
        g = p.grad
        assert g is not None
        a = g.mT if g.shape[0] >= g.shape[1] else g
        by_shape.setdefault(a.shape, []).append(a)
    batches = [torch.stack(group) for group in by_shape.values()]
    return lambda: [range_finder(a, RANK, sketch=sketch, coefficients=False) for a in batches]


def main() -> None:
    published = {"scale": 0.25, "proj_type": "std"}
    galore_torch = galore_torch_adamw()
    ours = {
        "ours": stepper(update_proj_gap=NEVER),
        "ours bf16": stepper(torch.bfloat16, update_proj_gap=NEVER),
        "plain": stepper(update_proj_gap=1, sketch="plain"),
        "half power": stepper(update_proj_gap=1, sketch="half_power"),
        "warm": stepper(update_proj_gap=1, sketch="warm"),
        "warm, at the end": stepper(update_proj_gap=1, sketch="warm", refresh_at="end"),
        "tolerance": stepper(update_proj_gap=1, tolerance=0.1),
        "plain search": searcher("plain"),
        "half power search": searcher("half_power"),
        "warm bf16": stepper(torch.bfloat16, update_proj_gap=1, sketch="warm"),
        "8 bits": stepper(update_proj_gap=NEVER, state_dtype=torch.uint8),
        "warm, 8 bits": stepper(update_proj_gap=1, sketch="warm", state_dtype=torch.uint8),
        **{mode: stepper(update_proj_gap=NEVER, residual=mode) for mode in RESIDUALS},
        "sign bf16": stepper(torch.bfloat16, update_proj_gap=NEVER, residual="sign"),
    }
    ms = interleaved({"peer": stepper(cls=galore_torch, update_proj_gap=NEVER, **published), **ours}, 21)
    slow = interleaved({"peer": stepper(cls=galore_torch, update_proj_gap=1, **published)}, 3)
    ms["peer refresh"] = slow["peer"] - ms["peer"]

    def row(what: str, ours_ms: float, other: str, other_ms: float, reach: str) -> tuple[str, ...]:
        ratio = ours_ms / other_ms
        shown = f"1/{1 / ratio:.0f}" if ratio < 0.1 else f"{ratio:.2f}"
        return what, f"{ours_ms:.0f}", other, f"{other_ms:.0f}", shown, reach

    step, refresh = "galore_torch step", "galore_torch refresh"
    print(f"\nThe {len(SHAPES)} attention and MLP matrices of the 60M Llama, rank {RANK}; moments rotated\n")
    print(
        table(
            ("work", "ms", "against", "ms", "ratio", "reach"),
            [
                row("step without refresh", ms["ours"], step, ms["peer"], "<= .75"),
                row("bases alone, plain", ms["plain search"], refresh, ms["peer refresh"], "<= 1/40"),
                row(
                    "bases alone, half power", ms["half power search"], refresh, ms["peer refresh"], "<= 1/25"
                ),
                row("refresh and rotation, plain", ms["plain"] - ms["ours"], refresh, ms["peer refresh"], ""),
                row(
                    "refresh and rotation, half power",
                    ms["half power"] - ms["ours"],
                    refresh,
                    ms["peer refresh"],
                    "",
                ),
                row("refresh and rotation, warm", ms["warm"] - ms["ours"], refresh, ms["peer refresh"], ""),
                row("step with refresh, plain", ms["plain"], "without", ms["ours"], "<= 2.2"),
                row("step with refresh, half power", ms["half power"], "without", ms["ours"], "<= 2.8"),
                row("step with refresh, warm", ms["warm"], "without", ms["ours"], "<= 2.8"),
                row(
                    "step with refresh, warm, at the end", ms["warm, at the end"], "start", ms["warm"], "< 1"
                ),
                row("step with refresh, tolerance .1", ms["tolerance"], "warm", ms["warm"], ""),
                row("bf16 weights, step without refresh", ms["ours bf16"], "fp32", ms["ours"], "<= 1.3"),
                row("bf16 weights, step with refresh, warm", ms["warm bf16"], "fp32", ms["warm"], "<= 1.3"),
                row("8-bit moments, step without refresh", ms["8 bits"], "fp32", ms["ours"], ""),
                row("8-bit moments, step with refresh, warm", ms["warm, 8 bits"], "fp32", ms["warm"], ""),
                *(row(f"residual: {mode}", ms[mode], "dropped", ms["ours"], "") for mode in RESIDUALS),
                row("bf16 weights, residual: sign", ms["sign bf16"], "dropped", ms["ours bf16"], ""),
            ],
        )
    )


if __name__ == "__main__":
    main()
