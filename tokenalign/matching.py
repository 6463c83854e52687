"""Two tokenized rows on one scale: the same text, byte for byte or as one of the two tokenizers changes it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenalign.chunks import Ints, comparable_ends
from tokenalign.speller import Speller
from tokenalign.vocabulary import ByteTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One side's tokens."""

    ids: Ints
    """`[N]`"""
    table: ByteTable
    """Bytes per id, where bos and padding have none and all ends of turns have the same."""
    control: NDArray[np.bool_]
    """`[V]` True for tokens that stand for no text, but for bos and padding."""
    speller: Speller

    @property
    def text(self) -> bytes:
        """All bytes."""
        return self.table.text(self.ids)

    @property
    def lengths(self) -> Ints:
        """`[N]` bytes per token."""
        return self.table.lengths[self.ids]

    @property
    def ends(self) -> Ints:
        """`[N]` byte ends."""
        return self.table.ends(self.ids)


def matched(student: Row, teacher: Row) -> tuple[Ints, Ints, bool]:
    """Ends of both sides on one scale, `[m]` and `[n]`, and whether they are known to be the same text."""
    ours, theirs = student.text, teacher.text
    if ours == theirs:
        return student.ends, teacher.ends, True
    # A blank before the text, where a tokenizer adds one, is no difference.
    for row, other in ((student, teacher), (teacher, student)):
        if row.speller.vocabulary.kind.dummy_prefix and row.text == b" " + other.text:
            return student.ends - (row is student), teacher.ends - (row is teacher), True
    ends = _retraced(teacher, ours)
    if ends is not None:
        return 2 * student.ends, ends, True
    ends = _retraced(student, theirs)
    if ends is not None:
        return ends, 2 * teacher.ends, True
    return 2 * student.ends, comparable_ends(ours, theirs, teacher.ends), False


def _retraced(row: Row, text: bytes) -> Ints | None:
    """Ends `[N]` of a row's tokens in a text, doubled as in `Trace`, if its tokenizer makes just these of the text."""
    spoken = np.flatnonzero(row.lengths > 0)
    ends = np.zeros(len(row.ids), np.int64)
    if not spoken.size:
        return None if row.speller.spell([text])[0] else ends
    first = start = 0
    for last in [*np.flatnonzero(row.control[row.ids[spoken]]).tolist(), len(spoken)]:
        written = row.table.text(row.ids[spoken[last : last + 1]])
        stop = text.find(written, start) if written else len(text)
        found = _traced(row.speller, text[start:stop], row.ids[spoken[first:last]].tolist()) if stop >= 0 else None
        if found is None:
            return None
        ends[spoken[first:last]] = 2 * start + found
        start = stop + len(written)
        ends[spoken[last : last + 1]] = 2 * start
        first = last + 1
    ends[spoken[-1] :] = 2 * len(text)
    return np.maximum.accumulate(ends)


def _traced(speller: Speller, part: bytes, ids: list[int]) -> Ints | None:
    """Ends of these tokens in a part between control tokens, None if the tokenizer makes others of it."""
    for opening in (False, True):
        found = speller.in_text(part, speller.trace([part], opening=opening)[0], ids, opening=opening)
        if found:
            return found.ends
    return None
