"""adaptive_range_finder with look-ahead: the same as without, but for rounding and for what a lane throws."""

import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
from bounds import CONVERGED, RANK_CAP, check
from matrices import MATRICES, UNIT_ROUNDOFF, gaussian, layout, norm, polynomial

from galore_rrf import adaptive_range_finder as find
from galore_rrf import ops

pytestmark = pytest.mark.core

# Not divisible by the block, a block over m, one row, one column, m > n, m = n, a block of one column.
SHAPES = [
    *((50, 80, 16), (80, 50, 16), (37, 53, 64), (53, 37, 10), (37, 37, 12), (90, 120, 7)),
    *((1, 30, 4), (30, 1, 4), (1, 1, 1), (19, 18, 5), (24, 31, 1)),
]
TOLERANCES = {torch.float32: [0.3, 0.03, 1e-3, 1.2e-5, 0.0], torch.float64: [0.1, 1e-4, 1e-9, 1e-13, 0.0]}


@pytest.fixture(autouse=True)
def one_thread_a_lane(threads):
    """Three lanes of as many threads as there are processors each would wait for one another."""
    threads(1)


def both(a, tolerance, **options):
    """What is found with look-ahead, and without."""
    options = {"sketch": "plain", "method": "right_looking", **options}
    return [ops.adaptive_range_finder(a, tolerance, look_ahead=ahead, **options) for ahead in (True, False)]


def assert_agree(on, off, u, tolerance):
    """Residuals to 1e-3 of themselves + 16 u ||A||: of every block, and of the result where ranks are the same.

    They are, unless a residual is that near to the tolerance.
    """
    near = lambda x, y: abs(x - y) <= 1e-3 * y + 16 * u  # noqa: E731
    histories = [found[4][~found[4].isnan()].tolist() for found in (on, off)]
    for x, y in zip(*histories, strict=False):
        assert near(x, y), (x, y)
    if len(histories[0]) != len(histories[1]):
        assert any(near(tolerance, y) for y in [*histories[0], *histories[1]])
    elif int(on[2]) != int(off[2]):
        assert abs(int(on[2]) - int(off[2])) == 1
        assert near(float(on[3]), tolerance) or near(float(off[3]), tolerance)
    else:
        assert near(float(on[3]), float(off[3]))
        assert int(on[5]) == int(off[5])


def sweep(device, matrix, dtype, shapes, seed=0, every=1, **options):
    """One of `every` tolerances, another for each shape."""
    for i, ((m, n, block), trim) in enumerate(itertools.product(shapes, (True, False))):
        a = MATRICES[matrix](m, n, seed).to(device, dtype)
        computed = torch.float64 if dtype == torch.float64 else torch.float32
        for tolerance in TOLERANCES[computed][i % every :: every]:
            named = {"block": block, "trim": trim, **options}
            on, off = both(a, tolerance, seed=seed, **named)
            # Columns that depend on others to rounding become other directions in other panels: where a panel
            # is not Householder's, on and off then are equally good, but not the same (fourteen_decades: 3 per
            # cent apart at a residual of 4e-5).
            if options.get("panel", "householder") == "householder":
                assert_agree(on, off, UNIT_ROUNDOFF[dtype], tolerance)
            named = {k: v for k, v in named.items() if k in ("block", "trim", "max_rank", "extra_blocks")}
            check(a, on, tolerance, method="right_looking", **named)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_on_and_off_agree(device, matrix, dtype):
    """Guards against a sketch of the wrong rows, a lagging stop that keeps too much, a residual of another block."""
    first = (list(MATRICES).index(matrix) + dtype.itemsize) % 3  # all where it is slow
    sweep(device, matrix, dtype, SHAPES[first::3], every=4)


@pytest.mark.slow
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("panel", ["householder", "cholesky_qr", "gram_schmidt"])
def test_on_and_off_agree_everywhere(device, matrix, dtype, panel):
    """Guards against the same in every shape and panel, over seeds, and in larger ones."""
    if dtype == torch.float16 and matrix == "row_scaled":
        pytest.skip("its entries overflow")
    for seed in (1, 2):
        sweep(device, matrix, dtype, [*SHAPES, (300, 220, 32), (200, 410, 48)], seed=seed, panel=panel)


