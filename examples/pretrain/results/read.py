"""Reading what a run wrote into its folder, and tables of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.command_line import read_yaml
from pretrain.config import OptimizerConfig
from pretrain.errors import UserError

Array = NDArray[np.float64]
Lines = dict[int, dict[str, Any]]

# Numbers in metrics.jsonl
TRAINING = (
    "loss",
    "lr",
    "plain_lr",
    "grad_norm",
    "tokens",
    "seconds",
    "optimizer_seconds",
    "refresh_seconds",
)
VALIDATION = ("held_out_loss", "perplexity")


@dataclass(frozen=True)
class Run:
    """What a run has written so far.

    Attributes:
        label: what it is called in figures and tables.
        config: config.yaml as it is.
        steps: the step of each training line, from 1; the arrays up to `refresh_seconds` are as long, NaN
            where a line lacks the value.  Times in seconds, those of the optimizer part of those of the
            step, those of refreshes part of those of the optimizer.
        held_out_steps: the step of each validation; `held_out_loss` and `perplexity` are as long.
        ranks: by parameter, steps and the rank from each on.
        state_bytes: of the optimizer, where ranks make them change: steps, and the bytes from each on.
        summary: summary.json, None where the run has not ended.
    """

    label: str
    config: dict[str, Any]
    steps: NDArray[np.int64]
    loss: Array
    lr: Array
    plain_lr: Array
    grad_norm: Array
    tokens: Array
    seconds: Array
    optimizer_seconds: Array
    refresh_seconds: Array
    held_out_steps: NDArray[np.int64]
    held_out_loss: Array
    perplexity: Array
    ranks: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    state_bytes: tuple[NDArray[np.int64], Array]
    summary: dict[str, Any] | None

    @classmethod
    def read(cls, folder: Path, label: str | None = None) -> Run:
        """A run, called like its folder unless labelled.

        Raises UserError where `folder` is no run, holds no step yet, or is damaged.
        """
        folder = Path(folder)
        config = read_config(folder)
        training, held_out, ranks = _metrics(folder / "metrics.jsonl")
        return cls(
            label=folder.resolve().name if label is None else label,
            config=config,
            steps=np.array(list(training), dtype=np.int64),
            **{name: _column(training, name) for name in TRAINING},
            held_out_steps=np.array(list(held_out), dtype=np.int64),
            **{name: _column(held_out, name) for name in VALIDATION},
            ranks=_ranks(ranks),
            state_bytes=(np.array(list(ranks), dtype=np.int64), _column(ranks, "state_bytes")),
            summary=_summary(folder / "summary.json"),
        )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Several runs, each with a label of its own: the path where folders share their name."""
    runs = [Run.read(folder) for folder in folders]
    labels = [run.label for run in runs]
    shared = [labels.count(label) > 1 for label in labels]
    return [
        replace(run, label=str(folder)) if twice else run
        for run, folder, twice in zip(runs, folders, shared, strict=True)
    ]


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml; raises UserError where there is none."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run: it has no {path.name}")
    return read_yaml(path)


def _metrics(path: Path) -> tuple[Lines, Lines, Lines]:
    """Lines of training, of validation and with ranks, by step.

    Of lines for the same step the later counts: a run resumed from a checkpoint goes back to it.
    """
    training: Lines = {}
    held_out: Lines = {}
    ranks: Lines = {}
    for where, line in json_lines(path):
        step = line.get("step")
        if not isinstance(step, int):
            raise UserError(f"{where} has no step: {line}")
        for key in (*TRAINING, *VALIDATION, "state_bytes"):
            if not isinstance(line.get(key), (int, float, type(None))):
                raise UserError(f"{where}: invalid {key} {line[key]!r}")
        if "ranks" in line and not _are_ranks(line["ranks"]):
            raise UserError(f"{where}: invalid ranks {line['ranks']!r}")
        for kind, key in ((training, "loss"), (held_out, "held_out_loss"), (ranks, "ranks")):
            if key in line:
                kind[step] = line
    if not training:
        raise UserError(f"{path} holds no training step yet")
    return training, held_out, ranks


