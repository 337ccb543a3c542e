"""The command line of pretrain_llama.py: layers, what is refused, and how the refusal reads."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pretrain.command_line import checked, merged, parse, read_yaml, to_yaml
from pretrain.config import Config, OptimizerConfig
from pretrain.errors import UserError

import galore_rrf.options

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# What has rows is a comparison, what begins with pretrain is laid over others.
RUNNABLE = [
    path for path in CONFIGS if "rows" not in read_yaml(path) and not path.name.startswith("pretrain")
]


def written(folder, **fields):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_configs_are_valid(path):
    """Guards against a config of the repository that its own program refuses."""
    parse(["--config", str(path)], list)


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_overlays_are_valid(overlay):
    """Guards against `make pretrain` refusing its configs, or training something but the 60M shape on local text."""
    files = [ROOT / "configs/llama_60m.yaml", ROOT / f"configs/pretrain_{overlay}.yaml"]
    config, resume = parse([], lambda: files)
    assert resume is None
    assert (config.model.hidden_size, config.model.num_hidden_layers, config.optimizer.rank) == (512, 8, 128)
    assert config.optimizer.update_proj_gap == 1
    assert (config.dataset, config.data, config.steps) == (None, [], None)
    assert config.minutes is not None


def test_later_layers_and_options_override(tmp_path):
    """Guards against a nested field that replaces its whole section, and an option that YAML overrides."""
    first = tmp_path / "a.yaml"
    first.write_text("steps: 7\nbatch: 3\noptimizer: {lr: 0.5, rank: 4}\n")
    second = tmp_path / "b.yaml"
    second.write_text("optimizer: {rank: 5}\nspectra_at: [1]\n")
    options = ["--config", str(first), "--config", str(second), "--batch", "9", "--spectra-at", "0,10"]
    config, _ = parse([*options, "--optimizer.plain-lr", "0.25", "--data", "x", "--data", "y"], list)
    assert (config.steps, config.batch, config.spectra_at) == (7, 9, [0, 10])
    assert (config.optimizer.lr, config.optimizer.rank, config.optimizer.plain_lr) == (0.5, 5, 0.25)
    assert config.data == [Path("x").absolute(), Path("y").absolute()]


def test_an_alternative_takes_the_other_back():
    """Guards against `--steps 5` refused since the file says minutes, or both meant at once."""
    base = {"minutes": 3, "dataset": {"path": "c4"}}
    assert merged(base, {"steps": 5}) == {"steps": 5, "dataset": {"path": "c4"}}
    assert merged(base, {"data": ["x"]}) == {"minutes": 3, "data": ["x"]}
    assert merged(base, {"dataset": None}) == {"minutes": 3, "dataset": None}


def test_stored_config_repeats_the_run(tmp_path):
    """Guards against a stored configuration that means something else than what ran."""
    config = checked(
        {"steps": 5, "data": ["a b", "ü"], "optimizer": {"tolerance": 0.25}, "model": {"head_dim": 4}}
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert checked(read_yaml(path)) == config


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stepz": 3}, "Unknown field: stepz"),
        ({"steps": 3, "optimizer": {"nam": "adamw"}}, "Unknown field: optimizer.nam"),
        ({"steps": 0}, "Invalid steps: 0"),
        ({"steps": "many"}, "Invalid steps: 'many'"),
        ({"steps": 3, "optimizer": {"lr": -1}}, "Invalid optimizer.lr: -1"),
        ({"steps": 3, "optimizer": {"name": "sgd"}}, "Invalid optimizer.name: 'sgd'"),
        ({"steps": 3, "optimizer": {"tolerance": 1}}, "Invalid optimizer.tolerance: 1"),
        ({"steps": 3, "precision": "fp8"}, "Invalid precision: 'fp8'"),
        ({"steps": 3, "held_out": 0}, "Invalid held_out: 0"),
        ({"steps": 3, "batch": 8, "micro_batch": 3}, "batch 8 is no multiple of micro_batch 3"),
        ({"steps": 3, "model": {"hidden_size": 10, "num_attention_heads": 4}}, "hidden_size 10"),
        ({"steps": 3, "sequence_length": 2048}, "sequence_length 2048"),
        ({"steps": 3, "schedule": "constant", "warmup": 0.6, "cooldown": 0.6}, "warmup 0.6 and cooldown 0.6"),
        ({"steps": 3, "minutes": 3}, "exactly one of steps"),
        ({}, "exactly one of steps"),
        ({"steps": 3, "data": ["x"], "dataset": {"path": "c4"}}, "only one of data and dataset"),
        ({"steps": 3, "keep": 0}, "Invalid keep: 0"),
    ],
)
def test_refused(fields, said):
    """Guards against a value that is taken, or refused without its name."""
    with pytest.raises(UserError) as error:
        checked(fields)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [("- a\n- b\n", "must be a mapping"), ("a: [", "is no YAML"), (b"\xff\xfe", "is no YAML")],
)
def test_files_that_are_no_config(tmp_path, content, said):
    """Guards against a traceback for a file of something else."""
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        read_yaml(path)
    with pytest.raises(UserError, match="cannot read"):
        read_yaml(tmp_path / "missing.yaml")


def test_resume_takes_the_stored_configuration(tmp_path, monkeypatch):
    """Guards against a resumed run that quietly trains with other settings than it began with."""
    run = tmp_path / "run"
    run.mkdir()
    text = str(tmp_path / "text")
    written(run, steps=5, batch=4, optimizer={"lr": 0.5}, device="cpu", threads=2, data=[text])
    config, resume = parse(["--resume", str(run)], list)
    assert (resume, config.steps, config.batch, config.out) == (run, 5, 4, run)
    monkeypatch.chdir(tmp_path)
    # What it was begun with: a device and a number of steps were decided then; a relative path.
    began = tmp_path / "began.yaml"
    began.write_text("minutes: 3\nbatch: 4\ndevice: auto\nthreads: null\n")
    options = ["--config", str(began), "--optimizer.lr", "0.5", "--data", "text", "--out", "run"]
    assert parse(["--resume", "run", *options], list)[0] == config
    for option, was in (
        ("--optimizer.lr=0.25", r"optimizer\.lr is 0\.5 in .* and 0\.25 now"),
        ("--out=x", "out is .*run"),
    ):
        with pytest.raises(UserError, match=was):
            parse(["--resume", str(run), option], list)
    other = tmp_path / "other.yaml"
    other.write_text("batch: 8\n")
    with pytest.raises(UserError, match=r"batch is 4 .* and 8 now"):
        parse(["--resume", str(run), "--config", str(other)], list)
    with pytest.raises(UserError, match="holds no run"):
        parse(["--resume", str(tmp_path)], list)


def test_null_on_the_command_line():
    """Guards against a null that is a word."""
    config, _ = parse(
        [
            "--steps",
            "1",
            "--out",
            "x",
            "--clip-norm",
            "null",
            "--dataset.path",
            "c4",
            "--dataset.held-out-split",
            "null",
        ],
        list,
    )
    assert config.clip_norm is None
    assert config.dataset.held_out_split is None


def test_fields_without_effect_are_named():
    """Guards against options that silently do nothing."""
    config = checked(
        {"steps": 9, "cooldown": 0.3, "spectra_at": [0, 8, 9], "optimizer": {"name": "adamw", "rank": 5}}
    )
    said = "\n".join(config.without_effect())
    assert all(
        what in said for what in ("adamw has no use for rank", "no use for cooldown", "spectra_at 9: ")
    )
    assert checked({"steps": 1}).without_effect() == []


def test_options_of_the_subspace_can_be_trained_with():
    """Guards against an option of the package that no training and no comparison can have."""
    of_no_use = {"rank", "state_dtype"}  # fields beside the group's keys
    of_no_use |= {
        "projector",
        "power",
        "oversampling",
        "nonfinite",
        "seed",
        "stochastic_rounding",
        "arithmetic",
    }
    options = {field.name for field in dataclasses.fields(galore_rrf.options.SubspaceOptions)} - of_no_use
    config = OptimizerConfig()
    assert options <= config._GROUP_KEYS.keys()
    for key, allowed in {**galore_rrf.options._CHOICES, "preset": tuple(galore_rrf.options.PRESETS)}.items():
        if key in options:
            for value in set(allowed) - {"full", "tucker"}:  # for convolutions, and for galore_torch's users
                config = OptimizerConfig(**{key: value})
                assert config.group_keys() == {key: value}


def test_help_explains_every_field():
    """Guards against a field without an explanation, in the help as a user calls it."""
    shown = subprocess.run(
        [sys.executable, ROOT / "examples/pretrain_llama.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    text = " ".join(shown.split())

    def explained(model, prefix=""):
        for name, field in model.model_fields.items():
            assert field.description, name
            if hasattr(field.annotation, "model_fields"):
                explained(field.annotation, f"{name}.")
            else:
                assert f"--{prefix}{name}".replace("_", "-") in text
                assert " ".join(field.description.split())[:30] in text.replace("- ", "-"), name

    explained(Config)


@pytest.mark.parametrize(
    "options",
    [["--optimizer.lr", "fast"], ["--config", "missing.yaml"], ["--nonsense"], ["--resume", "nowhere"]],
)
def test_refusals_are_a_sentence(tmp_path, options):
    """Guards against tracebacks, an exit status of 0, and files left behind."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples/pretrain_llama.py", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert options[-1] in done.stderr
    assert list(tmp_path.iterdir()) == []
