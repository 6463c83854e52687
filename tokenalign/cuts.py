"""Where a text can be cut so that a tokenizer spells both parts as it spells them in the whole.

Three things could reach across a cut between two characters; a cut is made only where none of them can.

1. A token: the two characters stand side by side in some piece of the vocabulary. Where no piece holds them, no merge
   joins them, and the best path of a Unigram model goes through the cut.
2. A match of a pattern by which the text is split first, see `tokenalign.patterns`.
3. A normaliser that looks at more than one character. Those which are known not to are named by the tokenizer's reader,
   and characters that combine with the one before are left alone.
"""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tokenalign.chunks import Ints
from tokenalign.patterns import neighbours
from tokenalign.splitting import Splitting

_NEVER, _UNLESS_HELD, _ALWAYS = 0, 1, 2
_TABLE_BITS = 20
_HANGUL_JAMO = range(0x1100, 0x1200)
_SEPARATOR = "\U0010ffff"
"""No character, so no text is cut beside it."""


class Cuts:
    """The places between a student's tokens at which the teacher's spelling falls apart.

    Args:
        pieces: Bytes per student id.
        alone: `[V_s]` True for ids that are no text, such as control tokens: both sides of them are cut.
        held: Texts that the teacher may take as a whole: its pieces, added tokens and tags.
        splitting: The teacher's; None if it is not known, then rows are cut only beside what is `alone`.
    """

    def __init__(
        self, pieces: Sequence[bytes], *, alone: NDArray[np.bool_], held: Iterable[bytes], splitting: Splitting | None
    ) -> None:
        edges, texts = [_edges(piece) for piece in pieces], set(held)
        usable = _usable({char for edge in edges for char in edge}, texts, splitting) if splitting else {}
        patterns, opens = (splitting.patterns, splitting.opens) if splitting else ((), None)
        # As patterns of their own, the characters that open a part are groups of their own.
        group, joined = neighbours((*patterns, *map(re.escape, opens or "")), "".join(usable.values()))
        if opens is not None:
            joined[:, [char not in opens for char in _one_of_each(group, usable.values())]] = True
        # Group 0 is never cut, the last one always.
        of_char = {char: 1 + int(index) for char, index in zip(usable, group, strict=True)}
        size = len(joined) + 2
        level = np.full((size, size), _ALWAYS, np.uint8)
        level[:-1, :-1] = _NEVER
        level[1:-1, 1:-1] = np.where(joined, _NEVER, _UNLESS_HELD)
        self._level = level.ravel()
        self._first, self._last = (
            np.where(alone, size - 1, [of_char.get(edge[side], 0) for edge in edges]).astype(np.int32)
            for side in (0, 1)
        )
        self._last *= size
        # Which two characters some piece holds: a set, kept as a table of hashes, where a clash only costs a cut.
        first, last = ("".join(usable.get(edge[side], _SEPARATOR) for edge in edges) for side in (0, 1))
        self._first_hash, self._last_hash = _hash(_points(first), 0), _hash(_points(last), 1)
        self._held = np.zeros(1 << _TABLE_BITS, np.uint8)
        left, right = _held_pairs(texts if splitting else (), sorted(set(usable.values())))
        self._held[_place(_hash(left, 1), _hash(right, 0))] = 1

    def before(self, ids: Ints) -> NDArray[np.bool_]:
        """`[N - 1]` True where a sequence of student ids `[N]` can be cut before its second, third, … token."""
        left, right = ids[:-1], ids[1:]
        held = self._held[_place(self._last_hash[left], self._first_hash[right])]
        return self._level[self._last[left] + self._first[right]] > held


def _edges(piece: bytes) -> tuple[str, str]:
    """The first and the last character, empty where it is not whole.

    >>> _edges("né".encode()), _edges(b"a\\xc3")
    (('n', 'é'), ('a', ''))
    """
    text = piece.decode(errors="surrogateescape")
    first, last = text[:1], text[-1:]
    return (first if _is_whole(first) else "", last if _is_whole(last) else "")


def _is_whole(char: str) -> bool:
    return not "\udc80" <= char <= "\udcff"


def _usable(chars: Iterable[str], held: Collection[bytes], splitting: Splitting) -> dict[str, str]:
    """Characters beside which a cut may be, each with what the normaliser makes of it."""
    normalized = {char: splitting.normalize(char) for char in sorted(chars) if char and not _combines(char)}
    single = {char: text for char, text in normalized.items() if len(text) == 1 and not _combines(text)}
    if all(bytes([byte]) in held for byte in range(256)):
        return single
    # Characters that the tokenizer cannot spell may join each other.
    return {char: text for char, text in single.items() if text.encode() in held}


def _one_of_each(group: NDArray[np.intp], chars: Iterable[str]) -> list[str]:
    """A character of each group, in their order."""
    return [char for _, char in sorted(dict(zip(group.tolist(), chars, strict=True)).items())]


def _combines(char: str) -> bool:
    """True for what may join the character before it, and for what engines may not agree on."""
    first = unicodedata.normalize("NFKD", char)[0]
    kind = unicodedata.category(char)
    return (
        unicodedata.combining(first) > 0
        or unicodedata.category(first)[0] == "M"
        or (kind[0] in "CM" and char not in "\t\n")
        or ord(first) in _HANGUL_JAMO
        or (kind == "Lo" and ord(char) > 0xFFFF)
        or (char.isspace() and not char.isascii())
        or len(char.casefold()) > 1
    )


def _held_pairs(held: Iterable[bytes], chars: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Code points of the neighbours in the texts `held`; half a character stands for every one of `chars` it may be."""
    whole, broken = [], []
    for piece in held:
        try:
            whole.append(piece.decode())
        except UnicodeDecodeError:
            broken.append(piece.decode(errors="surrogateescape"))
    points = _points(_SEPARATOR.join(whole))
    left, right = [points[:-1]], [points[1:]]
    starts, ends = sorted(char.encode() for char in chars), sorted(char.encode()[::-1] for char in chars)
    for text in broken:
        for before, after in pairwise(_UNIT.findall(text)):
            befores = before if _is_whole(before) else _starting(ends, _raw(before)[::-1], step=-1)
            afters = after if _is_whole(after) else _starting(starts, _raw(after))
            left.append(np.repeat(_points(befores), len(afters)))
            right.append(np.tile(_points(afters), len(befores)))
    return np.concatenate(left), np.concatenate(right)


_UNIT = re.compile("[\udc80-\udcff]+|[^\udc80-\udcff]")
"""A character, or bytes that are none."""


def _raw(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _starting(encoded: Sequence[bytes], prefix: bytes, step: int = 1) -> str:
    """The characters among sorted encodings that start so; step -1 where they are written backwards."""
    found = encoded[bisect_left(encoded, prefix) : bisect_left(encoded, prefix + b"\xff")]
    return "".join(one[::step].decode() for one in found)


def _points(text: str) -> NDArray[np.uint32]:
    """Code points."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _hash(points: NDArray[np.uint32], side: int) -> NDArray[np.uint32]:
    """A number for each code point, to be added to that of its neighbour; other numbers for the left and the right."""
    return points * np.uint32((0x9E3779B1, 0x85EBCA77)[side])


def _place(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return (left + right) >> np.uint32(32 - _TABLE_BITS)
