"""Play a task's test split, and what comes out of it."""

from collections.abc import Callable, Sequence

from lsm_lightning.rollout.collect import Player, collect
from lsm_lightning.tasks.base import Task
from lsm_lightning.types import Trajectory

EPISODES_AT_ONCE = 256


def evaluate(
    task: Task,
    player: Player,
    *,
    indices: Sequence[int],
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Trajectory]:
    """One episode of each test problem.

    The random numbers depend on the seed and the problem, so that two players are compared on the same draws.
    """
    played: list[Trajectory] = []

    def report(finished: int, _: int) -> None:
        if on_progress is not None:
            on_progress(len(played) + finished, len(indices))

    for first in range(0, len(indices), EPISODES_AT_ONCE):
        part = indices[first : first + EPISODES_AT_ONCE]
        played += collect(
            [((seed, "test", index), task.episode("test", index)) for index in part],
            player,
            max_new_tokens=task.max_new_tokens,
            on_progress=report,
        )
    return played
