"""The configuration of a run: every field, its type, what it means and what it must agree with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _absolute_if_there(name: str) -> str:
    """A name of something on this machine, or on a hub."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]  # holds wherever a run is resumed from
Fraction = Annotated[float, Field(ge=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


OURS = ("galore", "galore_svd")
"""Optimizers that are this package's."""
PROJECTING = (*OURS, "galore_torch", "apollo", "apollo_mini")
"""Those that project gradients to a rank."""


class ModelConfig(BaseModel):
    """Fields of transformers.LlamaConfig, by its own names; in YAML, those not listed here too."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    vocab_size: PositiveInt = 32000
    """tokens; the tokenizer is trained to as many unless one is given"""
    hidden_size: PositiveInt = 512
    """width of the residual stream"""
    intermediate_size: PositiveInt = 1376
    """width inside the MLP"""
    num_hidden_layers: PositiveInt = 8
    """blocks of attention and MLP"""
    num_attention_heads: PositiveInt = 8
    """heads; divides hidden_size"""
    rms_norm_eps: PositiveFloat = 1e-6
    """added to the mean square in every norm"""
    max_position_embeddings: PositiveInt = 1024
    """longest sequence"""
    initializer_range: PositiveFloat = 0.02
    """standard deviation of the initial weights"""
    tie_word_embeddings: bool = False
    """whether embedding and head share their weights"""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class OptimizerConfig(BaseModel):
    """What moves the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Literal[
        "adamw",
        "galore",
        "galore_svd",
        "galore_torch",
        "apollo",
        "apollo_mini",
        "lora",
        "muon",
        "lion",
        "sign",
    ] = "galore"
    """adamw: torch's; galore: GaLoreAdamW on the range finder; galore_svd: its exact SVD, on the published
    schedule; galore_torch: that package; apollo, apollo_mini: apollo-torch, scaled by channel or by matrix; lora:
    adapters (peft) beside frozen attention and MLP matrices; muon (torch's), lion, sign: rules for the matrices,
    AdamW for all else"""
    lr: PositiveFloat = 0.01
    """peak learning rate of the matrices inside attention and MLP (lora: of the adapters)"""
    plain_lr: PositiveFloat | None = None
    """peak learning rate of all other parameters, always plain AdamW; by default that of the matrices"""
    beta1: Beta = 0.9
    """decay rate of the first moment"""
    beta2: Beta = 0.999
    """decay rate of the second moment"""
    eps: PositiveFloat = 1e-8
    """added to the root of the second moment"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """decoupled weight decay"""
    rank: PositiveInt = 128
    """columns of the basis, or with tolerance their cap; lora: width of the adapters"""
    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None
    """galore: at each refresh the smallest rank with this relative residual"""
    min_rank: PositiveInt | None = None
    """galore: with tolerance the least rank"""
    preset: Literal["default", "best", "published"] | None = None
    """galore: the defaults of all keys below (galore_svd: always published)"""
    update_proj_gap: PositiveInt | None = None
    """steps between refreshes of the subspace"""
    schedule: Literal["fixed", "staggered", "adaptive"] | None = None
    """galore, galore_svd: whether all subspaces are refreshed in the same step, and always after as many steps"""
    refresh_at: Literal["start", "end"] | None = None
    """galore, galore_svd: whether a new basis serves in its own step or from the next one on"""
    basis_from: Literal["gradient", "average", "momentum"] | None = None
    """galore, galore_svd: what the basis is found in"""
    scale: float | None = None
    """factor on the projected update"""
    sketch: Literal["warm", "plain", "half_power", "power"] | None = None
    """galore: how the range finder samples the gradient"""
    moments: Literal["rotate", "keep", "reset"] | None = None
    """galore, galore_svd: what becomes of the moments at a refresh"""
    residual: Literal["drop", "scaled", "sign", "normalized", "orthogonalized", "feedback"] | None = None
    """galore, galore_svd: what is done with the gradient's part outside the subspace"""
    residual_scale: float | None = None
    """galore, galore_svd: factor on its step"""
    proj_type: Literal["std", "reverse_std", "left", "right"] | None = None
    """the side that is projected"""
    state_dtype: Literal["fp32", "bf16", "8bit"] | None = None
    """adamw, galore, galore_svd: how all moments are kept; by default fp32, those of plain parameters in their dtype"""
    lora_alpha: PositiveFloat = 32.0
    """lora: the adapters' product is multiplied by lora_alpha / rank"""

    _GROUP_KEYS: ClassVar[dict[str, tuple[str, ...]]] = {
        "tolerance": ("galore",),
        "min_rank": ("galore",),
        "preset": ("galore",),
        "update_proj_gap": PROJECTING,
        "schedule": OURS,
        "refresh_at": OURS,
        "basis_from": OURS,
        "scale": PROJECTING,
        "sketch": ("galore",),
        "moments": OURS,
        "residual": OURS,
        "residual_scale": OURS,
        "proj_type": PROJECTING,
    }
    """Fields that are passed on to the group of the matrices by their names, unless None: to which optimizers."""
    _USED_BY: ClassVar[dict[str, tuple[str, ...]]] = {
        "rank": (*PROJECTING, "lora"),
        "state_dtype": (*OURS, "adamw"),
        "lora_alpha": ("lora",),
        **_GROUP_KEYS,
    }

    def group_keys(self) -> dict[str, object]:
        """What the group of the matrices is given beside its rank."""
        given = {key: getattr(self, key) for key, names in self._GROUP_KEYS.items() if self.name in names}
        return {key: value for key, value in given.items() if value is not None}

    @classmethod
    def has_rank(cls, name: str) -> bool:
        return name in cls._USED_BY["rank"]

    def without_effect(self) -> list[str]:
        """Fields other than by default that this optimizer has no use for."""
        defaults = type(self)()
        return [
            field
            for field, names in self._USED_BY.items()
            if self.name not in names and getattr(self, field) != getattr(defaults, field)
        ]


class DatasetConfig(BaseModel):
    """A text dataset of the Hugging Face hub (or on disk), streamed, and tokenised once."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: Annotated[str, AfterValidator(_absolute_if_there)]
    """as of datasets.load_dataset: "allenai/c4", "json", ..."""
    name: str | None = None
    """its configuration: "en" """
    data_files: Annotated[str, AfterValidator(_absolute_if_there)] | None = None
    """files of a generic path such as "json"; patterns are allowed"""
    split: str = "train"
    """trained on"""
    held_out_split: str | None = "validation"
    """validated on; none: a part of the training split (held_out)"""
    text: str = "text"
    """the column with the text"""
    tokens: PositiveInt = 1_400_000_000
    """tokens to stream and keep"""
    held_out_tokens: PositiveInt = 20_000_000
    """tokens to stream and keep for validation"""


class Config(BaseModel):
    """Pretrains a Llama on text; every field is a key of the YAML files and an option here."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    out: AbsolutePath | None = None
    """folder of the run, new or empty; else one in runs/, named after the last config and the time"""

    data: list[AbsolutePath] = []
    """files and folders of text, JSON lines, either also .gz; again for more; else the source text of this
    Python's standard library"""
    dataset: DatasetConfig | None = None
    """stream a dataset instead"""
    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.02
    """share of the documents that are validated on and never trained on, chosen by their content"""
    tokenizer: Annotated[str, AfterValidator(_absolute_if_there)] | None = None
    """tokenizer.json, or folder or hub name of a Hugging Face tokenizer; else a byte-level BPE of
    model.vocab_size tokens trained on the text"""
    cache: AbsolutePath = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "galore_rrf"
    """where tokenizers and tokenised text are kept"""

    model: ModelConfig = ModelConfig()
    """the Llama"""
    optimizer: OptimizerConfig = OptimizerConfig()
    """the optimizer"""

    sequence_length: PositiveInt = 256
    """tokens that a sequence predicts"""
    batch: PositiveInt = 512
    """sequences in a step"""
    micro_batch: PositiveInt | None = None
    """sequences in one forward and backward pass, gradients accumulated over the batch; else all at once"""
    steps: PositiveInt | None = None
    """optimizer steps of the whole run"""
    minutes: PositiveFloat | None = None
    """instead of steps: as many as fit, counted once by timing the first ones"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """of the learning rates after the warm-up: cosine to final_lr, or constant with a linear cooldown to it"""
    warmup: Fraction = 0.1
    """share of the steps over which learning rates rise linearly"""
    cooldown: Fraction = 0.2
    """share of the steps of the constant schedule's end"""
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.1
    """last learning rate, as a share of the peak"""
    clip_norm: PositiveFloat | None = 1.0
    """largest norm of the gradient of all parameters together; null: not clipped"""

    precision: Literal["fp32", "bf16", "bf16_mixed", "fp16_mixed"] = "fp32"
    """fp32; bf16: weights, gradients and plain moments; bf16_mixed: fp32 master weights, bf16 products
    (autocast); fp16_mixed: the same in fp16, with a GradScaler"""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """torch's fused attention; eager: products and a softmax, several times faster on a CPU for short sequences in
    bf16"""
    activation_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them"""
    compile: bool = False
    """torch.compile the model"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one and galore_rrf has kernels for it"""
    threads: PositiveInt | None = None
    """CPU threads; else torch's choice"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """of initial weights and data order"""

    eval_every: PositiveInt = 100
    """steps between validations; the last step is always validated"""
    eval_tokens: PositiveInt = 50_000
    """tokens predicted in a validation, always the same ones"""
    save_every: PositiveInt = 100
    """steps between checkpoints; the last step is always saved"""
    keep: PositiveInt = 2
    """checkpoints kept"""
    tensorboard: bool = False
    """log for TensorBoard too"""
    diagnostics_every: PositiveInt | None = 10
    """steps between looks at which subspaces were refreshed, for diagnostics.jsonl; null: none"""
    spectra_at: list[NonNegativeInt] = []
    """steps whose singular values are saved: 0,10,100,1000"""
    spectra_layers: list[str] = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"]
    """of the matrices with one of these in their names"""

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                f"exactly one of steps ({self.steps}) and minutes ({self.minutes}) must be given"
            )
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is no multiple of micro_batch {self.micro_batch}")
        if self.warmup + (self.cooldown if self.schedule == "constant" else 0) > 1:
            raise ValueError(f"warmup {self.warmup} and cooldown {self.cooldown} are more than the whole run")
        if self.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"sequence_length {self.sequence_length} is over model.max_position_embeddings "
                f"{self.model.max_position_embeddings}"
            )
        if self.dataset is not None and self.data:
            raise ValueError("only one of data and dataset can be given")
        return self

    @property
    def pass_size(self) -> int:
        """Sequences that one forward and backward pass holds."""
        return self.micro_batch or self.batch

    def without_effect(self) -> list[str]:
        """What is set and does nothing here, in sentences."""
        lines = []
        if unused := self.optimizer.without_effect():
            lines.append(f"optimizer {self.optimizer.name} has no use for {', '.join(unused)}")
        if self.schedule == "cosine" and self.cooldown != type(self).model_fields["cooldown"].default:
            lines.append("the cosine schedule has no use for cooldown")
        held_out = type(self).model_fields["held_out"].default
        if self.dataset is not None and self.dataset.held_out_split and self.held_out != held_out:
            lines.append("a dataset with a held_out_split has no use for held_out")
        if self.steps is not None and (late := [step for step in self.spectra_at if step >= self.steps]):
            lines.append(f"spectra_at {', '.join(map(str, late))}: the run has {self.steps} steps")
        return lines
