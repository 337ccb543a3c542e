"""The report of a comparison, on runs that are made up: losses, differences, noise, bytes and times."""

import json
import math
import re
from statistics import stdev

import pytest
import yaml
from pretrain.comparison.config import Comparison
from pretrain.comparison.outcome import Outcomes
from pretrain.comparison.report import write_report
from pretrain.comparison.trainings import Training, Trainings
from pretrain.errors import UserError
from tiny import FIELDS as RUN

ROWS = {
    "AdamW": {"lr": [0.1, 0.2], "plain_lr": [1], "fields": {"optimizer": {"name": "adamw"}}},
    "ours": {"lr": [0.1], "plain_lr": [1], "fields": {"optimizer": {"name": "galore"}}},
    "peer": {"lr": [0.1], "plain_lr": [1], "fields": {"optimizer": {"name": "galore_torch"}}},
    "late": {"lr": [0.1], "plain_lr": [1], "fields": {"optimizer": {"name": "sign"}}},
}
LOSSES = {"AdamW": (2.0, 2.1), "ours": (1.5, 1.62), "peer": (2.01, 2.08)}


def made_up(trainings, training, loss):
    """The folder that a training would have left: a step takes 100 ms, the optimizer 10, 12, 10, a refresh 2."""
    folder = trainings.folder(training)
    folder.mkdir(parents=True)
    config = trainings.fields(training)
    ours = config["optimizer"]["name"] == "galore"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    times = {"seconds": 0.1, "refresh_seconds": 0.002 if ours else 0.0, "lr": 1, "plain_lr": 1}
    steps = [
        {"step": i, "loss": 3.0, **times, "optimizer_seconds": s}
        for i, s in enumerate((0.01, 0.012, 0.01), 1)
    ]
    held_out = {"step": 3, "held_out_loss": loss, "perplexity": math.exp(loss)}
    lines = [*steps, {**held_out, "step": 1, "held_out_loss": 4.0}, held_out]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = [("momentum", 300_000), ("bases", 20_000), ("step counts", 40)]
    parts = [{"what": w, "measured": 3 * n, "matrices": n, "formula": None} for w, n in sizes]
    summary = {
        "parameters": 1000,
        "state": parts,
        "adamw_moments": {"matrices": 10**6, "all": 2 * 10**6},
        "torch": "2",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    described = {"source": "data: /home/me/text.txt", "bytes": 9, "files": 1, "documents": 2, "sha256": "5ad"}
    (folder / "data.json").write_text(json.dumps({**described, "held_out_bytes": 3}))


@pytest.fixture
def comparison(tmp_path):
    """All of it trained but for the last row."""
    model = RUN["model"]
    fields = {**RUN, "model": model, "data": ["/home/me/text.txt"], "precision": "fp32", "clip_norm": 1.0}
    fields |= {"warmup": 0.1, "schedule": "cosine", "final_lr": 0.1}
    optimizer = {"rank": 4, "weight_decay": 0.0}
    whole = {"configs": [], "out": tmp_path / "out", "rows": ROWS, "seeds": [0, 1], "beyond": 0}
    trainings = Trainings(
        Comparison(**whole, against={"ours": ["peer", "late"]}), {**fields, "optimizer": optimizer}
    )
    for row, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            made_up(trainings, Training("", row, (0.1, 1.0), seed), loss)
    made_up(trainings, Training("", "AdamW", (0.2, 1.0), 0), 2.5)
    trainings.read()
    return trainings


def cells(report, heading, row):
    """Of the first table below a heading."""
    lines = report.split(f"## {heading}")[1].splitlines()
    return next(
        [c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith(f"| {row} ")
    )


def test_the_report(comparison, tmp_path):
    """Guards against differences that are not paired, noise of something else, and bytes or times of another row."""
    write_report(Outcomes(comparison), tmp_path / "docs/found.md", "python compare.py")
    report = (tmp_path / "docs/found.md").read_text()
    noise = math.sqrt((stdev((-0.5, -0.48)) ** 2 + stdev((0.01, -0.02)) ** 2) / 2)
    assert f"{noise:.4f} (standard deviation" in report
    ours = cells(report, "Losses", "ours")
    assert ours[2] == f"{(1.5 + 1.62) / 2:.4f}"
    assert ours[3] == "1.5000 - 1.6200"
    assert ours[4] == f"{(math.exp(1.5) + math.exp(1.62)) / 2:.3f}"
    assert ours[6:] == ["-0.4900", "-0.5000, -0.4800", "below"]
    assert cells(report, "Losses", "peer")[-1] == "within noise"
    assert cells(report, "Losses", "AdamW")[1] == "0.1 / 1 (lr at an end)"
    assert cells(report, "Losses", "late")[2] == "not ended"
    costs = cells(report, "Memory and time", "ours")
    assert costs[1:5] == ["0.3 MiB", "32.0%", "0.9 MiB", "48.0%"]
    assert costs[5:] == ["10.7 ms", "10.7%", "12.0 ms", "2.00 ms", "100.0 ms", "1.00"]
    assert cells(report, "Memory and time", "peer")[8] == "-", "a package that does not tell"
    against = cells(report, "One against another", "ours")
    assert against[1:] == ["peer", "all", "-0.4850", "-0.5100, -0.4600", "below", "1.00"]
    assert "at least 1 trainings are missing, of late" in report
    assert "**0.1**: 2.0000, 0.2: 2.5000" in report


def test_what_the_report_names(comparison, tmp_path):
    """Guards against pictures that are missing, and paths of one machine in a document."""
    write_report(Outcomes(comparison), tmp_path / "found.md", "python compare.py")
    report = (tmp_path / "found.md").read_text()
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", report)
    assert len(pictures) == 3
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "text.txt" in report
    assert "/home" not in report


def test_subspaces_of_the_rows_that_have_them(comparison, tmp_path):
    """Guards against energies of other steps, means over the wrong refreshes, and a picture that is missing."""
    folder = comparison.folder(Training("", "ours", (0.1, 1.0), 0))
    steps = comparison.fields(Training("", "ours", (0.1, 1.0), 0))["steps"]

    def noted(name, at, rank, energy, angle, refreshes):
        values = {"rank": rank, "energy_kept": energy, "angle": angle, "refreshes": refreshes}
        return {"step": steps, "refreshed_at": at, "name": f"model.layers.0.{name}.weight", **values}

    lines = [
        noted("self_attn.q_proj", 1, 4, 0.9, None, 1),
        noted("self_attn.q_proj", steps, 6, 0.5, 20.0, 2),
        noted("mlp.up_proj", 1, 4, 0.7, None, 1),
        noted("mlp.up_proj", steps, 10, 0.3, 40.0, 2),
    ]
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(Outcomes(comparison), tmp_path / "found.md", "python compare.py")
    report = (tmp_path / "found.md").read_text()
    assert cells(report, "Subspaces", "ours")[1:] == ["6.0", "6 - 10", "80.0%", "40.0%", "30.0", "2"]
    assert "| AdamW" not in report.split("## Subspaces")[1].split("## ")[0]
    assert (tmp_path / "found_subspaces_ours.png").read_bytes().startswith(b"\x89PNG")


def test_scales_side_by_side(comparison, tmp_path):
    """Guards against losses, differences or noise of one scale in another's, and rates that were not carried over."""
    scales = {"small": {}, "large": {"rates": "carried", "fields": {"batch": 4}}}
    whole = comparison.comparison.model_copy(
        update={"out": tmp_path / "scales", "against": {"ours": ["peer"]}}
    )
    whole = Comparison(**{**whole.model_dump(), "scales": scales, "rows": {r: ROWS[r] for r in LOSSES}})
    trainings = Trainings(whole, comparison.fields(Training("", "AdamW", (0.1, 1.0), 0)))
    made_up(trainings, Training("small", "AdamW", (0.2, 1.0), 0), 2.5)
    for scale, added in (("small", 0.0), ("large", 1.0)):
        for row, losses in LOSSES.items():
            for seed, loss in enumerate(losses):
                gap = added if row == "ours" else 0.0
                made_up(trainings, Training(scale, row, (0.1, 1.0), seed), loss + gap)
    trainings.read()
    assert not trainings.wanted()
    write_report(Outcomes(trainings), tmp_path / "found.md", "python compare.py")
    report = (tmp_path / "found.md").read_text()
    rows = [line for line in report.split("## One against another")[1].splitlines() if "| peer" in line]
    found = {scale: line.split("|")[4].strip() for line in rows for scale in scales if f" {scale} " in line}
    assert found == {"small": "-0.4850", "large": "+0.5150"}
    assert cells(report, "Losses: large", "ours")[2] == f"{(2.5 + 2.62) / 2:.4f}"
    assert cells(report, "Losses: small", "ours")[2] == f"{(1.5 + 1.62) / 2:.4f}"
    assert "Rates that were not swept at a scale are the best of the first" in report


def test_one_seed_has_no_noise(comparison, tmp_path):
    """Guards against a verdict where nothing tells difference from noise."""
    for folder in comparison.comparison.out.glob("*/seed=1*"):
        (folder / "summary.json").unlink()
    comparison._losses.clear()
    comparison.read()
    outcomes = Outcomes(comparison)
    assert math.isnan(outcomes.noise(""))
    assert outcomes.verdict("", "ours", "AdamW") == "one seed"
    write_report(outcomes, tmp_path / "found.md", "python compare.py")
    assert "one seed, so nothing here tells noise from difference" in (tmp_path / "found.md").read_text()


def test_nothing_to_report(tmp_path):
    """Guards against an empty report that looks like a result."""
    trainings = Trainings(Comparison(configs=[], out=tmp_path, rows=ROWS), {})
    with pytest.raises(UserError, match="nothing to report yet"):
        write_report(Outcomes(trainings), tmp_path / "found.md", "python compare.py")
    assert not (tmp_path / "found.md").exists()