def _are_ranks(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(rank, int) for rank in value.values())


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON lines file, and where each stands."""
    try:
        lines = path.read_bytes().rstrip().split(b"\n")
    except OSError as error:
        raise UserError(f"{path.parent} is no run: cannot read {path} ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # the run was stopped, or is writing it just now
                return
            raise UserError(f"{where} is not JSON: {line.decode(errors='replace')[:80]!r}") from error
        if not isinstance(content, dict):
            raise UserError(f"{where} is no JSON object: {content!r}")
        yield where, content


def _column(lines: Lines, name: str) -> Array:
    return np.array([line.get(name) for line in lines.values()], dtype=np.float64)  # None becomes NaN


def _ranks(lines: Lines) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    points: dict[str, list[tuple[int, int]]] = {}
    for step, line in lines.items():
        for name, rank in line["ranks"].items():
            points.setdefault(name, []).append((step, rank))
    found = {}
    for name, pairs in points.items():
        steps, ranks = np.array(pairs, dtype=np.int64).T
        found[name] = (steps, ranks)
    return found


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(summary, dict):
        raise UserError(f"{path} is no JSON object: {summary!r}")
    return summary


def describe_optimizer(config: dict[str, Any]) -> str:
    """The optimizer in a few words: ``galore, rank 128``."""
    optimizer = config.get("optimizer") or {}
    name, rank, tolerance = (optimizer.get(key) for key in ("name", "rank", "tolerance"))
    if name == "galore" and tolerance is not None:
        return f"{name}, tolerance {tolerance:g}, rank up to {rank}"
    return f"{name}, rank {rank}" if rank is not None and OptimizerConfig.has_rank(name) else f"{name}"


def describe_model(config: dict[str, Any]) -> str:
    """The model in a few words: ``Llama, 8 layers of width 512``."""
    model = config.get("model") or {}
    return f"Llama, {model.get('num_hidden_layers', '?')} layers of width {model.get('hidden_size', '?')}"


def describe_lr(config: dict[str, Any]) -> str:
    """Learning rates of the matrices and of all else: ``0.01 / 0.001``."""
    optimizer = config.get("optimizer") or {}
    lr, plain_lr = optimizer.get("lr"), optimizer.get("plain_lr")
    if lr is None:
        return "-"
    return f"{lr:g} / {lr if plain_lr is None else plain_lr:g}"


def megabytes(count: float | None) -> str:
    """Bytes for people; "-" where unknown."""
    return "-" if count is None else f"{count / 2**20:,.1f} MiB"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, aligned: the first `left` columns to the left, numbers to the right."""
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]  # "-:" at the least
    cells.insert(1, ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    aligned = [
        [
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in aligned)


def runs_table(runs: Sequence[Run]) -> str:
    """A Markdown table of runs, of a single one turned so that it fits a terminal.

    Runs that have not ended by what they have written so far.
    """
    header = (
        "run",
        "optimizer",
        "lr / plain_lr",
        "steps",
        "tokens",
        "held-out loss",
        "perplexity",
        "seconds",
    )
    header += ("in the optimizer", "of the steps", "in refreshes", "optimizer state", "peak memory")
    rows = [_row(run) for run in runs]
    if len(rows) == 1:
        return markdown((header[0], rows[0][0]), list(zip(header[1:], rows[0][1:], strict=True)))
    return markdown(header, rows, left=2)


def _range(run: Run) -> str:
    """From the fewest to the most bytes of state, where they changed."""
    counts = run.state_bytes[1]
    if not len(counts) or not counts.min() < counts.max():  # NaN where a run did not log them
        return ""
    return f" ({megabytes(counts.min())} to {megabytes(counts.max())})"


def _row(run: Run) -> list[str]:
    summary = run.summary or {}
    state = {part["what"]: part["measured"] for part in summary.get("state", [])}
    seconds, optimizer, refresh = (
        float(np.nansum(a)) for a in (run.seconds, run.optimizer_seconds, run.refresh_seconds)
    )
    held_out = (run.held_out_loss[-1], run.perplexity[-1]) if len(run.held_out_steps) else (None, None)

    def number(key: str, otherwise: float | None, form: str) -> str:
        value = summary.get(key, otherwise)
        return "-" if value is None else format(value, form)

    return [
        run.label,
        describe_optimizer(run.config),
        describe_lr(run.config),
        f"{run.steps[-1]:,}" + ("" if run.summary else " (not ended)"),
        number("tokens", run.tokens[-1], ",.0f"),
        number("held_out_loss", held_out[0], ".4f"),
        number("perplexity", held_out[1], ",.2f"),
        number("seconds", seconds, ",.1f"),
        number("optimizer_seconds", optimizer, ",.1f"),
        f"{optimizer / seconds:.1%}" if seconds > 0 else "-",
        number("refresh_seconds", refresh, ",.1f"),
        (megabytes(sum(state.values())) if state else "-") + _range(run),
        megabytes(summary.get("peak_memory_bytes")),
    ]
