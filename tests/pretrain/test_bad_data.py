"""Text, tokenizers and caches that cannot be used: a sentence, and nothing written."""

import gzip
import hashlib
import os
import sys
from pathlib import Path

import pytest
from corpora import configuration, load, offline, texts, write_folder, write_lines
from pretrain.config import DatasetConfig
from pretrain.data import corpus as corpus_module
from pretrain.data import encode
from pretrain.data.text import held_out_by_content
from pretrain.errors import UserError


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def among_text(folder, name, data):
    """A folder of text with one other file in it."""
    write(write_folder(folder, texts(60)) / name, data)
    return folder


GOOD = b'{"text": "good"}\n'
PACKED = gzip.compress("\n".join(texts(60)).encode())

# What makes the text in a folder (its path is given as data), and the sentence.
BAD_TEXT = {
    "missing": (lambda f: f / "x", r"Invalid data: '.*/x' does not exist"),
    "empty_folder": (lambda f: write_folder(f / "x", []), r"'.*/x' is a folder without files"),
    "only_hidden": (lambda f: write(f / "x" / ".a", b"a").parent, r"'.*/x' is a folder without files"),
    "empty_files": (lambda f: write_folder(f / "x", ["", ""]), r"no text to train on in data: .*/x"),
    "pipe": (lambda f: os.mkfifo(f / "x") or f / "x", r"'.*/x' is neither a file nor a folder"),
    "null_byte": (
        lambda f: write(f / "x", b"a\0b"),
        r"'.*/x' is binary \(allowed are UTF-8 text and JSON lines",
    ),
    "latin": (lambda f: write(f / "x.txt", "é".encode("latin-1")), r"'.*/x.txt' is binary"),
    "utf16": (lambda f: write(f / "x.txt", "abc".encode("utf-16")), r"'.*/x.txt' is binary"),
    "late_byte": (lambda f: write(f / "x", 600_000 * b"a " + b"\xff"), r"'.*/x' is binary"),
    "binary_in_folder": (lambda f: among_text(f / "x", "y.png", b"\x89PNG"), r"'.*/x/y.png' is binary"),
    "no_gzip": (
        lambda f: write(f / "x.gz", b"text"),
        r"'.*/x.gz' is a damaged gzip file \(Not a gzipped file",
    ),
    "cut_gzip": (
        lambda f: write(f / "x.gz", PACKED[:-9]),
        r"'.*/x.gz' is a damaged gzip file \(.*ended before",
    ),
    "bad_gzip": (
        lambda f: write(f / "x.gz", PACKED[:400] + b"****" + PACKED[404:]),
        r"'.*/x.gz' is a damaged gzip file",
    ),
    "no_json": (
        lambda f: write(f / "x.jsonl", GOOD + b"\n{"),
        r"line 3 of '.*/x.jsonl' is no JSON object with",
    ),
    "no_object": (
        lambda f: write(f / "x.json", GOOD + b"[1]\n"),
        r"line 2 of '.*/x.json' is no JSON object with",
    ),
    "no_text": (lambda f: write(f / "x.jsonl", b'{"txt": "a"}'), r"line 1 of .* with a string \"text\""),
    "number": (lambda f: write(f / "x.jsonl", b'{"text": 3}'), r"line 1 of .* with a string \"text\""),
    "half_pair": (
        lambda f: write(f / "x.jsonl", b'{"text": "\\ud800"}'),
        r"line 1 of .* with a string \"text\"",
    ),
    "deep": (lambda f: write(f / "x.jsonl", 99999 * b"["), r"line 1 of .* with a string \"text\""),
    "binary_json": (lambda f: write(f / "x.jsonl", b'{"text": "\xff"}'), r"'.*/x.jsonl' is binary"),
}


