"""Prints what training the Llama of a configuration takes under several methods, without allocating it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from galore_rrf.memory.chart import draw, unit
from galore_rrf.memory.estimate import MemoryEstimate, estimate
from galore_rrf.moments import STATE_DTYPES
from galore_rrf.options import resolve

_COLUMNS = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("master", "master_weights"),
    ("momentum", "momentum"),
    ("variance", "variance"),
    ("bases", "bases"),
    ("buffers", "buffers"),
    ("held", "held"),
    ("workspace *", "workspace"),
    ("activations *", "activations"),
    ("peak *", "total"),
)

_KEYS = ("proj_type", "residual", "basis_from")  # of GaLore, as the file or its preset has them


class _UserError(Exception):
    """What a person can mend."""


def _extra(module: str, extra: str) -> Any:
    """An optional dependency."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise _UserError(f"{package} is needed here: pip install 'galore_rrf[{extra}]'") from error


def _read(path: Path) -> dict[str, Any]:
    """The configuration, a mapping with a mapping ``model``."""
    yaml = _extra("yaml", "train")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _UserError(f"cannot read {path} ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise _UserError(f"{path} must hold a mapping with a key model, got {type(config).__name__}")
    for key in ("model", "optimizer"):
        if not isinstance(config.get(key, {}), dict):
            raise _UserError(f"{key} of {path} must be a mapping, got {config[key]!r}")
    if not config.get("model"):
        raise _UserError(f"{path} has no model (fields of transformers.LlamaConfig)")
    return config


def _llama(path: Path, model: Mapping[str, Any]) -> torch.nn.Module:
    """On the meta device."""
    transformers = _extra("transformers", "train")
    known = [f.name for f in fields(transformers.LlamaConfig)]
    for name in model:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise _UserError(
                f"Unknown field of model in {path}: {name} (LlamaConfig has none of that name{hint})"
            )
    try:
        with torch.device("meta"):
            llama: torch.nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model))
    except Exception as error:  # whatever transformers and torch make of bad values
        raise _UserError(f"Invalid model in {path}: {' '.join(str(error).split())}") from error
    return llama


def _setting(path: Path, config: Mapping[str, Any], *names: str) -> int | None:
    """The first of `names` that the configuration has, a positive integer."""
    for name in names:
        value = config.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise _UserError(f"Invalid {name} in {path}: {value!r} (must be a positive integer)")
            return value
    return None


def _estimates(path: Path, args: argparse.Namespace) -> tuple[str, dict[str, MemoryEstimate], list[str]]:
    """A title, the estimates by method, and notes."""
    config = _read(path)
    optimizer = config.get("optimizer", {})
    rank = args.rank or _setting(path, optimizer, "rank")
    if rank is None:
        raise _UserError(f"{path} has no optimizer.rank: pass --rank")
    batch = args.batch or _setting(path, config, "micro_batch", "batch")
    length = args.sequence_length or _setting(path, config, "sequence_length")
    state_dtype = optimizer.get("state_dtype")
    if state_dtype is not None and state_dtype not in list(STATE_DTYPES):
        raise _UserError(
            f"Invalid state_dtype in {path}: {state_dtype!r} (must be one of {', '.join(map(repr, STATE_DTYPES))})"
        )
    dtype = None if state_dtype is None else STATE_DTYPES[state_dtype]
    threads = args.threads or _setting(path, config, "threads") or torch.get_num_threads()
    llama = _llama(path, config["model"])
    checkpointing = bool(config.get("activation_checkpointing", False))
    common: dict[str, Any] = {
        "tokens": batch * length if batch and length else None,
        "checkpointing": checkpointing,
        "threads": threads,
    }
    bf16 = {"dtype": torch.bfloat16, **common}
    try:
        given = {key: optimizer[key] for key in (*_KEYS, "preset") if optimizer.get(key) is not None}
        if dtype is not None:  # over the preset's
            given["state_dtype"] = dtype
        keys = resolve({"rank": rank, **given})
        chosen = {key: keys[key] for key in _KEYS}
        galore = estimate(
            llama,
            "galore",
            rank=rank,
            state_dtype=dtype,
            projected_state_dtype=keys["state_dtype"],
            **chosen,
            **bf16,
        )
        methods = {
            "AdamW, mixed precision": estimate(llama, mixed_precision=True, **common),
            "AdamW, bf16": estimate(llama, **bf16),
            f"GaLore rank {rank}, bf16": galore,
            f"LoRA rank {rank}, bf16": estimate(llama, "lora", rank=rank, **bf16),
        }
    except (ValueError, TypeError) as error:
        raise _UserError(f"{path}: {error}") from error
    if galore.bases == 0:
        raise _UserError(
            f"Invalid rank for {path}: {rank} (must be less than the shorter side of a matrix inside attention or MLP)"
        )
    passed = f"of {batch} sequences of {length} tokens" + (
        ", computed again block by block" if checkpointing else ""
    )
    if not (batch and length):
        passed = "not without --batch and --sequence-length, which the file lacks"
    notes = [
        "held: from step to step, exact, also in bytes for each parameter of the model",
        f"* estimated; workspace: what a step allocates beyond that, with {threads} threads",
        f"  activations: {passed}",
        "  peak: held, and the larger of workspace and activations",
    ]
    return f"{path.name}: {galore.parameters:,} parameters", methods, notes


def _table(methods: Mapping[str, MemoryEstimate]) -> str:
    """Markdown, aligned for a terminal too."""
    one, name = unit(e.held for e in methods.values())
    rows = [[name, *(title for title, _ in _COLUMNS), "held B/parameter"]]
    for method, e in methods.items():
        sizes = (getattr(e, part) for _, part in _COLUMNS)
        cells = [f"{size / one:.3f}" if size else "-" for size in sizes]
        rows.append([method, *cells, f"{e.held / e.parameters:.2f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| "
        + " | ".join(
            c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} (must be a positive integer)")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with 2 and a sentence on stderr for what a person can mend."""
    parser = argparse.ArgumentParser("python -m galore_rrf.memory", description=__doc__)
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG.yaml", help="a table for each")
    parser.add_argument(
        "--rank", type=_positive, help="of GaLore and LoRA (default: optimizer.rank of the file)"
    )
    parser.add_argument(
        "--batch",
        type=_positive,
        help="sequences in a forward pass (default: micro_batch or batch of the file)",
    )
    parser.add_argument(
        "--sequence-length", type=_positive, help="tokens in each (default: that of the file)"
    )
    parser.add_argument(
        "--threads", type=_positive, help="each has a matrix in flight (default: the file's or torch's)"
    )
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw stacked bars too")
    args = parser.parse_args(argv)
    try:
        if args.chart is not None:
            _extra("matplotlib.figure", "plots")
        models = [_estimates(path, args) for path in args.configs]
        for title, methods, notes in models:
            print(f"{title}\n\n{_table(methods)}\n\n" + "\n".join(notes) + "\n")
        if args.chart is not None:
            try:
                draw([(title, methods) for title, methods, _ in models], args.chart)
            except OSError as error:
                raise _UserError(f"cannot write {args.chart} ({error.strerror})") from error
    except _UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
