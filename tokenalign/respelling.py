"""Student tokens against the teacher's own spelling of the same text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from tokenalign.chunks import Alignment, Ints, alignment
from tokenalign.comparison import Side, compare
from tokenalign.flags import Flag
from tokenalign.segments import Analysis, SegmentMemory, split
from tokenalign.speller import Speller
from tokenalign.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherText:
    """A batch in the teacher's own spelling, ragged."""

    ids: list[NDArray[np.int32]]
    """Per row `[n_b]` teacher ids of the row's text, without bos."""
    alignments: list[Alignment]
    """Per row; `student_chunk` is `[T]`, -1 at padding, prompt and what the teacher cannot spell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """The live tokens of one batch, and where the memory keeps what is known about them."""

    memory: SegmentMemory
    places: Ints
    """`[M]` flat positions in the batch."""
    counts: Ints
    """`[S]` tokens per segment."""
    slots: Ints
    """`[S]`"""

    def bits(self) -> NDArray[np.uint16]:
        """`[M]` flags that follow from a segment's text."""
        return self.memory.known.bits[self.memory.student_places(self.slots)]

    def teacher_text(self, shape: tuple[int, ...]) -> TeacherText:
        """The teacher's spelling of a batch of shape `[B, T]`, or of one row `[T]`."""
        known, slots = self.memory.known, self.slots
        student, teacher = self.memory.student_places(slots), self.memory.teacher_places(slots)
        teacher_counts, chunk_counts = known.teacher_count[slots], known.chunk_count[slots]
        # The first segment, chunk and teacher token of each row, and the end of the last row.
        rows = self.places[np.cumsum(self.counts) - self.counts] // max(1, shape[-1])
        first = np.searchsorted(rows, np.arange(1 + math.prod(shape[:-1])))
        first_chunk, first_token = (np.append(0, np.cumsum(c))[first] for c in (chunk_counts, teacher_counts))
        before = np.cumsum(chunk_counts) - chunk_counts - first_chunk[rows]
        chunk = known.student_chunk[student]
        student_chunk, same = np.full(shape, -1), np.ones(shape, bool)
        student_chunk.flat[self.places] = np.where(chunk < 0, -1, chunk + np.repeat(before, self.counts))
        same.flat[self.places] = (chunk >= 0) & (known.bits[student] & Flag.NORMALISED == 0)
        teacher_ids = known.teacher_ids[teacher]
        teacher_chunk = known.teacher_chunk[teacher] + np.repeat(before, teacher_counts)
        of_row = [slice(*bounds) for bounds in pairwise(first_token.tolist())]
        rows_of = zip(np.atleast_2d(student_chunk), of_row, np.atleast_2d(same), strict=True)
        return TeacherText(
            ids=[teacher_ids[row] for row in of_row],
            alignments=[alignment(ours, teacher_chunk[row], ok=bool(ok.all())) for ours, row, ok in rows_of],
        )


class Respelling:
    """Cuts rows into segments and compares each with the teacher's spelling of it.

    Args:
        student: The student's bytes.
        teacher: The teacher's bytes.
        to_teacher: `[V_s]` teacher id per student id, -1 for none.
        controls: Student ids that stand for no text, and what the teacher writes for each; None: its text in plain.
        tags: Reasoning tags.
    """

    def __init__(
        self,
        student: Vocabulary,
        teacher: Vocabulary,
        *,
        to_teacher: NDArray[np.int32],
        controls: Mapping[int, int | None],
        tags: tuple[str, ...],
    ) -> None:
        self._student, self._teacher = student, teacher
        self._to_teacher = to_teacher
        self._controls = controls
        self._tags = [tag.encode() for tag in tags]
        self._speller = Speller(teacher, tags)
        self._is_control = np.zeros(student.size, bool)
        self._is_control[list(controls)] = True
        self.cuts_at_blanks = self._speller.splits_at_blanks(tags)
        self.memory = SegmentMemory(self.analyse, size=student.size)

    def look_up(self, ids: Ints, live: NDArray[np.bool_]) -> "Segments":
        """Everything known about the live tokens of `ids[B, T]`."""
        places, counts = self._cut(ids, live)
        slots = self.memory.look_up(ids.ravel()[places], counts)
        return Segments(memory=self.memory, places=places, counts=counts, slots=slots)

    def _cut(self, ids: Ints, live: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """Flat positions `[M]` of the live tokens of `ids[B, T]`, and the token counts `[S]` of their segments."""
        control = self._is_control[ids]
        start = np.ones(ids.shape, bool)
        start[..., 1:] = ~live[..., :-1] | control[..., 1:] | control[..., :-1]
        if self.cuts_at_blanks:
            start[..., 1:] |= self._student.ends_word[ids[..., :-1]] & self._student.starts_blank[ids[..., 1:]]
        places = np.flatnonzero(live)
        starts = np.flatnonzero(start.ravel()[places])
        return places, np.diff(starts, append=len(places))

    def analyse(self, ids: Ints, counts: Ints) -> Analysis:
        """Compare segments, given the ids `[M]` of all and their token counts `[S]`; nothing is remembered."""
        student = _side(self._student, ids, counts)
        first = ids[np.cumsum(counts) - counts]
        spelled = self._spell(first.tolist(), student.texts)
        teacher_counts = np.fromiter(map(len, spelled), np.int64, len(spelled))
        teacher_ids = np.fromiter(chain.from_iterable(spelled), np.int64, teacher_counts.sum())
        return compare(
            student,
            _side(self._teacher, teacher_ids, teacher_counts),
            to_teacher=self._to_teacher,
            control=self._is_control[first],
            tags=self._tags,
        )

    def _spell(self, first: list[int], texts: Sequence[bytes]) -> list[list[int]]:
        """The teacher's ids per segment, given each one's first student id; a control token is a segment of its own."""
        own = [self._controls.get(id) for id in first]
        ordinary = iter(self._speller.spell([text for id, text in zip(own, texts, strict=True) if id is None]))
        return [next(ordinary) if id is None else [id] for id in own]


def _side(vocabulary: Vocabulary, ids: Ints, counts: Ints) -> Side:
    lengths = vocabulary.lengths[ids]
    ends = np.append(0, np.cumsum(lengths))[np.cumsum(counts)]
    texts = split(vocabulary.text(ids), np.diff(ends, prepend=0).tolist())
    return Side(ids=ids, counts=counts, lengths=lengths, texts=texts)
