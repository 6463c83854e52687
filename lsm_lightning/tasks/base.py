"""A task hands out episodes; an episode asks, takes answers and says when it is over."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from lsm_lightning.types import Message

Split = Literal["train", "test"]


class Episode(ABC):
    """One conversation with an environment: one turn for a math problem, many for a game.

    Used like this, many episodes side by side:

        while not episode.done:
            answer = write(episode.messages())
            episode.step(answer)
        episode.reward; episode.close()

    `step` may leave work to be done elsewhere; what is asked afterwards then waits for it. So all that have an answer
    take their step before any of them is asked.
    """

    kind: str = ""
    """The sort of problem within its task, for reports."""
    done: bool = False
    reward: float = 0.0
    """Valid once `done`: from 0 to 1, where 1 is solved."""
    invalid_actions: int = 0
    """Answers so far that the environment could not use."""
    invalid_kinds: Mapping[str, int] = MappingProxyType({})
    """The same by kind, where the task tells kinds apart (`Task.invalid_kinds`)."""

    @abstractmethod
    def messages(self) -> Sequence[Message]:
        """The chat messages of the current turn; not to be called once `done`."""

    @abstractmethod
    def step(self, answer: str) -> None:
        """Take the answer to `messages()` (text, without the end-of-turn token)."""

    def close(self) -> None:  # noqa: B027 - most episodes hold nothing
        """Give back what the episode holds (a game engine); calling it twice is harmless."""


class Task(ABC):
    """A source of problems with a train and a test split, numbered from 0.

    Episode `i` of a split is a pure function of the task's settings and `i`, so that a step can be replayed and a
    resumed run sees what an uninterrupted one would have seen.

    Args of every task:
        max_new_tokens: Longest answer in one turn, in tokens.
    """

    max_new_tokens: int
    max_turns: int = 1
    """Most turns of an episode."""
    invalid_kinds: Sequence[str] = ()
    """Kinds of answers that its episodes cannot use; each is logged under its name."""

    @abstractmethod
    def setup(self) -> None:
        """Read or check what the task needs; called once, before the first step, and cheap to call again.

        Raises:
            ConfigurationError: Naming what is missing (a package, a file, a setting) and the remedy.
        """

    @abstractmethod
    def test_size(self) -> int:
        """Number of problems in the test split."""

    @abstractmethod
    def episode(self, split: Split, index: int) -> Episode:
        """A fresh episode of problem `index`; train indices are unbounded, a finite data set starts over reshuffled."""
