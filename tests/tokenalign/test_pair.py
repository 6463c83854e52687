import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kit import END, IM_END, TAGS, Wrapped, train, train_metaspace, unreachable, with_tokens
from tokenizers import Tokenizer

import tokenalign as ta
from tokenalign import Flag, Relation
from tokenalign.cuts import Cuts

RESPONSE = "<think>12 + 30</think>\\boxed{42}\n<think>\n<|im_end|>"
SEVERAL = RESPONSE.replace("\n<|im", "the thick</think><|im_end|> and more<|im")

pieces = st.sampled_from(
    ["<think>", "</think>", " think", "ink", "<", ">", " the", "\n", "  ", "é", "e\u0301", "🙂", "42", ".", "a", "東"]
)
texts = st.lists(pieces, max_size=12).map("".join)


def rows(tokenizer: Tokenizer, texts: list[str], pad: int = 0) -> np.ndarray:
    ids = [tokenizer.encode(text).ids for text in texts]
    return np.array([row + [pad] * (max(map(len, ids)) - len(row)) for row in ids], int)


def dropped(tokenizer: Tokenizer, flags: ta.TokenFlags, policy: str) -> list[str]:
    return [tokenizer.id_to_token(id) for id in flags.ids[~flags.keep(policy) & ~flags.has(Flag.PAD)].tolist()]


def cut_nowhere(pair: ta.Pair) -> None:
    """But beside control tokens."""
    cuts = Cuts(pair.student.pieces, alone=pair._respelling._is_control, held=(), whole=(), splitting=None)
    pair._respelling.cuts = cuts


def random_ids(vocabulary_size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, vocabulary_size - 1), min_size=1, max_size=16)


def test_default_pair_shares_ids_but_not_spelling(pair, base):
    assert pair.relation is Relation.SHARED_VOCAB_OTHER_SPLIT
    assert pair.collisions.tolist() == []
    assert (pair.vocab.to_teacher == np.arange(base.get_vocab_size())).all()
    assert [base.id_to_token(end) for side in pair.conventions for end in side.turn_end] == ["<|im_end|>", "<|end|>"]


def test_tags_drop_every_piece_of_a_tag_and_the_end_of_turn(pair, base):
    flags = pair.flags(rows(base, [SEVERAL]))
    open_tag, close_tag = (base.encode(tag).tokens for tag in TAGS)
    assert dropped(base, flags, "tags") == [*open_tag, *close_tag, *open_tag, *close_tag, "<|im_end|>", "<|im_end|>"]
    assert not flags.has(Flag.UNMAPPED).any()


def test_end_class_keeps_the_end_of_turn(pair, base):
    ids = rows(base, [SEVERAL])
    kept = pair.flags(ids).keep("tags", end_class=True)
    assert kept[ids == base.token_to_id("<|im_end|>")].all()


def test_paper_drops_the_first_of_each_piece_and_of_the_end_of_turn(pair, base):
    flags = pair.flags(rows(base, [SEVERAL]))
    pieces = dict.fromkeys(base.encode("<think></think>").tokens)
    assert sorted(dropped(base, flags, "paper")) == sorted([*pieces, "<|im_end|>"])


@pytest.fixture(scope="module")
def qwen_like() -> Tokenizer:
    """Its own spelling of `<think>` is `<th` `ink` `>`; `think` is a token that it has for other places."""
    spec = json.loads(train(special=["<|endoftext|>", "<|im_end|>"], vocab_size=256 + 2).to_str())
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for left, right in [("<", "t"), ("<t", "h"), ("t", "h"), ("i", "n"), ("in", "k"), ("th", "ink")]:
        vocab[left + right] = len(vocab)
        merges.append([left, right])
    # One word, as the pre-tokenizer of such models keeps `<think` together.
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return Tokenizer.from_str(json.dumps(spec))


