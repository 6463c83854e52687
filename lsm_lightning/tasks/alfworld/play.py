"""One game being played, as its player sees it."""

from collections.abc import Sequence

from lsm_lightning.tasks.alfworld.engine import NOTHING_HAPPENS, Engine, Grounding
from lsm_lightning.tasks.alfworld.prompts import Pair

_TASK = "Your task is to: "


class Play:
    """The state of a game that a prompt is made of.

    Args:
        engine: Plays it; nobody else may use it meanwhile.
        grounding: The game.
        history: How many of the last pairs of observation and command to keep.
    """

    def __init__(self, engine: Engine, grounding: Grounding, history: int = 2) -> None:
        self._engine, self._kept = engine, history
        self.observation = engine.start(grounding).strip()
        self.task = self.observation.partition(_TASK)[2].strip()
        """The task sentence; the engine says it once only."""
        self.history: tuple[Pair, ...] = ()
        self.taken = 0
        """Commands given so far."""

    @property
    def admissible(self) -> Sequence[str]:
        """Commands the game takes now, sorted."""
        return self._engine.admissible

    @property
    def won(self) -> bool:
        """Whether the task is done."""
        return self._engine.won

    def act(self, command: str) -> bool:
        """Give a command; one that is not admissible is not passed on, but counts. Returns whether it was."""
        self.history = (*self.history, (self.observation, command))[-self._kept :] if self._kept else ()
        self.taken += 1
        usable = command in self.admissible
        self.observation = self._engine.act(command).strip() if usable else NOTHING_HAPPENS
        return usable
