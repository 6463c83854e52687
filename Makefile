# Two commands on a fresh machine: `make quickstart` and `make test`. Both create .venv and install what they need.
# More arguments for the run: make quickstart ARGS="--seed_everything 1".
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: help quickstart test test-slow lint clean

help:
	@echo "make quickstart   distil the embedded student on math and ALFWorld (minutes on two CPU cores)"
	@echo "make test         lint, type checks and tests"
	@echo "make test-slow    the tests that take minutes"
	@echo "make lint         lint and type checks only"
	@echo "make clean        remove .venv and caches; runs/ stays"

quickstart: .venv/quickstart-installed
	$(PY) -m lsm_lightning fit --config configs/quickstart.yaml $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest

test-slow: .venv/dev-installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow

lint: .venv/dev-installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/quickstart-installed: pyproject.toml | .venv/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[alfworld]"
	@touch $@

.venv/dev-installed: pyproject.toml | .venv/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[alfworld,dev]"
	@touch $@ .venv/quickstart-installed

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build *.egg-info
