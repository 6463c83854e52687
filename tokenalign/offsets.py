"""Where tokens end in a text that their tokenizer changed before it split it.

A tokenizer that normalises tells for each token where it ends in the text that it was given. Those ends are as good as
byte ends, with four exceptions that are mended here: tokens that share the text of one character (or of one
replacement) share its end, so only the last of them has a true one; no end lies in a text that the next token still
stands for; a character that was joined with marks after it ends after the marks; and what is dropped at the end of a
text has no token.
"""

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from tokenalign.chunks import Ints, common_ends
from tokenalign.kinds import Spelled

Span = tuple[int, int]
"""First byte and one past the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """The tokens of a text on the scale of its bytes."""

    ends: Ints
    """`[n]` twice the byte position of each token's end; odd where a token ends at no position of the text."""
    changed: list[Span]
    """The bytes that the tokens do not spell as they are, or beside which they spell more; whole characters."""
    tail: int
    """Bytes before what is dropped at the end of the text."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Tokens that share an end."""

    tokens: slice
    start: int
    end: int
    spelled: bytes
    blank: bool
    """True if one blank before them, or none, is a matter of convention."""
    known: bool
    """False if one of them stands for what the tokenizer cannot spell."""

    def exact(self, text: bytes) -> bool:
        """True if the tokens spell their part of the text."""
        own = text[self.start : self.end]
        alike = own == self.spelled or (self.blank and own.removeprefix(b" ") == self.spelled.removeprefix(b" "))
        return alike and self.known


def trace(
    text: bytes,
    spelled: Spelled,
    pieces: Sequence[bytes],
    *,
    free_blanks: Collection[int] = (),
    unknown: int | None = None,
    opening: bool = False,
) -> Trace | None:
    """What a tokenizer made of a text, on the scale of its bytes; None where the ends that it gives are no ends.

    Args:
        text: In UTF-8.
        spelled: What the tokenizer made of it.
        pieces: Bytes per id.
        free_blanks: Ids before which one blank, or none, is a matter of convention.
        unknown: The id for what the tokenizer cannot spell.
        opening: The first token may start with a blank that is not in the text.

    >>> trace(b"A cat", Spelled(ids=[0, 1], starts=[0, 1], ends=[1, 5]), [b"a", b" cat"])
    Trace(ends=array([ 2, 10]), changed=[(0, 1)], tail=5)
    """
    given = np.asarray(spelled.ends, np.int64)
    if not given.size:
        return Trace(ends=given, changed=[(0, len(text))] if text else [], tail=0)
    if (np.diff(given, prepend=0) < 0).any() or given[-1] > len(text):
        return None

    def grouped(ends: Ints) -> list[_Group]:
        groups, first, start = [], 0, 0
        for end, members in groupby(ends.tolist()):
            tokens = slice(first, first + len(list(members)))
            ids = spelled.ids[tokens]
            blank = ids[0] in free_blanks or (opening and first == 0)
            groups.append(
                _Group(tokens, start, end, b"".join(pieces[id] for id in ids), blank, known=unknown not in ids)
            )
            first, start = tokens.stop, end
        return groups

    moved, right = given.copy(), None
    for group in reversed(grouped(given)):
        if group.exact(text):
            right = None
            continue
        moved[group.tokens] = _after_marks(text, group.end)
        # What the next token still stands for is not over, nor is what has no place of its own.
        if right and (spelled.starts[right.start] < group.end or spelled.starts[group.tokens.stop - 1] == group.end):
            moved[group.tokens] = moved[right.start]
        right = group.tokens
    ends = np.zeros_like(given)
    changed: list[Span] = []
    for group in grouped(np.maximum.accumulate(moved)):
        lengths = [len(pieces[id]) for id in spelled.ids[group.tokens]]
        if group.exact(text):
            ends[group.tokens] = 2 * np.maximum(group.end - np.cumsum(lengths[::-1])[::-1] + lengths, 0)
        else:
            ends[group.tokens] = 2 * group.end - 1
            changed += _changed(text, group)
        ends[group.tokens.stop - 1] = 2 * group.end
    if group.end < len(text):
        changed.append((group.end, len(text)))
    return Trace(ends=ends, changed=changed, tail=group.end)


def without_tail(ends: Ints, tail: int, size: int) -> NDArray[np.bool_]:
    """`[N]` True for the other side's tokens that lie in a dropped end of the text, if there is a place to cut it off.

    Args:
        ends: `[N]` their byte ends.
        tail: Bytes before what is dropped.
        size: Bytes of the text.

    >>> without_tail(np.array([2, 3, 5]), 2, 5).tolist(), without_tail(np.array([3, 5]), 2, 5).tolist()
    ([False, True, True], [False, False])
    """
    if tail and tail not in ends:
        return np.zeros(len(ends), bool)
    return (ends > tail) & (ends <= size)


def _changed(text: bytes, group: _Group) -> list[Span]:
    """Where a group's tokens do not spell their part of the text; a blank before it has no say where it is free."""
    spelled = group.spelled if group.known else b""
    blank = group.blank and text.startswith(b" ", group.start)
    if group.blank and not blank:
        spelled = spelled.removeprefix(b" ")
    start = group.start + (blank and not group.known)
    kept = text.find(spelled, start, group.end) if spelled else -1
    if kept < 0:
        return [difference(text, spelled, start, group.end)]
    sides = (start, kept), (kept + len(spelled), group.end)
    return [(first, last) for first, last in sides if first < last]


def _after_marks(text: bytes, end: int) -> int:
    """The end, or that of the marks which follow there."""
    while (char := text[end : end + 4].decode(errors="ignore")[:1]) and _combines(char):
        end += len(char.encode())
    return end


def _combines(char: str) -> bool:
    """True for what a normaliser may join with the character before: marks, and vowels and finals of Hangul."""
    first = unicodedata.normalize("NFKD", char)[0]
    return unicodedata.category(first)[0] == "M" or "\u1160" <= first <= "\u11ff"


def difference(text: bytes, spelled: bytes, start: int = 0, end: int | None = None) -> Span:
    """The whole characters in which a part of a text differs from what is spelled; one beside a mere addition.

    >>> difference("à É".encode(), "à é".encode()), difference(b"ab", b"abc")
    ((3, 5), (1, 2))
    """
    end = len(text) if end is None else end
    before, after = common_ends(text[start:end], spelled)
    first, last = start + before, end - after
    if first == last:
        first, last = (first, last + 1) if first < end or not first else (first - 1, last)
    while first and first < len(text) and text[first] & 0xC0 == 0x80:
        first -= 1
    while last < len(text) and text[last] & 0xC0 == 0x80:
        last += 1
    return first, last
