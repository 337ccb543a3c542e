"""The Llama, in the precision and with the adapters that a configuration asks for."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from galore_rrf import param_groups
from pretrain.config import Config
from pretrain.errors import UserError


def llama_config(config: Config) -> LlamaConfig:
    """UserError for a field that LlamaConfig does not have or a value that it refuses."""
    fields = config.model.model_dump()
    unknown = sorted(fields.keys() - inspect.signature(LlamaConfig).parameters.keys())
    if unknown:
        raise UserError(
            f"Unknown field: model.{unknown[0]} (LlamaConfig of transformers has none of that name)"
        )
    try:
        return LlamaConfig(**fields, use_cache=False, attn_implementation=config.attention)
    except Exception as error:  # of its validation library, whatever that is
        raise UserError(f"Invalid model: {' '.join(str(error).split())}") from error


def build_model(config: Config) -> nn.Module:
    """A fresh model on ``config.device``, its weights a function of ``config.seed``."""
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(llama_config(config))
    if config.precision == "bf16":
        model = model.to(torch.bfloat16)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.optimizer.name == "lora":
        model = _with_adapters(model, config)
    return model.to(config.device)


def _with_adapters(model: nn.Module, config: Config) -> nn.Module:
    """Adapters beside the matrices that GaLore would project, which are frozen; all else is trained."""
    import peft  # takes seconds, which the others need not wait

    projected, *_ = param_groups(model, rank=config.optimizer.rank)
    targets = [name.removesuffix(".weight") for name, _ in projected["params"]]
    frozen = {id(p) for _, p in projected["params"]}
    plain = [p for p in model.parameters() if id(p) not in frozen]
    adapters = peft.LoraConfig(
        r=config.optimizer.rank, lora_alpha=config.optimizer.lora_alpha, target_modules=targets
    )
    model = peft.get_peft_model(model, adapters, autocast_adapter_dtype=False)
    for p in plain:
        p.requires_grad_()
    return model


def autocast(config: Config) -> AbstractContextManager[object]:
    """The precision of a forward pass."""
    dtype = {"bf16_mixed": torch.bfloat16, "fp16_mixed": torch.float16}.get(config.precision)
    return nullcontext() if dtype is None else torch.autocast(config.device, dtype)


def token_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Cross entropy, in nats and fp32, of every token of `windows` (count, length + 1) but the first ones."""
    logits = model(input_ids=windows[:, :-1]).logits
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    )
