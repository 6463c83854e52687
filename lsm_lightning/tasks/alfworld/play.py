"""One game being played, as its player sees it."""

from collections.abc import Sequence

from lsm_lightning.tasks.alfworld.engine import NOTHING_HAPPENS
from lsm_lightning.tasks.alfworld.prompts import Pair
from lsm_lightning.tasks.alfworld.running import RunningGame, Scene

_TASK = "Your task is to: "


class Play:
    """The state of a game that a prompt is made of.

    `act` returns at once where the game runs in another process; what is asked of the state then waits for it.

    Args:
        game: At its start; nobody else may send it commands.
        history: How many of the last pairs of observation and command to keep.
    """

    def __init__(self, game: RunningGame, history: int = 2) -> None:
        self._game, self._kept = game, history
        self._task: str | None = None
        self._refused = False
        self.history: tuple[Pair, ...] = ()
        self.taken = 0
        """Commands given so far."""

    @property
    def observation(self) -> str:
        """What the game said last."""
        return NOTHING_HAPPENS if self._refused else self._scene().text.strip()

    @property
    def task(self) -> str:
        """The task sentence; the engine says it once only."""
        self._scene()
        assert self._task is not None
        return self._task

    @property
    def admissible(self) -> Sequence[str]:
        """Commands the game takes now, sorted."""
        return self._scene().admissible

    @property
    def won(self) -> bool:
        """Whether the task is done."""
        return self._scene().won

    def act(self, command: str) -> bool:
        """Give a command; one that is not admissible is not passed on, but counts. Returns whether it was."""
        self.history = (*self.history, (self.observation, command))[-self._kept :] if self._kept else ()
        self.taken += 1
        usable = command in self.admissible
        self._refused = not usable
        if usable:
            self._game.send(command)
        return usable

    def close(self) -> None:
        """Give back what the game holds."""
        self._game.close()

    def _scene(self) -> Scene:
        scene = self._game.scene()
        if self._task is None:
            self._task = scene.text.partition(_TASK)[2].strip()
        return scene
