"""Strings that end an answer, against a search in the whole text after every token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import EchoEpisode, ScriptedEngine
from tiny import STUDENT_END, random_ids, tiny_model
from writing import engine_of

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.rollout import Sampling
from lsm_lightning.rollout.base import Request
from lsm_lightning.rollout.collect import Player, collect
from lsm_lightning.rollout.stops import StopStrings, stop_strings
from lsm_lightning.types import Completion

REQUESTS = [Request(ids=random_ids(seed, 5), seed=seed) for seed in range(24)]


def first_completed(pieces: list[bytes], ids: list[int], strings: list[str]) -> int | None:
    """The place of the token that completes a string, found the slow way."""
    text = b""
    for place, token in enumerate(ids):
        text += pieces[token]
        if any(string.encode() in text for string in strings):
            return place
    return None


@given(
    st.lists(st.binary(max_size=3).map(lambda piece: bytes(byte % 3 + 97 for byte in piece)), min_size=1, max_size=6),
    st.lists(st.integers(0, 5), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_token_that_completes_a_string_is_found(pieces, ids, strings):
    ids = [i % len(pieces) for i in ids]
    stops = StopStrings(pieces, strings)
    found = next((place for place in range(len(ids)) if stops.completed_by(ids[: place + 1])), None)
    assert found == first_completed(pieces, ids, strings)


def test_half_a_character_in_each_of_two_tokens(student_tokenizer):
    stops = stop_strings(student_tokenizer, ("é",))
    ids = student_tokenizer("é", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    assert [stops.completed_by(ids[:n]) for n in (1, 2)] == [False, True]


@pytest.mark.parametrize("stop", ["abc", [""], ["a", ""]])
def test_what_cannot_be_looked_for_is_refused(stop):
    with pytest.raises(ConfigurationError, match="list of strings, none of them empty"):
        Sampling(stop=stop)


def test_strings_need_a_tokenizer():
    with pytest.raises(ConfigurationError, match="give the engine a tokenizer"):
        engine_of(tiny_model()).generate(REQUESTS, Sampling(stop=["a"]), max_new_tokens=2, turn_end=frozenset())


def test_answers_end_where_their_text_comes_to_hold_a_string(student_tokenizer):
    """They are the beginnings of the answers without stops, up to the token that completes a string."""
    engine = engine_of(tiny_model(seed=1, initializer_range=0.1), batch_size=5)
    end = frozenset(range(0, 340, 20))
    settings = {"max_new_tokens": 40, "turn_end": end, "tokenizer": student_tokenizer}
    free = engine.generate(REQUESTS, Sampling(), **settings)
    stops = ["a", "th", "12"]
    stopped = engine.generate(REQUESTS, Sampling(stop=stops), **settings)
    pieces = [student_tokenizer.decode([i]).encode() for i in range(len(student_tokenizer))]
    for whole, answer in zip(free, stopped, strict=True):
        place = first_completed(pieces, list(whole.ids), stops)
        if place is None or whole.ids[place] in end:
            assert answer.ids == whole.ids
            assert (answer.stopped, answer.truncated) == (False, whole.truncated)
        else:
            assert answer.ids == whole.ids[: place + 1]
            assert (answer.stopped, answer.truncated) == (True, False)
        assert answer.log_probs == pytest.approx(whole.log_probs[: len(answer.ids)], abs=1e-5)
    kinds = {(answer.stopped, answer.truncated) for answer in stopped}
    assert kinds >= {(True, False), (False, False)}


def test_a_player_keeps_the_last_token_of_what_a_string_ended(student_tokenizer):
    ids = student_tokenizer("say apple", add_special_tokens=False)["input_ids"]
    asked = []

    class Engine(ScriptedEngine):
        def converse(self, conversations, sampling, *, tokenizer=None, **settings):
            asked.append((sampling.stop, tokenizer))
            super().converse(conversations, sampling, **settings)

    engine = Engine(lambda _: Completion(ids=ids, log_probs=[0.0] * len(ids), truncated=False, stopped=True))
    end = frozenset({student_tokenizer.convert_tokens_to_ids(STUDENT_END)})
    player = Player(engine=engine, tokenizer=student_tokenizer, turn_end=end, sampling=Sampling(stop=["apple"]))
    (trajectory,) = collect([((0,), EchoEpisode("apple", 2))], player, max_new_tokens=8)
    assert [turn.answer for turn in trajectory.turns] == ["say apple"] * 2
    assert asked == [(["apple"], student_tokenizer)]
