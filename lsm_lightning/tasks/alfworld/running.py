"""A game that runs: commands go in, scenes come out. Here in this process; `workers` has the one in another."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.tasks.alfworld.engine import Engine, Grounding, engine_pool
from lsm_lightning.tasks.alfworld.game import Game
from lsm_lightning.tasks.alfworld.translation import TranslationCache


@dataclass(frozen=True, slots=True)
class Scene:
    """What a game says and takes."""

    text: str
    """The answer to the last command; at the start the first text, in which alone the task sentence stands."""
    admissible: Sequence[str]
    """Commands it takes now, sorted."""
    won: bool


class RunningGame(ABC):
    """One game, from its start to wherever commands lead it."""

    @abstractmethod
    def send(self, command: str) -> None:
        """Give a command, which may return before it is carried out."""

    @abstractmethod
    def scene(self) -> Scene:
        """The scene that the last command led to; waits for it.

        Raises:
            ConfigurationError: The game cannot be played; with its name.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what the game holds; calling it twice is harmless."""


class EngineGame(RunningGame):
    """A game on an engine of the caller's.

    Args:
        engine: Plays it; nobody else may use it meanwhile.
        grounding: The game.
    """

    def __init__(self, engine: Engine, grounding: Grounding) -> None:
        self._engine, self._text = engine, engine.start(grounding)

    def send(self, command: str) -> None:
        """Give a command."""
        self._text = self._engine.act(command)

    def scene(self) -> Scene:
        """Where the game is now."""
        return Scene(self._text, self._engine.admissible, self._engine.won)

    def close(self) -> None:
        """Nothing is held."""


class LocalGame(RunningGame):
    """A game in this process. Its engine is taken from the pool when it is first needed, and given back when the game
    is closed or forgotten.

    Args:
        game: Which.
        kept: Where its translation may be found.
    """

    def __init__(self, game: Game, kept: TranslationCache | None = None) -> None:
        self._game, self._kept = game, kept
        self._running: EngineGame | None = None
        self._give_back: Callable[[], object] = lambda: None

    def send(self, command: str) -> None:
        """Give a command."""
        self._started().send(command)

    def scene(self) -> Scene:
        """Where the game is now."""
        return self._started().scene()

    def close(self) -> None:
        """Give the engine back."""
        self._running = None
        self._give_back()

    def _started(self) -> EngineGame:
        if self._running is None:
            pool = engine_pool()
            engine = pool.acquire()
            self._give_back = weakref.finalize(self, pool.release, engine)
            try:
                self._running = EngineGame(engine, pool.grounding(self._game, self._kept))
            except (Exception, SystemExit) as error:
                self.close()
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise ConfigurationError(f"{self._game.name}: the engine cannot load this game ({reason})") from error
        return self._running
