"""What is looked at before a run: tokenizers, chat templates, contexts, and whether a teacher means what it says."""

from lsm_lightning.probing.probe import Probing, TaskProbe, probe_task

__all__ = ["Probing", "TaskProbe", "probe_task"]
