"""Builds the extension against the torch that is installed; all else is in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
except ModuleNotFoundError as error:
    raise SystemExit(
        "galore_rrf is compiled against the torch of your environment, and an isolated build has none: "
        "install torch first, then run `pip install --no-build-isolation .`"
    ) from error

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "cmake"))
from find_cuda import find_cuda  # noqa: E402

CUDA, SENTENCE = find_cuda()  # before torch looks for a toolkit
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths  # noqa: E402

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
        self.force = True  # ninja knows what has changed; without it nobody does

    def run(self):
        print(SENTENCE)
        super().run()


def sources(file):
    return (ROOT / file).read_text().split()


extension = CppExtension(
    "galore_rrf._C",
    [*sources("csrc/sources.txt"), "csrc/python.cpp"],
    include_dirs=[str(ROOT / "csrc")],
    extra_compile_args={"cxx": COMPILE},
    extra_link_args=["-fopenmp"],
)
if CUDA:
    extension.sources += sources("csrc/cuda/sources.txt")
    extension.include_dirs += CUDA.include_dirs
    extension.define_macros.append(("GALORE_RRF_WITH_CUDA", None))
    # Torch's headers are not ours to be warned of.
    torch_headers = [word for path in include_paths() for word in ("-isystem", path)]
    extension.extra_compile_args["nvcc"] = [*CUDA.flags, *torch_headers]
    extension.extra_link_args += CUDA.libraries

torch_minor = ".".join(torch.__version__.split(".")[:2])
os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))

setup(
    # Compiled code is bound to the torch minor version it was built against.
    install_requires=[f"torch=={torch_minor}.*"],
    ext_modules=[extension],
    cmdclass={"build_ext": Build},
)
