"""How two vocabularies are related."""

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tokenalign.vocabulary import Vocabulary


class Relation(StrEnum):
    """From the same tokenizer to two that share nothing but text."""

    IDENTICAL = "identical"
    """Every id means the same and every text is split the same."""
    SHARED_BASE = "shared base"
    """The ordinary ids mean the same, the added tokens differ."""
    SHARED_VOCAB_OTHER_SPLIT = "shared vocabulary, other split"
    """Every id means the same, but some texts are split otherwise."""
    DIFFERENT = "different"
    """The ids of one side mean nothing to the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabMap:
    """Ids with equal bytes and equal role (text or control token); of several the same id, or else the lowest."""

    to_teacher: NDArray[np.int32]
    """`[V_s]` teacher id, -1 for none."""
    to_student: NDArray[np.int32]
    """`[V_t]` student id, -1 for none."""

    @staticmethod
    @lru_cache(maxsize=4)
    def between(student: Vocabulary, teacher: Vocabulary) -> "VocabMap":
        """The map between two vocabularies, read-only; the last few are remembered."""
        same = np.flatnonzero(_same(student, teacher))
        both_ways = _one_way(student, teacher, same), _one_way(teacher, student, same)
        for mapped in both_ways:
            mapped.setflags(write=False)
        return VocabMap(to_teacher=both_ways[0], to_student=both_ways[1])


def _one_way(source: Vocabulary, target: Vocabulary, same: NDArray[np.int64]) -> NDArray[np.int32]:
    lowest = {key: id for id, key in reversed([*enumerate(target.keys)]) if key[0]}
    mapped = np.fromiter((lowest.get(key, -1) for key in source.keys), np.int32, source.size)
    mapped[same] = same
    return mapped


def _same(student: Vocabulary, teacher: Vocabulary) -> NDArray[np.bool_]:
    """For each id below the smaller size: is it a token on both sides, with equal bytes and role?"""
    pairs = zip(student.keys, teacher.keys, strict=False)
    return np.fromiter((bool(a[0]) and a == b for a, b in pairs), bool, min(student.size, teacher.size))


@lru_cache(maxsize=4)
def collisions(student: Vocabulary, teacher: Vocabulary) -> NDArray[np.int64]:
    """Ids that are a token on both sides, with other bytes or another role; read-only, the last few are remembered."""
    size = min(student.size, teacher.size)
    both = (student.lengths[:size] > 0) & (teacher.lengths[:size] > 0)
    found = np.flatnonzero(both & ~_same(student, teacher))
    found.setflags(write=False)
    return found


@lru_cache(maxsize=4)
def relation(student: Vocabulary, teacher: Vocabulary) -> Relation:
    """How two vocabularies are related, by their tables and the rules by which they split."""
    if student.keys[: student.known] == teacher.keys[: teacher.known]:
        return Relation.IDENTICAL if student.kind.rules == teacher.kind.rules else Relation.SHARED_VOCAB_OTHER_SPLIT
    return Relation.SHARED_BASE if _base(student, teacher) == _base(teacher, student) else Relation.DIFFERENT


def _base(vocabulary: Vocabulary, other: Vocabulary) -> dict[int, bytes]:
    """The tokens that neither side added."""
    added = vocabulary.added.keys() | other.added.keys()
    return {id: piece for id, piece in enumerate(vocabulary.pieces) if piece and id not in added}
