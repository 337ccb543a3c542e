"""torch.distributed.checkpoint: read from disk into a fresh optimizer, a run continues."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from training import params_of, same, snapshot, train

from galore_rrf import GaLoreAdamW, param_groups
from galore_rrf.checkpoint import match_shapes

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized",
    "ignore:TypedStorage is deprecated",
)

OPTIONS = {
    "fixed": {"update_proj_gap": 3},
    "tolerance": {"update_proj_gap": 3, "tolerance": 0.5},
    "keep": {"preset": "published"},
}


@pytest.fixture(autouse=True)
def exact_ranks(monkeypatch):
    """By tolerance the smallest rank, not its multiple of 8: these matrices are too small for several of those."""
    monkeypatch.setattr("galore_rrf.refresh._RANK_MULTIPLE", 1)


def model():
    """The smallest thing with projected matrices of two shapes, a plain one and biases."""
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {
            "mlp": torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 12)),
            "head": torch.nn.Linear(12, 16),
        }
    )


def optimizer(of, kind):
    return GaLoreAdamW(param_groups(of, 8, **OPTIONS[kind]), lr=0.05)


def trained(kind, steps=4):
    of = model()
    opt = optimizer(of, kind)
    train(opt, list(of.parameters()), range(steps))
    return of, opt


def saved_to(path, of, opt, options=None):
    dcp.save(
        {"model": of.state_dict(), "optim": get_optimizer_state_dict(of, opt, options=options)},
        checkpoint_id=path,
        no_dist=True,
    )


def loaded_from(path, of, opt, options=None):
    parts = {"model": of.state_dict(), "optim": get_optimizer_state_dict(of, opt, options=options)}
    dcp.load(parts, checkpoint_id=path, no_dist=True)
    of.load_state_dict(parts["model"])
    set_optimizer_state_dict(of, opt, parts["optim"], options=options)


@pytest.mark.parametrize("kind", OPTIONS)
def test_initialisation_with_zero_gradients_leaves_no_trace(kind):
    """Guards against weights changed, or a refresh, in the step by which torch makes a state to read into."""
    of = model()
    opt = optimizer(of, kind)
    before = [p.detach().clone() for p in params_of(opt)]
    get_optimizer_state_dict(of, opt)
    assert same([p.detach() for p in params_of(opt)], before)
    for p in opt.param_groups[0]["params"]:
        state = opt.state[p]
        assert (state["refreshes"], float(state["step"])) == (0, 0)
        assert all(v.isfinite().all() for v in state.values() if isinstance(v, torch.Tensor))
    # The run from here is the run from scratch.
    other = model()
    scratch = optimizer(other, kind)
    train(opt, list(of.parameters()), range(4))
    train(scratch, list(other.parameters()), range(4))
    for p, q in zip(opt.param_groups[0]["params"], scratch.param_groups[0]["params"], strict=True):
        assert same(p.detach(), q.detach())


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_run_read_from_disk_equals_the_run_that_never_stopped(kind, flatten, tmp_path):
    """Guards against state that dcp.save or dcp.load loses, and ranks that a fresh optimizer cannot know."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    of, opt = trained(kind)
    saved_to(tmp_path, of, opt, options)
    with torch.no_grad():
        other = model()
        for p in other.parameters():
            p.zero_()
    fresh = optimizer(other, kind)
    match_shapes(other, fresh, dcp.FileSystemReader(tmp_path).read_metadata())
    loaded_from(tmp_path, other, fresh, options)
    assert same(snapshot(fresh)[:2], snapshot(opt)[:2])
    for each, its in ((of, opt), (other, fresh)):
        train(its, list(each.parameters()), range(4, 9))
    assert same(snapshot(fresh)[:2], snapshot(opt)[:2])


def test_ranks_of_a_tolerance_need_match_shapes(tmp_path):
    """Guards against a test above that would pass without: the ranks differ from the cap, and dcp refuses."""
    of, opt = trained("tolerance")
    assert min(opt.state[p]["rank"] for p in opt.param_groups[0]["params"]) < 8
    saved_to(tmp_path, of, opt)
    other = model()
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        loaded_from(tmp_path, other, optimizer(other, "tolerance"))


def test_match_shapes_finds_the_state_under_any_name(tmp_path):
    """Guards against a checkpoint whose optimizer lies under another key than ours in the examples."""
    of, opt = trained("tolerance")
    dcp.save(
        {"train": {"opt": get_optimizer_state_dict(of, opt)}}, checkpoint_id=tmp_path / "nested", no_dist=True
    )
    dcp.save(get_optimizer_state_dict(of, opt), checkpoint_id=tmp_path / "bare", no_dist=True)
    for name in ("nested", "bare"):
        other = model()
        fresh = optimizer(other, "tolerance")
        match_shapes(other, fresh, dcp.FileSystemReader(tmp_path / name).read_metadata())
        for p, q in zip(params_of(opt), params_of(fresh), strict=True):
            for key in ("exp_avg", "exp_avg_sq", "basis", "rank"):
                a, b = opt.state[p].get(key), fresh.state[q].get(key)
                assert getattr(a, "shape", a) == getattr(b, "shape", b)


