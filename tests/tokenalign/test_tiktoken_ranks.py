import json

import pytest
import tokenizer_kit as kit
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenalign as ta
from tokenalign import Flag, Relation

tiktoken = pytest.importorskip("tiktoken")


@pytest.fixture(scope="module")
def encoding():
    return kit.train_tiktoken()


@pytest.fixture(scope="module")
def own(encoding) -> ta.Pair:
    return ta.Pair(encoding, encoding)


@given(text=st.text(st.sampled_from([*" \nabtheйé東🙂'1<|end|>"]), max_size=30))
@settings(max_examples=100, deadline=None)
def test_spelling_is_the_librarys(encoding, own, text):
    assert own.spellers[0].spell([text.encode()])[0] == encoding.encode_ordinary(text)
    assert not own.flags(encoding.encode_ordinary(text)).has(Flag.NONCANONICAL).any()


def test_control_tokens_and_holes(encoding, own):
    end = encoding.encode_single_token("<|endoftext|>")
    assert own.conventions[0].turn_end == {end}
    assert own.student.special[end]
    gap = tiktoken.Encoding(
        "gap", pat_str=kit.LLAMA_SPLIT, mergeable_ranks=kit.ranks(), special_tokens={"<|end|>": len(kit.ranks()) + 5}
    )
    pair = ta.Pair(gap, encoding)
    assert pair.student.pieces[len(kit.ranks())] == b""
    assert pair.flags([len(kit.ranks())]).has(Flag.UNMAPPED).all()


def test_a_control_token_that_is_a_tag_is_text(encoding):
    special = {"<think>": len(kit.ranks())}
    tagged = tiktoken.Encoding("t", pat_str=kit.LLAMA_SPLIT, mergeable_ranks=kit.ranks(), special_tokens=special)
    pair = ta.Pair(encoding, tagged)
    assert pair.relation is Relation.SHARED_BASE
    assert special["<think>"] in pair.to_teacher(encoding.encode_ordinary("a<think> b")).ids[0]


def test_another_pattern_is_another_split(encoding, own):
    other = tiktoken.Encoding(
        "o", pat_str=r"\s*\S+|\s+", mergeable_ranks=kit.ranks(), special_tokens=dict(encoding._special_tokens)
    )
    assert ta.Pair(encoding, other).relation is Relation.SHARED_VOCAB_OTHER_SPLIT
    assert own.relation is Relation.IDENTICAL


def saved(folder, **more):
    (folder / "tekken.json").write_text(json.dumps(kit.tekken(**more)))
    return folder


def test_tekken_numbers_control_tokens_first(tmp_path):
    pair = ta.Pair(saved(tmp_path), tmp_path)
    pieces = pair.student.pieces
    assert pieces[:4] == [b"<unk>", b"<s>", b"</s>", b"[INST]"]
    assert pieces[20:25] == [b"<SPECIAL_20>", b"<SPECIAL_21>", b"<SPECIAL_22>", b"<SPECIAL_23>", b"\x00"]
    assert len(pieces) == 24 + len(kit.ranks()) - 1
    assert pair.conventions[0].turn_end == {2}
    assert pair.conventions[0].pad == 11
    assert (pair.student.special == [True] * 24 + [False] * (len(pieces) - 24)).all()


def test_tekken_that_lists_its_control_tokens(tmp_path):
    listed = [{"rank": id, "token_str": text, "is_control": True} for id, text in enumerate(["<s>", "<end>"])]
    pieces = ta.Pair(saved(tmp_path, special_tokens=listed), tmp_path).student.pieces
    assert pieces[:4] == [b"<s>", b"<end>", b"<SPECIAL_2>", b"<SPECIAL_3>"]
