"""The end of a run: summary.json, pictures, and a table for people."""

from __future__ import annotations

import json
import resource
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from galore_rrf.memory import MemoryEstimate, estimate
from galore_rrf.options import resolve
from pretrain.config import OURS
from pretrain.data.corpus import Corpus
from pretrain.files import write_atomically
from pretrain.optimizers import STATE_DTYPES, projected, tensors
from pretrain.results.plots import plot_curves, plot_diagnostics, plot_ranks, plot_spectra
from pretrain.results.read import Run, markdown, megabytes, runs_table
from pretrain.trainer import Trainer

# Names for people, keys of the optimizers' states, and fields of galore_rrf.memory.MemoryEstimate.
_STATE = (
    ("momentum", ("exp_avg", "exp_avg_scale", "momentum_buffer"), "momentum"),
    ("variance", ("exp_avg_sq", "exp_avg_sq_scale"), "variance"),
    ("bases", ("basis", "basis_right", "projector"), "bases"),
    ("buffers", ("error", "average", "residual_norm"), "buffers"),
    ("step counts", ("step",), "steps"),
)
_OTHER = "other buffers"


def report(trainer: Trainer, corpus: Corpus) -> None:
    """Writes summary.json and the pictures into the folder of the run and prints where they are."""
    out = trainer.config.out
    assert out is not None
    run = Run.read(out)
    summary = summarise(trainer, corpus, run)
    write_atomically(
        out / "summary.json", lambda file: file.write((json.dumps(summary, indent=2) + "\n").encode())
    )
    run = replace(run, summary=summary)
    pictures = [out / "curves.png"]
    plot_curves([run], pictures[0])
    if (out / "spectra").is_dir():
        for name, kinds in (("spectra.png", ["gradient"]), ("moments.png", ["momentum", "variance"])):
            pictures.append(out / name)
            plot_spectra(out, pictures[-1], kinds)
    if run.ranks:
        pictures.append(out / "ranks.png")
        plot_ranks(run, pictures[-1])
    if (out / "diagnostics.jsonl").exists():
        pictures.append(out / "diagnostics.png")
        plot_diagnostics([out], pictures[-1])

    state = summary["state"]
    columns = ("measured", "matrices", "formula")
    together = {key: None if None in (all_ := [r[key] for r in state]) else sum(all_) for key in columns}
    rows = [
        (row["what"], *(megabytes(row[key]) for key in columns))
        for row in [*state, {"what": "together", **together}]
    ]
    header = ("", "measured", "for the matrices", "by the formula")
    print(f"\nOptimizer state\n\n{markdown(header, rows)}\n\n{runs_table([run])}\n")
    print(
        f"Results in {out}: {', '.join(p.name for p in pictures)}; numbers in metrics.jsonl and summary.json"
    )


def summarise(trainer: Trainer, corpus: Corpus, run: Run) -> dict[str, Any]:
    """What is worth keeping of a run that has ended; bytes, seconds, nats."""
    config = trainer.config
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "seconds": float(run.seconds.sum()),
        "optimizer_seconds": float(run.optimizer_seconds.sum()),
        "refresh_seconds": float(run.refresh_seconds.sum()),
        "peak_memory_bytes": _peak_memory(config.device),
        "state": state_table(trainer),
        "adamw_moments": adamw_moments(trainer.model),
        "held_out_loss": float(run.held_out_loss[-1]),
        "perplexity": float(run.perplexity[-1]),
        "text": {key: corpus.description[key] for key in ("source", "sha256")},
        "torch": torch.__version__,
    }


def state_table(trainer: Trainer) -> list[dict[str, Any]]:
    """Bytes of the optimizer's state: measured, those for the matrices, and all by the formula (of the rank cap,
    where a tolerance is set; None where there is no formula)."""
    formula = _formula(trainer)
    matrices = projected(trainer.model)
    kinds = {key: what for what, keys, _ in _STATE for key in keys}
    rows = {
        what: {"what": what, "measured": 0, "matrices": 0, "formula": getattr(formula, field, None)}
        for what, _, field in _STATE
    }
    for p, state in trainer.optimizer.state.items():
        for key, value in state.items():
            what = kinds.get(key, _OTHER)
            row = rows.setdefault(what, {"what": what, "measured": 0, "matrices": 0, "formula": None})
            size = sum(t.nbytes for t in tensors(value))
            row["measured"] += size
            row["matrices"] += size if p in matrices else 0
    return [row for row in rows.values() if row["measured"] or row["what"] != _OTHER]


def _formula(trainer: Trainer) -> MemoryEstimate | None:
    o = trainer.config.optimizer
    dtype = STATE_DTYPES[o.state_dtype]
    if o.name in ("adamw", "lora") and dtype is None:
        return estimate(trainer.model)  # adapters are parameters of the model
    if o.name not in OURS:
        return None
    keys = ("proj_type", "residual", "basis_from")
    given = {key: getattr(o, key) for key in (*keys, "preset") if getattr(o, key) is not None}
    found = resolve({"rank": o.rank, **given})
    return estimate(
        trainer.model,
        "galore",
        rank=o.rank,
        state_dtype=dtype,
        projected_state_dtype=dtype or found["state_dtype"],
        **{key: found[key] for key in keys},
    )


def adamw_moments(model: nn.Module) -> dict[str, int]:
    """Bytes of the moments that AdamW would have, were no adapters there: of the matrices, of all parameters."""
    own = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    matrices = projected(model)
    return {
        "matrices": 2 * sum(p.nbytes for p in own.values() if p in matrices),
        "all": 2 * sum(p.nbytes for p in own.values()),
    }


def reset_peak_memory(device: str) -> None:
    """What was needed before, for the text or for timing, is not counted."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # of Linux; else all of the process counts
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
