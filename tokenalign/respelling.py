"""Student tokens against the teacher's own spelling of the same text."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from tokenalign.chunks import Alignment, Ints, chunk_sizes
from tokenalign.comparison import Side, compare
from tokenalign.cuts import Cuts
from tokenalign.offsets import Trace
from tokenalign.segments import Analysis, SegmentMemory, joined, split
from tokenalign.speller import Speller
from tokenalign.vocabulary import Vocabulary

_BLOCK = 1 << 16
"""Tokens that are looked up at once, unless a segment is longer: few enough to stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherText:
    """A batch in the teacher's own spelling, ragged."""

    ids: list[NDArray[np.int32]]
    """Per row `[n_b]` teacher ids of the row's text, without bos."""
    alignments: list[Alignment]
    """Per row; `student_chunk` is `[T]`, -1 at padding, prompt and what the teacher cannot spell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """Some of a batch's live tokens, cut into segments, and where the memory holds what is known about them.

    To be read before the next ones are looked up.
    """

    memory: SegmentMemory
    places: Ints
    """`[M]` flat positions in the batch."""
    slots: Ints
    """`[S]` segments in `memory.known`."""
    known_places: Ints
    """`[M]` tokens in `memory.known`."""

    @property
    def bits(self) -> NDArray[np.uint16]:
        """`[M]` flags that follow from a segment's text."""
        return self.memory.known["bits"][self.known_places]

    @property
    def analysis(self) -> Analysis:
        """All that is known."""
        return self.memory.known.take(self.slots)


class Respelling:
    """Cuts rows into segments and compares each with the teacher's spelling of it.

    Args:
        student: The student's bytes.
        speller: Spells as the teacher does, the tags included.
        to_teacher: `[V_s]` teacher id per student id, -1 for none.
        controls: Student ids that stand for no text, and what the teacher writes for each; None: its text in plain.
        tags: Reasoning tags.
    """

    def __init__(
        self,
        student: Vocabulary,
        speller: Speller,
        *,
        to_teacher: NDArray[np.int32],
        controls: Mapping[int, int | None],
        tags: tuple[str, ...],
    ) -> None:
        teacher = speller.vocabulary
        self._student, self._teacher, self._speller = student, teacher, speller
        self._to_teacher = to_teacher
        self._controls = controls
        self._tags = [tag.encode() for tag in tags]
        self._is_control = np.zeros(student.size, bool)
        self._is_control[list(controls)] = True
        self.cuts = Cuts(
            student.pieces,
            alone=self._is_control,
            # Words hold their blank, which no token is.
            held={piece for piece, special in teacher.keys if not special} | {b" "[: len(teacher.kind.free_blanks)]},
            whole={teacher.pieces[id] for id in teacher.added if not teacher.special[id]} | {*self._tags},
            splitting=teacher.splitting,
        )
        self.memory = SegmentMemory(self.analyse, size=student.size)

    def look_up(self, ids: Ints, live: NDArray[np.bool_]) -> Iterator[Segments]:
        """Everything known about the live tokens of `ids`, both `[B, T]` or `[T]`, in the batch's order."""
        tokens, inside, row = ids.ravel(), live.ravel(), ids.shape[-1]
        start = 0
        while start < len(tokens):
            begins = self._begins(tokens, inside, start, row)
            within = inside[start : start + len(begins)]
            places = np.flatnonzero(within)
            if places.size:
                firsts = np.flatnonzero(begins[places])
                counts = np.diff(firsts, append=len(places))
                slots, known_places = self.memory.look_up(tokens[start:][places], counts)
                yield Segments(memory=self.memory, places=start + places, slots=slots, known_places=known_places)
            start += len(begins)

    def _begins(self, tokens: Ints, inside: NDArray[np.bool_], start: int, row: int) -> NDArray[np.bool_]:
        """`[N]` True where a segment begins, for the tokens from `start` up to the end of a later segment."""
        size = _BLOCK
        while True:
            block = slice(start, start + size)
            begins = np.ones(len(tokens[block]), bool)
            begins[1:] = self.cuts.before(tokens[block]) | ~inside[block][:-1]
            begins[-start % row :: row] = True
            last = len(begins) - 1 - int(begins[::-1].argmax())
            if block.stop >= len(tokens):
                return begins
            if last:
                return begins[:last]
            size *= 2

    def analyse(self, ids: Ints, counts: Ints) -> Analysis:
        """Compare segments, given the ids `[M]` of all and their token counts `[S]`; nothing is remembered."""
        student = _side(self._student, ids, counts)
        first = ids[np.cumsum(counts) - counts]
        spelled = self._spell(first.tolist(), student.texts)
        teacher_counts = np.fromiter(map(len, spelled), np.int64, len(spelled))
        teacher_ids = np.fromiter(chain.from_iterable(spelled), np.int64, teacher_counts.sum())
        teacher, control = _side(self._teacher, teacher_ids, teacher_counts), self._is_control[first]
        return compare(
            student,
            teacher,
            to_teacher=self._to_teacher,
            control=control,
            tags=self._tags,
            traces=self._traces(student.texts, teacher.texts, spelled, control),
        )

    def _traces(
        self,
        student: Sequence[bytes],
        teacher: Sequence[bytes],
        spelled: Sequence[Sequence[int]],
        control: NDArray[np.bool_],
    ) -> dict[int, Trace | None]:
        """What the teacher's tokenizer tells of the segments that it does not spell byte for byte."""
        unknown = self._teacher.kind.unknown
        sides = enumerate(zip(student, teacher, spelled, control.tolist(), strict=True))
        others = [s for s, (ours, theirs, ids, alone) in sides if not alone and (ours != theirs or unknown in ids)]
        traced = self._speller.trace([student[s] for s in others])
        return {
            s: self._speller.in_text(student[s], found, spelled[s]) for s, found in zip(others, traced, strict=True)
        }

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


