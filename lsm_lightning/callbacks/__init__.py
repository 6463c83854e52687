"""Lightning callbacks: what people look at while and after a run."""

from lsm_lightning.callbacks.checkpoint import Checkpoint
from lsm_lightning.callbacks.progress import ProgressLine
from lsm_lightning.callbacks.signals import Stopped, StopSignals
from lsm_lightning.callbacks.summary import RunSummary
from lsm_lightning.callbacks.timeline import Timeline

__all__ = ["Checkpoint", "ProgressLine", "RunSummary", "StopSignals", "Stopped", "Timeline"]
