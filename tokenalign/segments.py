"""Segments: stretches of a batch whose flags depend on nothing outside them, analysed once and remembered.

A row is cut at control tokens, at the ends of its text and wherever the teacher's spelling falls apart. What remains
repeats from call to call, so that nearly every token is looked up and not spelled again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenalign.chunks import Ints, ranges

Keys = NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """What is known about S segments, each with m_s student tokens (M in all) and n_s teacher tokens (N in all)."""

    ids: Ints
    """`[M]` the segments themselves: student ids."""
    student_count: Ints
    """`[S]` m_s, at least 1."""
    teacher_count: Ints
    """`[S]` n_s."""
    chunk_count: Ints
    """`[S]` chunks per segment."""
    ok: NDArray[np.bool_]
    """`[S]` True where the teacher's tokens are known to be the segment's text."""
    bits: NDArray[np.uint16]
    """`[M]` flags of each student token."""
    student_chunk: Ints
    """`[M]` chunk of each student token, counted from 0 in its segment; -1 where the teacher spells nothing."""
    teacher_chunk: Ints
    """`[N]` chunk of each teacher token, likewise."""
    teacher_ids: NDArray[np.int32]
    """`[N]` the teacher's spelling."""


Analyser = Callable[[Ints, Ints], Analysis]
"""From the ids `[M]` of segments and their token counts `[S]`."""

_TYPES = {field.name: np.int32 for field in fields(Analysis)} | {"bits": np.uint16, "ok": np.bool_}


def joined(analyses: Sequence[Analysis]) -> Analysis:
    """One after the other."""
    empty = {name: np.zeros(0, dtype) for name, dtype in _TYPES.items()}
    return Analysis(
        **{name: np.concatenate([empty[name], *(getattr(one, name) for one in analyses)]) for name in _TYPES}
    )


