"""The package against the slow reference, on streams that hypothesis draws and shrinks."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import reference
from agreement import CASES, Case, check
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference, Side
from streams import SNIPPETS

import tokenalign as ta
from tokenalign import Flag


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]()


@pytest.fixture(scope="module")
def pair(case: Case) -> ta.Pair:
    return case.pair()


def spelled_anyhow(case: Case, text: str, choices: Sequence[int]) -> list[int]:
    """A text in the student's tokens, in the segmentation that the choices lead to."""
    streams, ids, left = case.streams, [], text.encode()
    for turn in range(len(left)):
        fits = [id for id in streams.starting[left[:1]] if left.startswith(streams.pieces[id])]
        if fits:
            ids.append(fits[choices[turn % len(choices)] % len(fits)])
        left = left[len(streams.pieces[ids[-1]]) if fits else 1 :]
        if not left:
            break
    return ids


def rows(case: Case) -> st.SearchStrategy[list[int]]:
    """Any ids; or texts, control tokens and padding in any segmentation."""
    size = len(case.student.pieces)
    any_ids = st.lists(st.integers(0, size - 1), max_size=8)
    choices = st.lists(st.integers(0, 99), min_size=1, max_size=6)
    text = st.lists(st.sampled_from(SNIPPETS) | st.characters(codec="utf-8"), max_size=5).map("".join)
    part = st.builds(lambda text, choices: spelled_anyhow(case, text, choices), text, choices) | any_ids
    pad = st.integers(0, 3).map(lambda count: [] if case.student.pad is None else [case.student.pad] * count)
    end = st.sampled_from([[], *([id] for id in case.student.ends)])
    return st.tuples(pad, part, end, part, pad).map(lambda parts: [id for part in parts for id in part])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_flags_policies_and_the_teachers_text_agree(case, pair, data):
    row = data.draw(rows(case))
    mask = data.draw(st.just([True] * len(row)) | st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
    check(case, pair, [row], [mask])


@pytest.mark.parametrize("name", ["blanks taken along", "blanks taken along by the student"])
@pytest.mark.parametrize("blank", [" ", "\t\n", "\x85", "\u2003", "\x1c", "\x1f "])
def test_what_is_taken_along_agrees_for_any_blank(name, blank):
    case = CASES[name]()
    row = case.student.tokenizer.encode(f"a{blank}ink 42{blank}<x>{blank}b", add_special_tokens=False).ids
    check(case, case.pair(), [row], [[True] * len(row)])


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_tag_spans_agree(case, data):
    row = [id for id in data.draw(rows(case)) if id < len(case.student.pieces) - case.student.surplus]
    tags = ["<think>", "</think>", "a", "é", "\n\n", "  ", " the"]
    assert ta.tag_spans(case.student.tokenizer, [row], tags) == [reference.tag_spans(case.student, row, tags)]


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_canonical_agrees(case, data):
    """A tokenizer beside itself, without conventions."""
    row = [id for id in data.draw(rows(case)) if id < len(case.student.pieces) - case.student.surplus]
    bare = Side(tokenizer=case.student.tokenizer, marked=case.student.marked)
    expected = Reference(bare, bare).row(row)
    if not expected.changed:
        assert ta.canonical(case.student.tokenizer, row).tolist() == [not b & Flag.NONCANONICAL for b in expected.bits]


def test_vocabularies_agree(case, pair):
    expected = case.reference
    assert pair.vocab.to_teacher.tolist() == expected.to_teacher
    assert pair.vocab.to_student.tolist() == expected.to_student
    assert pair.collisions.tolist() == expected.collisions
    assert pair.tags == reference.TAGS


def test_conventions_are_those_that_the_test_gave(case, pair):
    for found, side in zip(pair.conventions, (case.student, case.teacher), strict=True):
        assert (found.turn_end, found.own_turn_end, found.pad) == (side.ends, side.own_end, side.pad)


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_aligning_with_the_teachers_text_agrees(case, pair, data):
    """Where the teacher's bytes are the student's, `align` cuts both where both end."""
    row = [id for id in data.draw(rows(case)) if not case.student.special(id) and id not in case.student.ends]
    text = b"".join(case.student.pieces[id] for id in row)
    spelled = reference.spell(case.teacher, text, reference.TAGS)
    found = pair.align(row, spelled.ids)
    ours, theirs = (
        [sum(len(side.pieces[id]) for id in ids[: place + 1]) for place in range(len(ids))]
        for side, ids in ((case.student, row), (case.teacher, spelled.ids))
    )
    if b"".join(case.teacher.pieces[id] for id in spelled.ids) == text:
        assert found.ok
        assert found.teacher_chunk.tolist() == reference.walk(theirs, ours)
        assert [chunk for chunk in found.student_chunk.tolist() if chunk >= 0] == reference.walk(
            [end for end, id in zip(ours, row, strict=True) if case.student.pieces[id]], theirs
        )


def support(size: int) -> st.SearchStrategy[tuple[list[int], list[float]]]:
    entry = st.tuples(st.integers(-1, size - 1), st.floats(-30, 0) | st.just(-math.inf))
    return st.lists(entry, max_size=8).map(lambda entries: ([id for id, _ in entries], [logp for _, logp in entries]))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_supports_are_carried_over_alike(case, pair, data):
    ids, logp = data.draw(support(len(case.teacher.pieces)))
    found_ids, found_logp, lost = ta.project_topk(pair.vocab, ids, np.array(logp, np.float64))
    expected_ids, expected_logp, expected_lost = reference.project_topk(case.reference.to_student, ids, logp)
    assert found_ids.tolist() == expected_ids
    np.testing.assert_allclose(found_logp, expected_logp, rtol=1e-9, atol=1e-12)
    assert float(lost) == pytest.approx(expected_lost, rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(support(12), st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_classes_are_merged_alike(given_support, class_of):
    ids, logp = given_support
    classes = [{id for id, own in enumerate(class_of) if own == number} for number in range(3)]
    found_ids, found = ta.merge_class(np.array(logp, np.float64), ids, classes)
    assert found_ids.tolist() == ids
    np.testing.assert_allclose(found, reference.merge_class(logp, ids, classes), rtol=1e-9, atol=1e-12)


def test_control_a_wrong_flag_is_noticed(monkeypatch):
    case = CASES["tags whole, turns ended otherwise"]()
    row = case.student.tokenizer.encode("a<think>b").ids
    check(case, case.pair(), [row], [[True] * len(row)])
    monkeypatch.setattr(reference, "occurrences", lambda text, tag: [])
    with pytest.raises(AssertionError, match=rf"expected <Flag.{Flag.NONCANONICAL.name}"):
        check(case, case.pair(), [row], [[True] * len(row)])


def test_control_another_spelling_is_noticed():
    """Against a reference that reads each row as the start of a text."""
    case = CASES["byte-level to marked"]()
    case.teacher.encoder.pre_tokenizer.prepend_scheme = "first"
    row = case.student.tokenizer.encode("think").ids
    with pytest.raises(AssertionError):
        check(case, case.pair(), [row], [[True] * len(row)])
