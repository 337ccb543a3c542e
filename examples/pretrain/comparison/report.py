"""The report of a comparison, in Markdown with pictures beside it: every sentence with a number is made of the runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pretrain.comparison.config import Comparison
from pretrain.comparison.figures import costs_figure, curves_figure, differences_figure
from pretrain.comparison.outcome import NOISES, Outcome, Outcomes, text_of
from pretrain.errors import UserError
from pretrain.files import write_atomically
from pretrain.results.diagnostics import Subspace, read_diagnostics
from pretrain.results.plots import plot_diagnostics, save
from pretrain.results.read import Array, describe_lr, describe_model, markdown, megabytes

_FIGURES: dict[str, tuple[str, Callable[[Outcomes], Figure]]] = {
    "curves": ("held-out loss over steps and over time", curves_figure),
    "differences": ("differences of held-out losses at the end, by seed", differences_figure),
    "costs": ("loss against memory and against time", costs_figure),
}


_COSTS = (
    "State of the matrices: moments, bases and buffers at the end of training, without step counts, as a share of "
    "AdamW's two moments; the whole state is of all parameters. Times are means over the steps of a training with no "
    "other training beside it; slowest: the optimizer's slowest step but the first; refreshes are part of the "
    "optimizer, and only this package tells them."
)


def write_report(outcomes: Outcomes, path: Path, command: str) -> None:
    """Writes `path`, Markdown, and pictures named after it; UserError where no training has ended."""
    if not any(o.runs for rows in outcomes.by_scale.values() for o in rows.values()):
        raise UserError("nothing to report yet: no row has its best learning rates")
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, (caption, figure) in _FIGURES.items():
        pictures.append((caption, path.with_name(f"{path.stem}_{name}.png")))
        save(figure(outcomes), pictures[-1][1])
    sections = [
        f"# {outcomes.comparison.title or path.stem}",
        _beginning(outcomes, command),
        *(f"![{caption}]({picture.name})" for caption, picture in pictures),
        "## Settings\n\n" + _settings(outcomes),
        "## What is noise\n\n" + _noise(outcomes),
    ]
    for scale in outcomes.by_scale:
        name = f": {scale}" if scale else ""
        sections += [f"## Losses{name}\n\n" + _losses(outcomes, scale)]
        sections += [f"## Memory and time{name}\n\n" + _costs(outcomes, scale)]
    sections += [_COSTS]
    if outcomes.comparison.against:
        sections += ["## One against another\n\n" + _against(outcomes)]
    sections += [section for section in (_subspaces(outcomes, path),) if section]
    sections += ["## Learning rates tried\n\n" + _sweeps(outcomes)]
    whole = "\n\n".join(sections) + "\n"
    write_atomically(path, lambda file: file.write(whole.encode()))


def _beginning(outcomes: Outcomes, command: str) -> str:
    lines = [f"Written from the runs by\n\n```\n{command}\n```"]
    if outcomes.missing:
        unfinished = [
            f"{o.row} ({scale})" if scale else o.row
            for scale, rows in outcomes.by_scale.items()
            for o in rows.values()
            if o.missing
        ]
        lines.append(
            f"**This comparison has not ended**: at least {outcomes.missing} trainings are missing, of "
            f"{', '.join(unfinished)}. Rows without a loss below are those whose sweep has not ended; the same command "
            "goes on from here."
        )
    return "\n\n".join(lines)


def _of(outcomes: Outcomes, scale: str) -> Outcome | None:
    """Any row with a training that has ended: what all have in common is read off it."""
    return next((o for o in outcomes.by_scale[scale].values() if o.runs), None)


def _settings(outcomes: Outcomes) -> str:
    rows = []
    for scale in outcomes.by_scale:
        if (outcome := _of(outcomes, scale)) is None:
            continue
        others = outcomes.by_scale[scale].values()
        run = next(iter(outcome.runs.values()))
        config = run.config
        # Adapters of LoRA come on top.
        parameters = min((o.runs[s].summary or {})["parameters"] for o in others for s in o.runs)
        rows.append(
            (
                scale or "all",
                describe_model(config),
                f"{parameters:,}",
                f"{config['batch']} x {config['sequence_length']}",
                f"{config['steps']:,}",
                f"{config['batch'] * config['sequence_length'] * config['steps']:,}",
                ", ".join(map(str, outcomes.comparison.seeds_of(scale))),
                _swept(outcomes.comparison, scale),
            )
        )
    header = ("scale", "model", "parameters", "batch", "steps", "tokens", "seeds", "rates swept")
    first = next(o for scale in outcomes.by_scale if (o := _of(outcomes, scale)) is not None)
    run, folder = next(iter(first.runs.values())), next(iter(first.folders.values()))
    config, described = run.config, text_of(folder)
    source = ", ".join(Path(path).name for path in config["data"]) or described["source"]
    sentences = [
        f"Text: {source}, {described['bytes']:,} bytes in {described['files']} files, {described['documents']:,} "
        f"documents, SHA-256 {described['sha256']} of all of them one after the other; held out by content: "
        f"{described['held_out_bytes']:,} bytes, of which {config['eval_tokens']:,} tokens are predicted. "
        f"Vocabulary of {config['model']['vocab_size']}.",
        f"{config['precision']}, {config['device']}, {config['threads']} threads a training, "
        f"torch {(run.summary or {})['torch']}; warm-up {config['warmup']:.0%} of the steps, then "
        f"{config['schedule']} to {config['final_lr']:.0%}; gradients clipped to {config['clip_norm']}; weight decay "
        f"{config['optimizer']['weight_decay']:g}; every training of a seed sees the same text in the same order, "
        "from the same weights.",
        "Learning rates: of the matrices inside attention and MLP / of all else, which is on AdamW in every row.",
    ]
    if any(s.rates != "swept" for s in outcomes.comparison.scales.values()):
        sentences.append(
            "Rates that were not swept at a scale are the best of the first one: a row that would want others there "
            "looks worse than it is."
        )
    return markdown(header, rows, left=2) + "\n\n" + "\n\n".join(sentences)


def _swept(comparison: Comparison, scale: str) -> str:
    """Which rates a scale has tried several of."""
    rows = [comparison.rows[name] for name in comparison.rows_of(comparison.scales[scale])]
    if all(len(row.lr) == len(row.plain_lr) == 1 for row in rows):
        return "none"
    return {"swept": "both", "lr": "of the matrices", "carried": "none"}[comparison.scales[scale].rates]


def _noise(outcomes: Outcomes) -> str:
    lines = []
    for scale, rows in outcomes.by_scale.items():
        noise = outcomes.noise(scale)
        name = f"{scale}: " if scale else ""
        several = [o for o in rows.values() if len(o.losses) > 1]
        if math.isnan(noise):
            lines.append(f"- {name}one seed, so nothing here tells noise from difference.")
            continue
        moves = max(max(o.losses.values()) - min(o.losses.values()) for o in several)
        lines.append(
            f"- {name}a seed moves the loss of a row by up to {moves:.3f} nats, of all rows much together; a "
            f"difference to {outcomes.baseline} by {noise:.4f} (standard deviation over seeds, pooled over "
            f"{len(several)} rows). Under {NOISES * noise:.4f}, {NOISES} times that, is noise."
        )
    lines.append(
        "- Rates are the best on the first seed, which favours that seed; on the others nothing was chosen."
    )
    return "\n".join(lines)


def _losses(outcomes: Outcomes, scale: str) -> str:
    header = ("row", "lr / plain lr", "held-out loss", "least to largest", "perplexity", "least to largest")
    header += (f"to {outcomes.baseline}", "by seed", "")
    rows = []
    for row, o in outcomes.by_scale[scale].items():
        if not o.losses:
            diverged = o.sweep is not None and not o.sweep.wanted()
            rows.append((row, "-", "diverged" if diverged else "not ended", *["-"] * 5, ""))
            continue
        values = list(o.losses.values())
        difference = outcomes.difference(scale, row, outcomes.baseline)
        same = row == outcomes.baseline
        rows.append(
            (
                row,
                _rates(o),
                f"{o.mean:.4f}",
                f"{min(values):.4f} - {max(values):.4f}",
                f"{np.mean(np.exp(values)):.3f}",
                f"{math.exp(min(values)):.3f} - {math.exp(max(values)):.3f}",
                "" if same else _signed(difference.mean),
                "" if same else ", ".join(map(_signed, difference.by_seed)),
                "" if same else outcomes.verdict(scale, row, outcomes.baseline),
            )
        )
    return markdown(header, rows)


def _rates(o: Outcome) -> str:
    rates = describe_lr(next(iter(o.runs.values())).config)
    assert o.sweep is not None
    return rates + "".join(f" ({name} at an end)" for name in o.sweep.at_an_end())


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.4f}"


def _costs(outcomes: Outcomes, scale: str) -> str:
    header = (
        "row",
        "state of the matrices",
        "of AdamW's",
        "whole state",
        "of AdamW's",
        "optimizer",
        "of a step",
    )
    header += ("slowest", "refreshes", "step", f"to {outcomes.baseline}")
    base = outcomes.by_scale[scale].get(outcomes.baseline)
    rows = []
    for row, o in outcomes.by_scale[scale].items():
        if not o.runs:
            continue
        state = o.state
        cells = [
            row,
            megabytes(state["matrices"]),
            f"{state['matrices'] / state['AdamW, matrices']:.1%}",
            megabytes(state["all"]),
            f"{state['all'] / state['AdamW, all']:.1%}",
        ]
        if o.timed is None:
            rows.append((*cells, *["-"] * 6))
            continue
        times = o.times
        known = base is not None and base.timed is not None
        rows.append(
            (
                *cells,
                f"{times['optimizer']:.1f} ms",
                f"{times['optimizer'] / times['step']:.1%}",
                f"{times['slowest']:.1f} ms",
                "-" if math.isnan(times["refresh"]) else f"{times['refresh']:.2f} ms",
                f"{times['step']:.1f} ms",
                f"{times['step'] / base.times['step']:.2f}" if known and base is not None else "-",
            )
        )
    return markdown(header, rows)


def _against(outcomes: Outcomes) -> str:
    header = (
        "row",
        "against",
        "scale",
        "difference",
        "by seed",
        f"by {NOISES} times the noise",
        "optimizer time",
    )
    rows = []
    for row, others in outcomes.comparison.against.items():
        for other in others:
            for scale, found in outcomes.by_scale.items():
                if row not in found or other not in found:
                    continue
                difference = outcomes.difference(scale, row, other)
                a, b = found[row], found[other]
                ratio = "-"
                if a.timed is not None and b.timed is not None:
                    ratio = f"{a.times['optimizer'] / b.times['optimizer']:.2f}"
                by_seed = ", ".join(map(_signed, difference.by_seed)) or "-"
                verdict = outcomes.verdict(scale, row, other)
                rows.append((row, other, scale or "all", _signed(difference.mean), by_seed, verdict, ratio))
    return markdown(header, rows, left=3)


def _subspaces(outcomes: Outcomes, path: Path) -> str:
    """Ranks and energies of the rows that have subspaces, at the first scale; pictures of those in `against`."""
    first = next(iter(outcomes.by_scale))
    header = (
        "row",
        "mean rank",
        "ranks",
        "energy kept, first quarter",
        "last quarter",
        "angle (degrees)",
        "refreshes noted",
    )
    rows = []
    noted: dict[str, Path] = {}
    for row, o in outcomes.by_scale[first].items():
        folder = next(iter(o.folders.values()), None)
        if folder is not None and (subspaces := read_diagnostics(folder)):
            noted[row] = folder
            steps = next(iter(o.runs.values())).config["steps"]
            rows.append((row, *_of_subspaces(list(subspaces.values()), steps)))
    if not rows:
        return ""
    said = "Means over all matrices, as noted at refreshes; ranks: the least and the largest at the end."
    figures = {"": noted} if len(noted) > 1 else {}
    figures |= {row: {row: noted[row]} for row in outcomes.comparison.against if row in noted}
    for name, shown in figures.items():
        picture = path.with_name("_".join([path.stem, "subspaces", *re.findall(r"\w+", name)]) + ".png")
        plot_diagnostics(list(shown.values()), picture, list(shown))
        said += f"\n\n![subspaces over training{', by layer' if name else ''}: {', '.join(shown)}]({picture.name})"
    return f"## Subspaces\n\n{markdown(header, rows)}\n\n{said}"


def _of_subspaces(subspaces: Sequence[Subspace], steps: int) -> list[str]:
    """Cells of a row: means over matrices and refreshes."""

    def energy(first: float, last: float) -> str:
        within = [(s.steps > first * steps) & (s.steps <= last * steps) for s in subspaces]
        return _mean([s.values["energy_kept"][w] for s, w in zip(subspaces, within, strict=True)], ".1%")

    ends = [s.values["rank"][-1] for s in subspaces]
    return [
        _mean([s.values["rank"] for s in subspaces], ".1f"),
        f"{min(ends):.0f} - {max(ends):.0f}",
        energy(0, 0.25),
        energy(0.75, 1),
        _mean([s.values["angle"] for s in subspaces], ".1f"),
        f"{np.mean([s.values['refreshes'][-1] for s in subspaces]):.0f}",
    ]


def _mean(parts: Sequence[Array], form: str) -> str:
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    return format(values.mean(), form) if len(values) else "-"


def _sweeps(outcomes: Outcomes) -> str:
    parts = []
    for scale, found in outcomes.by_scale.items():
        rows = []
        for row, o in found.items():
            if o.sweep is None or not o.sweep.losses:
                continue
            lines = [_line(line) for line in o.sweep.lines().values()]
            rows.append((row, *lines, ", ".join(o.sweep.at_an_end())))
        if rows:
            parts.append(
                (f"{scale}:\n\n" if scale else "")
                + markdown(("row", "lr: loss", "plain lr: loss", "best at an end"), rows, left=4)
            )
    said = (
        "On the first seed: first the rate of the matrices, then, at its best, that of all else; the best in bold. "
        "What lies between two values, or off these two lines, was not tried; a best value at an end of a line may "
        "not be the best there is."
    )
    return "\n\n".join([said, *parts])


def _line(losses: dict[float, float]) -> str:
    best = min(losses, key=losses.__getitem__, default=None)

    def value(lr: float) -> str:
        loss = f"{losses[lr]:.4f}" if math.isfinite(losses[lr]) else "diverged"
        return f"**{lr:g}**: {loss}" if lr == best else f"{lr:g}: {loss}"

    return ", ".join(map(value, losses))
