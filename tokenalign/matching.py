"""Two tokenized rows on one scale: the same text, byte for byte or as one of the two tokenizers changes it."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tokenalign.chunks import Ints, comparable_ends
from tokenalign.offsets import Trace, without_tail
from tokenalign.speller import Speller
from tokenalign.vocabulary import ByteTable


@dataclass(frozen=True, kw_only=True)
class Row:
    """One side's tokens."""

    ids: Ints
    """`[N]`"""
    table: ByteTable
    """Bytes per id, where bos and padding have none and all ends of turns have the same."""
    control: NDArray[np.bool_]
    """`[V]` True for tokens that stand for no text, but for bos and padding."""
    speller: Speller

    @cached_property
    def text(self) -> bytes:
        """All bytes."""
        return self.table.text(self.ids)

    @cached_property
    def lengths(self) -> Ints:
        """`[N]` bytes per token."""
        return self.table.lengths[self.ids]

    @cached_property
    def ends(self) -> Ints:
        """`[N]` byte ends."""
        return self.table.ends(self.ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Matched:
    """Both sides on one scale."""

    ends: tuple[Ints, Ints]
    """`[m]` of the student and `[n]` of the teacher."""
    dropped: tuple[NDArray[np.bool_], NDArray[np.bool_]]
    """`[m]` and `[n]` True for tokens of a text's end that the other tokenizer drops."""
    ok: bool
    """True if both are known to be the same text."""


def matched(student: Row, teacher: Row) -> Matched:
    """The scale on which two rows are the same text, or else the best that can be done."""
    none = np.zeros(len(student.ids), bool), np.zeros(len(teacher.ids), bool)
    ours, theirs = student.text, teacher.text
    if ours == theirs:
        return Matched(ends=(student.ends, teacher.ends), dropped=none, ok=True)
    # A blank before the text, where a tokenizer adds one, is no difference.
    for row, other in ((student, teacher), (teacher, student)):
        if row.speller.vocabulary.kind.dummy_prefix and row.text == b" " + other.text:
            ends = student.ends - (row is student), teacher.ends - (row is teacher)
            return Matched(ends=ends, dropped=none, ok=True)
    if found := _retraced(teacher, ours, student.ends):
        written, dropped = found
        return Matched(ends=(_without(2 * student.ends, dropped), written), dropped=(dropped, none[1]), ok=True)
    if found := _retraced(student, theirs, teacher.ends):
        written, dropped = found
        return Matched(ends=(written, _without(2 * teacher.ends, dropped)), dropped=(none[0], dropped), ok=True)
    return Matched(ends=(2 * student.ends, comparable_ends(ours, theirs, teacher.ends)), dropped=none, ok=False)


def _without(ends: Ints, dropped: NDArray[np.bool_]) -> Ints:
    """Ends of tokens, those that are dropped at the end of the one before."""
    return np.maximum.accumulate(np.where(dropped, 0, ends))


def _retraced(row: Row, text: bytes, text_ends: Ints) -> tuple[Ints, NDArray[np.bool_]] | None:
    """A row's tokens in a text, if its tokenizer makes just these of it.

    Args:
        row: `[N]` tokens.
        text: The text.
        text_ends: `[M]` byte ends of the tokens that it was written with.

    Returns:
        Ends `[N]`, doubled as in `Trace`, and which of the `[M]` tokens are dropped; None if it makes others of it.
    """
    spoken = np.flatnonzero(row.lengths > 0)
    ends, dropped = np.zeros(len(row.ids), np.int64), np.zeros(len(text_ends), bool)
    if not spoken.size:
        return None if row.speller.spell([text])[0] else (ends, ~dropped)
    first = start = 0
    for last in [*np.flatnonzero(row.control[row.ids[spoken]]).tolist(), len(spoken)]:
        written = row.table.text(row.ids[spoken[last : last + 1]])
        stop = text.find(written, start) if written else len(text)
        found = _traced(row.speller, text[start:stop], row.ids[spoken[first:last]].tolist()) if stop >= 0 else None
        if found is None:
            return None
        tail = without_tail(text_ends, start + found.tail, stop)
        ends[spoken[first:last]] = 2 * start + found.ends
        if not tail.any():
            ends[spoken[last - 1 : last]] = 2 * stop
        dropped |= tail
        start = stop + len(written)
        ends[spoken[last : last + 1]] = 2 * start
        first = last + 1
    ends[spoken[-1] :] = ends[spoken[-1]]
    return np.maximum.accumulate(ends), dropped


def _traced(speller: Speller, part: bytes, ids: list[int]) -> Trace | None:
    """These tokens in a part between control tokens, None if the tokenizer makes others of it."""
    for opening in (False, True):
        found = speller.in_text(part, speller.trace([part], opening=opening)[0], ids, opening=opening)
        if found:
            return found
    return None
