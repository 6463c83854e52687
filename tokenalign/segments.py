"""Segments: stretches of a batch whose flags depend on nothing outside them, analysed once and remembered.

A row is cut at control tokens, at the ends of its text and, where the teacher's tokenizer allows it, between a word and
a blank. What remains repeats from call to call, so that nearly every token is looked up and not spelled again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, repeat

import numpy as np
from numpy.typing import NDArray

from tokenalign.chunks import Ints, ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """What is known about S segments, each with m_s student tokens (M in all) and n_s teacher tokens (N in all)."""

    student_count: Ints
    """`[S]` m_s, at least 1."""
    teacher_count: Ints
    """`[S]` n_s."""
    chunk_count: Ints
    """`[S]` chunks per segment."""
    bits: NDArray[np.uint16]
    """`[M]` flags of each student token."""
    student_chunk: NDArray[np.int32]
    """`[M]` chunk of each student token, counted from 0 in its segment; -1 where the teacher spells nothing."""
    teacher_chunk: NDArray[np.int32]
    """`[N]` chunk of each teacher token, likewise."""
    teacher_ids: NDArray[np.int32]
    """`[N]` the teacher's spelling."""


Analyser = Callable[[Ints, Ints], Analysis]
"""From the ids `[M]` of segments and their token counts `[S]`."""

_TYPES = {"student_count": np.int64, "teacher_count": np.int64, "chunk_count": np.int64, "bits": np.uint16}


def _empty() -> Analysis:
    return Analysis(**{f.name: np.zeros(0, _TYPES.get(f.name, np.int32)) for f in fields(Analysis)})


def _joined(left: Analysis, right: Analysis) -> Analysis:
    return Analysis(
        **{f.name: np.concatenate([getattr(left, f.name), getattr(right, f.name)]) for f in fields(Analysis)}
    )


class SegmentMemory:
    """Remembers analyses by a 64-bit hash of a segment's ids.

    Args:
        analyse: Called with the segments that are not known, each once.
        size: Ids of the vocabulary.
        capacity: Student tokens to remember; beyond it everything is forgotten at the start of a call, so that memory
            is bounded by the capacity (about 20 bytes a token) and one batch.
    """

    def __init__(self, analyse: Analyser, *, size: int, capacity: int = 1 << 20) -> None:
        self._analyse = analyse
        self._capacity = capacity
        self._random = np.random.default_rng(0x70C3)
        self._id_keys = self._random.integers(1, 1 << 63, size, dtype=np.uint64)
        self._place_keys = np.zeros(0, np.uint64)
        self._forget()

    def _forget(self) -> None:
        self._slots: dict[int, int] = {}
        self.known = _empty()

    def look_up(self, ids: Ints, counts: Ints) -> Ints:
        """Slot in `known` of each segment `[S]`, given the ids `[M]` of all and their token counts `[S]`."""
        if len(self.known.bits) > self._capacity:
            self._forget()
        if not len(counts):
            return np.zeros(0, np.int64)
        keys = self._hash(ids, counts).tolist()
        slots = self._find(keys)
        if (slots < 0).any():
            self._learn(ids, counts, keys, slots < 0)
            slots = self._find(keys)
        return slots

    def _find(self, keys: Sequence[int]) -> Ints:
        return np.fromiter(map(self._slots.get, keys, repeat(-1)), np.int64, len(keys))

    def _learn(self, ids: Ints, counts: Ints, keys: Sequence[int], missing: NDArray[np.bool_]) -> None:
        first = {keys[segment]: segment for segment in np.flatnonzero(missing).tolist()}
        segments = np.fromiter(first.values(), np.int64, len(first))
        starts = np.cumsum(counts) - counts
        new = self._analyse(ids[ranges(starts[segments], counts[segments])], counts[segments])
        slot = len(self._slots)
        self._slots |= zip(first, range(slot, slot + len(first)), strict=True)
        self.known = _joined(self.known, new)

    def _hash(self, ids: Ints, counts: Ints) -> NDArray[np.uint64]:
        """A random number per id times one per place, summed: equal for equal segments, else by chance of 2^-60."""
        longest = int(counts.max())
        if longest > len(self._place_keys):
            self._place_keys = np.random.default_rng(0x91ACE).integers(1, 1 << 63, 2 * longest, dtype=np.uint64)
        starts = np.cumsum(counts) - counts
        places = np.arange(len(ids)) - np.repeat(starts, counts)
        return np.add.reduceat(self._id_keys[ids] * self._place_keys[places], starts)

    def student_places(self, slots: Ints) -> Ints:
        """Where in `known.bits` and `known.student_chunk` the tokens of these slots lie, in order."""
        return _places(self.known.student_count, slots)

    def teacher_places(self, slots: Ints) -> Ints:
        """Where in `known.teacher_ids` and `known.teacher_chunk` the tokens of these slots lie, in order."""
        return _places(self.known.teacher_count, slots)


def _places(counts: Ints, slots: Ints) -> Ints:
    return ranges((np.cumsum(counts) - counts)[slots], counts[slots])


def split(values: bytes, counts: Sequence[int]) -> list[bytes]:
    """Consecutive pieces of the given lengths.

    >>> split(b"abcde", [2, 3])
    [b'ab', b'cde']
    """
    return [values[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]
