"""The end of a run: summary.json, pictures, and a table for people."""

from __future__ import annotations

import json
import resource
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from galore_rrf.memory import estimate
from pretrain.data.corpus import Corpus
from pretrain.files import write_atomically
from pretrain.optimizers import STATE_DTYPES
from pretrain.results.plots import plot_curves, plot_diagnostics, plot_ranks, plot_spectra
from pretrain.results.read import Run, markdown, megabytes, runs_table
from pretrain.trainer import Trainer

# Names for people, keys of the optimizer's state, and fields of galore_rrf.memory.MemoryEstimate.
_STATE = (
    ("momentum", ("exp_avg", "exp_avg_scale"), "momentum"),
    ("variance", ("exp_avg_sq", "exp_avg_sq_scale"), "variance"),
    ("bases", ("basis",), "bases"),
    ("step counts", ("step",), "steps"),
)


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
    together = {column: sum(row[column] for row in state) for column in ("measured", "formula")}
    rows = [
        (row["what"], megabytes(row["measured"]), megabytes(row["formula"]))
        for row in [*state, {"what": "together", **together}]
    ]
    print(
        f"\nOptimizer state\n\n{markdown(('', 'measured', 'by the formula'), rows)}\n\n{runs_table([run])}\n"
    )
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
        "held_out_loss": float(run.held_out_loss[-1]),
        "perplexity": float(run.perplexity[-1]),
        "text": {key: corpus.description[key] for key in ("source", "sha256")},
        "torch": torch.__version__,
    }


def state_table(trainer: Trainer) -> list[dict[str, Any]]:
    """Bytes of the optimizer's state, measured and by the formula (of the rank cap, where a tolerance is set)."""
    o = trainer.config.optimizer
    if o.name.startswith("galore"):
        formula = estimate(
            trainer.model,
            "galore",
            rank=o.rank,
            proj_type=o.proj_type or "std",
            state_dtype=STATE_DTYPES[o.state_dtype],
        )
    else:
        formula = estimate(trainer.model)  # adapters are parameters of the model
    rows = []
    for what, keys, field in _STATE:
        states = trainer.optimizer.state.values()
        tensors = (state[key] for state in states for key in keys if key in state)
        rows.append(
            {"what": what, "measured": sum(t.nbytes for t in tensors), "formula": getattr(formula, field)}
        )
    return rows


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
