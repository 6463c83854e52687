from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenalign.chunks import align_ends, alignment, chunk_sizes, common_ends, comparable_ends


def ends_of(length: int) -> st.SearchStrategy[np.ndarray]:
    return st.sets(st.integers(1, length)).map(lambda cuts: np.array(sorted(cuts | {length})))


two_sides = st.integers(1, 40).flatmap(lambda length: st.tuples(ends_of(length), ends_of(length)))


def slow_chunks(student_ends: list[int], teacher_ends: list[int]) -> list[list[int]]:
    """Walk both sides to each shared end, one token at a time."""
    chunks, m, n = [], 0, 0
    for position in range(1, student_ends[-1] + 1):
        m, n = m + (position in student_ends), n + (position in teacher_ends)
        if position in student_ends and position in teacher_ends:
            chunks.append([m, n])
            m = n = 0
    return chunks


@given(two_sides)
def test_chunks_equal_a_slow_walk(sides):
    assert chunk_sizes(*align_ends(*sides)).tolist() == slow_chunks(*(side.tolist() for side in sides))


@given(two_sides)
def test_chunks_cover_every_token_of_both_sides(sides):
    sizes = chunk_sizes(*align_ends(*sides))
    assert sizes.sum(0).tolist() == [len(ends) for ends in sides]
    assert (sizes >= 1).all()


@given(st.integers(1, 40).flatmap(ends_of))
def test_aligning_with_itself_is_the_identity(ends):
    ours, theirs = align_ends(ends, ends)
    assert ours.tolist() == theirs.tolist() == list(range(len(ends)))


def test_a_token_without_bytes_joins_its_neighbour():
    student, teacher = align_ends(np.array([0, 2, 2, 5]), np.array([2, 5]))
    assert student.tolist() == [0, 0, 0, 1]
    assert teacher.tolist() == [0, 1]


@given(st.binary(max_size=8), st.binary(max_size=8), st.binary(max_size=8), st.binary(max_size=8))
def test_common_ends_are_common_and_do_not_overlap(head, left, right, foot):
    a, b = head + left + foot, head + right + foot
    prefix, suffix = common_ends(a, b)
    assert prefix >= len(head)
    assert prefix + suffix <= min(len(a), len(b))
    assert a[:prefix] == b[:prefix]
    assert a[len(a) - suffix :] == b[len(b) - suffix :]


@given(st.text("ab", min_size=1, max_size=12), st.text("ab", min_size=1, max_size=12))
def test_texts_that_differ_still_fall_into_chunks_of_both_sides(student, teacher):
    ends = [np.arange(1, len(text) + 1) for text in (student, teacher)]
    sizes = chunk_sizes(*align_ends(2 * ends[0], comparable_ends(student.encode(), teacher.encode(), ends[1])))
    assert sizes.sum(0).tolist() == [len(student), len(teacher)]
    assert (sizes >= 1).all()


def slow_starts(ends: list[list[int]]) -> list[list[int]]:
    """Every pair of positions before which both sides have written the same number of bytes."""
    before = [[0, *side[:-1]] for side in ends]
    return [[i, j] for i, left in enumerate(before[0]) for j, right in enumerate(before[1]) if left == right]


@given(two_sides)
def test_a_chunk_starts_where_both_sides_have_read_the_same_text(sides):
    found = alignment(*align_ends(*sides), ok=True)
    assert found.starts.tolist() == slow_starts([side.tolist() for side in sides])


def test_starts_skip_what_is_no_text():
    found = alignment(np.array([-1, 0, 0, -1, 1, -1]), np.array([-1, -1, 0, 1]), ok=True)
    assert found.starts.tolist() == [[1, 2], [4, 3]]


class ByteModel:
    """A distribution over texts: each byte depends on the sum of those before it. Tokens inherit it."""

    def __init__(self, seed: int) -> None:
        logits = np.random.default_rng(seed).normal(size=(7, 256))
        self.logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def of(self, text: bytes, start: int, end: int) -> float:
        """Log-probability of a stretch of a text, given what stands before it."""
        return sum(self.logp[sum(text[:place]) % 7, text[place]] for place in range(start, end))

    def of_tokens(self, text: bytes, ends: np.ndarray) -> list[float]:
        return [self.of(text, start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


STUDENT, TEACHER = ByteModel(1), ByteModel(2)


@given(two_sides, st.integers(0, 1000))
def test_log_ratios_are_those_of_the_chunks_texts(sides, seed):
    text = np.random.default_rng(seed).bytes(int(sides[0][-1]))
    found = alignment(*align_ends(*sides), ok=True)
    ratios = found.log_ratios(STUDENT.of_tokens(text, sides[0]), TEACHER.of_tokens(text, sides[1]))
    shared = sorted({0} | (set(sides[0].tolist()) & set(sides[1].tolist())))
    expected = [TEACHER.of(text, a, b) - STUDENT.of(text, a, b) for a, b in pairwise(shared)]
    np.testing.assert_allclose(ratios, expected, atol=1e-9)
    # They telescope: the sum is the text's log-ratio, however the two split it.
    np.testing.assert_allclose(ratios.sum(), TEACHER.of(text, 0, len(text)) - STUDENT.of(text, 0, len(text)), atol=1e-9)


def test_control_chunks_of_another_text_have_another_ratio():
    ends = [np.array([1, 3]), np.array([2, 3])]
    logp = STUDENT.of_tokens(b"abc", ends[0]), TEACHER.of_tokens(b"abd", ends[1])
    ratio = alignment(*align_ends(*ends), ok=True).log_ratios(*logp).sum()
    assert abs(ratio - (TEACHER.of(b"abc", 0, 3) - STUDENT.of(b"abc", 0, 3))) > 0.01


def test_tokens_in_no_chunk_have_no_say():
    found = alignment(np.array([-1, 0, -1]), np.array([0, 0]), ok=True)
    assert found.log_ratios([np.nan, -1.0, -np.inf], [-0.25, -0.25]).tolist() == [0.5]


def test_log_ratios_want_one_number_per_token():
    found = alignment(np.array([0, 0]), np.array([0]), ok=True)
    with pytest.raises(ValueError, match=r"student_logp has shape \(1,\), expected one number per token: \(2,\)"):
        found.log_ratios([-1.0], [-1.0])
