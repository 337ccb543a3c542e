"""Projections of more than one mode: proj_type="full", R = P^T G Q with moments r x r, and "tucker" of convolutions."""

import itertools
import math
import warnings

import pytest
import torch
from matrices import UNIT_ROUNDOFF, assert_orthonormal, generator
from training import check_state, gradient, same, saved_and_loaded, set_gradients, settled, train

from galore_rrf import GaLoreAdamW, moments, tucker
from galore_rrf.checkpoint import from_torch_adamw
from galore_rrf.subspace import bases_of

BASES = ("basis", "basis_right")

pytestmark = pytest.mark.core

RANK, LR, BETAS, EPS, DECAY, SCALE = 5, 0.03, (0.8, 0.9), 1e-3, 0.1, 0.5
SHAPES = [(24, 16), (16, 24), (20, 20), (3, 12, 16), (12, 3, 3, 3)]


def make(device, shape, dtype=torch.float64, **keys):
    w = torch.nn.Parameter(torch.randn(shape, generator=generator(3)).to(device, dtype))
    group = {"params": [("w", w)], "rank": RANK, "proj_type": "full", "scale": SCALE, **keys}
    return w, GaLoreAdamW([group], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


def matrices(x):
    return x if x.dim() <= 3 else x.flatten(1)


# --- Both sides ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["torch", "galore_torch", "bitsandbytes"])
@pytest.mark.parametrize("projector", ["range_finder", "svd"])
@pytest.mark.parametrize("rotated", ["rotate", "keep", "reset", "at the end"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_follows_the_formula(device, shape, rotated, projector, arithmetic):
    """Guards against a side taken for the other, moments that are not moved, decay or eps at another place."""
    at_end = rotated == "at the end"
    kept = {"moments": "rotate", "refresh_at": "end"} if at_end else {"moments": rotated}
    keys = {**kept, "projector": projector, "arithmetic": arithmetic, "update_proj_gap": 2}
    with pytest.warns(UserWarning, match="moments='keep'") if rotated == "keep" else torch.no_grad():
        w, opt = make(device, shape, **keys)
    expected = matrices(w.detach().clone())
    m = v = p = q = None

    def rotate(m, v, s, z, taken):
        """One side, then the other."""
        correction1, correction2 = 1 - BETAS[0] ** taken, 1 - BETAS[1] ** taken
        mean, square = m / correction1, v / correction2
        variance, mean = s.square() @ (square - mean.square()), s @ mean
        square = (variance + mean.square()).abs()
        variance, mean = (square - mean.square()) @ z.square().mT, mean @ z.mT
        return mean * correction1, (variance + mean.square()).abs() * correction2

    for number in range(1, 7):
        w.grad = gradient(shape, number, torch.float64, device=device)
        opt.step()
        state = opt.state[w]
        new_p, new_q = state["basis"].clone(), state["basis_right"].clone()
        refreshed = number % 2 == 1
        t = 2 - number % 2 if rotated == "reset" else number
        if m is None or (rotated == "reset" and refreshed):
            m = v = torch.zeros_like(state["exp_avg"])
        elif rotated == "rotate" and refreshed:
            m, v = rotate(m, v, new_p.mT @ p, new_q.mT @ q, t - 1)
        if p is None or not at_end:
            p, q = new_p, new_q
        r = p.mT @ matrices(w.grad) @ q
        m, v = BETAS[0] * m + (1 - BETAS[0]) * r, BETAS[1] * v + (1 - BETAS[1]) * r.square()
        root = math.sqrt(1 - BETAS[1] ** t)
        eps = EPS / root if arithmetic == "galore_torch" else EPS
        n = SCALE * p @ (m / (1 - BETAS[0] ** t) / (v.sqrt() / root + eps)) @ q.mT
        decay = 1 - LR * DECAY
        expected = decay * expected - LR * n if arithmetic == "torch" else decay * (expected - LR * n)
        torch.testing.assert_close(matrices(w.detach()), expected, rtol=0, atol=1e-9)
        if at_end and refreshed and number > 1:
            m, v = rotate(m, v, new_p.mT @ p, new_q.mT @ q, t)
            p, q = new_p, new_q
        for name, moment in zip(moments.NAMES, (m, v), strict=True):
            torch.testing.assert_close(state[name], moment, rtol=0, atol=1e-9)
        last_refresh = 0 if rotated == "reset" else (number - 1) // 2 * 2
        assert (state["refreshes"], state["last_refresh"]) == ((number + 1) // 2, last_refresh)
        assert float(state["step"]) == t


@pytest.mark.parametrize("sketch", ["warm", "plain", "half_power", "power"])
def test_bases_span_what_the_gradient_does(device, sketch):
    """Guards against bases of other matrices: a gradient of the rank is kept whole."""
    w, opt = make(device, (40, 30), sketch=sketch, update_proj_gap=1)
    for step in range(3):
        factors = (
            torch.randn(k, RANK, generator=generator(10 * step + k), dtype=torch.float64) for k in (40, 30)
        )
        left, right = factors
        w.grad = (left @ right.mT).to(device)
        opt.step()
        p, q = opt.state[w]["basis"], opt.state[w]["basis_right"]
        for basis in (p, q):
            assert_orthonormal(basis.cpu(), UNIT_ROUNDOFF[torch.float64])
        torch.testing.assert_close(p @ (p.mT @ w.grad @ q) @ q.mT, w.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_are_kept_as_asked(device, dtype, state_dtype):
    """Guards against moments that a step or a refresh leaves in another dtype."""
    w, opt = make(device, (90, 100), dtype, rank=70, state_dtype=state_dtype, update_proj_gap=2)
    reference, exact = make(device, (90, 100), dtype, rank=70, update_proj_gap=2)
    start = w.detach().clone()
    for step in range(5):
        set_gradients([w], step)
        set_gradients([reference], step)
        opt.step()
        exact.step()
        assert {opt.state[w][name].dtype for name in moments.NAMES} == {state_dtype}
    assert float((w - reference).detach().norm()) <= 0.1 * float((reference - start).detach().norm())


def test_columns_and_sketches_of_refreshes(device):
    """Guards against kept columns that change sign, and one test matrix for every refresh."""
    u, _, vh = torch.linalg.svd(
        torch.randn(40, 30, generator=generator(5), dtype=torch.float64), full_matrices=False
    )
    g = (u * 2.0 ** -torch.arange(30)) @ vh
    with pytest.warns(UserWarning, match="moments='keep'"):
        kept, opt = make(
            device, (40, 30), moments="keep", sketch="half_power", oversampling=8, update_proj_gap=1
        )
    fresh, other = make(device, (40, 30), sketch="plain", update_proj_gap=1)
    bases = []
    for step in range(5):
        for w, o in ((kept, opt), (fresh, other)):
            w.grad = (1 + step) * g.to(device)
            o.step()
        bases.append([o.state[w][name].clone() for w, o in ((kept, opt), (fresh, other)) for name in BASES])
    for before, after in itertools.pairwise(bases):
        for p, q in zip(before[:2], after[:2], strict=True):
            assert float((p * q).sum(0).min()) > 0.99
        for p, q in zip(before[2:], after[2:], strict=True):
            assert float((p @ p.mT - q @ q.mT).norm()) > 1e-6


def test_rank_may_change(device):
    """Guards against moments of the old shape beside bases of the new."""
    w, opt = make(device, (24, 16), update_proj_gap=2)
    train(opt, [w], range(2))
    opt.param_groups[0]["rank"] = 8
    train(opt, [w], range(2, 4))
    assert opt.state[w]["rank"] == 8
    assert opt.state[w]["exp_avg"].shape == (8, 8)
    opt.load_state_dict(opt.state_dict())
    train(opt, [w], range(4, 6))
    assert w.isfinite().all()


def test_bad_gradients_leave_all_as_it_was(device):
    """Guards against a NaN that reaches bases or moments, and a zero gradient that counts as a step."""
    w, opt = make(device, (24, 16))
    before = w.detach().clone()
    w.grad = torch.zeros_like(w)
    opt.step()
    torch.testing.assert_close(w.detach(), before * (1 - LR * DECAY))
    assert float(opt.state[w]["step"]) == settled(opt)[w]["refreshes"] == 0
    train(opt, [w], range(3))
    kept = {key: value.clone() for key, value in opt.state[w].items() if isinstance(value, torch.Tensor)}
    before = w.detach().clone()
    w.grad = torch.full_like(w, math.nan)
    opt.step()
    assert torch.equal(w, before)
    assert all(torch.equal(opt.state[w][key], value) for key, value in kept.items())


@pytest.mark.parametrize("proj_type", ["full", "tucker"])
@pytest.mark.parametrize("keys", [{"tolerance": 0.1}, {"stochastic_rounding": True}], ids=str)
def test_what_is_made_for_one_side_is_refused(device, proj_type, keys):
    """Guards against a rank for each mode in moments that have one, and rounding that silently is to nearest."""
    with pytest.raises(
        ValueError, match=f"{next(iter(keys))} goes with .* one side, got .* and proj_type='{proj_type}'"
    ):
        make(device, (24, 16), proj_type=proj_type, **keys)


# --- Tucker -------------------------------------------------------------------------------------------

CONV = (12, 8, 3, 3)  # at RANK, modes 0 and 1


def unfolded(x, mode):
    return x.movedim(mode, 0).flatten(1)


def times(x, mode, matrix):
    return torch.tensordot(matrix, x, ([1], [mode])).movedim(0, mode)


def bases_by_mode(state):
    return {int(name.removeprefix("basis_")): basis for name, basis in bases_of(state).items()}


def in_bases(x, bases, back=False):
    for mode, basis in bases.items():
        x = times(x, mode, basis if back else basis.mT)
    return x


@pytest.mark.parametrize(
    ("shape", "rank", "modes"),
    [
        ((12, 8, 3, 3), 5, [0, 1]),
        ((12, 8, 3, 3), 2, [0, 1, 2, 3]),
        ((12, 8, 3, 3), 8, [0]),
        ((12, 3, 5, 4), 4, [0, 2]),
        ((12, 1, 3, 3), 5, [0]),
        ((12, 1, 2, 2), 5, []),  # depthwise: four numbers a channel
        ((3, 40, 1, 1), 5, []),
        ((12, 8, 1, 1), 5, [0, 1]),
        ((9, 8, 3, 3, 3), 6, [0, 1]),
        ((12, 8, 3, 3), 12, []),
    ],
    ids=str,
)
def test_modes_that_are_projected(device, shape, rank, modes):
    """Guards against short modes that get a basis, or long ones of which there are fewer fibers than the rank."""
    w, opt = make(device, shape, rank=rank, proj_type="tucker")
    train(opt, [w], range(2))
    state = opt.state[w]
    assert list(bases_by_mode(state) if "side" in state else []) == modes
    if not modes:
        assert state["exp_avg"].shape == w.shape
        return
    assert state["side"] == 3
    assert all(basis.shape == (shape[mode], rank) for mode, basis in bases_by_mode(state).items())
    assert state["exp_avg"].shape == tuple(rank if i in modes else n for i, n in enumerate(shape))


@pytest.mark.parametrize("arithmetic", ["torch", "galore_torch", "bitsandbytes"])
@pytest.mark.parametrize("rotated", ["rotate", "keep"])
@pytest.mark.parametrize(
    ("shape", "rank"), [((12, 8, 3, 3), 5), ((12, 8, 3, 3), 2), ((4, 7, 6, 2, 3), 5)], ids=str
)
def test_tucker_follows_the_formula(device, shape, rank, rotated, arithmetic):
    """Guards against a mode taken for another, moments that are not moved, decay or eps at another place."""
    keys = {"moments": rotated, "arithmetic": arithmetic, "update_proj_gap": 2, "rank": rank}
    with pytest.warns(UserWarning, match="moments='keep'") if rotated == "keep" else torch.no_grad():
        w, opt = make(device, shape, proj_type="tucker", **keys)
    expected, m, v, bases = w.detach().clone(), None, None, {}
    for t in range(1, 7):
        w.grad = gradient(shape, t, torch.float64, device=device)
        opt.step()
        new = {mode: basis.clone() for mode, basis in bases_by_mode(opt.state[w]).items()}
        r = in_bases(w.grad, new)
        if m is None:
            m, v = torch.zeros_like(r), torch.zeros_like(r)
        elif rotated == "rotate" and t % 2 == 1:
            correction1, correction2 = 1 - BETAS[0] ** (t - 1), 1 - BETAS[1] ** (t - 1)
            m, v = m / correction1, v / correction2
            for mode, basis in new.items():
                turn = basis.mT @ bases[mode]
                variance = times(v - m.square(), mode, turn.square())
                m = times(m, mode, turn)
                v = (variance + m.square()).abs()
            m, v = m * correction1, v * correction2
        bases = new
        m, v = BETAS[0] * m + (1 - BETAS[0]) * r, BETAS[1] * v + (1 - BETAS[1]) * r.square()
        root = math.sqrt(1 - BETAS[1] ** t)
        eps = EPS / root if arithmetic == "galore_torch" else EPS
        n = SCALE * in_bases(m / (1 - BETAS[0] ** t) / (v.sqrt() / root + eps), bases, back=True)
        decay = 1 - LR * DECAY
        expected = decay * expected - LR * n if arithmetic == "torch" else decay * (expected - LR * n)
        torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-9)
        assert opt.state[w]["refreshes"] == (t + 1) // 2


def decaying(shape, seed, device):
    """A tensor whose unfoldings all have decaying singular values."""
    x = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    for mode, n in enumerate(shape):
        turned = torch.linalg.qr(torch.randn(n, n, generator=generator(seed + mode), dtype=torch.float64))[0]
        x = times(x, mode, turned * 0.6 ** torch.arange(n))
    return x.to(device)


def kept(x, bases):
    return float((x - in_bases(in_bases(x, bases), bases, back=True)).norm() / x.norm())


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"projector": "svd"}, 1 + 1e-9),
        ({"sketch": "half_power", "oversampling": 4}, 1.15),
        ({"sketch": "power", "power": 2}, 1.05),
        ({"sketch": "warm"}, 1.3),
    ],
    ids=str,
)
@pytest.mark.parametrize(("shape", "rank"), [((24, 16, 3, 3), 5), ((16, 24, 3, 3), 2), ((9, 8, 7, 6, 2), 4)])
def test_bases_keep_nearly_what_the_hosvd_keeps(device, shape, rank, keys, factor):
    """Guards against a basis of another unfolding: against the truncated HOSVD (De Lathauwer et al. 2000)."""
    g = decaying(shape, 1, device)
    w, opt = make(device, shape, rank=rank, proj_type="tucker", update_proj_gap=1, **keys)
    for _ in range(2):
        w.grad = g.clone()
        opt.step()
    found = bases_by_mode(opt.state[w])
    best = {mode: torch.linalg.svd(unfolded(g, mode))[0][:, :rank] for mode in found}
    tails = [float(torch.linalg.svdvals(unfolded(g, mode))[rank:].square().sum()) for mode in found]
    assert list(found) == [mode for mode, n in enumerate(shape) if n > rank]
    for basis in found.values():
        assert_orthonormal(basis.cpu(), UNIT_ROUNDOFF[torch.float64])
    assert kept(g, found) <= factor * max(kept(g, best), 1e-12)
    if "projector" in keys:  # sequentially truncated: the same bound (Vannieuwenhoven et al. 2012)
        assert kept(g, found) <= math.sqrt(sum(tails)) / float(g.norm())
        left = g
        for mode, basis in found.items():
            u = torch.linalg.svd(unfolded(left, mode))[0][:, :rank]
            torch.testing.assert_close(basis @ basis.mT, u @ u.mT, rtol=0, atol=1e-9)
            left = times(left, mode, u.mT)


