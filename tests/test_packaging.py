"""What pip and users are told about the package."""

import runpy
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch

from galore_rrf._binding import check_torch, explained

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


def test_import_beside_another_torch_says_what_to_do():
    """Guards against an undefined symbol as the only message."""
    check_torch(["torch==2.14.*"], "2.14.1+cu130")
    with pytest.raises(ImportError, match=r"compiled for torch 2\.14, but torch 2\.15\.0 is installed"):
        check_torch(["torch==2.14.*"], "2.15.0")


@pytest.mark.parametrize("library", ["libtorch_cuda.so", "libcudart.so.13", "libcublas.so.12"])
def test_import_beside_another_cuda_says_what_to_do(library):
    """Guards against the name of a shared object as the only message."""
    error = ImportError(f"{library}: cannot open shared object file: No such file or directory")
    sentence = str(explained(error, "2.14.1+cpu"))
    assert sentence.startswith(
        "galore_rrf was compiled with CUDA, and torch 2.14.1+cpu has another CUDA or none"
    )
    assert library in sentence
    other = ImportError("libgomp.so.1: cannot open shared object file: No such file or directory")
    assert explained(other, "2.14.1+cpu") is other
