"""Memory estimates against optimizers that really stepped, published numbers, and measured peaks."""

import re
import sys

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.memory import peak_bytes
from galore_rrf import GaLoreAdamW, param_groups, state_bytes
from galore_rrf.memory import estimate, llama_activations

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
PARTS = ("weights", "gradients", "master_weights", "momentum", "variance", "bases", "buffers", "steps")

# Hidden, intermediate, heads, layers, rank of the published models (GaLore, arXiv 2403.03507, table 5).
PUBLISHED = {
    "60M": (512, 1376, 8, 8, 128),
    "130M": (768, 2048, 12, 12, 256),
    "350M": (1024, 2736, 16, 24, 256),
    "1B": (2048, 5461, 32, 24, 512),
    "7B": (4096, 11008, 32, 32, 1024),
}


class Model(nn.Module):
    """Odd shapes, one dimension to four, tied weights, and what is frozen."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(37, 12)
        self.attn = nn.Linear(12, 12)
        self.mlp = nn.Sequential(nn.Linear(12, 31, bias=False), nn.Linear(31, 13))
        self.attn_conv = nn.Conv2d(5, 9, 3)
        self.experts = nn.Parameter(torch.randn(3, 7, 11))
        self.mlp_shared = nn.Linear(14, 17, bias=False)
        self.mlp_shared_again = nn.Linear(14, 17, bias=False)
        self.mlp_shared_again.weight = self.mlp_shared.weight
        self.mlp_frozen = nn.Linear(15, 16).requires_grad_(False)
        self.norm = nn.LayerNorm(13)
        self.head = nn.Linear(12, 37, bias=False)
        self.head.weight = self.embed.weight


def stepped(optimizer):
    """The optimizer after one step with random gradients."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()
    return optimizer


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def measured(model, optimizer, master_weights=()):
    """Bytes of each part, as there are now; the optimizer may be over master weights."""
    state = list(optimizer.state.values())
    return {
        "weights": size(model.parameters()),
        "gradients": size(p for p in model.parameters() if p.requires_grad),
        "master_weights": size(master_weights),
        "momentum": size(s["exp_avg"] for s in state),
        "variance": size(s["exp_avg_sq"] for s in state),
        "bases": size(v for s in state for k, v in s.items() if k.startswith("basis")),
        "buffers": size(s[k] for s in state for k in ("error", "average", "residual_norm") if k in s),
        "steps": size(s["step"] for s in state),
    }


def check(found, model, optimizer, master_weights=()):
    assert {part: getattr(found, part) for part in PARTS} == measured(model, optimizer, master_weights)
    assert found.state == state_bytes(optimizer)
    assert found.held == sum(getattr(found, part) for part in PARTS)


def llama(hidden=64, intermediate=176, heads=4, layers=3, vocab=1000, device="cpu", **fields):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        use_cache=False,
        **fields,
    )
    with torch.device(device):
        return transformers.LlamaForCausalLM(config)