def teacher_text(shape: tuple[int, ...], segments: Iterable[Segments]) -> TeacherText:
    """The teacher's spelling of a batch of shape `[B, T]`, or of one row `[T]`, from all of its segments."""
    parts = [(part.places, part.analysis) for part in segments]
    places = np.concatenate([np.zeros(0, np.int64), *(part for part, _ in parts)])
    whole = joined([analysis for _, analysis in parts])
    rows, columns = math.prod(shape[:-1]), shape[-1]
    # Chunks and teacher tokens of each row.
    row = places[np.cumsum(whole.student_count) - whole.student_count] // max(1, columns)
    ends = np.searchsorted(row, np.arange(rows + 1))
    first_chunk, first_token = (np.append(0, np.cumsum(c))[ends] for c in (whole.chunk_count, whole.teacher_count))
    before = np.cumsum(whole.chunk_count) - whole.chunk_count
    student_chunk = np.where(whole.student_chunk < 0, -1, whole.student_chunk + np.repeat(before, whole.student_count))
    teacher_chunk = whole.teacher_chunk + np.repeat(before, whole.teacher_count)
    sizes = chunk_sizes(student_chunk, teacher_chunk)
    same, ours = np.ones(rows, bool), np.full((rows, columns), -1, np.int32)
    same[row[~whole.ok]] = False
    ours.flat[places] = student_chunk
    ours -= np.where(ours < 0, 0, first_chunk[:-1, None]).astype(np.int32)
    theirs = (teacher_chunk - np.repeat(first_chunk[:-1], np.diff(first_token))).astype(np.int32)
    of_row = [slice(*bounds) for bounds in pairwise(first_token.tolist())]
    chunks_of_row = [slice(*bounds) for bounds in pairwise(first_chunk.tolist())]
    return TeacherText(
        ids=[whole.teacher_ids[tokens] for tokens in of_row],
        alignments=[
            Alignment(student_chunk=one, teacher_chunk=theirs[tokens], chunks=sizes[chunks], ok=ok)
            for one, tokens, chunks, ok in zip(ours, of_row, chunks_of_row, same.tolist(), strict=True)
        ],
    )
