"""GaLore on a randomized range finder: a low-rank AdamW whose subspace follows the gradient."""

from importlib.metadata import version as _version

from galore_rrf import checkpoint, memory, ops
from galore_rrf._binding import build_info
from galore_rrf.memory import state_bytes
from galore_rrf.optimizer import GaLoreAdamW
from galore_rrf.param_groups import param_groups
from galore_rrf.range_finder import (
    BlockReflector,
    RangeFinderResult,
    Status,
    adaptive_range_finder,
    qb,
    range_finder,
    svd_lowrank,
)

__version__ = _version("galore_rrf")

__all__ = [
    "BlockReflector",
    "GaLoreAdamW",
    "RangeFinderResult",
    "Status",
    "__version__",
    "adaptive_range_finder",
    "build_info",
    "checkpoint",
    "memory",
    "ops",
    "param_groups",
    "qb",
    "range_finder",
    "state_bytes",
    "svd_lowrank",
]
