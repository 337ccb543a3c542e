"""galore_rrf.compat.galore_torch.install, each time in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

IMPORTS = """
import json, sys
from importlib.util import find_spec
found = {}
import galore_rrf
found["imported"] = sorted(name for name in sys.modules if name.startswith("galore_rrf.compat"))
from galore_rrf.compat.galore_torch import GaLoreAdamW, install
install()
import galore_torch
from galore_torch import GaLoreAdafactor, GaLoreAdamW as Found, GaLoreAdamW8bit
found["ours"] = Found is GaLoreAdamW
spec = find_spec("galore_torch")
found["spec"] = [spec.name, spec.origin == galore_torch.__file__, spec.loader is not None]
install()
found["again"] = sys.modules["galore_torch"] is galore_torch
found["transformers"] = "transformers" in sys.modules
print(json.dumps(found))
"""

ANOTHER = """
import json, sys, types
from galore_rrf.compat.galore_torch import GaLoreAdamW, install
sys.modules["galore_torch"] = other = types.ModuleType("galore_torch")
other.__file__, other.GaLoreAdamW = "elsewhere.py", object
try:
    install()
except RuntimeError as error:
    message = str(error)
kept = sys.modules["galore_torch"] is other
install(force=True)
import galore_torch
print(json.dumps([message, kept, galore_torch.GaLoreAdamW is GaLoreAdamW]))
"""


def run(*arguments):
    """What a Python program prints last, as JSON."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_name_leads_here():
    """Guards against a name that finders take for missing, a second import of every class, and costly imports."""
    assert run("-c", IMPORTS) == {
        "imported": [],
        "ours": True,
        "spec": ["galore_torch", True, True],
        "again": True,
        "transformers": False,
    }


def test_another_galore_torch_is_replaced_only_on_demand():
    """Guards against a program that mixes classes of two packages unawares."""
    message, kept, replaced = run("-c", ANOTHER)
    assert "another galore_torch was imported, from elsewhere.py" in message
    assert kept
    assert replaced


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("transformers")
    return run("galore_torch_in_trainer.py")


def test_trainer_finds_the_package(trained):
    """Guards against transformers' memory of a package that was not there."""
    assert trained["available"] == [False, True]


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit", "galore_adafactor"])
def test_trainer_trains_as_a_loop_by_hand(trained, name):
    """Guards against arguments or groups of the Trainer that are taken for something else."""
    assert trained[f"{name} class"]
    assert trained[name] < 1e-3


@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "galore_adamw_8bit_layerwise"])
def test_trainer_steps_layer_by_layer(trained, name):
    """Guards against an optimizer of one parameter that differs from the one of all."""
    assert trained[name] < 1e-3


def test_trainer_cannot_make_adafactor_layerwise(trained):
    """Guards against a note in docs/galore_torch.md that is no longer true: there is an lr, and relative_step."""
    assert trained["galore_adafactor_layerwise"].startswith(
        "Invalid lr: 0.01 (must be None with relative_step"
    )


def test_schedule_of_transformers_reads_the_learning_rate(trained):
    """Guards against AdafactorSchedule, which asks a private method for it."""
    assert trained["lr"] == pytest.approx(0.01)
