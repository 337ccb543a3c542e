"""AdamW as galore_torch 1.0 has it, in fp32 and in 8 bits."""

from __future__ import annotations

from typing import Any

import torch

from galore_rrf import optimizer
from galore_rrf.compat.galore_torch.published import PUBLISHED
from galore_rrf.options import SubspaceKeys


class GaLoreAdamW(optimizer.GaLoreAdamW):
    """galore_torch's GaLoreAdamW: the same arguments, group keys and trajectory.

    Groups with `rank` (and `update_proj_gap`, `scale`, `proj_type`; by default 200, .25, ``"std"``) are
    projected, with moments in fp32 whatever the dtype of the weights; all others are plain AdamW in that
    package's arithmetic.  Further keys of a projected group: `galore_rrf.options.SubspaceOptions`;
    ``projector="range_finder"`` takes the place of the SVD.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: of AdamW; eps is added to the uncorrected root, decay comes last.
        correct_bias: False leaves the bias correction out.
        no_deprecation_warning: ignored, there is none.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
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


class GaLoreAdamW8bit(optimizer.GaLoreAdamW):
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
