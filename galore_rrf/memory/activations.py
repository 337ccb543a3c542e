"""What a forward pass keeps for the backward pass: an estimate for Llama-like models."""

from __future__ import annotations

from typing import Any

import torch

_FP32 = 4


def llama_activations(
    config: Any,
    tokens: int,
    dtype: torch.dtype,
    *,
    adapter_rank: int = 0,
    adapters: int = 0,
    checkpointing: bool = False,
) -> int:
    """Bytes of activations at their peak, the backward pass of the loss; an estimate.

    Counts what autograd keeps of ``transformers``' LlamaForCausalLM with fused attention (SDPA), which keeps no
    scores, and at the end the fp32 log-probabilities, their gradient and that of the logits.  Logits that
    the caller still holds and gradients inside the blocks come on top.

    Args:
        config: LlamaConfig, or one with its fields.
        tokens: in one forward pass, sequences times their length.
        dtype: of weights and activations.
        adapter_rank, adapters: width and number of LoRA adapters.
        checkpointing: blocks keep their inputs alone and are computed again one at a time
            (``gradient_checkpointing_enable``).

    Raises:
        ValueError: where `config` lacks a field.
    """
    try:
        hidden, intermediate = config.hidden_size, config.intermediate_size
        heads, vocabulary, layers = config.num_attention_heads, config.vocab_size, config.num_hidden_layers
    except AttributeError as error:
        raise ValueError(
            f"activations are estimated for Llama-like models alone, and the config lacks {error.name}"
        ) from error
    head = getattr(config, "head_dim", None) or hidden // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = dtype.itemsize

    # Bytes a token.  Norm: its input in fp32 with the reciprocal root, normalised, and weighted.
    norm = (_FP32 + 2 * size) * hidden + _FP32
    # Query and output, key and value; the logarithm of each softmax's denominator.
    attention = 2 * size * head * (heads + key_heads) + _FP32 * heads
    mlp = 4 * size * intermediate  # gate, its activation, up, their product
    block = 2 * norm + attention + mlp + size * adapter_rank * adapters // layers
    loss = norm + 3 * _FP32 * vocabulary
    if checkpointing:
        return tokens * (layers * size * hidden + max(block, loss))
    return tokens * (layers * block + loss)
