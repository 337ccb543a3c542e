"""compare.py: which learning rates are tried, and a comparison taken up again."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from compare import Comparison, Row, Sweep
from pretrain.command_line import to_yaml
from tiny import tiny

PROGRAM = Path(__file__).parents[2] / "examples/compare.py"


def swept(loss, lr=(1.0, 2.0, 4.0), plain_lr=(1.0, 2.0, 4.0), beyond=2):
    """A sweep over a loss that is a formula; every point must be wanted once."""
    sweep = Sweep(Row(lr=list(lr), plain_lr=list(plain_lr)), beyond)
    while points := sweep.wanted():
        for point in points:
            assert point not in sweep.losses
            sweep.losses[point] = loss(*point)
    return sweep


def bowl(lr, plain):
    """Least at the given learning rates, by their ratio."""
    return lambda x, y: math.log(x / lr) ** 2 + math.log(y / plain) ** 2


def test_the_best_inside_the_grid():
    """Guards against a second line that is not at the best of the first, and points beyond what is needed."""
    sweep = swept(bowl(2, 2))
    assert sweep.best() == (2, 2)
    assert sorted(sweep.losses) == [(1, 2), (2, 1), (2, 2), (2, 4), (4, 2)]


@pytest.mark.parametrize(("lr", "plain"), [(8, 2), (0.5, 2), (2, 8), (2, 0.5), (16, 0.25)])
def test_the_best_beyond_the_grid(lr, plain):
    """Guards against a best value at an end that is taken for the best."""
    sweep = swept(bowl(lr, plain), beyond=3)
    assert sweep.best() == (lr, plain)
    assert (2 * lr, 2) in sweep.losses or lr == 2
    assert (lr / 2, 2) in sweep.losses or lr == 2


def test_it_ends():
    """Guards against a loss that falls for ever, and one that is nowhere finite."""
    assert swept(lambda x, y: -x).best()[0] == 16
    assert len(swept(lambda x, y: math.inf).losses) < 20


def test_configs_name_rows_and_files():
    """Guards against the repository's own comparisons being refused."""
    for path in (Path(__file__).parents[2] / "configs").glob("compare*.yaml"):
        comparison = Comparison.model_validate(yaml.safe_load(path.read_text()))
        assert all((path.parent / config).exists() for config in comparison.configs)


@pytest.mark.slow
def test_a_comparison(tmp_path):
    """Guards against runs that differ in more than they should, made twice, or missing from the report."""
    (tmp_path / "base.yaml").write_text(to_yaml(tiny(tmp_path, "unused", steps=3)))
    rows = {
        "AdamW": {"lr": [0.01, 0.02], "plain_lr": [0.02], "fields": {"optimizer": {"name": "adamw"}}},
        "diverging": {"lr": [1e20], "plain_lr": [1e20], "fields": {"steps": 20}},
    }
    fields = {"configs": ["base.yaml"], "out": str(tmp_path / "out"), "jobs": 2, "beyond": 0, "rows": rows}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(fields))

    def compare():
        command = [sys.executable, PROGRAM, tmp_path / "compare.yaml"]
        return subprocess.run(command, capture_output=True, text=True)

    first = compare()
    assert first.returncode == 2
    assert "diverging" in first.stderr
    del rows["diverging"]
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(fields))
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("metrics.jsonl")}
    again = compare()
    assert again.returncode == 0, again.stderr
    assert (
        made.items() <= {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("metrics.jsonl")}.items()
    )
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("metrics.jsonl")}
    assert (tmp_path / "out/curves.png").exists()
    (tmp_path / "base.yaml").write_text(to_yaml(tiny(tmp_path, "unused", steps=4)))
    other = compare()
    assert other.returncode == 2
    assert "steps is 3" in other.stderr
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("metrics.jsonl")} == made
    losses = [
        json.loads(p.read_text())["held_out_loss"] for p in (tmp_path / "out/AdamW").glob("*/summary.json")
    ]
    assert len(losses) == 3
    assert len(set(losses)) == 2, "alone or beside another, the loss is the same"
    assert f"{min(losses):.4f}" in again.stdout
