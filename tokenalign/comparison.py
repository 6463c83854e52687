"""Compares many segments with the teacher's spelling of them, in one pass over all of their tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenalign.chunks import Ints, align_ends, chunk_sizes, comparable_ends
from tokenalign.flags import Flag
from tokenalign.offsets import Trace, difference, without_tail
from tokenalign.segments import Analysis
from tokenalign.speller import invalid_bytes

Span = tuple[Flag, int, int]
"""A reason and the bytes it concerns, end exclusive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """The tokens of S segments, one after the other, as one tokenizer writes them."""

    ids: Ints
    """`[M]`"""
    counts: Ints
    """`[S]` tokens per segment; only the teacher's may be 0."""
    lengths: Ints
    """`[M]` bytes per token."""
    texts: Sequence[bytes]
    """`[S]`"""

    @property
    def segment(self) -> Ints:
        """`[M]` the segment of each token."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def sizes(self) -> Ints:
        """`[S]` bytes per segment."""
        return np.fromiter(map(len, self.texts), np.int64, len(self.texts))

    def ends(self) -> Ints:
        """`[M]` byte ends, counted from the start of each token's segment."""
        return np.cumsum(self.lengths) - np.repeat(np.cumsum(self.sizes) - self.sizes, self.counts)


def compare(
    student: Side,
    teacher: Side,
    *,
    to_teacher: NDArray[np.int32],
    control: NDArray[np.bool_],
    tags: Sequence[bytes],
    traces: Mapping[int, Trace | None],
) -> Analysis:
    """Chunks and flags of segments.

    Args:
        student: What the student wrote.
        teacher: How the teacher spells it.
        to_teacher: `[V_s]` teacher id per student id, -1 for none.
        control: `[S]` True for the segments that are a control token; whatever the teacher writes for it is one chunk.
        tags: Reasoning tags.
        traces: Where the teacher's tokens end, for segments that it does not spell byte for byte; None where that is
            not known.
    """
    student_chunk, teacher_chunk = _chunks(student, teacher, control, traces)
    bits = _spelling_bits(student, teacher, student_chunk, teacher_chunk, to_teacher, control)
    _mark(bits, np.cumsum(student.lengths), _spans(student, teacher, control, tags, traces))
    # Chunks are counted over all segments; a segment's last one is that of its last teacher token.
    chunk_count = np.diff(np.append(0, teacher_chunk + 1)[np.cumsum(teacher.counts)], prepend=0)
    before = np.cumsum(chunk_count) - chunk_count
    return Analysis(
        ids=student.ids,
        student_count=student.counts,
        teacher_count=teacher.counts,
        chunk_count=chunk_count,
        ok=_ok(teacher, control, traces),
        bits=bits,
        student_chunk=np.where(student_chunk < 0, -1, student_chunk - before[student.segment]).astype(np.int32),
        teacher_chunk=(teacher_chunk - before[teacher.segment]).astype(np.int32),
        teacher_ids=teacher.ids.astype(np.int32),
    )


def _ok(teacher: Side, control: NDArray[np.bool_], traces: Mapping[int, Trace | None]) -> NDArray[np.bool_]:
    """`[S]` True where the teacher spells the text, or what its tokenizer makes of it."""
    ok = (teacher.counts > 0) | ~control
    ok[[segment for segment, found in traces.items() if found is None]] = False
    return ok


