"""What a teacher reads of the student's answers, and which of its positions answer which of the student's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lsm_lightning.types import Turn
from tokenalign import Pair


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The answers of some turns as the teacher reads them."""

    responses: list[list[int]]
    """Per turn the teacher's ids."""
    position: list[Int[Tensor, " m"]]
    """Per turn, for each of the student's m tokens, the teacher's token that starts at the same place; -1 for none."""
    alike: list[Bool[Tensor, " m"]]
    """Per turn, whether that token is the student's own, spelled alike."""


def as_it_stands(turns: Sequence[Turn], rows: int) -> Reading:
    """The student's ids themselves; one beyond the teacher's output matrix of so many rows is read as 0."""
    lengths = [len(turn.completion.ids) for turn in turns]
    return Reading(
        responses=[[i if i < rows else 0 for i in turn.completion.ids] for turn in turns],
        position=[torch.arange(length) for length in lengths],
        alike=[torch.ones(length, dtype=torch.bool) for length in lengths],
    )


def respelled(turns: Sequence[Turn], pair: Pair) -> Reading:
    """The teacher's own spelling of the same texts (`Pair.to_teacher`)."""
    lengths = [len(turn.completion.ids) for turn in turns]
    ids = np.zeros((len(turns), max(lengths, default=0)), np.int64)
    response = np.arange(ids.shape[1]) < np.array(lengths)[:, None]
    ids[response] = [i for turn in turns for i in turn.completion.ids]
    spelled = pair.to_teacher(ids, response)
    position, alike = [], []
    for length, alignment in zip(lengths, spelled.alignments, strict=True):
        starts = np.full(length, -1)
        one_to_one = np.zeros(length, bool)
        ours, theirs = alignment.starts()
        starts[ours] = theirs
        one_to_one[ours] = (alignment.chunks[alignment.student_chunk[ours]] == 1).all(axis=1)
        position.append(torch.from_numpy(starts))
        alike.append(torch.from_numpy(one_to_one))
    return Reading(responses=[row.tolist() for row in spelled.ids], position=position, alike=alike)
