# Everyday commands; `make help` lists them.  PYTHON, 3.11 or later, is what .venv is made with.
PYTHON ?= python3
PYTEST_ARGS ?=
PRETRAIN_ARGS ?=
MAX_JOBS ?= $(shell nproc)
export MAX_JOBS

# csrc/ops, a folder, is not made from csrc/ops.cpp.
MAKEFLAGS += --no-builtin-rules

VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# Stamps: what is newer than its stamp is installed or built again.
REQUIREMENTS := $(VENV)/requirements.stamp
INSTALLED := build/installed.stamp

CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/cuda/*.cuh csrc/cuda/*.cu \
	tests/cpp/*.h tests/cpp/*.cpp tests/kernels/*.h tests/kernels/*.cpp tests/kernels/*.cu \
	tests/kernels/*/*.h tests/kernels/*/*.cpp tests/queues/*.cpp examples/cpp/*.cpp)

.PHONY: help install test check pretrain bench gpu-build gpu-test gpu-bench lint format wheel clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv with all that is needed, build the extension, install the package (editable)

pretrain: $(INSTALLED)  ## pretrain a 60M Llama on the source text of Python's standard library, ten minutes
	python examples/pretrain_llama.py $(PRETRAIN_ARGS)

test: $(INSTALLED)  ## the everyday tests (PYTEST_ARGS="-k sketch -x" to choose)
	python -m pytest -m "not slow" $(PYTEST_ARGS)

check: $(INSTALLED)  ## all other tests: sanitizers, the C++ library without CUDA and with, long numerical runs
	python -m pytest -m slow $(PYTEST_ARGS)

bench: $(INSTALLED)  ## the benchmarks
	python -m benchmarks

lint: $(REQUIREMENTS)  ## check formatting, style and types
	clang-format --dry-run -Werror $(CPP)
	ruff check
	ruff format --check
	mypy

format: $(REQUIREMENTS)  ## put C++ and Python into the form that lint wants
	clang-format -i $(CPP)
	ruff check --fix-only
	ruff format

# On a machine with a GPU, offline, with nothing in PYTHON but torch and pytest, and a CUDA toolkit.
gpu-build:  ## on a GPU machine: build the extension in place with PYTHON's torch, for the GPU that is there
	GALORE_RRF_CUDA=1 NVCC_APPEND_FLAGS=-lineinfo $(PYTHON) setup.py --quiet egg_info build_ext --inplace

gpu-test:  ## then the tests on the GPU, plainly and under memcheck and racecheck
	$(PYTHON) scripts/gpu_test.py

gpu-bench:  ## and the benchmarks; numbers go to build/gpu-bench.json
	mkdir -p build
	$(PYTHON) -m benchmarks.gpu --seconds 480 --out build/gpu-bench.json

wheel: $(REQUIREMENTS)  ## build dist/*.whl for the torch of .venv
	rm -rf build/lib*
	python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:  ## remove all that was built; .venv stays
	rm -rf build dist *.egg-info galore_rrf/*.so .pytest_cache .mypy_cache .ruff_cache

$(REQUIREMENTS): $(wildcard requirements/*.txt)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet -r requirements/build.txt -r requirements/dev.txt -r requirements/train.txt
	python -m pip install --quiet --no-deps -r requirements/no-deps.txt
	# Headers only, so that their wheel's Requires-Python does not matter.
	python -m pip install --quiet --no-deps --ignore-requires-python --upgrade \
	    --target $(VENV)/catch2 -r requirements/headers.txt
	touch $@

# Folders are among the prerequisites, so that a removed source counts as a change too.
$(INSTALLED): $(REQUIREMENTS) setup.py cmake/find_cuda.py pyproject.toml $(shell find csrc)
	@python cmake/find_cuda.py >/dev/null  # which pip would not show
	python -m pip install --quiet --no-build-isolation --no-deps --editable .
	mkdir -p $(@D)
	touch $@
