"""A run from its folder's first file to its last: begun, interrupted, resumed, ended."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import galore_rrf
from pretrain.checkpoints import Checkpoints
from pretrain.command_line import to_yaml
from pretrain.config import OURS, Config
from pretrain.data.corpus import Corpus, load_corpus
from pretrain.diagnostics import Refreshes
from pretrain.errors import UserError
from pretrain.files import locked, sync_folder
from pretrain.log import Log
from pretrain.model import llama_config
from pretrain.optimizers import ranks
from pretrain.report import report, reset_peak_memory
from pretrain.spectra import check_layers, save_spectra
from pretrain.timing import steps_that_fit
from pretrain.trainer import Trainer


class Interrupted(Exception):
    """The run was asked to stop, and did after a checkpoint."""


def run(config: Config, resume: bool) -> None:
    """Trains to the last step and reports; UserError, Interrupted."""
    config = completed(config)
    out = config.out
    try:
        llama_config(config)
        if not resume:
            _check_new(out)
        for line in config.without_effect():
            print(line)
        torch.set_num_threads(config.threads)
        if config.device == "cuda":  # resuming to the same bits
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        corpus = load_corpus(config)
        if config.steps is None:
            config = config.model_copy(update={"steps": steps_that_fit(config, corpus), "minutes": None})
        reset_peak_memory(config.device)
        trainer = Trainer(config, corpus)
        if config.spectra_at:
            check_layers(trainer.model.named_parameters(), config.spectra_layers)
        if resume:
            _check_same_text(out, corpus)
        else:
            _begin(config, corpus)
        with locked(out):
            checkpoints = Checkpoints(out / "checkpoints", config.keep)
            if resume:
                state = checkpoints.load_newest(print)
                if state is not None:
                    trainer.load_state_dict(state)
                print(f"resuming {out} after step {trainer.step}")
            _train(trainer, checkpoints)
            report(trainer, corpus)
    except OSError as error:
        raise UserError(f"cannot read or write {error.filename or out}: {error.strerror or error}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory on {config.device}: a smaller micro_batch ({config.pass_size}) or "
            f"activation_checkpointing takes less ({str(error).splitlines()[0]})"
        ) from error


def has_gpu() -> bool:
    """Whether there is a GPU and galore_rrf has kernels for it."""
    return torch.cuda.is_available() and "cuda" in galore_rrf.build_info()


def completed(config: Config) -> Config:
    """What was left to the program: the device and the number of threads."""
    device = config.device
    if device == "auto":
        device = "cuda" if has_gpu() else "cpu"
        if device == "cpu" and torch.cuda.is_available():
            print("training on the CPU: there is a GPU, but this galore_rrf was built without CUDA")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("Invalid device: 'cuda' (torch sees no GPU here)")
    if device == "cuda" and not has_gpu() and config.optimizer.name in OURS:
        raise UserError(
            "Invalid device: 'cuda' (this galore_rrf was built without CUDA; other optimizers, as adamw, could use it)"
        )
    return config.model_copy(update={"device": device, "threads": config.threads or torch.get_num_threads()})


def _check_new(out: Path) -> None:
    """Before minutes are spent on text: the folder is free, and can be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        held = (out / "config.yaml").exists()
        raise UserError(
            f"Invalid --out: {out} "
            + ("already holds a run (--resume continues it)" if held else "is not empty")
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"Invalid --out: {out} (no permission to write to {out.parent})")


def _begin(config: Config, corpus: Corpus) -> None:
    """The folder with what the run is, all of it or nothing."""
    out = config.out
    unfinished = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        unfinished.mkdir()
        (unfinished / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (unfinished / "data.json").write_text(
            json.dumps(corpus.description, indent=2) + "\n", encoding="utf-8"
        )
        shutil.copyfile(corpus.files, unfinished / "files.txt")
        unfinished.replace(out)  # fails if another process has made it meanwhile
        sync_folder(out.parent)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from error


def _check_same_text(out: Path, corpus: Corpus) -> None:
    try:
        before = json.loads((out / "data.json").read_text(encoding="utf-8"))
        hashes = {key: before[key] for key in ("sha256", "tokenizer_sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{out / 'data.json'}, which says what the run trains on, is damaged ({error})"
        ) from error
    for key, value in hashes.items():
        if value != corpus.description[key]:
            raise UserError(
                f"the text or its tokenizer has changed since {out} began: {key} was {value}, "
                f"is {corpus.description[key]}"
            )


def _train(trainer: Trainer, checkpoints: Checkpoints) -> None:
    config, steps = trainer.config, trainer.config.steps
    log = Log(config, trainer.step)
    known_ranks = ranks(trainer.model, trainer.optimizer)
    refreshes = Refreshes(trainer.optimizer)
    recent: list[float] = []
    try:
        with _signals() as stop:
            while trainer.step < steps:
                metrics = trainer.train_step()
                step = trainer.step
                log.write(step, **metrics)
                if step - 1 in config.spectra_at:
                    named = trainer.model.named_parameters()
                    folder = config.out / "spectra"
                    save_spectra(folder, step - 1, named, trainer.optimizer, config.spectra_layers)
                if config.optimizer.tolerance is not None:
                    now = ranks(trainer.model, trainer.optimizer)
                    if now != known_ranks:
                        log.write(step, ranks=now, state_bytes=galore_rrf.state_bytes(trainer.optimizer))
                        known_ranks = now
                recent = [*recent[-19:], metrics["seconds"]]
                pace = statistics.fmean(recent)
                tokens = config.batch * config.sequence_length
                log.progress(step, metrics["loss"], tokens / pace, (steps - step) * pace)
                if step % config.eval_every == 0 or step == steps:
                    loss = trainer.held_out_loss()
                    perplexity = math.exp(loss) if loss < 700 else math.inf
                    log.write(step, held_out_loss=loss, perplexity=perplexity)
                    log.say(f"step {step}: held-out loss {loss:.4f}, perplexity {perplexity:.2f}")
                saves = step % config.save_every == 0 or step == steps or bool(stop)
                every = config.diagnostics_every
                if every is not None and (saves or step % every == 0):  # checkpoints know no diagnostics
                    log.write_refreshes(step, refreshes.latest())
                if saves:
                    log.flush()
                    checkpoints.save(step, trainer.state_dict())
                if saves and stop and step < steps:
                    raise Interrupted(f"stopped after step {step}, with a checkpoint")
    finally:
        log.close()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals to stop, noted for the end of the step; a second one stops at once."""
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before: dict[int, Any] = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