@pytest.mark.parametrize("sketch", ["warm", "plain", "half_power", "power"])
def test_bases_span_what_the_tensor_does(device, sketch):
    """Guards against a truncation that loses what a gradient of the rank has, and bases of zeros in idle steps."""
    w, opt = make(device, (24, 16, 3, 3), proj_type="tucker", sketch=sketch, update_proj_gap=1)
    for step in range(3):
        core = torch.randn(RANK, RANK, 3, 3, generator=generator(step), dtype=torch.float64)
        factors = {
            i: torch.randn(n, RANK, generator=generator(10 * step + n), dtype=torch.float64)
            for i, n in ((0, 24), (1, 16))
        }
        w.grad = in_bases(core, factors, back=True).to(device)
        opt.step()
        assert kept(w.grad, bases_by_mode(opt.state[w])) < 1e-12


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (3, 12, 16), (16,)], ids=str)
def test_matrices_in_a_tucker_group_are_as_with_std(device, shape):
    """Guards against linear layers of a CNN that are left out, or projected on both sides."""
    runs = []
    for proj_type in ("tucker", "std"):
        w, opt = make(device, shape, proj_type=proj_type, update_proj_gap=2)
        train(opt, [w], range(5))
        runs.append((w.detach(), dict(opt.state[w])))
    assert same(*runs)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_layouts(device, dtype, memory_format):
    """Guards against steps written to a copy, and bases in another dtype than the weight's."""
    w, opt = make(device, CONV, proj_type="tucker", update_proj_gap=2)
    other, half = make(device, CONV, proj_type="tucker", update_proj_gap=2)
    start = w.detach().clone()
    other.data = other.data.to(dtype).to(memory_format=memory_format)
    for step in range(5):
        w.grad = gradient(CONV, step, torch.float64, device=device)
        other.grad = w.grad.to(dtype).to(memory_format=memory_format)
        opt.step()
        half.step()
    assert {basis.dtype for basis in bases_of(half.state[other]).values()} == {dtype}
    assert half.state[other]["exp_avg"].dtype == torch.float32
    assert other.stride() == torch.empty(CONV).to(memory_format=memory_format).stride()
    error = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}[dtype]
    assert float((other - w).detach().norm()) <= error * float((w - start).detach().norm())


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_moments_of_a_core_are_kept_as_asked(device, state_dtype):
    """Guards against codes of slices with a scale for nine entries, and a file that does not take them."""
    shape, keys = (40, 36, 3, 3), {"rank": 24, "proj_type": "tucker", "update_proj_gap": 2}
    w, opt = make(device, shape, state_dtype=state_dtype, **keys)
    reference, exact = make(device, shape, **keys)
    start = w.detach().clone()
    for step in range(5):
        set_gradients([w, reference], step)
        opt.step()
        exact.step()
        opt.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert {opt.state[w][name].dtype for name in moments.NAMES} == {state_dtype}
    if state_dtype == torch.uint8:
        assert opt.state[w]["exp_avg_scale"].shape == (math.ceil(24 * 24 * 9 / 256),)
    assert float((w - reference).detach().norm()) <= 0.1 * float((reference - start).detach().norm())


