"""What training takes: an optimizer's state as it is, and all of it, part by part, before anything is allocated.

``python -m galore_rrf.memory configs/llama_7b.yaml`` prints the table of a configuration.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from galore_rrf.memory.activations import llama_activations
from galore_rrf.memory.estimate import MemoryEstimate, estimate

__all__ = ["MemoryEstimate", "estimate", "llama_activations", "state_bytes"]


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the state of `optimizer`, as allocated now."""
    tensors = (t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)
