"""The benchmarks of a GPU: `make gpu-bench`, or ``python -m benchmarks.gpu``.

    python -m benchmarks.gpu [--device cuda] [--quick] [--seconds 540] [--out build/gpu-bench.json]

Medians of CUDA events, both sides of a comparison interleaved in one run after a round that warms up.  Tables go
to stdout, the same numbers with the device's name to a JSON file, and at the end what the time limit, the memory
or a missing package left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.gpu import normals, optimizer_step, range_finders
from benchmarks.gpu.report import Report, environment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, which tell only that all of it runs"
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="begin nothing after these")
    parser.add_argument(
        "--out", type=Path, default=Path("build/gpu-bench.json"), metavar="FILE", help="the JSON"
    )
    arguments = parser.parse_args()
    report = Report(arguments.device, arguments.seconds, arguments.quick, arguments.out)
    print(", ".join(f"{key} {value}" for key, value in environment(report.device).items()))
    for section in (optimizer_step, range_finders, normals):
        section.measure(report)
    report.write()
    print("\nLeft out: " + ("nothing" if not report.left_out else ""))
    for reason in report.left_out:
        print(f"- {reason}")
    print(f"\n{report.path}")


if __name__ == "__main__":
    main()
