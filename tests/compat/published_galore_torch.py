"""galore_torch 1.0 as published, module by module: its __init__ asks for bitsandbytes."""

import importlib
import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from unittest import mock


def published(module, name):
    """A class of one of its modules, with an empty stand-in for transformers' check of torch's version."""
    versions = ModuleType("transformers.utils.versions")
    versions.require_version = lambda *_: None
    stand_ins = {
        "galore_torch": module_from_spec(find_spec("galore_torch")),  # not executed
        "transformers": ModuleType("transformers"),
        "transformers.utils": ModuleType("transformers.utils"),
        "transformers.utils.versions": versions,
    }
    with mock.patch.dict(sys.modules, stand_ins):
        return getattr(importlib.import_module(f"galore_torch.{module}"), name)


PublishedAdamW = published("adamw", "AdamW")
PublishedAdafactor = published("adafactor", "Adafactor")
