"""`residual` of the optimizer: its keys, its states, refreshes made elsewhere, and memory."""

import math
import os
import subprocess
import sys

import pytest
import torch
from matrices import generator
from test_residual import MODES, back

from galore_rrf import GaLoreAdamW

pytestmark = pytest.mark.core


@pytest.mark.parametrize("keys", [{}, {"tolerance": 0.5}, {"projector": "svd"}], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_feedback_in_the_optimizer_loses_nothing(device, keys, maximize):
    """Guards against refreshes made elsewhere that see another gradient, or drop what the moment loses."""
    w = torch.nn.Parameter(torch.randn(20, 31, dtype=torch.float64, generator=generator(2)).to(device))
    opt = GaLoreAdamW([w], rank=5, update_proj_gap=2, residual="feedback", maximize=maximize, **keys)
    total = torch.zeros_like(w.data)
    for number in range(7):
        w.grad = torch.randn(w.shape, dtype=w.dtype, generator=generator(30 + number)).to(device)
        opt.step()
        state = opt.state[w]
        moment = back(state["exp_avg"], state["basis"], state["side"])
        total += (-w.grad if maximize else w.grad) - moment
    error = -state["error"] if maximize else state["error"]
    torch.testing.assert_close(total, 9 * moment + error, rtol=0, atol=1e-11)


def test_refreshes_made_elsewhere_see_what_is_fed_back(device):
    """Guards against a basis of the gradient alone, or an error at another scale; with beta1 = 0 the moment is R."""
    w = torch.nn.Parameter(torch.randn(31, 20, dtype=torch.float64, generator=generator(2)).to(device))
    keys = {"projector": "svd", "residual": "feedback", "residual_scale": 0.7, "update_proj_gap": 1}
    opt = GaLoreAdamW([w], rank=5, betas=(0.0, 0.9), **keys)
    error = torch.zeros_like(w.data)
    for number in range(3):
        w.grad = torch.randn(w.shape, dtype=w.dtype, generator=generator(30 + number)).to(device)
        fed = w.grad + 0.7 * error
        opt.step()
        state = opt.state[w]
        q, error = state["basis"], state["error"].clone()
        best = torch.linalg.svd(fed.cpu()).Vh[:5].mT
        torch.testing.assert_close((q @ q.mT).cpu(), best @ best.mT, rtol=0, atol=1e-10)
        torch.testing.assert_close(state["exp_avg"], fed @ q, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("residual", "entries"),
    [
        ("scaled", {"residual_norm"}),
        ("sign", set()),
        ("normalized", set()),
        ("orthogonalized", set()),
        ("feedback", {"error"}),
    ],
)
def test_state_follows_the_mode(device, residual, entries):
    """Guards against state where none is needed, a mode changed while training that finds none, and a model cast on
    whose state stays behind."""
    params = [torch.nn.Parameter(torch.ones(s, device=device)) for s in ((9, 12), (2, 9, 12), (6, 3, 3, 3))]
    opt = GaLoreAdamW(params, rank=2, residual=residual)
    modes = [(mode, torch.float32) for mode in (residual, "drop", residual)]
    for mode, dtype in (*modes, (residual, torch.bfloat16), (residual, torch.float64)):
        opt.param_groups[0]["residual"] = mode
        for p in params:
            p.data = p.data.to(dtype)
            p.grad = torch.randn(p.shape, generator=generator(4)).to(p)
        opt.step()
        plain = {"step", "exp_avg", "exp_avg_sq", "basis", "rank", "side", "key", "refreshes", "last_refresh"}
        for p in params:
            assert set(opt.state[p]) == (plain if mode == "drop" else plain | entries)
            assert {opt.state[p][name].dtype for name in {"basis", "error"} & opt.state[p].keys()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", ["scaled", "sign", "normalized", "feedback"])
def test_little_as_large_as_a_weight(device, threads, residual, dtype):
    """Guards against a residual that is there in full, or twice: beside its tiles a step allocates what a plain one
    does, and once the residual where it is normalized, the gradient with it where it is fed back.
    """
    if device.type != "cpu":
        pytest.skip("the profiler is asked for allocations on a CPU")
    from benchmarks.memory import peak_bytes

    threads(1)
    w = torch.nn.Parameter(torch.ones(1000, 2000, dtype=dtype))
    w.grad = torch.randn(w.shape, generator=generator(1)).to(dtype)
    peaks = []
    for mode in ("drop", residual):
        opt = GaLoreAdamW([w], rank=16, update_proj_gap=10**6, residual=mode)
        opt.step()
        peaks.append(peak_bytes(opt.step))
    whole, projected, tile = w.numel() * w.element_size(), 16 * 2000 * 4, 2**16 * 4
    full = {"normalized": 4 * w.numel(), "feedback": whole}.get(residual, 0)
    # R and what it is made of, the tile and its operands; half precision cast.
    assert peaks[1] <= peaks[0] + 2 * projected + 3 * tile + 1.01 * full
    assert whole > 4 * projected + 8 * tile


OUT_OF_MEMORY = """
import resource, sys, torch
from galore_rrf import GaLoreAdamW
torch.set_num_threads(1)
start, grad = torch.zeros(200_000, 64), torch.randn(200_000, 64, generator=torch.Generator().manual_seed(0))
steps = []
for gap, headroom in ((2, int(sys.argv[1])), (99, None)):
    w = torch.nn.Parameter(start.clone())
    w.grad = grad
    opt = GaLoreAdamW([{"params": [w], "rank": 32, "update_proj_gap": gap, "residual": "feedback"}])
    opt.step()
    opt.step()
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    if headroom:
        resource.setrlimit(resource.RLIMIT_AS, (used + headroom * 2**20, limit[1]))
    opt.step()
    resource.setrlimit(resource.RLIMIT_AS, limit)
    state = opt.state[w]
    steps.append([w.detach(), *(state[name] for name in ("exp_avg", "exp_avg_sq", "basis", "error"))])
    print(state["refreshes"])
print(*(torch.equal(a, b) for a, b in zip(*steps)))
"""


NO_RESIDUAL = """
import resource, torch
from galore_rrf import GaLoreAdamW
torch.set_num_threads(1)
w = torch.nn.Parameter(torch.zeros(20_000, 600))
w.grad = torch.randn(20_000, 600, generator=torch.Generator().manual_seed(0))
opt = GaLoreAdamW([{"params": [w], "rank": 8, "residual": "orthogonalized"}])
opt.step()
state = opt.state[w]
parts = [w.detach(), *(state[name] for name in ("exp_avg", "exp_avg_sq", "basis", "step"))]
before = [part.clone() for part in parts]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 30 * 2**20, limit[1]))
try:
    opt.step()
    raised = False
except (RuntimeError, MemoryError):
    raised = True
resource.setrlimit(resource.RLIMIT_AS, limit)
print(raised, *(torch.equal(a, b) for a, b in zip(parts, before)))
"""


def limited(*command):
    """The words that a program prints which limits its own memory."""
    # Whatever is freed goes back, so that the limit is one.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", *command],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits the address space as Linux does"
)


@on_linux
def test_rotation_without_memory_to_feed_back_changes_nothing():
    """Guards against moments in the new subspace beside the old basis, where memory runs out between the two.

    The ordinary step needs gradient and error together, 49 MiB, and the projected gradient three times, 73 MiB; a
    rotation first moments old and new, and before them what is moved: 170 MiB.
    """
    assert limited(OUT_OF_MEMORY, "150") == ["1", "1", *5 * ["True"]]


@on_linux
def test_residual_without_memory_changes_nothing():
    """Guards against moments that have moved where the weight has not: E and what it becomes need 92 MiB."""
    assert limited(NO_RESIDUAL) == 6 * ["True"]


@pytest.mark.parametrize("keys", [{}, {"tolerance": 0.5}, {"projector": "svd"}, {"state_dtype": torch.uint8},
                                  {"proj_type": "reverse_std"}, {"update_proj_gap": 1}])  # fmt: skip
@pytest.mark.parametrize("residual", MODES)
def test_in_the_optimizer(device, residual, keys):
    """Guards against a key that does not reach the step, or not with refreshes made elsewhere."""
    moved = []
    for scale in (0.0, 1.0):
        g = generator(3)
        shapes = [(20, 31), (31, 20), (3, 12, 17), (8, 5, 3, 3)]
        params = [torch.nn.Parameter(torch.randn(s, generator=g).to(device)) for s in shapes]
        opt = GaLoreAdamW(
            params, lr=0.01, rank=4, residual=residual, residual_scale=scale, weight_decay=0.0,
            **{"update_proj_gap": 2, **keys},
        )  # fmt: skip
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g).to(device)
            opt.step()
        moved.append([p.detach().clone() for p in params])
    for without, with_it in zip(*moved, strict=True):
        assert float((without - with_it).abs().mean()) > 1e-4


@pytest.mark.parametrize(
    ("error", "message", "keys"),
    [
        (ValueError, "Invalid residual: 'other'", {"residual": "other"}),
        (ValueError, "Invalid residual_scale: nan", {"residual": "sign", "residual_scale": math.nan}),
        (TypeError, "Invalid residual_scale: '1'", {"residual": "sign", "residual_scale": "1"}),
        (ValueError, "residual='sign' and proj_type='full'", {"residual": "sign", "proj_type": "full"}),
    ],
)
def test_bad_values(error, message, keys):
    """Guards against values and combinations that are taken silently."""
    w = [torch.nn.Parameter(torch.randn(8, 9, generator=generator(1)))]
    with pytest.raises(error, match=message):
        GaLoreAdamW(w, rank=2, **keys)
