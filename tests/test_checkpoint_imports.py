"""Checkpoints of torch.optim.AdamW and of galore_torch 1.0: what they hold goes on here."""

import os
import sys
from fractions import Fraction
from math import ceil
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import AdamW
from training import check_state, gradient, params_of, same, saved_and_loaded, train

from benchmarks.peers import galore_torch_adamw
from galore_rrf import GaLoreAdamW, moments, param_groups
from galore_rrf.checkpoint import from_galore_torch, from_torch_adamw, load_galore_torch

# --- torch.optim.AdamW ----------------------------------------------------------------------------------


def parameter(shape, dtype=torch.float32):
    return torch.nn.Parameter(gradient(shape, 99, dtype))


def adamws(params, steps, **options):
    """The state dict of a run of AdamW's."""
    opt = AdamW(params, lr=0.01, **options)
    train(opt, params_of(opt), range(steps))
    return opt.state_dict()


SHAPES = {"tall": (24, 16), "wide": (16, 24), "stack": (3, 12, 16), "conv": (12, 3, 3, 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_moments_of_adamw_move_into_the_subspace_of_the_first(shape, dtype):
    """Guards against a basis of something else than the first moment, or moments that are not those in it.

    The second moment by LDAdam's rule for S = Q^T, written out here in fp64.
    """
    p = parameter(shape, dtype)
    saved = adamws([p], 5, betas=(0.8, 0.99))
    opt = GaLoreAdamW([{"params": [p], "rank": 4}])
    opt.load_state_dict(from_torch_adamw(opt, saved_and_loaded(saved)))
    state = opt.state[p]
    check_state(p, state, 4)
    assert (float(state["step"]), state["refreshes"], state["last_refresh"]) == (5, 1, 5)

    m, v = (saved["state"][0][key].double() for key in ("exp_avg", "exp_avg_sq"))
    m, v = (x.flatten(1) if x.dim() == 4 else x for x in (m, v))
    assert state["side"] == (0 if m.shape[-2] >= m.shape[-1] else 1)
    own = [state[key].double() for key in ("exp_avg", "exp_avg_sq")]
    if state["side"] == 0:
        m, v, *own = (x.mT for x in (m, v, *own))
    q = state["basis"].double()
    half = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert (q.mT @ q - torch.eye(4)).abs().max() <= half
    best = torch.linalg.svdvals(m)[..., 4:].norm(dim=-1)
    left = (m - q @ (q.mT @ m)).flatten(-2).norm(dim=-1)
    assert (left <= 1.1 * best + half * m.norm()).all()
    c1, c2 = 1 - 0.8**5, 1 - 0.99**5
    mean, square = m / c1, v / c2
    new_mean = q.mT @ mean
    new_square = (q.mT.square() @ (square - mean**2) + new_mean**2).abs()
    torch.testing.assert_close(own[0], c1 * new_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own[1], c2 * new_square, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("across", [False, True], ids=["wide", "tall"])
def test_run_continues_as_adamws_own_where_the_subspace_loses_nothing(across):
    """Guards against a wrong step count, scale, transposition or refresh clock.

    Gradients in one row (or column): at rank 1 the basis is that unit vector, and projected AdamW is AdamW.
    """
    p = parameter((16, 10) if across else (10, 16))
    q = torch.nn.Parameter(p.detach().clone())
    theirs = AdamW([q], lr=0.01, weight_decay=0.1)
    ours = GaLoreAdamW([{"params": [p], "rank": 1, "update_proj_gap": 3}], lr=0.01, weight_decay=0.1)

    def grad(step):
        g = torch.zeros_like(p)
        (g[:, 3] if across else g[3]).copy_(gradient((16,), step))
        return g

    for step in range(14):
        if step == 5:
            ours.load_state_dict(from_torch_adamw(ours, theirs.state_dict()))
            p.data.copy_(q)
        q.grad, p.grad = grad(step), grad(step)
        theirs.step()
        if step >= 5:
            ours.step()
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert ours.state[p]["refreshes"] == 3  # at 5, 8 and 11


def network():
    """Projected matrices and plain parameters that alternate, some of one shape."""
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(16, 24),
            "mlp": torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Linear(16, 24)),
            "head": torch.nn.Linear(24, 16),
        }
    )


