"""Run folders as read, tabled and drawn: what is in the files is what is in the figures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from pretrain.errors import UserError
from pretrain.results.curves import curves_figure
from pretrain.results.plots import plot_curves, plot_ranks, plot_spectra
from pretrain.results.read import Run, markdown, megabytes, read_runs, runs_table
from pretrain.results.style import smoothed
from pretrain.results.subspaces import kind_and_depth, ranks_figure, spectra_figure

PROGRAM = Path(__file__).parents[2] / "examples" / "plot_runs.py"
GALORE = {"name": "galore", "rank": 8, "lr": 0.01, "plain_lr": 0.002, "tolerance": None}
Q = "model.layers.{}.self_attn.q_proj.weight"
UP = "model.layers.{}.mlp.up_proj.weight"


def training_line(step, loss=None):
    return {
        "step": step,
        "loss": 10 / step if loss is None else loss,
        "lr": 0.01,
        "plain_lr": 0.002,
        "grad_norm": 1.0 + step / 100,
        "tokens": 512 * step,
        "seconds": 2.0 + step % 2,
        "optimizer_seconds": 0.5,
        "refresh_seconds": 0.25,
    }


def make_run(folder, steps=40, optimizer=GALORE, every=10, ended=True, more=()):
    """A run of known values: a step takes 2 or 3 seconds, .5 of them in the optimizer, .25 in refreshes."""
    folder.mkdir(parents=True)
    config = {
        "optimizer": optimizer,
        "model": {"hidden_size": 64, "num_hidden_layers": 2},
        "clip_norm": 1.2,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for step in range(1, steps + 1):
        lines.append(training_line(step))
        if every and step % every == 0:
            lines.append({"step": step, "held_out_loss": 5.0, "perplexity": 1000.0 / step})
    lines += more
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ended:
        parts = [("momentum", 2**20), ("variance", 2**20)]
        summary = {
            "steps": steps,
            "tokens": 512 * steps,
            "seconds": 2.5 * steps,
            "optimizer_seconds": 0.5 * steps,
            "refresh_seconds": 0.25 * steps,
            "peak_memory_bytes": 3 * 2**20,
            "state": [{"what": what, "measured": size, "formula": size} for what, size in parts],
            "held_out_loss": 5.0,
            "perplexity": 148.41,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def append(folder, text):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def legend_texts(legend):
    return [t.get_text() for t in legend.get_texts()]


def test_read(tmp_path):
    run = Run.read(make_run(tmp_path / "first"))
    assert run.label == "first"
    assert run.config["optimizer"] == GALORE
    assert run.steps.tolist() == list(range(1, 41))
    assert run.loss.tolist() == [10 / s for s in range(1, 41)]
    assert run.seconds.tolist() == [2.0 + s % 2 for s in range(1, 41)]
    assert set(run.optimizer_seconds) == {0.5}
    assert set(run.refresh_seconds) == {0.25}
    assert run.held_out_steps.tolist() == [10, 20, 30, 40]
    assert run.perplexity.tolist() == [100.0, 50.0, 1000 / 30, 25.0]
    assert run.summary["peak_memory_bytes"] == 3 * 2**20
    assert Run.read(tmp_path / "first", label="second").label == "second"


def test_half_written_last_line(tmp_path):
    folder = make_run(tmp_path / "run", ended=False)
    append(folder, '{"step": 41, "lo')
    run = Run.read(folder)
    assert run.steps[-1] == 40
    assert run.summary is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"step": 41, "lo\n{"step": 42, "loss": 1.0}\n',
            r"metrics\.jsonl, line 45 is not JSON: '\{\"step\": 41",
        ),
        ("[1]\n", "line 45 is no JSON object"),
        ('{"loss": 1.0}\n', "line 45 has no step"),
        ('{"step": 41, "loss": "low"}\n', "line 45: invalid loss 'low'"),
        ('{"step": 41, "ranks": {"a": "b"}}\n', "line 45: invalid ranks"),
    ],
)
def test_damaged_metrics(tmp_path, text, message):
    folder = make_run(tmp_path / "run")
    append(folder, text)
    with pytest.raises(UserError, match=message):
        Run.read(folder)


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="no run"):
        Run.read(tmp_path / "nowhere")
    folder = make_run(tmp_path / "empty", steps=0, ended=False)
    with pytest.raises(UserError, match="no training step yet"):
        Run.read(folder)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="cannot read"):
        Run.read(folder)
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is no YAML"):
        Run.read(folder)
    folder = make_run(tmp_path / "summary")
    (folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is not JSON"):
        Run.read(folder)


def test_missing_and_repeated_values(tmp_path):
    """Null and absent values are NaN; a run that went back counts the later line of a step."""
    more = [
        {**training_line(41), "loss": None},
        {"step": 42, "loss": float("nan")},
        training_line(40, loss=7.0),
    ]
    run = Run.read(make_run(tmp_path / "run", more=more, ended=False))
    assert run.steps.tolist() == list(range(1, 43))
    assert run.loss[39] == 7.0
    assert np.isnan(run.loss[40:]).all()
    assert run.seconds[40] == 3.0
    assert np.isnan(run.seconds[41])
    plot_curves([run], tmp_path / "a.png")
    assert is_png(tmp_path / "a.png")


def test_smoothed():
    values = np.random.default_rng(0).normal(size=200)
    values[[3, 100]] = np.nan, np.inf
    for part, window in ((40, 5), (10, 20), (500, 1)):
        start = (window - 1) // 2
        reach = window - 1 - start
        expected = []
        for i in range(200):
            around = values[max(0, i - reach) : i + start + 1]
            around = around[np.isfinite(around)]
            expected.append(around.mean() if np.isfinite(values[i]) else np.nan)
        np.testing.assert_allclose(smoothed(values, part), expected, atol=1e-14)


def test_curves_of_one_run(tmp_path):
    run = Run.read(make_run(tmp_path / "run"))
    loss, perplexity, by_time, step_time, rates, norm = curves_figure([run]).axes
    raw, mean, held_out = loss.lines
    assert raw.get_xdata().tolist() == run.steps.tolist()
    assert raw.get_ydata().tolist() == run.loss.tolist()
    assert mean.get_ydata().tolist() == smoothed(run.loss).tolist()
    assert held_out.get_xdata().tolist() == [10, 20, 30, 40]
    assert held_out.get_ydata().tolist() == [5.0] * 4
    assert perplexity.lines[0].get_ydata().tolist() == run.perplexity.tolist()
    assert perplexity.get_yscale() == "log"
    assert by_time.get_xlabel() == "time spent in steps (s)"  # 100 in all
    assert by_time.lines[0].get_xdata().tolist() == np.cumsum(run.seconds).tolist()
    assert by_time.lines[2].get_xdata().tolist() == [25.0, 50.0, 75.0, 100.0]
    assert "20.0% in the optimizer" in step_time.get_title()  # .5 of 2.5
    assert step_time.lines[0].get_ydata().tolist() == run.seconds.tolist()
    assert [rates.lines[i].get_ydata()[0] for i in (0, 1)] == [0.01, 0.002]
    assert norm.lines[2].get_ydata()[0] == 1.2, "where it is clipped"


def test_curves_of_several(tmp_path):
    """Very different lengths, one without validation, names that LaTeX or matplotlib would eat."""
    folders = [
        make_run(tmp_path / "long", steps=4000),
        make_run(tmp_path / "_$hidden$", steps=20, every=0, ended=False),
        make_run(tmp_path / "lora", optimizer={"name": "lora", "rank": 4, "lr": 0.003, "plain_lr": None}),
    ]
    runs = read_runs(folders)
    figure = curves_figure(runs)
    loss, perplexity, by_time, bars = figure.axes
    for i, run in enumerate(runs):
        assert loss.lines[2 * i].get_ydata().tolist() == run.loss.tolist()
        assert loss.lines[2 * i + 1].get_ydata().tolist() == smoothed(run.loss).tolist()
    assert [len(line.get_xdata()) for line in perplexity.lines] == [400, 4]
    assert by_time.get_xlabel() == "time spent in steps (min)"
    assert by_time.lines[0].get_xdata()[-1] == pytest.approx(10_000 / 60)
    widths = [patch.get_width() for patch in bars.patches]
    assert widths == pytest.approx([0.25, 0.25, 2.0] * 3)
    assert [t.get_text().strip() for t in bars.texts] == ["2.50 s, 20.0% optimizer"] * 3
    colours = [line.get_color() for line in loss.lines[1::2]]
    assert len(set(colours)) == 3
    (legend,) = figure.legends
    assert [line.get_color() for line in legend.get_lines()] == colours
    assert legend_texts(legend) == [
        "long:  galore, rank 8, lr 0.01 / 0.002; perplexity 0.2",
        r"./_\$hidden\$:  galore, rank 8, lr 0.01 / 0.002",
        "lora:  lora, rank 4, lr 0.003 / 0.003; perplexity 25.0",
    ]
    plot_curves(runs, tmp_path / "curves.png")
    assert is_png(tmp_path / "curves.png")


def test_curves_of_many_are_told_apart(tmp_path):
    run = Run.read(make_run(tmp_path / "run"))
    lines = curves_figure([run] * 12).axes[0].lines[1::2]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_curves_of_one_step(tmp_path):
    run = Run.read(make_run(tmp_path / "run", steps=1, every=1, ended=False))
    for name, runs in (("one.png", [run]), ("two.png", [run, run])):
        plot_curves(runs, tmp_path / name)
        assert is_png(tmp_path / name)


def test_curves_without_times_or_norms(tmp_path):
    more = [{"step": s, "loss": 5.0} for s in range(1, 10)]
    run = Run.read(make_run(tmp_path / "run", steps=0, ended=False, more=more))
    plot_curves([run], tmp_path / "one.png")
    plot_curves([run, run], tmp_path / "two.png")
    assert is_png(tmp_path / "one.png")


def test_divergence_does_not_hide_the_others(tmp_path):
    good = Run.read(make_run(tmp_path / "good"))
    bad = Run.read(make_run(tmp_path / "bad", more=[training_line(41, loss=1e9)]))
    loss = curves_figure([good, bad]).axes[0]
    assert loss.get_ylim()[1] < 13
    assert "1e+09" in loss.get_ylabel()
    assert "cut" not in curves_figure([good]).axes[0].get_ylabel()


def test_same_names(tmp_path):
    runs = read_runs(
        [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run"), make_run(tmp_path / "c")]
    )
    assert [run.label for run in runs] == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"), "c"]


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_table(tmp_path):
    make_run(tmp_path / "ended", steps=1000)
    tolerance = {**GALORE, "tolerance": 0.5}
    make_run(tmp_path / "running", ended=False, every=0, optimizer=tolerance)
    header, _, ended, running = cells(runs_table(read_runs([tmp_path / "ended", tmp_path / "running"])))
    assert dict(zip(header, ended, strict=True)) == {
        "run": "ended",
        "optimizer": "galore, rank 8",
        "lr / plain_lr": "0.01 / 0.002",
        "steps": "1,000",
        "tokens": "512,000",
        "held-out loss": "5.0000",
        "perplexity": "148.41",
        "seconds": "2,500.0",
        "in the optimizer": "500.0",
        "of the steps": "20.0%",
        "in refreshes": "250.0",
        "optimizer state": "2.0 MiB",
        "peak memory": "3.0 MiB",
    }
    alone = cells(runs_table(read_runs([tmp_path / "ended"])))  # turned, to fit a terminal
    assert [row for row in alone if not set(row[0]) <= {"-"}] == list(
        map(list, zip(header, ended, strict=True))
    )
    found = dict(zip(header, running, strict=True))
    assert found["optimizer"] == "galore, tolerance 0.5, rank up to 8"
    assert found["steps"] == "40 (not ended)"
    assert found["seconds"] == "100.0"
    assert {found[k] for k in ("held-out loss", "perplexity", "optimizer state", "peak memory")} == {"-"}


def test_markdown():
    assert markdown(["a", "b"], [["x|y", "1"], ["z", "22"]]) == (
        "| a    |  b |\n| ---- | -: |\n| x\\|y |  1 |\n| z    | 22 |"
    )
    assert markdown(["a", ""], [["x", ""]]) == "| a  |    |\n| -- | -: |\n| x  |    |", (
        "an empty column is one too"
    )
    assert (megabytes(3 * 2**19), megabytes(None)) == ("1.5 MiB", "-")


def make_spectra(run, step, **layers):
    """Saved singular values, as the trainer's; `layers` by short names."""
    folder = run / "spectra"
    folder.mkdir(exist_ok=True)
    arrays = {}
    for name, (shape, values) in layers.items():
        arrays[f"{name}/shape"] = np.array(shape)
        arrays |= {f"{name}/{kind}": np.asarray(v) for kind, v in values.items()}
    with (folder / f"step-{step:06d}.npz").open("wb") as file:
        np.savez(file, **arrays)


