"""Objectives, chosen in YAML by `class_path`."""

from lsm_lightning.objectives.base import Loss, Objective, Positions
from lsm_lightning.objectives.full import FullVocabulary
from lsm_lightning.objectives.lsm import LocalSupportMatching
from lsm_lightning.objectives.sampled import SampledToken

__all__ = ["FullVocabulary", "LocalSupportMatching", "Loss", "Objective", "Positions", "SampledToken"]
