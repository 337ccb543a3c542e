"""From text to tokens: nothing lost, nothing on both sides, the same everywhere, made once."""

import gzip
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import configuration, contents, documents, load, offline, text, texts, write_folder, write_lines
from hypothesis import given
from hypothesis import strategies as st
from pretrain.config import DatasetConfig
from pretrain.data import corpus as corpus_module
from pretrain.data import encode, vocabulary
from pretrain.data import text as text_module
from pretrain.data.text import Document, held_out_by_content, local_files, pieces
from pretrain.errors import UserError
from tokenizers import Tokenizer, models, pre_tokenizers, processors

# --- Documents ----------------------------------------------------------------------------------------


@given(st.text(alphabet="ab \n\r", max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_pieces_are_the_text_whatever_it_was_read_in(whole, cuts):
    """Guards against text lost or repeated at the borders of pieces or of what is read at once."""
    ends = [0, *sorted(cuts), len(whole)]
    chunks = [whole[a:b] for a, b in itertools.pairwise(ends)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PIECE", 16)
        found = list(pieces(chunks))
        assert found == list(pieces([whole]))
    assert "".join(found) == whole
    assert all(0 < len(piece) <= 16 for piece in found)
    assert all(len(piece) > 8 for piece in found[:-1])


def test_pieces_end_with_paragraphs_or_lines(monkeypatch):
    monkeypatch.setattr(text_module, "PIECE", 16)
    assert list(pieces(["one ones\n\ntwo\ntwo two two\n" + 20 * "x"])) == [
        "one ones\n\n",
        "two\ntwo two two\n",
        16 * "x",
        4 * "x",
    ]


def test_tokens_are_the_text(tmp_path):
    """Guards against text that is lost, changed or moved on its way to the token files."""
    given_texts = [
        *texts(80),
        "\r\n\r mixed\r line\n ends \n\n",
        "emoji 🙂\u2028 and <|endoftext|> as text",
        "",
    ]
    corpus = load(tmp_path / "cache", write_folder(tmp_path / "data", given_texts))
    train, held_out = documents(corpus, "train"), documents(corpus, "held_out")
    assert sorted(train + held_out) == sorted(given_texts[:-1])
    assert train == [t for t in given_texts if t in set(train)], "not in the files' order"
    assert corpus.train.dtype == np.uint16
    assert not corpus.train.flags.writeable

    said = corpus.description
    assert said["train_tokens"] == len(corpus.train)
    assert said["held_out_tokens"] == len(corpus.held_out)
    assert (said["train_documents"], said["held_out_documents"]) == (len(train), len(held_out))
    whole = "".join(given_texts).encode()
    assert said["bytes"] == said["train_bytes"] + said["held_out_bytes"] == len(whole)
    assert said["sha256"] == hashlib.sha256(whole).hexdigest()
    assert (
        said["tokenizer_sha256"]
        == hashlib.sha256((corpus.folder / "tokenizer.json").read_bytes()).hexdigest()
    )
    assert json.loads(json.dumps(said)) == said


def test_list_of_files_is_one_of_sha256sum(tmp_path):
    """Guards against a list that does not tell on which files a curve was made."""
    folder = write_folder(tmp_path / "data", texts(50))
    (folder / "sub").mkdir()
    (folder / "sub" / "umlaut ü").write_text(text(50))
    (folder / os.fsdecode(b"no utf-8 \xff")).write_text(text(51))
    corpus = load(tmp_path / "cache", folder)
    assert corpus.files == Path(corpus.description["file_list"])
    assert corpus.description["files"] == 52
    said = subprocess.run(["sha256sum", "-c", corpus.files], capture_output=True, check=True).stdout
    assert said.count(b": OK\n") == 52


def test_one_long_file_has_a_held_out_part_of_about_the_share(tmp_path, monkeypatch):
    """Guards against a novel that is trained on as a whole, or held out as a whole."""
    monkeypatch.setattr(text_module, "PIECE", 1024)
    novel = "\n\n".join(texts(800))
    (tmp_path / "novel").write_text(novel)
    corpus = load(tmp_path / "cache", tmp_path / "novel", held_out=0.1)
    sides = {side: documents(corpus, side) for side in ("train", "held_out")}
    assert sorted(pieces([novel])) == sorted(sides["train"] + sides["held_out"])
    held_out, count = corpus.description["held_out_bytes"], corpus.description["documents"]
    assert count > 100
    share, sigma = held_out / corpus.description["bytes"], (0.1 * 0.9 / count) ** 0.5
    assert abs(share - 0.1) < 4 * sigma


def test_held_out_part_depends_on_content_alone(tmp_path):
    """Guards against text that moves between the sides when files are renamed, ordered anew, added or doubled."""
    some = texts(300)
    corpus = load(tmp_path / "cache", write_folder(tmp_path / "a", some))
    other = load(
        tmp_path / "cache", write_folder(tmp_path / "b", [*texts(99, 1000), *some[::-1], *some[:50]])
    )
    train, held_out = set(documents(corpus, "train")), set(documents(corpus, "held_out"))
    assert not train & held_out
    assert abs(len(held_out) - 60) < 4 * (300 * 0.2 * 0.8) ** 0.5
    assert train <= set(documents(other, "train"))
    assert held_out <= set(documents(other, "held_out"))
    assert not set(documents(other, "train")) & set(documents(other, "held_out"))


def in_format(kind, path, some):
    """`some` texts as files; the path to give."""
    if kind.startswith("text"):
        write_folder(path, ["\ufeff" + t for t in some] if kind == "text with mark" else some)
        if kind == "text.gz":
            for file in path.iterdir():
                file.with_suffix(".txt.gz").write_bytes(gzip.compress(file.read_bytes()))
                file.unlink()
        return path
    lines = write_lines(path.with_suffix(".jsonl"), some)
    if kind == "jsonl":
        return lines
    packed = path.with_suffix(".json.gz")
    packed.write_bytes(gzip.compress(b"\n" + lines.read_bytes().replace(b"\n", b"\r\n")))
    return packed


@pytest.mark.parametrize("kind", ["text with mark", "text.gz", "jsonl", "json.gz"])
def test_formats_give_the_same_tokens(tmp_path, kind):
    """Guards against a format that loses text."""
    some = [*texts(60), 3 * text_module.PIECE * "long\n", "\n"]
    plain = load(tmp_path / "cache", in_format("text", tmp_path / "plain", some))
    other = load(tmp_path / "cache", in_format(kind, tmp_path / "other", some))
    assert plain.folder != other.folder
    assert contents(plain) == contents(other)
    assert plain.description["sha256"] == other.description["sha256"]


def test_folders_are_read_without_hidden_files_and_each_file_once(tmp_path):
    folder = write_folder(tmp_path / "data", texts(50))
    (folder / ".hidden").write_bytes(b"\0")
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_bytes(b"\0")
    os.mkfifo(folder / "pipe")
    corpus = load(tmp_path / "cache", folder / "0003.txt", folder)
    assert corpus.description["files"] == 50
    assert corpus.files.read_text().splitlines()[0].endswith("/0003.txt"), "not in the order given"


# --- Standard library ---------------------------------------------------------------------------------


def test_standard_library_is_its_source_and_nothing_else(tmp_path, monkeypatch):
    """Guards against installed packages, build products and links that make every machine's text another."""
    root = write_folder(tmp_path / "lib", [])
    for i, name in enumerate(
        ["b.py", "a/__init__.py", "a/c.py", "site-packages/x.py", "__pycache__/y.py"] * 8
    ):
        path = root / (f"{i // 5}" if i > 4 else "") / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text(i))
    (root / "latin.py").write_bytes("# é".encode("latin-1"))
    (root / "notes.txt").write_text(text(100))
    (tmp_path / "outside.py").write_text(text(101))
    (root / "link.py").symlink_to(tmp_path / "outside.py")
    (root / "mark.py").write_text("\ufeff" + text(102))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    corpus = load(tmp_path / "cache")
    names = [line.split("  ", 1)[1] for line in corpus.files.read_text().splitlines()]
    assert names == sorted(names)
    assert len(names) == 25
    assert {"a/__init__.py", "a/c.py", "b.py", "mark.py", "7/b.py"} < set(names)
    assert corpus.description["skipped_files"] == ["latin.py"]
    assert corpus.description["source"].startswith("standard library of Python 3.")
    subprocess.run(["sha256sum", "--quiet", "-c", corpus.files], cwd=root, check=True)


@pytest.mark.slow
def test_real_standard_library(tmp_path):
    """Guards against a default text that does not suffice for the default vocabulary."""
    corpus = load(tmp_path, vocab_size=32000, held_out=0.02)
    assert corpus.description["bytes"] > 10e6
    assert corpus.description["vocab_size"] == 32000
    assert 0.01 < len(corpus.held_out) / len(corpus.train) < 0.03
    assert len(corpus.train) < corpus.description["train_bytes"] / 3
    argparse_text = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes().decode()
    found = set(documents(corpus, "train")) | set(documents(corpus, "held_out"))
    assert set(pieces([argparse_text])) <= found


# --- Tokenizers ---------------------------------------------------------------------------------------


def test_tokenizer_is_trained_on_the_training_part_to_its_size(tmp_path):
    """Guards against tokens learnt from held-out text."""
    some = [t for t in texts(200) if not held_out_by_content(hashlib.sha256(t.encode()).digest(), 0.2)]
    rare = [f"{100 * 'unseenword '}{i}" for i in range(50)]
    rare = [t for t in rare if held_out_by_content(hashlib.sha256(t.encode()).digest(), 0.2)]
    assert rare
    corpus = load(tmp_path / "cache", write_folder(tmp_path / "data", some + rare), vocab_size=400)
    assert corpus.tokenizer.get_vocab_size() == 400
    assert documents(corpus, "held_out") == rare
    assert not any("unseen" in token for token in corpus.tokenizer.get_vocab())
    only_bytes = load(tmp_path / "cache", tmp_path / "data", vocab_size=257)
    assert (
        len(only_bytes.train)
        == only_bytes.description["train_bytes"] + only_bytes.description["train_documents"]
    )


def test_much_text_is_sampled_for_the_tokenizer(tmp_path, monkeypatch):
    """Guards against a tokenizer that knows the first folder only, and hours of training it."""
    source = local_files([write_folder(tmp_path / "data", texts(400))], 0.2)
    found = [int(document.text.split(":")[0]) for document in source.sample(source.size // 4)]
    assert abs(len(found) - 80) < 40
    assert found[0] < 50
    assert found[-1] > 350
    assert all(not held_out_by_content(hashlib.sha256(text(i).encode()).digest(), 0.2) for i in found)
    monkeypatch.setattr(vocabulary, "SAMPLE", 5000)
    some = (Document(text(i), b"", "") for i in range(400))
    vocabulary.train(some, 300)
    assert next(some).text == text(1 + 5000 // len(text(0).encode())) or len(list(some)) > 300


def word_tokenizer(path, words, end="</s>", **more):
    """A tokenizer.json: whole words, by their ids; as T5's it would add its end by itself."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, end: 1} | words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    for change, arguments in more.items():
        getattr(tokenizer, change)(*arguments)
    path.parent.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(path))
    return str(path)


def test_given_tokenizer(tmp_path):
    """Guards against a tokenizer's own truncation, padding and special tokens, and ids that wrap around."""
    words = {"a": 2, "b": 3, "far": 70_000}
    path = word_tokenizer(tmp_path / "t.json", words, enable_truncation=[2], add_special_tokens=[["<pad>"]])
    data = write_lines(tmp_path / "d.jsonl", [f"{'a ' * i}b a far" for i in range(40)])
    corpus = load(tmp_path / "cache", data, tokenizer=path, vocab_size=70_001)
    assert corpus.train.dtype == np.uint32
    assert corpus.description["end_of_text"] == 1
    assert corpus.description["tokenizer"] == path
    together = np.concatenate([corpus.train, corpus.held_out]).tolist()
    assert {token: together.count(token) for token in set(together)} == {1: 40, 2: 820, 3: 40, 70_000: 40}
    assert documents(corpus, "train")[-1].endswith("b a far")


def test_given_tokenizer_through_transformers(tmp_path):
    """Guards against ignoring which token ends a text by the folder's own configuration."""
    word_tokenizer(tmp_path / "t" / "tokenizer.json", {"a": 2, "b": 3, "<over>": 4}, "</s>")
    (tmp_path / "t" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<over>"})
    )
    data = write_lines(tmp_path / "d.jsonl", [f"{'a ' * i}b a" for i in range(40)])
    corpus = load(tmp_path / "cache", data, tokenizer=str(tmp_path / "t"), vocab_size=5)
    assert corpus.description["end_of_text"] == 4
    assert set(corpus.train.tolist()) == {2, 3, 4}


def test_vocabulary_must_hold_what_occurs_and_no_more(tmp_path):
    """Guards against refusing t5-base's 32,100 entries for 32,000 embeddings, and against ids beyond these."""
    path = word_tokenizer(tmp_path / "t.json", {"a": 2, "b": 3, "unused": 4})
    data = write_lines(tmp_path / "d.jsonl", [f"{'a ' * i}b a" for i in range(40)])
    message = r"Invalid model.vocab_size: 3 .*has token 3 of tokenizer '.*t.json'"
    with pytest.raises(UserError, match=message):
        load(tmp_path / "cache", data, tokenizer=path, vocab_size=3)
    load(tmp_path / "cache", data, tokenizer=path, vocab_size=4)
    with pytest.raises(UserError, match=message):  # the entry is there now
        load(tmp_path / "cache", data, tokenizer=path, vocab_size=3)
    with pytest.raises(UserError, match="has token 1 of"):
        load(tmp_path / "another", data, tokenizer=path, vocab_size=1)


# --- Cache --------------------------------------------------------------------------------------------


def test_entry_is_read_again_without_the_text(tmp_path, monkeypatch):
    """Guards against waiting for the tokenizer at each run, and against other text from an old entry."""
    folder = write_folder(tmp_path / "data", texts(60))
    first = load(tmp_path / "cache", folder)
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "write_entry", None)
        patch.setattr(text_module, "_opened", None)
        again = load(tmp_path / "cache", folder, seed=1, sequence_length=4)
        assert contents(again) == contents(first)
        assert again.description == first.description
        assert again.tokenizer.to_str() == first.tokenizer.to_str()
    os.utime(folder / "0000.txt", ns=(1, 1))
    entries = {load(tmp_path / "cache", folder).folder, first.folder}
    (folder / "0000.txt").write_text("other")
    os.utime(folder / "0000.txt", ns=(1, 1))
    entries |= {load(tmp_path / "cache", folder, **options).folder for options in ({}, {"held_out": 0.3})}
    entries.add(load(tmp_path / "cache", folder, vocab_size=321).folder)
    assert len(entries) == 5
    assert sorted((tmp_path / "cache").iterdir()) == sorted(entries)


LOAD = """
import json, os, signal, sys
from pretrain.data import encode
from pretrain.config import Config
from pretrain.data.corpus import load_corpus
fields, batch, kill_at = json.loads(sys.argv[1])
encode.BATCH = batch
write, written = encode._Encoder._write, []
def counted(*args):
    write(*args)
    written.append(args)
    if len(written) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
encode._Encoder._write = counted
load_corpus(Config(**fields))
"""


def load_elsewhere(config, batch=1 << 20, kill_at=0, **environment):
    """The same in a process of its own."""
    fields = config.model_dump(mode="json", exclude_unset=True)
    code = [sys.executable, "-c", LOAD, json.dumps([fields, batch, kill_at])]
    here = {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(code, env=os.environ | here | environment, stderr=subprocess.PIPE, text=True)


def test_same_tokens_in_any_process_and_whole_entries_after_kill_9(tmp_path):
    """Guards against tokens that depend on threads, hashes or batches, and half-written entries that look whole."""
    data = write_lines(tmp_path / "d.jsonl", texts(400))
    names = "elsewhere", "killed", "here"
    elsewhere, killed, here = (configuration(tmp_path / name, data, vocab_size=500) for name in names)
    running = [
        load_elsewhere(elsewhere, 500, PYTHONHASHSEED="1", RAYON_NUM_THREADS="1"),
        load_elsewhere(killed, 500, kill_at=200, PYTHONHASHSEED="2", RAYON_NUM_THREADS="2"),
    ]
    expected = contents(corpus_module.load_corpus(here))
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, -signal.SIGKILL], errors
    assert errors == ["", ""], "not quiet"
    (left,) = (tmp_path / "killed").iterdir()
    assert left.name.startswith("unfinished-")
    assert (left / "tokenizer.json").read_bytes() == expected[0]
    assert contents(corpus_module.load_corpus(killed)) == expected
    assert contents(corpus_module.load_corpus(elsewhere)) == expected


def test_leftovers_of_killed_processes_go_after_a_day(tmp_path):
    """Guards against a full disk, and against removing what another process is writing."""
    old, new = (tmp_path / "cache" / f"unfinished-{name}" for name in ("old", "new"))
    for folder in old, new:
        folder.mkdir(parents=True)
        (folder / "train.bin").write_text("x")
    past = time.time() - 2 * 24 * 3600
    for path in old, old / "train.bin", new:
        os.utime(path, (past, past))
    corpus = load(tmp_path / "cache", write_lines(tmp_path / "d.jsonl", texts(60)))
    assert sorted((tmp_path / "cache").iterdir()) == sorted([corpus.folder, new])


def test_two_processes_at_once(tmp_path, monkeypatch):
    """Guards against a failed run where another was a second faster."""
    config = configuration(tmp_path / "cache", write_lines(tmp_path / "d.jsonl", texts(60)))

    def second(folder, *args):
        if not others:
            others.append(None)
            others.append(corpus_module.load_corpus(config))
        encode.write_entry(folder, *args)

    others = []
    monkeypatch.setattr(corpus_module, "write_entry", second)
    corpus = corpus_module.load_corpus(config)
    assert corpus.folder == others[1].folder
    assert list((tmp_path / "cache").iterdir()) == [corpus.folder]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_nothing_is_left_of_an_interrupted_entry(tmp_path, monkeypatch, kind):
    def interrupt(*_):
        raise kind

    monkeypatch.setattr(encode._Encoder, "_write", interrupt)
    with pytest.raises(kind):
        load(tmp_path / "cache", write_lines(tmp_path / "d.jsonl", texts(60)))
    assert list((tmp_path / "cache").iterdir()) == []


# --- Streams ------------------------------------------------------------------------------------------


def test_stream_is_the_same_as_its_file(tmp_path, monkeypatch):
    """Guards against text lost where the tokenizer's sample ends and the rest begins."""
    offline(monkeypatch, tmp_path)
    data = write_lines(tmp_path / "d.jsonl", [*texts(300), "", 2 * text_module.PIECE * "long\n"])
    local = load(tmp_path / "cache", data)
    dataset = DatasetConfig(path="json", data_files=str(data), held_out_split=None)
    stream = load(tmp_path / "cache", dataset=dataset)
    assert contents(stream) == contents(local)
    assert stream.description["sha256"] == local.description["sha256"]
    assert stream.description["source"] == f"dataset: json {data} train"

    write_lines(data, texts(301))
    assert load(tmp_path / "cache", dataset=dataset).folder != stream.folder, "an old entry for other files"


@pytest.mark.parametrize("given_tokenizer", [False, True])
def test_stream_keeps_as_many_tokens_as_asked(tmp_path, monkeypatch, given_tokenizer):
    """Guards against streaming without end, and training on what a dataset has in both of its splits."""
    offline(monkeypatch, tmp_path)
    both = texts(10)
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train.jsonl", both + texts(500, 100))
    write_lines(tmp_path / "data" / "validation.jsonl", both + texts(500, 1000))
    tokenizer = None
    if given_tokenizer:
        tokenizer = str(load(tmp_path / "cache", tmp_path / "data" / "train.jsonl").folder / "tokenizer.json")
    dataset = DatasetConfig(path=str(tmp_path / "data"), tokens=20_000, held_out_tokens=2_000)
    corpus = load(tmp_path / "cache", dataset=dataset, tokenizer=tokenizer)
    longest = 1 + max(len(t.encode()) for t in texts(100))
    assert 20_000 <= len(corpus.train) < 20_000 + longest
    assert 2_000 <= len(corpus.held_out) < 2_000 + longest
    train, held_out = documents(corpus, "train"), documents(corpus, "held_out")
    kept = len(held_out)
    assert held_out == (both + texts(500, 1000))[:kept]
    assert train == [t for t in both + texts(500, 100) if t not in held_out][: len(train)]
    assert corpus.description["dropped_documents"] == min(kept, 10)
    assert [line.split()[1] for line in corpus.files.read_text().splitlines()] == ["validation", "train"]
