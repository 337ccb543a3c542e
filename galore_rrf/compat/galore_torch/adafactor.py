"""Adafactor (Shazeer and Stern 2018) as galore_torch 1.0 has it, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from galore_rrf import tucker
from galore_rrf.checkpoint import check_sizes, completed_groups
from galore_rrf.checkpoint.schema import INTS, check_step, check_tensor, copied, step_tensor
from galore_rrf.compat.galore_torch.published import PUBLISHED
from galore_rrf.options import SubspaceOptions, resolve
from galore_rrf.refresh import find_each
from galore_rrf.schedule import is_due
from galore_rrf.subspace import (
    BOTH,
    LEFT,
    RIGHT,
    SCHEMA_VERSION,
    as_matrices,
    compute_dtype,
    matrix_ids,
    rank_of,
    side_of,
    state_shapes,
)

# Keys with a single value: factored second moments cannot be rotated, and change no shape.
_FIXED = {
    "moments": "keep",
    "tolerance": None,
    "schedule": "fixed",
    "basis_from": "gradient",
    "nonfinite": "skip",
    "state_dtype": None,
}


class GaLoreAdafactor(Optimizer):
    """galore_torch's GaLoreAdafactor: the same arguments, group keys and trajectory.

    Groups with `rank` (and `update_proj_gap`, `scale`, `proj_type`; by default 200, .25, ``"std"``) have
    their matrices projected; ``projector="range_finder"`` takes the place of the SVD.  A projected gradient
    that is not finite leaves its matrix alone.  All is computed, and kept, in fp32 (fp64 for fp64 weights).

    State of a parameter: tensors `step` (fp32 scalar), `RMS` (of the weight), `exp_avg_sq_row` and
    `exp_avg_sq_col`, means over columns and rows of its m x n or projected m x r or r x n (1-D: `exp_avg_sq`),
    with beta1 `exp_avg`; where projected also the tensor `basis` (right: n x r, left: m x r; on
    both sides `basis`, m x r, and `basis_right`, n x r, with r x r for the projected gradient) and the ints
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
        ValueError, TypeError: naming the argument, its value and what is allowed.
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
        _check_group(group)
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step; returns what `closure` returns.

        Raises, nothing written, RuntimeError for sparse gradients; ValueError where a group's rank was
        changed, or its beta1 from None: the state has no place for that.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(name, p, p.grad, group) for name, p, group in self._named() if p.grad is not None]
        for name, p, grad, group in work:
            _check(name, p, grad, self.state.get(p), group)
        for _, p, grad, group in work:
            self._step(p, grad, group)
        return loss

    def _named(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Every parameter with its name, or its place among all, and its group."""
        place = 0
        for group in self.param_groups:
            names = group.get("param_names", ())
            for i, p in enumerate(group["params"]):
                yield repr(names[i]) if i < len(names) else f"parameter {place}", p, group
                place += 1

    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        options = SubspaceOptions.of({**group, "rank": rank_of(p, SubspaceOptions.of(group))})
        state = self.state[p]
        if not state:
            state.update(_new_state(p, options, matrix_ids(self.param_groups)[p], group["beta1"] is not None))
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, its groups' ranks included.

        Raises ValueError naming the parameter where the state does not fit it; the optimizer is then as it
        was.
        """
        states: list[tuple[Tensor, dict[str, Any]]] = []

        def validate(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
            check_sizes(self.param_groups, loaded["param_groups"])
            groups = completed_groups(self.param_groups, loaded["param_groups"])
            for group in groups:
                missing = [key for key in self.defaults if key not in group]
                if missing:
                    raise ValueError(
                        f"a group of the state dict lacks {', '.join(missing)} of GaLoreAdafactor"
                    )
                _check_group(group)
            places = [(saved_id, group) for group in groups for saved_id in group["params"]]
            for (name, p, _group), (saved_id, group) in zip(self._named(), places, strict=True):
                saved = loaded["state"].get(saved_id)
                if saved:
                    _check_state(name, p, saved, group)
                    states.append((p, _copied(p, saved)))
            return {**loaded, "param_groups": groups}

        self._loading = states
        handle = self.register_load_state_dict_pre_hook(validate)  # after the user's
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            del self._loading

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Ends unpickling and loading; what is loaded comes from the file, not from the base class, which has
        cast it to the dtype of the weights."""
        super().__setstate__(state)
        for p, loaded in getattr(self, "_loading", ()):
            self.state[p] = loaded


# --- Checks -------------------------------------------------------------------------------------------


def _check_group(group: Mapping[str, Any]) -> None:
    if callable(group["update_proj_gap"]):
        raise TypeError(
            f"Invalid update_proj_gap: {group['update_proj_gap']!r} (must be a positive integer in GaLoreAdafactor)"
        )
    for name, only in _FIXED.items():
        if group[name] != only:
            raise ValueError(f"Invalid {name}: {group[name]!r} (must be {only!r} in GaLoreAdafactor)")
    if group["proj_type"] == "tucker":
        raise ValueError(
            "Invalid proj_type: 'tucker' (must be that of a matrix in GaLoreAdafactor, whose moments are "
            "those of rows and columns)"
        )
    if group["lr"] is None and not group["relative_step"]:
        raise ValueError("Invalid lr: None (must be a number without relative_step)")


def _check(
    name: str, p: Tensor, grad: Tensor, state: Mapping[str, Any] | None, group: Mapping[str, Any]
) -> None:
    """Raises where the gradient is sparse or the state of another kind than the group asks for."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"GaLoreAdafactor does not support sparse gradients, and that of {name} is {grad.layout}"
        )
    if not state:
        return
    _check_rank(name, state.get("rank"), rank_of(p, SubspaceOptions.of(group)))
    if group["beta1"] is not None and "exp_avg" not in state:
        raise ValueError(
            f"Invalid beta1 of {name}: {group['beta1']} (must stay None, as when its state was made; nothing "
            "was written)"
        )


def _check_rank(name: str, known: int | None, rank: int | None) -> None:
    if known != rank:
        raise ValueError(
            f"Invalid rank of {name}: {rank} (must be {known}, as when its state was made, which cannot be "
            "moved to another; nothing was written)"
        )


def _check_state(name: str, p: Tensor, saved: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Raises ValueError unless `saved` is a state of `p` in `group`."""
    for key in INTS:
        value = saved.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{key} of {name} must be an integer, not negative, got {value!r}")
    side = saved.get("side", RIGHT)
    if side not in (RIGHT, LEFT, BOTH):
        raise ValueError(f"side of {name} must be 0 (right), 1 (left) or 2 (both), got {side}")
    rank = rank_of(p, SubspaceOptions.of(group))
    if "rank" in saved:
        _check_rank(name, saved["rank"], rank)
    shapes = _shapes(p, side, rank, group["beta1"] is not None or "exp_avg" in saved)
    keys = ("step", *shapes, *(INTS if rank is not None else ()))
    missing = [key for key in keys if key not in saved]
    if missing:
        kind = "plain" if rank is None else "projected"
        raise ValueError(f"the state of {name}, which is {kind}, lacks {', '.join(missing)}")
    unknown = [str(key) for key in saved if key not in keys]
    if unknown:
        raise ValueError(f"the state of {name} has unknown keys {', '.join(unknown)}")
    check_step(name, saved["step"])
    steps = float(saved["step"])
    if saved.get("last_refresh", 0) > steps:
        raise ValueError(
            f"last_refresh of {name} must be at most its step, {steps:.0f}, got {saved['last_refresh']}"
        )
    needs = f"a parameter of shape {tuple(p.shape)} at rank {rank}"
    for key, shape in shapes.items():
        check_tensor(f"{key} of {name}", saved[key], shape, needs)


# --- State --------------------------------------------------------------------------------------------


def _shapes(p: Tensor, side: int, rank: int | None, first_moment: bool) -> dict[str, tuple[int, ...]]:
    """Those of a state's tensors beside the step."""
    shape: tuple[int, ...] = tuple(p.shape)
    shapes: dict[str, tuple[int, ...]] = {"RMS": ()}
    if rank is not None:
        shape, bases = state_shapes(p, side, rank)
        shapes |= bases
    if first_moment:
        shapes["exp_avg"] = shape
    if len(shape) < 2:
        return {**shapes, "exp_avg_sq": shape}
    return {**shapes, "exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1])}


def _new_state(p: Tensor, options: SubspaceOptions, key: int, first_moment: bool) -> dict[str, Any]:
    """Zeros; ``refreshes`` 0 says that there is no basis yet."""
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    side = RIGHT
    if options.rank is not None:
        side = side_of(p, options.proj_type)
        state |= {"rank": options.rank, "side": side, "key": key, "refreshes": 0, "last_refresh": 0}
    for name, shape in _shapes(p, side, options.rank, first_moment).items():
        state[name] = torch.zeros(shape, dtype=compute_dtype(p), device=p.device)
    return state


def _copied(p: Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state as it is while training."""
    dtype = compute_dtype(p)
    copies = {
        key: copied(p, value, dtype) if isinstance(value, Tensor) else value for key, value in saved.items()
    }
    return {**copies, "step": step_tensor(saved)}


def _projected(state: dict[str, Any], grad: Tensor, options: SubspaceOptions) -> Tensor:
    """The gradient in its subspace, which is found anew where that is due."""
    both = state["side"] == BOTH
    gap = options.update_proj_gap
    assert isinstance(gap, int)
    if is_due(state, int(state["step"]), "fixed", gap, 0, resets=False):
        found: tuple[Any, Tensor] | None
        if both:
            found = tucker.find(state, grad, state["rank"], options)
        else:
            (found,) = find_each([state], [grad], options)
        if found is not None:
            state["refreshes"] += 1
            state["last_refresh"] = int(state["step"])
            state |= found[0] if both else {"basis": found[0]}
            return found[1]
    if both:
        return tucker.project(state, grad)
    return grad @ state["basis"] if state["side"] == RIGHT else state["basis"].mT @ grad


def _back_projected(state: Mapping[str, Any], update: Tensor) -> Tensor:
    if state["side"] == BOTH:
        return tucker.back_projected(state, update)
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
