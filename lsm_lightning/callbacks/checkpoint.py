"""Lightning's checkpointing, kept from overwriting a good state with a ruined one."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lsm_lightning.errors import TrainingDivergedError


class Checkpoint(ModelCheckpoint):
    """`ModelCheckpoint` that saves nothing when training has diverged."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save on any other exception, Ctrl-C included."""
        if not isinstance(exception, TrainingDivergedError):
            super().on_exception(trainer, pl_module, exception)
