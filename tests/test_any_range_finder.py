"""Range finders on whatever hypothesis thinks of: shapes, dtypes, strides, spectra and options together."""

import math

import pytest
import torch
from bounds import ZERO, check
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matrices import UNIT_ROUNDOFF, assert_orthonormal, layout, norm, projection_error, with_spectrum
from test_mixes import BETWEEN, METHODS, PANELS, SKETCHES

from galore_rrf import ops
from galore_rrf.ops import adaptive_range_finder

CASES = st.fixed_dictionaries(
    {
        "m": st.integers(1, 40),
        "n": st.integers(1, 40),
        "batch": st.sampled_from([(), (2,), (1, 2)]),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        "strides": st.sampled_from(["contiguous", "transposed", "strided"]),
        "spectrum": st.sampled_from([0.0, 0.3, 1.0, 3.0, 14.0]),  # decades from the first to the last
        "rank": st.integers(0, 40),
        "scale": st.sampled_from([0, 0, 0, 6, -6]),
        "tolerance": st.sampled_from([0.9, 0.5, 0.1, 0.01, 1e-3, 1e-4, 1.2e-5, 1e-8, 1e-13, 0.0]),
    }
)
OPTIONS = st.fixed_dictionaries(
    {
        "block": st.integers(1, 50),
        "max_rank": st.none() | st.integers(1, 45),
        "method": st.sampled_from([*METHODS, "auto"]),
        "sketch": st.sampled_from(SKETCHES),
        "trim": st.booleans(),
        "extra_blocks": st.integers(0, 3),
        "between": st.sampled_from(BETWEEN),
        "panel": st.sampled_from(PANELS),
        "seed": st.integers(0, 2**63 - 1),
        "key": st.integers(0, 2**32 - 9),
        "refresh": st.integers(0, 2**32 - 1),
    }
)


def drawn(case, device):
    m, n = case["m"], case["n"]
    values = torch.logspace(0, -case["spectrum"], min(m, n), dtype=torch.float64)
    values[case["rank"] :] = 0
    count = math.prod(case["batch"])
    a = torch.stack([with_spectrum(m, n, values, seed=7 * i) for i in range(count)])
    a = (a * 10.0 ** case["scale"] if case["dtype"] != torch.float16 else a).to(case["dtype"])
    return layout(a.to(device).reshape(*case["batch"], m, n), case["strides"])


def check_drawn(device, case, options):
    a = drawn(case, device)
    before = a.clone()
    found = adaptive_range_finder(a, case["tolerance"], **options)
    assert torch.equal(a, before)
    again = adaptive_range_finder(a, case["tolerance"], **options)
    for x, y in zip(found, again, strict=True):
        assert torch.equal(x.nan_to_num(-1.0), y.nan_to_num(-1.0))
    batch = len(case["batch"])
    flat = [x.reshape(-1, *x.shape[batch:]) for x in found[:6]]
    named = {k: options[k] for k in ("block", "max_rank", "trim", "method", "extra_blocks")}
    for i, x in enumerate(a.reshape(-1, *a.shape[-2:])):
        mine = [y[i] for y in flat]
        if not x.any():
            assert (int(mine[5]), int(mine[2]), float(mine[3])) == (ZERO, 0, 0)
            continue
        check(x, mine, case["tolerance"], **named)


# What is left shrinks to subnormal numbers, block by block, before the columns end.
SUBNORMAL = (
    {
        **{"m": 18, "n": 3, "batch": (), "dtype": torch.float32, "strides": "contiguous"},
        **{"spectrum": 0.0, "rank": 1, "scale": -6, "tolerance": 0.0},
    },
    {
        **{"block": 3, "max_rank": None, "method": "right_looking", "sketch": "half_power", "trim": False},
        **{
            "extra_blocks": 0,
            "between": "householder",
            "panel": "householder",
            "seed": 0,
            "key": 0,
            "refresh": 0,
        },
    },
)


@settings(max_examples=60, deadline=None, derandomize=True)
@example(case=SUBNORMAL[0], options=SUBNORMAL[1])
@given(case=CASES, options=OPTIONS)
def test_any_options(device, case, options):
    """Guards against a combination of shape, dtype, strides and options that nobody thought of."""
    check_drawn(device, case, options)


@pytest.mark.slow
@settings(max_examples=4000, deadline=None)
@given(case=CASES, options=OPTIONS)
def test_any_options_at_length(device, case, options):
    """Guards against the same, longer, and from another start every time."""
    check_drawn(device, case, options)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    case=CASES,
    sketch=st.sampled_from(["plain", "half_power", "power"]),
    panel=st.sampled_from(PANELS),
    oversampling=st.integers(0, 9),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_fixed_rank(device, case, sketch, panel, oversampling, seed):
    """Guards against the same with a fixed rank."""
    a = drawn(case, device)
    before = a.clone()
    rank = max(1, min(case["rank"], case["m"], case["n"]))
    options = {"sketch": sketch, "panel": panel, "oversampling": oversampling, "seed": seed}
    q, b, residual, _ = found = ops.range_finder(a, rank, **options)
    assert torch.equal(a, before)
    assert all(torch.equal(x, y) for x, y in zip(found, ops.range_finder(a, rank, **options), strict=True))
    u = UNIT_ROUNDOFF[case["dtype"]]
    assert_orthonormal(q.cpu(), u)
    flat = (x.reshape(-1, *x.shape[-2:]).cpu().double() for x in (a, q, b))
    for x, y, z, r in zip(*flat, residual.flatten(), strict=True):
        if x.any():
            assert norm(z - y.mT @ x) <= 64 * u * norm(x)
            assert abs(norm(x - y @ z) / norm(x) - float(r)) <= 64 * u
            assert projection_error(x, y) <= float(r) + 64 * u
