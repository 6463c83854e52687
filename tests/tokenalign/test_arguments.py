import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kit import TAGS

import tokenalign as ta
from tokenalign import Flag

INTEGERS = [np.dtype(kind + size) for kind in "iu" for size in "1248"]
TEXT = "the <think>train</think> leaves<|im_end|>"


class Wrapped:
    """An array of another library."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return self._values


class OnAnotherDevice:
    def __repr__(self) -> str:
        return "ids on another device"

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError("copy it to main memory first")


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_of_every_type_mean_the_same(pair, base, dtype):
    ids = np.array([[id for id in base.encode(TEXT).ids if id < 128]])
    expected = pair.flags(ids)
    assert pair.flags(ids.astype(dtype)).bits.tolist() == expected.bits.tolist()
    assert pair.align(ids[0].astype(dtype), ids[0].astype(dtype)).chunks.tolist() == [[1, 1]] * ids.size
    assert ta.canonical(base, ids.astype(dtype)).tolist() == ta.canonical(base, ids).tolist()
    assert ta.tag_spans(base, ids.astype(dtype), ["th"]) == ta.tag_spans(base, ids, ["th"])
    assert pair.to_teacher(ids.astype(dtype)).ids[0].tolist() == pair.to_teacher(ids).ids[0].tolist()


def test_lists_arrays_and_wrapped_arrays_mean_the_same(pair, base):
    ids = np.array([base.encode(TEXT).ids] * 2)
    mask = np.arange(ids.size).reshape(ids.shape) % 3 > 0
    expected = pair.flags(ids, mask).bits.tolist()
    big_endian_and_strided = np.repeat(ids, 2, axis=1)[:, ::2].astype(">i4")
    for form in (ids.tolist(), Wrapped(ids), np.asfortranarray(ids), big_endian_and_strided):
        assert pair.flags(form, mask).bits.tolist() == expected
    for form in (mask.tolist(), mask.astype(int).tolist(), mask.astype(np.float32), Wrapped(mask)):
        assert pair.flags(ids, form).bits.tolist() == expected


@given(st.lists(st.integers(0, 400), max_size=20), st.data())
def test_one_row_is_a_batch_of_one(pair, base, row, data):
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
    one, batch = pair.flags(row, mask), pair.flags([row], None if mask is None else [mask])
    assert one.bits.shape == (len(row),)
    assert one.bits.tolist() == batch.bits[0].tolist()
    for policy in ("paper", "tags", "canonical", "strict"):
        assert one.keep(policy).tolist() == batch.keep(policy)[0].tolist()
    assert one.count() == batch.count()
    spelled, spelled_batch = pair.to_teacher(row, mask), pair.to_teacher([row], None if mask is None else [mask])
    assert [ids.tolist() for ids in spelled.ids] == [ids.tolist() for ids in spelled_batch.ids]
    assert len(spelled.alignments) == 1
    assert spelled.alignments[0].student_chunk.tolist() == spelled_batch.alignments[0].student_chunk.tolist()
    assert ta.tag_spans(base, row, TAGS) == ta.tag_spans(base, [row], TAGS)


@pytest.mark.parametrize("shape", [(0,), (0, 0), (0, 3), (3, 0)])
def test_nothing_at_all_is_an_ordinary_input(pair, base, shape):
    ids = np.zeros(shape, int)
    rows = 1 if len(shape) == 1 else shape[0]
    flags = pair.flags(ids, np.zeros(shape, bool))
    assert flags.keep("paper").shape == flags.bits.shape == shape
    assert set(flags.count().values()) == {0}
    assert ta.canonical(base, ids).shape == shape
    assert ta.tag_spans(base, ids, TAGS) == [[]] * rows
    spelled = pair.to_teacher(ids)
    assert [len(row) for row in spelled.ids] == [0] * rows
    assert [row.chunks.shape for row in spelled.alignments] == [(0, 2)] * rows
    assert pair.flags(ids.tolist()).bits.size == 0


def test_a_row_of_padding_only(pair, base):
    ids = np.array([base.encode("the train").ids, [0] * len(base.encode("the train").ids)])
    flags = pair.flags(ids)
    assert flags.has(Flag.PAD).all(axis=1).tolist() == [False, True]
    assert not flags.keep("paper")[1].any()
    assert len(pair.to_teacher(ids).ids[1]) == 0
    assert pair.to_teacher(ids).alignments[1].student_chunk.tolist() == [-1] * ids.shape[1]


def test_a_row_that_ends_inside_a_character(pair, base):
    ids = base.encode("the 🙂").ids[:-1]
    flags = pair.flags(ids)
    assert flags.has(Flag.INVALID_UTF8)[-1]
    assert not flags.has(Flag.INVALID_UTF8)[0]
    assert b"".join(pair.teacher.pieces[id] for id in pair.to_teacher(ids).ids[0]) == pair.student.text(np.array(ids))


def test_flags_do_not_change_with_the_callers_array(pair, base):
    ids = np.array([base.encode(TEXT).ids], np.int32)
    flags = pair.flags(ids)
    before = flags.keep("paper").tolist()
    ids[:] = 0
    assert flags.keep("paper").tolist() == before


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1.0, 2.0]], "ids are float64, expected integers of at most 64 bits, not .*1.0"),
        ([[True, False]], "ids are bool, expected integers"),
        (["the"], "ids are <U3, expected integers"),
        ("the", "ids are <U3, expected integers"),
        ([[2**80]], f"ids are object, expected integers of at most 64 bits, not {2**80}"),
        ([[None]], "ids are object, expected integers"),
        ([[1, 2], [3]], "ids cannot be read as an array"),
        (OnAnotherDevice(), "copy it to main memory first"),
        ([[[1]]], r"ids have shape \(1, 1, 1\), expected \[B, T\] or one row \[T\]"),
        (1, r"ids have shape \(\)"),
        ([[1, -1]], "id -1 is outside the tokenizer's 0..401. Pad with the pad token"),
        (np.array([[2**63]], np.uint64), f"id {2**63} is outside"),
    ],
    ids=str,
)
def test_bad_ids_are_refused_everywhere(pair, base, ids, message):
    calls = [
        lambda: pair.flags(ids),
        lambda: pair.to_teacher(ids),
        lambda: ta.canonical(base, ids),
        lambda: ta.tag_spans(base, ids, TAGS),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_align_takes_one_text(pair):
    with pytest.raises(ValueError, match=r"ids have shape \(1, 2\), expected one text \[N\]"):
        pair.align([[1, 2]], [1, 2])
    with pytest.raises(ValueError, match="ids are float64"):
        pair.align([1, 2], [1.5])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True, False], r"response_mask has shape \(2,\), ids have \(1, 2\)"),
        ([[True]], r"response_mask has shape \(1, 1\)"),
        (True, r"response_mask has shape \(\)"),
        ([[2, 0]], "values other than 0 and 1, such as 2"),
        ([[0.5, 0]], "such as 0.5"),
        ([[np.nan, 0]], "such as nan"),
        ([["a", "b"]], "response_mask is <U1, expected booleans"),
        ([[None, True]], "response_mask is object, expected booleans"),
        ([[True], [True, False]], "response_mask cannot be read as an array"),
    ],
    ids=str,
)
def test_bad_masks_are_refused(pair, mask, message):
    for call in (pair.flags, pair.to_teacher):
        with pytest.raises(ValueError, match=message):
            call([[1, 2]], mask)
