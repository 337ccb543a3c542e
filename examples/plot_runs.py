"""Overlays the curves of runs of pretrain_llama.py, ended or not, shows their subspaces, prints a table of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretrain.errors import in_sentences
from pretrain.results.plots import plot_curves, plot_diagnostics
from pretrain.results.read import read_runs, runs_table


@in_sentences("stopped")
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG to write (%(default)s)")
    args = parser.parse_args()
    runs = read_runs(args.runs)
    plot_curves(runs, args.out)
    print(runs_table(runs))
    print(f"\nCurves: {args.out}")
    if any((folder / "diagnostics.jsonl").exists() for folder in args.runs):
        subspaces = args.out.with_name(f"{args.out.stem}_subspaces.png")
        plot_diagnostics(args.runs, subspaces, [run.label for run in runs])
        print(f"Subspaces: {subspaces}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
