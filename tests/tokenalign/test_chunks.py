import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokenalign.chunks import align_ends, chunk_sizes, common_ends, comparable_ends


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
    sizes = chunk_sizes(*align_ends(*comparable_ends(student.encode(), teacher.encode(), *ends)))
    assert sizes.sum(0).tolist() == [len(student), len(teacher)]
    assert (sizes >= 1).all()