def _chunks(
    student: Side, teacher: Side, control: NDArray[np.bool_], traces: Mapping[int, Trace | None]
) -> tuple[Ints, Ints]:
    """Chunk of every token, counted over all segments; -1 where the teacher spells nothing."""
    student_ends, teacher_ends = student.ends() * 2, teacher.ends() * 2
    spelled = (teacher.counts > 0)[student.segment]
    firsts = [np.append(0, np.cumsum(side.counts)).tolist() for side in (student, teacher)]
    for s, found in traces.items():
        ours, theirs = (slice(first[s], first[s + 1]) for first in firsts)
        if found is None:
            teacher_ends[theirs] = comparable_ends(student.texts[s], teacher.texts[s], teacher_ends[theirs] // 2)
        elif teacher.counts[s]:
            dropped = without_tail(student_ends[ours] // 2, found.tail, len(student.texts[s]))
            teacher_ends[theirs] = found.ends
            spelled[ours] = ~dropped
            if not dropped.any():
                teacher_ends[theirs.stop - 1] = 2 * len(student.texts[s])
    student_ends[control[student.segment]] = teacher_ends[control[teacher.segment]] = 1
    # Segments are laid out with a gap, so that no two share an end.
    room = 2 * student.sizes + 2
    base = np.cumsum(room) - room
    student_chunk = np.full(len(student.ids), -1)
    student_chunk[spelled], teacher_chunk = align_ends(
        (student_ends + base[student.segment])[spelled], teacher_ends + base[teacher.segment]
    )
    return student_chunk, teacher_chunk


def _spelling_bits(
    student: Side,
    teacher: Side,
    student_chunk: Ints,
    teacher_chunk: Ints,
    to_teacher: NDArray[np.int32],
    control: NDArray[np.bool_],
) -> NDArray[np.uint16]:
    """NONCANONICAL and MISALIGNED of every student token."""
    sizes = chunk_sizes(student_chunk, teacher_chunk)
    # One more entry for chunk -1: no teacher token, so neither alike nor aligned.
    alone = np.append((sizes == 1).all(axis=1), False)
    spelled = np.append(teacher.ids[np.searchsorted(teacher_chunk, np.arange(len(sizes)))], -1)[student_chunk]
    same = to_teacher[student.ids]
    # A text token without a counterpart of the same role is alike if its bytes are; a control token is not.
    alike = alone[student_chunk] & ((same == spelled) | ((same < 0) & ~control[student.segment]))
    follows = np.append(False, student_chunk[1:] == student_chunk[:-1]) | (student_chunk < 0)
    return np.where(alike, 0, Flag.NONCANONICAL).astype(np.uint16) | np.where(follows, Flag.MISALIGNED, 0).astype(
        np.uint16
    )


def _spans(
    student: Side,
    teacher: Side,
    control: NDArray[np.bool_],
    tags: Sequence[bytes],
    traces: Mapping[int, Trace | None],
) -> Iterator[Span]:
    """Reasons that follow from the bytes, at byte positions counted over all segments."""
    offsets = np.cumsum(student.sizes) - student.sizes
    # Most segments hold neither a tag nor anything but ASCII; these are looked for in all at once.
    text = b"".join(student.texts)
    for segment, start, end in find_within(text, tags, offsets):
        if not control[segment]:
            yield Flag.TAG, start, end
    beyond_ascii = np.flatnonzero(np.frombuffer(text, np.uint8) >= 0x80)
    for s in np.unique(_holder(offsets, beyond_ascii)).tolist():
        if not control[s]:
            # Neighbours in one go: where the mask changes, a run starts or ends.
            edges = np.flatnonzero(np.diff(invalid_bytes(student.texts[s]), prepend=False, append=False))
            for start, end in (int(offsets[s]) + edges.reshape(-1, 2)).tolist():
                yield Flag.INVALID_UTF8, start, end
    for s, found in traces.items():
        for start, end in found.changed if found else [difference(student.texts[s], teacher.texts[s])]:
            yield Flag.NORMALISED, int(offsets[s]) + start, int(offsets[s]) + end


def _holder(offsets: Ints, places: Ints) -> Ints:
    """The segment, given where each starts, that holds each byte."""
    return np.searchsorted(offsets, places, side="right") - 1


def find_within(text: bytes, tags: Sequence[bytes], offsets: Ints) -> Iterator[tuple[int, int, int]]:
    """Segment, start and end of every occurrence of every tag within one of the segments that make up a text.

    >>> list(find_within(b"a<b><b><b>", [b"<b>"], np.array([0, 5])))  # the one across two segments is none
    [(0, 1, 4), (1, 7, 10)]
    """
    for tag in tags:
        start = text.find(tag)
        while start >= 0:
            end = start + len(tag)
            first, last = _holder(offsets, np.array([start, end - 1])).tolist()
            if first == last:
                yield first, start, end
            start = text.find(tag, end if first == last else start + 1)


def _mark(bits: NDArray[np.uint16], ends: Ints, spans: Iterable[Span]) -> None:
    """Set a span's flag on every token that overlaps it; `ends[M]` are byte ends over all segments."""
    for flag, start, end in spans:
        first, last = np.searchsorted(ends, [start, end - 1], side="right")
        bits[first : last + 1] |= np.uint16(flag)
