import json

import numpy as np
import pytest
import tokenizer_kit as kit
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenalign as ta
from tokenalign import Flag, Relation

sentencepiece = pytest.importorskip("sentencepiece")

EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
odd = ["  ", "\n", " the", "think", "ﬁ", "e\u0301", "①", "🙃", "東", "<x>", "<c>", "▁"]
texts = st.lists(st.sampled_from([*"abx.é ", *odd]), max_size=10).map("".join)


@pytest.fixture(scope="module")
def unigram() -> bytes:
    return kit.train_sentencepiece("unigram", user_defined_symbols=["<x>"], control_symbols=["<c>", "<think>"])


@pytest.fixture(scope="module")
def merges() -> bytes:
    return kit.train_sentencepiece("bpe", user_defined_symbols=["<x>"], control_symbols=["<c>"], **EXACT)


@pytest.fixture(scope="module", params=["unigram", "merges"])
def processor(request):
    return sentencepiece.SentencePieceProcessor(model_proto=request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def own(processor) -> ta.Pair:
    return ta.Pair(processor, processor)


@given(text=texts.filter(bool))
@settings(max_examples=60, deadline=None)
def test_a_text_behind_a_blank_is_spelled_as_the_start_of_one(processor, own, text):
    """The library puts a dummy prefix before a text, and a text that continues another has its blank itself."""
    assert own.spellers[0].spell([f" {text}".encode()])[0] == processor.encode(text)


@given(left=texts, right=texts)
@settings(max_examples=60, deadline=None)
def test_a_text_in_two_words_is_spelled_in_two_parts(processor, own, left, right):
    """Against whole texts: a word behind a blank is spelled alike, whether the text before it is there or not."""
    spell = own.spellers[0].spell
    parts = [f"{left}x".encode(), f" the{right}".encode()]
    whole = processor.encode(f"y {left}x the{right}")
    assert [id for ids in spell([b" y", b" " + parts[0], parts[1]]) for id in ids] == whole


def test_pieces_by_their_role(unigram):
    processor = sentencepiece.SentencePieceProcessor(model_proto=unigram)
    vocabulary = ta.Pair(processor, processor).student
    assert vocabulary.pieces[processor.piece_to_id("<0x0A>")] == b"\n"
    assert vocabulary.pieces[processor.piece_to_id("▁")] == b" "
    assert vocabulary.special[[processor.piece_to_id(piece) for piece in ("<unk>", "<s>", "</s>", "<c>")]].all()
    assert not vocabulary.special[processor.piece_to_id("<x>")]
    assert vocabulary.id_of("no such piece") is None
    assert vocabulary.id_of("<unk>") == processor.unk_id()
    assert vocabulary.kind.declared == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def test_user_defined_pieces_are_text_and_control_pieces_are_not(unigram):
    processor = sentencepiece.SentencePieceProcessor(model_proto=unigram)
    pair = ta.Pair(kit.byte_level(), processor)
    ids = pair.spellers[1].spell([b"a<x> <c>"])[0]
    assert processor.piece_to_id("<x>") in ids
    assert processor.piece_to_id("<c>") not in ids


def test_a_control_piece_that_is_a_tag_is_text(unigram):
    processor = sentencepiece.SentencePieceProcessor(model_proto=unigram)
    pair = ta.Pair(kit.byte_level(), processor)
    ids = pair.to_teacher(kit.byte_level().encode("a<think> b").ids).ids[0].tolist()
    assert processor.piece_to_id("<think>") in ids
    assert pair.teacher.text(np.array(ids)) == b"a<think> b"


def test_extra_blanks_are_flagged_and_nothing_else(unigram):
    base = kit.byte_level()
    pair = ta.Pair(base, sentencepiece.SentencePieceProcessor(model_proto=unigram))
    flags = pair.flags(base.encode("the  train \n thinks  ").ids)
    changed = [pair.student.pieces[id] for id in flags.ids[flags.has(Flag.NORMALISED)].tolist()]
    assert changed
    assert all(piece[:1].isspace() for piece in changed)
    assert not pair.flags(base.encode(" the train thinks").ids).has(Flag.NORMALISED).any()


def test_unknown_text_without_byte_pieces(unigram):
    base = kit.byte_level()
    model = kit.train_sentencepiece("unigram", byte_fallback=False, vocab_size=120)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pair = ta.Pair(base, processor)
    flags = pair.flags(base.encode("the 🙃 train").ids)
    changed = b"".join(pair.student.pieces[id] for id in flags.ids[flags.has(Flag.NORMALISED)].tolist())
    assert changed.decode().strip() == "🙃"
    assert processor.unk_id() in pair.to_teacher(flags.ids).ids[0]


def test_the_bytes_of_one_character_are_aligned_one_by_one(merges):
    base = kit.byte_level()
    processor = sentencepiece.SentencePieceProcessor(model_proto=merges)
    pair = ta.Pair(base, processor)
    ids, theirs = base.encode("▁x🙃").ids, processor.encode("▁x🙃")  # the mark is changed, so offsets decide
    found = pair.align(ids, theirs)
    assert found.ok
    last = [processor.id_to_piece(id) for id in theirs[-4:]]
    assert last == [f"<0x{byte:02X}>" for byte in "🙃".encode()]
    assert [len(pair.student.pieces[id]) for id in ids[-3:]] == [2, 1, 1]
    assert found.chunks[-3:].tolist() == [[1, 2], [1, 1], [1, 1]]


def test_no_dummy_prefix_and_no_byte_pieces(unigram):
    model = kit.train_sentencepiece("bpe", add_dummy_prefix=False, **EXACT)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pair = ta.Pair(processor, processor)
    assert not pair.student.kind.dummy_prefix
    assert pair.spellers[0].spell([b"the train"])[0] == processor.encode("the train")


def test_blanks_at_the_end_of_words():
    model = kit.train_sentencepiece("bpe", treat_whitespace_as_suffix=True, **EXACT)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    base = kit.byte_level()
    pair = ta.Pair(base, processor)
    assert pair.align(base.encode("the train").ids, processor.encode("the train")).ok
    assert ta.canonical(processor, pair.spellers[1].spell([b"the train thinks"])[0]).all()


def test_folder_with_settings_and_tokens_beyond_the_model(tmp_path, merges):
    (tmp_path / "tokenizer.model").write_bytes(merges)
    processor = sentencepiece.SentencePieceProcessor(model_proto=merges)
    size = len(processor)
    settings_ = {
        "added_tokens_decoder": {
            "0": {"content": "<unk>", "special": True},
            str(size): {"content": "<|im_end|>", "special": True},
        },
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size + 1, "<|im_end|>": size}))
    pair = ta.Pair(tmp_path, processor)
    assert pair.student.known == size + 2
    assert pair.relation is Relation.SHARED_BASE
    assert pair.conventions[0].turn_end == {size}
    assert pair.conventions[0].bos == processor.bos_id()
    assert pair.conventions[1].bos is None
    assert pair.conventions[1].turn_end == {processor.eos_id()}
    ids = pair.spellers[0].spell([b"the<tool> train<|im_end|>"])[0]
    assert size + 1 in ids
    assert size not in ids
    assert pair.student.text(np.array(ids)) == b"the<tool> train<|im_end|>"


def test_other_scores_split_otherwise(unigram):
    one = sentencepiece.SentencePieceProcessor(model_proto=unigram)
    assert ta.Pair(one, one).relation is Relation.IDENTICAL
    # A setting of the normaliser, appended: blanks are kept.
    other = sentencepiece.SentencePieceProcessor(model_proto=unigram + bytes([0x1A, 2, 0x20, 0]))
    assert ta.Pair(one, other).relation is Relation.SHARED_VOCAB_OTHER_SPLIT
