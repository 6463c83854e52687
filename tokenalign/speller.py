"""A tokenizer's own spelling of bytes in the middle of a text."""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, chain

import numpy as np

from tokenalign.kinds import Spelled
from tokenalign.offsets import Trace, trace
from tokenalign.vocabulary import Vocabulary

_INVALID = re.compile("([\udc80-\udcff]+)")
"""What `surrogateescape` makes of bytes that are no UTF-8."""


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
        self._encoder = vocabulary.encoder(tuple(tags))

    def spell(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Ids per text; bytes that are no UTF-8 are spelled one by one where the tokenizer has such tokens."""
        runs = [_runs(text) for text in texts]
        if all(len(row) == 1 for row in runs):
            return self._encoder.ids([run for (run,) in runs])
        ids = iter(self._encoder.ids([run for row in runs for run in row[::2]]))
        return [
            [id for place, run in enumerate(row) for id in (self._invalid(run) if place % 2 else next(ids))]
            for row in runs
        ]

    def trace(self, texts: Sequence[bytes], *, opening: bool = False) -> list[Spelled]:
        """As `spell`, with byte ends; `opening` reads each text as the start of one. Slower."""
        runs = [_runs(text) for text in texts]
        spelled = iter(self._encoder.spelled([run for row in runs for run in row[::2]], opening=opening))
        return [
            _joined(
                [(_raw(run), self._alone(run) if place % 2 else next(spelled)) for place, run in enumerate(row)],
            )
            for row in runs
        ]

    def in_text(self, text: bytes, spelled: Spelled, ids: Sequence[int], *, opening: bool = False) -> Trace | None:
        """Where these ids end in a text, given what `trace` tells of it; None where that is not known."""
        kind = self.vocabulary.kind
        if list(spelled.ids) != list(ids) or invalid_bytes(text).any():
            return None
        blank = opening and kind.dummy_prefix
        return trace(text, spelled, kind.pieces, free_blanks=kind.free_blanks, unknown=kind.unknown, opening=blank)

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        pieces = self.vocabulary.pieces
        return {piece[0]: id for id, piece in reversed([*enumerate(pieces)]) if len(piece) == 1}

    def _invalid(self, run: str) -> list[int]:
        return [self._byte_ids[byte] for byte in _raw(run) if byte in self._byte_ids]

    def _alone(self, run: str) -> Spelled:
        known = [place for place, byte in enumerate(_raw(run)) if byte in self._byte_ids]
        return Spelled(ids=self._invalid(run), starts=known, ends=[place + 1 for place in known])


def _joined(parts: Sequence[tuple[bytes, Spelled]]) -> Spelled:
    """One text after the other."""
    before = list(accumulate((len(text) for text, _ in parts), initial=0))[:-1]
    placed = [(start, spelled) for start, (_, spelled) in zip(before, parts, strict=True)]
    return Spelled(
        ids=list(chain.from_iterable(spelled.ids for _, spelled in placed)),
        starts=[start + place for start, spelled in placed for place in spelled.starts],
        ends=[start + place for start, spelled in placed for place in spelled.ends],
    )


def _raw(run: str) -> bytes:
    return run.encode(errors="surrogateescape")


def invalid_bytes(text: bytes) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """`[bytes]` True where a byte is part of no UTF-8 character.

    >>> invalid_bytes(b"a\\xc3\\xa9\\xf0\\x9f").tolist()
    [False, False, False, True, True]
    """
    runs = _runs(text)
    if len(runs) == 1:
        return np.zeros(len(text), bool)
    lengths = [len(_raw(run)) for run in runs]
    return np.repeat(np.arange(len(runs)) % 2 == 1, lengths)


def _runs(text: bytes) -> list[str]:
    """Alternately valid text and invalid bytes, starting and ending with (perhaps empty) text."""
    try:
        return [text.decode()]
    except UnicodeDecodeError:
        return _INVALID.split(text.decode(errors="surrogateescape"))
