"""The CUDA build, with a toolkit and without; none of this needs a GPU, and some of it that none be seen."""

import functools
import os
import re
import runpy
import shutil
import sys
import time
from pathlib import Path

import pytest
import setuptools
import torch
from building import ROOT, build, configure_consumer, run

import galore_rrf


@pytest.fixture
def find_cuda(monkeypatch):
    """cmake/find_cuda.py, in an environment that asks for nothing and is put back afterwards."""
    for name in ("GALORE_RRF_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")
    monkeypatch.syspath_prepend(str(ROOT / "cmake"))
    import find_cuda

    return find_cuda


@pytest.fixture
def toolkit(find_cuda):
    """What is compiled with here; skips the test where there is no toolkit."""
    cuda, sentence = find_cuda.find_cuda()
    if cuda is None:
        pytest.skip(sentence)
    return cuda


@pytest.fixture
def extension(find_cuda, monkeypatch):
    """A function that returns what setup.py would build."""
    asked = {}
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: asked.update(keywords))

    def read() -> setuptools.Extension:
        runpy.run_path(str(ROOT / "setup.py"))
        return asked["ext_modules"][0]

    return read


def fake_nvcc(folder: Path, script: str) -> str:
    """A toolkit's folder with nothing but an nvcc, a shell script."""
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return str(folder)


def test_extension_is_for_the_cpu_where_asked(extension, monkeypatch):
    """Guards against GALORE_RRF_CUDA=0 that a toolkit overrides."""
    monkeypatch.setenv("GALORE_RRF_CUDA", "0")
    built = extension()
    assert not [name for name in built.sources if "cuda" in name]
    assert ("GALORE_RRF_WITH_CUDA", None) not in built.define_macros
    assert not [word for word in built.extra_link_args if "cuda" in word]


def test_extension_is_for_cuda_where_a_toolkit_is(toolkit, extension):
    """Guards against a build that drops CUDA because no GPU is in this machine."""
    built = extension()
    assert set((ROOT / "csrc/cuda/sources.txt").read_text().split()) < set(built.sources)
    assert ("GALORE_RRF_WITH_CUDA", None) in built.define_macros
    assert set(toolkit.libraries) < set(built.extra_link_args)


