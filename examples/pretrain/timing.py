"""How many steps fit into some minutes."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from pathlib import Path

from pretrain.checkpoints import Checkpoints
from pretrain.config import Config
from pretrain.data.corpus import Corpus
from pretrain.errors import UserError
from pretrain.trainer import Trainer

_LEAST, _SHARE = 3, 0.03  # of timed steps; of the time


def steps_that_fit(config: Config, corpus: Corpus) -> int:
    """Into ``config.minutes``, validations and checkpoints included, by the first steps of a training thrown away.

    UserError where not one does.
    """
    start = time.monotonic()
    budget = 60 * config.minutes
    trial = Trainer(config.model_copy(update={"steps": 10_000}), corpus)
    first = trial.train_step()  # warms up, and refreshes every subspace
    timed = []
    while len(timed) < _LEAST or sum(step["seconds"] for step in timed) < _SHARE * budget:
        timed.append(trial.train_step())
    refreshes = [step["refresh_seconds"] for step in timed if step["refresh_seconds"]] or [
        first["refresh_seconds"]
    ]
    gap = trial.optimizer.param_groups[0].get("update_proj_gap", 1)
    step = (
        statistics.median(step["seconds"] - step["refresh_seconds"] for step in timed)
        + statistics.median(refreshes) / gap
    )
    validation = _validation_seconds(trial)
    save = _save_seconds(trial)

    left = budget - (time.monotonic() - start) - validation - save
    steps = math.floor(left / (step + validation / config.eval_every + save / config.save_every))
    if steps < 1:
        raise UserError(
            f"Invalid minutes: {config.minutes} (a step takes {step:.1f} s, a validation {validation:.1f} s, "
            f"a checkpoint {save:.1f} s)"
        )
    print(
        f"{steps} steps fit into {config.minutes:g} minutes: {step:.2f} s a step, {validation:.1f} s a validation, "
        f"{save:.1f} s a checkpoint"
    )
    return steps


def _validation_seconds(trial: Trainer) -> float:
    """By one forward pass."""
    config = trial.config
    tokens = min(config.eval_tokens, config.pass_size * config.sequence_length)
    start = time.monotonic()
    trial.held_out_loss(tokens)
    return (time.monotonic() - start) * config.eval_tokens / tokens


def _save_seconds(trial: Trainer) -> float:
    with tempfile.TemporaryDirectory(prefix=".trial-", dir=trial.config.out.parent) as folder:
        start = time.monotonic()
        Checkpoints(Path(folder), keep=1).save(0, trial.state_dict())
        return time.monotonic() - start