def smallest_k(values, share=0.9):
    """By trying every k."""
    energy = [v * v for v in map(float, values)]
    return next(k for k in range(1, len(energy) + 1) if sum(energy[:k]) >= share * sum(energy))


def test_spectra_figure(tmp_path):
    run = make_run(tmp_path / "run")
    decay = {0: 0.3, 10: 0.5, 1000: 1.0}
    saved = {step: 7.0 * np.arange(1, 65) ** -power for step, power in decay.items()}
    for step, values in saved.items():
        first = ((64, 96), {"gradient": values, "momentum": values[:8], "variance": values[:8]})
        make_spectra(run, step, first=first, second=((64, 64), {"gradient": values}))
    figure = spectra_figure(run)
    assert len(figure.axes) == 4, "a row for every layer"
    assert "run" in figure.get_suptitle()
    assert "galore, rank 8" in figure.get_suptitle()
    left, right = figure.axes[:2]
    assert left.get_yscale() == "log"
    assert left.get_title().startswith("Gradient of first, 64 x 96")
    for line, values in zip(left.lines, saved.values(), strict=True):
        assert line.get_xdata().tolist() == list(range(1, 65))
        np.testing.assert_allclose(line.get_ydata(), values / 7.0, rtol=1e-15)
    assert legend_texts(left.get_legend()) == ["after 0 steps", "after 10 steps", "after 1,000 steps"]

    ks = [smallest_k(values) for values in saved.values()]
    assert legend_texts(right.get_legend()) == [
        f"after 0 steps: k = {ks[0]} of n = 64 keeps 90%",
        f"after 10 steps: k = {ks[1]} of n = 64 keeps 90%",
        f"after 1,000 steps: k = {ks[2]} of n = 64 keeps 90%",
        "rank 8 of its subspace",
    ]
    assert "rank" not in legend_texts(figure.axes[3].get_legend())[-1], "the second is not projected"
    curves = [line for line in right.lines if len(line.get_xdata()) == 65]
    points = [line for line in right.lines if line.get_marker() == "o"]
    for curve, point, values, k in zip(curves, points, saved.values(), ks, strict=True):
        energy = 100 * np.cumsum(values**2) / np.sum(values**2)
        np.testing.assert_allclose(curve.get_ydata(), [0, *energy], rtol=1e-12)
        assert point.get_xdata() == [k]
        np.testing.assert_allclose(point.get_ydata(), [energy[k - 1]], rtol=1e-12)
        assert point.get_color() == curve.get_color()
    plot_spectra(run, tmp_path / "spectra.png")
    assert is_png(tmp_path / "spectra.png")


