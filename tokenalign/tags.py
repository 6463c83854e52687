"""Tags: texts such as `<think>` that structure a response, and how a tokenizer holds each."""

from collections.abc import Iterable, Sequence
from enum import StrEnum

from tokenalign.speller import Speller

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<action>", "</action>")
"""Tags even where no template names them."""


class Held(StrEnum):
    """How a tokenizer spells a tag."""

    SPECIAL = "one special token"
    """A control token; the text of the tag is never read as one, only written."""
    TOKEN = "one token"
    """An ordinary token, added or merged."""
    PIECES = "pieces"
    """Several tokens."""


def checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """The tags that a caller names.

    Raises:
        ValueError: One text in place of several, an empty tag, or one that is no text.
    """
    if isinstance(tags, str):
        raise ValueError(f"tags are {tags!r}, one text. Give several, such as ({tags!r},).")
    named = tuple(tags)
    for tag in named:
        if not isinstance(tag, str) or not tag:
            raise ValueError(f"{tag!r} is no tag. Give texts that are not empty, such as '<think>'.")
        try:
            tag.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"tag {tag!r} occurs in no text ({error.reason}). Remove it.") from error
    return named


def holding(speller: Speller, tags: Sequence[str]) -> dict[str, Held]:
    """How a tokenizer holds each of the tags that its speller was built with."""
    vocabulary = speller.vocabulary
    spelled = speller.spell([tag.encode() for tag in tags])
    return {
        tag: Held.PIECES if len(ids) != 1 else Held.SPECIAL if vocabulary.special[ids[0]] else Held.TOKEN
        for tag, ids in zip(tags, spelled, strict=True)
    }
