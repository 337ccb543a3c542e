"""What csrc/cuda is compiled with, where it is: setup.py imports this, CMakeLists.txt runs it.

A toolkit decides, not a GPU.  Environment: GALORE_RRF_CUDA (0: never, 1: an error without a toolkit),
CUDA_HOME, TORCH_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

# The kernels give the bits that the CPU's give, so no contraction either.
FLAGS = [
    "-std=c++20", "-O3", "-fmad=false", "-Werror", "all-warnings", "-Wno-deprecated-gpu-targets",
    "-Xcompiler", "-Wall,-Wextra,-ffp-contract=off,-fvisibility=hidden",
]  # fmt: skip
LIBRARIES = ("c10_cuda", "torch_cuda", "cudart", "cublas")


class NoToolkit(Exception):
    """Why there is nothing to compile csrc/cuda with, as a part of a sentence."""


@dataclass(frozen=True)
class Cuda:
    """A toolkit of the same major version as torch's, and what to compile and link with."""

    home: str
    version: str
    flags: list[str]
    include_dirs: list[str]
    libraries: list[str]


def find_cuda() -> tuple[Cuda | None, str]:
    """The toolkit, or None where the package is to be for the CPU only; and a sentence that says which."""
    choice = os.environ.get("GALORE_RRF_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"Invalid GALORE_RRF_CUDA: {choice} (must be 0 or 1)")
    for_cpu = "galore_rrf is compiled for the CPU only: "
    if choice == "0":
        return None, for_cpu + "GALORE_RRF_CUDA is 0"
    try:
        home, version = find_toolkit()
    except NoToolkit as reason:
        if choice == "1":
            raise SystemExit(f"GALORE_RRF_CUDA is 1, but {reason}") from None
        return None, for_cpu + str(reason)
    architectures = architecture_flags(home)
    names = re.findall(r",code=(\w+)", " ".join(architectures))
    names.sort(key=lambda name: (name.startswith("compute"), len(name), name))  # PTX last
    # Torch's own libraries come first; a toolkit may be without cuBLAS, headers included.
    site = Path(torch.__file__).parent.parent
    includes = [home / "include", *sorted(site.glob("nvidia/*/include"))]
    folders = [site / "torch/lib", *sorted(site.glob("nvidia/*/lib")), home / "lib64", home / "lib"]
    cuda = Cuda(
        home=str(home),
        version=version,
        flags=[*FLAGS, *architectures, f"-DGALORE_RRF_ARCHITECTURES={' '.join(names)}"],
        include_dirs=[str(folder) for folder in includes],
        libraries=[find_library(name, folders) for name in LIBRARIES],
    )
    return cuda, f"galore_rrf is compiled with CUDA {version} for {', '.join(names)}"


def find_toolkit() -> tuple[Path, str]:
    """The toolkit's folder and version.  From nvcc itself, which may be called by a link or a script elsewhere."""
    if not torch.version.cuda:
        raise NoToolkit(f"torch {torch.__version__} is without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = f"{home}/bin" if home else os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=path)
    if nvcc is None:
        raise NoToolkit(f"there is no nvcc in {path}")
    (version,) = re.findall(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise NoToolkit(
            f"{nvcc} is of CUDA {version} and torch {torch.__version__} of CUDA {torch.version.cuda}"
        )
    (top,) = re.findall(
        r"^#\$ TOP=(.+)$", output_of(nvcc, "-dryrun", "-E", "-x", "cu", os.devnull), re.MULTILINE
    )
    return Path(top.strip()).resolve(), version


def output_of(*command: str) -> str:
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


def architecture_flags(home: Path) -> list[str]:
    """Torch's flags for its nvcc; for A100, H100 and later where it is told no architecture and sees no GPU."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0+PTX"
    os.environ["CUDA_HOME"] = str(home)
    logging.disable(logging.WARNING)  # of a GPU that is missing; CUDA_HOME is read here
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, _get_cuda_arch_flags

    logging.disable(logging.NOTSET)
    return [*COMMON_NVCC_FLAGS, *_get_cuda_arch_flags()]


def find_library(name: str, folders: list[Path]) -> str:
    """A path to link with: wheels have `lib*.so.N` only, which -l does not find, and may leave those of another
    major version behind."""
    major = torch.version.cuda.split(".")[0]
    for pattern in (f"lib{name}.so.{major}*", f"lib{name}.so*"):
        for folder in folders:
            for found in sorted(folder.glob(pattern)):
                return str(found)
    raise SystemExit(f"lib{name}.so is in none of {', '.join(map(str, folders))}")


def main() -> None:
    """Prints the sentence for people, on stderr, and the rest as variables of CMake."""
    cuda, sentence = find_cuda()
    print(sentence, file=sys.stderr)
    for name, value in vars(cuda).items() if cuda else ():
        print(f"set(cuda_{name} [==[{value if isinstance(value, str) else ';'.join(value)}]==])")


if __name__ == "__main__":
    main()