@pytest.mark.parametrize("how", ["params", "named_params", "groups", "names", "distributed"])
def test_parameters_are_told_apart_across_groups(how):
    """Guards against the state of one parameter given to another of its shape.

    AdamW has one group in the model's order (or two by weight decay), GaLoreAdamW projected ones first.
    """
    model = network()
    named = list(model.named_parameters())
    given = {
        "params": [p for _, p in named],
        "named_params": named,
        "names": named[::-1],
        "distributed": [p for _, p in named[::-1]],
        "groups": [
            {"params": [p for _, p in named if p.dim() > 1]},
            {"params": [p for _, p in named if p.dim() == 1], "weight_decay": 0.0},
        ],
    }[how]
    theirs = AdamW(given, lr=0.01)
    for step in range(3):
        for i, (_, p) in enumerate(named):
            p.grad = gradient(tuple(p.shape), 10 * i + step)  # its own, whatever its shape
        theirs.step()
    opt = GaLoreAdamW(param_groups(model, 4), lr=0.003)
    saved = get_optimizer_state_dict(model, theirs) if how == "distributed" else theirs.state_dict()
    params = None if how in ("names", "distributed") else given
    opt.load_state_dict(from_torch_adamw(opt, saved_and_loaded(saved), params))
    for name, p in named:
        expected = theirs.state[p]["exp_avg"]
        state = opt.state[p]
        assert float(state["step"]) == 3
        if "basis" in state:
            assert "mlp" in name
            q, m = state["basis"], state["exp_avg"]
            approximation = m @ q.mT if state["side"] == 0 else q @ m
            assert (approximation - expected).norm() < 0.5 * expected.norm()
        else:
            assert same(state["exp_avg"], expected)
    assert [g["lr"] for g in opt.param_groups] == [0.003, 0.003]
    keys = [opt.state[p]["key"] for p in opt.param_groups[0]["params"]]
    assert keys == [0, 1]


def test_parameters_that_cannot_be_told_apart_are_refused():
    """Guards against a guess by position, or a message without the way out."""
    model, other = network(), network()
    saved = adamws(model.parameters(), 2)
    opt = GaLoreAdamW(param_groups(model, 4))
    with pytest.raises(ValueError, match=r"groups of \[7\].*of \[2, 5\].*params="):
        from_torch_adamw(opt, saved)
    with pytest.raises(ValueError, match=r"params must be the optimizer's 7 parameters.*got 7, 0 of them"):
        from_torch_adamw(opt, saved, other.parameters())
    with pytest.raises(ValueError, match=r"params must be.*got 6"):
        from_torch_adamw(opt, saved, list(model.parameters())[1:])
    wrapped = adamws([("module." + name, p) for name, p in model.named_parameters()], 2)
    with pytest.raises(
        ValueError, match=r"names of parameters differ.*embed\.weight.*module\.embed\.weight.*params="
    ):
        from_torch_adamw(opt, wrapped)
    with pytest.raises(ValueError, match=r"keys 'state' and 'param_groups', got 'optimizer'"):
        from_torch_adamw(opt, {"optimizer": saved})