def with_adapters(model, rank):
    """As examples/pretrain/model.py has it."""
    peft = pytest.importorskip("peft")
    projected, *_ = param_groups(model, rank)
    targets = [name.removesuffix(".weight") for name, _ in projected["params"]]
    frozen = {id(p) for _, p in projected["params"]}
    plain = [p for p in model.parameters() if id(p) not in frozen]
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=rank, target_modules=targets), autocast_adapter_dtype=False
    )
    for p in plain:
        p.requires_grad_()
    return wrapped


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw_to_the_byte(dtype):
    """Guards against a parameter forgotten or counted twice: tied, frozen, in any number of dimensions."""
    model = Model().to(dtype)
    check(estimate(model), model, stepped(torch.optim.AdamW(model.parameters())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full", "tucker"])
@pytest.mark.parametrize("rank", [1, 4, 7, 12, 40])
def test_galore_to_the_byte(rank, proj_type, dtype):
    """Guards against another rule, side or dtype than the optimizer's own; 7, 12 and 40 leave matrices plain."""
    model = Model().to(dtype)
    trained = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    optimizer = stepped(GaLoreAdamW(param_groups(trained, rank, proj_type=proj_type)))
    found = estimate(model, "galore", rank=rank, proj_type=proj_type)
    check(found, model, optimizer)
    assert (found.bases > 0) == (rank < 13)


OPTIONS = [
    *({"residual": mode} for mode in ("sign", "normalized", "orthogonalized", "scaled", "feedback")),
    *({"basis_from": source} for source in ("average", "momentum")),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [*OPTIONS, {"residual": "feedback", "basis_from": "average"}], ids=str)
def test_buffers_to_the_byte(keys, dtype):
    """Guards against an entry of the state that an option asks for and nobody counts."""
    model = Model().to(dtype)
    trained = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    optimizer = stepped(GaLoreAdamW(param_groups(trained, 4, **keys)))
    found = estimate(model, "galore", rank=4, **keys)
    check(found, model, optimizer)
    assert (found.buffers > 0) == bool({"scaled", "feedback", "average"}.intersection(keys.values()))


def test_presets_to_the_byte():
    """Guards against plain parameters counted in the 8 bits that a preset keeps its own group in."""
    model = nn.ModuleDict({"mlp": nn.Linear(200, 120, bias=False), "head": nn.Linear(200, 50, bias=False)})
    optimizer = stepped(GaLoreAdamW(param_groups(model, 40, preset="best")))
    found = estimate(model, "galore", rank=40, projected_state_dtype=torch.uint8, residual="orthogonalized")
    assert found.state == state_bytes(optimizer)
    assert found.state < estimate(model, "galore", rank=40).state
    assert found.state > estimate(model, "galore", rank=40, state_dtype=torch.uint8).state


def test_workspace_goes_by_what_the_cpu_multiplies_in(monkeypatch):
    """Guards against half of what an iteration in fp32 takes, on a CPU that has no bf16 products."""
    model = nn.ModuleDict({"mlp": nn.Linear(1376, 512, bias=False, device="meta")})

    def workspace(least):
        monkeypatch.setattr(sys.modules["galore_rrf.memory.estimate"], "quick_entries", lambda: least)
        return estimate(model, "galore", rank=128, residual="orthogonalized", threads=1).workspace

    outside = (512 - 128) * 1376
    assert workspace(outside) < 0.85 * workspace(outside + 1)
    assert workspace(outside + 1) == workspace(None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [None, 4])
def test_mixed_precision_to_the_byte(rank, dtype):
    """Guards against moments or bases in another dtype than that of the master weights."""
    model = Model().to(dtype)
    masters = {
        name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters() if p.requires_grad
    }
    groups = [{"params": list(masters.values())}]
    if rank is not None:
        tied = {"mlp_shared.weight", "embed.weight"}
        groups = param_groups([(n, p) for n, p in masters.items() if n not in tied], rank)
        groups += [{"params": [(n, masters[n]) for n in tied]}]
    optimizer = stepped(GaLoreAdamW(groups))
    method = "adamw" if rank is None else "galore"
    found = estimate(Model(), method, rank=rank, dtype=dtype, mixed_precision=True)
    check(found, model, optimizer, masters.values())
    if dtype == torch.bfloat16:
        assert found == estimate(Model(), method, rank=rank, mixed_precision=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [3, 64])
def test_lora_to_the_byte(rank, dtype):
    """Guards against adapters of other shapes, dtypes or places than those of peft."""
    raw = estimate(llama(num_key_value_heads=2, attention_bias=True), "lora", rank=rank, dtype=dtype)
    model = with_adapters(llama(num_key_value_heads=2, attention_bias=True).to(dtype), rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = stepped(torch.optim.AdamW(trained))
    check(raw, model, optimizer)
    check(estimate(model), model, optimizer)
    assert raw.parameters == estimate(llama(num_key_value_heads=2, attention_bias=True)).parameters


@pytest.mark.parametrize("method", [{}, {"optimizer": "galore", "rank": 4}, {"optimizer": "lora", "rank": 4}])
def test_nothing_but_shapes_counts(method):
    """Guards against weights read, or estimates that depend on where and in which dtype the model is."""
    with torch.device("meta"):
        model = Model()
    for dtype in DTYPES:
        expected = estimate(Model().to(dtype), **method)
        assert estimate(model, dtype=dtype, **method) == expected
        assert estimate(Model(), dtype=dtype, **method) == expected
    assert all(p.is_meta and p.grad is None for p in model.parameters())


def test_own_names():
    """Guards against include and exclude that stop short of `param_groups`."""
    model = nn.ModuleDict({"body": nn.Linear(9, 8, bias=False), "body_last": nn.Linear(9, 8, bias=False)})
    keys = {"include": ("body",), "exclude": ("last",)}
    optimizer = stepped(GaLoreAdamW(param_groups(model, 4, **keys)))
    check(estimate(model, "galore", rank=4, **keys), model, optimizer)
    with pytest.raises(ValueError, match=r"no parameter is to be projected.*body_last\.weight"):
        estimate(model, "galore", rank=4)


@pytest.fixture(scope="module")
def published():
    """The published models, on the meta device."""
    return {name: llama(*shape[:4], vocab=32000, device="meta") for name, shape in PUBLISHED.items()}


def test_published_sizes(published):
    """Guards against other models than the published ones: parameters in millions."""
    millions = {name: round(estimate(model).parameters / 1e6, 1) for name, model in published.items()}
    assert millions == {"60M": 58.1, "130M": 134.1, "350M": 368.0, "1B": 1339.1, "7B": 6738.4}


@pytest.mark.parametrize(
    ("name", "states", "held", "digits"),
    [("60M", 0.232, 0.465, 3), ("350M", 1.472, 2.944, 3), ("1B", 5.356, 10.71, 2), ("7B", 26.95, 53.9, 1)],
)
def test_published_adamw(name, states, held, digits, published):
    """Guards against another unit or count than the papers' (GB, bf16)."""
    found = estimate(published[name], dtype=torch.bfloat16)
    assert round(found.state / 1e9, 2 if name == "7B" else 3) == states
    assert round(found.held / 1e9, digits) == held


@pytest.mark.parametrize(
    ("name", "states", "held", "ratio"),
    [
        ("60M", 0.164, 0.396, 0.81),
        ("350M", 0.653, 2.125, None),
        ("1B", 2.085, 7.44, 0.61),
        ("7B", 9.41, 36.4, 0.59),
    ],
)
def test_published_galore(name, states, held, ratio, published):
    """Guards against another choice of matrices: the papers' figures have bf16 moments, ours fp32 where projected."""
    model, rank = published[name], PUBLISHED[name][-1]
    ours = estimate(model, "galore", rank=rank, dtype=torch.bfloat16)
    plain = 2 * sum(p.numel() for n, p in model.named_parameters() if not re.search(r"(attn|mlp)\.", n))
    theirs = 2 * plain + (ours.momentum - plain) / 2 + (ours.variance - plain) / 2 + ours.bases
    for found, printed in ((theirs, states), (theirs + ours.weights + ours.gradients, held)):
        last_digit = 10 ** -len(str(printed).split(".")[1])
        assert found / 1e9 == pytest.approx(printed, abs=0.6 * last_digit)  # 9.405 is printed as 9.41
    if ratio is not None:
        assert round(ours.state / estimate(model, dtype=torch.bfloat16).state, 2) == ratio


@pytest.mark.parametrize("name", PUBLISHED)
def test_mixed_precision_takes_16_bytes_a_parameter(name, published):
    """Guards against a part that is missing or in another precision."""
    found = estimate(published[name], mixed_precision=True)
    each = {part: getattr(found, part) / found.parameters for part in PARTS[:-1]}
    assert each == {
        "weights": 2,
        "gradients": 2,
        "master_weights": 4,
        "momentum": 4,
        "variance": 4,
        "bases": 0,
        "buffers": 0,
    }
    assert found.held - found.steps == 16 * found.parameters


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw_workspace_is_the_measured_peak(dtype, threads):
    """Guards against a temporary forgotten: torch's for-loop path, some scalars aside."""
    threads(1)
    model = nn.Sequential(nn.Linear(100, 300), nn.Linear(300, 77)).to(dtype)
    optimizer = stepped(torch.optim.AdamW(model.parameters()))
    assert 0 <= peak_bytes(optimizer.step) - estimate(model).workspace <= 64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "rank", "proj_type"),
    [
        ((512, 1376), 128, "std"),
        ((512, 1376), 128, "right"),
        ((1376, 512), 128, "std"),
        ((1376, 512), 128, "left"),
        ((512, 512), 128, "std"),
        ((512, 512), 500, "std"),
        ((1024, 1024), 64, "std"),
        ((64, 2000), 16, "std"),
        ((2000, 64), 1, "std"),
        ((33, 40), 8, "std"),
        ((3, 200, 120), 30, "reverse_std"),
    ],
    ids=str,
)
def test_galore_workspace_is_near_the_measured_peak(shape, rank, proj_type, dtype, threads):
    """Guards against an estimate that the step has left behind: within 5%, one matrix in flight."""
    threads(1)
    model = nn.ParameterDict({"mlp": nn.Parameter(torch.randn(shape).to(dtype))})
    optimizer = stepped(GaLoreAdamW(param_groups(model, rank, update_proj_gap=1, proj_type=proj_type)))
    found = estimate(model, "galore", rank=rank, proj_type=proj_type, threads=1).workspace
    assert found == pytest.approx(peak_bytes(optimizer.step), rel=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "rank"),
    # Large enough for oneDNN's scratch memory, some 100 KiB in bf16 products, to be little.
    [((512, 1376), 128), ((1376, 512), 128), ((512, 512), 500), ((1024, 1024), 16), ((3, 600, 401), 30)],
    ids=str,
)
@pytest.mark.parametrize("keys", OPTIONS, ids=str)
def test_workspace_of_options_is_near_the_measured_peak(keys, shape, rank, dtype, threads):
    """Guards against whole residuals, or sources of a basis, that nobody counts: within 5%, one matrix in flight."""
    threads(1)
    model = nn.ParameterDict({"mlp": nn.Parameter(torch.randn(shape).to(dtype))})
    optimizer = stepped(GaLoreAdamW(param_groups(model, rank, update_proj_gap=1, **keys)))
    found = estimate(model, "galore", rank=rank, threads=1, **keys).workspace
    assert found == pytest.approx(peak_bytes(optimizer.step), rel=0.05)


