"""What people watch, over all processes."""

from lsm_lightning.metrics.means import global_means
from lsm_lightning.metrics.success import SuccessRate

__all__ = ["SuccessRate", "global_means"]