def test_spectra_of_moments(tmp_path):
    run = make_run(tmp_path / "run")
    values = np.arange(8, 0, -1.0)
    make_spectra(
        run, 0, first=((64, 96), {"gradient": np.ones(64), "momentum": values, "variance": values**2})
    )
    figure = spectra_figure(run, ["momentum", "variance"])
    assert [ax.get_title().splitlines()[0] for ax in figure.axes[::2]] == [
        "Momentum of first, 64 x 96, in a subspace of rank 8:",
        "Variance of first, 64 x 96, in a subspace of rank 8:",
    ]
    np.testing.assert_allclose(figure.axes[2].lines[0].get_ydata(), values**2 / 64)
    k = smallest_k(values)
    assert legend_texts(figure.axes[1].get_legend()) == [f"after 1 step: k = {k} of n = 8 keeps 90%"]
    with pytest.raises(ValueError, match="Invalid kinds"):
        spectra_figure(run, ["weights"])


def test_spectra_without_energy(tmp_path):
    run = make_run(tmp_path / "run")
    for step, values in ((0, np.zeros(6)), (1, np.full(6, np.nan)), (2, np.array([2.0, 1, 0, 0, 0, 0]))):
        make_spectra(run, step, first=((6, 6), {"gradient": values}))
    texts = legend_texts(spectra_figure(run).axes[1].get_legend())
    assert texts == [
        "after 0 steps: zero",
        "after 1 step: not finite",
        "after 2 steps: k = 2 of n = 6 keeps 90%",
    ]
    plot_spectra(run, tmp_path / "spectra.png")
    assert is_png(tmp_path / "spectra.png")


