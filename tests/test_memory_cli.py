"""``python -m galore_rrf.memory``: the table, the chart, and what a person can mend."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import galore_rrf
from galore_rrf.memory import estimate
from galore_rrf.memory.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def config(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


TINY = """
model: {vocab_size: 100, hidden_size: 16, intermediate_size: 43, num_hidden_layers: 2, num_attention_heads: 2}
optimizer: {rank: 4}
micro_batch: 2
sequence_length: 8
threads: 1
"""


def cells(output):
    """The table's numbers as printed, by method and column."""
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in output.splitlines() if line[:1] == "|"
    ]
    (unit, *columns), _, *methods = rows
    return unit, {name: dict(zip(columns, values, strict=True)) for name, *values in methods}


def test_table_of_the_largest_model_without_allocating_it():
    """Guards against weights made on the way: 7B in the memory that the imports take."""
    pytest.importorskip("transformers")
    code = (
        "import resource, runpy, sys; sys.argv[1:] = [sys.argv[1]]; "
        "runpy.run_module('galore_rrf.memory', run_name='__main__'); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code, str(CONFIGS / "llama_7b.yaml")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert int(run.stdout.split()[-1]) * 1024 < 3e9
    unit, table = cells(run.stdout)
    assert unit == "GB"
    assert list(table) == [
        "AdamW, mixed precision",
        "AdamW, bf16",
        "GaLore rank 1024, bf16",
        "LoRA rank 1024, bf16",
    ]
    assert table["AdamW, mixed precision"]["held B/parameter"] == "16.00"
    assert table["AdamW, bf16"]["held"] == "53.907"
    galore = table["GaLore rank 1024, bf16"]
    state = sum(float(galore[part]) for part in ("momentum", "variance", "bases"))
    assert state / 26.954 == pytest.approx(0.59, abs=0.005)
    assert "estimated" in run.stdout
    assert "16 sequences of 256 tokens" in run.stdout


def test_several_configs_and_overrides(tmp_path, capsys):
    """Guards against options that do nothing: each changes what it names."""
    pytest.importorskip("transformers")
    tiny = config(tmp_path, TINY)
    main([tiny, str(CONFIGS / "llama_60m.yaml")])
    both = capsys.readouterr().out
    assert "llama_60m.yaml: 58,073,600 parameters" in both
    assert "config.yaml: " in both
    main([tiny, "--rank", "7", "--batch", "3", "--sequence-length", "5", "--threads", "2"])
    output = capsys.readouterr().out
    assert "GaLore rank 7, bf16" in output
    assert "3 sequences of 5 tokens" in output
    assert "2 threads" in output
    assert cells(output)[0] == "MB"


def test_table_shows_the_estimates(tmp_path, capsys):
    """Guards against columns in another order than their titles."""
    transformers = pytest.importorskip("transformers")
    main([config(tmp_path, TINY + "activation_checkpointing: true\n")])
    _, table = cells(capsys.readouterr().out)
    fields = transformers.LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=43, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(fields)
    found = estimate(model, "galore", rank=4, dtype=torch.bfloat16, tokens=16, threads=1, checkpointing=True)
    row = table["GaLore rank 4, bf16"]
    assert row["master"] == "-"
    assert row["held B/parameter"] == f"{found.held / found.parameters:.2f}"
    for column, part in {
        "weights": "weights",
        "gradients": "gradients",
        "momentum": "momentum",
        "variance": "variance",
        "bases": "bases",
        "held": "held",
        "workspace *": "workspace",
        "activations *": "activations",
        "peak *": "total",
    }.items():
        assert row[column] == f"{getattr(found, part) / 1e6:.3f}", column


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("residual: feedback", {"residual": "feedback"}),
        ("basis_from: average", {"basis_from": "average"}),
        ("preset: best", {"residual": "orthogonalized"}),
        ("preset: best, residual: scaled", {"residual": "scaled"}),
    ],
)
def test_options_of_the_file(keys, expected, tmp_path, capsys):
    """Guards against a table of other options than the file or its preset has."""
    pytest.importorskip("transformers")
    main([config(tmp_path, TINY.replace("{rank: 4}", f"{{rank: 4, {keys}}}"))])
    row = cells(capsys.readouterr().out)[1]["GaLore rank 4, bf16"]
    main([config(tmp_path, TINY)])
    without = cells(capsys.readouterr().out)[1]["GaLore rank 4, bf16"]
    assert float(row["workspace *"]) > float(without["workspace *"])
    keeps = expected != {"residual": "orthogonalized"}
    assert (row["buffers"] != "-") == keeps
    assert without["buffers"] == "-"


@pytest.mark.parametrize("keys", ["state_dtype: 8bit", "preset: best, state_dtype: fp32"])
def test_moments_as_the_file_keeps_them(keys, tmp_path, capsys):
    """Guards against bytes of moments in another dtype than the file names, its preset's say."""
    pytest.importorskip("transformers")
    wide = TINY.replace("hidden_size: 16", "hidden_size: 512").replace("rank: 4", "rank: 64")
    main([config(tmp_path, wide)])
    fp32 = cells(capsys.readouterr().out)[1]["GaLore rank 64, bf16"]
    main([config(tmp_path, wide.replace("{rank: 64}", f"{{rank: 64, {keys}}}"))])
    row = cells(capsys.readouterr().out)[1]["GaLore rank 64, bf16"]
    share = float(row["momentum"]) / float(fp32["momentum"])
    assert share < 0.5 if "8bit" in keys else share >= 1  # those that are not projected too, else in bf16


