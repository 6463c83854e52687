"""Which task a step trains on."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from lsm_lightning.errors import ConfigurationError


class Schedule(ABC):
    """A pure function from the step to a task, so that a resumed run is in phase by itself."""

    def check(self, tasks: Sequence[str]) -> None:  # noqa: B027 - most schedules fit any tasks
        """Raise a `ConfigurationError` where the schedule does not fit the tasks."""

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
        """See `Schedule.task_of`."""
        return self.pattern[step % len(self.pattern)]

    def check(self, tasks: Sequence[str]) -> None:
        """See `Schedule.check`: every name of the pattern is a task."""
        for name in self.pattern:
            if name not in tasks:
                raise ConfigurationError(f"The schedule's pattern names '{name}'; the tasks are {', '.join(tasks)}.")
