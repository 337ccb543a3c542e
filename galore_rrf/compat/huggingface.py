"""GaLoreAdamW in the Trainer of Hugging Face transformers 5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from typing_extensions import Unpack

from galore_rrf.optimizer import GaLoreAdamW
from galore_rrf.options import RefinementKeys, resolve
from galore_rrf.param_groups import EXCLUDE, INCLUDE, param_groups


def galore_optimizer(
    args: TrainingArguments,
    rank: int,
    *,
    plain_lr: float | None = None,
    include: Sequence[str] = INCLUDE,
    exclude: Sequence[str] = EXCLUDE,
    **keys: Unpack[RefinementKeys],
) -> tuple[Callable[[], Callable[..., GaLoreAdamW]], dict[str, Any]]:
    """What a Trainer takes to train with `GaLoreAdamW`::

        Trainer(model, args, optimizer_cls_and_kwargs=galore_optimizer(args, rank=128), ...)

    The learning rate, betas, eps, weight decay and ``optim="adamw_torch_fused"`` (for plain parameters) are those
    of `args` at the time when the Trainer makes its optimizer.  What the Trainer does not decay, biases and norms, is
    not decayed; what needs no gradient is left out.

    Args:
        args: the Trainer's.
        rank, include, exclude, keys: which parameters are projected, and how: as of `galore_rrf.param_groups`.
        plain_lr: learning rate of the plain parameters; None: that of `args`, as for the projected ones.

    Raises:
        ValueError, TypeError: naming the key, its value and what is allowed; when training begins, ValueError
            where no parameter is projected.
    """
    resolve({"rank": rank, **keys})  # a wrong value is told here, not after the data is prepared
    groups = {"rank": rank, "plain_lr": plain_lr, "include": include, "exclude": exclude, **keys}
    return _factory, {"args": args, "groups": groups}


def _factory() -> Callable[..., GaLoreAdamW]:
    """The Trainer calls what is no class of optimizers without arguments, and what that returns with its model."""
    return _optimizer


def _optimizer(model: nn.Module, args: TrainingArguments, groups: dict[str, Any]) -> GaLoreAdamW:
    # Tied parameters under all of their names.
    trained = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    # A method that reads nothing of its object.
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    split = []
    for group in param_groups(trained, **groups):
        for decay in (True, False):
            params = [(n, p) for n, p in group["params"] if (n in decayed) == decay]
            if params:
                weight_decay = args.weight_decay if decay else 0.0
                split.append({**group, "params": params, "weight_decay": weight_decay})
    return GaLoreAdamW(
        split,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True if args.optim == OptimizerNames.ADAMW_TORCH_FUSED else None,  # torch then chooses
    )
