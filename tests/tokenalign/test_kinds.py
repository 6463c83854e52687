"""The README's table of kinds × features, cell by cell, on freshly trained tokenizers."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_kit as kit
from tokenizers import Tokenizer, normalizers, pre_tokenizers

import tokenalign as ta
from tokenalign import Flag
from tokenalign.cuts import Cuts

Encode = Callable[[str], list[int]]

TEXTS = (
    "the train leaves at 14:05 and thinks",
    "it's <b>bold</b>, or \\boxed{42}.",
    "naïve café, 東京は雨です 🙂",
    " leaves and then\nx",
    "x",
)
"""Whatever a tokenizer with all of these characters spells without loss."""
CHANGED = ("The  Cafe\u0301 \n\n ﬁ①", "a\tb")
MARKS = "a▁b_c"
UNKNOWN = "the 🙃 train"


@dataclass(frozen=True)
class Made:
    """A tokenizer, and its own library's encoding of whole texts: what everything is compared with."""

    given: Any
    encode: Encode


def fast(tokenizer: Tokenizer) -> Made:
    return Made(tokenizer, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


def sentencepiece(model_type: str, **settings: Any) -> Made:
    from_ = pytest.importorskip("sentencepiece").SentencePieceProcessor
    processor = from_(model_proto=kit.train_sentencepiece(model_type, **settings))
    return Made(processor, processor.encode)


def tiktoken() -> Made:
    encoding = kit.train_tiktoken()
    return Made(encoding, encoding.encode_ordinary)


@dataclass(frozen=True)
class Tekken:
    content: dict[str, Any]


def tekken() -> Made:
    """Built as `mistral_common` builds it: ids of the ordinary tokens are shifted by the number of control tokens."""
    content = kit.tekken()
    config = content["config"]
    first = config["default_num_special_tokens"]
    ranks = {
        base64.b64decode(token["token_bytes"]): token["rank"]
        for token in content["vocab"][: config["default_vocab_size"] - first]
    }
    library = pytest.importorskip("tiktoken")
    encoding = library.Encoding("ref", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={})
    return Made(Tekken(content), lambda text: [first + id for id in encoding.encode(text)])


CHANGES = normalizers.Sequence(
    [normalizers.NFKC(), normalizers.Lowercase(), normalizers.NFD(), normalizers.StripAccents()]
)

KINDS: dict[str, Callable[[], Made]] = {
    "byte-level BPE, GPT-2 style": lambda: fast(kit.byte_level()),
    "the same with `add_prefix_space`": lambda: fast(kit.byte_level(prefix=True)),
    "byte-level BPE, Llama 3 style": lambda: fast(kit.byte_level(kit.LLAMA_SPLIT, ignore_merges=True)),
    "byte-level BPE, Qwen style": lambda: fast(kit.byte_level(kit.LLAMA_SPLIT, normalizer=normalizers.NFC())),
    "byte-level BPE, DeepSeek style": lambda: fast(kit.byte_level(r"\p{N}{1,3}", kit.CJK_SPLIT, kit.DEEPSEEK_SPLIT)),
    "byte-level Unigram": lambda: fast(kit.byte_level(unigram=True)),
    "byte-level BPE, normalising": lambda: fast(kit.byte_level(normalizer=CHANGES)),
    "Metaspace BPE, `first`": lambda: fast(kit.train_metaspace("first")),
    "Metaspace BPE, `always`, not split": lambda: fast(kit.train_metaspace("always", split=False)),
    "Metaspace BPE, `never`, mark `_`": lambda: fast(kit.train_metaspace("never", mark="_")),
    "sentencepiece BPE, `tokenizer.json`": lambda: fast(kit.llama2()),
    "sentencepiece Unigram, `tokenizer.json`": lambda: fast(kit.unigram()),
    "the same over words": lambda: fast(kit.unigram(pre_tokenizers.WhitespaceSplit())),
    "sentencepiece BPE, `.model`": lambda: sentencepiece(
        "bpe", normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
    "sentencepiece Unigram, `.model`": lambda: sentencepiece("unigram"),
    "WordPiece": lambda: fast(kit.words()),
    "WordLevel": lambda: fast(kit.words("WordLevel")),
    "tiktoken": tiktoken,
    "`tekken.json`": tekken,
}


@lru_cache
def made(kind: str) -> Made:
    return KINDS[kind]()


@lru_cache
def bytewise() -> Tokenizer:
    return kit.byte_level()


@lru_cache
def pair(student: Any, teacher: Any, **sizes: int) -> ta.Pair:
    return ta.Pair(student, teacher, **sizes)


def given(kind: str, tmp_path: Path) -> Any:
    """What `Pair` accepts: an object, or else a file."""
    side = made(kind).given
    return saved(side, tmp_path) if isinstance(side, Tekken) else side


def saved(side: Any, folder: Path) -> Path:
    """A file of a tokenizer in a folder."""
    if isinstance(side, Tokenizer):
        side.save(str(folder / "tokenizer.json"))
        return folder / "tokenizer.json"
    if isinstance(side, Tekken):
        (folder / "tekken.json").write_text(json.dumps(side.content))
        return folder / "tekken.json"
    (folder / "some.model").write_bytes(side.serialized_model_proto())
    return folder / "some.model"


def spelled(of: ta.Pair, text: str) -> list[int]:
    return of.spellers[0].spell([text.encode()])[0]


def flagged(of: ta.Pair, text: str) -> bytes:
    """What of a text, written byte by byte, the teacher is said to change."""
    flags = of.flags(bytewise().encode(text, add_special_tokens=False).ids)
    return b"".join(of.student.pieces[id] for id in flags.ids[flags.has(Flag.NORMALISED)].tolist())


# One function per column, which gets the text of the cell.


def read_from(kind: str, cell: str, tmp_path: Path) -> None:
    side, sources = made(kind).given, cell.split(", ")
    ways: dict[str, Any] = {"object": side}
    if {"file", "folder"} & {*sources}:
        ways |= {"file": saved(side, tmp_path), "folder": tmp_path}
    pairs = [ta.Pair(ways[source], ways[source]) for source in sources]
    own = made(kind).encode(TEXTS[0])
    for of in pairs:
        assert of.student.pieces == pairs[0].student.pieces
        # A dummy prefix is that of a text's start, so in the middle of a text it is a blank like any other.
        assert spelled(of, " " * of.student.kind.dummy_prefix + TEXTS[0]) == own


def bytes_of_ids(kind: str, cell: str, tmp_path: Path) -> None:
    of = ta.Pair(given(kind, tmp_path), bytewise())
    texts = (*TEXTS, *CHANGED, UNKNOWN, MARKS)
    back = {text: of.student.text(np.array(spelled(of, text))).decode() for text in texts}
    differ = {text for text in texts if back[text] != text}
    assert {"exact": differ == set(), "but for the mark": differ == {MARKS}, "but for changes": CHANGED[0] in differ}[
        cell
    ]
    assert "".join(back[TEXTS[0]].split()) == "".join(TEXTS[0].split())


def own_spelling(kind: str, cell: str, tmp_path: Path) -> None:
    assert cell == "canonical"
    side = given(kind, tmp_path)
    for text in TEXTS:
        assert ta.canonical(side, spelled(ta.Pair(side, side), text)).all()
    of = ta.Pair(side, side)
    the = [of.student.pieces.index(letter) for letter in (b"t", b"h", b"e") if letter in of.student.pieces]
    assert bool(the) != (kind == "WordLevel")  # which has no other spelling
    assert not the or not ta.canonical(side, the).all()


def with_byte_level(kind: str, cell: str, tmp_path: Path) -> None:
    """Whole texts as the two libraries encode them, in both roles, and the teacher's spelling of the student's text."""
    assert cell == "both ways"
    side = given(kind, tmp_path)
    there, back = pair(bytewise(), side), ta.Pair(side, bytewise())
    for text in (*TEXTS, *CHANGED, UNKNOWN):
        ours, theirs = bytewise().encode(text).ids, made(kind).encode(text)
        found, swapped = there.align(ours, theirs), back.align(theirs, ours)
        assert found.ok
        assert swapped.ok
        assert found.chunks.tolist() == swapped.chunks[:, ::-1].tolist()
        assert (found.chunks >= 1).all()
        written = there.to_teacher(ours)
        assert written.alignments[0].ok
        assert (written.alignments[0].chunks >= 1).all()
        assert there.align(ours, written.ids[0]).chunks.tolist() == written.alignments[0].chunks.tolist()
    assert not there.align(bytewise().encode("the train").ids, made(kind).encode("the drink")).ok


def changed_text(kind: str, cell: str, tmp_path: Path) -> None:
    of = pair(bytewise(), given(kind, tmp_path))
    assert flagged(of, TEXTS[0]) == b""
    found = [text for text in (*CHANGED, MARKS) if flagged(of, text)]
    assert {"never": found == [], "only its mark": found == [MARKS], "NORMALISED": found[:1] == [CHANGED[0]]}[cell]
    if cell == "only its mark":
        assert flagged(of, MARKS).decode() in "▁_"


def unknown_text(kind: str, cell: str, tmp_path: Path) -> None:
    of = pair(bytewise(), given(kind, tmp_path))
    ids = of.spellers[1].spell([UNKNOWN.encode()])[0]
    if cell == "bytes":
        assert of.teacher.text(np.array(ids)).decode().strip() == UNKNOWN
        assert flagged(of, UNKNOWN) == b""
    else:
        assert of.teacher.pieces[of.teacher.kind.unknown].decode() == cell.strip("`")
        assert of.teacher.kind.unknown in ids
        assert flagged(of, UNKNOWN).decode().strip() == "🙃"


def dummy_prefix(kind: str, cell: str, tmp_path: Path) -> None:
    of = pair(bytewise(), given(kind, tmp_path))
    middle, start = of.spellers[1].spell([b"the train"])[0], made(kind).encode("the train")
    text = of.teacher.text(np.array(start))
    assert of.teacher.kind.dummy_prefix is (cell == "yes")
    assert text == (b" the train" if cell == "yes" else b"the train")
    # A response does not start a text; words carry their blank with them wherever they stand.
    assert of.teacher.text(np.array(middle)) == (text if of.teacher.kind.free_blanks else b"the train")


def control_text(kind: str, cell: str, tmp_path: Path) -> None:
    assert cell == "text"
    of = pair(bytewise(), given(kind, tmp_path))
    controls = np.flatnonzero(of.teacher.special).tolist()
    assert controls
    for id in controls:
        content = of.teacher.added[id].content
        assert id not in set(of.spellers[1].spell([content.encode()])[0]) - {of.teacher.kind.unknown}
        assert of.teacher.id_of(content) == id


def padded(kind: str, cell: str, tmp_path: Path) -> None:
    assert cell == "UNMAPPED"
    side = given(kind, tmp_path)
    size = ta.Pair(side, side).student.size
    of = ta.Pair(side, bytewise(), student_size=size + 3)
    ids = [*spelled(of, "the"), size + 1, *spelled(of, " train")]
    assert of.flags(ids).has(Flag.UNMAPPED)[len(spelled(of, "the"))]
    assert of.to_teacher(ids).alignments[0].student_chunk[len(spelled(of, "the"))] == -1
    with pytest.raises(ValueError, match=f"size {size - 1} is smaller"):
        ta.Pair(side, bytewise(), student_size=size - 1)


COLUMNS: dict[str, Callable[[str, str, Path], None]] = {
    "read from": read_from,
    "bytes": bytes_of_ids,
    "own spelling": own_spelling,
    "with byte-level BPE": with_byte_level,
    "changed text": changed_text,
    "unknown text": unknown_text,
    "dummy prefix": dummy_prefix,
    "text of a control token": control_text,
    "padded output": padded,
}


def table() -> dict[str, dict[str, str]]:
    """The README's table: kind, column, cell."""
    readme = (Path(__file__).parents[2] / "tokenalign" / "README.md").read_text(encoding="utf-8")
    lines = readme.partition("| kind |")[2].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {kind: dict(zip(rows[0], cells, strict=True)) for kind, *cells in rows[2:]}


def test_the_table_is_of_what_is_tested():
    assert [*table()] == [*KINDS]
    assert {tuple(row) for row in table().values()} == {tuple(COLUMNS)}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_cell(kind, column, tmp_path):
    COLUMNS[column](kind, table()[kind][column], tmp_path)


PARTS = [*"abx.,:<'1 é\n\t▁_É🙃ﬁ", "  ", " \n", " the", "train", "e\u0301", "東京", "<think>"]


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_rows_changes_nothing(kind, tmp_path):
    side, rng = given(kind, tmp_path), np.random.default_rng(0)
    whole = ta.Pair(bytewise(), side)
    whole._respelling.cuts = Cuts(
        whole.student.pieces, alone=whole._respelling._is_control, held=[], whole=[], splitting=None
    )
    for _ in range(40):
        ids = bytewise().encode("".join(rng.choice(PARTS, rng.integers(1, 20)))).ids
        of = pair(bytewise(), side)
        assert of.flags(ids).bits.tolist() == whole.flags(ids).bits.tolist()
        cut, uncut = of.to_teacher(ids), whole.to_teacher(ids)
        assert cut.ids[0].tolist() == uncut.ids[0].tolist()
        assert cut.alignments[0].student_chunk.tolist() == uncut.alignments[0].student_chunk.tolist()
        assert cut.alignments[0].ok == uncut.alignments[0].ok
