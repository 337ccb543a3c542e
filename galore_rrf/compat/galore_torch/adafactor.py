"""Adafactor (Shazeer and Stern 2018) as galore_torch 1.0 has it, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from galore_rrf.compat.galore_torch.published import PUBLISHED
from galore_rrf.subspace import (
    RIGHT,
    SCHEMA_VERSION,
    SubspaceOptions,
    as_matrices,
    compute_dtype,
    find_each,
    matrix_count,
    rank_of,
    refresh_due,
    resolve,
    side_of,
    state_shapes,
)

# Keys with a single value: factored second moments cannot be rotated, and change no shape.
_FIXED = {"moments": "keep", "tolerance": None, "nonfinite": "skip", "state_dtype": None}


class GaLoreAdafactor(Optimizer):
    """galore_torch's GaLoreAdafactor: the same arguments, group keys and trajectory.

    Groups with `rank` (and `update_proj_gap`, `scale`, `proj_type`; by default 200, .25, ``"std"``) have
    their matrices projected; ``projector="range_finder"`` takes the place of the SVD.  A projected gradient
    that is not finite leaves its matrix alone.  All is computed, and kept, in fp32 (fp64 for fp64 weights).

    State of a parameter: tensors `step` (fp32 scalar), `RMS` (of the weight), `exp_avg_sq_row` and
    `exp_avg_sq_col`, means over columns and rows of its m x n or projected m x r or r x n (1-D: `exp_avg_sq`),
    with beta1 `exp_avg`; where projected also the tensor `basis` (right: n x r, left: m x r) and the ints
    `rank`, `side`, `key`, `refreshes`, `last_refresh` of `galore_rrf.GaLoreAdamW`.

    Args:
        params: parameters or groups.
        lr: learning rate; None with `relative_step`.
        eps: added to squared gradients; the least RMS of a weight that scales its step.
        clip_threshold: largest RMS of an update before lr.
        decay_rate: the second moment's beta2 is 1 - t^decay_rate.
        beta1: of the first moment, if there is to be one.
        weight_decay: decoupled, times lr.
        scale_parameter: multiply lr by the RMS of the weight.
        relative_step: lr is min(.01, 1 / sqrt(t)).
        warmup_init: with relative_step, min(1e-6 t, 1 / sqrt(t)).

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed; ``proj_type="full"``.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
    ) -> None:
        if lr is not None and relative_step:
            raise ValueError(f"Invalid lr: {lr} (must be None with relative_step=True, which makes its own)")
        if warmup_init and not relative_step:
            raise ValueError("Invalid warmup_init: True (must be False without relative_step)")
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            **resolve(PUBLISHED),
            "schema_version": SCHEMA_VERSION,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, its keys completed by the optimizer's defaults."""
        group = {**self.defaults, **param_group, **resolve(param_group, self.defaults)}
        for name, only in _FIXED.items():
            if group[name] != only:
                raise ValueError(f"Invalid {name}: {group[name]!r} (must be {only!r} in GaLoreAdafactor)")
        if group["lr"] is None and not group["relative_step"]:
            raise ValueError("Invalid lr: None (must be a number without relative_step)")
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step; returns what `closure` returns.  RuntimeError for sparse gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group)
        return loss

    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if grad.layout != torch.strided:
            raise RuntimeError(f"GaLoreAdafactor does not support sparse gradients, got {grad.layout}")
        options = SubspaceOptions.of({**group, "rank": rank_of(p, SubspaceOptions.of(group))})
        state = self.state[p]
        if not state:
            state.update(_new_state(p, options, self._key(p), group["beta1"] is not None))
        weight, grad = p.to(compute_dtype(p)), grad.to(compute_dtype(p))
        if options.rank is not None:
            grad = _projected(state, as_matrices(grad), options)
            if not bool(grad.isfinite().all()):
                return
        state["step"] += 1
        state["RMS"] = _rms(weight)
        lr = self._get_lr(group, state)
        update = _direction(state, grad, group) * lr
        if group["beta1"] is not None:
            update = state["exp_avg"].lerp_(update, 1 - group["beta1"])
        if options.rank is not None:
            update = options.scale * _back_projected(state, update).view(p.shape)
        weight.mul_(1 - lr * group["weight_decay"]).sub_(update)
        if weight is not p:
            p.copy_(weight)

    @staticmethod
    def _get_lr(group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        """The learning rate of a parameter; transformers' AdafactorSchedule reads it by this name."""
        lr = group["lr"]
        if group["relative_step"]:
            steps = float(state["step"])
            lr = min(1e-6 * steps if group["warmup_init"] else 1e-2, steps**-0.5)
        return float(lr) * (max(group["eps"][1], float(state["RMS"])) if group["scale_parameter"] else 1.0)

    def _key(self, p: Tensor) -> int:
        """The parameter's position among all matrices."""
        key = 0
        for other in (q for group in self.param_groups for q in group["params"]):
            if other is p:
                break
            key += matrix_count(other)
        return key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class."""
        super().load_state_dict(state_dict)
        # Again, since the base class has cast it to the dtype of the weights.
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, saved_id in zip(group["params"], saved["params"], strict=True):
                for key, value in state_dict["state"].get(saved_id, {}).items():
                    if isinstance(value, Tensor) and key != "step":
                        self.state[p][key] = value.detach().to(p.device, copy=True)


def _new_state(p: Tensor, options: SubspaceOptions, key: int, first_moment: bool) -> dict[str, Any]:
    """Zeros; ``refreshes`` 0 says that there is no basis yet."""
    zeros = partial(torch.zeros, dtype=compute_dtype(p), device=p.device)
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device="cpu"), "RMS": zeros(())}
    shape: tuple[int, ...] = tuple(p.shape)
    if options.rank is not None:
        side = side_of(as_matrices(p), options.proj_type)
        shape, basis = state_shapes(as_matrices(p), side, options.rank)
        state |= {"basis": zeros(basis), "rank": options.rank, "side": side, "key": key}
        state |= {"refreshes": 0, "last_refresh": 0}
    if first_moment:
        state["exp_avg"] = zeros(shape)
    if len(shape) < 2:
        state["exp_avg_sq"] = zeros(shape)
    else:
        state["exp_avg_sq_row"] = zeros(shape[:-1])
        state["exp_avg_sq_col"] = zeros((*shape[:-2], shape[-1]))
    return state


def _projected(state: dict[str, Any], grad: Tensor, options: SubspaceOptions) -> Tensor:
    """The gradient in its subspace, which is found anew where that is due."""
    if refresh_due(state, options.update_proj_gap):
        (found,) = find_each([state], [grad], options)
        if found is not None:
            state["basis"], projected = found
            state["refreshes"] += 1
            state["last_refresh"] = int(state["step"])
            return projected
    return grad @ state["basis"] if state["side"] == RIGHT else state["basis"].mT @ grad


def _back_projected(state: Mapping[str, Any], update: Tensor) -> Tensor:
    return update @ state["basis"].mT if state["side"] == RIGHT else state["basis"] @ update


def _direction(state: Mapping[str, Any], grad: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The gradient over the root of its second moment, of rank one where it is a matrix; clipped."""
    weight = float(state["step"]) ** group["decay_rate"]  # 1 - beta2
    square = grad.square() + group["eps"][0]
    if "exp_avg_sq" in state:
        update = grad * state["exp_avg_sq"].lerp_(square, weight).rsqrt()
    else:
        row = state["exp_avg_sq_row"].lerp_(square.mean(-1), weight)
        col = state["exp_avg_sq_col"].lerp_(square.mean(-2), weight)
        share = row / row.mean(-1, keepdim=True)
        update = grad * share.rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
    return update / (_rms(update) / group["clip_threshold"]).clamp(min=1)


def _rms(x: Tensor) -> Tensor:
    return x.norm() / x.numel() ** 0.5
