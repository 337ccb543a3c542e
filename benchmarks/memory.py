"""Memory that a step allocates beyond the state: its peak, beside what must be in flight for one matrix."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.llama_60m import HIDDEN, INTERMEDIATE, NEVER, RANK, stepper
from benchmarks.timing import table


def peak_bytes(run: object) -> int:
    """Largest sum of live allocations during `run`, from the allocator's own reports to the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()  # type: ignore[operator]
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def main() -> None:
    # The allocator reports to the profiler from the calling thread only: one thread, so one matrix in flight.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    long, short = INTERMEDIATE * RANK * 4, HIDDEN * RANK * 4
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, keys in {
            "no refresh": {"update_proj_gap": NEVER},
            "plain": {"update_proj_gap": 1, "sketch": "plain"},
            "half power": {"update_proj_gap": 1, "sketch": "half_power"},
            "warm": {"update_proj_gap": 1, "sketch": "warm"},
        }.items():
            peak = peak_bytes(stepper(dtype, **keys))
            rows.append(
                (str(dtype).removeprefix("torch."), name, f"{peak / 2**20:.2f}", f"{peak / long:.1f}")
            )
    print("\nMemory allocated during a step of the same matrices, one thread, so one matrix in flight\n")
    print(table(("weights", "step", "peak MiB", "in projected gradients"), rows))
    full = HIDDEN * INTERMEDIATE * 4
    print(
        f"\nof the largest matrix, {HIDDEN} x {INTERMEDIATE}: projected gradient or test matrix "
        f"{long / 2**20:.2f} MiB, panel {short / 2**20:.2f} MiB, a full fp32 matrix {full / 2**20:.2f} MiB"
    )
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