def two_optimizers(path):
    """A checkpoint of two, with equal parameter names and other ranks."""
    runs = {}
    for name, steps, seed in (("gen", 4, 0), ("dis", 7, 1)):
        of, opt = trained("tolerance", steps)
        for p in of.parameters():
            p.data += seed
        runs[name] = (of, opt)
    states = {name: get_optimizer_state_dict(*run) for name, run in runs.items()}
    dcp.save(states, checkpoint_id=path, no_dist=True)
    return {name: opt for name, (_, opt) in runs.items()}


def test_match_shapes_tells_two_optimizers_apart(tmp_path):
    """Guards against the shapes of the discriminator for the generator."""
    opts = two_optimizers(tmp_path)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    ranks = {name: [opt.state[p].get("rank") for p in params_of(opt)] for name, opt in opts.items()}
    assert ranks["gen"] != ranks["dis"]
    other = model()
    fresh = optimizer(other, "tolerance")
    with pytest.raises(ValueError, match=r"more than one optimizer.*'dis', 'gen'.*prefix="):
        match_shapes(other, fresh, metadata)
    with pytest.raises(ValueError, match=r"Invalid prefix: 'model' .*'dis', 'gen'"):
        match_shapes(other, fresh, metadata, prefix="model")
    for name in opts:
        match_shapes(other, fresh, metadata, prefix=name)
        assert [fresh.state[p].get("rank") for p in params_of(fresh)] == ranks[name]


def test_match_shapes_with_a_module_called_state(tmp_path):
    """Guards against the state of "state.w" taken for that of "w" in another optimizer."""

    def nested():
        torch.manual_seed(0)
        inner = torch.nn.ModuleDict({"mlp": torch.nn.Linear(16, 24)})
        return torch.nn.ModuleDict({"state": inner, "mlp": torch.nn.Linear(16, 24)})

    of = nested()
    opt = optimizer(of, "tolerance")
    train(opt, list(of.parameters()), range(4))
    saved_to(tmp_path, of, opt)
    other = nested()
    fresh = optimizer(other, "tolerance")
    for prefix in (None, "optim"):
        match_shapes(other, fresh, dcp.FileSystemReader(tmp_path).read_metadata(), prefix=prefix)
    loaded_from(tmp_path, other, fresh)
    assert same(snapshot(fresh)[:2], snapshot(opt)[:2])


def test_match_shapes_starts_a_trained_optimizer_anew(tmp_path):
    """Guards against a count of steps of zero beside the refreshes of the run before."""
    of, opt = trained("tolerance")
    saved_to(tmp_path, of, opt)
    other, used = trained("tolerance", 8)
    match_shapes(other, used, dcp.FileSystemReader(tmp_path).read_metadata())
    for p in used.param_groups[0]["params"]:
        state = used.state[p]
        assert (float(state["step"]), state["refreshes"], state["last_refresh"]) == (0, 0, 0)
    loaded_from(tmp_path, other, used)
    assert same(snapshot(used)[:2], snapshot(opt)[:2])


def test_match_shapes_refuses_another_model(tmp_path):
    """Guards against a checkpoint of another model found out only when tensors are missing."""
    of, opt = trained("fixed")
    saved_to(tmp_path, of, opt)
    other = torch.nn.ModuleDict({"mlp": torch.nn.Linear(16, 24)})
    fresh = optimizer(other, "fixed")
    with pytest.raises(ValueError, match=r"no \w+ of 'mlp\.weight'"):
        match_shapes(other, fresh, dcp.FileSystemReader(tmp_path).read_metadata())


def test_codes_are_not_read_as_numbers(tmp_path):
    """Guards against dcp's cast of 8-bit codes to fp32, which makes moments of up to 255."""

    def wide(dtype):
        torch.manual_seed(0)
        of = torch.nn.ModuleDict({"mlp": torch.nn.Linear(128, 96)})
        return of, GaLoreAdamW(param_groups(of, 48, state_dtype=dtype), lr=0.05)

    of, opt = wide(torch.uint8)
    train(opt, list(of.parameters()), range(2))
    assert opt.state[of["mlp"].weight]["exp_avg"].dtype == torch.uint8
    saved_to(tmp_path, of, opt)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    other, fresh = wide(None)
    with pytest.raises(ValueError, match="same state_dtype"):
        match_shapes(other, fresh, metadata)
    other, fresh = wide(torch.uint8)
    match_shapes(other, fresh, metadata)
    loaded_from(tmp_path, other, fresh)
    assert same(snapshot(fresh)[:2], snapshot(opt)[:2])
