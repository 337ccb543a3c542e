"""A step of projected parameters: the refreshes around the operator's call, and what became of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_rrf import moments, ops, schedule, tucker
from galore_rrf.checks import gradient_of
from galore_rrf.diagnostics import Observations, SubspaceRecord, squared_cosine
from galore_rrf.options import SubspaceOptions
from galore_rrf.outcomes import Outcomes, Told
from galore_rrf.refresh import refresh, refreshed_in_step, take_average
from galore_rrf.subspace import (
    LEFT,
    RESIDUAL_STATES,
    RIGHT,
    as_matrices,
    bases_of,
    is_measured,
    projected_form,
)


class History:
    """What an optimizer object has seen of its projected parameters' steps; no part of its state.

    Attributes:
        refresh_seconds: wall-clock, of all refreshes.
        outcomes: steps and refreshes counted.
        observations: what steps have told of subspaces.
    """

    def __init__(self) -> None:
        self.refresh_seconds = 0.0
        self.outcomes = Outcomes()
        self.observations = Observations()

    def forget_states(self) -> None:
        """States are others now."""
        self.outcomes = Outcomes()
        self.observations = Observations()

    def record(self, name: str, p: Tensor, state: dict[str, Any]) -> SubspaceRecord:
        return self.observations.record(name, p, state, self.outcomes.taken(state))

    def note(
        self,
        options: SubspaceOptions,
        params: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        seconds: Sequence[float],
        told: Sequence[Told],
    ) -> None:
        """A step of `params` is known; `seconds` is what each one's refresh took."""
        self.observations.note(params, states, seconds, told)
        if is_measured(options):
            for state, one in zip(states, told, strict=True):
                schedule.learn(state, options.update_proj_gap, one)


class _Refreshed(NamedTuple):
    """A refresh made outside the step operator."""

    coefficients: Tensor | None  # the projected gradient in the new subspace; None: it failed
    cosine: Tensor | None  # squared, of the angles between both subspaces
    seconds: float


