# `make` lists the targets. Each target makes all that it needs, also on an empty machine, and makes nothing twice.

TORCH      ?= 2.13.0
CUDA_TORCH ?= 2.14.1
PYTHON     ?= python3
GPU_PYTHON ?= $(PYTHON)
ARGS       ?=
ifeq ($(origin CXX),default)
CXX := c++
endif

# What is installed and built is in .venv and build; the name of each stamp says from what it was made.
python_version := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
build_settings := $(CURDIR) $(CXX) $(CXXFLAGS) $(CUDA_HOME) $(FORCE_CUDA) $(TORCH_CUDA_ARCH_LIST) $(STACKED_LSTM_EXT_WERROR) $(STACKED_LSTM_EXT_WATCHDOG)
build_key      := $(firstword $(shell echo '$(build_settings)' | cksum))
VENV       := .venv
READY      := $(VENV)/ready-python-$(python_version)-torch-$(TORCH)
BUILT      := build/built-python-$(python_version)-torch-$(TORCH)-$(build_key)
CUDA_READY := $(VENV)/ready-cuda-$(python_version)

sources := setup.py build_support.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
cpp     := $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
py      := $(VENV)/bin/python

export CXX
machine_path := $(PATH)
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# One worker for each core; a worker without tests left takes some from another. OpenMP's threads must not spin, since they share the cores.
in_parallel = OMP_WAIT_POLICY=passive $(py) -m pytest -n auto --dist worksteal --durations=10

.NOTPARALLEL:
.PHONY: help venv build test proof bench lint format sanitize nvcc cuda-check ptx cuda-link gpu clean distclean

help:  ## list the targets (the default)
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' $(MAKEFILE_LIST) | while read -r target text; do printf '  make %-10s %s\n' "$$target" "$$text"; done
	@echo
	@echo '  TORCH=$(TORCH)     the torch release in $(VENV); another one: make TORCH=2.14.1 test'
	@echo '  CUDA_TORCH=$(CUDA_TORCH)  the torch release for cuda-link'
	@echo '  PYTHON=$(PYTHON)   the Python that $(VENV) is made from (3.10 or newer)'
	@echo '  GPU_PYTHON=$(GPU_PYTHON)  the Python for gpu, with a CUDA build of torch'
	@echo '  ARGS=…           more arguments for pytest or benchmarks: make test ARGS="-k packed"'

venv: $(READY)  ## .venv with torch and the pinned tools

build: $(BUILT)  ## compile the extension and install the package, editable, into .venv

test: $(BUILT) lint  ## lint, then the tests of everything that the package does
	@$(in_parallel) --ignore=tests/proof $(ARGS)

# cuda-link builds for one architecture: cuda-check has compiled for all of them, and cuda-link only has to show that linking works.
proof: $(BUILT)  ## what proves the kernels, in half an hour: cuda-check, ptx, cuda-link, then tests/proof (emulator, sanitizers, mutants, builds)
	@$(MAKE) --no-print-directory ARGS= cuda-check ptx
	@TORCH_CUDA_ARCH_LIST=9.0a $(MAKE) --no-print-directory ARGS= cuda-link
	@$(in_parallel) tests/proof $(ARGS)

bench: $(BUILT)  ## the quick benchmark suite, then a short run of the character model
	@$(py) -m benchmarks --suite quick $(ARGS)
	@$(py) examples/char_lm.py --quick

lint: $(READY)  ## ruff, mypy and clang-format
	@$(py) -m ruff check --quiet .
	@$(py) -m mypy --no-error-summary
	@$(if $(cpp),clang-format --dry-run -Werror $(cpp))

format: $(READY)  ## let clang-format and ruff rewrite the sources
	@$(if $(cpp),clang-format -i $(cpp))
	@$(py) -m ruff check --fix --quiet .

sanitize: $(BUILT)  ## the CPU kernels under the address, undefined-behaviour and thread sanitizers
	@$(py) -m tests.sanitize $(ARGS)

