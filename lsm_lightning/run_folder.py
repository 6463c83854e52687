"""What a run has left behind: its checkpoint, settings and summary, found and read without starting anything."""

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lsm_lightning.errors import ConfigurationError

STUDENT = "student."
"""Prefix of the student's weights in the state dict of the Lightning module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """Where the parts of a run lie."""

    checkpoint: Path
    """A file, or a folder of a sharded checkpoint."""
    config: Path
    summary: Path
    """Written at the end of a run only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What one checkpoint holds, the optimiser's state left out."""

    weights: Mapping[str, Tensor]
    """The student's, under the names of its own modules, on the CPU in the dtype of the checkpoint."""
    state: Mapping[str, Any]
    """All that is no tensor of model or optimiser: `global_step`, `student`, `callbacks` ..."""


# ---- finding --------------------------------------------------------------------------------------------------------


def find_run(path: Path, config: Path | None = None) -> RunFolder:
    """Find checkpoint and settings.

    Args:
        path: A run's folder, of which the newest version is taken; one version's folder; or a checkpoint.
        config: The settings, where they do not lie in the version's folder.

    Raises:
        ConfigurationError: There is no run, no checkpoint or no file of settings there.
    """
    path = path.expanduser()
    if not path.exists():
        raise ConfigurationError(f"There is no '{path}': give a run's folder, one of its versions or a checkpoint.")
    if path.is_file() or path.suffix == ".ckpt" or _is_sharded(path):
        config = config or _config_above(path)
        return RunFolder(checkpoint=path, config=config, summary=config.parent / "summary.json")
    folder = _newest_version(path) or _newest_version(path / "lightning_logs") or path
    config = config or folder / "config.yaml"
    if not config.is_file():
        raise ConfigurationError(
            f"'{folder}' is not the folder of a run: there is no '{config}'. Give a run's folder (runs/quickstart), "
            "one of its versions (runs/quickstart/version_0) or a checkpoint; or name the settings with --config."
        )
    return RunFolder(checkpoint=_newest_checkpoint(folder, config), config=config, summary=folder / "summary.json")


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a run as plain values.

    Raises:
        ConfigurationError: It is no YAML file with a `model` that names its student.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(
            f"'{path}' cannot be read as the settings of a run: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict) or "student" not in config["model"]:
        raise ConfigurationError(
            f"'{path}' holds no settings of a run: model.student is missing. Name them with --config."
        )
    return config


def read_summary(path: Path) -> dict[str, Any]:
    """A run's summary; empty where it has not ended.

    Raises:
        ConfigurationError: The file is damaged.
    """
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"'{path}' is damaged ({error}): remove it to go on without its figures.") from error


def _is_sharded(path: Path) -> bool:
    return path.is_dir() and any((*path.glob("*.distcp"), *path.glob(".metadata"), *path.glob("meta.pt")))


def _config_above(checkpoint: Path) -> Path:
    """`config.yaml` in the folder of the checkpoint's folder, as in `version_0/checkpoints/last.ckpt`, or beside it."""
    folders = checkpoint.absolute().parents[:2]
    for folder in reversed(folders):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise ConfigurationError(
        f"The settings of '{checkpoint}' are missing: there is no config.yaml in {' or '.join(map(str, folders))}. "
        "Name the run's config.yaml with --config."
    )


def _newest_version(folder: Path) -> Path | None:
    numbered = {path: path.name.removeprefix("version_") for path in folder.glob("version_*") if path.is_dir()}
    return max(
        (path for path, number in numbered.items() if number.isdigit()), key=lambda p: int(numbered[p]), default=None
    )


def _newest_checkpoint(folder: Path, config: Path) -> Path:
    settings = read_config(config).get("checkpoint") or {}
    place = Path(settings.get("dirpath") or folder / "checkpoints")
    if (place / "last.ckpt").exists():
        return place / "last.ckpt"
    found = sorted(place.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigurationError(
            f"The run '{folder}' has no checkpoint in '{place}': give another version, or a checkpoint."
        )
    return found[-1]


# ---- reading --------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> Checkpoint:
    """The student's weights and the run's state; a sharded checkpoint needs no process group and no second process.

    Raises:
        ConfigurationError: The checkpoint is damaged, or is not one of this package.
    """
    try:
        state, weights = _read_sharded(path) if path.is_dir() else _read_file(path)
    except pickle.UnpicklingError as error:
        raise ConfigurationError(
            f"The checkpoint '{path}' is damaged, or a callback, scheduler or optimiser has put more than tensors and "
            f"plain values into it, which are not read here since that could run code ({_reason(error)})."
        ) from error
    # What torch raises on a damaged sharded checkpoint is a BaseException of its own.
    except (OSError, RuntimeError, EOFError, ValueError, CheckpointException) as error:
        raise ConfigurationError(
            f"The checkpoint '{path}' is damaged, or was cut off while it was written ({_reason(error)}): take another "
            "one of the run."
        ) from error
    if not weights or "global_step" not in state:
        raise ConfigurationError(f"'{path}' is not a checkpoint of a run of this package: it holds no student.")
    return Checkpoint(weights=weights, state=state)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not zipfile.is_zipfile(path):
        raise ValueError("no zip archive")
    # Mapped into memory, so that the optimiser's state, twice the weights, is never read.
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(state, dict):
        return {}, {}
    weights = state.pop("state_dict", {})
    return state, {name.removeprefix(STUDENT): value for name, value in weights.items() if name.startswith(STUDENT)}


def _read_sharded(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state = torch.load(path / "meta.pt", map_location="cpu", weights_only=True)
    prefix = f"state_dict.{STUDENT}"
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        load(weights, checkpoint_id=path, no_dist=True)
    return state, {name.removeprefix(prefix): value for name, value in weights.items()}


def _reason(error: BaseException) -> str:
    """The innermost of what torch tells on several lines."""
    if isinstance(error, CheckpointException):
        return _reason(next(iter(error.failures.values()))[0])
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return next(iter(text.splitlines()), type(error).__name__)
