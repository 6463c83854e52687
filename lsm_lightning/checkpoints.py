"""Checkpoints on disk: which one is the newest, whether one is whole, and its contents."""

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from lsm_lightning.errors import ConfigurationError

EXTRA = "meta.pt"
"""Where a sharded checkpoint keeps what is no tensor."""


def newest(folder: Path) -> Path | None:
    """The youngest `last.ckpt` of the runs that log into a folder, or that lies in it."""
    runs = ("", "checkpoints/", "version_*/checkpoints/", "lightning_logs/version_*/checkpoints/")
    found = [path for run in runs for path in folder.glob(f"{run}last.ckpt") if path.exists()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def check(path: Path, every_byte: bool = True) -> None:
    """Look at a checkpoint without loading it: is it one, and is it all there?

    Args:
        path: A file, or the folder of a sharded checkpoint.
        every_byte: Read a file once against its checksums, which torch writes and does not look at. Shards have none.

    Raises:
        ConfigurationError: It is missing, something else, cut off or damaged.
    """
    if not path.exists():
        raise ConfigurationError(f"--ckpt_path: there is no checkpoint '{path}'.")
    if path.is_dir():
        _check_shards(path)
        return
    if not zipfile.is_zipfile(path):
        raise ConfigurationError(f"--ckpt_path: '{path}' is not a checkpoint, or was cut off while it was written.")
    if every_byte:
        try:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
        except (zipfile.BadZipFile, OSError) as error:
            damaged = str(error)
        if damaged:
            raise ConfigurationError(f"--ckpt_path: '{path}' is damaged: {damaged}")


def load(path: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """A checkpoint as one process restores it, on the CPU; a sharded one is put together.

    Raises:
        ConfigurationError: It is damaged.
    """
    try:
        if path.is_dir():
            return _joined(_load_distributed_checkpoint(path))
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    # What torch raises on damaged shards is a BaseException of its own.
    except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError, CheckpointException) as error:
        raise ConfigurationError(f"The checkpoint '{path}' is damaged: {' '.join(str(error).split())[:200]}") from error


def _check_shards(folder: Path) -> None:
    """Every file that the index names must be there and long enough."""
    for name in (".metadata", EXTRA):
        if not (folder / name).is_file():
            raise ConfigurationError(f"--ckpt_path: '{folder}' is no sharded checkpoint, or incomplete: no '{name}'.")
    if not zipfile.is_zipfile(folder / EXTRA):
        raise ConfigurationError(f"--ckpt_path: '{folder / EXTRA}' was cut off while it was written.")
    try:
        pieces: Iterable[Any] = FileSystemReader(folder).read_metadata().storage_data.values()
    except (OSError, EOFError, AttributeError, IndexError, pickle.UnpicklingError) as error:
        raise ConfigurationError(f"--ckpt_path: '{folder / '.metadata'}' is damaged.") from error
    ends: dict[str, int] = {}
    for piece in pieces:
        ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in ends.items():
        shard = folder / name
        if not shard.is_file():
            raise ConfigurationError(f"--ckpt_path: the sharded checkpoint '{folder}' lacks its file '{name}'.")
        if shard.stat().st_size < end:
            raise ConfigurationError(
                f"--ckpt_path: '{shard}' was cut off while it was written: {shard.stat().st_size} of {end} bytes."
            )


def _joined(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Optimiser states as a list, with numbers for names, as an optimiser knows its parameters."""
    states: list[dict[str, Any]] = []
    while (state := checkpoint.pop(f"optimizer_{len(states)}", None)) is not None:
        names = [name for group in state["param_groups"] for name in group["params"]]
        numbers = {name: number for number, name in enumerate(names)}
        groups = [{**g, "params": [numbers[name] for name in g["params"]]} for g in state["param_groups"]]
        states.append({"state": {numbers[n]: value for n, value in state["state"].items()}, "param_groups": groups})
    return {**checkpoint, "optimizer_states": states}
