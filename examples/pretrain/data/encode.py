"""Documents to tokens: the files of one entry of the cache."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from pretrain.config import Config
from pretrain.data import vocabulary
from pretrain.data.stream import Stream
from pretrain.data.text import Document, LocalText, Part, held_out_by_content
from pretrain.data.vocabulary import Vocabulary
from pretrain.errors import UserError

TOKENIZER, FILES, META = "tokenizer.json", "files.txt", "meta.json"
SIDES = "train", "held_out"
BATCH = 2 << 20
"""Characters encoded at once, on all cores; an encoding in memory is 50 times as large as its text."""


def tokens_path(folder: Path, side: str) -> Path:
    return folder / f"{side}.bin"


def write_entry(folder: Path, source: LocalText | Stream, given: Vocabulary | None, config: Config) -> None:
    """Trains the tokenizer unless one is given, encodes all text, and says in meta.json what it was."""
    if given is None:
        sample = source.sample(vocabulary.SAMPLE)
        if (first := next(sample, None)) is None:
            raise _no_text(source)
        words = vocabulary.train(itertools.chain([first], sample), config.model.vocab_size)
    else:
        words = given
    (folder / TOKENIZER).write_text(words.json, encoding="utf-8")
    with ExitStack() as stack:
        names = {FILES: FILES} | {side: tokens_path(folder, side).name for side in SIDES}
        files = {key: stack.enter_context(open(folder / name, "wb")) for key, name in names.items()}
        encoder = _Encoder(files, words, config)
        for part in source.parts():
            encoder.encode(part, source.size)
        encoder.end_file()
    if not encoder.written["train"]["documents"]:
        raise _no_text(source)
    description = {
        "source": source.source,
        **encoder.description(),
        "skipped_files": sorted(source.skipped),
        "tokenizer": config.tokenizer or "byte-level BPE, trained on the training part",
        "tokenizer_sha256": words.sha256,
        "vocab_size": words.tokenizer.get_vocab_size(),
        "end_of_text": words.end_of_text,
        "largest_token": encoder.largest,
    }
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    meta = {"description": description, "dtype": encoder.dtype.str, "sizes": sizes}
    (folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _no_text(source: LocalText | Stream) -> UserError:
    return UserError(f"Invalid data: no text to train on in {source.source}")


class _Encoder:
    """Writes tokens of both sides, and adds up what the description tells."""

    def __init__(self, files: Mapping[str, BinaryIO], words: Vocabulary, config: Config) -> None:
        self.dtype = np.dtype("<u2" if words.size <= 1 << 16 else "<u4")
        self.largest = words.end_of_text
        self.written = {side: {"documents": 0, "bytes": 0, "tokens": 0} for side in SIDES}
        self._files, self._words, self._config = files, words, config
        self._origin, self._origins, self._dropped = "", 0, 0
        self._text, self._file_text = hashlib.sha256(), hashlib.sha256()
        self._held_out = set[bytes]()
        words.tokenizer.encode_special_tokens = True  # in text they are text
        self._check_in_vocabulary(words.end_of_text)

    def encode(self, part: Part, size: int | None) -> None:
        """`size`: in bytes, of all text, for the progress bar."""
        kept = self.written["held_out" if part.held_out else "train"]
        unit, total = ("B", size) if part.tokens is None else ("token", part.tokens)
        with tqdm(desc="tokenising", unit=unit, total=total, unit_scale=True, disable=None) as bar:
            for batch in _batches(part.documents):
                texts = [document.text for document in batch]
                encodings = self._words.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                for document, encoding in zip(batch, encodings, strict=True):
                    self._write(document, encoding.ids, part.held_out)
                    if part.tokens is not None and kept["tokens"] >= part.tokens:
                        return
                bar.update(sum(map(len, texts)) if part.tokens is None else kept["tokens"] - bar.n)

    def description(self) -> dict[str, Any]:
        both = ("documents", "bytes")
        return {
            "files": self._origins,
            **{key: sum(self.written[side][key] for side in SIDES) for key in both},
            "sha256": self._text.hexdigest(),
            **{f"{side}_{key}": n for side in SIDES for key, n in self.written[side].items()},
            "dropped_documents": self._dropped,
        }

    def _write(self, document: Document, ids: list[int], held_out: bool | None) -> None:
        if held_out is None:
            held_out = held_out_by_content(document.digest, self._config.held_out)
        elif held_out:
            self._held_out.add(document.digest)
        elif document.digest in self._held_out:
            self._dropped += 1
            return
        tokens = np.array([*ids, self._words.end_of_text], self.dtype)
        self._check_in_vocabulary(int(tokens.max()))
        side = SIDES[held_out]
        self._files[side].write(tokens.data)
        text = document.text.encode()
        for key, n in {"documents": 1, "bytes": len(text), "tokens": len(tokens)}.items():
            self.written[side][key] += n
        self._text.update(text)
        if document.origin != self._origin:
            self.end_file()
            self._origin = document.origin
        self._file_text.update(text)

    def end_file(self) -> None:
        """Lists the file that documents came from up to here, with a line as of sha256sum."""
        if self._origin:
            self._files[FILES].write(os.fsencode(f"{self._file_text.hexdigest()}  {self._origin}\n"))
            self._origins += 1
            self._file_text = hashlib.sha256()

    def _check_in_vocabulary(self, token: int) -> None:
        self.largest = max(self.largest, token)
        check_vocabulary(self.largest, self._config)


def check_vocabulary(largest: int, config: Config) -> None:
    if largest >= config.model.vocab_size:
        raise UserError(
            f"Invalid model.vocab_size: {config.model.vocab_size} (the text has token {largest} of tokenizer "
            f"{config.tokenizer!r}; more than that is needed)"
        )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