def test_paper_case_drops_exactly_the_three_tokens_that_the_paper_names(qwen_like):
    assert qwen_like.encode("<think>").tokens == ["<th", "ink", ">"]
    pair = ta.Pair(*[Wrapped(qwen_like, IM_END, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})] * 2)
    tag = [qwen_like.token_to_id(token) for token in ("<", "think", ">")]
    text = qwen_like.encode("a < b, 42").ids
    end = [qwen_like.token_to_id("<|im_end|>")]
    ids = np.array([tag + text + tag + text + end + text + end])
    flags = pair.flags(ids)
    assert pair.relation is Relation.IDENTICAL
    assert np.flatnonzero(~flags.keep("paper")[0]).tolist() == [0, 1, len(tag + text + tag + text)]
    assert dropped(qwen_like, flags, "tags") == ["<", "think", "<", "think"]
    assert ta.canonical(qwen_like, ids)[0, :3].tolist() == [False, False, True]


def test_control_the_students_own_spelling_costs_nothing(qwen_like):
    pair = ta.Pair(qwen_like, qwen_like)
    assert pair.flags(rows(qwen_like, ["<think>a</think> b"])).keep("canonical").all()


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_remembering_cutting_and_batching_change_nothing(pair, base, drawn):
    """Against one row at a time, compared whole and from scratch."""
    ids = rows(base, [f"{left}<|im_end|>{right}" for left, right in drawn])
    slow = ta.Pair(Wrapped(base, IM_END, {"pad_token": "<|endoftext|>"}), Wrapped(with_tokens(base, TAGS), END))
    cut_nowhere(slow)
    alone = np.concatenate([slow.flags(row[None]).bits for row in ids])
    assert pair.flags(ids).bits.tolist() == alone.tolist()
    assert pair.flags(ids[::-1]).bits[::-1].tolist() == alone.tolist()


def test_control_cutting_where_a_token_reaches_across_would_change_flags(base):
    joined = with_tokens(base, ["the think"])
    pair = ta.Pair(base, joined)
    ids = rows(base, ["a the think"])
    before = pair.flags(ids).bits.tolist()
    pair._respelling.memory.forget()
    pair._respelling.cuts = ta.Pair(base, base)._respelling.cuts
    assert pair.flags(ids).bits.tolist() != before


@given(texts, st.lists(st.integers(0, 300), max_size=4), st.lists(st.integers(0, 300), max_size=4))
@settings(max_examples=40, deadline=None)
def test_what_is_masked_has_no_say(pair, base, text, before, after):
    ids = base.encode(text).ids
    row = np.array([before + ids + after], int)
    mask = np.array([[False] * len(before) + [True] * len(ids) + [False] * len(after)], bool)
    flags = pair.flags(row, mask)
    alone = pair.flags(np.array([ids], int)).bits
    assert flags.bits[mask].tolist() == alone[0].tolist()
    assert flags.has(Flag.PROMPT).tolist() == (~mask).tolist()