def test_momentum_is_that_of_one_matrix_at_a_time(threads):
    """Guards against momenta of all matrices at once: a further matrix adds its new state, but no weight's size."""
    threads(1)

    def peak(count):
        model = nn.ParameterDict({f"mlp{i}": nn.Parameter(torch.randn(256, 320)) for i in range(count)})
        groups = param_groups(model, 32, update_proj_gap=1, basis_from="momentum")
        return peak_bytes(stepped(GaLoreAdamW(groups)).step)

    assert peak(6) - peak(2) < 4 * (4 * 256 * 320)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "rank", "proj_type"),
    [
        *(((512, 1376), 128, "full"), ((256, 256), 32, "full"), ((256, 128, 3, 3), 32, "tucker")),
        *(((64, 256, 3, 3), 32, "tucker"), ((128, 128, 3, 3), 8, "tucker"), ((128, 64, 3, 3), 100, "tucker")),
    ],
    ids=str,
)
def test_workspace_of_several_modes_is_near_the_measured_peak(shape, rank, proj_type, dtype, threads):
    """Guards against a whole unfolding or an identity that a step makes and nobody counts: within 10%."""
    threads(1)
    model = nn.ParameterDict({"mlp": nn.Parameter(torch.randn(shape).to(dtype))})
    optimizer = stepped(GaLoreAdamW(param_groups(model, rank, update_proj_gap=1, proj_type=proj_type)))
    found = estimate(model, "galore", rank=rank, proj_type=proj_type, threads=1).workspace
    assert found == pytest.approx(peak_bytes(optimizer.step), rel=0.1)


