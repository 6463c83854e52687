"""The vLLM that `make test-vllm` installs."""

import os

import pytest

from lsm_lightning.serving import Launch

VLLM_PYTHON = "LSM_LIGHTNING_VLLM_PYTHON"
"""An environment variable: the Python that has vLLM."""


def vllm_launch() -> Launch:
    """How it is started; skips the test where there is none."""
    python = os.environ.get(VLLM_PYTHON)
    if not python:
        pytest.skip(f"{VLLM_PYTHON} does not name a Python that has vLLM: run `make test-vllm`")
    return Launch(
        command=[python, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"],
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
    )
