"""Top-K supports: some tokens of a next-token distribution and their log-probabilities, in nats.

An entry that holds no token has id -1 and log-probability -inf.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenalign.arguments import as_array, integers
from tokenalign.chunks import Ints
from tokenalign.relation import VocabMap

Floats = NDArray[Any]
"""float16, float32 or float64."""


def project_topk(vocab: VocabMap, ids: ArrayLike, logp: ArrayLike) -> tuple[Ints, Floats, Floats]:
    """Carry a teacher's support over to the student's vocabulary.

    A local comparison of two models looks only at the teacher's most likely tokens (arXiv 2603.25562); where the two
    vocabularies differ, that is at those which the student has as well.

    Args:
        vocab: `Pair.vocab`.
        ids: `[..., K]` teacher ids, -1 for none.
        logp: `[..., K]` their log-probabilities.

    Returns:
        Student ids `[..., K]`, -1 where the student has no such token; their log-probabilities `[..., K]`, -inf there;
        and `[...]` the probability of the entries without a student token. What lies outside the K entries is not
        counted. Teacher tokens of equal bytes are one student token: the first of them holds the sum, the others are
        empty, and nothing is lost. Floats keep the type of `logp` and are summed in float64.

    Raises:
        ValueError: An id is below -1 or beyond the teacher's vocabulary, or the two arrays do not fit together.

    >>> vocab = VocabMap(to_teacher=np.array([2, 0], np.int32), to_student=np.array([1, -1, 0], np.int32))
    >>> ids, logp, lost = project_topk(vocab, [2, 1, 0], np.log([0.5, 0.25, 0.125]))
    >>> ids.tolist(), np.exp(logp).round(3).tolist(), lost.item()
    ([0, -1, 1], [0.5, 0.0, 0.125], 0.25)
    """
    places, values = _support(ids, logp, size=len(vocab.to_student))
    mapped = np.append(vocab.to_student, -1).astype(np.int64)[places]
    lost = np.exp(np.where(mapped < 0, values, -np.inf), dtype=np.float64).sum(axis=-1)
    merged, first = _merged(values, mapped)
    return (
        np.where(first, mapped, -1),
        np.where(first & (mapped >= 0), merged, -np.inf).astype(values.dtype),
        lost.astype(values.dtype),
    )


def merge_class(logp: ArrayLike, ids: ArrayLike, classes: Sequence[Collection[int]]) -> tuple[Ints, Floats]:
    """Score tokens that mean the same, such as all end-of-turn tokens, as one.

    Called with the log-probabilities of either model at the same ids, it puts the mass of a class at the same entry of
    both, so that a comparison no longer sees which member a model prefers. Only members that the support holds count.

    Args:
        logp: `[..., K]` log-probabilities.
        ids: `[..., K]` their tokens, -1 for none.
        classes: Sets of ids, no id in two of them, e.g. `[pair.conventions[0].turn_end]`.

    Returns:
        The ids `[..., K]`, unchanged, and log-probabilities `[..., K]`: the first entry of each class present holds the
        log of its summed probability, its other entries -inf. Floats keep the type of `logp`.

    Raises:
        ValueError: An id of a class is negative or in two classes, or the two arrays do not fit together.

    >>> ids, logp = merge_class(np.log([0.5, 0.25, 0.125]), [7, 3, 9], [{3, 9}])
    >>> ids.tolist(), np.exp(logp).round(3).tolist()
    ([7, 3, 9], [0.5, 0.375, 0.0])
    """
    tokens, values = _support(ids, logp, size=None)
    members, groups = _members(classes)
    at = np.searchsorted(members, tokens)
    found = np.append(members, -1)[at] == tokens
    merged, first = _merged(values, np.where(found & (tokens >= 0), np.append(groups, -1)[at], -1))
    return tokens, np.where(first, merged, -np.inf).astype(values.dtype)


def _members(classes: Sequence[Collection[int]]) -> tuple[Ints, Ints]:
    """All ids of all classes, ascending, and the class of each."""
    listed = [(int(id), group) for group, members in enumerate(classes) for id in set(members)]
    members, groups = np.array(sorted(listed), np.int64).reshape(-1, 2).T
    if (members < 0).any():
        raise ValueError(f"classes hold id {members[0]}, which is no token. Remove it.")
    twice = members[1:][members[1:] == members[:-1]]
    if twice.size:
        raise ValueError(f"id {twice[0]} is in two classes. Join them or remove it from one.")
    return members, groups


def _support(ids: ArrayLike, logp: ArrayLike, *, size: int | None) -> tuple[Ints, Floats]:
    tokens, values = integers(ids, "ids"), as_array(logp, "logp")
    if values.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"logp is {values.dtype}, expected log-probabilities as float16, float32 or float64.")
    if tokens.shape != values.shape or not tokens.ndim:
        raise ValueError(f"ids have shape {tokens.shape}, logp has {values.shape}. Give both as [..., K].")
    wrong = tokens[(tokens < -1) | (tokens >= (np.inf if size is None else size))]
    if wrong.size:
        limit = "" if size is None else f" or beyond the teacher's {size} ids (see Pair(..., teacher_size=))"
        raise ValueError(f"id {wrong[0]} is below -1{limit}. Use -1 for no token.")
    return tokens.astype(np.int64), values


def _merged(values: Floats, groups: Ints) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log of the summed probability over the entries of equal group along the last axis, at the first of them.

    The second result is True at these first entries. Entries of group -1 stand for themselves.
    """
    order = np.argsort(groups, axis=-1, kind="stable")
    sorted_groups = np.take_along_axis(groups, order, axis=-1)
    opens = np.ones(groups.shape, bool)
    opens[..., 1:] = (sorted_groups[..., 1:] != sorted_groups[..., :-1]) | (sorted_groups[..., 1:] < 0)
    totals = np.zeros(groups.shape)
    sorted_values = np.take_along_axis(values, order, axis=-1).astype(np.float64)
    totals[opens] = np.logaddexp.reduceat(sorted_values.ravel(), np.flatnonzero(opens))
    merged, first = np.empty_like(totals), np.empty_like(opens)
    np.put_along_axis(merged, order, totals, axis=-1)
    np.put_along_axis(first, order, opens, axis=-1)
    return merged, first