def test_cuda_without_a_toolkit_is_an_error(extension, monkeypatch):
    """Guards against a package for the CPU where CUDA was asked for, and a traceback as the message."""
    monkeypatch.setenv("GALORE_RRF_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(SystemExit, match=r"^GALORE_RRF_CUDA is 1, but .* (/nowhere/bin|without CUDA)$"):
        extension()


def test_other_overrides_are_refused(extension, monkeypatch):
    """Guards against GALORE_RRF_CUDA=off that builds with CUDA."""
    monkeypatch.setenv("GALORE_RRF_CUDA", "off")
    with pytest.raises(SystemExit, match=r"^Invalid GALORE_RRF_CUDA: off \(must be 0 or 1\)$"):
        extension()


@pytest.mark.parametrize(
    ("cuda", "script", "reason"),
    [
        (None, "", r"torch .* is without CUDA"),
        ("13.0", None, r"there is no nvcc in /\S+/bin"),
        (
            "13.0",
            "echo release 12.9, V12.9.86",
            r"/\S+/bin/nvcc is of CUDA 12\.9 and torch \S+ of CUDA 13\.0",
        ),
    ],
    ids=["torch", "nvcc", "version"],
)
def test_package_for_the_cpu_says_why(find_cuda, monkeypatch, tmp_path, cuda, script, reason):
    """Guards against CUDA that is missing without a word, and a compiler that does not fit torch's CUDA."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path) if script is None else fake_nvcc(tmp_path, script))
    none, sentence = find_cuda.find_cuda()
    assert none is None
    assert re.fullmatch(f"galore_rrf is compiled for the CPU only: {reason}", sentence)


def test_toolkit_is_found_behind_a_script(toolkit, find_cuda, monkeypatch, tmp_path):
    """Guards against /usr/local as the toolkit, because /usr/local/bin/nvcc calls it, and headers not found."""
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path, f'exec {toolkit.home}/bin/nvcc "$@"'))
    found, _ = find_cuda.find_cuda()
    assert found == toolkit
    assert any((Path(folder) / "cuda_runtime_api.h").exists() for folder in found.include_dirs[:1])


@pytest.mark.parametrize(
    ("asked", "compiled"),
    [("8.6", "sm_86"), ("8.0 12.0+PTX", "sm_80, sm_120, compute_120"), ("", "sm_80, sm_90, compute_90")],
    ids=["one", "list", "default"],
)
def test_architectures(toolkit, find_cuda, monkeypatch, asked, compiled):
    """Guards against TORCH_CUDA_ARCH_LIST unheeded, and against none to go by where no GPU can be asked."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, sentence = find_cuda.find_cuda()
    assert sentence == f"galore_rrf is compiled with CUDA {toolkit.version} for {compiled}"


def test_build_information_tells_of_cuda_where_compiled():
    """Guards against a device fixture that leaves CUDA out, or tests kernels that are not there."""
    info = galore_rrf.build_info()
    assert ("cuda" in info) == ("architectures" in info)
    if "cuda" in info:
        assert info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert re.fullmatch(r"((sm|compute)_\d+a? ?)+", info["architectures"])


NO_GPU = r"NVIDIA driver|No CUDA GPUs|no CUDA-capable device|not compiled with CUDA"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_operator_without_a_gpu_says_so():
    """Guards against a crash, or kernels that are looked for before the device."""
    with pytest.raises((RuntimeError, AssertionError), match=NO_GPU):
        galore_rrf.ops.gaussian_sketch(3, 4, seed=0, device="cuda")


@functools.cache
def build_library() -> tuple[Path, float]:
    start = time.monotonic()
    folder = build("library-cuda", GALORE_RRF_TESTS="OFF", GALORE_RRF_CUDA="1")
    return folder, time.monotonic() - start


@pytest.fixture
def library(toolkit, monkeypatch) -> Path:
    """Where the C++ library with CUDA is built, for what a machine without a GPU compiles for."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return build_library()[0]


@pytest.mark.slow
def test_library_has_code_for_every_architecture(library, toolkit, capsys):
    """Guards against a GPU that finds no kernel, and one that is newer than the package.

    Warnings were errors, and the library links with -Wl,--no-undefined.
    """
    with capsys.disabled():
        print(f"\nthe C++ library with CUDA: {build_library()[1]:.0f} s")
    triton = Path(torch.__file__).parent.parent / "triton/backends/nvidia/bin"  # torch brings it
    path = os.pathsep.join([f"{toolkit.home}/bin", os.environ["PATH"], str(triton)])
    cuobjdump = shutil.which("cuobjdump", path=path)
    listed = run(cuobjdump, "--list-elf", "--list-ptx", library / "libgalore_rrf.so")
    compiled = {name: listed.count(f".{name}") for name in ("sm_80.cubin", "sm_90.cubin", "sm_90.ptx")}
    sources = (ROOT / "csrc/cuda/sources.txt").read_text().split()
    assert set(compiled.values()) == {sum(name.endswith(".cu") for name in sources)}, compiled


@pytest.mark.slow
def test_library_loads_without_a_gpu(library, monkeypatch):
    """Guards against a library that only a machine with a GPU loads, a symbol missing, and a crash at an op."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    sketch = "torch.ops.galore_rrf.gaussian_sketch(7, 33, seed=5"
    load = f"import torch; torch.ops.load_library({str(library / 'libgalore_rrf.so')!r})"
    from_library = run(sys.executable, "-c", f"{load}; print({sketch}).tolist())")
    assert from_library.strip() == str(galore_rrf.ops.gaussian_sketch(7, 33, seed=5).tolist())
    with pytest.raises(pytest.fail.Exception, match=f"RuntimeError: .*({NO_GPU})"):
        run(sys.executable, "-c", f"{load}; {sketch}, device='cuda')")


@pytest.mark.slow
def test_another_project_uses_the_installed_library(library, tmp_path):
    """Guards against CUDA's libraries that a C++ program would have to find, and headers that it would need."""
    consumer = configure_consumer(library, tmp_path)
    run("cmake", "--build", consumer)
    run(consumer / "factor")
