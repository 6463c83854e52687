import json

import numpy as np
import pytest
import tokenizer_kit as kit
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

import tokenalign as ta
from tokenalign import Flag, Relation
from tokenalign.kinds.sentencepiece_model import _fields

BASE = kit.byte_level()


def with_added(**properties: bool) -> Tokenizer:
    copy = Tokenizer.from_str(BASE.to_str())
    copy.add_tokens([AddedToken("<tool>", **{"normalized": False} | properties)])
    return copy


def flagged(pair: ta.Pair, text: str) -> str:
    flags = pair.flags(BASE.encode(text).ids)
    return b"".join(pair.student.pieces[id] for id in flags.ids[flags.has(Flag.NORMALISED)].tolist()).decode()


@pytest.mark.parametrize(
    ("properties", "lost"),
    [({}, ""), ({"lstrip": True}, "\n"), ({"rstrip": True}, "\t"), ({"lstrip": True, "rstrip": True}, "\n\t")],
)
def test_blanks_that_an_added_token_takes_along_are_flagged(properties, lost):
    pair = ta.Pair(BASE, with_added(**properties))
    text = "the\n<tool>\tink"
    ids = BASE.encode(text).ids
    assert flagged(pair, text) == lost
    written = pair.to_teacher(ids)
    assert pair.teacher.id_of("<tool>") in written.ids[0]
    assert written.alignments[0].ok
    assert pair.align(ids, written.ids[0]).ok


def test_a_single_word_is_no_part_of_another():
    copy = Tokenizer.from_str(BASE.to_str())
    copy.add_tokens([AddedToken("tool", single_word=True, normalized=False)])
    pair, token = ta.Pair(BASE, copy), copy.token_to_id("tool")
    for text in ("tool", "a stool", "an tool pot", "tools", "(tool)"):
        assert pair.to_teacher(BASE.encode(text).ids).ids[0].tolist() == copy.encode(text).ids
        assert ta.canonical(copy, copy.encode(text).ids).all()
    assert token in copy.encode("a tool pot").ids
    assert token not in copy.encode("a stool").ids


def test_an_added_token_that_is_matched_in_the_normalised_text():
    copy = kit.byte_level(normalizer=normalizers.Lowercase())
    copy.add_tokens([AddedToken("<tool>", normalized=True)])
    pair = ta.Pair(BASE, copy)
    assert copy.token_to_id("<tool>") in pair.to_teacher(BASE.encode("a <TOOL> b").ids).ids[0]
    assert flagged(pair, "a <TOOL> b").strip("< >") == "TOOL"


@pytest.mark.parametrize("model", ["Unigram", "WordLevel", "BPE"])
def test_the_text_of_a_control_token_is_text_even_if_the_vocabulary_holds_it(model):
    if model == "Unigram":
        tokenizer = kit.unigram()
    elif model == "WordLevel":
        tokenizer = kit.words("WordLevel")
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:  # merges make it
        vocab = {"<": 0, "/s>": 1, "</s>": 2, "s": 3, ">": 4, "/": 5, "s>": 6}
        tokenizer = Tokenizer(models.BPE(vocab, [("s", ">"), ("/", "s>"), ("<", "/s>")]))
        tokenizer.add_special_tokens(["</s>"])
    control = "[CLS]" if model == "WordLevel" else "</s>"
    pair = ta.Pair(tokenizer, tokenizer)
    spelled = pair.spellers[0].spell([control.encode()])[0]
    assert spelled
    assert tokenizer.token_to_id(control) not in spelled
    without = ta.Pair(tokenizer, tokenizer, tags=[control])
    assert without.spellers[0].spell([control.encode()])[0] == [tokenizer.token_to_id(control)]


