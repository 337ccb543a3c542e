"""The published package's trajectory, from `projector="svd", arithmetic="galore_torch"`."""

import pytest
import torch
from training import gradient

from benchmarks.peers import galore_torch_adamw
from galore_rrf import GaLoreAdamW

SHAPES = {"tall": (24, 16), "wide": (16, 24), "square": (20, 20)}


@pytest.fixture(scope="module")
def published():
    """The published optimizer, as the benchmarks load it too."""
    return galore_torch_adamw()


def ours(params, *, gap, **options):
    keys = {"projector": "svd", "arithmetic": "galore_torch", "moments": "keep", "update_proj_gap": gap}
    with pytest.warns(UserWarning, match="moments='keep'"):
        return GaLoreAdamW(
            [{**group, **(keys if "rank" in group else {})} for group in params], eps=1e-6, **options
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_trajectory_equals_the_published_packages(shape, proj_type, decay, dtype, published):
    """Guards against another side, eps, decay order, schedule or scale than galore_torch 1.0's.

    The gradients are given, not those of a loss: the SVD turns a last bit into much more.
    """
    initial = gradient(shape, 99, dtype)
    theirs_p, ours_p = (torch.nn.Parameter(initial.clone()) for _ in range(2))
    common = {"rank": 5, "scale": 0.25, "proj_type": proj_type}
    theirs = published(
        [{"params": [theirs_p], "update_proj_gap": 3, **common}],
        lr=0.02,
        weight_decay=decay,
        no_deprecation_warning=True,
    )
    mine = ours([{"params": [ours_p], **common}], gap=3, lr=0.02, weight_decay=decay)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for step in range(11):
        g = gradient(shape, step, dtype)
        theirs_p.grad, ours_p.grad = g.clone(), g.clone()
        theirs.step()
        mine.step()
        error = (ours_p - theirs_p).norm() / theirs_p.norm()
        assert error.item() <= tolerance, step
    assert mine.state[ours_p]["refreshes"] == 4
    assert (ours_p - initial).norm() > 1e-3 * initial.norm()


def test_group_beside_a_plain_one_equals_the_published_packages(published):
    """Guards against projected weights that depend on their neighbours in the compatibility mode."""
    shapes = list(SHAPES.values())
    initial = [gradient(s, 99) for s in shapes]
    a, b = ([torch.nn.Parameter(x.clone()) for x in initial] for _ in range(2))
    keys = {"rank": 5, "scale": 0.5, "proj_type": "std"}
    theirs = published([{"params": a, "update_proj_gap": 3, **keys}], lr=0.02, no_deprecation_warning=True)
    plain = torch.nn.Parameter(torch.ones(4))
    mine = ours([{"params": b, **keys}, {"params": [plain]}], gap=3, lr=0.02, weight_decay=0.0)
    for step in range(8):
        for p, q, s in zip(a, b, shapes, strict=True):
            p.grad, q.grad = gradient(s, step), gradient(s, step)
        plain.grad = torch.ones(4)
        theirs.step()
        mine.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-5, atol=1e-6)