def test_state_that_is_not_adamws_is_refused_by_name():
    """Guards against a wrong order of parameters found out by a product that fails, or not at all."""
    model = network()
    opt = GaLoreAdamW(param_groups(model, 4))
    saved = adamws(model.parameters(), 2)
    with pytest.raises(ValueError, match=r"exp_avg of '[\w.]+' has shape"):
        from_torch_adamw(opt, saved, reversed(list(model.parameters())))
    train(opt, params_of(opt), range(2))
    with pytest.raises(ValueError, match=r"'mlp\.0\.weight' is projected, where one of plain AdamW"):
        from_torch_adamw(opt, opt.state_dict())


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_parameter_without_a_usable_moment_starts_anew(bad):
    """Guards against a basis of zeros or NaN, and a first step too long since old steps are counted."""
    p, fine = parameter((12, 8)), parameter((12, 8))
    saved = adamws([p, fine], 6)
    saved["state"][0]["exp_avg"] = torch.full((12, 8), bad)
    groups = [{"params": [p, fine], "rank": 3}]
    opt = GaLoreAdamW(groups, lr=0.01, weight_decay=0.0)
    opt.load_state_dict(from_torch_adamw(opt, saved))
    assert not opt.state.get(p)
    assert opt.state[fine]["refreshes"] == 1
    start = p.detach().clone()
    train(opt, [p, fine], [6])
    fresh = torch.nn.Parameter(start)
    other = GaLoreAdamW([{"params": [fresh], "rank": 3}], lr=0.01, weight_decay=0.0)
    train(other, [fresh], [6])
    assert same(p.detach(), fresh.detach())
    assert same(dict(opt.state[p]), dict(other.state[fresh]))


def test_matrix_of_a_stack_without_a_usable_moment_gets_its_basis_later():
    """Guards against one dead expert that costs all others their moments, or that never gets a basis."""
    p = parameter((3, 12, 8))
    saved = adamws([p], 4)
    saved["state"][0]["exp_avg"][0] = 0
    saved["state"][0]["exp_avg_sq"][2, 1, 1] = float("nan")
    opt = GaLoreAdamW([{"params": [p], "rank": 3, "update_proj_gap": 100}])
    opt.load_state_dict(from_torch_adamw(opt, saved))
    state = opt.state[p]
    check_state(p, state, 3)
    assert [bool(q.any()) for q in state["basis"]] == [False, True, False]
    assert not state["exp_avg"][[0, 2]].any()
    assert not state["exp_avg_sq"][[0, 2]].any()
    train(opt, [p], [4])
    assert all(q.any() for q in state["basis"])
    assert p.isfinite().all()


def test_amsgrads_maximum_stays_where_it_can():
    """Guards against an unknown key in projected states, and a plain amsgrad run that loses its maximum."""
    p, b = parameter((12, 8)), parameter((5,))
    saved = adamws([p, b], 3, amsgrad=True)
    opt = GaLoreAdamW([{"params": [p], "rank": 3}, {"params": [b], "amsgrad": True}])
    with pytest.warns(UserWarning, match="max_exp_avg_sq is left behind.*parameter 0"):
        imported = from_torch_adamw(opt, saved, [p, b])
    opt.load_state_dict(imported)
    check_state(p, opt.state[p], 3)
    assert same(opt.state[b]["max_exp_avg_sq"], saved["state"][1]["max_exp_avg_sq"])
    train(opt, [p, b], [3])


def test_imported_moments_are_kept_as_the_group_keeps_them():
    """Guards against fp32 moments in an 8-bit optimizer."""
    p, b = parameter((96, 80)), parameter((70, 64))
    saved = adamws([p, b], 3)
    opt = GaLoreAdamW([{"params": [p], "rank": 64}, {"params": [b]}], state_dtype=torch.uint8)
    opt.load_state_dict(from_torch_adamw(opt, saved, [p, b]))
    for each in (p, b):
        assert opt.state[each]["exp_avg"].dtype == opt.state[each]["exp_avg_sq"].dtype == torch.uint8
    train(opt, [p, b], range(3, 5))


