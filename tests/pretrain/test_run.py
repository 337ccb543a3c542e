"""Whole runs: what they leave, what they survive, what they refuse."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pretrain_llama
import pytest
import torch
import yaml
from pretrain import run as run_module
from pretrain.checkpoints import Checkpoints
from pretrain.command_line import checked, read_yaml, to_yaml
from pretrain.errors import UserError
from pretrain.files import locked
from pretrain.log import Log
from pretrain.results.read import Run
from pretrain.results.spectra import read_spectra
from pretrain.run import Interrupted, run
from pretrain.trainer import Trainer
from test_trainer import OPTIMIZERS, OTHERS, skip_without_apollo
from tiny import assert_same, final_state, text_file, tiny

from galore_rrf import state_bytes

PROGRAM = Path(__file__).parents[2] / "examples/pretrain_llama.py"


@pytest.fixture
def folder(tmp_path_factory):
    """Text and cache are shared; every test names its own runs."""
    path = tmp_path_factory.getbasetemp() / "runs"
    path.mkdir(exist_ok=True)
    return path


def metrics(out):
    """The lines of metrics.jsonl, without times."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


def interrupted_after(monkeypatch, step, number=signal.SIGINT):
    """A signal from a person at the keyboard during a step."""
    train_step = Trainer.train_step

    def stepped(self):
        result = train_step(self)
        if self.step == step:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Trainer, "train_step", stepped)


