"""Tokenizers of the tokenizers library, from the text of a `tokenizer.json`.

Four ways in which tokens are written are told apart by what the pre-tokenizer and the normaliser do with blanks:
byte-level (each byte a printable character), marked blanks (`▁` or another character for a blank, `<0x0A>` for a byte),
words (blanks are dropped, `##` or another prefix says that a token continues a word) and plain text.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from tokenalign.kinds.kind import Added, Kind, Spelled, as_piece, by_id
from tokenalign.splitting import Splitting, of_tokenizer_json

Spec = dict[str, Any]

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARK = "▁"
_DROPS_BLANKS = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")


def kind_of(spec: Spec) -> Kind:
    """The kind of a parsed `tokenizer.json`.

    Raises:
        ValueError: Its tokens do not tell which bytes they stand for.
        AttributeError, KeyError, TypeError: It is no `tokenizer.json`.
    """
    model = spec["model"]
    tokens = dict(_tokens(model))
    entries: list[Spec] = spec.get("added_tokens") or []
    added = {
        entry["id"]: Added(
            content=entry["content"],
            special=entry["special"],
        )
        for entry in entries
    }
    writing = _writing(spec)
    pieces = by_id(
        [
            *((id, writing.piece(token)) for token, id in tokens.items()),
            *((id, writing.added(entry)) for id, entry in added.items()),
        ]
    )
    ids = tokens | {entry.content: id for id, entry in added.items()}
    unknown = _unknown(model, ids)
    return Kind(
        pieces=pieces,
        added=added,
        id_of=ids.get,
        encoder=partial(_Encoder, spec),
        splitting=partial(_splitting, spec),
        rules=_rules(spec),
        dummy_prefix=writing.words or any(_opens_with_blank(part) for part in _spelling(spec)),
        free_blanks=_word_starts(pieces, unknown) if writing.words else frozenset(),
        unknown=unknown,
        bos=_opening(spec.get("post_processor"), added),
        pad=(spec.get("padding") or {}).get("pad_id"),
    )


def _word_starts(pieces: Sequence[bytes], unknown: int | None) -> frozenset[int]:
    starts = {id for id, piece in enumerate(pieces) if piece[:1] == b" "}
    return frozenset(starts if unknown is None else starts | {unknown})


def _tokens(model: Spec) -> Iterator[tuple[str, int]]:
    """Token and id: a dictionary, or the list of token and score that Unigram has."""
    vocab = model["vocab"]
    if isinstance(vocab, Mapping):
        yield from vocab.items()
    else:
        yield from ((token, index) for index, (token, _) in enumerate(vocab))


def _unknown(model: Spec, ids: Mapping[str, int]) -> int | None:
    token = model.get("unk_token")
    return model.get("unk_id") if token is None else ids.get(token)


def parts(component: Mapping[str, Any] | None) -> Iterator[Spec]:
    """A normaliser, pre-tokenizer or post-processor, or a sequence's members, in order."""
    if component is None:
        return
    keys = ("normalizers", "pretokenizers", "processors")
    members = next((component[key] for key in keys if key in component), None)
    if members is None:
        yield dict(component)
    for member in members or ():
        yield from parts(member)


def _spelling(spec: Spec) -> list[Spec]:
    return [*parts(spec.get("pre_tokenizer")), *parts(spec.get("normalizer"))]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Writing:
    """How tokens are written."""

    byte_level: bool
    words: bool
    mark: str
    """The character that stands for a blank, empty if none does."""
    prefix: str
    """What says that a token continues a word, empty if nothing does."""
    byte_tokens: bool
    """True if `<0x0A>` stands for a byte."""

    def piece(self, token: str) -> bytes:
        """The bytes of a token of the model."""
        if self.words:
            continues = self.prefix and token.startswith(self.prefix) and token != self.prefix
            return as_piece(token[len(self.prefix) :] if continues else " " + token)
        if self.byte_level:
            return _byte_level(token)
        byte = BYTE_TOKEN.fullmatch(token) if self.byte_tokens else None
        return bytes([int(byte[1], 16)]) if byte else self.text(token)

    def added(self, added: Added) -> bytes:
        """The bytes of an added token; a control token is literal."""
        if added.special or self.byte_level:
            return as_piece(added.content)
        return as_piece(" " + added.content) if self.words else self.text(added.content)

    def text(self, token: str) -> bytes:
        """Text in which a mark stands for a blank."""
        return as_piece(token.replace(self.mark, " ") if self.mark else token)


