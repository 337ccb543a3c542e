"""What projected_adamw_ measures: norms and angles, against formulae in fp64."""

import math

import pytest
import torch
from projected_state import ALIKE, LEFT, MIXED, REFRESHED, STEPPED, State, assert_equal, project

from galore_rrf.ops import projected_adamw_

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("together")]


def measured(state, grads, refresh, **options):
    """A step's outcomes and measures."""
    out = torch.zeros(len(state.params), 3, dtype=torch.float64, device=state.params[0].device)
    outcomes = state.step(projected_adamw_, grads, refresh, measures=out, **options)
    return outcomes, out.cpu()


def by_formula(before, after, grads, i, only=slice(None)):
    """Parameter i's measures, from bases, gradients and angles in fp64."""

    def matrices(x):
        return (x.unsqueeze(0) if x.dim() == 2 else x).cpu().double()[only]

    g, old, new = matrices(grads[i]), matrices(before.bases[i]), matrices(after.bases[i])
    cosines = torch.linalg.svdvals(new.mT @ old) if bool(old.any()) else torch.tensor(math.nan)
    projected = project(g, new, before.sides[i])
    return [float(g.square().sum()), float(projected.square().sum()), float(cosines.square().mean())]


def test_measures_at_the_end(device):
    """Guards against the energy in the new basis, where the step was made in the old."""
    state = State(ALIKE, device=device)
    state.step(projected_adamw_, state.grads(0), 0)
    grads, before = state.grads(1), state.on_cpu()
    _, found = measured(state, grads, 1, refresh_at="end")
    for i, row in enumerate(found.tolist()):
        old = project(grads[i].cpu(), before.bases[i], before.sides[i])
        expected = by_formula(before, state, grads, i)
        expected[1] = float(old.square().sum())
        assert row == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("strides", ["contiguous", "strided"])
@pytest.mark.parametrize("moments", ["rotate", "keep"])
@pytest.mark.parametrize(
    ("dtype", "accuracy"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)], ids=str
)
def test_measures(device, dtype, accuracy, moments, strides):
    """Guards against energies of another step, basis or matrix, and an angle between the wrong subspaces."""
    state = State([*ALIKE, ((300, 450), 8, LEFT)], dtype, strides=strides, device=device)
    for number, refresh in enumerate((0, -1, 1, -1)):
        grads = state.grads(number)
        before = state.on_cpu()
        outcomes, found = measured(state, grads, refresh, moments=moments)
        assert outcomes == [REFRESHED if refresh >= 0 else STEPPED] * len(outcomes)
        for i, row in enumerate(found.tolist()):
            expected = by_formula(before, state, grads, i)
            if refresh < 1:
                expected[2] = math.nan
            assert row == pytest.approx(expected, rel=accuracy, nan_ok=True)


def test_measuring_changes_nothing(device):
    """Guards against a measure that is written where a step is computed."""
    state = State(ALIKE, torch.float32, device=device)
    other = state.copy()
    for number, refresh in enumerate((0, -1, 1)):
        measured(state, state.grads(number), refresh)
        other.step(projected_adamw_, state.grads(number), refresh)
    assert_equal(state, other)


@pytest.mark.parametrize("refresh", [1, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_measures_of_what_is_skipped(device, refresh, value):
    """Guards against a NaN that spoils the measures of a stack, or a skipped matrix that seems to have some."""
    state = State(MIXED, device=device)
    state.step(projected_adamw_, state.grads(0), 0)
    grads = state.grads(1)
    grads[0][2, 3] = grads[3][1, 4, 4] = value
    before = state.on_cpu()
    _, found = measured(state, grads, refresh)
    assert bool(found[0].isnan().all())
    for i, only in ((1, slice(None)), (3, [0, 2])):
        expected = by_formula(before, state, grads, i, only)
        assert found[i, :2].tolist() == pytest.approx(expected[:2], rel=1e-12)
        assert float(found[i, 2]) == pytest.approx(expected[2] if refresh > 0 else math.nan, nan_ok=True)


def test_measures_of_zero_gradients_and_of_given_coefficients(device):
    """Guards against energies where there are none, and an angle to a basis that is there no more."""
    state = State(MIXED, device=device)
    zeros = [torch.zeros_like(w) for w in state.params]
    for refresh in (0, -1):
        _, found = measured(state, zeros, refresh)
        assert found[:, :2].tolist() == [[0.0, 0.0]] * len(MIXED)
        assert bool(found[:, 2].isnan().all())
        state.step(projected_adamw_, state.grads(0), 0)
    grads = state.grads(1)
    given = [2 * project(*x) for x in zip(grads, state.bases, state.sides, strict=True)]
    _, found = measured(state, grads, -1, coefficients=given)
    for g, r, row in zip(grads, given, found, strict=True):
        assert row[:2].tolist() == pytest.approx([float(g.square().sum()), float(r.square().sum())])
        assert bool(row[2].isnan())


@pytest.mark.parametrize("size", [1e-150, 1e150])
def test_measures_of_extreme_gradients(device, size):
    """Guards against squares that leave the range of the gradient's dtype though not that of the measure."""
    state = State([((20, 31), 4, LEFT)], device=device)
    grads = [g * size for g in state.grads(0)]
    before = state.on_cpu()
    _, found = measured(state, grads, 0)
    assert found[0, :2].tolist() == pytest.approx(by_formula(before, state, grads, 0)[:2], rel=1e-9)
    single = State([((20, 31), 4, LEFT)], torch.float32, device=device)
    _, found = measured(single, [g * 1e25 for g in single.grads(0)], 0)
    expected = sum(float((g.double() * 1e25).square().sum()) for g in single.grads(0))
    assert float(found[0, 0]) == pytest.approx(expected, rel=1e-5)
    assert 0 < float(found[0, 1]) < float(found[0, 0])
