"""Where a text can be cut so that a tokenizer spells both parts as it spells them in the whole.

Three things could reach across a cut between two characters; a cut is made only where none of them can.

1. A token: the two characters stand side by side in some piece of the vocabulary. Where no piece holds them, no merge
   joins them.
2. A match of a pattern by which the text is split first, see `tokenalign.patterns`.
3. A normaliser that looks at more than one character. Those which are known not to are named by the tokenizer's reader,
   and characters that combine with the one before are left alone.

One more place is cut although pieces and matches hold such characters elsewhere: where blanks meet a word, most
patterns leave the last blank to the word. Whether they always do is found by trying.
"""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, pre_tokenizers

from tokenalign.chunks import Ints
from tokenalign.patterns import counts, is_read, neighbours
from tokenalign.splitting import Splitting

_NEVER, _UNLESS_HELD, _ALWAYS = 0, 1, 2
_TABLE_BITS = 20
_HANGUL_JAMO = range(0x1100, 0x1200)
_SEPARATOR = "\U0010ffff"
"""No character, so no text is cut beside it."""
_BLANKS = "\t\n\v\f\r \x85\xa0\u2028\u3000"


class Cuts:
    """The places between a student's tokens at which the teacher's spelling falls apart.

    Args:
        pieces: Bytes per student id.
        alone: `[V_s]` True for ids that are no text, such as control tokens: both sides of them are cut.
        held: Pieces of the teacher's vocabulary.
        whole: Texts that the teacher takes as a whole before it splits: added tokens and tags.
        splitting: The teacher's; None if it is not known, then rows are cut only beside what is `alone`.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        alone: NDArray[np.bool_],
        held: Collection[bytes],
        whole: Collection[bytes],
        splitting: Splitting | None,
    ) -> None:
        if splitting and not all(map(is_read, splitting.patterns)):
            splitting = None
        edges = [_edges(piece) for piece in pieces]
        chars = {char for edge in edges for char in edge}
        usable = _usable(chars, held, splitting) if splitting else {}
        known = sorted(set(usable.values()))
        group, levels = _levels(splitting, known, whole) if splitting else ({}, _levels_of_none())
        size = len(levels) - 2
        first = np.array([group.get(usable.get(first, ""), 0) for first, _, _ in edges])
        word = np.array([group.get(usable.get(word, ""), 0) for _, word, _ in edges])
        last = np.array([group.get(usable.get(last, ""), 0) for _, _, last in edges])
        self._first = np.where(alone, 2 * size + 1, np.where(word > 0, size + word, first)).astype(np.int32)
        self._last = np.where(alone, size + 1, last).astype(np.int32) * levels.shape[1]
        self._levels = levels.ravel()
        # Which two characters some piece holds: a set, kept as a table of hashes, where a clash only costs a cut.
        self._first_hash = _hash(_points("".join(usable.get(first, _SEPARATOR) for first, _, _ in edges)), 0)
        self._last_hash = _hash(_points("".join(usable.get(last, _SEPARATOR) for _, _, last in edges)), 1)
        self._held = np.zeros(1 << _TABLE_BITS, np.uint8)
        if splitting:
            left, right = _held_pairs([*held, *whole], known)
            self._held[_place(_hash(left, 1), _hash(right, 0))] = 1

    def before(self, ids: Ints) -> NDArray[np.bool_]:
        """`[N - 1]` True where a sequence of student ids `[N]` can be cut before its second, third, … token."""
        left, right = ids[:-1], ids[1:]
        held = self._held[_place(self._last_hash[left], self._first_hash[right])]
        return self._levels[self._last[left] + self._first[right]] > held


def _levels_of_none() -> NDArray[np.uint8]:
    """As `_levels`, of no characters."""
    return np.array([[_NEVER, _ALWAYS], [_ALWAYS, _ALWAYS]], np.uint8)


def _levels(
    splitting: Splitting, chars: Sequence[str], whole: Collection[bytes]
) -> tuple[dict[str, int], NDArray[np.uint8]]:
    """Where to cut, by what stands on either side.

    Returns:
        A number from 1 to G per character, and `[G + 2, 2 G + 2]`: after a character (row) and before another, or
        before a blank and another (columns from G + 1), never, always, or unless some piece holds the two characters.
        Row and column 0 are for what is not known, the last ones for what stands alone.
    """
    every = [*dict.fromkeys([*chars, *_BLANKS])]
    # As patterns of their own, these characters are in groups of their own.
    apart = (r"\s", *map(re.escape, (" ", *(splitting.opens or ""))))
    group, joined = neighbours((*splitting.patterns, *apart), "".join(every))
    size = len(joined)
    first_of_group = np.unique(group, return_index=True)[1]
    samples = [every[index] for index in first_of_group]
    if splitting.opens is not None:
        joined[:, [char not in splitting.opens for char in samples]] = True
    between = np.where(joined, _NEVER, _UNLESS_HELD)
    before_word = between[:, [samples.index(" ")] * size]
    if splitting.isolates and not any(re.search(rb"\s ", text) for text in whole):
        takes = _words_take_a_blank(splitting.patterns, samples)
        # Where a text that is taken as a whole may start, the blank before it is none of its own.
        opened = {text.decode(errors="replace").lstrip()[:1] for text in whole}
        takes[:, [int(index) for char, index in zip(every, group, strict=True) if char in opened]] = False
        before_word = np.where(takes, _ALWAYS, before_word)
    levels = np.full((size + 2, 2 * size + 2), _ALWAYS, np.uint8)
    levels[0, :-1] = levels[:-1, 0] = _NEVER
    levels[1:-1, 1:-1] = np.concatenate([between, before_word], axis=1)
    number = dict(zip(every, (1 + group).tolist(), strict=True))
    return {char: number[char] for char in chars}, levels


def _words_take_a_blank(patterns: Sequence[str], samples: Sequence[str]) -> NDArray[np.bool_]:
    """`[G, G]` True where " x" is always a part of its own after blanks that end with w, for the characters w and x.

    Tried with every character before and with all runs of up to three blanks. Unless a pattern counts blanks, longer
    runs bring nothing new.
    """
    result = np.zeros((len(samples), len(samples)), bool)
    if not patterns or any(counts(pattern, _BLANKS) for pattern in patterns):
        return result
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns])

    def ends(text: str) -> list[int]:
        return [end for _, (_, end) in split.pre_tokenize_str(text)]

    blanks, others = [s for s in samples if s.isspace()], [s for s in samples if not s.isspace()]
    result[np.ix_([samples.index(w) for w in blanks], [samples.index(x) for x in others])] = True
    contexts = ["", *others, *(other * 2 for other in others)]
    runs = ["".join(run) for length in (1, 2, 3) for run in product(blanks, repeat=length)]
    for context, run in product(contexts, runs):
        alone = ends(context + run)
        row = result[samples.index(run[-1])]
        for x in others:
            column = samples.index(x)
            row[column] = row[column] and ends(f"{context}{run} {x}") == [*alone, alone[-1] + 2]
    return result


def _edges(piece: bytes) -> tuple[str, str, str]:
    """The first character, the one after it where a blank opens a word, and the last; empty where there is none.

    >>> _edges("né".encode()), _edges(b" a\\xc3")
    (('n', '', 'é'), (' ', 'a', ''))
    """
    text = piece.decode(errors="surrogateescape")
    first, second, last = (char if _is_whole(char) else "" for char in (text[:1], text[1:2], text[-1:]))
    return first, second if first == " " and not second.isspace() else "", last


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
