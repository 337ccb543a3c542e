"""What pip and users are told about the package."""

import runpy
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def test_package_binds_to_the_minor_version_of_torch():
    """Guards against compiled code beside a torch of another binary interface."""
    major, minor = torch.__version__.split(".")[:2]
    assert f"torch=={major}.{minor}.*" in requires("galore_rrf")


def test_build_without_torch_names_the_flag(monkeypatch):
    """Guards against an isolated build that ends in a traceback."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="pip install --no-build-isolation"):
        runpy.run_path(str(ROOT / "setup.py"))
