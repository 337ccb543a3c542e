"""The shim does what CUDA does, and lets nothing pass that CUDA leaves undefined."""

import host_kernels
import pytest
import torch

LANES = range(32)
(NONE, BARRIER_LEFT_OUT, TWO_PLACES, EXITED_LANE, STALE_SHARED, BLOCKS_RACE, SHUFFLE_ORDERS_NOTHING) = range(
    7
)


def shuffle(kind, argument, width=32):
    out = torch.zeros(32, dtype=torch.int32)
    host_kernels.call("shim_shuffle", [kind, argument, width], [], [out])
    return out.tolist()


@pytest.mark.parametrize("width", [2, 8, 32])
def test_shuffles(width):
    """Guards against a shim that forgives what a GPU does not: lanes beyond their part are not there."""
    part = [lane // width * width for lane in LANES]
    for n in (0, 1, 3, 7, 17):
        assert shuffle(0, n, width) == [p + n % width for p in part]
        assert shuffle(1, n, width) == [
            lane if (lane ^ n) // width > lane // width else lane ^ n for lane in LANES
        ]
        assert shuffle(2, n, width) == [lane + n if lane % width + n < width else lane for lane in LANES]
        assert shuffle(3, n, width) == [lane - n if lane % width >= n else lane for lane in LANES]


def test_votes():
    """Guards against votes of lanes that did not vote so."""
    multiples = sum(1 << lane for lane in LANES if lane % 3 == 0)
    assert shuffle(4, 3) == [multiples] * 32
    assert [shuffle(5, n)[0] for n in (5, 32)] == [1, 2]
    assert shuffle(6, 11) == [11] * 32


def misuse(which):
    out = torch.zeros(1, dtype=torch.int32)
    host_kernels.call("shim_misuse", [which], [], [out])
    return out.item()


@pytest.mark.parametrize("which", [BARRIER_LEFT_OUT, TWO_PLACES, EXITED_LANE])
def test_threads_that_wait_in_vain_are_told(which):
    """Guards against barriers and shuffles that only some threads reach."""
    with pytest.raises(RuntimeError, match="wait for one another in vain"):
        misuse(which)
    assert misuse(NONE) == 0


def test_shared_memory_is_not_zero_at_first():
    """Guards against results that rest on what happens to be in shared memory."""
    assert misuse(STALE_SHARED) == -1 - 1


@pytest.mark.slow
@pytest.mark.parametrize("which", [NONE, BLOCKS_RACE, SHUFFLE_ORDERS_NOTHING])
def test_thread_sanitizer_sees_races(which, tmp_path, monkeypatch):
    """Guards against order that ThreadSanitizer is told of and a GPU does not keep."""
    monkeypatch.setenv("GALORE_RRF_RECORD_CALLS", str(tmp_path))
    misuse(which)
    objects = host_kernels.compile_all(
        [*host_kernels.sources(), host_kernels.FOLDER / "replay.cpp"], "thread"
    )
    done = host_kernels.replay(host_kernels.link_program(objects, "thread"), list(tmp_path.iterdir()))
    assert (done.returncode == 0) == (which == NONE), done.stdout
    assert ("ThreadSanitizer: data race" in done.stdout) == (which != NONE), done.stdout
