"""Which task a step trains on."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from lsm_lightning.errors import ConfigurationError


class Schedule(ABC):
    """A pure function from the step to a task, so that a resumed run is in phase by itself."""

    @abstractmethod
    def task_of(self, step: int, tasks: Sequence[str]) -> str:
        """The task of a step (from 0); `tasks` in the order of the configuration."""


class Alternating(Schedule):
    """Each step is one task's, strictly in turn, as in the paper."""

    def task_of(self, step: int, tasks: Sequence[str]) -> str:
        """See `Schedule.task_of`."""
        return tasks[step % len(tasks)]


class Repeating(Schedule):
    """A fixed pattern of tasks, over and over.

    Args:
        pattern: Task names, for instance `[math, math, alfworld]`.
    """

    def __init__(self, pattern: list[str]) -> None:
        if not pattern:
            raise ConfigurationError("Repeating(pattern=[]): name at least one task.")
        self.pattern = pattern

    def task_of(self, step: int, tasks: Sequence[str]) -> str:
        """See `Schedule.task_of`.

        Raises:
            ConfigurationError: The pattern names a task that is not configured.
        """
        name = self.pattern[step % len(self.pattern)]
        if name not in tasks:
            raise ConfigurationError(f"The schedule's pattern names the task '{name}'; there are {', '.join(tasks)}.")
        return name
