"""Fine-tunes a causal language model with the Hugging Face Trainer and galore_rrf's optimizer.

    python examples/finetune_hf.py                                          offline, for a minute: see below
    python examples/finetune_hf.py --model HuggingFaceTB/SmolLM2-135M --data my_text.txt
    python examples/finetune_hf.py --resume                                 goes on from the last checkpoint

Without --model it trains a small Llama with random weights, without --data on the source of some modules of Python's
standard library: enough to see that all works, and nothing about fine-tuning.
"""

from __future__ import annotations

import argparse
import os
from itertools import chain
from pathlib import Path
from typing import Any

STANDARD_LIBRARY = Path(os.__file__).parent


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_argument_group("what is trained, on what")
    what.add_argument("--model", metavar="NAME", help="causal language model: of the hub, or a folder")
    what.add_argument(
        "--data",
        metavar="TEXT",
        help='text file; .jsonl file with a "text" in each line; data set of the hub with a column "text"',
    )
    what.add_argument(
        "--length", type=positive, default=128, metavar="N", help="tokens of a sequence (%(default)s)"
    )
    what.add_argument(
        "--out", type=Path, default=Path("runs/finetune"), metavar="DIR", help="to save in (%(default)s)"
    )
    what.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--steps", type=positive, default=200, metavar="N", help="of the optimizer (%(default)s)"
    )
    how.add_argument("--batch", type=positive, default=8, metavar="N", help="sequences at once (%(default)s)")
    how.add_argument(
        "--accumulate", type=positive, default=1, metavar="N", help="batches a step (%(default)s)"
    )
    how.add_argument("--bf16", action="store_true", help="compute in bf16; weights stay in fp32")
    how.add_argument("--lr", type=float, metavar="X", help="peak learning rate (2e-5; without --model 5e-3)")
    how.add_argument("--plain-lr", type=float, metavar="X", help="that of what is not projected (as --lr)")
    how.add_argument(
        "--weight-decay", type=float, default=0.0, metavar="X", help="but of norms and biases (%(default)s)"
    )
    how.add_argument("--adamw", action="store_true", help="the Trainer's own AdamW instead, to compare")
    how.add_argument("--rank", type=int, default=32, metavar="N", help="of the subspaces (%(default)s)")
    how.add_argument(
        "--update-proj-gap", type=int, default=10, metavar="N", help="steps between refreshes (%(default)s)"
    )
    how.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="factor on projected updates (%(default)s)"
    )
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} (must be a positive integer)")
    return int(text)


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def load_text(name: str | None) -> Any:
    """A data set with a column "text"."""
    from datasets import Dataset, load_dataset

    if name is None:
        paths = sorted(STANDARD_LIBRARY.glob("*.py"))[:60]
        sources = [path.read_text(encoding="utf-8") for path in paths]
        return Dataset.from_dict({"text": sources})
    if name.endswith((".json", ".jsonl")):
        texts = load_dataset("json", data_files=name, split="train")
    elif Path(name).is_file():
        texts = load_dataset("text", data_files=name, sample_by="document", split="train")
    else:
        texts = load_dataset(name, split="train")
    if "text" not in texts.column_names:
        raise ValueError(f'there is no "text" among {", ".join(texts.column_names)}')
    return texts


def load_model(name: str) -> tuple[Any, Any]:
    """A model, its weights in fp32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(
        name
    )


def make_model(texts: list[str]) -> tuple[Any, Any]:
    """A Llama of a million random weights, and a tokenizer trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def sequences(texts: Any, tokenizer: Any, length: int) -> Any:
    """The texts as tokens, each followed by the end of text, cut into sequences of `length`."""

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = list(
            chain.from_iterable((*t, tokenizer.eos_token_id) for t in tokenizer(batch["text"]).input_ids)
        )
        parts = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        return {"input_ids": parts, "labels": parts}

    return texts.map(cut, batched=True, remove_columns=texts.column_names)


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()

    # Seconds, which --help and wrong options need not wait.
    import torch
    from datasets.exceptions import DatasetsError
    from transformers import Trainer, TrainingArguments, default_data_collator, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    import galore_rrf
    from galore_rrf.compat.huggingface import galore_optimizer

    lr = options.lr if options.lr is not None else 2e-5 if options.model else 5e-3
    args = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        bf16=options.bf16,
        learning_rate=lr,
        weight_decay=options.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        logging_steps=max(1, options.steps // 10),
        save_steps=max(1, options.steps // 4),
        save_total_limit=2,
        use_cpu=not torch.cuda.is_available() or "cuda" not in galore_rrf.build_info(),
    )
    set_seed(args.seed)  # before a model is made
    try:
        galore = galore_optimizer(
            args,
            rank=options.rank,
            update_proj_gap=options.update_proj_gap,
            scale=options.scale,
            plain_lr=options.plain_lr,
        )
    except ValueError as error:
        parser.error(str(error))
    if options.resume and not (options.out.is_dir() and get_last_checkpoint(str(options.out))):
        parser.error(f"there is no checkpoint in {options.out} to --resume from")
    try:
        texts = load_text(options.data)
    except (DatasetsError, OSError, ValueError) as error:
        parser.error(f"cannot read --data {options.data}: {first_line(error)}")
    try:
        model, tokenizer = load_model(options.model) if options.model else make_model(texts["text"][:20])
    except (OSError, ValueError) as error:
        parser.error(f"cannot load --model {options.model}: {first_line(error)}")
    data = sequences(texts, tokenizer, options.length)
    if len(data) < 10:
        parser.error(f"--data has {len(data)} sequences of {options.length} tokens (at least 10 are needed)")
    data = data.train_test_split(test_size=min(len(data) // 10, 200), seed=0)
    print(
        f"model: {options.model or 'made on the spot, random weights'}; {model.num_parameters():,} parameters"
    )
    print(f"text: {options.data or STANDARD_LIBRARY}; {len(data['train']):,} sequences to train on")

    trainer = Trainer(
        model,
        args,
        data_collator=default_data_collator,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=None if options.adamw else galore,  # the line
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=options.resume or None)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(f"held-out loss: {before:.3f} before, {after:.3f} after {trainer.state.global_step} steps")
    print(f"optimizer state: {galore_rrf.state_bytes(trainer.optimizer):,} bytes")
    print(f"saved: {options.out}")


if __name__ == "__main__":
    main()
