"""Documents: text of files on this machine, in pieces, each on the training or the held-out side by its content."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from pretrain.errors import UserError

PIECE = 16 * 1024
"""Characters of the longest document; longer text is cut, and each piece is a document of its own.

Much longer than the sequences trained on, yet a single novel has enough of them for a part to be held out."""

CHUNK = 1 << 20
"""Characters read at once."""

OUTSIDE_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """Text that ends with the end-of-text token, never empty."""

    text: str
    digest: bytes
    """sha256 of the text"""
    origin: str
    """the file it is from, as listed"""


class Part(NamedTuple):
    """Documents to be encoded one after the other."""

    documents: Iterator[Document]
    held_out: bool | None
    """which side they are on; None: by their content"""
    tokens: int | None
    """keep so many tokens of that side (None: of the training side), whole documents; None: all"""


def make_documents(chunks: Iterable[str], origin: str) -> Iterator[Document]:
    for text in pieces(chunks):
        yield Document(text, hashlib.sha256(text.encode()).digest(), origin)


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """The joined chunks in pieces of at most `PIECE` characters, which do not depend on the chunks' sizes.

    Cut after a paragraph or a line if one ends in a piece's second half; joined again they are the same text.
    """
    text = ""
    for chunk in chunks:
        text += chunk
        start = 0
        while len(text) - start > PIECE:
            end = _cut(text, start)
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


def _cut(text: str, start: int) -> int:
    for separator in ("\n\n", "\n"):
        found = text.rfind(separator, start + PIECE // 2, start + PIECE)
        if found >= 0:
            return found + len(separator)
    return start + PIECE


def held_out_by_content(digest: bytes, share: float) -> bool:
    """The same for equal texts, whatever their files are called and whatever else there is."""
    return int.from_bytes(digest[:8], "big") < share * 2**64


class LocalText:
    """Text of files, read as often as needed.

    Attributes:
        name: in short, for the folder in the cache.
        source: for people.
        skipped: files that were left out since they are no UTF-8, known after reading.
    """

    def __init__(self, name: str, source: str, files: dict[str, Path], share: float, skips: bool) -> None:
        """`files`: by the names they are listed with; `skips`: leave out what is no text instead of raising."""
        self.name, self.source, self.skipped = name, source, set[str]()
        self._files, self._share, self._skips = files, share, skips
        self._stats = {}
        for listed, path in files.items():
            with _errors_named(path):
                self._stats[listed] = path.stat()
        # Bytes of text, about: gzip packs it to a third.
        self.size = sum(
            stat.st_size * (3 if files[name].suffix == ".gz" else 1) for name, stat in self._stats.items()
        )

    def identity(self) -> dict[str, object]:
        """What the documents depend on, without reading them."""
        files = [
            (listed, str(path.resolve()), self._stats[listed].st_size, self._stats[listed].st_mtime_ns)
            for listed, path in self._files.items()
        ]
        return {"files": files, "held_out": self._share}

    def sample(self, size: int) -> Iterator[Document]:
        """About `size` bytes of the training side, from everywhere in it."""
        rate = min(1.0, size / max(1, self.size))
        for document in self._documents():
            if not held_out_by_content(document.digest, self._share) and (
                int.from_bytes(document.digest[8:16], "big") < rate * 2**64
            ):
                yield document

    def parts(self) -> Iterator[Part]:
        yield Part(self._documents(), None, None)

    def _documents(self) -> Iterator[Document]:
        for listed, path in self._files.items():
            if self._skips:
                with _errors_named(path):
                    data = path.read_bytes()
                try:
                    text = data.decode()
                except UnicodeDecodeError:
                    self.skipped.add(listed)
                else:
                    yield from make_documents([text], listed)
            elif Path(path.name.removesuffix(".gz")).suffix in (".json", ".jsonl"):
                for text in _json_lines(path):
                    yield from make_documents([text], listed)
            else:
                yield from make_documents(_plain_text(path), listed)


def standard_library(share: float) -> LocalText:
    """The source text of this Python's standard library, and nothing beside it."""
    root = Path(sysconfig.get_path("stdlib")).resolve()
    files = {
        name: path
        for name, path in _walk(root, lambda name: name in OUTSIDE_STDLIB)
        # A link may lead out, as sitecustomize.py does on Debian.
        if name.endswith(".py") and path.resolve().is_relative_to(root)
    }
    if not files:
        raise UserError(
            f"this Python has no source of its standard library in {root}: name other text with --data"
        )
    version = platform.python_version()
    return LocalText(f"python-{version}", f"standard library of Python {version}", files, share, skips=True)


def local_files(data: Sequence[Path], share: float) -> LocalText:
    """Files, and folders with all that is in them, but for names that begin with a dot."""
    files: dict[str, Path] = {}
    for path in map(Path.expanduser, data):
        with _errors_named(path):
            if path.is_dir():
                found = {
                    str(path / name): file for name, file in _walk(path, lambda name: name.startswith("."))
                }
            elif path.is_file():
                found = {str(path): path}
            else:
                problem = "is neither a file nor a folder" if path.exists() else "does not exist"
                raise UserError(f"Invalid data: {str(path)!r} {problem}")
        if not found:
            raise UserError(f"Invalid data: {str(path)!r} is a folder without files")
        files |= found
    source = "data: " + ", ".join(map(str, data))
    return LocalText("data", source, files, share, skips=False)


def _walk(root: Path, excluded: Callable[[str], bool]) -> list[tuple[str, Path]]:
    """Regular files below `root` by their paths from there, sorted."""

    def fail(error: OSError) -> None:
        raise error

    files = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not excluded(name)]
        files += [Path(folder, name) for name in names if not excluded(name)]
    return sorted((path.relative_to(root).as_posix(), path) for path in files if path.is_file())


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise _binary(path) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"Invalid data: {str(path)!r} is a damaged gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"Invalid data: {str(path)!r} cannot be read ({error.strerror or error})") from error


def _binary(path: Path) -> UserError:
    return UserError(
        f"Invalid data: {str(path)!r} is binary (allowed are UTF-8 text and JSON lines, also as .gz; "
        "move other files elsewhere)"
    )


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """As it is, line ends included, without a byte order mark."""
    opener = gzip.open if path.suffix == ".gz" else open
    with _errors_named(path), opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        yield file


def _plain_text(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        while chunk := file.read(CHUNK):
            if "\0" in chunk:
                raise _binary(path)
            yield chunk


def _json_lines(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                text.encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f'Invalid data: line {number} of {str(path)!r} is no JSON object with a string "text" '
                    "(allowed is one such object in each line)"
                ) from error
            yield text
