"""What the tests share."""

import pytest
import torch

from galore_rrf import _C, ops, reference

pytest.register_assert_rewrite("bounds", "matrices")

DEVICES = ["cpu"]
if torch.cuda.is_available() and "cuda" in _C.build_info():
    DEVICES.append("cuda")


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    """Every device that the package has kernels for and this machine has."""
    return torch.device(request.param)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def same_sketch(monkeypatch):
    """The reference on the operator's own test matrices, so that what follows them compares to rounding.

    test_sketch.py compares the matrices.
    """
    monkeypatch.setattr(reference, "gaussian_sketch", ops.gaussian_sketch)
