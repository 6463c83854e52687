"""Text ALFWorld: household games of six types, played on the genuine engine.

Importing this package needs nothing beyond the dependencies of `lsm_lightning`; playing needs its `alfworld` extra.
Names are imported when they are first asked for, so that worker processes, which only play, do without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsm_lightning.tasks.alfworld.prompts import PromptTemplate
    from lsm_lightning.tasks.alfworld.task import AlfworldEpisode, AlfworldGames

__all__ = ["AlfworldEpisode", "AlfworldGames", "PromptTemplate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'prompts' if name == 'PromptTemplate' else 'task'}"), name)