nvcc: $(CUDA_READY)  ## the CUDA compiler and disassemblers from PyPI, into .venv (a build that needs a compiler does so itself)

cuda-check: $(CUDA_READY)  ## compile the CUDA kernels for every architecture; list and check registers, spills, instructions
	@$(py) -m tests.cuda_check $(ARGS)

ptx: $(CUDA_READY)  ## run the compiled CUDA kernels, as PTX, on the host: against float64, the emulator, and with mutants of the inline PTX
	@$(py) -m tests.ptx $(ARGS)
	@$(py) -m tests.ptx.mutants $(filter --all,$(ARGS))

cuda-link: $(READY)  ## build against a CUDA build of torch (CUDA_TORCH, in .venv-cuda), check its symbols, run tests there
	@$(py) -m tests.cuda_link --torch $(CUDA_TORCH) --python $(PYTHON) $(ARGS)

# With the torch of the machine; if it has none, with the torch of .venv (from PyPI, a CUDA build on Linux).
gpu:  ## on a GPU, in 8 minutes: build, test, sanitize and measure (ARGS=--first: the first 3 minutes); see benchmarks/results
	@export PATH='$(machine_path)'; \
	  if $(GPU_PYTHON) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then exec $(GPU_PYTHON) -m benchmarks.gpu $(ARGS); fi; \
	  $(MAKE) --no-print-directory venv && exec $(abspath $(py)) -m benchmarks.gpu $(ARGS)

clean:  ## remove what was built, keep .venv
	rm -rf build dist *.egg-info stacked_lstm_ext/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

distclean: clean  ## remove .venv and .venv-cuda too
	rm -rf $(VENV) .venv-cuda

# torch is installed by its exact release, in the same call of pip as everything else, so that pip never chooses a release.
$(READY): $(filter-out requirements/cuda.txt,$(wildcard requirements/*.txt))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' is $$($(PYTHON) -V 2>&1 || true); Python 3.10 or newer is needed: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' cannot make a virtual environment (no ensurepip); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test -e $(VENV)/bin/python$(python_version) || rm -rf $(VENV)
	@rm -f $(VENV)/ready-*
	@$(PYTHON) -m venv $(VENV)
	@$(py) -m pip install torch==$(TORCH) $(foreach file,$(sort $^),-r $(file))
	@touch $@

# nvcc and the disassemblers from PyPI, for any torch.
$(CUDA_READY): requirements/cuda.txt $(READY)
	@$(py) -m pip install -r $<
	@touch $@

$(BUILT): $(READY) $(sources)
	@echo 'int main() { return [](auto x) requires(sizeof(x) > 0) { return 0; }(1); }' | $(CXX) -std=c++20 -x c++ -fsyntax-only - 2>/dev/null || \
	  { echo "error: '$(CXX)' is no C++20 compiler (GCC 11 or newer is one); on Debian and Ubuntu: apt-get install g++; or name one: make CXX=g++-12 …" >&2; exit 1; }
	@$(py) -c 'import os, sys, sysconfig as s; p = s.get_path("include"); sys.exit(not os.path.exists(p + "/Python.h"))' || \
	  { echo "error: '$(PYTHON)' has no header files (Python.h); on Debian and Ubuntu: apt-get install python3-dev" >&2; exit 1; }
	@if $(py) build_support.py wants-compiler; then echo 'no nvcc here fits torch; one from PyPI does'; $(py) -m pip install -r requirements/cuda.txt; fi
	@mkdir -p build && rm -f build/built-*
	@touch build/started  # becomes the stamp: what is edited while the compiler runs is newer, and compiled next time
	@echo 'compiling (log: build/build.log)'
	@$(py) -m pip install --verbose --no-build-isolation --no-deps --editable . >build/build.log 2>&1 || \
	  { tail -n 80 build/build.log; echo 'error: the build failed; all of it is in build/build.log' >&2; exit 1; }
	@sed -n 's/^ *\(stacked_lstm_ext: .*\)/\1/p' build/build.log | sort -u
	@mv build/started $@
