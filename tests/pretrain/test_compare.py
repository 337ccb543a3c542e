"""compare.py: which learning rates are tried, in which order, and a comparison taken up again."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from compare import chosen, command_of, parsed
from pretrain.command_line import checked, merged, read_yaml, to_yaml
from pretrain.comparison.config import Comparison, Row
from pretrain.comparison.sweep import Sweep
from pretrain.comparison.trainings import Training, Trainings
from pretrain.errors import UserError
from tiny import tiny

CONFIGS = Path(__file__).parents[2] / "configs"
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


def test_ends_of_a_sweep_are_named():
    """Guards against a best rate at the end of what was tried that is reported as if it were between others."""
    assert swept(bowl(2, 2)).at_an_end() == []
    assert swept(bowl(64, 2), beyond=1).at_an_end() == ["lr"]
    assert swept(bowl(2, 0.01), beyond=0).at_an_end() == ["plain_lr"]
    assert swept(bowl(9, 9), lr=[1.0], plain_lr=[1.0]).at_an_end() == [], "nothing was swept"


COMPARISONS = [path for path in sorted(CONFIGS.glob("*.yaml")) if "rows" in read_yaml(path)]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_trainings_of_the_repository_are_valid(path):
    """Guards against the repository's own comparisons being refused, by their program or by that of a training."""
    comparison = Comparison.model_validate(read_yaml(path))
    configs = [read_yaml(path.parent / config) for config in comparison.configs]
    trainings = Trainings(comparison, merged(*configs, comparison.fields))
    for scale, row in trainings.entries:
        checked(trainings.fields(Training(scale, row, (0.1, 0.2), 3)))


FIELDS = {
    "configs": [],
    "out": "out",
    "seeds": [5, 6],
    "rows": {
        "slow": {"lr": [1, 2, 4], "plain_lr": [1, 2, 4]},
        "base": {"lr": [1, 2, 4], "plain_lr": [2], "fields": {"a": "row"}},
    },
    "scales": {
        "small": {"fields": {"a": "scale", "b": "scale"}},
        "wide": {"rates": "lr"},
        "long": {"rates": "carried", "rows": ["base"], "seeds": [6], "row_fields": {"base": {"a": "here"}}},
    },
    "against": {"slow": ["base"]},
}


def trained(trainings, loss):
    """All that is wanted, in order, as if trained."""
    order = []
    while wanted := trainings.wanted():
        assert wanted[0] not in order
        order.append(wanted[0])
        trainings._losses[wanted[0]] = loss(wanted[0])
    return order


def test_the_order_of_trainings():
    """Guards against a later scale trained before the first, seeds that are swept, and rates not carried over."""
    trainings = Trainings(Comparison.model_validate(FIELDS), {})
    order = trained(trainings, lambda t: bowl(2, 1)(*t.point) + (t.scale == "wide") * t.point[0])
    by = {(t.scale, t.row): [u for u in order if (u.scale, u.row) == (t.scale, t.row)] for t in order}
    assert list(by) == [(s, row) for s in ("small", "wide") for row in ("slow", "base")] + [("long", "base")]
    small = by["small", "slow"]
    assert [(t.point, t.seed) for t in small][-1] == ((2, 1), 6), "the best, on the second seed"
    assert {t.seed for t in small[:-1]} == {5}
    wide = by["wide", "slow"]
    assert {t.point[1] for t in wide} == {1}, "the first scale's best rate of all else"
    assert len({t.point[0] for t in wide}) > 2
    assert [(t.point, t.seed) for t in by["long", "base"]] == [((2, 2), 6)]
    assert len({trainings.folder(t) for t in order}) == len(order)
    assert trainings.wanted() == []
    assert trainings.diverged() == []


def test_rows_that_diverge_do_not_stop_the_others():
    """Guards against a comparison that waits for rates that will never be, and a row that is left out in silence."""
    trainings = Trainings(Comparison.model_validate(FIELDS), {})
    order = trained(trainings, lambda t: math.inf if t.row == "base" else bowl(2, 2)(*t.point))
    assert {(t.scale, t.row) for t in order} == {("small", "base"), ("small", "slow"), ("wide", "slow")}
    assert trainings.diverged() == ["base (small)"]


def test_fields_of_a_training():
    """Guards against a scale that overrides a row, and seeds or rates that do not arrive."""
    trainings = Trainings(
        Comparison.model_validate({**FIELDS, "jobs": 2, "alone_steps": 7}), {"c": 0, "steps": 9}
    )
    training = Training("small", "base", (1.0, 2.0), 6)
    expected = {
        "a": "row",
        "b": "scale",
        "c": 0,
        "optimizer": {"lr": 1.0, "plain_lr": 2.0},
        "seed": 6,
        "steps": 9,
    }
    assert trainings.fields(training) == expected
    assert trainings.fields(Training("long", "base", (1.0, 2.0), 6))["a"] == "here"
    trained(trainings, lambda t: bowl(2, 1)(*t.point))
    alone = trainings.timed()
    assert [(t.scale, t.row) for t in alone] == trainings.entries
    assert {trainings.fields(t)["steps"] for t in alone} == {7}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"baseline": "none"}, "baseline names 'none' (the rows are slow, base)"),
        ({"against": {"slow": ["none"]}}, "against names 'none'"),
        ({"scales": {"x": {"rows": ["none"]}}}, "scales.x.rows names 'none'"),
        ({"scales": {"x": {"row_fields": {"none": {}}}}}, "scales.x.row_fields names 'none'"),
        ({"scales": {"x": {"rates": "carried"}}}, "rates of the first scale are 'carried'"),
        (
            {"scales": {"x": {"rows": ["base"]}, "y": {"rates": "lr"}}},
            "rates of 'slow' cannot be carried over",
        ),
        ({"seeds": []}, "Invalid seeds: []"),
        ({"rows": {}}, "Invalid rows: {}"),
    ],
)
def test_refused(change, said):
    """Guards against a mistake that hours of training end in."""
    with pytest.raises(UserError) as error:
        chosen({**FIELDS, **change}, parsed(["x.yaml"]))
    assert said in str(error.value)


def test_chosen_on_the_command_line():
    """Guards against rows and scales that are trained though not asked for, or without what they are compared with."""
    some = chosen(
        FIELDS, parsed(["x.yaml", "--row", "base", "--scale", "long", "--out", "there", "--jobs", "3"])
    )
    assert (some.out, some.jobs) == (Path("there"), 3)
    entries = [("small", "slow"), ("small", "base"), ("long", "base")]
    assert some.entries() == entries, "with the baseline and the first scale"
    assert chosen({**FIELDS, "baseline": "base"}, parsed(["x.yaml", "--row", "base"])).against == {}
    with pytest.raises(UserError, match=r"Invalid --row: 'nobody' .*'slow', 'base'"):
        chosen(FIELDS, parsed(["x.yaml", "--row", "nobody"]))


def test_the_command_names_no_folders():
    """Guards against reports with the paths of one machine."""
    args = parsed(
        [
            *("/home/me/configs/evidence.yaml", "--data", "/home/me/a text.txt", "--row", "best, rank 4"),
            *("--out", "/home/me/elsewhere/evidence"),
        ]
    )
    assert command_of(args) == (
        "python examples/compare.py configs/evidence.yaml --data 'a text.txt' --row 'best, rank 4' --out runs/evidence"
    )


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
    assert (tmp_path / "out/report_curves.png").exists()
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
    assert f"{min(losses):.4f}" in (tmp_path / "out/report.md").read_text()