@pytest.mark.parametrize(("make", "message"), BAD_TEXT.values(), ids=BAD_TEXT)
def test_bad_text(tmp_path, make, message):
    """Guards against a traceback, and against half an entry in the cache."""
    with pytest.raises(UserError, match=message):
        load(tmp_path / "cache", make(tmp_path))
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_unreadable_text(tmp_path, monkeypatch):
    """Permission is refused by hand, since root is refused nothing."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    folder = write_folder(tmp_path / "data", texts(60))
    monkeypatch.setattr("pretrain.data.text.open", refuse, raising=False)
    with pytest.raises(UserError, match=r"Invalid data: '.*/0000.txt' cannot be read \(Permission denied\)"):
        load(tmp_path / "cache", folder)
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match=r"Invalid data: '.*/data' cannot be read \(Permission denied\)"):
        load(tmp_path / "cache", folder)


def test_python_without_source(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(
        UserError, match=r"no source of its standard library in .*: name other text with --data"
    ):
        load(tmp_path / "cache")


# Options beside 60 short texts.
BAD_SIZES = {
    "vocabulary_for_text": (
        {"vocab_size": 5000},
        r"model.vocab_size: 5000 \([\d,]+ bytes .* give at most \d+ tokens",
    ),
    "vocabulary_for_bytes": ({"vocab_size": 256}, r"Invalid model.vocab_size: 256 \(at least 257"),
    "held_out": (
        {"eval_tokens": 99_999},
        r"Invalid eval_tokens: 99999 \(in sequences of 8 they need 100001 held-out tokens, there are \d+: "
        r"raise held_out \(0.2\), lower eval_tokens, or give more text\)",
    ),
    "nothing_held_out": ({"held_out": 1e-9}, r"need 17 held-out tokens, there are 0"),
    "sequence": (
        {"sequence_length": 1000, "eval_tokens": 1, "held_out": 0.5, "texts": 7, "vocab_size": 257},
        r"Invalid sequence_length: 1000 \(a sequence needs 1001 tokens, the training text has \d+",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_SIZES.values(), ids=BAD_SIZES)
def test_too_little_text(tmp_path, options, message):
    """Guards against validating on a few words, and a vocabulary that is larger than what there is to learn."""
    options = dict(options)
    data = write_lines(tmp_path / "d.jsonl", texts(options.pop("texts", 60)))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "cache", data, **options)


def test_all_text_held_out(tmp_path):
    some = [t for t in texts(60) if held_out_by_content(hashlib.sha256(t.encode()).digest(), 0.2)]
    data = write_lines(tmp_path / "d.jsonl", some)
    for tokenizer in None, bytes_tokenizer(tmp_path):
        with pytest.raises(UserError, match=r"no text to train on in data: .*/d.jsonl"):
            load(tmp_path / "cache", data, tokenizer=tokenizer)


def bytes_tokenizer(folder):
    return str(load(folder / "other", write_lines(folder / "o.jsonl", texts(60))).folder / "tokenizer.json")


# --- Tokenizers ---------------------------------------------------------------------------------------


def test_tokenizers_that_are_none(tmp_path, monkeypatch):
    """Guards against a traceback out of tokenizers or transformers."""
    data = write_lines(tmp_path / "d.jsonl", texts(60))
    (tmp_path / "t.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    offline(monkeypatch, tmp_path)
    tokenizers = {
        str(tmp_path / "t.json"): r"Invalid tokenizer: '.*t.json' cannot be loaded, on this machine: ",
        str(tmp_path / "empty"): r"Invalid tokenizer: '.*empty' cannot be loaded, on this machine: ",
        "no/such": r"'no/such' cannot be loaded, neither on this machine nor on the Hugging Face hub: .*"
        r"\(allowed are a tokenizer.json, and the folder or hub name",
    }
    for name, message in tokenizers.items():
        with pytest.raises(UserError, match=message):
            load(tmp_path / "cache", data, tokenizer=name)
    assert not (tmp_path / "cache").exists()


def test_tokenizer_without_end_of_text(tmp_path):
    path = Path(bytes_tokenizer(tmp_path)).rename(tmp_path / "t.json")
    path.write_text(path.read_text().replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(
        UserError, match=r"Invalid tokenizer: '.*t.json' has no token for the end of text \(known are"
    ):
        load(tmp_path / "cache", tmp_path / "o.jsonl", tokenizer=str(path))


# --- Cache --------------------------------------------------------------------------------------------


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """Guards against a traceback for a folder without permission (here: below a file, for root)."""
    data = write_lines(tmp_path / "d.jsonl", texts(60))
    message = (
        r"Invalid cache: '.*d.jsonl/cache' cannot be written to \(Not a directory\); name another folder with"
    )
    with pytest.raises(UserError, match=message):
        load(data / "cache", data)


@pytest.mark.parametrize("name", ["train.bin", "held_out.bin", "files.txt"])
def test_full_disk(tmp_path, monkeypatch, name):
    """Guards against a traceback, and against an entry that is cut short and looks whole."""

    def full(path, mode):
        return open("/dev/full" if path.name == name else path, mode)

    data = write_lines(tmp_path / "d.jsonl", texts(60))
    monkeypatch.setattr(encode, "open", full, raising=False)
    with pytest.raises(
        UserError, match=r"no space left for tokens in the cache .*/cache: free some, or name"
    ):
        load(tmp_path / "cache", data)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("name", ["train.bin", "held_out.bin", "tokenizer.json", "files.txt", "meta.json"])
@pytest.mark.parametrize(
    "damage", [lambda p: p.unlink(), lambda p: os.truncate(p, 10)], ids=["removed", "cut"]
)
def test_damaged_entry(tmp_path, name, damage):
    """Guards against training on what is left of the text."""
    config = configuration(tmp_path / "cache", write_lines(tmp_path / "d.jsonl", texts(60)))
    folder = corpus_module.load_corpus(config).folder
    damage(folder / name)
    with pytest.raises(
        UserError, match=rf"{folder} in the cache is damaged \(.*\): delete this folder and start"
    ):
        corpus_module.load_corpus(config)


# --- Streams ------------------------------------------------------------------------------------------

BAD_STREAMS = {
    "file": ({"data_files": "{f}/nothing"}, r"split 'train' of 'json' cannot be read: Unable to find"),
    "column": ({"text": "body"}, r"Invalid dataset.text: 'body' is no column of 'json' \(it has id, text\)"),
    "no_string": (
        {"text": "id"},
        r"Invalid dataset.text: column 'id' of 'json' holds int, no string, in row 0",
    ),
    "split": (
        {"held_out_split": "validation"},
        r"split 'validation' of 'json' cannot be read: Bad split: validation.*; dataset.held_out_split: null holds out",
    ),
    "offline": ({"path": "no/such"}, r"split 'train' of 'no/such' cannot be read: Couldn't reach"),
    "not_json": ({"data_files": "{f}/bad.jsonl"}, r"split 'train' of 'json' cannot be read: "),
    "few": ({"tokens": 5}, r"Invalid model.vocab_size: 320 "),
}


@pytest.mark.parametrize(("fields", "message"), BAD_STREAMS.values(), ids=BAD_STREAMS)
def test_bad_streams(tmp_path, monkeypatch, fields, message):
    """Guards against a traceback of fifty lines for a misspelt name or a machine without network."""
    offline(monkeypatch, tmp_path)
    data = write_lines(tmp_path / "d.jsonl", texts(60))
    (tmp_path / "bad.jsonl").write_bytes(GOOD + b'{"text": 3\n')
    fields = {"path": "json", "data_files": str(data), "held_out_split": None} | fields
    fields["data_files"] = fields["data_files"].format(f=tmp_path)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "cache", dataset=DatasetConfig(**fields))
    assert list((tmp_path / "cache").iterdir()) == []


def test_held_out_split_too_small(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    (tmp_path / "data").mkdir()
    for split in "train", "validation":
        write_lines(tmp_path / "data" / f"{split}.jsonl", texts(60, len(split)))
    dataset = DatasetConfig(path=str(tmp_path / "data"), held_out_tokens=100)
    with pytest.raises(UserError, match=r"raise dataset.held_out_tokens \(100\), lower eval_tokens"):
        load(tmp_path / "cache", dataset=dataset, eval_tokens=50_000)


def test_without_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="cannot be read: import of datasets halted"):
        load(tmp_path / "cache", dataset=DatasetConfig(path="json"))