@pytest.mark.parametrize("ranks", [(5, 2), (2, 5), (5, 8), (8, 5)], ids=str)
def test_rank_may_change_with_its_modes(device, ranks):
    """Guards against moments that keep a mode projected which is whole by now, or lose what they held of it."""
    first, second = ranks
    w, opt = make(device, CONV, rank=first, proj_type="tucker", update_proj_gap=2)
    train(opt, [w], range(2))
    old, before = bases_by_mode(opt.state[w]), opt.state[w]["exp_avg"].clone()
    opt.param_groups[0]["rank"] = second
    w.grad = gradient(CONV, 2, torch.float64, device=device)
    opt.step()
    check_state(w, opt.state[w], second)
    new = bases_by_mode(opt.state[w])
    assert list(new) == [i for i, n in enumerate(CONV) if n > second]
    expected = BETAS[0] * in_bases(in_bases(before, old, back=True), new)
    expected += (1 - BETAS[0]) * in_bases(w.grad, new)
    torch.testing.assert_close(opt.state[w]["exp_avg"], expected, rtol=0, atol=1e-9)
    opt.load_state_dict(saved_and_loaded(opt.state_dict()))
    train(opt, [w], range(3, 6))
    assert w.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "proj_type"), [(CONV, "tucker"), ((24, 16), "full"), ((3, 12, 16), "full")]
)
def test_moments_of_adamw_move_into_the_bases_of_the_first(device, shape, proj_type):
    """Guards against the import of another subspace, or of moments that are not those in it."""
    w, opt = make(device, shape, proj_type=proj_type)
    adamw = torch.optim.AdamW([w], lr=LR, betas=BETAS, weight_decay=DECAY)
    train(adamw, [w], range(5))
    opt.load_state_dict(from_torch_adamw(opt, saved_and_loaded(adamw.state_dict()), [w]))
    state = opt.state[w]
    check_state(w, state, RANK)
    assert (float(state["step"]), state["refreshes"], state["last_refresh"]) == (5, 1, 5)
    m, v = (adamw.state[w][name].double() for name in moments.NAMES)
    modes = bases_by_mode(state) if proj_type == "tucker" else {-2: state["basis"], -1: state["basis_right"]}
    c1, c2 = 1 - BETAS[0] ** 5, 1 - BETAS[1] ** 5
    m, v = m / c1, v / c2
    for mode, basis in modes.items():
        along = [x.movedim(mode, -1) for x in (m, v - m.square())]
        m, variance = ((x @ q).movedim(-1, mode) for x, q in zip(along, (basis, basis.square()), strict=True))
        v = (variance + m.square()).abs()
    torch.testing.assert_close(state["exp_avg"], c1 * m, rtol=0, atol=1e-9)
    torch.testing.assert_close(state["exp_avg_sq"], c2 * v, rtol=0, atol=1e-9)
    train(opt, [w], range(5, 8))
    assert w.isfinite().all()