def test_no_spectra_and_too_many(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="no spectra of gradient"):
        plot_spectra(run, tmp_path / "spectra.png")
    layers = {f"layer{i}": ((6, 6), {"gradient": np.arange(6, 0, -1.0)}) for i in range(20)}
    make_spectra(run, 0, **layers)
    figure = spectra_figure(run)
    assert len(figure.axes) == 16
    assert "8 of 20" in figure.get_suptitle()
    with pytest.raises(UserError, match="no spectra of momentum"):
        spectra_figure(run, ["momentum"])


def test_ranks(tmp_path):
    more = [
        {"step": 1, "ranks": {Q.format(0): 3, Q.format(1): 4, UP.format(0): 5, UP.format(1): 6}},
        {"step": 21, "ranks": {Q.format(0): 7, Q.format(1): 4, UP.format(0): 5, UP.format(1): 2}},
    ]
    run = Run.read(make_run(tmp_path / "run", optimizer={**GALORE, "tolerance": 0.4}, more=more))
    steps, ranks = run.ranks[Q.format(0)]
    assert (steps.tolist(), ranks.tolist()) == ([1, 21], [3, 7])
    figure = ranks_figure(run)
    panels = {ax.get_title(): ax for ax in figure.axes[:2]}
    assert list(panels) == ["self_attn.q_proj", "mlp.up_proj"]
    found = {
        (kind, line.get_label()): (line.get_xdata().tolist(), line.get_ydata().tolist())
        for kind, ax in panels.items()
        for line in ax.lines[:2]
    }
    assert found == {
        ("self_attn.q_proj", "0"): ([1, 21, 40], [3, 7, 7]),
        ("self_attn.q_proj", "1"): ([1, 21, 40], [4, 4, 4]),
        ("mlp.up_proj", "0"): ([1, 21, 40], [5, 5, 5]),
        ("mlp.up_proj", "1"): ([1, 21, 40], [6, 2, 2]),
    }
    colours = [[line.get_color() for line in ax.lines[:2]] for ax in panels.values()]
    assert colours[0] == colours[1], "a depth has the same colour everywhere"
    assert colours[0][0] != colours[0][1]
    assert [t.get_text() for t in figure.axes[2].get_yticklabels()] == ["0", "1"], "the colour bar"
    plot_ranks(run, tmp_path / "ranks.png")
    assert is_png(tmp_path / "ranks.png")


def test_no_ranks(tmp_path):
    run = Run.read(make_run(tmp_path / "run"))
    with pytest.raises(UserError, match="no ranks"):
        plot_ranks(run, tmp_path / "ranks.png")


def test_kind_and_depth():
    assert kind_and_depth(Q.format(11)) == ("self_attn.q_proj", 11)
    assert kind_and_depth("_orig_mod." + UP.format(3)) == ("mlp.up_proj", 3)
    assert kind_and_depth("lm_head.weight") == ("lm_head", 0)


def plot_runs(*args):
    return subprocess.run([sys.executable, PROGRAM, *args], capture_output=True, text=True)


def test_program(tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", ended=False)]
    out = tmp_path / "out.png"
    done = plot_runs(*folders, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert is_png(out)
    runs = read_runs(folders)
    assert runs_table(runs) in done.stdout
    assert str(out) in done.stdout


def test_program_refuses_in_a_sentence(tmp_path):
    run = make_run(tmp_path / "run")
    for args in ([tmp_path / "nowhere"], [run, "--out", tmp_path / "no" / "such.png"]):
        done = plot_runs(*args)
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert str(args[-1]) in done.stderr
