"""What the tests share."""

import pytest
import torch

from galore_rrf import build_info, ops

pytest.register_assert_rewrite("bounds", "matrices", "projected_state")

DEVICES = ["cpu"]
if torch.cuda.is_available() and "cuda" in build_info():
    DEVICES.append("cuda")


def pytest_addoption(parser):
    parser.addoption("--device", help="run the tests that take a device on this one alone: cpu, cuda")


def pytest_configure(config):
    wished = config.getoption("--device")
    if wished not in (None, *DEVICES):
        raise pytest.UsageError(f"--device {wished}: this machine and this build have {', '.join(DEVICES)}")


def pytest_generate_tests(metafunc):
    """Every device that the package has kernels for and this machine has, or the one asked for."""
    if "device" in metafunc.fixturenames:
        wished = metafunc.config.getoption("--device")
        devices = DEVICES if wished is None else [wished]
        metafunc.parametrize("device", devices, indirect=True, scope="session")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """Where a test makes its tensors; what it compares with is computed on the CPU."""
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
    monkeypatch.setattr("galore_rrf.reference.range_finders.gaussian_sketch", ops.gaussian_sketch)


@pytest.fixture(params=[False, True], ids=["each", "together"])
def together(request, device, monkeypatch):
    """projected_state.State has matrices stepped one by one, and those of one shape together, as always on CUDA."""
    if not request.param and device.type != "cpu":
        pytest.skip("on CUDA they always are together")
    monkeypatch.setattr("projected_state.State.asynchronous", request.param)
    return request.param
