"""Tokenizers: a byte-level BPE trained on the text, or one that is given."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from pretrain.data.text import Document
from pretrain.errors import UserError

END_OF_TEXT = "<|endoftext|>"
USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
SMALLEST = 257
"""All bytes and the end of text."""
SAMPLE = 100_000_000
"""Bytes of text that a tokenizer is trained on at most; more takes long and hardly changes it."""


class Vocabulary(NamedTuple):
    tokenizer: Tokenizer
    end_of_text: int

    @property
    def json(self) -> str:
        """tokenizer.json"""
        return self.tokenizer.to_str(pretty=True)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.tokenizer.get_vocab().values())


def check_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST:
        raise UserError(
            f"Invalid model.vocab_size: {vocab_size} (at least {SMALLEST}, the bytes and the end of text, "
            "unless a tokenizer is given)"
        )


def train(documents: Iterator[Document], vocab_size: int) -> Vocabulary:
    """A byte-level BPE of exactly `vocab_size` tokens; the same for the same text."""
    check_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a token that occurs once has nothing to be learnt from
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,  # it would show on no terminal too
    )
    size = 0

    def texts() -> Iterator[str]:
        nonlocal size
        with tqdm(desc="training the tokenizer", unit="B", unit_scale=True, disable=None) as bar:
            for document in documents:
                size += (added := len(document.text.encode()))
                bar.update(added)
                yield document.text
                if size >= SAMPLE:
                    return

    tokenizer.train_from_iterator(texts(), trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise UserError(
            f"Invalid model.vocab_size: {vocab_size} ({size:,} bytes of training text give at most {found} tokens; "
            "lower it or give more text)"
        )
    return Vocabulary(tokenizer, tokenizer.get_vocab()[END_OF_TEXT])


def load(name: str) -> Vocabulary:
    """A tokenizer.json, or a folder or hub name through transformers."""
    path = Path(name).expanduser()
    try:
        if path.is_file():
            tokenizer, end = Tokenizer.from_file(str(path)), None
        else:
            from transformers import AutoTokenizer  # takes seconds

            auto = AutoTokenizer.from_pretrained(path if path.is_dir() else name)
            tokenizer, end = auto.backend_tokenizer, auto.eos_token_id
    except Exception as error:  # tokenizers raises just this; transformers all sorts
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        tried = "on this machine" if path.exists() else "neither on this machine nor on the Hugging Face hub"
        raise UserError(
            f"Invalid tokenizer: {name!r} cannot be loaded, {tried}: {reason} (allowed are a tokenizer.json, "
            "and the folder or hub name of a tokenizer that has one)"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if end is None:
        ends = (tokenizer.token_to_id(token) for token in USUAL_ENDS)
        end = next((token for token in ends if token is not None), None)
    if end is None:
        raise UserError(
            f"Invalid tokenizer: {name!r} has no token for the end of text (known are {', '.join(USUAL_ENDS)})"
        )
    return Vocabulary(tokenizer, end)
