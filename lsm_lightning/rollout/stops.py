"""Strings that end an answer: at which token has its text come to hold one?"""

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from lsm_lightning.errors import ConfigurationError
from tokenalign.source import load


class StopStrings:
    """Looks for strings in the bytes of tokens, since a token may hold half a character.

    Args:
        pieces: Bytes of every token.
        strings: None of them empty.

    >>> stops = StopStrings([b"<", b"/b>", b"b"], ["</b>"])
    >>> [stops.completed_by(ids) for ids in ([0, 2], [0, 1], [1])]
    [False, True, False]
    """

    def __init__(self, pieces: Sequence[bytes], strings: Sequence[str]) -> None:
        self._strings = [string.encode() for string in strings]
        self._pieces = pieces
        self._before = max(map(len, self._strings)) - 1
        last = [string[-1:] for string in self._strings]
        self._may_complete = frozenset(i for i, piece in enumerate(pieces) if any(byte in piece for byte in last))

    def completed_by(self, ids: Sequence[int]) -> bool:
        """Whether the last token completes one, if no token before it did."""
        if ids[-1] not in self._may_complete:
            return False
        text, place = self._pieces[ids[-1]], len(ids) - 1
        wanted = len(text) + self._before
        while place and len(text) < wanted:
            place -= 1
            text = (self._pieces[ids[place]] if ids[place] < len(self._pieces) else b"") + text
        return any(string in text[-wanted:] for string in self._strings)


@lru_cache(maxsize=4)
def stop_strings(tokenizer: PreTrainedTokenizerBase, strings: tuple[str, ...]) -> StopStrings:
    """Of a tokenizer; the last few are remembered.

    Raises:
        ConfigurationError: What the tokens stand for is not known.
    """
    try:
        return StopStrings(load(tokenizer).kind.pieces, strings)
    except ValueError as error:
        raise ConfigurationError(f"sampling.stop needs the bytes of each token, but {error}") from error
