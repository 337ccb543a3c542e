"""Learning rates over a run, as factors of their peaks: a function of the step, never of the clock."""

from __future__ import annotations

import math

from pretrain.config import Config


def lr_factor(config: Config, step: int) -> float:
    """Factor for the step that follows `step` others, of ``config.steps``."""
    assert config.steps is not None
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    cooldown = config.steps - warmup
    if config.schedule == "constant":
        cooldown = round(config.cooldown * config.steps)
    # 0 where the cooldown begins, 1 just after the last step.
    progress = max(0.0, 1 - (config.steps - step) / cooldown) if cooldown else 0.0
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.final_lr + (1 - config.final_lr) * shape