@pytest.mark.parametrize("shape", [(80, 96), (3, 50, 60), (12, 10, 6, 7)], ids=["matrix", "stack", "conv"])
def test_codes_of_a_plain_state_are_decoded(shape):
    """Guards against codes read as moments of up to 255, or decoded matrix by matrix: plain ones are flat."""
    p = parameter(shape)
    plain = GaLoreAdamW([p], state_dtype=torch.uint8)
    train(plain, [p], range(3))
    coded = plain.state_dict()
    state = coded["state"][0]
    assert state["exp_avg"].dtype == torch.uint8
    flat = {**state, **{key: state[key].flatten() for key in moments.NAMES}}
    decoded = {key: moments.values(flat, key).view(shape) for key in moments.NAMES}
    uncoded = {**coded, "state": {0: {"step": state["step"], **decoded}}}
    opt = GaLoreAdamW([{"params": [p], "rank": 8}])
    assert same(from_torch_adamw(opt, coded), from_torch_adamw(opt, uncoded))
    opt.load_state_dict(from_torch_adamw(opt, coded))
    assert opt.state[p]["exp_avg"].abs().max() <= decoded["exp_avg"].norm()
    same_kind = GaLoreAdamW([p], state_dtype=torch.uint8)
    same_kind.load_state_dict(from_torch_adamw(same_kind, coded))
    assert same(dict(same_kind.state[p]), dict(plain.state[p]))


@pytest.mark.parametrize("shape", [(12, 24), (24, 12), (2, 12, 24)], ids=["wide", "tall", "stack"])
def test_rank_over_the_shorter_side_is_all_of_it(shape):
    """Guards against a rank that no basis has, in the arithmetics that project such matrices."""
    p = parameter(shape)
    opt = GaLoreAdamW([{"params": [p], "rank": 20, "arithmetic": "galore_torch"}])
    opt.load_state_dict(from_torch_adamw(opt, adamws([p], 3)))
    check_state(p, opt.state[p], 12)
    assert opt.state[p]["rank"] == 12
    train(opt, [p], [3])
    assert p.isfinite().all()


# --- galore_torch ---------------------------------------------------------------------------------------

PUBLISHED = {"rank": 5, "update_proj_gap": 3, "scale": 0.25}
AS_THEIRS = {"projector": "svd", "arithmetic": "galore_torch", "moments": "keep"}


@pytest.fixture(scope="module")
def published():
    return galore_torch_adamw()


def written(opt, path):
    """The checkpoint that a user of galore_torch has: its projectors pickled."""
    projectors = [s["projector"] for s in opt.state.values() if "projector" in s]
    module = ModuleType("galore_torch.galore_projector")
    module.GaLoreProjector = type(projectors[0])
    modules = {"galore_torch": ModuleType("galore_torch"), module.__name__: module}
    with mock.patch.dict(sys.modules, modules):
        torch.save({"optimizer": opt.state_dict(), "update_step": 3}, path)


def read(path):
    """As on a machine that has no galore_torch."""
    with mock.patch.dict(sys.modules, {"galore_torch": None, "galore_torch.galore_projector": None}):
        return load_galore_torch(path)["optimizer"]


