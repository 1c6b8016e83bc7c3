# Every target sets up what it needs in $(VENV); stamps there keep a second run short.
VENV ?= .venv
BASE_PYTHON ?= python3
JOBS ?= $(shell nproc)
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
FUZZ_SECONDS ?= 60
# Python tests at a time, each with threads of its own.
TEST_JOBS ?= 2

PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check
BUILD_TOOLS := pip cmake ninja scikit-build-core pybind11 nlohmann-json
SOURCES := CMakeLists.txt pyproject.toml README.md \
  $(shell find src third_party -type f -not -path '*/__pycache__/*' -not -name '*.so')
CPP_SOURCES = $(shell find src/cpp tests/cpp tests/fuzz -name '*.h' -o -name '*.cpp')

export BASE_PYTHON
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
# The venv's cmake, ninja, ctest and python come first.
export PATH := $(abspath $(VENV))/bin:$(PATH)

# C++ tests before Python tests, also under make -j: the closing line is pytest's.
.NOTPARALLEL:
.PHONY: help .venv build demo demo-check test test-cpp test-py docs lint format asan tsan fuzz numa wheel clean

help:  ## list the targets
	@grep -hE '^[.a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([^:]+):.*## /\1\t/' | expand -t 14

.venv: $(VENV)/.deps  ## the virtual environment with everything constraints.txt pins

$(VENV)/.created:
	.ci/require.sh python
	$(BASE_PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch goes first and alone: its wheel decides between CPU and CUDA, and nothing later may change it. With CUDA
# it brings the Triton it was made for; without, the tests take one for its interpreter.
$(VENV)/.deps: $(VENV)/.created constraints.txt pyproject.toml
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet -c constraints.txt $(BUILD_TOOLS)
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --only-deps '.[dev]'
	$(PYTHON) -c 'import triton' 2>/dev/null || $(PIP) install --quiet $(TRITON)
	@touch $@

build: $(VENV)/.installed  ## build kt_moe and install it in the virtual environment

$(VENV)/.installed: $(VENV)/.deps $(SOURCES)
	.ci/require.sh compiler headers
	$(PIP) install --quiet --no-deps --no-build-isolation --force-reinstall .
	@touch $@

demo: build  ## fine-tune the example model on real text
	$(PYTHON) examples/demo.py

demo-check: build  ## the demo's run again in plain transformers + PEFT: losses must agree
	$(PYTHON) examples/check_against_peft.py

test: test-cpp test-py  ## all tests, C++ first

test-cpp: $(VENV)/.deps  ## C++ tests
	.ci/require.sh compiler doctest
	cmake --preset dev
	cmake --build --preset dev
	ctest --preset dev

test-py: build
	$(PYTHON) -m pytest -n $(TEST_JOBS)

$(VENV)/.docs: $(VENV)/.deps
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --only-deps '.[docs]'
	@touch $@

docs: build $(VENV)/.docs  ## the documentation as a site in build/site: runs the tutorial, checks all links
	$(PYTHON) docs/plots.py
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

lint: $(VENV)/.deps  ## ruff, clang-format and mypy, changing nothing
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	clang-format --dry-run -Werror $(CPP_SOURCES)
	$(PYTHON) -m mypy

format: $(VENV)/.deps  ## let ruff and clang-format rewrite the sources
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format
	clang-format -i $(CPP_SOURCES)

asan: $(VENV)/.deps  ## C++ tests under the address and undefined-behaviour sanitizers
	.ci/require.sh compiler doctest
	cmake --preset asan
	cmake --build --preset asan
	ctest --preset asan

# gcc 12's thread sanitizer cannot map its shadow under wide address-space randomisation: setarch -R.
tsan: $(VENV)/.deps  ## C++ tests under the thread sanitizer
	.ci/require.sh compiler doctest
	cmake --preset tsan
	cmake --build --preset tsan
	setarch -R ctest --preset tsan

numa: build  ## tests on emulated machines with several memory nodes; ten minutes
	.ci/require.sh compiler doctest qemu
	cmake --preset dev
	cmake --build --preset dev
	.ci/numa.sh $(VENV)

# New inputs go to build/fuzz/corpus, one that fails to build/fuzz.
fuzz: $(VENV)/.deps  ## the core built by clang++, and fuzz targets, each for FUZZ_SECONDS (60)
	.ci/require.sh clang
	cmake --preset fuzz
	cmake --build --preset fuzz
	for target in headers experts; do \
	  mkdir -p build/fuzz/corpus/$$target && \
	  build/fuzz/tests/fuzz/fuzz_$$target -max_total_time=$(FUZZ_SECONDS) -timeout=10 -print_final_stats=1 \
	    -artifact_prefix=build/fuzz/$$target- build/fuzz/corpus/$$target tests/fuzz/corpus/$$target || exit 1; \
	done

wheel: $(VENV)/.deps  ## a wheel for this Python in dist/
	.ci/require.sh compiler headers
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove the build and the virtual environment
	rm -rf build dist out $(VENV)
