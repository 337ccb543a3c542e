"""What subspaces are found of: an average of gradients, or the momentum."""

import copy

import pytest
import torch
from matrices import assert_orthonormal
from training import gradient, params_of, same, saved_and_loaded, settled, snapshot, train

from galore_rrf import GaLoreAdamW, moments
from galore_rrf.subspace import as_matrices

pytestmark = pytest.mark.core

RANK, BETAS = 4, (0.8, 0.9)
SHAPES = [(24, 16), (16, 24), (3, 12, 16), (12, 3, 3, 3)]


def make(device, shape, dtype=torch.float64, **keys):
    w = torch.nn.Parameter(gradient(shape, 99, dtype, device))
    group = {"params": [("w", w)], "rank": RANK, "update_proj_gap": 1, **keys}
    return w, GaLoreAdamW([group], lr=0.02, betas=BETAS, eps=1e-3, maximize=keys.pop("maximize", False))


def projector(basis):
    return basis @ basis.mT


def leading(source, side, rank):
    """The projector onto its leading singular vectors, by LAPACK in fp64."""
    u, _, vh = torch.linalg.svd(source.double().cpu(), full_matrices=False)
    return projector(vh[..., :rank, :].mT if side == 0 else u[..., :rank])


@pytest.mark.parametrize("refresh_at", ["start", "end"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("basis_from", ["average", "momentum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_basis_is_that_of_its_source(device, shape, basis_from, maximize, refresh_at):
    """Guards against a basis of the gradient after all, of an old average, or of a momentum with the wrong sign,
    with this step's gradient twice."""
    w, opt = make(device, shape, projector="svd", basis_from=basis_from, refresh_at=refresh_at)
    opt.param_groups[0]["maximize"] = maximize
    average = torch.zeros_like(as_matrices(w.detach()))
    for step in range(6):
        w.grad = gradient(shape, step, torch.float64, device)
        g = as_matrices(w.grad)
        old = {k: copy.deepcopy(v) for k, v in opt.state[w].items()} if opt.state[w] else None
        opt.step()
        state = opt.state[w]
        average = BETAS[0] * average + (1 - BETAS[0]) * g
        source = average
        if basis_from == "momentum":
            source = g
            if old is not None:
                m, q = old["exp_avg"], old["basis"]
                m = m @ q.mT if state["side"] == 0 else q @ m
                source = BETAS[0] * m + (1 - BETAS[0]) * (-g if maximize else g)
        found = projector(state["basis"]).cpu()
        torch.testing.assert_close(found, leading(source, state["side"], RANK), rtol=0, atol=1e-8)
        assert settled(opt)[w]["refreshes"] == step + 1
    if basis_from == "average":
        torch.testing.assert_close(as_matrices(state["average"]), average, rtol=0, atol=1e-12)


@pytest.mark.parametrize("basis_from", ["average", "momentum"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_what_is_projected_is_the_gradient(device, shape, basis_from):
    """Guards against moments of an average: R = Q^T G enters them, in the new basis."""
    w, opt = make(device, shape, basis_from=basis_from, moments="keep", update_proj_gap=50)
    expected = 0
    for step in range(4):
        w.grad = gradient(shape, step, torch.float64, device)
        opt.step()
        state = opt.state[w]
        r = w.grad @ state["basis"] if state["side"] == 0 else state["basis"].mT @ w.grad
        expected = BETAS[0] * expected + (1 - BETAS[0]) * r
        torch.testing.assert_close(state["exp_avg"], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("basis_from", ["average", "momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "keys",
    [
        *({"sketch": sketch} for sketch in ("warm", "plain", "half_power", "power")),
        *({"tolerance": 0.4}, {"projector": "svd"}, {"refresh_at": "end"}, {"schedule": "adaptive"}),
        {"state_dtype": torch.uint8},
    ],
    ids=str,
)
def test_goes_with_every_way_to_find_a_basis(device, keys, dtype, basis_from):
    """Guards against a combination that crashes, loses orthonormality or does not refresh."""
    shapes = [(1100, 16), (3, 12, 16), (12, 3, 3, 3)]  # the first is large enough for 8-bit moments
    params = [torch.nn.Parameter(gradient(s, 99, dtype, device)) for s in shapes]
    group = {"params": params, "rank": RANK, "update_proj_gap": 2, "basis_from": basis_from, **keys}
    opt = GaLoreAdamW([group], lr=0.01, eps=1e-4)
    train(opt, params, range(5))
    for p in params:
        state = settled(opt)[p]
        assert state["refreshes"] >= 2
        assert p.isfinite().all()
        assert_orthonormal(state["basis"].double().cpu(), torch.finfo(dtype).eps)  # rounded to the dtype


@pytest.mark.parametrize("basis_from", ["average", "momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_no_trace(device, bad, dtype, basis_from):
    """Guards against an average that is NaN for ever after."""
    w, opt = make(device, (24, 16), dtype, basis_from=basis_from)
    train(opt, [w], range(3))
    before = snapshot(opt)
    w.grad = gradient((24, 16), 3, dtype, device)
    w.grad[2, 3] = bad
    opt.step()
    assert same(snapshot(opt), before)
    train(opt, [w], range(4, 6))
    assert settled(opt)[w]["refreshes"] == 5


def test_of_a_stack_the_average_of_the_others_goes_on(device):
    """Guards against one expert's NaN that keeps the others from their average, or gets into it."""
    w, opt = make(device, (3, 12, 16), torch.float32, basis_from="average", update_proj_gap=50)
    train(opt, [w], range(2))
    before = opt.state[w]["average"].clone()
    w.grad = gradient((3, 12, 16), 2, device=device)
    w.grad[1, 0, 0] = float("nan")
    opt.step()
    changed = [not torch.equal(a, b) for a, b in zip(opt.state[w]["average"], before, strict=True)]
    assert changed == [True, False, True]
    assert opt.state[w]["average"].isfinite().all()


def test_an_average_finds_what_single_gradients_hide(device):
    """Guards against an average that is none: noise as large as the signal turns a basis of single gradients."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(60, RANK, generator=generator, dtype=torch.float64) for _ in "lr")
    signal = left @ right.mT
    truth = projector(torch.linalg.qr(left).Q)
    kept = {}
    for basis_from in ("gradient", "average"):
        w = torch.nn.Parameter(torch.zeros(60, 60, dtype=torch.float64, device=device))
        group = {
            "params": [w],
            "rank": RANK,
            "proj_type": "left",
            "sketch": "half_power",
            "update_proj_gap": 1,
        }
        opt = GaLoreAdamW([{**group, "basis_from": basis_from}], lr=0.0, betas=(0.95, 0.999))
        for _ in range(60):
            noise = torch.randn(60, 60, generator=generator, dtype=torch.float64)
            w.grad = (signal + 2 * noise).to(device)
            opt.step()
        kept[basis_from] = float((projector(opt.state[w]["basis"]).cpu() @ truth).trace()) / RANK
    assert kept["average"] > kept["gradient"] + 0.05
    assert kept["average"] > 0.95


def test_an_average_follows_the_option_and_the_dtype(device):
    """Guards against an average that stays when it is not wanted, begins again with another option, or is in another
    dtype than its weight's."""
    w, opt = make(device, (24, 16), torch.float32)
    train(opt, [w], range(2))
    opt.param_groups[0]["basis_from"] = "average"
    train(opt, [w], range(2, 4))
    before = opt.state[w]["average"].clone()
    assert before.shape == (24, 16)
    opt.param_groups[0]["schedule"] = "adaptive"
    train(opt, [w], range(4, 5))
    torch.testing.assert_close(opt.state[w]["average"], BETAS[0] * before + (1 - BETAS[0]) * w.grad)
    w.data = w.data.bfloat16()
    train(opt, [w], range(5, 6))
    assert opt.state[w]["average"].dtype == torch.bfloat16
    opt.param_groups[0]["basis_from"] = "momentum"
    train(opt, [w], range(6, 7))
    assert "average" not in opt.state[w]


def test_a_stretched_average_is_refused(device):
    """Guards against a file with another weight's average."""
    w, opt = make(device, (24, 16), basis_from="average")
    train(opt, [w], range(2))
    saved = saved_and_loaded(opt.state_dict())
    saved["state"][0]["average"] = torch.zeros(16, 24)
    _, other = make(device, (24, 16), basis_from="average")
    with pytest.raises(ValueError, match=r"average of 'w' has shape \(16, 24\)"):
        other.load_state_dict(saved)
    assert not other.state[params_of(other)[0]]


@pytest.mark.parametrize("proj_type", ["full", "tucker"])
def test_projections_of_several_modes_are_of_the_gradient(proj_type):
    """Guards against an option that is silently ignored."""
    with pytest.raises(ValueError, match=f"basis_from='average' and proj_type='{proj_type}'"):
        make("cpu", (24, 16), basis_from="average", proj_type=proj_type)


def test_momentum_is_read_as_it_is_kept(device):
    """Guards against codes of 8-bit moments taken for numbers."""
    w, opt = make(
        device, (1100, 16), torch.float32, basis_from="momentum", state_dtype=torch.uint8, projector="svd"
    )
    train(opt, [w], range(3))
    m, q = moments.values(opt.state[w], "exp_avg"), opt.state[w]["basis"]
    w.grad = gradient((1100, 16), 3, device=device)
    source = BETAS[0] * m @ q.mT + (1 - BETAS[0]) * w.grad
    opt.step()
    found = projector(opt.state[w]["basis"]).double().cpu()
    torch.testing.assert_close(found, leading(source, 0, RANK), rtol=0, atol=1e-4)
