"""AdamW as galore_torch 1.0 has it, in fp32 and in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from galore_rrf import optimizer
from galore_rrf.checkpoint import schema
from galore_rrf.compat.galore_torch.published import PUBLISHED, rank_of
from galore_rrf.subspace import SubspaceKeys, SubspaceOptions, is_projected


class _PublishedAdamW(optimizer.GaLoreAdamW):
    """Projects matrices whose shorter side the rank reaches too, onto all of that side.

    `optimizer.GaLoreAdamW` leaves them plain, where their steps would be 1 / scale times as long.
    """

    def _plain_step(self, group: dict[str, Any], options: SubspaceOptions, params: list[Tensor]) -> None:
        full = _full_ranks(params, options.rank)
        plain = [p for p in params if p not in full]
        if plain:
            super()._plain_step(group, options, plain)
        for rank in sorted(set(full.values())):
            chosen = [p for p in full if full[p] == rank]
            with torch.autocast(chosen[0].device.type, enabled=False):
                self._projected_step(group, replace(options, rank=rank), chosen)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class.

        Raises ValueError naming the parameter where the state does not fit it; the optimizer is then as it was.
        """
        states, full = dict(state_dict["state"]), {}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            ids = dict(zip(group["params"], saved["params"], strict=False))
            for p in _full_ranks(ids, saved.get("rank")):
                if states.get(ids[p]):
                    state = states.pop(ids[p])
                    schema.check_projected_state(f"parameter {ids[p]}", p, state)
                    full[p] = schema._projected_state(p, state, saved["state_dtype"])
        super().load_state_dict({**state_dict, "state": states})
        self.state.update(full)


def _full_ranks(params: Iterable[Tensor], rank: int | None) -> dict[Tensor, int]:
    """The parameters that are projected onto all of their shorter side, and its length."""
    ranks = {p: rank_of(p, rank) for p in params if not is_projected(p, rank)}
    return {p: r for p, r in ranks.items() if r is not None}


class GaLoreAdamW(_PublishedAdamW):
    """galore_torch's GaLoreAdamW: the same arguments, group keys and trajectory.

    Groups with `rank` (and `update_proj_gap`, `scale`, `proj_type`; by default 200, .25, ``"std"``) are
    projected, with moments in fp32 whatever the dtype of the weights; all others are plain AdamW in that
    package's arithmetic.  Further keys of a projected group: `galore_rrf.subspace.SubspaceOptions`;
    ``projector="range_finder"`` takes the place of the SVD.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: of AdamW; eps is added to the uncorrected root, decay comes last.
        correct_bias: False leaves the bias correction out.
        no_deprecation_warning: ignored, there is none.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed; ``proj_type="full"``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **PUBLISHED)
        self.defaults["correct_bias"] = correct_bias
        for group in self.param_groups:
            group.setdefault("correct_bias", correct_bias)


class GaLoreAdamW8bit(_PublishedAdamW):
    """galore_torch's GaLoreAdamW8bit, without bitsandbytes and on any device: moments are 8-bit codes.

    Those of fewer than 4096 entries stay fp32.  Groups as of `GaLoreAdamW`.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: of AdamW; eps is added to the corrected root, decay comes last.
        amsgrad, args, min_8bit_size, percentile_clipping, block_wise, is_paged: their defaults alone.
        optim_bits: ignored, as there.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: None = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
    ) -> None:
        for name, value, allowed in (
            ("amsgrad", amsgrad, False),
            ("args", args, None),
            ("min_8bit_size", min_8bit_size, 4096),
            ("percentile_clipping", percentile_clipping, 100),
            ("block_wise", block_wise, True),
            ("is_paged", is_paged, False),
        ):
            if value != allowed:
                raise ValueError(f"Invalid {name}: {value!r} (must be {allowed!r})")
        keys: SubspaceKeys = {**PUBLISHED, "arithmetic": "bitsandbytes", "state_dtype": torch.uint8}
        super().__init__(params, lr, betas, eps, weight_decay, **keys)