@given(texts, st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_padding_on_either_side_changes_nothing(pair, base, text, left, right):
    ids = base.encode(text + ".").ids
    flags = pair.flags(np.array([[0] * left + ids + [0] * right]))
    assert flags.bits[0, left : left + len(ids)].tolist() == pair.flags(np.array([ids])).bits[0].tolist()
    assert flags.has(Flag.PAD)[0].tolist() == [True] * left + [False] * len(ids) + [True] * right


def test_a_pad_token_that_ends_turns_ends_the_turn_once(base):
    pair = ta.Pair(*[Wrapped(base, None, {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})] * 2)
    flags = pair.flags(np.array([[80, 0, 0, 0]]))
    assert flags.has(Flag.EOS_CLASS)[0].tolist() == [False, True, False, False]
    assert flags.has(Flag.PAD)[0].tolist() == [False, False, True, True]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_teacher_text_is_the_same_text(pair, base, data):
    ids = data.draw(random_ids(base.get_vocab_size()).filter(lambda ids: 0 not in ids))
    spelled = pair.to_teacher(np.array([ids]))
    ours, theirs = (side.pieces for side in (pair.student, pair.teacher))
    end = ours[base.token_to_id("<|im_end|>")]
    text = b"".join(ours[id] for id in ids).replace(end, theirs[base.token_to_id("<|end|>")])
    assert b"".join(theirs[id] for id in spelled.ids[0].tolist()) == text
    alignment = spelled.alignments[0]
    assert alignment.ok
    assert alignment.chunks.sum(0).tolist() == [len(ids), len(spelled.ids[0])]
    assert (alignment.chunks >= 1).all()


@given(st.lists(texts, min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_teacher_text_is_aligned_as_align_does(pair, base, drawn):
    ids = rows(base, [text + "x<|im_end|>" for text in drawn])
    spelled = pair.to_teacher(ids)
    for row, teacher_ids, found in zip(ids, spelled.ids, spelled.alignments, strict=True):
        expected = pair.align(row[row > 0], teacher_ids)
        assert found.ok
        assert expected.ok
        assert found.student_chunk[row > 0].tolist() == expected.student_chunk.tolist()
        assert found.teacher_chunk.tolist() == expected.teacher_chunk.tolist()


@given(texts)
@settings(max_examples=30, deadline=None)
def test_aligning_a_text_with_itself_is_the_identity(pair, base, text):
    ids = base.encode(text).ids
    found = pair.align(ids, ids)
    assert found.ok
    assert found.student_chunk.tolist() == list(range(len(ids)))
    assert found.chunks.tolist() == [[1, 1]] * len(ids)


@given(st.lists(st.integers(0, 401), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_starts_of_the_teachers_spelling_follow_the_same_text(pair, ids):
    """Where `starts` says that a comparison is meaningful, both models have read the same bytes."""
    ids = [id for id in ids if not pair.student.special[id]]
    spelled = pair.to_teacher(ids)
    ours, theirs = (
        [side.pieces[id] for id in row] for side, row in ((pair.student, ids), (pair.teacher, spelled.ids[0]))
    )
    same = [[i, j] for i in range(len(ours)) for j in range(len(theirs)) if b"".join(ours[:i]) == b"".join(theirs[:j])]
    assert spelled.alignments[0].starts.tolist() == same


def test_bos_padding_and_empty_texts_lie_in_no_chunk(pair, base):
    text = base.encode("the thick").ids
    found = pair.align([0, *text, 0], [*text, 0, 0])
    assert found.ok
    assert found.student_chunk.tolist() == [-1, *range(len(text)), -1]
    assert found.teacher_chunk.tolist() == [*range(len(text)), -1, -1]
    assert pair.align([0], text).chunks.tolist() == pair.align(text, []).chunks.tolist() == []
    assert set(pair.align(text, [0]).student_chunk.tolist()) == {-1}


def test_aligning_other_texts_is_not_ok_and_keeps_what_is_shared(pair, base):
    found = pair.align(base.encode("a cat. b").ids, base.encode("a dog. b").ids)
    assert not found.ok
    assert found.student_chunk[0] == found.teacher_chunk[0] == 0
    assert found.chunks[-1].tolist() == [1, 1]


def test_text_of_a_control_token_stays_text(pair, base):
    ids = [base.token_to_id(character) for character in "<|end|>"]
    spelled = pair.to_teacher(np.array([ids])).ids[0].tolist()
    assert base.token_to_id("<|end|>") not in spelled


def test_tag_that_the_teacher_has_as_control_token_only(base):
    special = with_tokens(train(), TAGS, special=True)
    pair = ta.Pair(train(), special)
    ids = rows(train(), ["<think>a"])
    assert pair.relation is Relation.SHARED_BASE
    assert [special.id_to_token(id) for id in pair.to_teacher(ids).ids[0].tolist()] == ["<think>", "a"]
    back = ta.Pair(special, train())
    tag = special.token_to_id("<think>")
    flags = back.flags([[tag, ids[0, -1]]])
    expected = Flag.SPECIAL | Flag.TAG | Flag.NONCANONICAL | Flag.UNMAPPED
    assert flags.bits.tolist() == [[expected, 0]]


def test_half_a_character_is_flagged_and_a_whole_one_in_pieces_is_not(pair, base):
    whole = [base.token_to_id(token) for token in "ðŁĺĤ"]  # a face that no merge makes
    flags = pair.flags(np.array([whole + whole[:2]]))
    assert flags.has(Flag.INVALID_UTF8)[0].tolist() == [False] * 4 + [True] * 2


def test_normaliser_is_flagged_where_it_changes_the_text(base, cased):
    flags = ta.Pair(base, cased).flags(rows(base, ["the Thick ink"]))
    changed = [base.id_to_token(id) for id in flags.ids[flags.has(Flag.NORMALISED)].tolist()]
    assert changed == ["T"]
    assert (flags.has(Flag.NONCANONICAL) >= flags.has(Flag.NORMALISED)).all()


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("text", ["the train", " leaves  at\n14:05", "think 🙂 東京"])
def test_metaspace_spells_itself(scheme, text):
    tokenizer = train_metaspace(scheme)
    ids = rows(tokenizer, [text])
    assert ta.canonical(tokenizer, ids).all()
    assert not ta.Pair(tokenizer, tokenizer).flags(ids).has(Flag.NORMALISED).any()


@given(texts.filter(bool))
@settings(max_examples=30, deadline=None)
def test_byte_level_and_metaspace_meet_in_bytes(base, text):
    other = train_metaspace("never")
    pair = ta.Pair(base, other)
    ids = base.encode(text).ids
    assert pair.relation is Relation.DIFFERENT
    assert pair.align(ids, other.encode(text, add_special_tokens=False).ids).ok
    assert other.decode(pair.to_teacher([ids]).ids[0].tolist()) in (text, text.removeprefix(" "))


def test_padded_output_ids_are_unmapped_and_keep_their_neighbours(base):
    size = base.get_vocab_size()
    pair = ta.Pair(base, base, student_size=size + 8)
    ids = [*base.encode("the").ids, size + 3, *base.encode(" think").ids]
    flags = pair.flags([ids])
    assert flags.has(Flag.UNMAPPED)[0].tolist() == (pair.vocab.to_teacher[ids] == -1).tolist()
    assert flags.keep("canonical")[0].tolist() == [id < size for id in ids]
    assert pair.to_teacher([ids]).alignments[0].student_chunk[1] == -1


def test_collisions_and_map_of_shifted_ids(base):
    shifted = train(special=["<pad>", "<|endoftext|>"])
    pair = ta.Pair(base, shifted)
    assert pair.relation is Relation.DIFFERENT
    assert 1 in pair.collisions
    known = np.flatnonzero(pair.vocab.to_teacher >= 0)
    assert (pair.vocab.to_student[pair.vocab.to_teacher[known]] == known).all()
    assert pair.vocab.to_teacher[base.token_to_id("<|im_end|>")] == -1


def test_memory_is_bounded_and_forgetting_changes_nothing(pair, base):
    ids = rows(base, [SEVERAL, RESPONSE])
    before = pair.flags(ids).bits
    memory = pair._respelling.memory
    capacity, memory.capacity = memory.capacity, 0
    try:
        for _ in range(3):
            assert (pair.flags(ids).bits == before).all()
            assert memory.known.tokens <= ids.size
    finally:
        memory.capacity = capacity


def test_empty_batches(pair):
    for shape in [(0, 3), (2, 0), (0, 0)]:
        empty = np.zeros(shape, int)
        assert pair.flags(empty).keep("paper").shape == shape
        assert len(pair.to_teacher(empty).ids) == shape[0]
    assert pair.align([], []).chunks.tolist() == []


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, -1]], None, "id -1 is outside"),
        ([[1, 10_000]], None, "id 10000 is outside the tokenizer's 0..401"),
    ],
)
def test_bad_batches_are_refused(pair, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        pair.flags(ids, mask)


def test_tag_spans_in_any_segmentation(base):
    ids = base.encode("a<think>b</think>").ids
    whole = [base.token_to_id("<think>"), *base.encode("b").ids]
    tokens = base.encode("a<think>b</think>").tokens
    found = ta.tag_spans(base, np.array([ids, whole + [0] * (len(ids) - 2)]), TAGS)
    close = tokens.index("</")
    assert found == [[(1, close - 1, "<think>"), (close, len(ids), "</think>")], [(0, 1, "<think>")]]
    with pytest.raises(ValueError, match="everywhere"):
        ta.tag_spans(base, [ids], [""])


def test_unreachable_tokens_are_not_canonical(base):
    assert not ta.canonical(base, [[base.token_to_id("<think>")]]).any()
    assert ta.canonical(with_tokens(base, TAGS), [[base.token_to_id("<think>")]]).all()
    assert unreachable(train(), TAGS).get_vocab_size() == base.get_vocab_size()
