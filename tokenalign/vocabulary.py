"""What the ids of one tokenizer stand for: a byte string and a role each."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenalign.chunks import Ints, ranges
from tokenalign.source import Source
from tokenalign.splitting import Splitting, of_tokenizer_json

Spec = dict[str, Any]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[int, int]:
    """Code point → byte: printable Latin-1 stands for itself, the other bytes follow from U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {point: point for point in printable} | {0x100 + index: byte for index, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class ByteTable:
    """Bytes per id, laid out so that a whole sequence is read without a loop.

    >>> table = ByteTable([b"a", b"", b"bc"])
    >>> table.text(np.array([2, 1, 0])), table.ends(np.array([2, 1, 0])).tolist()
    (b'bca', [2, 2, 3])
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.lengths: NDArray[np.int64] = np.fromiter(map(len, pieces), np.int64, len(pieces))
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._blob = np.frombuffer(b"".join(pieces), np.uint8)

    def ends(self, ids: Ints) -> NDArray[np.int64]:
        """Byte ends `[N]` of a sequence of ids `[N]`."""
        return np.cumsum(self.lengths[ids])

    def text(self, ids: Ints) -> bytes:
        """All bytes of a sequence of ids `[N]`."""
        return self._blob[ranges(self._starts[ids], self.lengths[ids])].tobytes()


class Vocabulary:
    """Bytes and role of every id, from a `tokenizer.json` (byte-level, or sentencepiece-style with `▁` for the space).

    Args:
        spec: The parsed `tokenizer.json`.
        size: Ids of the model's output, where it is padded beyond the tokenizer; the surplus ids have no token.

    Raises:
        ValueError: The tokenizer is of another kind, or `size` is smaller than the tokenizer.
    """

    def __init__(self, spec: Spec, *, name: str = "tokenizer", size: int | None = None) -> None:
        self.spec = spec
        self.byte_level = _is_byte_level(spec, name)
        self.added: dict[int, Spec] = {entry["id"]: entry for entry in spec["added_tokens"]}
        tokens = {index: token for token, index in _model_tokens(spec["model"])}
        self.known = 1 + max(tokens.keys() | self.added.keys(), default=-1)
        self.size = self.known if size is None else size
        if self.size < self.known:
            raise ValueError(f"size {size} is smaller than {name} with {self.known} ids. Give the model's output size.")
        self.pieces: list[bytes] = [b""] * self.size
        """Bytes per id; empty where there is no token."""
        for index, token in tokens.items():
            self.pieces[index] = self._model_bytes(token)
        for index, entry in self.added.items():
            self.pieces[index] = self._added_bytes(entry)
        self.special: NDArray[np.bool_] = np.zeros(self.size, bool)
        self.special[[index for index, entry in self.added.items() if entry["special"]]] = True

    def _model_bytes(self, token: str) -> bytes:
        if self.byte_level:
            try:
                return token.translate(_ALPHABET).encode("latin-1")
            except UnicodeEncodeError:  # not written in the alphabet, so never made by a merge
                return token.encode()
        byte = _BYTE_TOKEN.fullmatch(token) if self.spec["model"].get("byte_fallback") else None
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    def _added_bytes(self, entry: Spec) -> bytes:
        literal = self.byte_level or entry["special"]
        return (entry["content"] if literal else entry["content"].replace("▁", " ")).encode()

    @cached_property
    def table(self) -> "ByteTable":
        """The bytes of many ids at once."""
        return ByteTable(self.pieces)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[V]` bytes per id."""
        return self.table.lengths

    def text(self, ids: Ints) -> bytes:
        """All bytes of a sequence of ids `[N]`."""
        return self.table.text(ids)

    @cached_property
    def splitting(self) -> Splitting | None:
        """How the tokenizer splits a text, None where that may depend on more than neighbours."""
        strips = ("lstrip", "rstrip", "single_word")
        if any(entry.get(key) and not entry["special"] for entry in self.added.values() for key in strips):
            return None
        normalizers, pre_tokenizers = [*parts(self.spec["normalizer"])], [*parts(self.spec["pre_tokenizer"])]
        return of_tokenizer_json(self.spec["model"], normalizers, pre_tokenizers)

    @cached_property
    def ends_word(self) -> NDArray[np.bool_]:
        """`[V]` True where the bytes end with an ASCII letter or digit."""
        return np.fromiter((piece[-1:].isalnum() for piece in self.pieces), bool, self.size)

    @cached_property
    def starts_blank(self) -> NDArray[np.bool_]:
        """`[V]` True where the bytes start with a space or a line feed."""
        return np.fromiter((piece[:1] in (b" ", b"\n") for piece in self.pieces), bool, self.size)

    def id_of(self, content: str | None) -> int | None:
        """The id of an added or ordinary token by its exact text, None where there is none."""
        return None if content is None else self._by_content.get(content)

    @cached_property
    def _by_content(self) -> dict[str, int]:
        return dict(_model_tokens(self.spec["model"])) | {entry["content"]: id for id, entry in self.added.items()}

    @cached_property
    def keys(self) -> list[tuple[bytes, bool]]:
        """Bytes and role (True: control token) per id: what two vocabularies can have in common."""
        return list(zip(self.pieces, self.special.tolist(), strict=True))


def vocabulary_of(source: Source, size: int | None = None) -> Vocabulary:
    """The vocabulary of a loaded tokenizer; the last few are remembered by content."""
    return _vocabulary(source.tokenizer.to_str(), source.name, size)


@lru_cache(maxsize=4)
def _vocabulary(text: str, name: str, size: int | None) -> Vocabulary:
    return Vocabulary(json.loads(text), name=name, size=size)


def parts(component: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normaliser, pre-tokenizer or decoder of a `tokenizer.json`, or a sequence's members, in order."""
    if component is None:
        return
    members = next((component[key] for key in ("normalizers", "pretokenizers", "decoders") if key in component), None)
    if members is None:
        yield dict(component)
    for member in members or ():
        yield from parts(member)


def _is_byte_level(spec: Spec, name: str) -> bool:
    """True for byte-level, False for sentencepiece style; anything else would give wrong bytes, so it is refused."""
    kind = spec["model"].get("type") or "BPE"
    spelling = [*parts(spec.get("pre_tokenizer")), *parts(spec.get("normalizer"))]
    types = {part["type"] for part in spelling}
    if kind in ("BPE", "Unigram"):
        if "ByteLevel" in types:
            return True
        if "Metaspace" in types or any(part["type"] == "Replace" and part["content"] == "▁" for part in spelling):
            return False
    raise ValueError(
        f"{name}: {kind} with {', '.join(sorted(types)) or 'no pre-tokenizer'} is not supported yet. Supported are "
        "byte-level and sentencepiece-style (Metaspace, byte fallback) BPE and Unigram tokenizers."
    )


def _model_tokens(model: Spec) -> Iterator[tuple[str, int]]:
    """Token and id of BPE (a dictionary) and Unigram (a list of token and score)."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        yield from vocab.items()
    else:
        yield from ((token, index) for index, (token, _) in enumerate(vocab))
