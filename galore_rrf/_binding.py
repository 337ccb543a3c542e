"""Loads the compiled operators, after a check that they were built for the torch that is here."""

from __future__ import annotations

import re
from importlib.metadata import requires

import torch


def check_torch(requirements: list[str], version: str) -> None:
    """Raises ImportError where `requirements` pin a torch minor version other than that of `version`."""
    for requirement in requirements:
        pinned = re.match(r"torch==(\d+\.\d+)", requirement)
        if pinned and not version.startswith(pinned[1] + "."):
            raise ImportError(
                f"galore_rrf was compiled for torch {pinned[1]}, but torch {version} is installed: "
                "build it again with `pip install --no-build-isolation .`, or install that torch"
            )


def explained(error: ImportError, version: str) -> ImportError:
    """`error`, in a sentence where it is a library of CUDA that is missing."""
    if not re.match(r"lib\w*cu\w*\.so", str(error)):
        return error
    return ImportError(
        f"galore_rrf was compiled with CUDA, and torch {version} has another CUDA or none ({error}): "
        "build it again with `pip install --no-build-isolation .`, or install that torch"
    )


check_torch(requires("galore_rrf") or [], torch.__version__)

try:
    from galore_rrf import _C  # importing it registers the operators
except ImportError as error:
    raise explained(error, torch.__version__) from error

build_info = _C.build_info
quick_entries = _C.quick_entries
"""Entries of fp32 matrices from which on products that need not be accurate are in bf16 on this CPU; None: never."""
