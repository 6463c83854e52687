"""Questions about one tokenizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenalign.arguments import checked_ids
from tokenalign.comparison import find_within
from tokenalign.flags import Flag
from tokenalign.pair import Pair
from tokenalign.source import load
from tokenalign.vocabulary import vocabulary_of


def canonical(tokenizer: Any, ids: ArrayLike) -> NDArray[np.bool_]:
    """True where a token stands where the tokenizer itself would put it, in the shape of the ids.

    Args:
        tokenizer: Whatever `Pair` accepts.
        ids: `[B, T]`, or one row `[T]`.

    Raises:
        FileNotFoundError, ValueError: As `Pair` and `Pair.flags`.
    """
    source = load(tokenizer)
    return ~Pair(source, source).flags(ids).has(Flag.NONCANONICAL)


def tag_spans(tokenizer: Any, ids: ArrayLike, tags: Sequence[str]) -> list[list[tuple[int, int, str]]]:
    """Where tags stand, in any segmentation.

    Args:
        tokenizer: Whatever `Pair` accepts.
        ids: `[B, T]`, or one row `[T]`, which gives a list with one entry.
        tags: Texts to find, such as `["<think>", "</think>"]`.

    Returns:
        Per row the first token, one past the last token and the tag, in order. A token that only touches a tag counts.

    Raises:
        FileNotFoundError, ValueError: As `Pair` and `Pair.flags`, or a tag is empty or no text.
    """
    wanted = {tag: _as_bytes(tag) for tag in ([tags] if isinstance(tags, str) else tags)}
    vocabulary = vocabulary_of(load(tokenizer))
    rows = np.atleast_2d(checked_ids(ids, vocabulary))
    sizes = vocabulary.lengths[rows]
    text, ends = vocabulary.text(rows.ravel()), np.cumsum(sizes)
    before = np.cumsum(sizes.sum(axis=1)) - sizes.sum(axis=1)
    spans: list[list[tuple[int, int, str]]] = [[] for _ in rows]
    for tag, content in wanted.items():
        for row, start, end in find_within(text, [content], before):
            first, last = (np.searchsorted(ends, [start, end - 1], side="right") - row * rows.shape[1]).tolist()
            spans[row].append((first, last + 1, tag))
    return [sorted(row) for row in spans]


def _as_bytes(tag: str) -> bytes:
    if not isinstance(tag, str) or not tag:
        raise ValueError(f"tags contain {tag!r}, which is " + ("everywhere. Remove it." if tag == "" else "no text."))
    try:
        return tag.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"tags contain {tag!r}, which no text contains ({error.reason}). Remove it.") from error