def test_out_of_memory_keeps_the_old_bases(device, monkeypatch):
    """Guards against a refresh half done: the step is taken in the old bases, and the refresh stays due."""
    w, opt = make(device, CONV, proj_type="tucker", update_proj_gap=2)
    train(opt, [w], range(2))
    before = {name: basis.clone() for name, basis in bases_of(opt.state[w]).items()}
    found, calls = tucker.sketched, []

    def second_fails(*args, **keys):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return found(*args, **keys)

    monkeypatch.setattr(tucker, "sketched", second_fails)
    weight = w.detach().clone()
    train(opt, [w], [2])
    assert same(bases_of(opt.state[w]), before)
    assert opt.state[w]["refreshes"] == 1
    assert not torch.equal(w, weight)
    train(opt, [w], [3])
    assert (opt.state[w]["refreshes"], opt.state[w]["last_refresh"]) == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("basis_1"), "side of 'w' is 3, but the state has no basis_1"),
        (lambda state: state.update(basis_2=torch.zeros(3, 5)), "but the state has a basis_2"),
        (lambda state: state.update(basis=torch.zeros(12, 5)), "but the state has a basis"),
        (lambda state: state.update(basis_7=torch.zeros(3, 5)), "unknown keys basis_7"),
        (lambda state: state.update(basis_0=torch.zeros(12, 4)), "basis_0 of 'w' has shape"),
        (lambda state: state.update(side=2), "side of 'w' is 2, but the state has no basis"),
        (lambda state: state.update(rank=12), "rank of 'w' must be less than the length of a mode"),
        (lambda state: state.update(exp_avg=torch.zeros(5, 5, 9)), "exp_avg of 'w' has shape"),
    ],
)
def test_state_that_does_not_fit_is_refused(device, change, message):
    """Guards against a file of other modes that loads, or fails in a later step."""
    w, opt = make(device, CONV, proj_type="tucker")
    train(opt, [w], range(2))
    saved = saved_and_loaded(opt.state_dict())
    change(saved["state"][0])
    with pytest.raises(ValueError, match="lacks basis" if saved["state"][0]["side"] == 2 else message):
        opt.load_state_dict(saved)


