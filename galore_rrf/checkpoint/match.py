"""Which saved state belongs to which parameter, where another optimizer had them in other groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from galore_rrf.options import SubspaceOptions
from galore_rrf.subspace import (
    is_projected,
    matrix_ids,
)


class Match(NamedTuple):
    """A parameter of ours and its state in the other optimizer."""

    name: str
    p: Tensor
    options: SubspaceOptions
    key: int
    """Matrix id: its position among all matrices."""
    saved: Mapping[str, Any]
    saved_group: Mapping[str, Any]

    @property
    def is_projected(self) -> bool:
        return is_projected(self.p, self.options)


def imported(
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
    params: Iterable[Any] | None,
    convert: Callable[[Match], Mapping[str, Any] | None],
) -> dict[str, Any]:
    """A state dict of `optimizer`: its own groups, and what `convert` makes of every saved state."""
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            "an optimizer's state dict has the keys 'state' and 'param_groups', "
            f"got {', '.join(map(repr, state_dict))}"
        )
    state = {i: convert(match) for i, match in _matches(optimizer, state_dict, params)}
    return {
        "state": {i: dict(converted) for i, converted in state.items() if converted is not None},
        "param_groups": optimizer.state_dict()["param_groups"],
    }


def _matches(
    optimizer: Optimizer, state_dict: Mapping[str, Any], params: Iterable[Any] | None
) -> Iterator[tuple[int, Match]]:
    """The optimizer's parameters that have a saved state, with their numbers in a state dict of its own."""
    places = _places(optimizer, state_dict["param_groups"], params)
    ids = matrix_ids(optimizer.param_groups)
    number = 0
    for group in optimizer.param_groups:
        options = SubspaceOptions.of(group)
        for i, p in enumerate(group["params"]):
            saved_group, saved_id = places[p]
            saved = state_dict["state"].get(saved_id)
            if saved:
                name = repr(group["param_names"][i]) if "param_names" in group else f"parameter {number}"
                yield number, Match(name, p, options, ids[p], saved, saved_group)
            number += 1


Place = tuple[Mapping[str, Any], Any]  # a saved group and a parameter's id in the saved state


def _places(
    optimizer: Optimizer, saved_groups: list[dict[str, Any]], params: Iterable[Any] | None
) -> dict[Tensor, Place]:
    """Where each parameter is: by the order of `params`, else by names, else by position in equal groups."""
    groups = optimizer.param_groups
    own = list(chain.from_iterable(group["params"] for group in groups))
    places: list[Place] = [(group, saved_id) for group in saved_groups for saved_id in group["params"]]
    if params is not None:
        order = list(_flat(params))
        if len(order) != len(places) or set(order) != set(own):
            raise ValueError(
                f"params must be the optimizer's {len(own)} parameters in the order of the state dict's "
                f"{len(places)}, got {len(order)}, {len(set(order) & set(own))} of them the optimizer's"
            )
        return dict(zip(order, places, strict=True))
    names, saved_names = _names(groups), _names(saved_groups)
    if names is not None and saved_names is not None:
        unknown = sorted(set(names) ^ set(saved_names))
        if unknown:
            raise ValueError(
                f"the optimizer's and the state dict's names of parameters differ: {', '.join(unknown)}; "
                "pass params=, the parameters as the other optimizer was given them"
            )
        of = dict(zip(saved_names, places, strict=True))
        return {p: of[name] for p, name in zip(own, names, strict=True)}
    sizes = [[len(group["params"]) for group in each] for each in (groups, saved_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state dict has parameter groups of {sizes[1]} parameters, the optimizer of {sizes[0]}, and "
            "not both name them: pass params=, the parameters as the other optimizer was given them, such as "
            "model.parameters()"
        )
    return dict(zip(own, places, strict=True))


def _flat(params: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of what a torch optimizer takes: tensors, named ones, or groups of them."""
    for item in params:
        if isinstance(item, Mapping):
            inner = item["params"]
            yield from _flat([inner] if isinstance(inner, Tensor) else inner)
        else:
            yield item[1] if isinstance(item, tuple) else item


def _names(groups: list[dict[str, Any]]) -> list[str] | None:
    """The names of all parameters; distributed checkpoints have them in the place of numbers."""
    names = [name for group in groups for name in group.get("param_names", group["params"])]
    return names if all(isinstance(name, str) for name in names) else None
