"""Lightning's checkpointing, kept from overwriting a good state with a ruined one."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import proxy

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.api import CheckpointException

from lsm_lightning.callbacks import atomic
from lsm_lightning.callbacks.signals import StopSignals
from lsm_lightning.checkpoints import load, point
from lsm_lightning.errors import CheckpointError, ConfigurationError, TrainingDivergedError
from lsm_lightning.processes import gather


class Checkpoint(ModelCheckpoint):
    """`ModelCheckpoint` whose files are whole at every instant, and that saves where a signal stops the run.

    A kill at any moment leaves the previous checkpoint. A save that fails fails on all processes, and what training
    has ruined is not saved.
    """

    folder: Path | None = None
    """Of the run, where it is noted where the last checkpoint lies; the command line sets it."""
    _training = False
    _pointed: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write straight to the disk, where the user has not chosen another way.

        Raises:
            ConfigurationError: Several checkpoints would have one name.
        """
        super().setup(trainer, pl_module, stage)
        if self.save_top_k and self.filename == "last":
            raise ConfigurationError(
                f"checkpoint.save_top_k={self.save_top_k} keeps several checkpoints, and filename=last gives them one "
                "name: add --checkpoint.filename '{step}'."
            )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = PlainFiles()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Now the state is whole: before, a checkpoint may have been restored by half.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        super().on_train_start(trainer, pl_module)
        if self.dirpath and _is_local_file_protocol(self.dirpath):
            folder = Path(self.dirpath)
            _together(folder, lambda: _check_writable(folder) if trainer.is_global_zero else None)
        self._training = True
        _end_of_step(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if it is time; then the step is over, as Lightning calls checkpoint callbacks last."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        _end_of_step(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step too, whatever `every_n_train_steps` says."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        _end_of_step(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where training broke off, unless its state is ruined, or other processes would have to help.

        Of several processes one may be alone with its exception, if they have not agreed on it.
        """
        half_updated = getattr(pl_module, "half_updated", False)
        ruined = half_updated or isinstance(exception, TrainingDivergedError | CheckpointError)
        alone = trainer.world_size > 1 and not getattr(exception, "agreed", False)
        if ruined or alone or not self._training or not self._should_save_on_exception(trainer):
            return
        if self.save_last is True:  # Lightning would save twice
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        else:
            super().on_exception(trainer, pl_module, exception)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Through here go all saves, on all processes."""
        if not _is_local_file_protocol(filepath):  # object stores show what is complete, and nothing else
            super()._save_checkpoint(trainer, filepath)
            return
        place = Path(filepath)
        first = trainer.is_global_zero
        with trainer.profiler.profile("save_checkpoint"):  # type: ignore[attr-defined]
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
            _together(place, lambda: _prepare(place) if first else None)
            _together(place, lambda: trainer.strategy.save_checkpoint(checkpoint, atomic.partial(place)))
            _together(place, lambda: self._publish(place) if first else None)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        for logger in trainer.loggers if first else ():
            logger.after_save_checkpoint(proxy(self))

    def _publish(self, place: Path) -> None:
        atomic.publish(place)
        if self.folder is not None and self._pointed != place:
            point(self.folder, place)
            self._pointed = place

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """For `save_last: link`."""
        if os.path.abspath(filepath) != os.path.abspath(linkpath):
            link, target = Path(linkpath), Path(filepath)
            _together(link, lambda: atomic.point(link, target) if trainer.is_global_zero else None)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if not _is_local_file_protocol(filepath):
            super()._remove_checkpoint(trainer, filepath)
        elif trainer.is_global_zero:
            atomic.remove(Path(filepath))


class PlainFiles(TorchCheckpointIO):
    """Reads and writes single files without a copy in memory and one in the system's folder of temporary files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: The disk is full, or the file cannot be written.
        """
        with open(path, "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read one, be it a file or the folder of a sharded checkpoint.

        Raises:
            ConfigurationError: It is damaged.
        """
        if not _is_local_file_protocol(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return load(Path(path), weights_only=weights_only)


def _end_of_step(trainer: Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StopSignals):
            callback.end_of_step(trainer)


def _check_writable(folder: Path) -> None:
    """Learn it now, and not after the first hours."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.write_bytes(b"")
    probe.unlink()


def _prepare(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    atomic.clear(place)


def _together(place: Path, work: Callable[[], None]) -> None:
    """Do a part of a save; where it fails on one process, it fails on all, so that none waits for another.

    Raises:
        CheckpointError: It failed.
    """
    failure = ""
    try:
        work()
    except (OSError, RuntimeError, CheckpointException) as error:
        failure = _cause(error)
    if failed := next(filter(None, gather(failure)), ""):
        raise CheckpointError(
            f"Cannot save {place}: {failed}. What was saved there before is as it was; make room "
            "or set checkpoint.dirpath to another folder, and go on with --ckpt_path."
        )


def _cause(error: BaseException) -> str:
    """The innermost reason, in a line."""
    if isinstance(error, CheckpointException):
        failures: Mapping[int, tuple[BaseException, Any]] = error.failures
        error = next(iter(failures.values()))[0]
        if isinstance(error, KeyboardInterrupt):
            raise error
    while not isinstance(error, OSError) and (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return " ".join(str(error).split()) or type(error).__name__
