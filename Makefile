# make demo · make test: both from an empty clone. Everything lives in .venv; nothing is installed elsewhere.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
DATA   ?=
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check format bench docs openapi clean

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## .venv with Potluck and its tools (again only when pyproject.toml changes)

# torch first and alone: TORCH=… chooses the build (a local wheel, another index), the rest then finds it satisfied.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Potluck needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade 'pip>=25.1' || { echo "pip cannot be upgraded: is a package index within reach?"; exit 1; }
	@echo "Installing $(TORCH): the big one, a few minutes the first time."
	@$(PIP) install '$(TORCH)'
	@echo "Installing Potluck and its tools."
	@$(PIP) install -e '.[all]' --group dev
	@touch $@

demo: setup  ## a hub, three unequal workers, a GAN on real pictures: about three minutes. DATA=… for other pictures
	@$(BIN)/python scripts/demo.py $(if $(DATA),--data '$(DATA)')

test: setup  ## the tests, without the slow ones
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

test-all: setup  ## all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: setup  ## style, types, the map of imports
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo > .import-linter.log 2>&1 || { cat .import-linter.log; exit 1; }
	@rm -f .import-linter.log
	@echo "check: all is well"

format: setup  ## put the code into shape
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

bench: setup  ## every benchmark, one table each
	@for script in benchmarks/ledger.py benchmarks/placement.py benchmarks/jobs.py benchmarks/gang.py benchmarks/pool.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: setup  ## check that the docs name only commands and settings that exist
	@$(BIN)/python -m pytest tests/test_ratchets.py -k docs

openapi: setup  ## write docs/openapi.json anew, after a change of the API
	@$(BIN)/python tests/hub/test_openapi.py

clean:  ## remove .venv and what tools leave behind
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .import-linter.log
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
