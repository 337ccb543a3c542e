"""Refreshes that memory does not suffice for."""

import os
import subprocess
import sys

import pytest
import torch
from training import bias, check_state, optimizer, same, settled, train, weight

from galore_rrf import ops

pytestmark = pytest.mark.core

OUT_OF_MEMORY = """
import resource, sys, torch
from galore_rrf import GaLoreAdamW
torch.set_num_threads(1)
sketch, headroom = sys.argv[1], int(sys.argv[2])
w = torch.nn.Parameter(torch.zeros(400_000, 64))
w.grad = torch.randn(400_000, 64, generator=torch.Generator().manual_seed(0))
opt = GaLoreAdamW([{"params": [w], "rank": 32, "update_proj_gap": 2, "sketch": sketch}])
opt.step()
opt.step()
state = opt.state[w]
basis, before = state["basis"].clone(), w.detach()[0].clone()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + headroom * 2**20, limit[1]))
opt.step()
resource.setrlimit(resource.RLIMIT_AS, limit)
print(state["step"].item(), state["refreshes"], state["last_refresh"], torch.equal(basis, state["basis"]),
      torch.equal(before, w[0]))
opt.step()
print(state["step"].item(), state["refreshes"], state["last_refresh"], torch.equal(basis, state["basis"]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
@pytest.mark.parametrize("sketch", ["warm", "half_power"])
def test_refresh_without_memory_keeps_the_old_subspace(sketch):
    """Guards against a step lost, or a state half written, where a refresh runs out of memory.

    The ordinary step needs the projected gradient, 49 MiB; the refresh as much again.
    """
    command = [sys.executable, "-c", OUT_OF_MEMORY, sketch, "75"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["3.0 1 0 True False", "4.0 2 3 False"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_tolerance_refresh_without_memory_keeps_the_old_subspace(device, error, monkeypatch):
    """Guards against the same outside the step operator, where ranks change (the failure is feigned)."""
    w, b = weight("tolerance", device), bias(device)
    opt = optimizer("tolerance", w, b)
    train(opt, [w, b], range(3))
    state = opt.state[w]
    basis = state["basis"].clone()

    def fail(*_, **__):
        raise error("no memory")

    for name in ("adaptive_range_finders", "rotate_moments"):
        with monkeypatch.context() as patched:
            patched.setattr(ops, name, fail)
            train(opt, [w, b], [3])
        assert same(state["basis"], basis)
        check_state(w, state, 6)
    settled(opt)
    assert (state["step"].item(), state["refreshes"], state["last_refresh"]) == (5, 1, 0)
    train(opt, [w, b], [4])
    settled(opt)
    assert (state["step"].item(), state["refreshes"], state["last_refresh"]) == (6, 2, 5)
