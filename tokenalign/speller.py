"""A tokenizer's own spelling of bytes in the middle of a text."""

import copy
import json
import re
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from tokenalign.vocabulary import Spec, Vocabulary, parts

_INVALID = re.compile("([\udc80-\udcff]+)")
"""What `surrogateescape` makes of bytes that are no UTF-8."""

_PROBES = ("x", "The cat's", "12", "don't 3.14", "</think>a", " y", "\n", "\n\n  z", " 7", "  \n b", " 's", " 1,000\n")


class Speller:
    """Spells text as a tokenizer does, with three differences that continuing a text asks for.

    1. No dummy prefix: a response does not start a text.
    2. The text of a control token stays ordinary text; only ids are control tokens.
    3. A reasoning tag is text even where the tokenizer declares it a control token.

    Args:
        vocabulary: The tokenizer's bytes.
        tags: Reasoning tags, see 3.
    """

    def __init__(self, vocabulary: Vocabulary, tags: Sequence[str]) -> None:
        self.vocabulary = vocabulary
        self._encoder = Tokenizer.from_str(json.dumps(continuing(vocabulary.spec, tags)))
        self._encoder.encode_special_tokens = True
        self._byte_ids = {piece[0]: id for id, piece in reversed([*enumerate(vocabulary.pieces)]) if len(piece) == 1}

    def spell(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Ids per text; bytes that are no UTF-8 are spelled one by one where the tokenizer has such tokens."""
        runs = [_runs(text) for text in texts]
        encodings = iter(
            self._encoder.encode_batch_fast([run for row in runs for run in row[::2]], add_special_tokens=False)
        )
        return [[id for run in self._row(row, encodings) for id in run] for row in runs]

    def _row(self, runs: list[str], encodings: Iterator[object]) -> Iterator[list[int]]:
        for index, run in enumerate(runs):
            if index % 2 == 0:
                yield next(encodings).ids  # type: ignore[attr-defined]
            else:
                invalid = run.encode(errors="surrogateescape")
                yield [self._byte_ids[byte] for byte in invalid if byte in self._byte_ids]

    def splits_at_blanks(self, tags: Sequence[str]) -> bool:
        """True if cutting a text between an ASCII letter or digit and a blank changes no token.

        It cannot where no token reaches across such a place: then no merge does. The probes guard against normalisers
        and added tokens that look further than their own text.
        """
        vocabulary = self.vocabulary
        texts = [piece for piece, special in vocabulary.keys if not special] + [tag.encode() for tag in tags]
        if re.search(rb"[A-Za-z0-9][ \n]", b"\xff".join(texts)):
            return False
        if any((entry["lstrip"] or entry["rstrip"]) and not entry["special"] for entry in vocabulary.added.values()):
            return False
        words, blanks = _PROBES[:5], _PROBES[5:]
        pairs = [(left.encode(), right.encode()) for left in words for right in blanks]
        apart = self.spell([side for pair in pairs for side in pair])
        joined = self.spell([left + right for left, right in pairs])
        return all(apart[2 * i] + apart[2 * i + 1] == whole for i, whole in enumerate(joined))


def invalid_bytes(text: bytes) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """`[bytes]` True where a byte is part of no UTF-8 character.

    >>> invalid_bytes(b"a\\xc3\\xa9\\xf0\\x9f").tolist()
    [False, False, False, True, True]
    """
    runs = _runs(text)
    if len(runs) == 1:
        return np.zeros(len(text), bool)
    lengths = [len(run.encode(errors="surrogateescape")) for run in runs]
    return np.repeat(np.arange(len(runs)) % 2 == 1, lengths)


def _runs(text: bytes) -> list[str]:
    """Alternately valid text and invalid bytes, starting and ending with (perhaps empty) text."""
    try:
        return [text.decode()]
    except UnicodeDecodeError:
        return _INVALID.split(text.decode(errors="surrogateescape"))


def continuing(spec: Spec, tags: Sequence[str]) -> Spec:
    """The `tokenizer.json` of the encoder: no dummy prefix, no dropout, no padding, tags as ordinary added tokens."""
    spec = copy.copy(spec)
    spec |= {"truncation": None, "padding": None, "post_processor": None, "model": spec["model"] | {"dropout": None}}
    spec["added_tokens"] = [e | {"special": e["special"] and e["content"] not in tags} for e in spec["added_tokens"]]
    if spec["model"].get("type") == "Unigram":
        del spec["model"]["dropout"]
    spec["normalizer"] = _sequence("normalizers", [p for p in parts(spec["normalizer"]) if p["type"] != "Prepend"])
    spec["pre_tokenizer"] = _sequence("pretokenizers", [_without_prefix(p) for p in parts(spec["pre_tokenizer"])])
    return spec


def _sequence(key: str, members: list[Spec]) -> Spec | None:
    return {"type": "Sequence", key: members} if members else None


def _without_prefix(part: Spec) -> Spec:
    never: Spec = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
    return {key: value for key, value in part.items() if key != "add_prefix_space"} | never.get(part["type"], {})
