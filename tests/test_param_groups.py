"""Which parameters are projected: param_groups, and what the optimizer makes of its own `rank`."""

import pytest
import torch
from torch import nn

from galore_rrf import GaLoreAdamW, param_groups

pytestmark = pytest.mark.core


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
        self.attn_norm = nn.Linear(16, 16)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.experts = nn.Parameter(torch.zeros(3, 16, 12))
        self.lm_head = nn.Linear(16, 50, bias=False)


PROJECTED = [
    *("experts", "blocks.0.attn.weight", "blocks.0.mlp.0.weight", "blocks.0.mlp.1.weight"),
    *("blocks.1.attn.weight", "blocks.1.mlp.0.weight", "blocks.1.mlp.1.weight"),
]


def names(group):
    return [name for name, _ in group["params"]]


@pytest.mark.parametrize(
    "source", [lambda m: m, lambda m: m.named_parameters(), lambda m: list(m.named_parameters())]
)
def test_matrices_of_attention_and_mlp_are_projected(source):
    """Guards against embeddings, heads, norms and biases being projected, and matrices forgotten."""
    model = Model()
    projected, plain = param_groups(source(model), 4)
    assert sorted(names(projected)) == sorted(PROJECTED)
    assert sorted(names(projected) + names(plain)) == sorted(n for n, _ in model.named_parameters())
    assert (projected["rank"], plain["rank"]) == (4, None)
    assert all(model.get_parameter(n) is p for n, p in projected["params"] + plain["params"])


def test_keys_and_learning_rates_reach_their_groups():
    """Guards against a key of the projected group that is lost, or that reaches the plain one."""
    groups = param_groups(Model(), 4, lr=0.1, plain_lr=0.02, update_proj_gap=7, scale=0.5, tolerance=0.3)
    opt = GaLoreAdamW(groups, lr=1.0)
    a, b = opt.param_groups
    assert (a["lr"], b["lr"], a["update_proj_gap"], a["scale"], a["tolerance"]) == (0.1, 0.02, 7, 0.5, 0.3)
    assert b["tolerance"] is None


def test_learning_rate_defaults_to_the_optimizers():
    """Guards against param_groups imposing a rate nobody asked for."""
    assert [g["lr"] for g in GaLoreAdamW(param_groups(Model(), 4), lr=0.7).param_groups] == [0.7, 0.7]


def test_include_and_exclude_replace_the_rule():
    """Guards against names of the user's own being ignored."""
    projected, _ = param_groups(Model(), 4, include=("head", "embed"), exclude=())
    assert sorted(names(projected)) == ["embed.weight", "lm_head.weight"]


def test_without_plain_parameters_there_is_one_group():
    """Guards against an empty second group."""
    assert len(param_groups([("mlp", nn.Parameter(torch.zeros(8, 8)))], 2)) == 1


def test_tied_weights_are_plain():
    """Guards against projecting a matrix that also serves as an embedding, or listing it twice."""
    model = Model()
    model.blocks[0].mlp[0].weight = model.blocks[1].mlp[0].weight
    projected, plain = param_groups(model, 4)
    assert "blocks.0.mlp.0.weight" in names(plain)
    assert not {"blocks.0.mlp.0.weight", "blocks.1.mlp.0.weight"} & set(names(projected))
    tensors = [p for _, p in projected["params"] + plain["params"]]
    assert len({id(p) for p in tensors}) == len(tensors) == len(list(model.parameters()))


@pytest.mark.parametrize("shape", [(8,), ()])
def test_nothing_to_project_is_an_error_that_lists_the_names(shape):
    """Guards against a run without GaLore that nobody notices."""
    named = [("mlp.weight", nn.Parameter(torch.zeros(shape))), ("first", nn.Parameter(torch.zeros(8, 8)))]
    with pytest.raises(ValueError, match=r"mlp\.weight, first"):
        param_groups(named, 4)
    with pytest.raises(ValueError, match=r"\(none\)"):
        param_groups([], 4)


def test_named_parameters_with_a_rank_follow_the_rule():
    """Guards against the short form choosing otherwise than param_groups."""
    model = Model()
    a = GaLoreAdamW(model.named_parameters(), rank=4)
    b = GaLoreAdamW(param_groups(model, 4))
    assert [[id(p) for p in g["params"]] for g in a.param_groups] == [
        [id(p) for p in g["params"]] for g in b.param_groups
    ]
    assert [g["rank"] for g in a.param_groups] == [4, None]
    assert [g["param_names"] for g in a.param_groups] == [g["param_names"] for g in b.param_groups]


def test_bare_tensors_with_a_rank_are_all_projected():
    """Guards against a rank that does nothing; no warning here: none is elongated."""
    params = [
        nn.Parameter(torch.ones(16, 12)),
        nn.Parameter(torch.ones(3, 12, 12)),
        nn.Parameter(torch.ones(5)),
    ]
    opt = GaLoreAdamW(iter(params), rank=4)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert ["basis" in opt.state[p] for p in params] == [True, True, False]


@pytest.mark.parametrize("shape", [(100, 16), (16, 100)])
def test_bare_elongated_tensors_warn_once_naming_them(shape):
    """Guards against an embedding projected unawares."""
    params = [
        nn.Parameter(torch.ones(16, 12)),
        nn.Parameter(torch.ones(shape)),
        nn.Parameter(torch.ones(90, 20)),
    ]
    with pytest.warns(UserWarning, match="rank=4 projects all") as caught:
        GaLoreAdamW(params, rank=4)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert f"parameter 1 of shape {shape}" in message
    assert "parameter 2 of shape (90, 20)" in message
    assert "parameter 0" not in message
    assert caught[0].filename == __file__


def test_groups_given_with_a_rank_keep_their_own():
    """Guards against the constructor's rank overriding a group's."""
    a, b, c = (nn.Parameter(torch.ones(16, 12)) for _ in range(3))
    opt = GaLoreAdamW([{"params": [a], "rank": 3}, {"params": [b], "rank": None}, {"params": [c]}], rank=5)
    assert [g["rank"] for g in opt.param_groups] == [3, None, 5]


@pytest.mark.parametrize("wrap", [list, tuple, iter], ids=["list", "tuple", "iterator"])
@pytest.mark.parametrize("named", [False, True])
def test_parameters_of_a_group_in_any_ordered_form(wrap, named):
    """Guards against an iterator used up by our own checks before torch reads it."""
    layer = nn.Linear(16, 12)
    params = layer.named_parameters() if named else layer.parameters()
    opt = GaLoreAdamW([{"params": wrap(params), "rank": 4}])
    assert [id(p) for p in opt.param_groups[0]["params"]] == [id(p) for p in layer.parameters()]
    assert opt.param_groups[0].get("param_names", ["weight", "bias"]) == ["weight", "bias"]


def test_capitals_do_not_matter():
    """Guards against names such as T5's SelfAttention that are passed over in silence."""
    names_ = ["block.SelfAttention.q", "block.EncDecAttention.LayerNorm", "block.DenseReluDense.wi", "MLP.up"]
    groups = param_groups([(n, nn.Parameter(torch.zeros(16, 16))) for n in names_], rank=4)
    assert names(groups[0]) == ["block.SelfAttention.q", "MLP.up"]
    groups = param_groups(
        [(n, nn.Parameter(torch.zeros(16, 16))) for n in names_], rank=4, include=("dense",)
    )
    assert names(groups[0]) == ["block.DenseReluDense.wi"]
