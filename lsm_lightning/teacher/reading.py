"""What a teacher reads of the student's answers, and which of its positions answer which of the student's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lsm_lightning.batching import padded_responses, spans
from lsm_lightning.types import Turn
from tokenalign import Pair


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The answers of some turns as the teacher reads them."""

    responses: list[list[int]]
    """Per turn the teacher's ids."""
    position: list[Int[Tensor, " _"]]
    """Per turn, for each of the student's tokens, the teacher's token that starts at the same place; -1 for none."""

    def without(self, left_out: Sequence[int]) -> "Reading":
        """The same, but nothing is read of some turns."""
        out = frozenset(left_out)
        return Reading(
            responses=[[] if i in out else response for i, response in enumerate(self.responses)],
            position=[torch.full_like(p, -1) if i in out else p for i, p in enumerate(self.position)],
        )

    def position_in(self, group: Sequence[int]) -> Int[Tensor, " n"]:
        """`position` of some turns end to end, counted over all of the group's responses."""
        if not group:
            return torch.zeros(0, dtype=torch.long)
        starts = torch.tensor([places.start for places in spans([len(self.responses[i]) for i in group])])
        position = torch.cat([self.position[i] for i in group])
        lengths = torch.tensor([len(self.position[i]) for i in group])
        return torch.where(position < 0, -1, position + starts.repeat_interleave(lengths))


def as_it_stands(turns: Sequence[Turn], rows: int) -> Reading:
    """The student's ids themselves; one beyond the teacher's output matrix of so many rows is read as 0."""
    return Reading(
        responses=[[i if i < rows else 0 for i in turn.completion.ids] for turn in turns],
        position=[torch.arange(len(turn.completion.ids)) for turn in turns],
    )


def respelled(turns: Sequence[Turn], pair: Pair) -> Reading:
    """The teacher's own spelling of the same texts (`Pair.to_teacher`)."""
    spelled = pair.to_teacher(*padded_responses(turns))
    position = []
    for turn, alignment in zip(turns, spelled.alignments, strict=True):
        students, teachers = alignment.starts.T
        of_tokens = np.full(len(turn.completion.ids), -1)
        of_tokens[students] = teachers
        position.append(torch.from_numpy(of_tokens))
    return Reading(responses=[row.tolist() for row in spelled.ids], position=position)
