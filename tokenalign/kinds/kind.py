"""What the rest of the package knows of a tokenizer, whatever library reads it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from tokenalign.splitting import Splitting

MOST_IDS = 1 << 24
"""More than any tokenizer has; a damaged file must not fill the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Added:
    """A token that is matched as a whole before any splitting, or that text never yields (a control token)."""

    content: str
    special: bool
    """True for a control token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelled:
    """One text as a tokenizer splits it."""

    ids: Sequence[int]
    """`[n]`"""
    starts: Sequence[int]
    """`[n]` bytes of the *given* text, in UTF-8, that lie before each token's start."""
    ends: Sequence[int]
    """`[n]` likewise for its end. Tokens that share the text of one character, or of one replacement, share its end."""


class Encoder(Protocol):
    """Splits texts. The text of a control token is ordinary text to it, unless the control token is a tag."""

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, read as the middle of one: no dummy prefix."""

    def spelled(self, texts: Sequence[str], *, opening: bool = False) -> list[Spelled]:
        """Ids and ends of each text, slower than `ids`.

        Args:
            texts: Any text.
            opening: Read each as the start of a text, with the dummy prefix that the tokenizer may add there.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """Tables of one tokenizer, and how to get its encoder."""

    pieces: Sequence[bytes]
    """Bytes per id; empty where there is no token."""
    added: Mapping[int, Added]
    """Control tokens and other tokens that are matched as a whole."""
    id_of: Callable[[str], int | None]
    """The id of a token by its exact text."""
    encoder: Callable[[tuple[str, ...]], Encoder]
    """Built from the tags, which are text even where the tokenizer has them as control tokens. Slow to build."""
    splitting: Callable[[], Splitting | None]
    """How a text is split in the middle, None where that may depend on more than neighbours."""
    rules: Any
    """Equal for two tokenizers with the same pieces exactly if they split every text alike, as far as is known."""
    dummy_prefix: bool = False
    """True if a text starts with a blank that is not in it."""
    free_blanks: frozenset[int] = frozenset()
    """Ids for which one blank at the start, or none, is a matter of convention and not of text."""
    unknown: int | None = None
    """The id that stands for whatever the tokenizer cannot spell."""
    declared: Mapping[str, str] = field(default_factory=dict)
    """Roles that the tokenizer itself declares, such as `{"eos_token": "</s>"}`."""
    bos: int | None = None
    """The control token that the tokenizer itself puts before a text."""
    pad: int | None = None
    """The pad token of its padding settings."""


def as_piece(token: str) -> bytes:
    """A token's text in UTF-8.

    Raises:
        ValueError: It holds a lone surrogate.
    """
    try:
        return token.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"token {token!r} is no text ({error.reason}). Repair the tokenizer's vocabulary.") from error


def by_id(tokens: Iterable[tuple[int, bytes]]) -> list[bytes]:
    """Pieces in a row, the id their place; empty where there is none.

    Raises:
        ValueError: There is no token at all, or an id is out of all proportion.

    >>> by_id([(2, b"b"), (0, b"a")])
    [b'a', b'', b'b']
    """
    known = dict(tokens)
    if not known:
        raise ValueError("its vocabulary is empty. Give a trained tokenizer.")
    wrong = next((id for id in known if not 0 <= id < MOST_IDS), None)
    if wrong is not None:
        raise ValueError(f"id {wrong} of {known[wrong]!r} is not within 0..{MOST_IDS - 1}. Repair the tokenizer.")
    return [known.get(id, b"") for id in range(1 + max(known))]


def exact(ids: Sequence[int], pieces: Sequence[bytes]) -> Spelled:
    """A spelling whose pieces add up to the text."""
    ends = list(accumulate((len(pieces[id]) for id in ids), initial=0))
    return Spelled(ids=ids, starts=ends[:-1], ends=ends[1:])
