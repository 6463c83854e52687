import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kit import END, IM_END, Wrapped, byte_level, train_metaspace, with_tokens, words
from tokenizers import normalizers

import tokenalign as ta

texts = st.lists(st.sampled_from([*"aAbx é.", " the", "\n", "🙂", " think"]), min_size=1, max_size=10).map("".join)


@pytest.fixture(scope="module")
def cased():
    return byte_level()


@pytest.fixture(scope="module")
def lower():
    return byte_level(normalizer=normalizers.Lowercase())


@pytest.mark.parametrize("scheme", ["first", "always"])
@given(text=texts)
@settings(max_examples=30, deadline=None)
def test_a_dummy_prefix_is_no_difference_on_either_side(cased, scheme, text):
    prefixed = _prefixed(scheme)
    ids, theirs = cased.encode(text).ids, prefixed.encode(text, add_special_tokens=False).ids
    found = ta.Pair(cased, prefixed).align(ids, theirs)
    assert found.ok
    assert found.chunks.sum(axis=0).tolist() == [len(ids), len(theirs)]
    swapped = ta.Pair(prefixed, cased).align(theirs, ids)
    assert swapped.ok
    assert swapped.chunks[:, ::-1].tolist() == found.chunks.tolist()


def _prefixed(scheme, made={}):  # noqa: B006 (trained once)
    return made.setdefault(scheme, train_metaspace(scheme))


def test_a_lone_prefix_token_joins_the_first_chunk(cased):
    prefixed = _prefixed("first")
    theirs = prefixed.encode("🙃x", add_special_tokens=False).ids
    assert prefixed.id_to_token(theirs[0]) == "▁"
    found = ta.Pair(cased, prefixed).align(cased.encode("🙃x").ids, theirs)
    assert found.ok
    assert found.teacher_chunk[0] == 0
    assert (found.chunks >= 1).all()


def test_control_a_blank_where_no_tokenizer_puts_one_is_a_difference(cased):
    pair = ta.Pair(cased, train_metaspace("never"))
    theirs = train_metaspace("never").encode(" the", add_special_tokens=False).ids
    assert not pair.align(cased.encode("the").ids, theirs).ok


def test_turn_ends_and_changed_text_between_them(cased, lower):
    pair = ta.Pair(Wrapped(cased, IM_END), Wrapped(lower, END))
    ids = cased.encode("The Cat<|im_end|>And A<|im_end|>").ids
    theirs = lower.encode("The Cat<|end|>And A<|end|>").ids
    found = pair.align(ids, theirs)
    assert found.ok
    end = lower.token_to_id("<|end|>")
    places = [i for i, id in enumerate(theirs) if id == end]
    ours = [i for i, id in enumerate(ids) if id == cased.token_to_id("<|im_end|>")]
    assert found.teacher_chunk[places].tolist() == found.student_chunk[ours].tolist()
    assert not pair.align(ids, theirs[:-1]).ok


def test_control_tokens_stand_where_their_text_stands(cased, lower):
    pair = ta.Pair(cased, lower)
    text = "<|im_start|>User\nThe Cat"
    assert pair.align(cased.encode(text).ids, lower.encode(text).ids).ok
    assert not pair.align(cased.encode("User\nThe Cat").ids, lower.encode(text).ids).ok


def test_a_tag_that_is_special_only_on_one_side(cased, lower):
    special = with_tokens(lower, ["<think>"], special=True)
    pair = ta.Pair(cased, special)
    text = "A <think>The"
    found = pair.align(cased.encode(text).ids, special.encode(text).ids)
    assert found.ok
    assert special.token_to_id("<think>") in special.encode(text).ids


def test_words_are_the_same_text_whatever_blanks_stand_at_punctuation(cased):
    bert = words()
    pair = ta.Pair(cased, bert)
    for text in ["the train, leaves at 14:05", "it's <b>bold</b>", "The Café"]:
        found = pair.align(cased.encode(text).ids, bert.encode(text, add_special_tokens=False).ids)
        assert found.ok
        assert (found.chunks >= 1).all()


@given(st.lists(st.integers(4, 300), max_size=6), st.lists(st.integers(4, 300), max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_ids_fall_into_chunks_of_both_sides(cased, lower, ours, theirs):
    found = _pair(cased, lower).align(ours, theirs)
    if ours and theirs:
        assert found.chunks.sum(axis=0).tolist() == [len(ours), len(theirs)]
        assert (found.chunks >= 1).all()
    same = b"".join(_pair(cased, lower).student.pieces[id] for id in ours)
    if found.ok and b"\xff" not in same:
        assert same.decode(errors="replace").lower() == _text(lower, theirs).lower()


def _pair(cased, lower, made={}):  # noqa: B006 (built once)
    return made.setdefault(id(cased), ta.Pair(cased, lower))


def _text(tokenizer, ids):
    return ta.Pair(tokenizer, tokenizer).student.text(np.array(ids, int)).decode(errors="replace")
