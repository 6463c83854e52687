"""Genuine games: folders with `game.tw-pddl` files, as ALFWorld's download has them."""

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.tasks.alfworld.game import Game
from lsm_lightning.tasks.alfworld.layout import TASK_TYPES, Kind

FILE_NAME = "game.tw-pddl"

_TEXTS = ("pddl_domain", "grammar", "pddl_problem")
_KINDS: dict[str, Kind] = {name: kind for kind, name in TASK_TYPES.items()}
_SKIPPED = ("movable", "Sliced")
"""Marks in a folder's name of task types that ALFWorld itself leaves out."""


def find_games(folder: str) -> Sequence[Path]:
    """All playable games below a folder, sorted by path; each file is read once to check it.

    The folder may hold `~` and environment variables.

    As alfworld does, games marked unsolvable and tasks with movable receptacles or slicing are left out; a warning says
    how many games are unsolvable.

    Raises:
        ConfigurationError: The folder does not exist or holds no game, or a file is none; with path and reason.
    """
    root = expanded(folder)
    if not root.is_dir():
        if unset := re.search(r"\$\{?(\w+)", str(root)):
            raise ConfigurationError(
                f"ALFWorld games: {folder}: the environment variable {unset[1]} is not set; set it to the folder that "
                "holds json_2.1.1, or name a folder"
            )
        raise ConfigurationError(f"ALFWorld games: {root} is no folder; name one with {FILE_NAME} files below it")
    playable: list[Path] = []
    unsolvable: list[Path] = []
    for path in sorted(root.rglob(FILE_NAME)):
        if not any(mark in path.parent.parent.name for mark in _SKIPPED):
            (playable if _checked(path)["solvable"] else unsolvable).append(path)
    note = f"{len(unsolvable)} marked unsolvable, first {unsolvable[0]}" if unsolvable else "there is none"
    if not playable:
        raise ConfigurationError(f"ALFWorld games: no playable {FILE_NAME} below {root}: {note}")
    if unsolvable:
        warnings.warn(f"ALFWorld games below {root}: left out {note}", stacklevel=2)
    return playable


def expanded(folder: str) -> Path:
    """A folder as a setting names it: with `~` and environment variables."""
    return Path(os.path.expandvars(folder)).expanduser()


def read_game(path: Path) -> Game:
    """One genuine game.

    Raises:
        ConfigurationError: The file is no game; with path and reason.
    """
    content = _checked(path)
    return Game(
        name=str(path),
        kind=kind_of(path),
        domain=content["pddl_domain"],
        grammar=content["grammar"],
        problem=content["pddl_problem"],
        plan=tuple(content["walkthrough"]),
    )


def kind_of(path: Path) -> Kind:
    """The task type of a game file: from the `traj_data.json` beside it if there is one, else from its folder's name.

    Raises:
        ConfigurationError: Neither names one of the six types.
    """
    beside = path.with_name("traj_data.json")
    name = _json(beside).get("task_type") if beside.is_file() else path.parent.parent.name.partition("-")[0]
    if name not in _KINDS:
        raise ConfigurationError(
            f"{path}: task type {name!r} is none of {', '.join(_KINDS)}; it is read from traj_data.json beside the "
            "file or from the name of the folder two levels up"
        )
    return _KINDS[name]


def _checked(path: Path) -> dict[str, Any]:
    """The content of a game file that has all five keys."""
    content = _json(path)
    missing = [key for key in (*_TEXTS, "walkthrough", "solvable") if key not in content]
    if missing:
        raise ConfigurationError(f"{path} is no ALFWorld game: it lacks {', '.join(missing)}")
    for key in _TEXTS:
        if not isinstance(content[key], str):
            raise ConfigurationError(f"{path} is no ALFWorld game: {key} is no text")
    if not isinstance(content["walkthrough"], list):
        raise ConfigurationError(f"{path} is no ALFWorld game: walkthrough is no list of commands")
    kind_of(path)
    return content


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} holds no JSON object")
    return content
