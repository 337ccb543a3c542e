"""GaLoreAdamW: parameter groups, what is due, and dispatch; nothing numerical."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.adamw import AdamW, adamw
from torch.optim.optimizer import _use_grad_for_differentiable
from torch.utils.hooks import RemovableHandle
from typing_extensions import Unpack

from galore_rrf import checkpoint, moments, ops, schedule
from galore_rrf.checks import (
    NO_STATE_TO_CAPTURE,
    check_captured,
    check_finite,
    check_gradients,
    check_group,
    check_states,
    check_torchs_alone,
    did_you_mean,
    gradient_of,
)
from galore_rrf.diagnostics import (
    RefreshHook,
    SubspaceRecord,
    named_states,
    names_of,
)
from galore_rrf.options import SubspaceKeys, SubspaceOptions, given, resolve
from galore_rrf.param_groups import with_rank
from galore_rrf.projected_step import History, ProjectedStep
from galore_rrf.subspace import (
    SCHEMA_VERSION,
    follow,
    is_projected,
    is_torchs,
    matrix_ids,
    new_state,
    rank_of,
    zero_moments,
)


class GaLoreAdamW(AdamW):
    """AdamW with its moments in a low-rank subspace of each gradient matrix (GaLore, arXiv 2403.03507).

    Takes the place of `torch.optim.AdamW`: the same arguments, defaults and errors.  Groups without `rank`
    are plain AdamW, computed by torch itself unless `state_dtype` or `arithmetic` ask for what it has not.
    In a group with `rank`, parameters with two dimensions (and stacks, (e, m, n); convolutions unfolded to
    (out, rest)) whose shorter side exceeds it are projected, with ``proj_type="tucker"`` convolutions in each of
    their long modes; a randomized range finder finds their subspace every `update_proj_gap` steps.

    Args:
        params: as of any torch optimizer.  With `rank` here, named parameters follow the rule of
            `galore_rrf.param_groups`, bare tensors are all projected.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: as of
            `torch.optim.AdamW`; amsgrad and differentiable are errors where a group is projected, and
            foreach and fused concern plain parameters alone.
        **subspace: defaults of the groups' subspace keys; see `galore_rrf.options.SubspaceOptions`.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **subspace: Unpack[SubspaceKeys],
    ) -> None:
        for key in subspace:
            if key not in SubspaceKeys.__annotations__:
                raise TypeError(f"GaLoreAdamW got an unexpected keyword argument {key!r}{did_you_mean(key)}")
        resolved = resolve(subspace)
        self._subspace_defaults = dict(subspace)
        self._history = History()
        self._refresh_hooks: OrderedDict[int, RefreshHook] = OrderedDict()
        super().__init__(
            with_rank(params, resolved["rank"]),
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.defaults.update(resolved)
        tolerance = subspace.get("tolerance")
        if tolerance is not None and all(g["rank"] is None for g in self.param_groups):
            raise ValueError(f"tolerance needs a rank, its cap, got tolerance={tolerance} and rank=None")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, its subspace keys completed by its preset and the optimizer's defaults."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        for key in param_group:
            if key not in SubspaceKeys.__annotations__ and did_you_mean(key):
                raise ValueError(f"Unknown group key {key!r}{did_you_mean(key)}")
        if isinstance(param_group.get("params"), Iterator):  # read here and by torch
            param_group = {**param_group, "params": list(param_group["params"])}
        if not hasattr(self, "_subspace_defaults"):  # a copy or unpickled, which has defaults alone
            self._subspace_defaults = given(self.defaults)
        keys = {**resolve(param_group, self._subspace_defaults), "schema_version": SCHEMA_VERSION}
        tolerance = param_group.get("tolerance")
        if keys["rank"] is None and tolerance is not None:
            raise ValueError(
                f"a group with tolerance needs a rank, its cap, got tolerance={tolerance} and rank=None"
            )
        check_group({**self.defaults, **param_group, **keys})
        super().add_param_group({**param_group, **keys})

    @property
    def refresh_seconds(self) -> float:
        """Wall-clock seconds that refreshes have taken in this object's steps; no part of its state."""
        return self._history.refresh_seconds

    def diagnostics(self) -> list[SubspaceRecord]:
        """A record of every projected parameter that has taken a step: rank, energy kept, angle, times, bytes.

        Waits for steps that are still under way.
        """
        self._history.outcomes.settle()
        return [
            self._history.record(name, p, state)
            for name, p, state in named_states(self.param_groups, self.state)
        ]

    def register_refresh_hook(self, hook: RefreshHook) -> RemovableHandle:
        """Has ``hook(optimizer, records)`` called after each step with refreshes, with the records of these.

        On CUDA, where nobody waits for a step, that is at the beginning of the next one.  What the hook raises is
        passed on; the step has then been taken, or on CUDA not begun.  As with torch's own hooks, copies and
        pickles have none.
        """
        handle = RemovableHandle(self._refresh_hooks)
        self._refresh_hooks[handle.id] = hook
        return handle

    def _tell_refreshes(self) -> None:
        refreshed = self._history.observations.refreshed()
        if not refreshed or not self._refresh_hooks:
            return
        records = [
            self._history.record(name, p, state)
            for name, p, state in named_states(self.param_groups, self.state)
            if p in refreshed
        ]
        for hook in list(self._refresh_hooks.values()):
            hook(self, records)

    @_disable_dynamo  # clocks move at every step: what is compiled around them never stops being recompiled
    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step; returns what `closure` returns.

        Raises FloatingPointError, nothing written, for a non-finite gradient of a group with
        ``nonfinite="raise"``; ValueError, nothing written, where a group's keys were changed so that a
        parameter became plain or projected; RuntimeError for sparse gradients.
        """
        _health_check(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (group, options, *_split(group, options))
            for group, options in ((group, SubspaceOptions.of(group)) for group in self.param_groups)
        ]
        # With ``fused=True`` GradScaler leaves unscaling and skipping to the optimizer; torch's plain path does both.
        self._history.outcomes.settle()
        self._tell_refreshes()  # of the step before, on CUDA
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "fused=True under GradScaler cannot be captured in a CUDA graph: whether to skip is read by the host"
            )
        skip = found_inf is not None and bool(found_inf)
        if not skip:
            for group, options, projected, own, others in work:
                check_torchs_alone(group)
                check_states(group, self.state, projected, own + others)
                check_gradients(group, projected + own)
                if options.nonfinite == "raise":
                    check_finite(group, projected)
        answers = {} if skip else self._answers(work)
        phases = self._phases()
        for group, options, projected, own, others in work:
            counts_on_device = bool(group["capturable"] or group["fused"])
            for p in others:
                if self.state[p]:
                    follow(p, self.state[p], options, counts_on_device=counts_on_device)
            self._torch_step(group, others)
            if skip:
                continue
            if grad_scale is not None:
                for p in own + projected:
                    gradient_of(p).div_(grad_scale.to(p.device))
            for there in _by_device(own):
                self._plain_step(group, options, there)
            for there in _by_device(projected):
                with torch.autocast(there[0].device.type, enabled=False):
                    self._projected_step(group, options, there, answers, phases)
        self._tell_refreshes()
        return loss

    @torch.no_grad()
    def _plain_step(self, group: dict[str, Any], options: SubspaceOptions, params: list[Tensor]) -> None:
        """AdamW with moments or an arithmetic that torch's own does not have."""
        capturing = params[0].is_cuda and torch.cuda.is_current_stream_capturing()
        for p in params:
            if not self.state[p]:
                if capturing:
                    raise RuntimeError(NO_STATE_TO_CAPTURE)
                self.state[p].update(
                    step=torch.zeros((), dtype=torch.float32, device=p.device),
                    **{
                        key: value if key in moments.SCALES else value.view(p.shape)
                        for key, value in zero_moments(p, (p.numel(),), options.state_dtype).items()
                    },
                )
            follow(p, self.state[p], options)
        states = [self.state[p] for p in params]
        weights = [p.contiguous() for p in params]
        beta1, beta2 = group["betas"]
        ops.adamw_(
            weights,
            [gradient_of(p).contiguous() for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            [moments.scale(state, "exp_avg") for state in states],
            [moments.scale(state, "exp_avg_sq") for state in states],
            lr=group["lr"],
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            correct_bias=group.get("correct_bias", True),
            arithmetic=options.arithmetic,
        )
        for p, weight in zip(params, weights, strict=True):
            if weight is not p:
                p.copy_(weight)

    def _torch_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """torch's own AdamW."""
        with_grad: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        max_exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        has_complex = self._init_group(
            {**group, "params": params}, with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps
        )
        if not with_grad:
            return
        beta1, beta2 = group["betas"]
        adamw(
            with_grad,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            has_complex=has_complex,
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _answers(
        self, work: Iterable[tuple[dict[str, Any], SubspaceOptions, list[Tensor], Any, Any]]
    ) -> dict[Tensor, bool]:
        """What a callable `update_proj_gap` says of each parameter, before anything is written."""
        answers: dict[Tensor, bool] = {}
        for i, (group, options, projected, _, _) in enumerate(work):
            due = options.update_proj_gap
            if not callable(due) or not projected:
                continue
            if projected[0].is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"update_proj_gap={due!r}, a callable, cannot be captured in a CUDA graph")
            name_of = names_of(i, group)
            for p in projected:
                state = self.state.get(p, {})
                taken = self._history.outcomes.taken(state) if state else 0
                answers[p] = schedule.asked(due, name_of[p], taken, state)
        return answers

    def _phases(self) -> dict[Tensor, int]:
        """When in its interval each parameter of a staggered schedule is refreshed; equal intervals together."""
        sharing: dict[int, dict[Tensor, int]] = {}
        for group in self.param_groups:
            if group["schedule"] != "staggered":
                continue
            options = SubspaceOptions.of(group)
            costs = sharing.setdefault(group["update_proj_gap"], {})
            costs |= {p: p.numel() * (rank_of(p, options) or 0) for p in group["params"]}
        return {
            p: phase
            for gap, costs in sharing.items()
            for p, phase in zip(costs, schedule.phases(tuple(costs.values()), gap), strict=True)
        }

    def _is_due(
        self,
        p: Tensor,
        options: SubspaceOptions,
        answers: Mapping[Tensor, bool],
        phases: Mapping[Tensor, int],
    ) -> bool:
        state, gap = self.state[p], options.update_proj_gap
        if callable(gap):
            return answers[p] or not state["refreshes"]
        return schedule.is_due(
            state,
            self._history.outcomes.taken(state),
            options.schedule,
            gap,
            phases.get(p, 0),
            resets=options.moments == "reset",
        )

    @torch.no_grad()
    def _projected_step(
        self,
        group: dict[str, Any],
        options: SubspaceOptions,
        params: list[Tensor],
        answers: Mapping[Tensor, bool],
        phases: Mapping[Tensor, int],
    ) -> None:
        if params[0].is_cuda and torch.cuda.is_current_stream_capturing():
            check_captured(group, params, self.state, self._history.outcomes)
        self._init_projected(params, options)
        for p in params:
            follow(p, self.state[p], options)
        due = {p for p in params if self._is_due(p, options, answers, phases)}
        ProjectedStep(group, options, self.state, self._history).take(params, due)

    def _init_projected(self, params: list[Tensor], options: SubspaceOptions) -> None:
        """State for parameters that have none; their matrix ids are positions among all matrices."""
        new = [p for p in params if not self.state[p]]
        if new:
            ids = matrix_ids(self.param_groups)
            for p in new:
                self.state[p].update(new_state(p, options, ids[p]))

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer; waits for steps that are still under way."""
        self._history.outcomes.settle()
        saved = super().state_dict()
        for group in saved["param_groups"]:
            if callable(group["update_proj_gap"]):
                group["update_proj_gap"] = checkpoint.CALLABLE
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or, for plain groups, of `torch.optim.AdamW`.

        The state may have any rank; moments are kept as the groups say, whatever the dtype of the weights.
        For others' state dicts see `galore_rrf.checkpoint`.
        A callable `update_proj_gap` is in no state dict: the optimizer that loads one must have been given it.
        Raises ValueError naming the parameter where the state does not fit it; the optimizer is then as it was.
        """
        states: list[tuple[Tensor, dict[str, Any]]] = []
        gaps = [group["update_proj_gap"] for group in self.param_groups]

        def validate(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
            checkpoint.check_sizes(self.param_groups, loaded["param_groups"])
            groups = checkpoint.completed_groups(self.param_groups, loaded["param_groups"])
            states.extend(checkpoint.checked_states(self.param_groups, groups, loaded["state"]))
            for group in groups:
                if callable(group["update_proj_gap"]):  # which torch would copy
                    group["update_proj_gap"] = checkpoint.CALLABLE
            return {**loaded, "param_groups": groups}

        self._loading = states
        handle = self.register_load_state_dict_pre_hook(validate)  # after the user's
        try:
            super().load_state_dict(state_dict)
            for group, gap in zip(self.param_groups, gaps, strict=True):
                if group["update_proj_gap"] == checkpoint.CALLABLE:
                    group["update_proj_gap"] = gap
        finally:
            handle.remove()
            del self._loading

    def __getstate__(self) -> dict[str, Any]:
        """Begins copying and pickling, with what has been done counted."""
        self._history.outcomes.settle()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Ends unpickling and loading; what is loaded comes from the file, not from the base class, which has
        cast it to the dtype of the weights."""
        super().__setstate__(state)
        if hasattr(self, "_history"):  # loading
            self._history.forget_states()
        else:  # a copy, or unpickled
            self._history = History()
            self._refresh_hooks = OrderedDict()
        for p, loaded in getattr(self, "_loading", ()):
            self.state[p] = loaded


def _health_check(optimizer: torch.optim.Optimizer) -> None:
    """torch's own, of graphs captured without ``capturable``; named otherwise in older releases."""
    new = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (new or optimizer._cuda_graph_capture_health_check)()


def _by_device(params: list[Tensor]) -> Iterator[list[Tensor]]:
    for device in dict.fromkeys(p.device for p in params):
        yield [p for p in params if p.device == device]


def _split(
    group: dict[str, Any], options: SubspaceOptions
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The group's parameters with gradients that are projected, the plain ones that torch's AdamW cannot
    step, and those that it can."""
    projected: list[Tensor] = []
    own: list[Tensor] = []
    others: list[Tensor] = []
    for p in group["params"]:
        if p.grad is not None:
            kind = projected if is_projected(p, options) else others if is_torchs(p, options) else own
            kind.append(p)
    return projected, own, others