@pytest.mark.parametrize("extra_blocks", [0, 1, 3])
@pytest.mark.parametrize("max_rank", [1, 16, 37, 50])
def test_rank_cap_and_extra_blocks(device, max_rank, extra_blocks):
    """Guards against blocks beyond the cap or the tolerance that stay in the result."""
    for trim, tolerance in itertools.product((True, False), (0.3, 0.1, 0.05, 0.0)):
        a = polynomial(50, 80).float().to(device)
        options = {"block": 8, "max_rank": max_rank, "extra_blocks": extra_blocks, "trim": trim}
        on, off = both(a, tolerance, **options)
        assert_agree(on, off, UNIT_ROUNDOFF[torch.float32], tolerance)
        assert int(on[2]) == int(off[2])
        check(a, on, tolerance, method="right_looking", **options)
    assert int(both(a, 0.01, max_rank=8)[0][5]) == RANK_CAP


@pytest.mark.parametrize("block", [1, 7, 16, 64])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (40, 40)])
def test_the_stop_lags_but_the_result_does_not(device, shape, block):
    """Guards against a block too many: what was computed past the first block within is as if it had not been."""
    a = polynomial(*shape).float().to(device)
    for tolerance in (0.5, 0.3, 0.2, 0.1, 2.0):
        on, off = both(a, tolerance, block=block, trim=False)
        assert int(on[5]) == CONVERGED
        assert torch.equal(on[4].isnan(), off[4].isnan())
        assert torch.equal(on[2], off[2])
        r = int(on[2])
        assert (on[1][:r] - on[0][:, :r].mT @ a).norm() <= 64 * UNIT_ROUNDOFF[torch.float32] * a.norm()


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
def test_implicit(device, shape):
    """Guards against reflectors of blocks that were cut off in the merged one."""
    a = polynomial(*shape).to(device)
    for tolerance in (0.3, 0.05, 0.0):
        options = {"sketch": "plain", "method": "right_looking", "block": 8, "trim": False}
        on, off = (
            find(a, tolerance, implicit=implicit, look_ahead=True, **options) for implicit in (True, False)
        )
        assert on.rank == min(off.rank, *shape)
        r = on.rank
        if tolerance > 0 or shape[0] <= shape[1]:  # else `off` is the best of more columns
            torch.testing.assert_close(on.basis, off.basis[:, :r], rtol=0, atol=1e-13)
        assert norm(a - on.basis @ on.coefficients) <= max(tolerance, 1e-11) * norm(a)


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("batch", [(3,), (2, 2), (0,)])
def test_batches_and_strides(device, batch, strides):
    """Guards against lanes of one matrix that touch another's, with matrices side by side."""
    a = torch.stack([polynomial(30, 44, seed=i) for i in range(max(1, torch.Size(batch).numel()))])
    a = layout(a[: torch.Size(batch).numel()].reshape(*batch, 30, 44).float(), strides).to(device)
    on, off = both(a, 0.1, block=5, key=4)
    for i, index in enumerate(itertools.product(*map(range, batch))):
        alone = both(a[index], 0.1, block=5, key=4 + i)
        assert_agree([x[index] for x in on], [x[index] for x in off], UNIT_ROUNDOFF[torch.float32], 0.1)
        assert int(on[2][index]) == int(alone[0][2])


def test_scales_and_ends(device):
    """Guards against queues for a matrix that has nothing, or that must be scaled first."""
    a = polynomial(40, 60).float().to(device)
    ranks = {int(both(a * 2.0**e, 0.1, block=8)[0][2]) for e in (-100, 0, 100)}
    assert len(ranks) == 1
    for x, status in ((torch.zeros_like(a), 3), (a * torch.nan, 4)):
        assert [int(found[5]) for found in both(x, 0.1)] == [status, status]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "left_looking", "sketch": "plain"}, "method='left_looking', sketch='plain'"),
        ({"method": "right_looking"}, "method='right_looking', sketch='half_power'"),
        ({"sketch": "plain", "between": "gram_schmidt"}, "sketch='plain' and between='gram_schmidt'"),
    ],
)
def test_what_cannot_be_combined_says_so(device, options, message):
    """Guards against an option that silently does nothing."""
    with pytest.raises(ValueError, match=rf"look_ahead=True goes with .* got .*{message}"):
        find(gaussian(9, 12).to(device), 0.1, look_ahead=True, **options)
    find(gaussian(9, 12).to(device), 0.1, look_ahead=False, **options)


