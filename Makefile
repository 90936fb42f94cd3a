# One entry for everything. A fresh machine needs Python 3.11 or newer and make; the first call builds .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input

# `make demo RECIPE=rocketqav2 OUT=runs/mine`. A run never writes over an earlier one: without OUT it is the first
# runs/demo-N that is free.
RECIPE ?= duet
OUT ?=
# `make test ARGS="tests/unit/losses -k ar2"`
ARGS ?=
# Processes that share the tests, a file at a time; `make test WORKERS=0` runs them in one.
WORKERS ?= auto
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile

# Idle OpenMP threads sleep instead of spinning: torch, faiss and NumPy each bring a pool of their own.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test test-long test-quick check lint types imports reference docs docs-serve bench env clean distclean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:  ## list these targets
	@awk -F':.*##  *' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.run  ## train a real pair on real data: RECIPE=duet | ar2 | rocketqav2 | separate | frozen-teacher, OUT=FOLDER
	$(BIN)/sparring demo --recipe $(RECIPE) $(if $(OUT),--out $(OUT))

test: $(VENV)/.test  ## all tests but the long ones
	$(PYTEST) $(ARGS)

test-long: $(VENV)/.dev  ## all tests, also those that take minutes: every kill and refused write, servers, clusters, launchers, benchmarks
	$(PYTEST) --long $(ARGS)

test-quick: $(VENV)/.test  ## tests that neither train a real pair nor start processes
	$(PYTEST) -m "not slow" $(ARGS)

check: lint types imports test docs  ## everything that has to pass before a change is merged

lint: $(VENV)/.dev  ## ruff
	$(BIN)/ruff check .

types: $(VENV)/.dev  ## mypy
	$(BIN)/mypy

imports: $(VENV)/.dev  ## who may import whom
	$(BIN)/lint-imports --no-logo

reference: $(VENV)/.dev  ## rewrite the tables of docs/config.md and docs/cli.md from the code
	$(BIN)/python docs/reference.py

docs: $(VENV)/.dev  ## build the documentation into site/; warnings are errors
	$(BIN)/mkdocs build --quiet --strict

docs-serve: $(VENV)/.dev  ## the documentation on this machine, rebuilt as it is edited
	$(BIN)/mkdocs serve

bench: $(VENV)/.test  ## every goal of speed against the other ways, about half an hour: ARGS="--quick" for a toy
	$(BIN)/python benchmarks/speed.py $(ARGS)

env: $(VENV)/.dev  ## only build the environment, with the development tools
	@echo "$(BIN)/python is ready"

clean:  ## remove what was built; runs/ and the environment stay
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache src/*.egg-info
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the environment too
	rm -rf $(VENV)

# --- the environment: a stamp a set of packages, stale once pyproject.toml or constraints.txt is newer ---

$(VENV)/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	@echo "environment: $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "environment: torch, alone and pinned, so that nothing else decides which build of it is taken"
	@$(PIP) install -c constraints.txt torch
	@echo "environment: sparring and what it needs"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "environment: pytest"
	@$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run  # the test tools are among these
	@echo "environment: development tools"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.test $@
