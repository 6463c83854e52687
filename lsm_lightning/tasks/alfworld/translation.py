"""A game translated for the planner library: what Fast Downward makes of its PDDL, as plain data that can be kept.

The translator takes most of the time a game needs to begin (0.4 s of a genuine game), and what it says depends on the
PDDL alone. So a `TranslationCache` keeps it in a folder: JSON, compressed, with a checksum. No file is ever unpickled.
"""

import contextlib
import gzip
import hashlib
import json
import os
import sys
import tempfile
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lsm_lightning.tasks.alfworld import extra
from lsm_lightning.tasks.alfworld.game import Game

_TRANSLATING = threading.Lock()
"""The translator keeps its options in module globals and swaps `sys.stdout`."""

_FORMAT = 1
"""Raise it when `Translation` changes: files of another number are not found."""


@dataclass(frozen=True, slots=True)
class Translation:
    """What the engine needs of a game's PDDL."""

    types: Sequence[Sequence[str]]
    """Each type's name, followed by those of its supertypes."""
    objects: Mapping[str, str]
    """Each thing's type, by id."""
    facts: Sequence[Sequence[str]]
    """What holds at the start: predicate and ids."""
    parameters: Mapping[str, Sequence[Sequence[str]]]
    """Name and type of each parameter, by action."""
    sas: str
    """The whole, in the planner library's own format."""


def translate(game: Game) -> Translation:
    """Run Fast Downward's translator; 0.05 s for a small generated game and 0.4 s for a genuine one.

    Raises:
        Exception, SystemExit: What the translator says of a text that is no game.
    """
    downward = extra.load("fast_downward")
    with _TRANSLATING:
        arguments = sys.argv  # the translator replaces it and leaves it so
        try:
            task, sas = downward.pddl2sas(game.domain, game.problem)
        finally:
            sys.argv = arguments
    atom = downward.translate.pddl.conditions.Atom
    return Translation(
        types=[[kind.name, *kind.supertype_names] for kind in task.types],
        objects={thing.name: thing.type_name for thing in task.objects},
        facts=[[fact.predicate, *fact.args] for fact in task.init if isinstance(fact, atom) and fact.predicate != "="],
        parameters={
            action.name: [[parameter.name, parameter.type_name] for parameter in action.parameters]
            for action in task.actions
        },
        sas=sas,
    )


def user_cache_folder() -> Path:
    """`lsm_lightning/alfworld` in the user's cache folder: `$XDG_CACHE_HOME`, by default `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lsm_lightning" / "alfworld"


class TranslationCache:
    """Translations in a folder, one file a game, named after what they are made of.

    A name depends on the game's PDDL and on the version of the translator. A file appears whole or not at all, so that
    any number of processes may share the folder; one that is damaged is made anew. A folder that cannot be written to
    costs time and nothing else.

    Args:
        folder: Made when it is first needed, for its owner only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def translation(self, game: Game) -> Translation:
        """The game's translation, from its file if there is a good one.

        Raises:
            Exception, SystemExit: As `translate`.
        """
        path = self.folder / f"{_digest(game)}.json.gz"
        found = _read(path)
        if found is None:
            found = translate(game)
            with contextlib.suppress(OSError):
                _write(path, found)
        return found


def _digest(game: Game) -> str:
    made_of = json.dumps([_FORMAT, _translator(), game.domain, game.problem])
    return hashlib.blake2b(made_of.encode(), digest_size=20).hexdigest()


@cache
def _translator() -> str:
    return version("fast_downward_textworld")


def _read(path: Path) -> Translation | None:
    """None if there is no file, or none that was written by `_write` and is as it was."""
    try:
        return _checked(json.loads(gzip.decompress(path.read_bytes())))
    except (OSError, EOFError, zlib.error, ValueError, TypeError):
        return None


def _checked(content: Any) -> Translation:
    """The content of a file.

    Raises:
        TypeError: It is of another shape.
    """
    found = Translation(**content)
    shapes = (
        (found.types, list),
        (found.objects, dict),
        (found.facts, list),
        (found.parameters, dict),
        (found.sas, str),
    )
    if not all(isinstance(value, shape) for value, shape in shapes):
        raise TypeError("no translation")
    return found


def _write(path: Path, translation: Translation) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    packed = gzip.compress(json.dumps(asdict(translation)).encode(), compresslevel=6, mtime=0)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(packed)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
