"""Spectra as saved in a run, against NumPy's SVD in fp64, and the energy in them."""

import numpy as np
import pytest
import torch
from pretrain.errors import UserError
from pretrain.results.spectra import energy_kept, rank_keeping, read_spectra
from pretrain.spectra import check_layers, save_spectra

import galore_rrf


class Model(torch.nn.Module):
    """Names as in a Llama: two matrices inside MLPs, a head, a vector."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
        for layer, (m, n) in zip(self.layers, [(24, 16), (12, 20)], strict=True):
            layer.mlp = torch.nn.Module()
            layer.mlp.up_proj = torch.nn.Parameter(torch.randn(m, n, generator=generator).to(dtype))
        self.head = torch.nn.Parameter(torch.randn(10, 16, generator=generator).to(dtype))
        self.bias = torch.nn.Parameter(torch.randn(10, generator=generator).to(dtype))


def step(model, optimizer, steps=3):
    for seed in range(steps):
        generator = torch.Generator().manual_seed(100 + seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def svdvals(tensor):
    return np.linalg.svd(tensor.detach().double().numpy(), compute_uv=False)


def close(a, b):
    return np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(np.max(b)))


def test_of_adamw(tmp_path):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    path = save_spectra(tmp_path / "spectra", 10, model.named_parameters(), optimizer, ["head", "layers.1"])
    assert path == tmp_path / "spectra" / "step-000010.npz"
    assert list(path.parent.iterdir()) == [path], "nothing else is left behind"

    layers = read_spectra(path.parent)
    assert [(layer.name, layer.shape) for layer in layers] == [
        ("head", (10, 16)),  # in the order asked for
        ("layers.1.mlp.up_proj", (12, 20)),
    ]
    for layer, p in zip(layers, [model.head, model.layers[1].mlp.up_proj], strict=True):
        close(layer.gradient[10], svdvals(p.grad))
        close(layer.momentum[10], svdvals(optimizer.state[p]["exp_avg"]))
        close(layer.variance[10], svdvals(optimizer.state[p]["exp_avg_sq"]))


@pytest.mark.parametrize("proj_type", ["right", "left"])
def test_of_projected_parameters(tmp_path, proj_type):
    model = Model()
    optimizer = galore_rrf.GaLoreAdamW(
        galore_rrf.param_groups(model, rank=5, update_proj_gap=2, proj_type=proj_type)
    )
    step(model, optimizer)
    save_spectra(tmp_path, 2, model.named_parameters(), optimizer, ["mlp", "head"])
    layers = read_spectra(tmp_path)
    assert [len(layer.momentum[2]) for layer in layers] == [5, 5, 10]
    for layer, module in zip(layers, model.layers, strict=False):
        p = module.mlp.up_proj
        state = optimizer.state[p]
        close(layer.gradient[2], svdvals(p.grad))
        basis, momentum = state["basis"].double(), state["exp_avg"].double()
        full = basis @ momentum if proj_type == "left" else momentum @ basis.mT
        assert full.shape == p.shape
        close(layer.momentum[2], svdvals(full)[:5])
        close(layer.variance[2], svdvals(state["exp_avg_sq"]))


def test_of_bf16_and_fp64(tmp_path):
    for dtype, atol in ((torch.bfloat16, 2e-6), (torch.float64, 1e-14)):
        model = Model(dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        step(model, optimizer)
        save_spectra(tmp_path, 1, model.named_parameters(), optimizer, ["head"])
        (layer,) = read_spectra(tmp_path)
        exact = svdvals(model.head.grad)
        np.testing.assert_allclose(layer.gradient[1], exact, rtol=0, atol=atol * exact[0])


def test_training_is_left_alone(tmp_path):
    """No state is made, no random number is drawn, gradients stay as they are."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    model.head.grad = torch.ones_like(model.head)
    before = torch.get_rng_state()
    save_spectra(tmp_path, 0, model.named_parameters(), optimizer, ["head"])
    assert not optimizer.state
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(model.head.grad, torch.ones_like(model.head))
    (layer,) = read_spectra(tmp_path)
    assert not layer.momentum
    assert not layer.variance


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(tmp_path, value):
    model = Model()
    optimizer = galore_rrf.GaLoreAdamW(galore_rrf.param_groups(model, rank=5))
    step(model, optimizer)
    p = model.layers[0].mlp.up_proj
    p.grad[3, 4] = value
    save_spectra(tmp_path, 3, model.named_parameters(), optimizer, ["layers.0"])
    (layer,) = read_spectra(tmp_path)
    assert layer.gradient[3].shape == (16,)
    assert np.isnan(layer.gradient[3]).all()
    close(layer.momentum[3], svdvals(optimizer.state[p]["exp_avg"]))


def test_nothing_to_save(tmp_path):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    assert save_spectra(tmp_path / "spectra", 0, model.named_parameters(), optimizer, ["head"]) is None
    model.bias.grad = torch.ones_like(model.bias)  # no matrix
    assert save_spectra(tmp_path / "spectra", 0, model.named_parameters(), optimizer, ["bias"]) is None
    assert not (tmp_path / "spectra").exists()
    assert read_spectra(tmp_path / "spectra") == []


def test_several_steps(tmp_path):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    expected = {}
    for at in (0, 10, 1_000_000, 100):
        step(model, optimizer, steps=1)
        model.head.grad *= at + 1
        save_spectra(tmp_path, at, model.named_parameters(), optimizer, ["head"])
        expected[at] = svdvals(model.head.grad)
    (layer,) = read_spectra(tmp_path)
    assert list(layer.gradient) == [0, 10, 100, 1_000_000]
    for at, values in expected.items():
        close(layer.gradient[at], values)


def test_damaged_file(tmp_path):
    (tmp_path / "step-000003.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(UserError, match=r"step-000003\.npz does not hold spectra"):
        read_spectra(tmp_path)


def test_check_layers():
    model = Model()
    check_layers(model.named_parameters(), ["layers.0", "head"])
    with pytest.raises(UserError, match=r"'bias', 'q_proj' \(.*: head, layers\.N\.mlp\.up_proj\)"):
        check_layers(model.named_parameters(), ["head", "bias", "q_proj"])
    with pytest.raises(UserError, match="none"):
        check_layers(model.named_parameters(), [])
    model.head.requires_grad_(False)
    with pytest.raises(UserError, match="'head'"):
        check_layers(model.named_parameters(), ["head"])


def test_energy():
    values = np.array([3.0, 2.0, 1.0, 0.0])  # squares 9, 4, 1: of 14
    np.testing.assert_allclose(energy_kept(values), [9 / 14, 13 / 14, 1, 1], rtol=1e-15)
    assert rank_keeping(values) == 2
    assert rank_keeping(values, 13.5 / 14) == 3
    assert rank_keeping(values, 1.0) == 3
    assert rank_keeping(np.sqrt([9.0, 9, 1, 1])) == 2  # 18 of 20 in spite of rounding
    assert rank_keeping(np.ones(10)) == 9
    assert rank_keeping(np.ones(512)) == 461
    assert rank_keeping(np.array([1e-30, 1e-30], dtype=np.float32), 0.5) == 1


@pytest.mark.parametrize("values", [[0.0, 0.0], [np.nan, np.nan], [np.inf, 1.0], []])
def test_no_energy(values):
    assert np.isnan(energy_kept(np.array(values))).all()
    assert rank_keeping(np.array(values)) is None