def test_what_a_run_leaves(folder, capsys):
    """Guards against a file, a number or a picture that is missing or wrong at the end."""
    config = tiny(folder, "whole", spectra_at=[0, 3], spectra_layers=["q_proj"], tensorboard=True, steps=8)
    run(config, resume=False)
    out = config.out
    lines = metrics(out)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "perplexity" in line] == [4, 8]
    read = Run.read(out)
    assert read.perplexity == pytest.approx(np.exp(read.held_out_loss))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tokens"] == 8 * 4 * 16
    assert summary["held_out_loss"] == read.held_out_loss[-1]
    assert 0 < summary["refresh_seconds"] < summary["optimizer_seconds"] < summary["seconds"]
    assert summary["peak_memory_bytes"] > 50e6
    assert [
        (layer.name.split(".")[2], sorted(layer.of("gradient"))) for layer in read_spectra(out / "spectra")
    ] == [
        ("0", [0, 3]),
        ("1", [0, 3]),
    ]
    for name in ("curves.png", "spectra.png", "moments.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not (out / "ranks.png").exists()
    stored = read_yaml(out / "config.yaml")
    assert (stored["steps"], stored["device"], stored["threads"]) == (8, "cpu", 1)
    data = json.loads((out / "data.json").read_text())
    assert len(data["sha256"]) == 64
    assert "text.jsonl" in (out / "files.txt").read_text()
    printed = capsys.readouterr().out
    assert f"Results in {out}" in printed
    assert "held-out loss" in printed


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_measured_state_is_the_formula(folder, optimizer, request):
    """Guards against a table whose two sides differ, or that leaves out part of the state."""
    if "tolerance" in optimizer:
        pytest.skip("the formula is of the rank cap")
    config = tiny(folder, request.node.name, optimizer=optimizer, steps=2)
    trainers = []
    init = Trainer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", lambda self, *args: (trainers.append(self), init(self, *args))[1])
        run(config, resume=False)
    state = json.loads((config.out / "summary.json").read_text())["state"]
    assert all(row["measured"] == row["formula"] for row in state)
    assert sum(row["measured"] for row in state) == state_bytes(trainers[0].optimizer)


# Bytes of fp32 for an m x n matrix: of moments and bases, by its shorter and longer side.
MATRIX_STATE = {
    "adamw": lambda short, long: 8 * short * long + 4,
    "galore": lambda short, long: 4 * (2 * 4 * long + 4 * short) + 4,
    "galore_torch": lambda short, long: 4 * (2 * 4 * long + 4 * short),  # its step counts are ints
    "muon": lambda short, long: 4 * short * long,
    "lion": lambda short, long: 4 * short * long,
    "sign": lambda short, long: 0,
}


@pytest.mark.parametrize("name", MATRIX_STATE)
def test_state_of_the_matrices(folder, name):
    """Guards against a comparison of memory that misses a peer's state or counts that of other parameters."""
    config = tiny(folder, f"state of {name}", optimizer=(OPTIMIZERS | OTHERS)[name], steps=2)
    run(config, resume=False)
    summary = json.loads((config.out / "summary.json").read_text())
    sides = [(32, 32)] * 8 + [(32, 48)] * 6
    measured = sum(row["matrices"] for row in summary["state"])
    assert measured == sum(MATRIX_STATE[name](*side) for side in sides)
    assert summary["adamw_moments"]["matrices"] == 8 * sum(short * long for short, long in sides)
    assert summary["adamw_moments"]["all"] == 8 * summary["parameters"]


def test_ranks_by_tolerance(folder):
    """Guards against ranks that are not logged as the optimizer has them."""
    config = tiny(folder, "ranks", optimizer={"tolerance": 0.05, "rank": 16, "update_proj_gap": 2})
    run(config, resume=False)
    ranks = {line["step"]: line["ranks"] for line in metrics(config.out) if "ranks" in line}
    last = ranks[max(ranks)]
    state = final_state(config.out)["optimizer"]
    names = [n for group in state["param_groups"] for n in group["param_names"]]
    assert last == {n: state["state"][i]["rank"] for i, n in enumerate(names) if "rank" in state["state"][i]}
    assert len(set(last.values())) > 1
    assert (config.out / "ranks.png").exists()


VARIANTS = {
    **{name: {"optimizer": optimizer} for name, optimizer in (OPTIMIZERS | OTHERS).items()},
    "bf16": {"precision": "bf16"},
    "bf16_mixed": {"precision": "bf16_mixed"},
    "fp16_mixed": {"precision": "fp16_mixed", "micro_batch": 2},
    "constant": {"schedule": "constant", "activation_checkpointing": True, "batch": 70},  # over epochs
    "dropout": {"model": {"attention_dropout": 0.1}},
    "two threads": {"threads": 2},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("step", [2, 5])
def test_resumes_to_the_same_bits(folder, variant, step, monkeypatch, request):
    """Guards against anything that the steps to come depend on and that a checkpoint leaves out."""
    skip_without_apollo(variant.get("optimizer", {}))
    name = request.node.callspec.id
    straight = tiny(folder, f"straight {name}", **variant)
    run(straight, resume=False)
    stopped = tiny(folder, f"stopped {name}", **variant)
    with monkeypatch.context() as patch:
        interrupted_after(patch, step, signal.SIGINT if step == 2 else signal.SIGTERM)
        with pytest.raises(Interrupted, match=f"step {step}"):
            run(stopped, resume=False)
    assert not (stopped.out / "summary.json").exists()
    torch.manual_seed(99)  # a fresh process has another state
    run(stopped, resume=True)
    assert_same(final_state(stopped.out), final_state(straight.out))
    assert metrics(stopped.out) == metrics(straight.out)


def on_board(out):
    """Steps and losses as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in ("loss", "perplexity")}


def test_tensorboard_continues(folder, monkeypatch):
    """Guards against steps shown twice, or lost, after a resume from an older checkpoint."""
    config = tiny(folder, "board", tensorboard=True)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 7)
        with pytest.raises(Interrupted):
            run(config, resume=False)
    Checkpoints(config.out / "checkpoints", 1).path(7).unlink()
    run(config, resume=True)
    board = on_board(config.out)
    logged = [line for line in metrics(config.out) if "loss" in line]
    assert [step for step, _ in board["loss"]] == list(range(1, 9))
    assert [value for _, value in board["loss"]] == pytest.approx([line["loss"] for line in logged])
    assert [step for step, _ in board["perplexity"]] == [4, 8]


def test_a_damaged_checkpoint_is_passed_over(folder, monkeypatch, capsys):
    """Guards against a run lost to its newest checkpoint; what was logged after the older one goes."""
    straight, config = tiny(folder, "undamaged"), tiny(folder, "damaged")
    run(straight, resume=False)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 7)
        with pytest.raises(Interrupted):
            run(config, resume=False)
    path = Checkpoints(config.out / "checkpoints", 2).path(7)
    path.write_bytes(path.read_bytes()[:-1000])
    run(config, resume=True)
    assert f"passing over the checkpoint {path}, which is damaged" in capsys.readouterr().out
    assert_same(final_state(config.out), final_state(straight.out))
    assert metrics(config.out) == metrics(straight.out)


def test_a_full_disk_ends_in_a_sentence(folder, monkeypatch):
    """Guards against a traceback, and a run that cannot go on once there is room."""
    straight, config = tiny(folder, "room"), tiny(folder, "full")
    run(straight, resume=False)
    with monkeypatch.context() as patch:
        save = torch.save

        def fails_later(value, file):
            if value["step"] > 3:
                raise OSError(28, "No space left on device")
            save(value, file)

        patch.setattr("pretrain.checkpoints.torch.save", fails_later)
        with pytest.raises(UserError, match=r"No space left on device \(that of step 3 is whole; .*--resume"):
            run(config, resume=False)
    run(config, resume=True)
    assert_same(final_state(config.out), final_state(straight.out))
    assert metrics(config.out) == metrics(straight.out)


def test_minutes_become_steps_once(folder, capsys):
    """Guards against a schedule that depends on the clock: the stored steps repeat the run to the bit."""
    config = tiny(folder, "minutes", minutes=0.03, eval_tokens=16)
    run(config, resume=False)
    stored = checked(read_yaml(config.out / "config.yaml"))
    assert stored.minutes is None
    assert 1 <= stored.steps == json.loads((config.out / "summary.json").read_text())["steps"]
    assert f"{stored.steps} steps fit into 0.03 minutes" in capsys.readouterr().out
    # No timed test, but one that a count of one, or of thousands, fails.
    assert 0.2 < Run.read(config.out).seconds.sum() < 10
    again = stored.model_copy(update={"out": folder / "minutes again"})
    run(again, resume=False)
    assert_same(final_state(again.out), final_state(config.out))


def test_too_few_minutes(folder):
    """Guards against a run of no steps."""
    config = tiny(folder, "no time", minutes=0.0001)
    with pytest.raises(UserError, match=r"Invalid minutes: 0\.0001"):
        run(config, resume=False)
    assert not config.out.exists()


def test_nothing_is_overwritten(folder):
    """Guards against a second run into the folder of a first, or of something else."""
    config = tiny(folder, "taken", steps=1)
    run(config, resume=False)
    before = {p: p.read_bytes() for p in config.out.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="already holds a run"):
        run(config, resume=False)
    assert {p: p.read_bytes() for p in config.out.rglob("*") if p.is_file()} == before
    other = tiny(folder, "other")
    other.out.mkdir()
    (other.out / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        run(other, resume=False)
    with pytest.raises(UserError, match="Invalid --out"):
        run(config.model_copy(update={"out": other.out / "thesis.tex"}), resume=False)


def test_no_permission(folder, monkeypatch):
    """Guards against a traceback, or minutes of work, for a folder that cannot be made."""
    (folder / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot read or write .*file"):
        run(tiny(folder, "file/x"), resume=False)
    monkeypatch.setattr(
        os, "access", lambda path, mode: False
    )  # tests may run as root, who may write anywhere
    monkeypatch.setattr(run_module, "load_corpus", pytest.fail)
    with pytest.raises(UserError, match=r"no permission to write to"):
        run(tiny(folder, "forbidden"), resume=False)


def test_one_process_to_a_run(folder, monkeypatch):
    """Guards against two processes that write one run."""
    config = tiny(folder, "shared", steps=3)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        with pytest.raises(Interrupted):
            run(config, resume=False)
    with locked(config.out), pytest.raises(UserError, match=r"another process is training in .*shared"):
        run(config, resume=True)
    run(config, resume=True)


def test_killed_while_it_begins(folder, monkeypatch):
    """Guards against a folder that can neither be begun nor resumed: it is there with all in it, or not at all."""
    config = tiny(folder, "begins", steps=1)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", killed)
        patch.setattr("shutil.rmtree", killed)  # nothing is cleaned up
        with pytest.raises(Killed):
            run(config, resume=False)
    assert not config.out.exists()
    run(config, resume=False)


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_under_metrics(folder, monkeypatch, where):
    """Guards against a traceback, or a run that cannot go on, where metrics do not fit."""
    straight, config = tiny(folder, f"room {where}"), tiny(folder, f"full {where}")
    run(straight, resume=False)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        train_step = Trainer.train_step

        def stepped(self):
            if self.step == 5:
                patch.setattr(Log, "write", full) if where == "write" else patch.setattr(Log, "flush", full)
            return train_step(self)

        patch.setattr(Trainer, "train_step", stepped)
        with pytest.raises(UserError, match="No space left on device"):
            run(config, resume=False)
    run(config, resume=True)
    assert_same(final_state(config.out), final_state(straight.out))
    assert metrics(config.out) == metrics(straight.out)


def test_a_diverging_run_keeps_what_it_had(folder):
    """Guards against a checkpoint of weights that are no numbers, and a traceback where the loss overflows."""
    config = tiny(
        folder, "diverges", optimizer={"lr": 1e25, "plain_lr": 1e25}, save_every=1, steps=30, clip_norm=None
    )
    with pytest.raises(UserError, match=r"training diverged.*lower optimizer\.lr"):
        run(config, resume=False)
    for name, weight in final_state(config.out)["model"].items():
        assert torch.isfinite(weight).all(), name


def test_resume_refuses_other_text(folder, monkeypatch):
    """Guards against a run that goes on with text that it was not begun with."""
    text = folder / "own.jsonl"
    text.write_text(text_file(folder).read_text())
    config = tiny(folder, "own text", data=[str(text)])
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        with pytest.raises(Interrupted):
            run(config, resume=False)
    text.write_text(text_file(folder).read_text().replace("gradient", "matrix", 1))
    with pytest.raises(UserError, match="text or its tokenizer has changed"):
        run(config, resume=True)


def test_layers_for_spectra_must_exist(folder):
    """Guards against spectra that are missing at the end, for a misspelt layer."""
    config = tiny(folder, "layers", spectra_at=[0], spectra_layers=["q_prog"])
    with pytest.raises(UserError, match="q_prog"):
        run(config, resume=False)


def program(*options, **kwargs):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, options)], env=environment, text=True, **kwargs
    )


def config_file(folder, name, **fields):
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(tiny(folder, name, **fields)))
    return path


def test_control_c(folder):
    """Guards against a ctrl-C that loses steps or shows a traceback, in a real process."""
    path, out = config_file(folder, "ctrl-c", steps=2000, save_every=1000), folder / "ctrl-c-run"
    process = program("--config", path, "--out", out, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 20, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {out}" in errors
    assert "Traceback" not in errors
    step = final_state(out)["step"]
    assert [line["step"] for line in metrics(out) if "loss" in line] == list(range(1, step + 1))


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random(folder, seed):
    """Guards against a moment at which kill -9 leaves a run that cannot go on, or goes on to other bits."""
    wait = random.Random(seed)
    path = config_file(folder, f"killed {seed}", steps=1500, save_every=2, eval_every=50, tensorboard=True)
    straight, out = folder / f"straight {seed}", folder / f"killed run {seed}"
    assert program("--config", path, "--out", straight).wait() == 0
    process = program("--config", path, "--out", out)
    wait_for(lambda: (out / "config.yaml").exists(), process)  # before that nothing has begun
    kills = 0
    while kills < 6:
        steps = Checkpoints(out / "checkpoints", 2).steps()
        # Now and then before the first step of a process, mostly while it saves every other step.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait.uniform(0, 4))
        while kills % 3 and process.poll() is None and Checkpoints(out / "checkpoints", 2).steps() == steps:
            time.sleep(wait.uniform(0, 0.1))
        process.kill()
        if process.wait() != -signal.SIGKILL:  # it was at its end before
            break
        kills += 1
        process = program("--resume", out)
    assert process.wait() == 0
    assert kills > 2
    assert_same(final_state(out), final_state(straight))
    assert metrics(out) == metrics(straight)
    assert on_board(out) == on_board(straight)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "{empty}"], "empty"),
        (["--data", "{binary}"], "binary"),
        (["--held-out", "0.0001"], "held_out"),
        (["--optimizer.rank", "32"], "optimizer.rank: 32 (must be below 32"),
        (["--model.vocab-size", "30000"], "vocab_size"),
        (
            ["--optimizer.rank", "1000", "--optimizer.name", "lora", "--optimizer.lora-alpha", "-1"],
            "lora_alpha",
        ),
        (["--cache", "{binary}"], "cache"),
    ],
)
def test_bad_input_is_a_sentence(folder, options, said, capsys, monkeypatch):
    """Guards against a traceback, an exit status of 0 and a folder left behind."""
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "binary").write_bytes(bytes(range(256)) * 10)
    path, out = config_file(folder, "bad"), folder / "bad run"
    options = [option.format(empty=folder / "empty", binary=folder / "binary") for option in options]
    monkeypatch.setattr(
        sys, "argv", ["pretrain_llama.py", "--config", str(path), "--out", str(out), *options]
    )
    assert pretrain_llama.main() == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_gpu_that_is_not_there():
    """Guards against a run on another device than was asked for."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="Invalid device: 'cuda'"):
        run_module.completed(checked({"steps": 1, "device": "cuda"}))


def test_stored_configuration_is_yaml_of_plain_values(folder):
    """Guards against a config.yaml that only this program can read."""
    config = tiny(folder, "unused", spectra_at=[1])
    assert yaml.safe_load(to_yaml(config))["optimizer"]["lr"] == 0.01