def _writing(spec: Spec) -> _Writing:
    """How the tokens of a tokenizer are written.

    Raises:
        ValueError: In a way that does not tell where blanks were.
    """
    model, spelling = spec["model"], _spelling(spec)
    types = [part["type"] for part in spelling]
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
    prefix = model.get("continuing_subword_prefix") or ""
    mark = next(filter(None, map(_mark_of, spelling)), "")
    drops = [part["type"] for part in spelling if _drops_blanks(part)]
    words = bool(drops) and not mark and (kind == "WordLevel" or bool(prefix))
    # A blank that is dropped and put back before each word is not lost.
    put_back = drops == ["WhitespaceSplit"] and any(map(_opens_with_blank, spelling))
    lost = (drops and not put_back) or prefix or kind == "WordPiece"
    if (lost and not words) or model.get("end_of_word_suffix"):
        raise ValueError(
            f"{kind} with {', '.join(types) or 'no pre-tokenizer'} is not supported: its tokens do not tell where "
            "blanks were. Supported are byte-level tokens, tokens in which a character such as ▁ stands for a blank, "
            "WordPiece and WordLevel over words, and tokens that are plain text."
        )
    return _Writing(
        byte_level="ByteLevel" in types and not words,
        words=words,
        mark=mark,
        prefix=prefix,
        byte_tokens=bool(model.get("byte_fallback")),
    )


