"""Plain rules for the matrices, to compare with, and how they go together with AdamW for all else."""

from __future__ import annotations

from typing import Any

import torch


class SignSGD(torch.optim.Optimizer):
    """W <- (1 - lr weight_decay) W - lr sign(G): what a step length alone does, no state at all."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(self.direction(p), alpha=-group["lr"])

    def direction(self, p: torch.Tensor) -> torch.Tensor:
        return p.grad.sign()


class Lion(SignSGD):
    """The sign of a momentum that leads what is kept (Chen et al. 2023, arXiv 2302.06675), with its betas."""

    BETAS = 0.9, 0.99

    def direction(self, p: torch.Tensor) -> torch.Tensor:
        state, (beta1, beta2) = self.state[p], self.BETAS
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        sign = torch.lerp(p.grad, state["exp_avg"], beta1).sign_()
        state["exp_avg"].lerp_(p.grad, 1 - beta2)
        return sign


class Together:
    """Two optimizers as one: the first has the matrices, the second all else."""

    def __init__(self, matrices: torch.optim.Optimizer, plain: torch.optim.Optimizer) -> None:
        self.parts = {"matrices": matrices, "plain": plain}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, Any]:
        return {p: state for part in self.parts.values() for p, state in part.state.items()}

    def zero_grad(self) -> None:
        for part in self.parts.values():
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
