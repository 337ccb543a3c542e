"""Diagnostics of a run: what the optimizer said is in the file, and what is in the file is in the figures."""

import json
import math
import signal

import numpy as np
import pytest
from pretrain.checkpoints import Checkpoints
from pretrain.errors import UserError
from pretrain.results.diagnostics import diagnostics_figure, read_diagnostics
from pretrain.results.plots import plot_diagnostics
from pretrain.results.read import Run, runs_table
from pretrain.run import Interrupted, run
from test_plots import GALORE, UP, Q, is_png, legend_texts, make_run, plot_runs
from test_run import interrupted_after, metrics
from tiny import tiny

from galore_rrf import GaLoreAdamW


@pytest.fixture
def folder(tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "diagnostics"
    path.mkdir(exist_ok=True)
    return path


def noted(out):
    """The lines of diagnostics.jsonl, without times."""
    lines = map(json.loads, (out / "diagnostics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "refresh_seconds"} for line in lines]


def test_a_run_notes_its_refreshes(folder, monkeypatch):
    """Guards against refreshes that are left out, noted twice, at another step or with other numbers."""
    said = {}

    def step(self, closure=None, *, taken=GaLoreAdamW.step):
        result = taken(self, closure)
        said.update({(r.name, r.steps): r for r in self.diagnostics() if r.since_refresh == 0})
        return result

    monkeypatch.setattr(GaLoreAdamW, "step", step)
    config = tiny(folder, "noted", diagnostics_every=2, optimizer={"tolerance": 0.5, "rank": 16})
    run(config, resume=False)  # 8 steps, a refresh every 3, checkpoints every 3
    lines = noted(config.out)
    assert len(lines) == len(said) == 3 * 14
    assert {(line["step"], line["refreshed_at"]) for line in lines} == {(2, 1), (4, 4), (8, 7)}
    for line in lines:
        record = said[line["name"], line["refreshed_at"]].as_dict()
        for key in ("rank", "gradient_norm", "residual_norm", "energy_kept", "state_bytes", "angle"):
            value = record[key]
            assert line[key] == (None if math.isnan(value) else value), key
    subspaces = read_diagnostics(config.out)
    for name, subspace in subspaces.items():
        assert subspace.steps.tolist() == [1, 4, 7]
        assert subspace.values["rank"].tolist() == [said[name, step].rank for step in (1, 4, 7)]
        assert np.isnan(subspace.values["angle"]).tolist() == [True, False, False]
    assert is_png(config.out / "diagnostics.png")


def test_runs_that_note_nothing(folder):
    """Guards against files and pictures of what is not there."""
    for name, fields in {
        "off": {"diagnostics_every": None},
        "adamw": {"optimizer": {"name": "adamw"}},
    }.items():
        config = tiny(folder, name, steps=2, **fields)
        run(config, resume=False)
        assert not list(config.out.glob("diagnostics*"))
        with pytest.raises(UserError, match="no subspaces noted"):
            plot_diagnostics([config.out], folder / "none.png")


@pytest.mark.parametrize("step", [2, 5])
def test_resumed_runs_note_the_same(folder, monkeypatch, step):
    """Guards against refreshes lost, or noted twice, by a run that goes back to a checkpoint."""
    straight, stopped = (
        tiny(folder, f"{name} {step}", diagnostics_every=5, save_every=4) for name in ("straight", "stopped")
    )
    run(straight, resume=False)
    with monkeypatch.context() as patch:
        interrupted_after(patch, step, signal.SIGINT)
        with pytest.raises(Interrupted):
            run(stopped, resume=False)
    Checkpoints(stopped.out / "checkpoints", 1).path(step).unlink()
    run(stopped, resume=True)
    assert noted(stopped.out) == noted(straight.out)


def test_tensorboard_shows_them(folder):
    """Guards against scalars under other steps or names."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny(folder, "board", tensorboard=True, diagnostics_every=1)
    run(config, resume=False)
    board = EventAccumulator(str(config.out / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    lines = [json.loads(line) for line in (config.out / "diagnostics.jsonl").read_text().splitlines()]
    always = ("energy_kept", "residual_norm", "rank", "refreshes", "refresh_seconds")
    for key, steps in {"angle": [4, 7], **{key: [1, 4, 7] for key in always}}.items():
        found = {(line["name"], line["refreshed_at"]): line[key] for line in lines}
        for name in {line["name"] for line in lines}:
            events = board.Scalars(f"{key}/{name}")
            assert [e.step for e in events] == steps
            assert [e.value for e in events] == pytest.approx([found[name, s] for s in steps])


def test_state_bytes_follow_ranks(folder):
    """Guards against a table that knows only the bytes of the end."""
    config = tiny(folder, "bytes", optimizer={"tolerance": 0.05, "rank": 24, "update_proj_gap": 1})
    run(config, resume=False)
    read = Run.read(config.out)
    steps, counts = read.state_bytes
    assert steps.tolist() == [line["step"] for line in metrics(config.out) if "ranks" in line]
    last = sum(row["measured"] for row in read.summary["state"])
    assert counts[-1] == last
    low, high = counts.min() / 2**20, counts.max() / 2**20
    assert low < high
    assert f"{last / 2**20:,.1f} MiB ({low:,.1f} MiB to {high:,.1f} MiB)" in runs_table([read])


def line(name, refreshed_at, energy, angle, rank=8, **others):
    return {
        "step": 40,
        "refreshed_at": refreshed_at,
        "name": name,
        "rank": rank,
        "energy_kept": energy,
        "angle": angle,
        **others,
    }


def panel(figure, title):
    """The axes with this title."""
    (found,) = [ax for ax in figure.axes if ax.get_title() == title]
    return found


def make_noted(folder, lines):
    make_run(folder, optimizer=GALORE)
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


LINES = [
    line(Q.format(0), 1, 0.5, None),
    line(Q.format(1), 3, 0.7, None),
    line(UP.format(0), 1, 0.25, None),
    line(Q.format(0), 21, 0.9, 30.0),
    line(UP.format(0), 31, None, 60.0),
]


def test_figure_of_one_run(tmp_path):
    """Guards against lines and maps that do not show what was noted, each matrix from its own refresh on."""
    folder = make_noted(tmp_path / "run", LINES)
    figure = diagnostics_figure([folder])
    energy, energy_map, angle, angle_map = figure.axes[:4]
    assert "by kind" in energy.get_title()
    steps = [1, 3, 21, 31]
    q, up = energy.lines
    assert q.get_xdata().tolist() == steps
    assert q.get_ydata().tolist() == pytest.approx([50, 60, 80, 80])
    assert up.get_xdata().tolist() == steps[:3]
    assert up.get_ydata().tolist() == pytest.approx([25, 25, 25])
    assert [(x.get_xdata().tolist(), x.get_ydata().tolist()) for x in angle.lines] == [
        ([21, 31], [30, 30]),
        ([31], [60]),
    ]
    (mesh,) = energy_map.collections
    table = np.ma.filled(mesh.get_array().astype(float), np.nan)
    expected = [[50, 50, 90, 90], [np.nan, 70, 70, 70], [25, 25, 25, np.nan]]
    np.testing.assert_allclose(table, expected)
    assert [t.get_text() for t in angle_map.get_yticklabels()] == ["self_attn.q_proj", "mlp.up_proj"]
    assert angle_map.get_yticks().tolist() == [1.0, 2.5]
    (legend,) = figure.legends
    assert legend_texts(legend) == ["self_attn.q_proj", "mlp.up_proj"]
    assert [h.get_color() for h in legend.get_lines()] == [q.get_color(), up.get_color()]
    assert not any("Rank" in ax.get_title() for ax in figure.axes), "always the same"
    plot_diagnostics([folder], tmp_path / "one.png")
    assert is_png(tmp_path / "one.png")


def test_figure_of_first_refreshes(tmp_path):
    """Guards against a run too short for an angle that has no picture."""
    folder = make_noted(tmp_path / "run", [line(Q.format(i), 1, 0.5, None) for i in range(2)])
    plot_diagnostics([folder], tmp_path / "one.png")
    assert is_png(tmp_path / "one.png")
    shown = [ax.get_title() for ax in diagnostics_figure([folder]).axes]
    assert shown[0] == "Energy kept by the subspace, by kind"
    assert not any("Angle" in title for title in shown)
    nothing = make_noted(tmp_path / "nothing", [line(Q.format(0), 1, None, None)])
    assert diagnostics_figure([nothing]).axes[0].get_title() == "Rank, by kind"


def test_ranks_that_change_are_shown(tmp_path):
    """Guards against a figure that leaves out what a tolerance changes."""
    lines = [line(Q.format(0), 1, 0.5, None, 4), line(Q.format(0), 11, 0.5, 10.0, 6)]
    figure = diagnostics_figure([make_noted(tmp_path / "run", lines)])
    assert panel(figure, "Rank, by kind").lines[0].get_ydata().tolist() == [4, 6]


def test_refreshes_and_what_is_left_are_shown(tmp_path):
    """Guards against quantities that are noted and in no picture; counts are shown where they differ."""
    lines = [
        line(Q.format(0), 1, 0.5, None, residual_norm=3.0, refreshes=1, refresh_seconds=0.5),
        line(Q.format(0), 11, 0.5, 10.0, residual_norm=2.0, refreshes=2, refresh_seconds=0.75),
    ]
    together = diagnostics_figure([make_noted(tmp_path / "together", lines)])
    assert not any("Refreshes" in ax.get_title() for ax in together.axes)
    later = line(Q.format(1), 5, 0.5, None, residual_norm=1.0, refreshes=1, refresh_seconds=0.25)
    figure = diagnostics_figure([make_noted(tmp_path / "apart", [*lines, later])])
    expected = {
        "Norm of what the subspace leaves": [3, 2, 1.5],
        "Refreshes so far": [1, 1, 1.5],
        "Time of refreshes so far": [0.5, 0.375, 0.5],
    }
    for title, means in expected.items():
        assert panel(figure, f"{title}, by kind").lines[0].get_ydata().tolist() == means
    several = diagnostics_figure([tmp_path / "together", tmp_path / "apart"])
    for title, means in expected.items():
        assert panel(several, title).lines[1].get_ydata().tolist() == means


def test_many_steps_are_few_columns(tmp_path):
    """Guards against maps with more columns than pixels."""
    lines = [line(Q.format(0), step, step / 5000, 1.0) for step in range(1, 5001)]
    folder = make_noted(tmp_path / "run", lines)
    (mesh,) = diagnostics_figure([folder]).axes[1].collections
    table = mesh.get_array()
    assert table.shape[1] <= 400
    assert (table[0, 0], table[0, -1]) == pytest.approx((0.02, 100))


def test_figure_of_several_runs(tmp_path):
    """Guards against lines of other runs, and means that are not over all matrices."""
    folders = [
        make_noted(tmp_path / "a", LINES),
        make_run(tmp_path / "b", optimizer=GALORE),
        make_noted(tmp_path / "c", [line(Q.format(0), 5, 1.0, 45.0, 3)]),
    ]
    figure = diagnostics_figure(folders)
    names = ("Energy kept by the subspace", "Angle to the subspace before", "Rank")
    energy, angle, rank = (panel(figure, name) for name in names)
    assert [x.get_ydata().tolist() for x in energy.lines] == [
        pytest.approx([37.5, 145 / 3, 185 / 3, 80]),
        [100],
    ]
    assert angle.lines[1].get_ydata().tolist() == [45]
    assert rank.lines[1].get_ydata().tolist() == [3]
    (legend,) = figure.legends
    assert [t.split(":")[0] for t in legend_texts(legend)] == ["a", "c"]
    (legend,) = diagnostics_figure(folders[::2], ["same", "same"]).legends
    assert [t.split(":")[0] for t in legend_texts(legend)] == ["same", "same"]
    done = plot_runs(*folders, "--out", tmp_path / "out.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert "out_subspaces.png" in done.stdout
    assert is_png(tmp_path / "out_subspaces.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1, "na\n{"step": 2, "name": "a"}\n', r"diagnostics\.jsonl, line 6 is not JSON"),
        ('{"step": 1, "name": "a"}\n', "line 6 has no name or no step"),
        ('{"refreshed_at": 1, "name": "a", "angle": "wide"}\n', "line 6: invalid angle 'wide'"),
    ],
)
def test_damaged_diagnostics(tmp_path, text, message):
    """Guards against a traceback, or a figure of half a file."""
    folder = make_noted(tmp_path / "run", LINES)
    with (folder / "diagnostics.jsonl").open("a") as file:
        file.write(text)
    with pytest.raises(UserError, match=message):
        read_diagnostics(folder)