def test_ids_without_a_token_and_bytes_with_two():
    spec = json.loads(BASE.to_str())
    size = BASE.get_vocab_size()
    spec["model"]["vocab"] |= {"naïve": size, "東": size + 1}  # not in the byte alphabet: these are their own bytes
    spec["model"]["vocab"]["far"] = size + 9
    pair = ta.Pair(Tokenizer.from_str(json.dumps(spec)), BASE)
    assert pair.student.pieces[size + 1] == "東".encode()
    assert pair.student.pieces[size + 2 : size + 9] == [b""] * 7
    hole = pair.flags([size + 4])
    assert hole.has(Flag.UNMAPPED).all()
    assert pair.to_teacher([size + 4]).alignments[0].student_chunk.tolist() == [-1]
    assert not pair.to_teacher([size + 4]).alignments[0].ok
    twice = kit.unreachable(BASE, ["the"]) if "the" not in BASE.get_vocab() else BASE
    assert ta.Pair(twice, BASE).student.pieces.count(b"the") == 1


@pytest.mark.parametrize("prefix", ["##", "@@"])
def test_words_and_their_parts(prefix):
    tokenizer = kit.words(prefix=prefix)
    pieces = ta.Pair(tokenizer, tokenizer).student.pieces
    for token, id in tokenizer.get_vocab().items():
        if token.startswith("["):
            continue
        assert pieces[id].decode() == (token.removeprefix(prefix) if token.startswith(prefix) else f" {token}")


gaps = st.sampled_from(["", " ", "  ", "\n"])


@given(st.lists(st.tuples(gaps, st.sampled_from(["the", "train", "think"]), gaps, st.sampled_from(",:<")), min_size=1))
@settings(max_examples=60, deadline=None)
def test_blanks_between_words_are_told_apart_from_lost_ones(parts):
    """One blank or none is a convention; a longer run and a line feed are lost."""
    text = "".join(map("".join, parts))
    lost = {"  ", "\n"} & {gap for before, _, between, _ in parts for gap in (before, between)}
    assert bool(flagged(_wordpiece(), text)) == bool(lost)


def _wordpiece(made=[]):  # noqa: B006 (trained once)
    if not made:
        made.append(ta.Pair(BASE, kit.words()))
    return made[0]


def test_words_of_two_vocabularies_share_what_they_write_alike():
    pair = ta.Pair(BASE, kit.words())
    the = BASE.token_to_id("Ġthe")
    assert pair.teacher.pieces[pair.vocab.to_teacher[the]] == b" the"


@pytest.mark.parametrize(
    ("processor", "first"),
    [
        (processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]), 1),
        (processors.RobertaProcessing(("<|end|>", 3), ("<|im_end|>", 2)), 2),
        (processors.BertProcessing(("<|end|>", 3), ("<|im_end|>", 2)), 2),
        (
            processors.Sequence(
                [processors.ByteLevel(), processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 3)])]
            ),
            3,
        ),
        (processors.TemplateProcessing("$A <|end|>", special_tokens=[("<|end|>", 3)]), None),
        (processors.ByteLevel(), None),
        (None, None),
    ],
)
def test_bos_is_what_the_library_puts_before_a_text(processor, first):
    copy = Tokenizer.from_str(BASE.to_str())
    if processor is not None:
        copy.post_processor = processor
    special = np.flatnonzero(ta.Pair(copy, copy).student.special).tolist()
    put = copy.encode("a").ids[0]
    assert (put if put in special else None) == first
    assert ta.Pair(copy, copy).conventions[0].bos == first


def test_dropout_padding_and_truncation_have_no_say():
    copy = Tokenizer.from_str(BASE.to_str())
    copy.model.dropout = 0.9
    copy.enable_truncation(3)
    copy.enable_padding(pad_id=0, pad_token="<|endoftext|>", length=50)
    pair = ta.Pair(BASE, copy)
    assert pair.flags(BASE.encode("the train leaves and thinks").ids).keep("canonical").all()
    assert pair.relation is Relation.IDENTICAL
    assert pair.conventions[1].pad == 0


def test_text_of_a_normaliser_from_a_sentencepiece_model():
    model = dict(_fields(kit.train_sentencepiece("unigram")))
    tokenizer = kit.unigram(normalizer=normalizers.Precompiled(dict(_fields(model[3]))[2]))
    pair = ta.Pair(BASE, tokenizer)
    text = "the ﬁne train e\u0301 ink"
    assert pair.to_teacher(BASE.encode(text).ids).alignments[0].ok
    assert flagged(pair, text).replace(" ", "") == "ﬁe\u0301"