def _byte_level_alphabet() -> dict[int, int]:
    """Code point → byte: printable Latin-1 stands for itself, the other bytes follow from U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {point: point for point in printable} | {0x100 + index: byte for index, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return token.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:  # not written in the alphabet, so never made by a merge
        return as_piece(token)


def _mark_of(part: Spec) -> str | None:
    """The character that stands for a blank, if this part of the tokenizer puts one there."""
    if part["type"] == "Metaspace":
        return str(part.get("replacement") or _MARK)
    blank = part["type"] == "Replace" and (part["content"] == _MARK or part["pattern"].get("String") == " ")
    return part["content"] if blank and len(part["content"]) == 1 and not part["content"].isspace() else None


def _drops_blanks(part: Spec) -> bool:
    removed = part["type"] == "Split" and part["behavior"] == "Removed"
    return part["type"] in _DROPS_BLANKS or removed or part.get("delimiter") == " "


def _opens_with_blank(part: Spec) -> bool:
    if part["type"] == "Metaspace":
        return part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never") != "never"
    return (part["type"] == "ByteLevel" and bool(part.get("add_prefix_space"))) or part["type"] == "Prepend"


def _opening(post_processor: Spec | None, added: Mapping[int, Added]) -> int | None:
    """The control token that the post-processor puts before a text."""
    for part in parts(post_processor):
        if part["type"] == "TemplateProcessing":
            name = part["single"][0].get("SpecialToken", {}).get("id") if part["single"] else None
            first = part["special_tokens"][name]["ids"][0] if name else None
        else:
            first = part.get("cls", [None, None])[1]
        if first is not None and first in added and added[first].special:
            return int(first)
    return None


_NEVER: Mapping[str, Spec] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
    "Strip": {"strip_left": False},
}


def _plain(spec: Spec, tags: Iterable[str]) -> Spec:
    """No dropout, no padding, no control tokens around; tags as ordinary added tokens."""
    model = spec["model"] | ({"dropout": None} if "dropout" in spec["model"] else {})
    entries = [e | {"special": e["special"] and e["content"] not in tags} for e in spec.get("added_tokens") or []]
    return spec | {
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "model": model,
        "added_tokens": entries,
    }


_ONE_BLANK: Sequence[Spec] = (
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Strip", "strip_left": False, "strip_right": True},
)


def _continuing(spec: Spec, tags: Iterable[str]) -> Spec:
    """As `_plain`, and nothing that happens only where a text starts."""
    normalizers = [_without_prefix(part) for part in parts(spec.get("normalizer")) if part["type"] != "Prepend"]
    pre_tokenizers = [_without_prefix(part) for part in parts(spec.get("pre_tokenizer"))]
    if not _writing(spec).words and (
        split := next((p for p in pre_tokenizers if p["type"] == "WhitespaceSplit"), None)
    ):
        # Where each word gets its blank back, the first of a continued text must not get one that was not there.
        normalizers += _ONE_BLANK
        pre_tokenizers.remove(split)
    return _plain(spec, tags) | {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers} if pre_tokenizers else None,
    }


def _without_prefix(part: Spec) -> Spec:
    kept = {key: value for key, value in part.items() if part["type"] != "Metaspace" or key != "add_prefix_space"}
    return kept | _NEVER.get(part["type"], {})


def _splitting(spec: Spec) -> Splitting | None:
    looks_around = ("lstrip", "rstrip", "single_word")
    if any(entry.get(key) and not entry["special"] for entry in spec.get("added_tokens") or [] for key in looks_around):
        return None
    spec = _continuing(spec, ())
    return of_tokenizer_json(spec["model"], [*parts(spec["normalizer"])], [*parts(spec["pre_tokenizer"])])


def _rules(spec: Spec) -> Spec:
    """What decides how a text is split, ids and roles aside."""
    spec = _continuing(spec, ())
    pre_tokenizers = (spec["pre_tokenizer"] or {}).get("pretokenizers", [])
    return {
        "model": {key: value for key, value in spec["model"].items() if key != "vocab"},
        "normalizer": spec["normalizer"],
        "pre_tokenizer": [{key: value for key, value in p.items() if key != "trim_offsets"} for p in pre_tokenizers],
        "added": sorted(str({**entry, "id": None, "special": None}) for entry in spec["added_tokens"]),
    }


class _Encoder:
    """See `Encoder`."""

    def __init__(self, spec: Spec, tags: tuple[str, ...]) -> None:
        self._spec, self._tags = spec, tags
        self._continuing = _tokenizer(_continuing(spec, tags))

    @cached_property
    def _opening(self) -> Tokenizer:
        return _tokenizer(_plain(self._spec, self._tags))

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._continuing.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def spelled(self, texts: Sequence[str], *, opening: bool = False) -> list[Spelled]:
        tokenizer = self._opening if opening else self._continuing
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [_spelled(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]


def _spelled(text: str, encoding: Encoding) -> Spelled:
    places = _byte_ends(text)[np.array(encoding.offsets, int).reshape(-1, 2)]
    return Spelled(ids=encoding.ids, starts=places[:, 0].tolist(), ends=places[:, 1].tolist())


def _tokenizer(spec: Spec) -> Tokenizer:
    """A tokenizer that never makes a control token of text, but for the one that stands for what it cannot spell."""
    try:
        tokenizer = Tokenizer.from_str(json.dumps(_without_controls(spec)))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the tokenizers library cannot read it ({error}). Download or save it again.") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def _without_controls(spec: Spec) -> Spec:
    """Control tokens that the model's vocabulary has, where its own search could find them, under names no text has."""
    model, entries = spec["model"], spec["added_tokens"]
    tokens = dict(_tokens(model))
    unknown = _unknown(model, tokens)
    names = {
        entry["content"]: f"{_NO_TEXT}{entry['id']}{_NO_TEXT}"
        for entry in entries
        if entry["special"] and tokens.get(entry["content"], unknown) != unknown
    }
    vocab = model["vocab"]
    if isinstance(vocab, Mapping):
        vocab = {names.get(token, token): id for token, id in vocab.items()}
    else:
        vocab = [[names.get(token, token), score] for token, score in vocab]
    model = model | {"vocab": vocab}
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in names]
    return spec | {"model": model, "added_tokens": [entry for entry in entries if entry["content"] not in names]}


_NO_TEXT = "\U0010ffff"


def _merged(merge: str | list[str]) -> str:
    return merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)


def _byte_ends(text: str) -> NDArray[np.int64]:
    """`[characters + 1]` bytes of the text before each character, and in all.

    >>> _byte_ends("aé🙂").tolist()
    [0, 1, 3, 7]
    """
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    sizes = 1 + (points >= 0x80) + (points >= 0x800).astype(np.int64) + (points >= 0x10000)
    return np.append(0, np.cumsum(sizes))
