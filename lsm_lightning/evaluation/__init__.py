"""How good a player is on a task's test split."""

from lsm_lightning.evaluation.evaluate import evaluate
from lsm_lightning.evaluation.intervals import wilson_interval

__all__ = ["evaluate", "wilson_interval"]
