"""What the tests of the data share: made-up text, and a small configuration to load it with."""

import json
import random
from pathlib import Path

from pretrain.config import Config, ModelConfig
from pretrain.data.corpus import load_corpus

SYLLABLES = ["ka", "to", "mi", "re", "ün", "so", "ла", "¡la!", "日", "\t", "12", "(x)", "=", "_"]


def text(seed, words=60):
    """Lines of made-up words, no two texts alike."""
    draw = random.Random(seed)
    return f"{seed}: " + "".join(
        "".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) + draw.choice("      \n") for _ in range(words)
    )


def texts(count, first=0):
    return [text(seed) for seed in range(first, first + count)]


def write_folder(folder, documents):
    """One file for each text, read in their order."""
    folder.mkdir(parents=True)
    for i, document in enumerate(documents):
        (folder / f"{i:04}.txt").write_bytes(document.encode())
    return folder


def write_lines(path, documents):
    path.write_text("".join(json.dumps({"id": i, "text": d}) + "\n" for i, d in enumerate(documents)))
    return path


def configuration(cache, *data, vocab_size=320, **options):
    options = {"held_out": 0.2, "sequence_length": 8, "eval_tokens": 16, "steps": 1} | options
    return Config(
        cache=cache, data=list(map(Path, data)), model=ModelConfig(vocab_size=vocab_size), **options
    )


def load(cache, *data, **options):
    return load_corpus(configuration(cache, *data, **options))


def offline(monkeypatch, folder):
    """Neither the hub nor this machine's folder of it is touched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "huggingface"))


def documents(corpus, side):
    """The texts of a side, decoded."""
    end, found, ids = corpus.description["end_of_text"], [], []
    for token in getattr(corpus, side).tolist():
        if token == end:
            found.append(corpus.tokenizer.decode(ids, skip_special_tokens=False))
            ids = []
        else:
            ids.append(token)
    assert not ids, "the last document has no end"
    return found


def contents(corpus):
    """The bytes of all that is made of the text."""
    return [(corpus.folder / name).read_bytes() for name in ("tokenizer.json", "train.bin", "held_out.bin")]
