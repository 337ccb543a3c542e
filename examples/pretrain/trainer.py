"""One training: model, optimizer and data, a step at a time.  What it is after n steps depends on nothing else."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from pretrain.config import Config
from pretrain.data.batches import Batches, held_out_windows
from pretrain.data.corpus import Corpus
from pretrain.errors import UserError
from pretrain.model import autocast, build_model, token_losses
from pretrain.optimizers import build_optimizer
from pretrain.schedule import lr_factor


class Trainer:
    """`config` is complete: its steps, device and threads are known."""

    def __init__(self, config: Config, corpus: Corpus) -> None:
        self.config = config
        self.step = 0
        self.model = build_model(config)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.optimizer = build_optimizer(self.model, config)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self._scaler = torch.amp.GradScaler(config.device, enabled=config.precision == "fp16_mixed")
        self._batches = Batches(corpus.train, config.sequence_length, config.seed)
        self._held_out = held_out_windows(corpus.held_out, config.sequence_length, config.eval_tokens)

    @property
    def tokens(self) -> int:
        """Tokens predicted so far."""
        return self.step * self.config.batch * self.config.sequence_length

    def train_step(self) -> dict[str, float]:
        """One optimizer step: what metrics.jsonl says of it, seconds of wall-clock time.

        Gradients are left for those who look at them.  UserError, before the weights move, for a loss or a
        gradient that is no number.
        """
        start = self._now()
        config, optimizer, scaler = self.config, self.optimizer, self._scaler
        self.model.train()
        optimizer.zero_grad()
        factor = lr_factor(config, self.step)
        for group, peak in zip(optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

        passes = config.batch // config.pass_size
        loss = 0.0
        for i in range(passes):
            windows = self._batches(self.step * config.batch + i * config.pass_size, config.pass_size)
            with autocast(config):
                part = token_losses(self.forward, windows.to(config.device)).mean() / passes
            scaler.scale(part).backward()
            loss += part.item()
        if not math.isfinite(loss):
            raise self._diverged("loss", loss)
        metrics = {"loss": loss, "lr": self._peaks[0] * factor, "plain_lr": self._peaks[-1] * factor}
        scaler.unscale_(optimizer)
        metrics["grad_norm"] = clip_grad_norm_(self.model.parameters(), config.clip_norm or math.inf).item()
        if not math.isfinite(metrics["grad_norm"]) and not scaler.is_enabled():  # a scaler skips such a step
            raise self._diverged("gradient norm", metrics["grad_norm"])

        before, refreshes = self._now(), getattr(optimizer, "refresh_seconds", 0.0)
        scaler.step(optimizer)
        scaler.update()
        self.step += 1
        end = self._now()
        return {
            **metrics,
            "tokens": self.tokens,
            "seconds": end - start,
            "optimizer_seconds": end - before,
            "refresh_seconds": getattr(optimizer, "refresh_seconds", 0.0) - refreshes,
        }

    @torch.inference_mode()
    def held_out_loss(self, tokens: int | None = None) -> float:
        """Mean loss, in nats, of the first `tokens` held-out tokens, by default of ``config.eval_tokens``."""
        self.model.eval()
        total, count = 0.0, 0
        for windows in self._held_out.split(self.config.pass_size):
            with autocast(self.config):
                losses = token_losses(self.forward, windows.to(self.config.device))
            losses = losses[: self.config.eval_tokens - count]  # the last sequence may go beyond
            total += losses.double().sum().item()
            count += losses.numel()
            if count >= (tokens or self.config.eval_tokens):
                break
        if not math.isfinite(total):
            raise self._diverged("held-out loss before", total)
        return total / count

    def _diverged(self, what: str, value: float) -> UserError:
        return UserError(
            f"the {what} of step {self.step + 1} is {value}: training diverged; checkpoints before it are whole, but "
            "what helps is a new run with a lower optimizer.lr or optimizer.plain_lr, or a longer warmup"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the steps to come depend on, beside the configuration and the text."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if self.config.device == "cuda" else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if self.config.device == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_random"])
        self.step = state["step"]

    def _now(self) -> float:
        if self.config.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
