"""galore_torch 1.0 as published, without the large packages that its __init__ asks for."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from unittest import mock


def galore_torch_adamw() -> type:
    """The published optimizer, ``galore_torch.GaLoreAdamW``.

    Its package also imports bitsandbytes and transformers, for optimizers and a version check that are not
    compared with; where they are missing, empty stand-ins take their place during the import.
    """
    spec = find_spec("galore_torch")
    if spec is None:
        raise ModuleNotFoundError("galore_torch is not installed: pip install --no-deps galore-torch==1.0")
    package = module_from_spec(spec)  # not executed: its __init__ imports everything
    versions = ModuleType("transformers.utils.versions")
    versions.require_version = lambda *_: None  # type: ignore[attr-defined]
    stand_ins = {
        "galore_torch": package,
        "transformers": ModuleType("transformers"),
        "transformers.utils": ModuleType("transformers.utils"),
        "transformers.utils.versions": versions,
    }
    with mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("galore_torch.adamw").AdamW
