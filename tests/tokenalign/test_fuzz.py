"""Seeded fuzzing: token streams against the reference, laws that need no reference, sizes, and what loaders read."""

import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from agreement import CASES, PAD, POLICIES, Case, check
from reference import tag_spans
from tokenizer_kit import IM_END, Wrapped, byte_level, tekken, train, train_metaspace, train_sentencepiece, words

import tokenalign as ta

STREAMS_PER_CASE = 120
ALL_STREAMS = 100_000
DTYPES = ("int64", "int32", "uint64", "uint32", "int16", "uint16")


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]()


def batches(case: Case, seed: int, streams: int) -> Iterator[tuple[random.Random, list[list[int]], list[list[bool]]]]:
    """Rows filled up to one length with a pad token on either side, or any id; with masks or without."""
    rng = random.Random(seed)
    while streams > 0:
        rows = [case.streams.row(rng) for _ in range(min(streams, rng.choice([1, 1, 4, 16])))]
        width, filler = max(map(len, rows)), case.student.pad or 0
        for place, row in enumerate(rows):
            left = rng.choice([0, 0, 1, 3])
            before = [filler] * min(left, width - len(row))
            rows[place] = [*before, *row, *[filler] * (width - len(row) - len(before))]
        masked = rng.random() < 0.3
        yield rng, rows, [[not masked or rng.random() < 0.9 for _ in range(width)] for _ in rows]
        streams -= len(rows)


def fuzz(case: Case, seed: int, streams: int) -> None:
    """Raises AssertionError where package and reference disagree."""
    pair = case.pair()
    for rng, rows, masks in batches(case, seed, streams):
        if rng.random() < 0.02:
            pair = case.pair()
        check(case, pair, rows, masks, rng.choice(DTYPES))
        known = [id for id in rows[0] if id < len(case.student.pieces) - case.student.surplus]
        tags = ["  ", "<think>", "\n", "a"]
        assert ta.tag_spans(case.student.tokenizer, known, tags) == [tag_spans(case.student, known, tags)]


