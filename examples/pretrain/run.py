"""A run from its folder's first file to its last: begun, interrupted, resumed, ended."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import galore_rrf
from pretrain.checkpoints import Checkpoints, write_atomically
from pretrain.command_line import to_yaml
from pretrain.config import Config
from pretrain.errors import UserError
from pretrain.log import Log
from pretrain.model import llama_config
from pretrain.optimizers import ranks
from pretrain.report import report
from pretrain.spectra import check_layers, save_spectra
from pretrain.tokens import Corpus, load_corpus
from pretrain.trainer import Trainer


class Interrupted(Exception):
    """The run was asked to stop, and did after a checkpoint."""


def run(config: Config, resume: bool) -> None:
    """Trains to the last step and reports; UserError, Interrupted."""
    config = completed(config)
    llama_config(config)
    if not resume:
        _check_new(config.out)
    if unused := config.optimizer.without_effect():
        print(f"optimizer {config.optimizer.name} has no use for {', '.join(unused)}")
    torch.set_num_threads(config.threads)
    if config.device == "cuda":  # resuming to the same bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    corpus = load_corpus(config)
    if config.steps is None:
        config = _with_steps(config, corpus)
    if resume:
        _check_same_text(config.out, corpus)
    else:
        _begin(config, corpus)
    trainer = Trainer(config, corpus)
    if config.spectra_at:
        check_layers(trainer.model.named_parameters(), config.spectra_layers)
    checkpoints = Checkpoints(config.out / "checkpoints", config.keep)
    if resume:
        state = checkpoints.load_newest(print)
        if state is not None:
            trainer.load_state_dict(state)
        print(f"resuming {config.out} after step {trainer.step}")
    try:
        _train(trainer, checkpoints)
        report(trainer, corpus)
    except OSError as error:
        raise UserError(
            f"cannot write to {config.out}: {error.strerror or error}; mend that, then --resume it"
        ) from error


def has_gpu() -> bool:
    """Whether there is a GPU and galore_rrf has kernels for it."""
    return torch.cuda.is_available() and "cuda" in galore_rrf.build_info()


def completed(config: Config) -> Config:
    """What was left to the program: device and threads; paths that hold wherever it is resumed."""
    device = config.device
    if device == "auto":
        device = "cuda" if has_gpu() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("Invalid device: 'cuda' (torch sees no GPU here)")
    if device == "cuda" and not has_gpu() and config.optimizer.name.startswith("galore"):
        raise UserError(
            "Invalid device: 'cuda' (this galore_rrf was built without CUDA; adamw and lora could use it)"
        )
    return config.model_copy(
        update={
            "device": device,
            "threads": config.threads or torch.get_num_threads(),
            "data": [path.expanduser().resolve() for path in config.data],
        }
    )


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = (
            "already holds a run (--resume continues it)"
            if (out / "config.yaml").exists()
            else "is not empty"
        )
        raise UserError(f"Invalid --out: {out} {what}")


def _begin(config: Config, corpus: Corpus) -> None:
    """The folder with what the run is; config.yaml, which makes it one, comes last."""
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(corpus.description, indent=2) + "\n"
        write_atomically(config.out / "data.json", lambda file: file.write(text.encode()))
        write_atomically(config.out / "files.txt", lambda file: file.write(corpus.files.read_bytes()))
        write_atomically(config.out / "config.yaml", lambda file: file.write(to_yaml(config).encode()))
    except OSError as error:
        raise UserError(f"cannot write to --out {config.out}: {error.strerror}") from error


def _check_same_text(out: Path, corpus: Corpus) -> None:
    before = json.loads((out / "data.json").read_text(encoding="utf-8"))
    for key in ("sha256", "tokenizer_sha256"):
        if before[key] != corpus.description[key]:
            raise UserError(
                f"the text or its tokenizer has changed since {out} began: {key} was {before[key]}, "
                f"is {corpus.description[key]}"
            )


def _with_steps(config: Config, corpus: Corpus) -> Config:
    """As many steps as fit into ``config.minutes``, by timing the first ones of a training thrown away."""
    start = time.monotonic()
    budget = 60 * config.minutes
    trial = Trainer(config.model_copy(update={"steps": 10_000}), corpus)
    trial.train_step()  # warms up
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < 0.03 * budget:
        seconds.append(trial.train_step()["seconds"])
    step = statistics.median(seconds)
    before = time.monotonic()
    part = (config.micro_batch or config.batch) * config.sequence_length
    trial.held_out_loss(part)
    evaluation = (time.monotonic() - before) * max(1.0, config.eval_tokens / part)
    left = 0.98 * budget - (time.monotonic() - start) - evaluation
    steps = math.floor(left / (step + evaluation / config.eval_every))
    if steps < 1:
        raise UserError(
            f"Invalid minutes: {config.minutes} (one step takes {step:.1f} s, a validation {evaluation:.1f} s)"
        )
    print(
        f"{steps} steps fit into {config.minutes:g} minutes: {step:.2f} s a step, {evaluation:.1f} s a validation"
    )
    return config.model_copy(update={"steps": steps, "minutes": None})


def _train(trainer: Trainer, checkpoints: Checkpoints) -> None:
    config, steps = trainer.config, trainer.config.steps
    log = Log(config, trainer.step)
    known_ranks = ranks(trainer.model, trainer.optimizer)
    recent: list[float] = []
    try:
        with _signals() as stop:
            while trainer.step < steps:
                metrics = trainer.train_step()
                step = trainer.step
                log.write(step, **metrics)
                if step - 1 in config.spectra_at:
                    named = trainer.model.named_parameters()
                    save_spectra(
                        config.out / "spectra", step - 1, named, trainer.optimizer, config.spectra_layers
                    )
                if config.optimizer.tolerance is not None:
                    now = ranks(trainer.model, trainer.optimizer)
                    if now != known_ranks:
                        log.write(step, ranks=now)
                        known_ranks = now
                recent = [*recent[-19:], metrics["seconds"]]
                pace = statistics.fmean(recent)
                tokens = config.batch * config.sequence_length
                log.progress(step, metrics["loss"], tokens / pace, (steps - step) * pace)
                if step % config.eval_every == 0 or step == steps:
                    loss = trainer.held_out_loss()
                    log.write(step, held_out_loss=loss, perplexity=math.exp(loss))
                    log.say(f"step {step}: held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
                if step % config.save_every == 0 or step == steps or stop:
                    log.flush()
                    checkpoints.save(step, trainer.state_dict())
                if stop and step < steps:
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
