import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kit import byte_level, words
from tokenizers import Regex, Tokenizer, normalizers

import tokenalign as ta
from tokenalign import Flag
from tokenalign.kinds import Spelled
from tokenalign.offsets import difference, trace

NORMALIZERS = {
    "lower": normalizers.Lowercase(),
    "nfc": normalizers.NFC(),
    "nfd": normalizers.NFD(),
    "nfkc": normalizers.NFKC(),
    "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "insert": normalizers.Replace("a", "a-"),
    "delete": normalizers.Replace("a", ""),
    "shrink": normalizers.Replace(Regex("ab+"), "c"),
    "bert": normalizers.BertNormalizer(handle_chinese_chars=False),
}

composed = ["e\u0301", "q\u0323\u0302", "a\u0302\u0323", "\u1112\u1161\u11ab", "한", "ｶﾞ"]
pieces = st.sampled_from([*"aAbxyZn é.É", *composed, "ﬁ", "ﬁn", "①", "İ", "🙂", " think", "東"])
texts = st.lists(pieces, min_size=1, max_size=12).map("".join)


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return byte_level()


@pytest.fixture(scope="module", params=NORMALIZERS)
def changing(request) -> Tokenizer:
    return byte_level(normalizer=NORMALIZERS[request.param])


@pytest.fixture(scope="module")
def pair(plain, changing) -> ta.Pair:
    return ta.Pair(plain, changing)


@pytest.fixture(scope="module")
def back(plain, changing) -> ta.Pair:
    return ta.Pair(changing, plain)


@given(text=texts)
@settings(max_examples=60, deadline=None)
def test_a_chunk_ends_where_the_text_so_far_becomes_the_tokens_so_far(plain, changing, pair, text):
    """Against the normaliser itself, given the beginning of the text alone."""
    ids = plain.encode(text).ids
    spelled = pair.to_teacher(ids)
    found, teacher = spelled.alignments[0], spelled.ids[0].tolist()
    assert found.ok
    normalize = changing.normalizer.normalize_str
    assert pair.teacher.text(np.array(teacher, int)).decode() == normalize(text)
    for chunk in range(len(found.chunks) - 1):
        m, n = found.chunks[: chunk + 1].sum(axis=0)
        before = pair.student.text(np.array(ids[:m]))
        written = pair.teacher.text(np.array(teacher[:n]))
        # A chunk may end inside a character that both sides spell as it is.
        whole = [side.decode(errors="ignore") for side in (before, written)]
        assert normalize(whole[0]) == whole[1]
        assert before.removeprefix(whole[0].encode()) == written.removeprefix(whole[1].encode())


@given(text=texts)
@settings(max_examples=40, deadline=None)
def test_tokens_that_are_not_flagged_are_spelled_as_they_are(plain, changing, pair, text):
    """Every run of tokens without the flag stands in the teacher's spelling, in order and with the same bytes."""
    ids = plain.encode(text).ids
    changed = pair.flags(ids).has(Flag.NORMALISED)
    rest = changing.normalizer.normalize_str(text).encode()
    runs: list[list[int]] = [[]]
    for id, flag in zip(ids, changed.tolist(), strict=True):
        runs.append([]) if flag else runs[-1].append(id)
    for run in filter(None, runs):
        _, found, rest = rest.partition(pair.student.text(np.array(run, int)))
        assert found
    assert bool(changed.any()) == (changing.normalizer.normalize_str(text) != text)


@given(text=texts)
@settings(max_examples=40, deadline=None)
def test_align_knows_what_a_normaliser_made_of_the_text(plain, changing, pair, back, text):
    ids, theirs = plain.encode(text).ids, changing.encode(text).ids
    found, swapped = pair.align(ids, theirs), back.align(theirs, ids)
    assert found.ok
    assert swapped.ok
    assert swapped.chunks[:, ::-1].tolist() == found.chunks.tolist()


def test_control_align_notices_another_text(plain):
    lower = byte_level(normalizer=normalizers.Lowercase())
    pair = ta.Pair(plain, lower)
    assert pair.align(plain.encode("A cat").ids, lower.encode("A cat").ids).ok
    assert not pair.align(plain.encode("A cat").ids, lower.encode("A cut").ids).ok


def test_a_chunk_for_each_word_and_not_one_for_all(plain):
    lower = byte_level(normalizer=normalizers.Lowercase())
    text = "The train And an ink pot"
    ids = plain.encode(text).ids
    spelled = ta.Pair(plain, lower).to_teacher(ids)
    assert len(spelled.alignments[0].chunks) >= len(text.split())
    flags = ta.Pair(plain, lower).flags(ids)
    changed = [plain.id_to_token(id) for id in flags.ids[flags.has(Flag.NORMALISED)].tolist()]
    assert changed == ["T", "A"]


def test_what_is_deleted_altogether_has_no_teacher_token(plain):
    nothing = byte_level(normalizer=normalizers.Replace(Regex(".*"), ""))
    pair = ta.Pair(plain, nothing)
    ids = plain.encode("abc").ids
    assert pair.to_teacher(ids).ids[0].tolist() == []
    assert pair.to_teacher(ids).alignments[0].student_chunk.tolist() == [-1] * len(ids)
    assert pair.flags(ids).has(Flag.NORMALISED).all()
    assert pair.align(ids, []).ok


def test_unknown_characters_are_flagged_and_their_neighbours_are_not(plain):
    pair = ta.Pair(plain, words())
    ids = plain.encode("the 🙃 train").ids
    flags = pair.flags(ids)
    changed = b"".join(pair.student.pieces[id] for id in flags.ids[flags.has(Flag.NORMALISED)].tolist())
    assert changed.decode().strip() == "🙃"
    assert pair.to_teacher(ids).alignments[0].ok


def test_ends_that_run_backwards_are_none():
    assert trace(b"abc", Spelled(ids=[0, 0], starts=[0, 0], ends=[3, 1]), [b"x"]) is None
    assert trace(b"abc", Spelled(ids=[0, 0], starts=[0, 1], ends=[1, 4]), [b"x"]) is None
    assert trace(b"abc", Spelled(ids=[0, 0], starts=[0, 1], ends=[1, 3]), [b"x"]) is not None


def test_unusable_offsets_fall_back_to_what_is_shared(plain, monkeypatch):
    lower = byte_level(normalizer=normalizers.Lowercase())
    text = "the Train thinks"
    ids = plain.encode(text).ids
    pair = ta.Pair(plain, lower)
    monkeypatch.setattr(
        type(pair.spellers[1]), "trace", lambda self, texts, **_: [Spelled(ids=[], starts=[], ends=[])] * len(texts)
    )
    found = pair.to_teacher(ids).alignments[0]
    assert not found.ok
    assert found.chunks[0].tolist() == found.chunks[-1].tolist() == [1, 1]
    assert pair.flags(ids).has(Flag.NORMALISED).any()
    assert not pair.align(ids, lower.encode(text).ids).ok


@given(st.text("aé🙂 ", max_size=6), st.text("aé🙂 ", max_size=6))
def test_a_difference_is_of_whole_characters(text, other):
    if text == other or not text:
        return
    start, end = difference(text.encode(), other.encode())
    assert 0 <= start < end <= len(text.encode())
    text.encode()[:start].decode()
    text.encode()[start:end].decode()
    outside = text.encode()[:start], text.encode()[end:]
    assert other.encode().startswith(outside[0])
    assert other.encode().endswith(outside[1])
