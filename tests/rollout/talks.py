"""Conversations whose prompts grow by what was answered and by what is asked next."""

from collections.abc import Mapping, Sequence

from tiny import random_ids

from lsm_lightning.rollout.base import Conversations, Request
from lsm_lightning.types import Completion


class Talks(Conversations):
    """Each begins with a prompt and has so many turns; a limit is that of all its answers."""

    def __init__(self, prompts: Sequence[Sequence[int]], turns: Sequence[int], limits: Sequence[int]) -> None:
        self.prompts, self.turns, self.limits = [list(prompt) for prompt in prompts], turns, limits
        self.said: list[list[tuple[list[int], Completion]]] = [[] for _ in prompts]
        """Prompts and answers."""
        self.order: list[int] = []
        """Whose answers came, one after the other."""
        self._moved = list(range(len(prompts)))

    def take(self, answers: Mapping[int, Completion]) -> None:
        for number, answer in answers.items():
            self.said[number].append((list(self.prompts[number]), answer))
            self.prompts[number] += [*answer.ids, *random_ids(number, 1 + 5 * len(self.said[number]))]
        self.order += answers
        self._moved += answers

    def requests(self) -> dict[int, Request]:
        moved, self._moved = self._moved, []
        going = [number for number in moved if len(self.said[number]) < self.turns[number]]
        return {
            number: Request(
                ids=tuple(self.prompts[number]), seed=100 * number + len(self.said[number]), limit=self.limits[number]
            )
            for number in going
        }

    @property
    def texts(self) -> list[list[list[int]]]:
        return [[list(answer.ids) for _, answer in of_one] for of_one in self.said]
