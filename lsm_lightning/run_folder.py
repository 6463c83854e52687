"""What a run has left behind: where its checkpoint, settings and summary lie, found without starting anything."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lsm_lightning import checkpoints
from lsm_lightning.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """Where the parts of a run lie."""

    checkpoint: Path
    """A file, or a folder of a sharded checkpoint."""
    config: Path
    summary: Path
    """Written at the end of a run only."""


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
    if path.is_file() or path.suffix == ".ckpt" or checkpoints.is_sharded(path):
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
    found = checkpoints.newest(place) or max(place.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, default=None)
    if found is None:
        raise ConfigurationError(
            f"The run '{folder}' has no checkpoint in '{place}': give another version, or a checkpoint."
        )
    return found
