"""Questions about one tokenizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenalign.arguments import checked_ids
from tokenalign.comparison import find
from tokenalign.flags import Flag
from tokenalign.pair import Pair
from tokenalign.source import load
from tokenalign.vocabulary import vocabulary_of


def canonical(tokenizer: Any, ids: ArrayLike) -> NDArray[np.bool_]:
    """`[B, T]` True where a token stands where the tokenizer itself would put it.

    Args:
        tokenizer: Whatever `Pair` accepts.
        ids: `[B, T]`

    Raises:
        FileNotFoundError, ValueError: As `Pair` and `Pair.flags`.
    """
    source = load(tokenizer)
    return ~Pair(source, source).flags(ids).has(Flag.NONCANONICAL)


def tag_spans(tokenizer: Any, ids: ArrayLike, tags: Sequence[str]) -> list[list[tuple[int, int, str]]]:
    """Where tags stand, in any segmentation.

    Args:
        tokenizer: Whatever `Pair` accepts.
        ids: `[B, T]`
        tags: Texts to find, such as `["<think>", "</think>"]`.

    Returns:
        Per row the first token, one past the last token and the tag, in order. A token that only touches a tag counts.

    Raises:
        FileNotFoundError, ValueError: As `Pair` and `Pair.flags`, or a tag is empty.
    """
    if "" in tags:
        raise ValueError('tags contain "", which is everywhere. Remove it.')
    vocabulary = vocabulary_of(load(tokenizer))
    rows = []
    for row in checked_ids(ids, vocabulary, axes=2):
        text, ends = vocabulary.text(row), np.cumsum(vocabulary.lengths[row])
        found = [(start, end, tag) for tag in tags for start, end in find(text, [tag.encode()])]
        rows.append(sorted((_token(ends, start), _token(ends, end - 1) + 1, tag) for start, end, tag in found))
    return rows


def _token(ends: NDArray[np.int64], byte: int) -> int:
    """The token that holds a byte."""
    return int(np.searchsorted(ends, byte, side="right"))
