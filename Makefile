# Every target makes .venv and installs what it needs when it is missing, or when
# pyproject.toml or constraints.txt is newer than the last installation.

# The first Python >= 3.11 that runs and can make a virtual environment. Choose another: make test PYTHON=python3.13
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo "$$python"; break; }; done)

# What pip is asked for as torch. From PyPI, on Linux, that is the build with CUDA; another build:
# make test TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0

# Processes that share the test files, each of which computes with one thread and takes up to a few GiB.
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed

# What `make locked` installs: torch for CPUs by default. With CUDA, and on macOS:
# make locked LOCKS='requirements-cuda.lock requirements.lock'
# make locked LOCKS=requirements.lock
LOCKS ?= requirements-cpu.lock requirements.lock

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# DeepSpeed's kernels are compiled where one is used; none is here.
export DS_BUILD_OPS := 0

HAS_PYTHON = [ -n "$(PYTHON)" ] || { echo "make: no Python >= 3.11 with venv found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }

# A .venv whose Python no longer runs (the interpreter was removed, the folder was moved) is made anew.
ifneq ($(shell $(BIN)/python -c '' >/dev/null 2>&1 && echo runs),runs)
.PHONY: $(INSTALLED)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast check bench clean locked

help:
	@echo "make demo       prepare real clips, train the tiny model on them, sample it: a minute or two on two cores"
	@echo "make test       make check, and every test but the slow ones"
	@echo "make test-fast  the tests that take seconds"
	@echo "make check      ruff, mypy, import-linter, licences"
	@echo "make bench      the slow tests and the measurements in benchmarks/"
	@echo "make locked     .venv anew, every file that is installed checked against requirements.lock; for releases and CI"
	@echo "make clean      remove caches and build outputs; .venv and runs stay"

demo: $(INSTALLED)
	$(BIN)/longtake demo --out demo

test: check
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=30 -m "not slow"

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not long"

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_licences.py

# pytest's status 5 says that no test carries the marker, which is no failure.
bench: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --timeout=3600 || [ $$? -eq 5 ]
	set -e; for script in benchmarks/*.py; do \
		if [ -e "$$script" ]; then echo "$$script"; $(BIN)/python "$$script"; fi; done

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} +

# What is installed already is not checked, so .venv is made anew. What builds from source comes first: pip does not
# check what it downloads for a build in isolation. The stamp has the other targets take the result as it is.
locked:
	@$(HAS_PYTHON)
	"$(PYTHON)" -m venv --clear .venv
	$(BIN)/python -m pip install --require-hashes -r requirements-build.lock
	$(BIN)/python -m pip install --require-hashes --no-build-isolation $(LOCKS:%=-r %)
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $(INSTALLED)

# The stamp is written last, so an interrupted installation is taken up again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(BIN)/python -c '' 2>/dev/null || { \
		$(HAS_PYTHON); \
		echo "making .venv with $(PYTHON)"; "$(PYTHON)" -m venv --clear .venv; }
	$(BIN)/python -m pip install -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
