# Everything from a fresh checkout, with Python and pip alone: `make demo`, `make test`.
# Another interpreter or place: make demo PYTHON=python3.12 VENV=/scratch/me/venv
# Some tests only:              make test ARGS="tests/config -k schema"
# More of them at a time:       make test JOBS=4 (files are spread over the processes)

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2
BENCH ?= preprocess train scaling loop_overhead checkpoint_stall slow_link

BIN := $(VENV)/bin
# Written last by a complete installation; older than the files below, it is done again.
STAMP := $(VENV)/.vectorlm-installed
HAS_PIP := $(BIN)/python -m pip --version >/dev/null 2>&1

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format docs bench clean

help:
	@echo "make demo     train a tiny model from end to end, on this machine, in a minute or two"
	@echo "make test     the whole test-suite, offline; ARGS are passed to pytest"
	@echo "make lint     formatting, types, import contracts, generated references"
	@echo "make format   put the code into shape"
	@echo "make docs     write the generated references and job scripts again"
	@echo "make bench    all benchmarks, on a quiet machine, about an hour; BENCH=train is one, ARGS=--write updates docs"
	@echo "              BENCH=gpu needs an NVIDIA GPU and ten minutes, and is not among all"
	@echo "make venv     the virtual environment alone, in $(VENV)"
	@echo "make clean    remove caches and the demo's files; the virtual environment stays"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py
	@command -v $(PYTHON) >/dev/null || \
	  { echo "There is no '$(PYTHON)' here. Name a Python >= 3.10: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "VectorLM needs Python >= 3.10, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
	    "Name a newer one: make PYTHON=python3.11" >&2; exit 1; }
	@$(HAS_PIP) || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "'$(PYTHON)' cannot make virtual environments (no ensurepip). On Debian and Ubuntu install" \
	    "python3-venv, or name another Python: make PYTHON=..." >&2; exit 1; }
	@$(HAS_PIP) || { echo "Making the virtual environment $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	@echo "Installing VectorLM and the versions it is tested with into $(VENV) (a few minutes, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m vectorlm.demo

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=10 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m vectorlm.config.reference --check
	$(BIN)/python -m vectorlm.cluster.script --check

format: $(STAMP)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python -m vectorlm.config.reference
	$(BIN)/python -m vectorlm.cluster.script

bench: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@for name in $(BENCH); do $(BIN)/python benchmarks/$$name.py $(ARGS) || exit; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache runs/demo
	find . -name __pycache__ -not -path '*/.venv/*' -prune -exec rm -rf {} +
