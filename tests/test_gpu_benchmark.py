"""The benchmarks of GPUs on tiny shapes, so that they run when there is one."""

import json
import math
import sys

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import limits, shapes

pytestmark = pytest.mark.core


@pytest.fixture
def run(device, monkeypatch, tmp_path):
    """Runs them and returns what the JSON says."""

    def run(*arguments):
        out = tmp_path / "bench.json"
        monkeypatch.setattr(
            sys, "argv", ["gpu", "--device", device.type, "--quick", "--out", str(out), *arguments]
        )
        gpu.main()
        return json.loads(out.read_text())

    return run


def test_every_section_is_measured_and_written(run, capsys):
    """Guards against benchmarks that rot where no GPU runs them: a row lost, a number that is none."""
    found = run()
    printed = capsys.readouterr().out
    assert len(found["sections"]) == 4
    for title, rows in found["sections"].items():
        assert f"## {title}\n" in printed
        assert rows
        for row in rows:
            assert set(row) == set(rows[0])
            assert 0 < row["ms"] < math.inf
    assert all(reason.startswith("galore_torch") for reason in found["left_out"])
    steps = [row for row in next(iter(found["sections"].values())) if row["limit ms"] is not None]
    assert len(steps) == 7  # AdamW; three kinds of moments with and without a refresh
    assert all(row["over limit"] == pytest.approx(row["ms"] / row["limit ms"]) for row in steps)
    assert {"device", "driver", "torch", "date"} <= set(found)


def test_what_the_time_limit_leaves_out_is_said(run, capsys):
    """Guards against a run that ends early as if it had been whole."""
    found = run("--seconds", "0")
    assert not any(found["sections"].values())
    assert len(found["left_out"]) >= 4
    printed = capsys.readouterr().out
    assert all(f"- {reason}\n" in printed for reason in found["left_out"])


@pytest.mark.parametrize(("name", "parameters"), [("60M", 58.1e6), ("1B", 1.339e9), ("7B", 6.738e9)])
def test_shapes_are_those_of_the_published_models(name, parameters):
    """Guards against a model that is not the one that its name says."""
    model = shapes.MODELS[name]
    assert model.layers * model.entries + model.plain_entries == pytest.approx(parameters, rel=1e-3)


def test_limit_of_a_step_by_hand():
    """Guards against work that is counted twice, or not at all."""
    model = shapes.Model("one", 10, 30, 1, 4, vocabulary=7)
    rates = limits.Rates(
        bandwidth=1e3,
        project=dict.fromkeys(model.matrices, 1e6),
        back=dict.fromkeys(model.matrices, 2e6),
        panel=dict.fromkeys(model.matrices, 1e4),
    )
    # Four of 10 x 10 and three of 30 x 10: 13 rows of ten, 1300 entries; low-rank moments of 130 rows.
    assert (model.entries, model.moment_entries, model.basis_entries) == (1300, 520, 280)
    plain = 2 * 7 * 10 + 3 * 10
    products = 2 * 1300 * 4 * (1 / 1e6 + 1 / 2e6)
    moved = (520 * (4 * 4 + 12) + plain * (6 + 8)) / 1e3
    assert limits.step_limit(model, rates, 4, 2, False) == pytest.approx(1e3 * (products + moved))
    refresh = 2 * 2 * 1300 * 4 / 1e6 + (6 * 70 + 6 * 130) * 16 / 1e4
    assert limits.step_limit(model, rates, 4, 2, True) == pytest.approx(1e3 * (products + moved + refresh))
    assert limits.adamw_limit(model, rates) == pytest.approx(1e3 * 14 * (1300 + plain) / 1e3)