@pytest.mark.parametrize("steps", [2, 3, 4], ids=["before_refresh", "at_refresh", "after_refresh"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)], ids=["tall", "wide", "square"])
def test_run_of_galore_torch_continues_as_it_would_there(shape, proj_type, steps, published, tmp_path):
    """Guards against a transposed basis, a shifted refresh or a lost step count."""
    theirs_p, theirs_b = parameter(shape), parameter((7,))
    theirs = published(
        # The plain group first, as its README and the Trainer have it.
        [{"params": [theirs_b]}, {"params": [theirs_p], "proj_type": proj_type, **PUBLISHED}],
        lr=0.02,
        weight_decay=0.1,
        no_deprecation_warning=True,
    )
    train(theirs, [theirs_p, theirs_b], range(steps))
    written(theirs, tmp_path / "optimizer.pt")

    p, b = (torch.nn.Parameter(x.detach().clone()) for x in (theirs_p, theirs_b))
    with pytest.warns(UserWarning, match="moments='keep'"):
        ours = GaLoreAdamW(
            [{"params": [p], "proj_type": proj_type, **PUBLISHED}, {"params": [b]}],
            lr=0.02,
            weight_decay=0.1,
            eps=1e-6,
            **AS_THEIRS,
        )
    ours.load_state_dict(from_galore_torch(ours, read(tmp_path / "optimizer.pt"), [b, p]))
    check_state(p, ours.state[p], 5)
    for step in range(steps, steps + 6):
        train(theirs, [theirs_p, theirs_b], [step])
        train(ours, [p, b], [step])
        torch.testing.assert_close(p, theirs_p, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(b, theirs_b, rtol=1e-5, atol=1e-6)
    assert ours.state[p]["refreshes"] == ceil((steps + 6) / 3)


def test_run_of_galore_torch_goes_on_with_the_range_finder(published, tmp_path):
    """Guards against an import that only serves the compatibility mode."""
    theirs_p = parameter((24, 16))
    theirs = published([{"params": [theirs_p], "proj_type": "std", **PUBLISHED}], no_deprecation_warning=True)
    train(theirs, [theirs_p], range(4))
    written(theirs, tmp_path / "optimizer.pt")
    p = torch.nn.Parameter(theirs_p.detach().clone())
    opt = GaLoreAdamW([{"params": [p], "rank": 8, "update_proj_gap": 2}])
    opt.load_state_dict(from_galore_torch(opt, read(tmp_path / "optimizer.pt")))
    assert opt.state[p]["rank"] == 5
    train(opt, [p], range(4, 8))
    check_state(p, opt.state[p], 8)
    assert opt.state[p]["rank"] == 8
    assert p.isfinite().all()


class Runs:
    """A pickle that runs a command where it is unpickled in earnest."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_file_with_anything_else_is_refused_and_nothing_runs(tmp_path):
    """Guards against unpickling what a stranger's file asks for."""
    trace = tmp_path / "trace"
    for value, name in ((Fraction(1, 2), "fractions.Fraction"), (Runs(trace), r"\w+.system")):
        torch.save({"state": {0: {"projector": value}}, "param_groups": []}, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=rf"holds {name}, which is not read"):
            load_galore_torch(tmp_path / "file.pt")
    assert not trace.exists()


def test_reading_leaves_torchs_list_of_safe_classes_alone(published, tmp_path):
    """Guards against every later torch.load of the process accepting a projector."""
    p = parameter((24, 16))
    theirs = published([{"params": [p], "proj_type": "std", **PUBLISHED}], no_deprecation_warning=True)
    train(theirs, [p], range(1))
    written(theirs, tmp_path / "optimizer.pt")
    before = set(torch.serialization.get_safe_globals())
    read(tmp_path / "optimizer.pt")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(Exception, match="GaLoreProjector"):
        torch.load(tmp_path / "optimizer.pt", weights_only=True)


def test_state_of_galore_torch_that_does_not_fit_is_refused_by_name(published):
    """Guards against an AttributeError, or half of a two-sided projection."""
    p = parameter((24, 16))

    def saved(**keys):
        keys = {"proj_type": "std", **PUBLISHED, **keys}
        q = torch.nn.Parameter(p.detach().clone())
        theirs = published([{"params": [q], **keys}], no_deprecation_warning=True)
        train(theirs, [q], range(2))
        return theirs.state_dict()

    opt = GaLoreAdamW([{"params": [("w", p)], "rank": 5}])
    state_dict = saved()
    state_dict["state"][0]["projector"] = "gone"
    with pytest.raises(ValueError, match="proj_type of the projector of 'w' is None"):
        from_galore_torch(opt, state_dict)
    state_dict = saved()
    state_dict["state"][0]["projector"].ortho_matrix = None
    with pytest.raises(ValueError, match="ortho_matrix of the projector of 'w'"):
        from_galore_torch(opt, state_dict)
    state_dict = saved()
    del state_dict["state"][0]["projector"].ortho_matrix
    with pytest.raises(ValueError, match="ortho_matrix of the projector of 'w'"):
        from_galore_torch(opt, state_dict)
    for gap in (0, None, 2.5):
        state_dict = saved()
        state_dict["state"][0]["projector"].update_proj_gap = gap
        with pytest.raises(ValueError, match=f"update_proj_gap of the projector of 'w' .*got {gap}"):
            from_galore_torch(opt, state_dict)
    state_dict = saved()
    state_dict["state"][0]["projector"].ortho_matrix = torch.zeros(5, 11)
    with pytest.raises(ValueError, match="basis of 'w' has shape"):
        opt.load_state_dict(from_galore_torch(opt, state_dict))
    for step in (0, -1, 2.5, "2"):
        state_dict = saved()
        state_dict["state"][0]["step"] = step
        with pytest.raises(ValueError, match="step of 'w' must be a positive integer"):
            from_galore_torch(opt, state_dict)
    plain = GaLoreAdamW([{"params": [("w", p)]}])
    with pytest.raises(ValueError, match="'w' is projected, but the parameter is plain here"):
        from_galore_torch(plain, saved())
    with pytest.raises(ValueError, match=r"'w'.*galore_torch's.*from_galore_torch"):
        opt.load_state_dict(saved())
    assert not opt.state


@pytest.mark.parametrize("block", [256, 2048])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_8bit_moments_of_bitsandbytes_are_decoded(block, nested):
    """Guards against codes read with another block size, table or layout: decoded here entry by entry."""
    p = parameter((70, 64))
    generator = torch.Generator().manual_seed(0)
    codes = {f"state{i}": torch.randint(256, (70, 64), generator=generator).byte() for i in (1, 2)}
    tables = {f"qmap{i}": torch.linspace(-1 if i == 1 else 0, 1, 256) for i in (1, 2)}
    blocks = ceil(70 * 64 / block)
    largest = {f"absmax{i}": torch.rand(blocks, generator=generator) + 0.5 for i in (1, 2)}
    coded = {**codes, **tables, **largest}
    saved = {
        "state": {0: {"step": 4, **({"__bnb_optimizer_quant_state__": coded} if nested else coded)}},
        "param_groups": [{"params": [0], "betas": (0.9, 0.999)}],
    }
    opt = GaLoreAdamW([p])
    opt.load_state_dict(from_galore_torch(opt, saved_and_loaded(saved)))
    for i, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
        got = opt.state[p][key].flatten().tolist()
        for j in range(0, 70 * 64, 97):
            code = int(codes[f"state{i}"].flatten()[j])
            expected = float(tables[f"qmap{i}"][code]) * float(largest[f"absmax{i}"][j // block])
            assert got[j] == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_8bit_moments_that_cannot_be_decoded_are_refused_by_name(nested):
    """Guards against StopIteration, which ends a loop around it in silence, and against a bare KeyError."""
    coded = {
        **{f"state{i}": torch.zeros(70, 64, dtype=torch.uint8) for i in (1, 2)},
        **{f"qmap{i}": torch.linspace(0, 1, 256) for i in (1, 2)},
        **{f"absmax{i}": torch.ones(18) for i in (1, 2)},
    }
    opt = GaLoreAdamW([("w", parameter((70, 64)))])

    def convert(**keys):
        kept = {key: value for key, value in {**coded, **keys}.items() if value is not None}
        state = {"step": 4, **({"__bnb_optimizer_quant_state__": kept} if nested else kept)}
        return from_galore_torch(opt, {"state": {0: state}, "param_groups": [{"params": [0]}]})

    convert()
    message = r"absmax2 of 'w' must have 18 or 3 entries, one for every 256 or 2048, got 5"
    with pytest.raises(ValueError, match=message):
        convert(absmax2=torch.ones(5))
    with pytest.raises(ValueError, match=r"qmap1 of 'w' must have 256 entries, got .*\(16,\)"):
        convert(qmap1=torch.ones(16))
    for key in ("state2", "absmax1", "qmap2"):
        with pytest.raises(ValueError, match=f"the state of 'w' lacks {key}"):
            convert(**{key: None})
        with pytest.raises(ValueError, match=f"{key} of 'w' must be a tensor, got list"):
            convert(**{key: [1.0]})