class _Store:
    """Analyses one after the other, in arrays with room to grow, and a hash table to find them by key."""

    def __init__(self) -> None:
        self._columns: dict[str, NDArray[Any]] = {name: np.zeros(0, dtype) for name, dtype in _TYPES.items()}
        self._columns |= {"student_start": np.zeros(0, np.int64), "teacher_start": np.zeros(0, np.int64)}
        self._sizes = dict.fromkeys(self._columns, 0)
        self._keys: Keys = np.zeros(16, np.uint64)
        self._slots = np.zeros(16, np.int32)
        self._indexed = 0

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A column, with room at its end."""
        return self._columns[name]

    @property
    def tokens(self) -> int:
        """Student tokens of all analyses."""
        return self._sizes["ids"]

    def append(self, new: Analysis) -> Ints:
        """Slots `[S]` of further analyses, which `find` does not know yet."""
        slots = self._sizes["student_count"] + np.arange(len(new.student_count))
        for side, tokens in (("student", "ids"), ("teacher", "teacher_ids")):
            counts = getattr(new, f"{side}_count")
            self._extend(f"{side}_start", self._sizes[tokens] + np.cumsum(counts) - counts)
        for name in _TYPES:
            self._extend(name, getattr(new, name))
        return slots

    def _extend(self, name: str, values: NDArray[Any]) -> None:
        size = self._sizes[name] + len(values)
        column = self._columns[name]
        if size > len(column):
            column = np.zeros(max(size, 2 * len(column)), column.dtype)
            column[: self._sizes[name]] = self._columns[name][: self._sizes[name]]
            self._columns[name] = column
        column[self._sizes[name] : size] = values
        self._sizes[name] = size

    def take(self, slots: Ints) -> Analysis:
        """The analyses in these slots."""
        student = ranges(self["student_start"][slots], self["student_count"][slots])
        teacher = ranges(self["teacher_start"][slots], self["teacher_count"][slots])
        of = {
            "student_count": slots,
            "teacher_count": slots,
            "chunk_count": slots,
            "ok": slots,
            "teacher_chunk": teacher,
            "teacher_ids": teacher,
        }
        return Analysis(**{name: self._columns[name][of.get(name, student)] for name in _TYPES})

    def find(self, keys: Keys) -> Ints:
        """Slot of each key `[S]`, -1 for none."""
        slots = np.full(len(keys), -1)
        pending, bucket = np.arange(len(keys)), self._bucket(keys)
        while pending.size:
            found = self._keys[bucket]
            hit = found == keys[pending]
            slots[pending[hit]] = self._slots[bucket[hit]]
            onward = ~hit & (found > 0)
            pending, bucket = pending[onward], (bucket[onward] + 1) % len(self._keys)
        return slots

    def index(self, keys: Keys, slots: Ints) -> None:
        """Let `find` know keys `[S]`, none twice and none known yet."""
        self._indexed += len(keys)
        if 2 * self._indexed > len(self._keys):
            old = self._keys > 0
            keys, slots = np.append(keys, self._keys[old]), np.append(slots, self._slots[old])
            size = 1 << int(4 * self._indexed - 1).bit_length()
            self._keys, self._slots = np.zeros(size, np.uint64), np.zeros(size, np.int32)
        bucket = self._bucket(keys)
        while keys.size:
            free = self._keys[bucket] == 0
            self._keys[bucket[free]] = keys[free]  # of several for one bucket, one stays
            placed = free & (self._keys[bucket] == keys)
            self._slots[bucket[placed]] = slots[placed]
            keys, slots, bucket = keys[~placed], slots[~placed], (bucket[~placed] + 1) % len(self._keys)

    def _bucket(self, keys: Keys) -> Ints:
        """The first place to look for each key: its upper bits."""
        return (keys >> np.uint64(64 - (len(self._keys) - 1).bit_length())).astype(np.int64)


class SegmentMemory:
    """Remembers analyses, finds them by a 64-bit hash of a segment's ids and makes sure that the ids are the same.

    Two generations bound what is remembered: at `capacity` the younger becomes the elder, and what is not asked for
    again while the next one grows is forgotten.

    Args:
        analyse: Called with the segments that are not known, each once.
        size: Ids of the vocabulary.
        capacity: Student tokens of a generation (about 50 bytes each).
    """

    def __init__(self, analyse: Analyser, *, size: int, capacity: int = 1 << 20) -> None:
        self._analyse = analyse
        self.capacity = capacity
        self._id_keys = np.random.default_rng(0x70C3).integers(1, 1 << 63, size, dtype=np.uint64)
        # More places than most segments have. Beyond, ids far apart could change places unnoticed by the hash.
        self._place_keys = np.random.default_rng(0x91ACE).integers(1, 1 << 63, 1 << 12, dtype=np.uint64)
        self.forget()

    def forget(self) -> None:
        """Forget everything."""
        self.known, self._elder = _Store(), _Store()

    def look_up(self, ids: Ints, counts: Ints) -> tuple[Ints, Ints]:
        """Where what is known about segments lies, until the next call.

        Args:
            ids: `[M]` student ids of all segments.
            counts: `[S]` tokens of each.

        Returns:
            Slots `[S]` in `known`, and places `[M]` in its columns by student token.
        """
        if self.known.tokens > self.capacity:
            self.known, self._elder = _Store(), self.known
        keys = self._hash(ids, counts)
        slots = self.known.find(keys)
        missing = np.flatnonzero(slots < 0)
        if missing.size:
            self._learn(ids, counts, keys, missing)
            slots[missing] = self.known.find(keys[missing])
        return self._checked(ids, counts, slots)

    def _learn(self, ids: Ints, counts: Ints, keys: Keys, missing: Ints) -> None:
        """Find the segments `missing` in the elder generation, or analyse them."""
        new, first = np.unique(keys[missing], return_index=True)
        elder = self._elder.find(new)
        old = elder >= 0
        if old.any():
            self.known.index(new[old], self.known.append(self._elder.take(elder[old])))
        if not old.all():
            self.known.index(new[~old], self.known.append(self._fresh(ids, counts, missing[first[~old]])))

    def _fresh(self, ids: Ints, counts: Ints, segments: Ints) -> Analysis:
        starts = np.cumsum(counts) - counts
        return self._analyse(ids[ranges(starts[segments], counts[segments])], counts[segments])

    def _checked(self, ids: Ints, counts: Ints, slots: Ints) -> tuple[Ints, Ints]:
        """Slots and places after segments that share the hash of another have got an analysis of their own."""
        other = self.known["student_count"][slots] != counts
        places = ranges(self.known["student_start"][slots], np.where(other, 0, counts))
        asked = ids if not other.any() else ids[np.repeat(~other, counts)]
        if other.any() or not (self.known["ids"][places] == asked).all():
            segment = np.repeat(np.arange(len(counts)), np.where(other, 0, counts))
            other[segment[self.known["ids"][places] != asked]] = True
            slots[other] = self.known.append(self._fresh(ids, counts, np.flatnonzero(other)))
            places = ranges(self.known["student_start"][slots], counts)
        return slots, places

    def _hash(self, ids: Ints, counts: Ints) -> Keys:
        """A random number per id times one per place, summed; never 0."""
        starts = np.cumsum(counts) - counts
        places = (np.arange(len(ids)) - np.repeat(starts, counts)) % len(self._place_keys)
        return np.add.reduceat(self._id_keys[ids] * self._place_keys[places], starts) | np.uint64(1)


def split(values: bytes, counts: Sequence[int]) -> list[bytes]:
    """Consecutive pieces of the given lengths.

    >>> split(b"abcde", [2, 3])
    [b'ab', b'cde']
    """
    return [values[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]
