"""What the ids of one tokenizer stand for: a byte string and a role each."""

from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from tokenalign.chunks import Ints, ranges
from tokenalign.kinds import Encoder, Kind
from tokenalign.source import Source
from tokenalign.splitting import Splitting

_BLOCK = 1 << 15
"""Tokens whose bytes are looked up at once: few enough to stay in the processor's cache."""


class ByteTable:
    """Bytes per id, laid out so that a whole sequence is read without a loop.

    >>> table = ByteTable([b"a", b"", b"bc"])
    >>> table.text(np.array([2, 1, 0])), table.ends(np.array([2, 1, 0])).tolist()
    (b'bca', [2, 2, 3])
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.lengths: NDArray[np.int32] = np.fromiter(map(len, pieces), np.int32, len(pieces))
        self._longest = int(self.lengths.max(initial=0))
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._blob = np.frombuffer(b"".join(pieces), np.uint8)

    def ends(self, ids: Ints) -> Ints:
        """Byte ends `[N]` of a sequence of ids `[N]`."""
        fits = len(ids) * self._longest < 1 << 30  # so that twice an end fits, too
        return np.cumsum(self.lengths[ids], dtype=np.int32 if fits else np.int64)

    def text(self, ids: Ints) -> bytes:
        """All bytes of a sequence of ids `[N]`."""
        blocks = (ids[start : start + _BLOCK] for start in range(0, len(ids), _BLOCK))
        return b"".join(self._blob[ranges(self._starts[block], self.lengths[block])].tobytes() for block in blocks)


class Vocabulary:
    """Bytes and role of every id.

    Args:
        kind: The tokenizer.
        name: What errors call it.
        size: Ids of the model's output, where it is padded beyond the tokenizer; the surplus ids have no token.

    Raises:
        ValueError: `size` is smaller than the tokenizer.
    """

    def __init__(self, kind: Kind, *, name: str = "tokenizer", size: int | None = None) -> None:
        self.kind, self.name = kind, name
        self.added = kind.added
        self.known = len(kind.pieces)
        self.size = self.known if size is None else size
        if self.size < self.known:
            raise ValueError(f"size {size} is smaller than {name} with {self.known} ids. Give the model's output size.")
        self.pieces: list[bytes] = [*kind.pieces, *[b""] * (self.size - self.known)]
        """Bytes per id; empty where there is no token."""
        self.special: NDArray[np.bool_] = np.zeros(self.size, bool)
        self.special[[id for id, entry in kind.added.items() if entry.special]] = True
        self._encoders: dict[tuple[str, ...], Encoder] = {}

    @cached_property
    def table(self) -> ByteTable:
        """The bytes of many ids at once."""
        return ByteTable(self.pieces)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """`[V]` bytes per id."""
        return self.table.lengths

    def text(self, ids: Ints) -> bytes:
        """All bytes of a sequence of ids `[N]`."""
        return self.table.text(ids)

    def id_of(self, content: str | None) -> int | None:
        """The id of an added or ordinary token by its exact text, None where there is none."""
        return None if content is None else self.kind.id_of(content)

    @cached_property
    def splitting(self) -> Splitting | None:
        """How the tokenizer splits a text, None where that may depend on more than neighbours."""
        return self.kind.splitting()

    def encoder(self, tags: tuple[str, ...]) -> Encoder:
        """What splits texts, see `Kind.encoder`; built once.

        Raises:
            ValueError: The library that splits cannot read the tokenizer, or is missing.
        """
        if tags not in self._encoders:
            try:
                self._encoders[tags] = self.kind.encoder(tags)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
        return self._encoders[tags]

    @cached_property
    def keys(self) -> list[tuple[bytes, bool]]:
        """Bytes and role (True: control token) per id: what two vocabularies can have in common."""
        return list(zip(self.pieces, self.special.tolist(), strict=True))


def vocabulary_of(source: Source, size: int | None = None) -> Vocabulary:
    """The vocabulary of a loaded tokenizer; the last few are remembered."""
    return _vocabulary(source.kind, source.name, size)


@lru_cache(maxsize=4)
def _vocabulary(kind: Kind, name: str, size: int | None) -> Vocabulary:
    return Vocabulary(kind, name=name, size=size)