def test_streams_agree_with_the_reference(case):
    fuzz(case, seed=1, streams=STREAMS_PER_CASE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_very_many_streams_agree_with_the_reference(case):
    fuzz(case, seed=2, streams=ALL_STREAMS // len(CASES) + 1)


def strange_pairs() -> dict[str, tuple[object, object]]:
    """Kinds that the reference does not read."""
    base = train()
    return {
        "words": (base, words()),
        "of words": (words(), base),
        "whole words": (base, words("WordLevel")),
        "one kind of words to another": (words(), words("WordLevel")),
        "byte-level unigram": (byte_level(unigram=True), train_metaspace()),
        "conventions": (Wrapped(base, IM_END, {"pad_token": "<|endoftext|>"}), train_metaspace()),
    }


VARIED = (
    "tags whole, turns ended otherwise",
    "pad ends turns",
    "more ids than tokens",
    "composed",
    "marked to byte-level",
)


@pytest.fixture(scope="module", params=[*VARIED, *strange_pairs()])
def any_pair(request) -> ta.Pair:
    if request.param in CASES:
        return CASES[request.param]().pair()
    return ta.Pair(*strange_pairs()[request.param])


def random_rows(pair: ta.Pair, rng: random.Random, count: int) -> np.ndarray:
    """Rows of one length whose ids come from texts and from anywhere."""
    text = [id for piece in ("<think>", " the", "é", "🙂") for id in pair.spellers[0].spell([piece.encode()])[0]]
    width = rng.choice([1, 2, 7, 30])
    pick = [[rng.choice(text) if rng.random() < 0.6 else rng.randrange(pair.student.size) for _ in range(width)]]
    return np.array(pick + [rng.sample(pick[0], width) for _ in range(count - 1)])


@pytest.fixture
def batch(any_pair) -> Iterator[np.ndarray]:
    return (random_rows(any_pair, random.Random(seed), 6) for seed in range(15))


def test_a_batch_says_of_each_row_what_the_row_alone_says(any_pair, batch):
    for ids in batch:
        together, texts = any_pair.flags(ids), any_pair.to_teacher(ids)
        for place, row in enumerate(ids):
            assert together.bits[place].tolist() == any_pair.flags(row).bits.tolist()
            alone = any_pair.to_teacher(row)
            assert texts.ids[place].tolist() == alone.ids[0].tolist()
            assert texts.alignments[place].student_chunk.tolist() == alone.alignments[0].student_chunk.tolist()
            assert texts.alignments[place].chunks.tolist() == alone.alignments[0].chunks.tolist()
        for policy in POLICIES:
            alone = [any_pair.flags(row).keep(policy).tolist() for row in ids]
            assert together.keep(policy).tolist() == alone


def test_order_of_rows_and_calls_and_what_is_remembered_change_nothing(any_pair, batch):
    drawn = list(batch)
    first = [any_pair.flags(ids).bits.tolist() for ids in drawn]
    again = [any_pair.flags(ids[::-1]).bits[::-1].tolist() for ids in reversed(drawn)][::-1]
    assert first == again


def test_prompt_and_what_is_masked_have_no_say(any_pair, batch):
    for ids in batch:
        size = any_pair.student.size
        around = np.random.default_rng(0).integers(0, size, (len(ids), 3))
        mask = np.repeat([[False, True, False]], [3, ids.shape[1], 3], axis=1).repeat(len(ids), axis=0)
        inside = any_pair.flags(np.concatenate([around, ids, around], axis=1), mask).bits[:, 3:-3]
        # In the middle of a row no token is padding.
        expected = any_pair.flags(ids, np.ones(ids.shape, bool))
        unpadded = ~expected.has(ta.Flag.PAD).any(axis=1)
        assert inside[unpadded].tolist() == expected.bits[unpadded].tolist()


def test_policies_are_ordered_and_chunks_add_up(any_pair, batch):
    for ids in batch:
        flags, texts = any_pair.flags(ids), any_pair.to_teacher(ids)
        assert (flags.keep("strict") <= flags.keep("canonical")).all()
        assert (flags.keep("canonical") <= flags.keep("tags")).all()
        for row, found, theirs in zip(flags.bits, texts.alignments, texts.ids, strict=True):
            live = (row & (ta.Flag.PAD | ta.Flag.PROMPT)) == 0
            inside = found.student_chunk >= 0
            assert not (inside & ~live).any()
            assert found.chunks.sum(axis=0).tolist() == [inside.sum(), len(theirs)]
            assert (found.chunks >= 1).all()
            assert (np.diff(found.teacher_chunk) >= 0).all()
            assert (np.diff(found.student_chunk[inside]) >= 0).all()
            # Where the texts are known to be the same, the alignment of `align` is no other.
            if found.ok and not (row & ta.Flag.NORMALISED).any():
                assert (row[live & ~inside] != 0).all()


def test_aligning_any_two_rows_keeps_every_token_in_order(any_pair):
    """Texts that have nothing, something or everything in common."""
    rng = np.random.default_rng(4)
    for _ in range(60):
        ours = rng.integers(0, any_pair.student.size, rng.integers(0, 12))
        theirs = any_pair.to_teacher(ours).ids[0]
        edited = rng.permutation(theirs)[: rng.integers(0, 12)]
        for teacher in (theirs, edited, np.concatenate([theirs, edited]), rng.integers(0, any_pair.teacher.size, 5)):
            found = any_pair.align(ours, teacher)
            for column, chunk in enumerate((found.student_chunk, found.teacher_chunk)):
                inside = chunk[chunk >= 0]
                assert (np.diff(inside) >= 0).all()
                assert np.bincount(inside, minlength=len(found.chunks)).tolist() == found.chunks[:, column].tolist()
            assert (found.chunks >= 1).all()
            assert found.starts.shape == found.chunks.shape


@pytest.mark.parametrize("length", [0, 1, 100_000])
@pytest.mark.timeout(60)
def test_lengths(any_pair, length):
    ids = np.random.default_rng(length).integers(0, any_pair.student.size, length)
    flags, text = any_pair.flags(ids), any_pair.to_teacher(ids)
    assert flags.bits.shape == (length,)
    assert text.alignments[0].chunks.sum(axis=0).tolist() == [
        (text.alignments[0].student_chunk >= 0).sum(),
        len(text.ids[0]),
    ]
    blocks = np.array_split(ids, max(1, length // 10_000))
    special = any_pair.student.special
    for block, bits in zip(blocks, np.array_split(flags.bits, len(blocks)), strict=True):
        # Between two control tokens nothing depends on what lies outside them.
        inner = np.flatnonzero(special[block])
        if len(inner) > 1 and not (bits & ta.Flag.PAD).any():
            own = slice(inner[0], inner[-1] + 1)
            alone = any_pair.flags(block[own]).bits
            assert (alone[1:-1] == bits[own][1:-1]).all()


SCRIPTS = {
    "latin": "the train leaves at 14:05 and thinks ",
    "no blank": "abcdefghij0123456789",
    "base64": "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo=",
    "one letter": "a",
    "blanks": " ",
    "newlines": "\n",
    "chinese": "東京は雨です我们在学习语言模型",
    "thai": "ภาษาไทยไม่มีช่องว่าง",
    "arabic": "اللغة العربية جميلة ",
    "devanagari": "हिन्दी भाषा ",
    "faces": "🙂👩\u200d👩\u200d👧",
    "marks": "e\u0301\u0302\u0323",
    "tags": "<think></think>",
    "broken": "\udcff\udce6\udc9d",
}


@pytest.fixture(scope="module")
def default_pair() -> ta.Pair:
    return CASES["tags whole, turns ended otherwise"]().pair()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.timeout(60)
def test_a_line_of_a_megabyte(default_pair, script):
    """The bound is the time that pytest grants."""
    part = SCRIPTS[script].encode(errors="surrogateescape")
    text = part * (1_000_000 // len(part))
    ids = default_pair.spellers[0].spell([text])[0]
    flags, spelled = default_pair.flags(ids), default_pair.to_teacher(ids)
    assert default_pair.teacher.text(spelled.ids[0]) == text
    assert spelled.alignments[0].ok
    found = default_pair.align(ids, spelled.ids[0])
    assert found.ok
    assert found.student_chunk.tolist() == spelled.alignments[0].student_chunk.tolist()
    assert flags.has(ta.Flag.INVALID_UTF8).all() == (script == "broken")
    assert flags.has(ta.Flag.TAG).all() == (script == "tags")


def test_the_mass_of_a_support_is_carried_over_or_lost(any_pair):
    rng = np.random.default_rng(3)
    for _ in range(20):
        ids = rng.integers(-1, any_pair.teacher.size, (3, 8))
        logp = rng.normal(-3, 2, (3, 8))
        _, carried, lost = ta.project_topk(any_pair.vocab, ids, logp)
        np.testing.assert_allclose(np.exp(carried).sum(-1) + lost, np.exp(logp).sum(-1), rtol=1e-9)


@pytest.fixture(scope="module")
def files() -> dict[str, dict[str, bytes]]:
    """Files that make up a tokenizer, by name, in three kinds of folders."""
    tokenizer = train(vocab_size=280)
    settings = {
        "tokenizer_config.json": {
            "eos_token": {"content": "<|im_end|>"},
            "pad_token": PAD,
            "chat_template": IM_END,
            "added_tokens_decoder": {"281": {"content": "<x>", "special": False}},
        },
        "generation_config.json": {"eos_token_id": [2, 3]},
        "special_tokens_map.json": {"bos_token": "<|im_start|>"},
        "added_tokens.json": {"<note>": 280},
        "chat_template.json": {"chat_template": [{"name": "default", "template": IM_END}]},
    }
    shared = {name: json.dumps(content).encode() for name, content in settings.items()}
    shared["chat_template.jinja"] = IM_END.encode()
    folders = {
        "json": {"tokenizer.json": tokenizer.to_str().encode()},
        "tekken": {"tekken.json": json.dumps(tekken()).encode()},
    }
    if importlib.util.find_spec("sentencepiece"):
        folders["sentencepiece"] = {"tokenizer.model": train_sentencepiece()}
    return {kind: own | shared for kind, own in folders.items()}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut off, with flipped bits, with rubbish in it, or with one JSON value replaced by another."""
    place = rng.randrange(len(content))
    match rng.randrange(5):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
        case 2:
            return content[:place] + rng.randbytes(rng.randint(1, 9)) + content[place:]
        case 3:
            return rng.randbytes(40)
    try:
        return json.dumps(with_another_value(json.loads(content), rng)).encode()
    except ValueError:
        return content[place:]


VALUES = (None, True, 0, -1, 3, 10**30, 1.5, "", "x", "\ud800", [], [[]], {}, {"type": "x"}, [None], ["a", "b"])


def with_another_value(value: object, rng: random.Random) -> object:
    """The same JSON with one value somewhere in it replaced or gone."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        entries = dict(value) if isinstance(value, dict) else dict(enumerate(value))
        key = rng.choice(list(entries))
        entries[key] = with_another_value(entries[key], rng)
        if rng.random() < 0.1:
            del entries[key]
        return entries if isinstance(value, dict) else list(entries.values())
    return rng.choice(VALUES)


def use(path: Path, other: object) -> bool:
    """Ask everything about a folder; False where it is refused as it should be."""
    try:
        pair = ta.Pair(path, other)
        ids = pair.spellers[0].spell([b"<think>a cat"])[0]
        pair.flags(ids).keep("tags")
        pair.to_teacher(ids)
        str(pair.report())
    except (ValueError, FileNotFoundError) as error:
        assert str(error)  # noqa: PT017
        return False
    return True


def damage(files: dict[str, bytes], folder: Path, seeds: range) -> dict[bool, int]:
    """How often a folder with one damaged file could still be read."""
    other, counts = train(vocab_size=280), {True: 0, False: 0}
    for name in files:
        (folder / name).write_bytes(files[name])
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice([*files, *[name for name in files if name.startswith("te") or name.endswith("model")] * 3])
        (folder / name).write_bytes(damaged(files[name], rng))
        try:
            counts[use(folder, other)] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}, {name}")
            raise
        (folder / name).write_bytes(files[name])
    return counts


KINDS = ("json", "tekken", "sentencepiece")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_or_read(files, tmp_path, kind):
    if kind not in files:
        pytest.skip("needs sentencepiece")
    counts = damage(files[kind], tmp_path, range(60))
    assert min(counts.values()) > 5
    assert use(tmp_path, train(vocab_size=280))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_very_many_damaged_files_are_refused_or_read(files, tmp_path, kind):
    if kind not in files:
        pytest.skip("needs sentencepiece")
    damage(files[kind], tmp_path, range(1000, 4000))