def test_a_small_cnn_learns(device):
    """Guards against convolutions that a step does not move, or moves wrongly: gratings told apart by direction."""
    angles = torch.arange(4) * math.pi / 4
    at = torch.arange(8.0)
    kind = torch.arange(256) % 4
    phase = 6.3 * torch.rand(256, 1, 1, generator=generator(1))
    wave = at[:, None] * angles[kind].sin()[:, None, None] + at * angles[kind].cos()[:, None, None]
    images = (1.5 * wave + phase).sin() + 0.5 * torch.randn(256, 8, 8, generator=generator(2))
    images, kind = images[:, None].to(device), kind.to(device)
    losses = {}
    for trained in ("all", "head"):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU()]
        net = torch.nn.Sequential(
            *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 4)
        ).to(device)
        if trained == "head":
            net[:4].requires_grad_(False)
        params = [p for p in net.parameters() if p.requires_grad]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of elongated matrices
            opt = GaLoreAdamW(params, lr=0.02, rank=4, proj_type="tucker")
        for _ in range(60):
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(images), kind)
            loss.backward()
            opt.step()
        losses[trained] = float(loss.detach())
        if trained == "all":
            assert list(bases_by_mode(opt.state[net[2].weight])) == [0, 1]
    assert losses["all"] < 0.2
    assert losses["all"] < 0.3 * losses["head"]
