import host_kernels
import pytest


@pytest.fixture(scope="session", autouse=True)
def built_once():
    """What does not compile is reported by each test, but compiled once."""
    host_kernels.library()