def test_activations_without_a_batch(tmp_path, capsys):
    """Guards against a number for a batch nobody named."""
    pytest.importorskip("transformers")
    main([config(tmp_path, TINY.replace("micro_batch: 2", ""))])
    output = capsys.readouterr().out
    assert {row["activations *"] for row in cells(output)[1].values()} == {"-"}
    assert "not without --batch and --sequence-length" in output


def test_chart_shows_16_bytes_in_parts(tmp_path, monkeypatch):
    """Guards against a chart without units or with other parts: 2, 2, 4, 4 and 4 bytes a parameter."""
    pytest.importorskip("transformers")
    figures = []
    cls = pytest.importorskip("matplotlib.figure").Figure
    save = cls.savefig
    monkeypatch.setattr(cls, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    path = tmp_path / "chart.png"
    main([str(CONFIGS / "llama_60m.yaml"), "--chart", str(path)])
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (axes,) = figures[0].axes
    assert "GB" in axes.get_ylabel()
    assert "bytes a parameter" in axes.child_axes[0].get_ylabel()
    numbers = [t.get_text() for t in axes.texts if t.get_position()[0] == 0]
    assert numbers[:-1] == ["2", "2", "4", "4", "4"]
    assert "16 bytes a parameter" in numbers[-1]
    heights = [bars[0].get_height() for bars in axes.containers]
    assert heights[:-1] == pytest.approx([0.058074 * b for b in (2, 2, 4, 4, 4, 0, 0)], rel=1e-4)
    legend = [t.get_text() for t in figures[0].legends[0].get_texts()]
    assert legend[:3] == ["weights", "gradients", "master weights"]
    assert "estimated" in legend[-1]


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, [], r"cannot read .*config\.yaml \(No such file or directory\)"),
        ("model: [", [], r"config\.yaml is no YAML"),
        ("- model", [], r"must hold a mapping with a key model, got list"),
        ("", [], r"must hold a mapping with a key model, got NoneType"),
        ("optimizer: {rank: 4}", [], r"has no model \(fields of transformers\.LlamaConfig\)"),
        ("model: 60M", [], r"model of .* must be a mapping, got '60M'"),
        (TINY.replace("{rank: 4}", "galore"), [], r"optimizer of .* must be a mapping, got 'galore'"),
        (TINY.replace("hidden_size", "hidden_sizes"), [], r"hidden_sizes .* did you mean hidden_size\?"),
        (TINY.replace("hidden_size: 16", "hidden_size: wide"), [], r"Invalid model .*'hidden_size'.*wide"),
        (TINY.replace("hidden_size: 16", "hidden_size: 15"), [], r"Invalid model .*15.* not a multiple"),
        (TINY.replace("hidden_size: 16", "hidden_size: -16"), [], r"Invalid model "),
        (TINY.replace("rank: 4", "rank: 0"), [], r"Invalid rank .*: 0 \(must be a positive integer\)"),
        (TINY.replace("rank: 4", "rank: four"), [], r"Invalid rank .*: 'four'"),
        (TINY.replace("rank: 4", "name: adamw"), [], r"has no optimizer\.rank: pass --rank"),
        (TINY.replace("rank: 4", "rank: 4, proj_type: up"), [], r"Invalid proj_type: 'up'"),
        (TINY.replace("micro_batch: 2", "micro_batch: 0.5"), [], r"Invalid micro_batch .*: 0\.5"),
        (TINY, ["--rank", "16"], r"Invalid rank for .*: 16 \(must be less than the shorter side"),
        (TINY, ["--rank", "-3"], r"-3 \(must be a positive integer\)"),
        (TINY, ["--rank", "many"], r"many \(must be a positive integer\)"),
        (TINY, ["--batch", "0"], r"0 \(must be a positive integer\)"),
        (TINY, ["--chart", "nowhere/chart.png"], r"cannot write .*chart\.png \(No such file or directory\)"),
    ],
)
def test_bad_input_is_a_sentence_and_status_2(text, arguments, message, tmp_path, capsys, monkeypatch):
    """Guards against tracebacks for what a person can mend."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    path = "config.yaml" if text is None else config(tmp_path, text)
    with pytest.raises(SystemExit) as exit_:
        main([path, *arguments])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error.splitlines()[-1]), error


@pytest.mark.parametrize(
    ("module", "extra"), [("yaml", "train"), ("transformers", "train"), ("matplotlib.figure", "plots")]
)
def test_missing_packages_are_named(module, extra, tmp_path, capsys, monkeypatch):
    """Guards against a traceback as the only hint of what to install."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as exit_:
        main([config(tmp_path, TINY), "--chart", str(tmp_path / "chart.png")])
    assert exit_.value.code == 2
    package = module.partition(".")[0]
    assert f"{package} is needed here: pip install 'galore_rrf[{extra}]'" in capsys.readouterr().err


def test_import_brings_in_torch_alone():
    """Guards against an optional package that `import galore_rrf` needs."""
    extras = ("transformers", "yaml", "matplotlib", "peft", "pydantic")
    code = f"import sys, galore_rrf.memory; print([m for m in {extras} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"
    assert galore_rrf.memory.estimate is estimate