def test_workspace_by_threads():
    """Guards against matrices in flight that are not counted, and against counting more than there are."""
    layers = {f"mlp_{n}": nn.Linear(n, n, bias=False) for n in (40, 60, 80)}
    each = [
        estimate(nn.ModuleDict({name: layer}), "galore", rank=8, threads=1).workspace
        for name, layer in layers.items()
    ]
    model = nn.ModuleDict(layers)
    for count in (1, 2, 3, 16):
        found = estimate(model, "galore", rank=8, threads=count).workspace
        assert found == sum(sorted(each, reverse=True)[:count])
    assert estimate(model, "galore", rank=8) == estimate(
        model, "galore", rank=8, threads=torch.get_num_threads()
    )
    model["head"] = nn.Linear(500, 500, bias=False)  # plain, so after them
    assert estimate(model, "galore", rank=8, threads=2).workspace == 2 * 4 * 500**2


SHAPES = {
    "plain": {},
    "grouped_query": {"num_key_value_heads": 2},
    "wide_heads": {"head_dim": 32},
    "large_vocabulary": {"vocab": 8000},
}
BATCH, LENGTH = 4, 32


def tokens_of(model):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (BATCH, LENGTH), generator=generator)


def loss_of(model, tokens):
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapters", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_activations_are_near_what_autograd_keeps(fields, adapters, dtype):
    """Guards against a tensor forgotten: within 2% of the storages saved, beside two gradients of logits."""
    model = llama(**fields).to(dtype)
    method = {"optimizer": "lora", "rank": 8} if adapters else {}
    found = estimate(model, tokens=BATCH * LENGTH, **method).activations
    if adapters:
        model = with_adapters(model, 8)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model, tokens_of(model))  # keeps alive what it needs
    gradients = 2 * 4 * model.config.vocab_size * BATCH * LENGTH
    assert sum(kept.values()) == pytest.approx(found - gradients, rel=0.02)
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all", "checkpointing"])
@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_activations_are_near_the_measured_peak(fields, checkpointing, dtype, threads):
    """Guards against a peak elsewhere: within 5% of what a forward and backward pass allocate."""
    threads(1)
    model = llama(**fields).to(dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    tokens = tokens_of(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    peak = peak_bytes(lambda: model(input_ids=tokens, labels=tokens).loss.backward())
    found = estimate(model, tokens=tokens.numel(), checkpointing=checkpointing).activations
    assert found == pytest.approx(peak, rel=0.05)


def test_activations_are_not_estimated_unasked():
    """Guards against a total that silently has another meaning."""
    found = estimate(Model(), "galore", rank=4)
    assert found.activations is None
    assert found.total == found.held + found.workspace
    with_tokens = estimate(llama(device="meta"), tokens=4096)
    assert with_tokens.total == with_tokens.held + with_tokens.activations
    assert with_tokens.activations == llama_activations(llama(device="meta").config, 4096, torch.float32)
    with pytest.raises(ValueError, match="Llama-like models alone, and the config lacks hidden_size"):
        estimate(Model(), tokens=4096)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": "sgd"}, ValueError, r"Invalid optimizer: 'sgd' .*'adamw', 'galore', 'lora'"),
        ({"optimizer": "galore"}, ValueError, r"Invalid rank: None \(must be a positive integer"),
        ({"optimizer": "lora"}, ValueError, r"Invalid rank: None"),
        ({"rank": 4}, ValueError, r"Invalid rank: 4 \(must be None with optimizer='adamw'"),
        ({"optimizer": "galore", "rank": 0}, ValueError, r"Invalid rank: 0 \(must be a positive integer"),
        ({"optimizer": "galore", "rank": 4.0}, TypeError, r"Invalid rank: 4\.0"),
        ({"optimizer": "galore", "rank": 4, "proj_type": "up"}, ValueError, r"Invalid proj_type: 'up'"),
        ({"optimizer": "galore", "rank": 4, "residual": "all"}, ValueError, r"Invalid residual: 'all'"),
        (
            {"residual": "sign"},
            ValueError,
            r"Invalid residual: 'sign' \(must be 'drop' with optimizer='adamw'",
        ),
        ({"basis_from": "average"}, ValueError, r"Invalid basis_from: 'average' \(must be 'gradient'"),
        ({"dtype": torch.int8}, TypeError, r"Invalid dtype: torch\.int8"),
        ({"dtype": "bf16"}, TypeError, r"Invalid dtype: 'bf16'"),
        ({"dtype": torch.float32, "mixed_precision": True}, ValueError, r"Invalid dtype: torch\.float32"),
        ({"tokens": 0}, ValueError, r"Invalid tokens: 0"),
        ({"tokens": 1.5}, TypeError, r"Invalid tokens: 1\.5"),
        ({"threads": -1}, ValueError, r"Invalid threads: -1"),
        ({"threads": True}, TypeError, r"Invalid threads: True"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    """Guards against an estimate of something that cannot be trained."""
    with pytest.raises(error, match=message):
        estimate(Model(), **arguments)