@dataclass(frozen=True)
class ProjectedStep:
    """Of parameters on one device that share a group, each with a state that follows its options.

    Attributes:
        group: torch's parameter group.
        options: its subspace's.
        states: of all parameters.
        history: entered is what the step tells.
    """

    group: Mapping[str, Any]
    options: SubspaceOptions
    states: Mapping[Tensor, dict[str, Any]]
    history: History

    def take(self, params: Sequence[Tensor], due: Set[Tensor]) -> None:
        """The step of `params`, those in `due` refreshed."""
        options = self.options
        for p in params:
            if self.states[p]["side"] not in (RIGHT, LEFT):
                self._take_one_of_many_sides(p, due=p in due)
        params = [p for p in params if self.states[p]["side"] in (RIGHT, LEFT)]
        if options.basis_from == "average":
            for p in params:
                take_average(as_matrices(gradient_of(p)), self.states[p], float(self.group["betas"][0]))
        # What may change shapes is refreshed first, then comes the step of all.
        within = {p for p in params if p in due and refreshed_in_step(p, self.states[p], options)}
        apart = [p for p in params if p in due and p not in within]
        later = {p for p in apart if options.refresh_at == "end" and self.states[p]["refreshes"]}
        made = self._refresh([p for p in apart if p not in later])
        refreshes = [self.states[p]["refreshes"] if p in within else -1 for p in params]
        measures = self._call(params, refreshes, made, measuring=bool(later) or is_measured(options))
        rows = dict(zip(params, measures, strict=True)) if measures is not None else {}
        for p, refreshed in self._refresh([p for p in apart if p in later]).items():
            state = self.states[p]
            self.history.refresh_seconds += refreshed.seconds
            if refreshed.cosine is not None:
                state["refreshes"] += 1
                state["last_refresh"] = int(state["step"]) - 1
                gradient, projected, _ = rows[p].tolist()
                numbers = gradient, projected, float(refreshed.cosine)
                told = Told(state["last_refresh"], stepped=True, refreshed=True, measures=numbers)
                self.history.note(options, [p], [state], [refreshed.seconds], [told])

    def _refresh(self, params: Sequence[Tensor]) -> dict[Tensor, _Refreshed]:
        """The refreshes that the step operator does not do itself."""
        if not params:
            return {}
        states = [self.states[p] for p in params]
        beta1, beta2 = map(float, self.group["betas"])
        before = [state["basis"] for state in states]
        start = time.perf_counter()
        grads = [self._fed(p) for p in params]
        coefficients = refresh(states, grads, self.options, (beta1, beta2), self.group["maximize"])
        elapsed = time.perf_counter() - start
        costs = [p.numel() * state["rank"] for p, state in zip(params, states, strict=True)]
        return {
            p: _Refreshed(
                projected,
                None if projected is None else squared_cosine(old, state["basis"]),
                elapsed * cost / sum(costs),
            )
            for p, state, old, projected, cost in zip(
                params, states, before, coefficients, costs, strict=True
            )
        }

    def _fed(self, p: Tensor) -> Tensor:
        """The gradient as a refresh sees it: with ``residual="feedback"`` it has what was outside the subspace."""
        grad = gradient_of(p)
        if self.options.residual == "feedback":
            grad = grad.add(self.states[p]["error"], alpha=self.options.residual_scale)
        return as_matrices(grad)

    def _call(
        self,
        params: Sequence[Tensor],
        refreshes: list[int],
        made: Mapping[Tensor, _Refreshed],
        *,
        measuring: bool,
    ) -> Tensor | None:
        """The step of all, after the refreshes `made` before it; what was measured, always where `measuring`."""
        group, options = self.group, self.options
        states = [self.states[p] for p in params]
        weights = [as_matrices(p) for p in params]
        beta1, beta2 = group["betas"]
        coefficients = [made[p].coefficients if p in made else None for p in params]
        seconds = torch.tensor(
            [made[p].seconds if p in made else 0.0 for p in params], dtype=torch.float64, device="cpu"
        )
        measures = _room_for_measures(params, refreshes, coefficients, measuring)
        try:
            outcomes = ops.projected_adamw_(
                weights,
                [as_matrices(gradient_of(p)) for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["basis"] for state in states],
                [state["step"] for state in states],
                coefficients,
                [state["side"] for state in states],
                [state["key"] for state in states],
                refreshes,
                lr=group["lr"],
                beta1=float(beta1),
                beta2=float(beta2),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                scale=options.scale,
                maximize=group["maximize"],
                correct_bias=group.get("correct_bias", True),
                arithmetic=options.arithmetic,
                sketch=options.sketch,
                power=options.power,
                oversampling=options.oversampling,
                moments=options.moments,
                seed=options.seed,
                stochastic_rounding=options.stochastic_rounding,
                residual=options.residual,
                residual_scale=options.residual_scale,
                refresh_at=options.refresh_at,
                refresh_seconds=seconds,
                measures=measures,
                exp_avg_scales=[moments.scale(state, "exp_avg") for state in states],
                exp_avg_sq_scales=[moments.scale(state, "exp_avg_sq") for state in states],
                residual_states=self._residual_states(params),
            )
        except BaseException:
            self.history.outcomes.forget(states)
            raise
        self.history.refresh_seconds += float(seconds.sum())
        if measures is not None:
            for row, p in zip(measures, params, strict=True):
                if p in made and made[p].cosine is not None:
                    row[2] = made[p].cosine
        listener = partial(self.history.note, options, params, states, seconds.tolist())
        self.history.outcomes.add(outcomes, states, measures, listener, resets=options.moments == "reset")
        for p, weight in zip(params, weights, strict=True):
            if weight.data_ptr() != p.data_ptr():  # unfolded from a layout that has no view as a matrix
                p.copy_(weight.view(p.shape))
        return measures

    def _residual_states(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        name = RESIDUAL_STATES.get(self.options.residual)
        if name is None:
            return None
        states = [self.states[p][name] for p in params]
        return [as_matrices(state) for state in states] if name == "error" else states

    def _take_one_of_many_sides(self, p: Tensor, *, due: bool) -> None:
        group, options, state = self.group, self.options, self.states[p]
        beta1, beta2 = map(float, group["betas"])
        taken, refreshes, before = int(state["step"]), state["refreshes"], bases_of(state)
        seconds = tucker.step(
            p,
            gradient_of(p),
            state,
            options,
            due=due,
            lr=float(group["lr"]),
            betas=(beta1, beta2),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            correct_bias=group.get("correct_bias", True),
        )
        self.history.refresh_seconds += seconds
        refreshed = state["refreshes"] > refreshes
        if refreshed or is_measured(options):
            used = before if options.refresh_at == "end" and refreshes > 0 else bases_of(state)
            measures = tucker.measures(state, projected_form(gradient_of(p), state["side"]), before, used)
            stepped = int(state["step"]) != taken or refreshed
            told = Told(int(state["step"]) - stepped, stepped, refreshed, measures)
            self.history.note(options, [p], [state], [seconds], [told])


def _room_for_measures(
    params: Sequence[Tensor], refreshes: list[int], coefficients: list[Tensor | None], measuring: bool
) -> Tensor | None:
    """For what a step with refreshes measures; none in a CUDA graph, which nobody listens to."""
    refreshed = measuring or any(i >= 0 for i in refreshes) or any(r is not None for r in coefficients)
    device = params[0].device if params else torch.device("cpu")
    if not refreshed or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    return torch.empty(len(params), 3, dtype=torch.float64, device=device)
