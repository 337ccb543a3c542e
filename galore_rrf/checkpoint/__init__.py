"""State dicts: their schema, the import of other optimizers' checkpoints, distributed ones."""

from galore_rrf.checkpoint.distributed import match_shapes
from galore_rrf.checkpoint.galore_torch import from_galore_torch, load_galore_torch
from galore_rrf.checkpoint.schema import CALLABLE, check_sizes, checked_states, completed_groups
from galore_rrf.checkpoint.torch_adamw import from_torch_adamw

__all__ = [
    "CALLABLE",
    "check_sizes",
    "checked_states",
    "completed_groups",
    "from_galore_torch",
    "from_torch_adamw",
    "load_galore_torch",
    "match_shapes",
]
