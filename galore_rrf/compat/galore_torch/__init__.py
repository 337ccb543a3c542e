"""The interface of galore_torch 1.0: ``from galore_rrf.compat.galore_torch import GaLoreAdamW``.

`install` gives it to programs that import galore_torch themselves, as the Trainer of transformers does.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location

from galore_rrf.compat.galore_torch.adafactor import GaLoreAdafactor
from galore_rrf.compat.galore_torch.adamw import GaLoreAdamW, GaLoreAdamW8bit

__all__ = ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "install"]


def install(force: bool = False) -> None:
    """Makes ``import galore_torch`` mean this module, for the rest of the process; a second call changes nothing.

    Call it before anything imports galore_torch; the Trainer does so when it makes its optimizer.

    Args:
        force: even where another galore_torch was imported; who took classes from it keeps them.

    Raises:
        RuntimeError: where another galore_torch was imported.
    """
    present = sys.modules.get("galore_torch")
    if getattr(present, "GaLoreAdamW", None) is GaLoreAdamW:
        return
    if present is not None and not force:
        raise RuntimeError(
            f"another galore_torch was imported, from {getattr(present, '__file__', None)}: call install() before "
            "that, or install(force=True), which leaves the classes already taken from it as they are"
        )
    # Not this module itself: under a second name its submodules would be imported a second time.
    spec = spec_from_file_location("galore_torch", __file__)
    assert spec is not None
    module = module_from_spec(spec)
    for name in __all__:
        setattr(module, name, globals()[name])
    sys.modules["galore_torch"] = module
    # transformers remembers whether the name could be imported.
    transformers = sys.modules.get("transformers.utils.import_utils")
    if transformers is not None:
        transformers.is_galore_torch_available.cache_clear()
