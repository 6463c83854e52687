"""Which kind of tokenizer a file or an object is, told by content and never by name."""

import json
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from tokenalign.kinds import sentencepiece_model, tiktoken_ranks, tokenizer_json
from tokenalign.kinds.kind import Added, Kind

_RANK_FILE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_MODEL = b"\n"
"""A sentencepiece model starts with its first piece: field 1, of variable length."""


@lru_cache(maxsize=4)
def read(content: bytes, more: tuple[tuple[int, Added], ...] = ()) -> Kind:
    """The kind of a `tokenizer.json`, a `tekken.json` or a sentencepiece model; the last few are remembered.

    Args:
        content: Of the file.
        more: Ids and tokens beyond a sentencepiece model, from the settings beside it.

    Raises:
        ValueError: It is none of these, damaged, or of a kind that is not supported.
    """
    start = content.lstrip()[:1]
    if not start:
        raise ValueError("it is empty. Download or save it again.")
    if start == b"{":
        return _of_json(content)
    if _RANK_FILE.match(content):
        raise ValueError(
            "a tiktoken rank file does not say how texts are split. Give a tiktoken.Encoding that is built from it."
        )
    if not content.startswith(_MODEL):
        raise ValueError("it is no tokenizer: neither JSON nor a sentencepiece model. Give one of these.")
    return sentencepiece_model.kind_of(content, dict(more))


def _of_json(content: bytes) -> Kind:
    try:
        spec = json.loads(content)
    except ValueError as error:
        raise ValueError(f"it is not valid JSON ({error}). Download or save it again.") from error
    of = tokenizer_json.kind_of if "model" in spec else tiktoken_ranks.kind_of_tekken if "config" in spec else None
    if of is None:
        raise ValueError("its JSON is no tokenizer: it has neither a model nor a config. Give a tokenizer.json.")
    try:
        return of(spec)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"its JSON is no tokenizer ({type(error).__name__}: {error}). Download or save it again."
        ) from error


def kind_of_object(side: Any) -> Kind | None:
    """The kind of a library's tokenizer, or of an object around one; None where it is neither.

    `tokenizers.Tokenizer` or `.backend_tokenizer`, `sentencepiece.SentencePieceProcessor` or `.sp_model`,
    `tiktoken.Encoding`.

    Raises:
        ValueError: As `read`.
    """
    tiktoken = sys.modules.get("tiktoken")  # not imported: then it is none of its objects
    if tiktoken and isinstance(side, tiktoken.Encoding):
        return tiktoken_ranks.kind_of_encoding(side)
    for inner in (side, getattr(side, "backend_tokenizer", None), getattr(side, "sp_model", None)):
        if isinstance(inner, Tokenizer):
            return read(inner.to_str().encode())
        if inner is not None and hasattr(inner, "serialized_model_proto"):
            return read(inner.serialized_model_proto())
    return None


def added_tokens(decoder: Mapping[str, Any], ids: Mapping[str, int]) -> tuple[tuple[int, Added], ...]:
    """Tokens as the settings beside a model list them.

    Args:
        decoder: Id and properties, as `added_tokens_decoder` of a `tokenizer_config.json`.
        ids: Content and id, as `added_tokens.json`.

    Raises:
        ValueError: An id is no number from 0 on, or a content is no text.

    >>> added_tokens({"7": {"content": "<|im_end|>", "special": True}}, {"<x>": 8})
    ((7, Added(content='<|im_end|>', special=True)), (8, Added(content='<x>', special=False)))
    """
    listed: list[tuple[Any, Any, bool]] = [(id, content, False) for content, id in ids.items()]
    for id, entry in decoder.items():
        described = entry if isinstance(entry, Mapping) else {}
        listed.append((int(id) if id.isdecimal() else id, described.get("content"), bool(described.get("special"))))
    for id, content, _ in listed:
        if type(id) is not int or id < 0 or not isinstance(content, str):
            raise ValueError(f"the settings list an added token {content!r} with id {id!r}. Repair or remove it.")
    found = {id: Added(content=content, special=special) for id, content, special in listed}
    return tuple(sorted(found.items(), key=lambda item: item[0]))
