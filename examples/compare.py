"""Compares optimizers: the same text, seeds and steps, learning rates swept for each.

    python examples/compare.py configs/compare_tiny.yaml
    python examples/compare.py configs/evidence.yaml --data english.txt --out runs/english

For every row the peak learning rate of the matrices is swept, then, at its best, that of the other parameters;
a sweep whose best value lies at an end goes on beyond it.  The best is trained on further seeds, and at further
scales.  Every training is a run of pretrain_llama.py in a folder of its own; an interrupted comparison takes up where
it was.  Where several ran at once, the best of each row is trained once more, alone, for its times.  The end, also of
a part, is report.md with its pictures.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.command_line import merged, read_yaml, sentence
from pretrain.comparison.config import Comparison
from pretrain.comparison.outcome import Outcomes
from pretrain.comparison.report import write_report
from pretrain.comparison.trainings import Trainings
from pretrain.errors import UserError, in_sentences
from pydantic import ValidationError


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path, help="YAML: configs, out, rows, scales, seeds, jobs")
    parser.add_argument(
        "--data", action="append", default=[], metavar="PATH", help="text to train on; again for more"
    )
    parser.add_argument("--out", type=Path, help="folder of all its runs, instead of the YAML's")
    parser.add_argument("--jobs", type=int, help="trainings at once, instead of the YAML's")
    parser.add_argument(
        "--row", action="append", default=[], help="only this row and the baseline; again for more"
    )
    parser.add_argument("--scale", action="append", default=[], help="only this scale; again for more")
    parser.add_argument("--report", action="store_true", help="train nothing, report on what is there")
    parser.add_argument(
        "--publish", type=Path, metavar="FILE.md", help="write the report and its pictures there too"
    )
    return parser.parse_args(argv)


def chosen(fields: dict[str, object], args: argparse.Namespace) -> Comparison:
    """The comparison of a YAML's fields with what the command line says of it; UserError."""
    try:
        whole = Comparison.model_validate(
            merged(fields, {k: v for k in ("out", "jobs") if (v := getattr(args, k))})
        )
        for option, names, known in (("row", args.row, whole.rows), ("scale", args.scale, whole.scales)):
            if unknown := [name for name in names if name not in known]:
                raise UserError(
                    f"Invalid --{option}: {unknown[0]!r} (must be one of {', '.join(map(repr, known))})"
                )
    except ValidationError as error:
        raise UserError("\n".join(map(sentence, error.errors()))) from error
    rows = whole.rows
    if args.row:
        baseline = whole.baseline or next(iter(rows))
        rows = {name: row for name, row in rows.items() if name in (baseline, *args.row)}
    # The first scale stays: its best rates may be carried over.
    first = next(iter(whole.scales))
    scales = {
        name: scale.model_copy(update={"rows": [row for row in whole.rows_of(scale) if row in rows]})
        for name, scale in whole.scales.items()
        if not args.scale or name in (first, *args.scale)
    }
    against = {
        row: kept
        for row, others in whole.against.items()
        if row in rows and (kept := [o for o in others if o in rows])
    }
    return whole.model_copy(update={"rows": rows, "scales": scales, "against": against})


def command_of(args: argparse.Namespace) -> str:
    """The command line as another machine would have it: files of this one by their names alone."""
    words = ["python", "examples/compare.py", f"configs/{args.comparison.name}"]
    words += [word for path in args.data for word in ("--data", Path(path).name)]
    words += [
        word
        for option in ("row", "scale")
        for name in getattr(args, option)
        for word in (f"--{option}", name)
    ]
    words += ["--out", f"runs/{args.out.name}"] if args.out else []
    return shlex.join(words)


@in_sentences("stopped; the same command goes on from here")
def main() -> int:
    args = parsed(sys.argv[1:])
    comparison = chosen(read_yaml(args.comparison), args)
    configs = [read_yaml(args.comparison.parent / config) for config in comparison.configs]
    text = {"data": [str(Path(path).absolute()) for path in args.data]} if args.data else {}
    trainings = Trainings(comparison, merged(*configs, comparison.fields, text))
    try:
        if not args.report:
            trainings.run()
    finally:
        trainings.read()
        paths = [comparison.out / "report.md", *([args.publish] if args.publish else [])]
        try:
            for path in paths:
                write_report(Outcomes(trainings), path, command_of(args))
                print(f"report: {path}")
        except UserError as error:
            print(error)
    if diverged := trainings.diverged():
        raise UserError(f"every training of {' and of '.join(diverged)} diverged: lower its lr and plain_lr")
    return 0


if __name__ == "__main__":
    sys.exit(main())
