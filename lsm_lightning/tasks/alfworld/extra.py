"""The one place that imports the `alfworld` extra: its logic files, its goals, and what to say when it is missing."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Any

from lsm_lightning.errors import ConfigurationError

_MODULES = ("alfworld", "fast_downward", "textworld.envs.pddl.logic")


@contextmanager
def _no_cache_folder() -> Iterator[None]:
    """Importing alfworld makes the folder `$ALFWORLD_DATA` (default: in the home directory): name one that exists."""
    if "ALFWORLD_DATA" in os.environ:
        yield
        return
    os.environ["ALFWORLD_DATA"] = tempfile.gettempdir()
    try:
        yield
    finally:
        del os.environ["ALFWORLD_DATA"]


def load(module: str) -> Any:
    """Import a module of the extra, without leaving a folder or an environment variable behind.

    Raises:
        ConfigurationError: The extra is not installed, or what it built does not import.
    """
    try:
        with _no_cache_folder():
            return import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f'ALFWorld games need the `alfworld` extra ({error}): run `pip install "lsm-lightning[alfworld]"`. '
            "It builds the Fast Downward planner from source, for which a C++ compiler must be installed."
        ) from error


def require() -> None:
    """Check that the extra can be used; cheap after the first call.

    Raises:
        ConfigurationError: It cannot, with the command that installs it.
    """
    for module in _MODULES:
        load(module)


@cache
def domain() -> str:
    """The PDDL domain all generated games share, as the installed package has it."""
    load("alfworld")
    return files("alfworld").joinpath("data", "alfred.pddl").read_text(encoding="utf-8")


@cache
def grammar() -> str:
    """The text grammar of the installed package; the task sentence is still `UNKNOWN GOAL`."""
    load("alfworld")
    return files("alfworld").joinpath("data", "alfred.twl2").read_text(encoding="utf-8")


def goals() -> Mapping[str, Mapping[str, Any]]:
    """ALFWorld's goals by task type: `pddl` is a template of the goal, `templates` those of the task sentence."""
    return load("alfworld.gen.goal_library").gdict
