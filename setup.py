"""Builds the extension against the torch that is installed; all else is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import setup

try:
    import torch
except ModuleNotFoundError as error:
    raise SystemExit(
        "galore_rrf is compiled against the torch of your environment, and an isolated build has none: "
        "install torch first, then run `pip install --no-build-isolation .`"
    ) from error
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent

# No contraction, so that every instruction set computes the same bits; errno and traps would only
# keep the compiler from vectorising sqrt and selections.  CMakeLists.txt has the same.  The debug
# information that Python's own flags ask for would make it thirty times as large.
COMPILE = [
    "-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
]  # fmt: skip


class Build(BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # Not a temporary folder, where an editable install would compile everything anew.
        self.build_temp = "build/temp"


torch_minor = ".".join(torch.__version__.split(".")[:2])
os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))

setup(
    # Compiled code is bound to the torch minor version it was built against.
    install_requires=[f"torch=={torch_minor}.*"],
    ext_modules=[
        CppExtension(
            "galore_rrf._C",
            [*(ROOT / "csrc/sources.txt").read_text().split(), "csrc/python.cpp"],
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=COMPILE,
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": Build},
)
