"""The tokens of a run, memory-mapped."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pretrain.config import Config
from pretrain.data import vocabulary
from pretrain.data.encode import FILES, META, SIDES, TOKENIZER, check_vocabulary, tokens_path, write_entry
from pretrain.data.stream import Stream
from pretrain.data.text import LocalText, local_files, standard_library
from pretrain.data.vocabulary import Vocabulary
from pretrain.errors import UserError

FORMAT = 1
"""Part of every key: raise it when other files, or other tokens, come of the same text."""

UNFINISHED = "unfinished-"
DAY = 24 * 3600

Tokens = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Corpus:
    """Text as tokens.

    Attributes:
        train: documents one after the other, each followed by the end-of-text token; memory-mapped.
        held_out: the same of other documents, which never occur in `train`.
        tokenizer: which made them.
        description: source, hashes and sizes, for JSON.
        folder: the entry of the cache.
        files: sha256 of its text, and name, of every file; the lines are those of sha256sum.
    """

    train: Tokens
    held_out: Tokens
    tokenizer: Tokenizer
    description: dict[str, Any]
    folder: Path

    @property
    def files(self) -> Path:
        return self.folder / FILES


def load_corpus(config: Config) -> Corpus:
    """From the cache; what is not there is tokenised first.  UserError."""
    source: LocalText | Stream
    if config.dataset is not None:
        source = Stream(config.dataset, config.held_out)
    elif config.data:
        source = local_files(config.data, config.held_out)
    else:
        source = standard_library(config.held_out)
    if config.tokenizer is None:
        vocabulary.check_size(config.model.vocab_size)
        given, tokenizer = None, f"BPE {config.model.vocab_size}"
    else:
        given = vocabulary.load(config.tokenizer)
        tokenizer = f"{given.sha256} {given.end_of_text}"
    key = json.dumps([FORMAT, source.identity(), tokenizer])
    name = f"{source.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder = config.cache.expanduser().absolute() / name
    if not os.path.isdir(folder):
        _make_entry(folder, source, given, config)
    return _open_entry(folder, config)


def _make_entry(folder: Path, source: LocalText | Stream, given: Vocabulary | None, config: Config) -> None:
    """In a folder of its own, put in place when it is whole."""
    cache = folder.parent
    temporary = cache / f"{UNFINISHED}{uuid.uuid4().hex}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(cache)
        temporary.mkdir()
        write_entry(temporary, source, given, config)
        temporary.replace(folder)
    except OSError as error:
        if folder.is_dir():  # another process was first
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left for tokens in the cache {cache}: free some, or name another folder with --cache"
            ) from error
        raise UserError(
            f"Invalid cache: {str(cache)!r} cannot be written to ({error.strerror or error}); "
            "name another folder with --cache"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_unfinished(cache: Path) -> None:
    """Those of killed processes: a live one has written to its own within the day."""
    for folder in cache.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > DAY:
                shutil.rmtree(folder)


def _open_entry(folder: Path, config: Config) -> Corpus:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        for name, size in meta["sizes"].items():
            if (found := (folder / name).stat().st_size) != size:
                raise ValueError(f"{name} has {found} bytes, not {size}")
        description, dtype = meta["description"], np.dtype(meta["dtype"])
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} in the cache is damaged ({error}): delete this folder and start again"
        ) from error
    check_vocabulary(description["largest_token"], config)
    _check_lengths(description, config)
    train, held_out = (np.memmap(tokens_path(folder, side), dtype, "r") for side in SIDES)
    return Corpus(train, held_out, tokenizer, description | {"file_list": str(folder / FILES)}, folder)


def _check_lengths(description: dict[str, Any], config: Config) -> None:
    length = config.sequence_length
    needed = math.ceil(config.eval_tokens / length) * length + 1
    if (found := description["held_out_tokens"]) < needed:
        more = (
            f"raise held_out ({config.held_out})"
            if config.dataset is None or config.dataset.held_out_split is None
            else f"raise dataset.held_out_tokens ({config.dataset.held_out_tokens})"
        )
        raise UserError(
            f"Invalid eval_tokens: {config.eval_tokens} (in sequences of {length} they need {needed} held-out tokens, "
            f"there are {found}: {more}, lower eval_tokens, or give more text)"
        )
    if (found := description["train_tokens"]) <= length:
        raise UserError(
            f"Invalid sequence_length: {length} (a sequence needs {length + 1} tokens, the training text has {found}: "
            "lower it or give more text)"
        )
