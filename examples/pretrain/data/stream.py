"""Documents of a text dataset, streamed through the `datasets` library."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from pretrain.config import DatasetConfig
from pretrain.data.text import Document, Part, held_out_by_content, make_documents
from pretrain.errors import UserError

BYTES_PER_TOKEN = 4
"""Of English, about."""


class Stream:
    """Read once, in order; the attributes are those of LocalText."""

    size = None

    def __init__(self, config: DatasetConfig, share: float) -> None:
        """`share`: held out of the training split, if there is no split for that."""
        self._config, self._share = config, share
        self._head: list[Document] = []
        self.name = Path(config.path).stem or "dataset"
        self.source = " ".join(
            filter(None, ["dataset:", config.path, config.name, config.data_files, config.split])
        )
        self.skipped = set[str]()

    def identity(self) -> dict[str, object]:
        """The configuration; also which files these are, as far as they are on this machine."""
        config = self._config
        files = glob.glob(config.data_files, recursive=True) if config.data_files else []
        files += [str(p) for p in Path(config.path).rglob("*")] if os.path.isdir(config.path) else []
        stats = [(file, os.stat(file)) for file in sorted(files) if os.path.isfile(file)]
        return {
            "dataset": config.model_dump(),
            "files": [(os.path.realpath(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats],
            "held_out": self._share if config.held_out_split is None else None,
        }

    def sample(self, size: int) -> Iterator[Document]:
        """The first `size` bytes of the training side, but not much more than what is kept of it."""
        left = min(size, BYTES_PER_TOKEN * self._config.tokens)
        while left > 0 and (document := next(self._train, None)) is not None:
            self._head.append(document)
            if not self._is_held_out(document):
                left -= len(document.text.encode())
                yield document

    def parts(self) -> Iterator[Part]:
        """The held-out split first, so that what is in it can be left out of training."""
        config, train = self._config, itertools.chain(self._head, self._train)
        if config.held_out_split is None:
            yield Part(train, None, config.tokens)
        else:
            yield Part(self._documents(config.held_out_split), True, config.held_out_tokens)
            yield Part(train, False, config.tokens)

    def _is_held_out(self, document: Document) -> bool:
        return self._config.held_out_split is None and held_out_by_content(document.digest, self._share)

    @cached_property
    def _train(self) -> Iterator[Document]:
        return self._documents(self._config.split)

    def _documents(self, split: str) -> Iterator[Document]:
        column = self._config.text
        for number, row in enumerate(self._rows(split)):
            if column not in row:
                raise UserError(
                    f"Invalid dataset.text: {column!r} is no column of {self._config.path!r} (it has {', '.join(row)})"
                )
            text = row[column]
            if isinstance(text, str):
                yield from make_documents([text], split)
            elif text is not None:
                raise UserError(
                    f"Invalid dataset.text: column {column!r} of {self._config.path!r} holds "
                    f"{type(text).__name__}, no string, in row {number} of split {split!r}"
                )

    def _rows(self, split: str) -> Iterator[dict[str, object]]:
        config = self._config
        try:
            import datasets  # takes seconds

            yield from datasets.load_dataset(
                config.path, config.name, data_files=config.data_files, split=split, streaming=True
            )
        except Exception as error:  # of any kind, by the format and the place of the data
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            hint = (
                "; dataset.held_out_split: null holds out a part of the training split"
                if split == config.held_out_split != config.split
                else ""
            )
            raise UserError(
                f"Invalid dataset: split {split!r} of {config.path!r} cannot be read: {reason}{hint}"
            ) from error
