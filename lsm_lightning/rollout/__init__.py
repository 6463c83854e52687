"""Rollouts: engines that write answers (chosen in YAML by `class_path`), and the loop that plays episodes."""

from lsm_lightning.rollout.base import Engine, Sampling
from lsm_lightning.rollout.local import LocalEngine
from lsm_lightning.rollout.vllm import VLLMEngine

__all__ = ["Engine", "LocalEngine", "Sampling", "VLLMEngine"]
