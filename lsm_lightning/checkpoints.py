"""Checkpoints on disk, files and sharded ones: which is the newest, whether one is whole, and its contents."""

import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lsm_lightning.errors import ConfigurationError

EXTRA = "meta.pt"
"""Where a sharded checkpoint keeps what is no tensor."""
POINTER = "last_checkpoint"
"""A file in a run's folder that tells where its last checkpoint lies, as loggers and settings may put it anywhere."""
STUDENT = "student."
"""Prefix of the student's weights in the state dict of the Lightning module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What one checkpoint holds, the optimiser's state left out."""

    weights: Mapping[str, Tensor]
    """The student's, under the names of its own modules, on the CPU in the dtype of the checkpoint."""
    state: Mapping[str, Any]
    """All that is no tensor of model or optimiser: `global_step`, `student`, `callbacks` ..."""


def newest(folder: Path) -> Path | None:
    """The youngest checkpoint of the runs of a folder: the one it points to, or a `last.ckpt` in the usual places."""
    runs = ("", "checkpoints/", "version_*/checkpoints/", "lightning_logs/version_*/checkpoints/")
    found = [path for run in runs for path in folder.glob(f"{run}last.ckpt") if path.exists()]
    if (pointer := folder / POINTER).is_file() and (pointed := folder / pointer.read_text().strip()).exists():
        found.append(pointed)
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def point(folder: Path, checkpoint: Path) -> None:
    """Note in a run's folder where its last checkpoint lies: within the folder a relative path, so that it may move.

    Raises:
        OSError: It cannot be written.
    """
    place, folder = checkpoint.absolute(), folder.absolute()
    text = str(place.relative_to(folder) if place.is_relative_to(folder) else place)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".{POINTER}"
    fresh.write_text(f"{text}\n")
    fresh.replace(folder / POINTER)


def is_sharded(path: Path) -> bool:
    """Whether a folder looks like a sharded checkpoint, be it whole or not."""
    return path.is_dir() and any((*path.glob("*.distcp"), *path.glob(".metadata"), *path.glob(EXTRA)))


def check(path: Path, every_byte: bool = True) -> None:
    """Look at a checkpoint without loading it: is it one, and is it all there?

    Args:
        path: A file, or the folder of a sharded checkpoint.
        every_byte: Read a file once against its checksums, which torch writes and does not look at. Shards have none.

    Raises:
        ConfigurationError: It is missing, something else, cut off or damaged.
    """
    if not path.exists():
        raise ConfigurationError(f"There is no checkpoint '{path}'.")
    if path.is_dir():
        _check_shards(path)
        return
    if not zipfile.is_zipfile(path):
        raise ConfigurationError(f"'{path}' is not a checkpoint, or was cut off while it was written.")
    if every_byte:
        try:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
        except (zipfile.BadZipFile, OSError) as error:
            damaged = str(error)
        if damaged:
            raise ConfigurationError(f"The checkpoint '{path}' is damaged: {damaged}")


def load(path: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """A checkpoint as one process restores it, on the CPU; a sharded one is put together.

    Raises:
        ConfigurationError: It is damaged.
    """
    try:
        if path.is_dir():
            return _joined(_load_distributed_checkpoint(path))
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except _DAMAGE as error:
        raise ConfigurationError(f"The checkpoint '{path}' is damaged: {_reason(error)}") from error


def read(path: Path) -> Checkpoint:
    """The student and the run's state; a sharded checkpoint needs no process group and no second process.

    Raises:
        ConfigurationError: The checkpoint is damaged, or is not one of this package.
    """
    check(path, every_byte=False)
    with _told(path):
        state, weights = _read_shards(path) if path.is_dir() else _read_file(path)
    if not weights or "global_step" not in state:
        raise ConfigurationError(f"'{path}' is not a checkpoint of a run of this package: it holds no student.")
    return Checkpoint(weights=weights, state=state)


def read_state(path: Path) -> Mapping[str, Any]:
    """All that is no tensor of model or optimiser, which takes no time.

    Raises:
        ConfigurationError: The checkpoint is damaged, or is not one of this package.
    """
    with _told(path):
        state = _read_extra(path) if path.is_dir() else _read_file(path)[0]
    if "global_step" not in state:
        raise ConfigurationError(f"'{path}' is not a checkpoint of a run of this package: it holds no student.")
    return state


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Damage as a `ConfigurationError`."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ConfigurationError(
            f"The checkpoint '{path}' is damaged, or a callback, scheduler or optimiser has put more than tensors and "
            f"plain values into it, which are not read here since that could run code ({_reason(error)})."
        ) from error
    except _DAMAGE as error:
        raise ConfigurationError(f"The checkpoint '{path}' is damaged: {_reason(error)}") from error


_DAMAGE = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, CheckpointException)
"""What torch raises; the last, on damaged shards, is a BaseException of its own."""


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    # Mapped into memory, so that the optimiser's state, twice the weights, is never read.
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(state, dict):
        return {}, {}
    weights = state.pop("state_dict", {})
    return state, {name.removeprefix(STUDENT): value for name, value in weights.items() if name.startswith(STUDENT)}


def _read_extra(folder: Path) -> dict[str, Any]:
    return torch.load(folder / EXTRA, map_location="cpu", weights_only=True)


def _read_shards(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state = _read_extra(folder)
    prefix = f"state_dict.{STUDENT}"
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        state_dict_loader.load(weights, checkpoint_id=folder, no_dist=True)
    return state, {name.removeprefix(prefix): value for name, value in weights.items()}


def _reason(error: BaseException) -> str:
    """The innermost of what torch tells on several lines."""
    if isinstance(error, CheckpointException):
        return _reason(next(iter(error.failures.values()))[0])
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return next(iter(text.splitlines()), type(error).__name__)


def _check_shards(folder: Path) -> None:
    """Every file that the index names must be there and long enough."""
    for name in (".metadata", EXTRA):
        if not (folder / name).is_file():
            raise ConfigurationError(f"'{folder}' is no sharded checkpoint, or incomplete: no '{name}'.")
    if not zipfile.is_zipfile(folder / EXTRA):
        raise ConfigurationError(f"'{folder / EXTRA}' was cut off while it was written.")
    try:
        pieces: Iterable[Any] = FileSystemReader(folder).read_metadata().storage_data.values()
    except (OSError, EOFError, AttributeError, IndexError, pickle.UnpicklingError) as error:
        raise ConfigurationError(f"'{folder / '.metadata'}' is damaged.") from error
    ends: dict[str, int] = {}
    for piece in pieces:
        ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in ends.items():
        shard = folder / name
        if not shard.is_file():
            raise ConfigurationError(f"The sharded checkpoint '{folder}' lacks its file '{name}'.")
        if shard.stat().st_size < end:
            raise ConfigurationError(
                f"'{shard}' was cut off while it was written: {shard.stat().st_size} of {end} bytes."
            )


def _joined(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Optimiser states as a list, as single files have them."""
    states: list[dict[str, Any]] = []
    while (state := checkpoint.pop(f"optimizer_{len(states)}", None)) is not None:
        states.append(state)
    return {**checkpoint, "optimizer_states": states}
