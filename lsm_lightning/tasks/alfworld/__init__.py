"""Text ALFWorld: household games of six types, played on the genuine engine.

Importing this package needs nothing beyond the dependencies of `lsm_lightning`; playing needs its `alfworld` extra.
"""

from lsm_lightning.tasks.alfworld.prompts import PromptTemplate
from lsm_lightning.tasks.alfworld.task import AlfworldEpisode, AlfworldGames

__all__ = ["AlfworldEpisode", "AlfworldGames", "PromptTemplate"]
