"""Scoring in a thread gives what scoring afterwards gives."""

import threading
from dataclasses import fields, replace

import pytest
import torch
from teachers import K, nothing_added

from lsm_lightning.teacher import LocalTeacher
from lsm_lightning.teacher.ahead import ScoringAhead
from lsm_lightning.types import Support


@pytest.fixture
def teacher(teacher_folder, student_tokenizer) -> LocalTeacher:
    teacher = LocalTeacher(str(teacher_folder), dtype="float32")
    teacher.setup(student_tokenizer, vocabulary=340, respell=True, tokens=K, device=torch.device("cpu"))
    return teacher


def test_turns_in_another_order_get_their_own_supports(teacher, turns):
    whole = teacher.score(turns, nothing_added(turns))
    with ScoringAhead(lambda part: teacher.score(part, nothing_added(part)), teacher.cancel) as ahead:
        ahead.submit(turns[5:])
        ahead.submit([])
        ahead.submit(turns[:5])
        support = ahead.result(turns)
    for field in fields(Support):
        ours, theirs = getattr(support, field.name), getattr(whole, field.name)
        assert torch.equal(ours, theirs) if ours.dtype != torch.float32 else torch.allclose(ours, theirs, atol=1e-5)
    first = len(turns[0].completion.ids)
    with pytest.raises(AssertionError):  # the control: without putting them in order
        torch.testing.assert_close(support.log_probs[:first], support.log_probs[-first:])


def test_equal_turns_are_told_apart(teacher, turns):
    twice = [turns[1], replace(turns[1])]
    with ScoringAhead(lambda part: teacher.score(part, nothing_added(part)), teacher.cancel) as ahead:
        ahead.submit(twice)
        assert len(ahead.result(twice).ids) == 2 * len(turns[1].completion.ids)


def test_no_turns_are_an_empty_support(teacher):
    with ScoringAhead(lambda part: teacher.score(part, nothing_added(part)), teacher.cancel) as ahead:
        assert len(ahead.result([]).ids) == 0


def test_the_student_writes_on_meanwhile(turns, teacher):
    may_score = threading.Event()

    def score(part):
        assert may_score.wait(30)
        return teacher.score(part, nothing_added(part))

    with ScoringAhead(score, teacher.cancel) as ahead:
        ahead.submit(turns[:2])
        ahead.submit(turns[2:])
        may_score.set()  # not reached, if submit waited
        ahead.result(turns)


def test_what_is_handed_in_meanwhile_is_scored_in_one_go(turns, teacher):
    may_score, begun, sizes = threading.Event(), threading.Event(), []

    def score(part):
        sizes.append(len(part))
        begun.set()
        assert may_score.wait(30)
        return teacher.score(part, nothing_added(part))

    with ScoringAhead(score, teacher.cancel) as ahead:
        ahead.submit(turns[:1])
        assert begun.wait(30)
        for turn in turns[1:4]:
            ahead.submit([turn])
        may_score.set()
        support = ahead.result(turns[:4])
    assert sizes == [1, 3]
    assert len(support.ids) == sum(len(turn.completion.ids) for turn in turns[:4])


def test_what_goes_wrong_is_raised_where_the_supports_are_wanted(turns):
    def score(part):
        raise ConnectionError("gone")

    with ScoringAhead(score, lambda: None) as ahead:
        ahead.submit(turns)
        with pytest.raises(ConnectionError, match="gone"):
            ahead.result(turns)


def test_an_error_in_the_block_does_not_wait_for_what_is_being_scored(turns):
    begun, cancelled = threading.Event(), threading.Event()

    def score(_part):
        begun.set()
        assert cancelled.wait(30)
        raise RuntimeError("given up")

    def interrupted() -> None:
        with ScoringAhead(score, cancelled.set) as ahead:
            ahead.submit(turns)
            assert begun.wait(30)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scoring")]