def test_auto_looks_right_with_look_ahead(device):
    """Guards against method='auto' choosing what look_ahead=True cannot be combined with."""
    a = polynomial(40, 60).float().to(device)
    auto = find(a, 0.3, look_ahead=True, sketch="plain", block=8)
    right = find(a, 0.3, look_ahead=True, sketch="plain", block=8, method="right_looking")
    assert torch.equal(auto.basis, right.basis)


def test_same_bits_twice(device, threads):
    """Guards against a result that depends on which lane was first."""
    a = gaussian(150, 200).float().to(device)
    for count in (1, 2):
        threads(count)
        first = both(a, 0.2, block=16)[0]
        for _ in range(3):
            again = both(a, 0.2, block=16)[0]
            assert all(
                torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)) for x, y in zip(first, again, strict=True)
            )
        assert torch.get_num_threads() == count


def test_lanes_have_what_the_caller_has(device):
    """Guards against autograd, autocast or inference tensors that differ between the caller and its lanes."""
    a = gaussian(40, 60).float().to(device)
    plain = both(a, 0.2, block=8)[0]
    with torch.inference_mode():
        inferred = both(a, 0.2, block=8)[0]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = both(a, 0.2, block=8)[0]
    tracked = both(a.clone().requires_grad_(), 0.2, block=8)[0]
    for found in (inferred, cast, tracked):
        assert torch.equal(found[0].detach(), plain[0])
    with pytest.raises(RuntimeError, match="not implemented"):
        tracked[0].sum().backward()


def test_callers_side_by_side(device):
    """Guards against queues shared by two calls."""
    matrices = [gaussian(60, 80, seed=i).float().to(device) for i in range(4)]
    alone = [both(a, 0.2, block=8)[0] for a in matrices]
    found = {}
    callers = [
        threading.Thread(target=lambda i=i: found.update({i: both(matrices[i], 0.2, block=8)[0]}))
        for i in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for i, expected in enumerate(alone):
        assert torch.equal(found[i][0], expected[0])


def test_opcheck(device):
    """Guards against a schema or a fake without the option."""
    options = {"sketch": "plain", "block": 2, "look_ahead": True}
    a = gaussian(6, 9).to(device)
    torch.library.opcheck(torch.ops.galore_rrf.adaptive_range_finder.default, (a, 0.0), options)


STARVED = """
import resource, torch
from galore_rrf.ops import adaptive_range_finder
torch.set_num_threads(1)
a = torch.randn(400, 60000)
options = dict(sketch="plain", method="right_looking", block=64, max_rank=256, trim=False, look_ahead=True)
expected = adaptive_range_finder(a, 0.0, **options)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
refused = 0
for more in range(0, 700, 20):
    resource.setrlimit(resource.RLIMIT_AS, (used + (more << 20), resource.RLIM_INFINITY))
    try:
        found = adaptive_range_finder(a, 0.0, **options)
    except (RuntimeError, MemoryError):
        refused += 1
    else:
        assert torch.equal(found[1], expected[1])
        del found
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(adaptive_range_finder(a, 0.0, **options)[1], expected[1])
threads = len(__import__("os").listdir("/proc/self/task"))
print(refused, threads)
"""


@pytest.mark.slow
def test_out_of_memory_anywhere():
    """Guards against an allocation that fails inside a lane and hangs, crashes or leaves a thread behind."""
    done = subprocess.run(
        [sys.executable, "-c", STARVED],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    refused, threads = map(int, done.stdout.split())
    assert 0 < refused < 35
    assert threads <= 2
