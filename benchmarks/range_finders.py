"""The range finders: time, error, rank and orthogonality, as Markdown tables and pictures.

    python -m benchmarks.range_finders [--only NAME ...] [--plots FOLDER] [--page docs/range_finders.md]

Residuals and errors are evaluated in fp64.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import matrices
from benchmarks.llama_60m import decaying_gradient
from benchmarks.timing import interleaved, table
from galore_rrf import adaptive_range_finder, range_finder, svd_lowrank

LARGE, SMALL, RANK = (2048, 5461), (512, 1376), 128
UNIT = 2.0**-24  # unit roundoff of fp32
BETWEEN, PANELS, METHODS = (
    ("householder", "gram_schmidt"),
    ("householder", "cholesky_qr", "gram_schmidt"),
    ("left_looking", "right_looking"),
)
WORDS = {
    "householder": "Householder",
    "gram_schmidt": "Gram-Schmidt",
    "cholesky_qr": "Cholesky QR twice",
    "left_looking": "left",
    "right_looking": "right",
    "plain": "plain",
    "half_power": "half power",
}
FIXED = "fixed rank with coefficients"


# --- What is evaluated in fp64 -----------------------------------------------------------------------


def relative_error(a: Tensor, q: Tensor, b: Tensor | None = None) -> float:
    """||A - Q B||_F / ||A||_F, B = Q^T A where not given."""
    a, q = a.double(), q.double()
    b = q.mT @ a if b is None else b.double()
    return float((a - q @ b).norm() / a.norm())


def best_errors(a: Tensor) -> Tensor:
    """The relative errors of the best approximations of rank 0 ... min(m, n) (Eckart and Young)."""
    squares = torch.linalg.svdvals(a.double()).square()
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return (tails / tails[0]).sqrt()


def smallest_rank(best: Tensor, tolerance: float) -> int:
    return int((best > tolerance).sum())


def orthogonality(q: Tensor) -> float:
    """||Q^T Q - I||_1 in units of m u."""
    q = q.double()
    departure = q.mT @ q - torch.eye(q.shape[1], dtype=torch.float64)
    return float(departure.abs().sum(0).max()) / (q.shape[0] * UNIT)


# --- (a) to (g), a table each ------------------------------------------------------------------------


def size(a: Tensor) -> str:
    return f"{a.shape[0]} x {a.shape[1]}"


def fixed_rank_work(a: Tensor, rank: int) -> dict[str, Callable[[], object]]:
    def ours(sketch: str, coefficients: bool) -> Callable[[], object]:
        return partial(range_finder, a, rank, sketch=sketch, coefficients=coefficients)

    return {
        "torch.svd_lowrank(niter=2)": partial(torch.svd_lowrank, a, rank, niter=2),
        "plain, basis": ours("plain", False),
        "plain, basis and coefficients": ours("plain", True),
        "half power, basis": ours("half_power", False),
        "half power, basis and coefficients": ours("half_power", True),
        "galore_rrf.svd_lowrank(niter=2)": partial(svd_lowrank, a, rank, niter=2),
    }


def fixed_rank() -> str:
    reach = {
        (LARGE, "plain, basis"): "150x / 5x",
        (LARGE, "half power, basis"): "90x / 3x",
        (SMALL, "plain, basis"): "35x / 5x",
    }
    rows: list[tuple[str, ...]] = []
    for shape, rounds, svd_rounds in ((LARGE, 15, 2), (SMALL, 51, 7)):
        a = decaying_gradient(*shape)
        svd = interleaved({"svd": partial(torch.linalg.svd, a, full_matrices=False)}, svd_rounds)["svd"]
        ms = interleaved(fixed_rank_work(a, RANK), rounds)
        rows.append((size(a), "torch.linalg.svd", f"{svd:.0f}", "1", "", ""))
        for name, t in ms.items():
            over_svd, over_lowrank = svd / t, ms["torch.svd_lowrank(niter=2)"] / t
            goal = reach.get((shape, name), "")
            rows.append((size(a), name, f"{t:.1f}", f"{over_svd:.0f}x", f"{over_lowrank:.1f}x", goal))
    return table(("matrix", f"rank {RANK} by", "ms", "over SVD", "over svd_lowrank", "reach"), rows)


def adaptive() -> str:
    a, rank, block = decaying_gradient(*LARGE), 512, 128
    find = partial(adaptive_range_finder, a, block=block)
    work: dict[tuple[str, str], Callable[[], object]] = {}
    ranks: dict[tuple[str, str], int] = {}
    for sketch in ("plain", "half_power"):
        first = find(0.0, sketch=sketch, max_rank=rank, trim=False, method="right_looking")
        tolerance = 1.001 * float(first.residual)
        work[sketch, FIXED] = partial(range_finder, a, rank, sketch=sketch)
        ranks[sketch, FIXED] = rank
        for trim, method in product((False, True), METHODS):
            name = f"{WORDS[method]}-looking, {'trimmed' if trim else 'untrimmed'}"
            work[sketch, name] = partial(find, tolerance, sketch=sketch, method=method, trim=trim)
            ranks[sketch, name] = int(find(tolerance, sketch=sketch, method=method, trim=trim).rank)
    ms = interleaved(work, 11)
    reach = {"left-looking, untrimmed": "<= 1.3", "right-looking, untrimmed": "<= 2"}
    rows: list[tuple[str, ...]] = []
    for (sketch, name), t in ms.items():
        ratio = f"{t / ms[sketch, FIXED]:.2f}"
        rows.append((WORDS[sketch], name, str(ranks[sketch, name]), f"{t:.0f}", ratio, reach.get(name, "")))
    return table((f"{size(a)}, b = {block}", "", "rank", "ms", "ratio", "reach"), rows)


def errors(samples: dict[str, Tensor], seeds: int = 5) -> str:
    """The mean over the seeds."""

    def over_best(a: Tensor, best: float, basis: Callable[[int], Tensor]) -> str:
        return f"{sum(relative_error(a, basis(seed)) for seed in range(seeds)) / seeds / best:.3f}"

    def ours(seed: int, a: Tensor, **keys: Any) -> Tensor:
        return range_finder(a, RANK, coefficients=False, seed=seed, **keys).basis

    def peer(seed: int, a: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return torch.svd_lowrank(a, RANK, niter=2)[0]

    finders = {
        "plain": partial(ours, sketch="plain"),
        "half power": ours,
        "half power, 8 over": partial(ours, oversampling=8),
        "power 1": partial(ours, sketch="power"),
        "svd_lowrank(2)": peer,
    }
    rows: list[tuple[str, ...]] = []
    for name, a in samples.items():
        best = float(best_errors(a)[RANK])
        goal = "<= 1.2" if name == "1 / i" or name.startswith("gradient") else "<= 1.3"
        ratios = (over_best(a, best, partial(find, a=a)) for find in finders.values())
        rows.append((name, size(a), f"{best:.1e}", *ratios, goal))
    return table(("matrix", "", "best", *finders, "reach, half power"), rows)


def ranks(samples: dict[str, Tensor], seeds: int = 3) -> str:
    """The largest of the seeds."""
    rows: list[tuple[str, ...]] = []
    for tolerance, (name, a) in product((0.3, 0.1, 0.01), samples.items()):
        smallest = smallest_rank(best_errors(a), tolerance)
        ratios = []
        ways: tuple[dict[str, Any], ...] = ({"extra_blocks": 1}, {"extra_blocks": 0}, {"trim": False})
        for sketch, keys in product(("plain", "half_power"), ways):
            found = (adaptive_range_finder(a, tolerance, sketch=sketch, seed=s, **keys) for s in range(seeds))
            ratios.append(f"{max(int(f.rank) for f in found) / smallest:.2f}")
        rows.append((f"{tolerance:g}", name, str(smallest), *ratios))
    header = ("tolerance", "matrix", "smallest", "plain, 1 extra", "0 extra", "untrimmed")
    return table((*header, "half power, 1 extra", "0 extra", "untrimmed"), rows)


def full_rank(side: int = 1024) -> str:
    torch.manual_seed(0)
    a = torch.randn(side, side)
    find = partial(adaptive_range_finder, a, 0.0)
    work: dict[str, Callable[[], object]] = {
        "torch.linalg.qr, Q formed": partial(torch.linalg.qr, a),
        "tolerance 0, the defaults (b = 64)": find,
        "tolerance 0, plain": partial(find, sketch="plain"),
        "tolerance 0, b = 128": partial(find, block=128),
        "tolerance 0, b = 128, implicit": partial(find, block=128, trim=False, implicit=True),
        "tolerance 0, b = 128, left-looking": partial(find, block=128, method="left_looking"),
    }
    ms = interleaved(work, 15)
    base = ms["torch.linalg.qr, Q formed"]
    rows: list[tuple[str, ...]] = [
        (name, f"{t:.0f}", f"{t / base:.2f}", "<= 2" if "defaults" in name else "") for name, t in ms.items()
    ]
    return table((f"{size(a)}, full rank", "ms", "ratio", "reach"), rows)


def mixes(samples: dict[str, Tensor]) -> str:
    """Time on one matrix; of the rest the worst over all samples, at a tolerance that the method can keep."""
    a = decaying_gradient(1024, 2736)
    tolerance = {"left_looking": 3e-3, "right_looking": 1e-4}
    pairs = list(product(METHODS, BETWEEN, PANELS))
    work = {
        pair: partial(
            adaptive_range_finder,
            a,
            0.0,
            block=128,
            max_rank=512,
            trim=False,
            sketch="plain",
            method=pair[0],
            between=pair[1],
            panel=pair[2],
        )
        for pair in pairs
    }
    ms = interleaved(work, 7)
    rows: list[tuple[str, ...]] = []
    for pair in pairs:
        method, between, panel = pair
        wished = tolerance[method]
        over = off = lost = 0.0
        for x in samples.values():
            found = adaptive_range_finder(
                x, wished, trim=False, method=method, between=between, panel=panel, block=32
            )
            assert found.coefficients is not None
            true = relative_error(x, found.basis, found.coefficients)
            over = max(over, true / wished)
            off = max(off, abs(true - float(found.residual)) / UNIT)
            lost = max(lost, orthogonality(found.basis))
        time = ms[pair]
        ratio = time / ms[method, "householder", "householder"]
        numbers = f"{time:.0f}", f"{ratio:.2f}", f"{over:.3f}", f"{off:.1f}", f"{lost:.2f}"
        rows.append((WORDS[method], WORDS[between], WORDS[panel], *numbers))
    header = ("looking", "between blocks", "within a panel", "ms", "ratio", "residual / tolerance")
    return table((*header, "reported off by, u", "orthogonality, m u"), rows)


def tracking(samples: dict[str, Tensor]) -> str:
    """The largest over all blocks down to full rank: squares, in units of u ||A||^2; last of themselves."""
    rows: list[tuple[str, ...]] = []
    for name, a in samples.items():
        history = ResidualHistory(a if a.shape[0] <= a.shape[1] else a.mT)  # whose last block needs no cut
        true = history.true.square()
        squares = [
            float((estimate - true_of).abs().max()) / UNIT
            for estimate, true_of in (
                (history.printed, true),
                (history.uncorrected, history.true_left.square()),
                (history.corrected.square(), history.true_left[:-1].square()),
            )
        ]
        trailing = float((history.trailing - history.true).abs().max()) / UNIT
        rows.append((name, *(f"{x:.2f}" for x in squares), f"{trailing:.1f}"))
    header = ("matrix", "fp32, as printed", "fp64 sums", "corrected (left-looking)")
    return table((*header, "trailing norm (right-looking), not squared"), rows)


class ResidualHistory:
    """Relative residuals after every block of a run to full rank: true ones and four estimates.

    The differences of squares are of squared residuals, since they may be negative.
    """

    def __init__(self, a: Tensor, block: int = 16) -> None:
        def run(method: str) -> tuple[Tensor, Tensor, Tensor]:
            found = adaptive_range_finder(a, 0.0, block=block, trim=False, method=method)
            assert found.coefficients is not None
            assert isinstance(found.residuals, list)
            return found.basis, found.coefficients, torch.tensor(found.residuals, dtype=torch.float64)

        q, b, self.trailing = run("right_looking")
        self.ranks = torch.arange(1, len(self.trailing) + 1).mul(block).clamp(max=b.shape[0])
        self.true = self._true(a, q, b)
        # As printed: E -= ||B_i||^2, all in fp32.
        total = e = a.square().sum()
        printed = []
        for rows in b.split(block):
            e = e - rows.square().sum()
            printed.append(e / total)
        self.printed = torch.stack(printed[: len(self.ranks)]).double()

        q, b, corrected = run("left_looking")
        self.true_left = self._true(a, q, b)
        norm2 = a.double().square().sum()
        kept = b.double().square().sum(1).cumsum(0)
        self.uncorrected = (norm2 - kept[self.ranks - 1]) / norm2
        self.corrected = corrected[:-1]  # the last is measured, not a difference

    def _true(self, a: Tensor, q: Tensor, b: Tensor) -> Tensor:
        left, errors, done = a.double(), [], 0
        norm = left.norm()
        for rank in self.ranks.tolist():
            left = left - q[:, done:rank].double() @ b[done:rank].double()
            errors.append(left.norm() / norm)
            done = rank
        return torch.stack(errors)


# --- Together ----------------------------------------------------------------------------------------


def put_into_page(page: Path, tables: dict[str, str]) -> None:
    """Replaces what stands between ``<!-- table NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: where the page has no place for a table.
    """
    text = page.read_text()
    for name, markdown in tables.items():
        place = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = place.subn(lambda found, new=markdown: f"{found[1]}\n{new}\n\n{found[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{page} has {count} places for the table {name}")
    page.write_text(text)


def main(only: list[str] | None = None, plots: Path | None = None, page: Path | None = None) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    decaying, gradients, hard = matrices.decaying(), matrices.gradients(), matrices.hard()
    sections: dict[str, tuple[str, Callable[[], str]]] = {
        "fixed": ("Fixed rank", fixed_rank),
        "adaptive": ("Adaptive against fixed rank", adaptive),
        "errors": (
            f"Error over the best possible of rank {RANK}, mean of 5 seeds",
            lambda: errors({**decaying, **gradients}),
        ),
        "ranks": (
            "Rank over the smallest possible, b = 64, largest of 3 seeds",
            lambda: ranks({**decaying, **gradients}),
        ),
        "full": ("Full rank", full_rank),
        "mixes": (
            "The mixes: ms for rank 512 of 1024 x 2736 with b = 128; else the worst of all matrices",
            lambda: mixes({**decaying, **gradients, **hard}),
        ),
        "tracking": (
            "Estimates of the residual, largest distance from the true one",
            lambda: tracking({**decaying, **gradients, **hard}),
        ),
    }
    unknown = set(only or ()) - set(sections)
    if unknown:
        raise SystemExit(f"no table {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    tables = {}
    for name, (caption, make) in sections.items():
        if only is not None and name not in only:
            continue
        tables[name] = make()
        print(f"\n{caption}\n\n{tables[name]}", flush=True)
    if page is not None:
        put_into_page(page, tables)
    if plots is not None:
        from benchmarks import range_finder_plots  # needs matplotlib

        for path in range_finder_plots.draw_all(plots, decaying, gradients):
            print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these tables alone; without names none")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="also draw PNGs into it (matplotlib)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the tables into this Markdown page")
    main(**vars(parser.parse_args()))
