import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenalign as ta

FLOATS = [np.float16, np.float32, np.float64]

# Three teacher tokens are one student token, two are none.
VOCAB = ta.VocabMap(
    to_teacher=np.array([0, 1, 6, 2], np.int32), to_student=np.array([0, 1, 3, 1, -1, 1, 2, -1], np.int32)
)


def entries(ids: range) -> st.SearchStrategy[list[tuple[int, float]]]:
    logp = st.one_of(st.just(-np.inf), st.floats(-30, 0))
    return st.lists(st.tuples(st.sampled_from(ids), logp), max_size=10)


def as_arrays(entries: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([id for id, _ in entries], int), np.array([logp for _, logp in entries], float)


def slow_projection(entries: list[tuple[int, float]]) -> tuple[list[int], list[float], float]:
    """One entry after the other, in probabilities."""
    ids: list[int] = []
    mass: list[float] = []
    lost = 0.0
    for id, logp in entries:
        student = -1 if id < 0 else int(VOCAB.to_student[id])
        lost += np.exp(logp) * (student < 0)
        if student >= 0 and student in ids:
            mass[ids.index(student)] += np.exp(logp)
            student = -1
        ids.append(student)
        mass.append(0.0 if student < 0 else np.exp(logp))
    return ids, mass, lost


@given(entries(range(-1, 8)))
def test_projection_equals_a_slow_one(drawn):
    ids, logp, lost = ta.project_topk(VOCAB, *as_arrays(drawn))
    expected_ids, expected_mass, expected_lost = slow_projection(drawn)
    assert ids.tolist() == expected_ids
    np.testing.assert_allclose(np.exp(logp), expected_mass, rtol=1e-12)
    np.testing.assert_allclose(lost, expected_lost, rtol=1e-12)


@given(entries(range(-1, 8)))
def test_projection_keeps_or_loses_every_bit_of_mass(drawn):
    ids, logp = as_arrays(drawn)
    _, projected, lost = ta.project_topk(VOCAB, ids, logp)
    np.testing.assert_allclose(np.exp(projected).sum() + lost, np.exp(logp).sum(), rtol=1e-12)


@given(entries(range(-1, 8)))
def test_an_entry_is_empty_in_both_or_in_neither(drawn):
    ids, logp, _ = ta.project_topk(VOCAB, *as_arrays(drawn))
    assert (logp[ids < 0] == -np.inf).all()
    kept = ids[ids >= 0].tolist()
    assert len(set(kept)) == len(kept)


@given(entries(range(-1, 8)), st.lists(st.sets(st.integers(0, 7)), max_size=3))
def test_classes_hold_their_mass_at_the_first_member(drawn, sets):
    classes = [members - set().union(*sets[:index]) for index, members in enumerate(sets)]
    ids, logp = as_arrays(drawn)
    same, merged = ta.merge_class(logp, ids, classes)
    expected = np.exp(logp)
    for members in classes:
        places = [place for place, id in enumerate(ids.tolist()) if id in members]
        if places:
            total = expected[places].sum()
            expected[places] = 0
            expected[places[0]] = total
    assert same.tolist() == ids.tolist()
    np.testing.assert_allclose(np.exp(merged), expected, rtol=1e-12)


def test_a_merged_class_hides_which_member_a_model_prefers():
    ids, classes = np.array([5, 3, 9]), [{3, 9}]
    one, other = np.log([[0.5, 0.4, 0.1], [0.5, 0.1, 0.4]])
    assert ta.merge_class(one, ids, classes)[1].tolist() == pytest.approx(ta.merge_class(other, ids, classes)[1])
    assert not np.allclose(one, other)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4), (2, 0), (0,), (2, 0, 4)])
def test_shape_and_float_type_are_kept(shape, dtype):
    ids = np.arange(np.prod(shape)).reshape(shape) % 8
    logp = np.full(shape, np.log(0.125), dtype)
    projected, values, lost = ta.project_topk(VOCAB, ids, logp)
    same, merged = ta.merge_class(logp, ids, [{0, 1}, {5, 2}])
    assert projected.shape == values.shape == same.shape == merged.shape == shape
    assert lost.shape == shape[:-1]
    assert {values.dtype, merged.dtype, lost.dtype} == {np.dtype(dtype)}


@given(st.lists(entries(range(-1, 8)).map(lambda drawn: (drawn + [(-1, -np.inf)] * 10)[:10]), min_size=1, max_size=4))
def test_a_batch_equals_its_rows(drawn):
    rows = [as_arrays(row) for row in drawn]
    ids, logp = (np.stack(side) for side in zip(*rows, strict=True))
    classes = [{0, 4}, {1, 2, 3}]
    for result, one in [
        (ta.project_topk(VOCAB, ids, logp), [ta.project_topk(VOCAB, *row) for row in rows]),
        (ta.merge_class(logp, ids, classes), [ta.merge_class(row[1], row[0], classes) for row in rows]),
    ]:
        for part, parts in zip(result, zip(*one, strict=True), strict=True):
            assert part.tolist() == np.stack(parts).tolist()


def test_half_precision_is_summed_in_more():
    ids = np.full(1024, 1)
    _, logp, _ = ta.project_topk(VOCAB, ids, np.full(1024, np.log(2.0**-10), np.float16))
    assert abs(float(np.exp(logp[0].astype(float))) - 1) < 0.01


def test_a_pairs_own_map_carries_a_support_over(pair, base):
    text = base.encode("the train leaves").ids
    ids, _, lost = ta.project_topk(pair.vocab, text, np.log(np.full(len(text), 0.01)))
    assert (pair.vocab.to_teacher[ids] == text).all()
    assert lost == 0


@pytest.mark.parametrize(
    ("ids", "logp", "message"),
    [
        ([8], [-1.0], r"id 8 is below -1 or beyond the teacher's 8 ids"),
        ([-2], [-1.0], "id -2 is below -1"),
        ([1.0], [-1.0], "ids are float64, expected integers"),
        ([1], [-1], "logp is int64, expected log-probabilities"),
        ([1, 2], [-1.0], r"ids have shape \(2,\), logp has \(1,\)"),
        (1, -1.0, r"ids have shape \(\)"),
        ([[1], [1, 2]], [-1.0], "cannot be read as an array"),
    ],
)
def test_bad_supports_are_refused(ids, logp, message):
    with pytest.raises(ValueError, match=message):
        ta.project_topk(VOCAB, ids, logp)


@pytest.mark.parametrize(
    ("classes", "message"), [([{1}, {1, 2}], "id 1 is in two classes"), ([{-1, 2}], "classes hold id -1")]
)
def test_bad_classes_are_refused(classes, message):
    with pytest.raises(ValueError, match=message):
        ta.merge_class([-1.0], [1], classes)
