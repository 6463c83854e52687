"""How a tokenizer treats a text before it makes tokens of it, as far as that depends on nothing but neighbours."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

Spec = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """What a tokenizer does with a text before it makes tokens."""

    patterns: tuple[str, ...] = ()
    """By which it searches the text to split it."""
    isolates: bool = False
    """True if each match, and what lies between two, is spelled on its own."""
    normalize: Callable[[str], str] = str
    """What it makes of one character; empty for one beside which nothing is sure."""
    opens: str | None = None
    """Characters before which alone parts are certain to be spelled apart; None: wherever no token reaches across."""


_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""By which the tokenizers library splits where it is told to write bytes and nothing else."""
_WORDS = r"\w+|[^\w\s]+"
BLANK_RUN = r"\s+(?!\S)"

# These look at one character, or at one and those that combine with it.
_LOCAL_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "BertNormalizer", "Prepend")
# These put a boundary between two characters or not, whatever stands around the two.
_LOCAL_PRE_TOKENIZERS = ("Digits", "Punctuation", "CharDelimiterSplit", "WhitespaceSplit", "BertPreTokenizer")
# These write the text anew, so that a pattern after them would see other characters.
_REWRITING = ("ByteLevel", "Metaspace")


def of_tokenizer_json(model: Spec, normalizers: Collection[Spec], pre_tokenizers: Collection[Spec]) -> Splitting | None:
    """How a `tokenizer.json` splits, None where that is not known to depend on neighbours only.

    Args:
        model: Its model.
        normalizers: The members of its normaliser, in order.
        pre_tokenizers: The members of its pre-tokenizer, in order.
    """
    patterns = _patterns(pre_tokenizers)
    of_blanks = [part for part in normalizers if _is_of_blanks(part)]
    normalizers = [part for part in normalizers if part not in of_blanks]
    if patterns is None or any(_is_wide(part) for part in normalizers):
        return None
    if of_blanks:  # a run of blanks stays whole, and with what follows it
        patterns = (*patterns, BLANK_RUN)
    isolates = all(part["type"] == "ByteLevel" or part.get("behavior") == "Isolated" for part in pre_tokenizers)
    normalize = _normalize(normalizers, pre_tokenizers)
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
    if kind == "BPE":
        opens = " " if of_blanks else None
        return Splitting(patterns=patterns, isolates=isolates and not of_blanks, normalize=normalize, opens=opens)
    if kind == "Unigram":
        # Of two paths of equal weight, rounding chooses by what stands before; it starts anew where words are split.
        words = any(part["type"] == "Metaspace" and part.get("split", True) for part in pre_tokenizers)
        return Splitting(patterns=patterns, normalize=normalize, opens=" ") if words else None
    # Whether a token continues a word depends on where the word starts, and a blank belongs to the word after it.
    return Splitting(patterns=(*patterns, BLANK_RUN), normalize=normalize, opens=" ")


def _patterns(pre_tokenizers: Collection[Spec]) -> tuple[str, ...] | None:
    patterns: list[str] = []
    rewritten = False
    for part in pre_tokenizers:
        if part["type"] == "Split":
            pattern = part["pattern"]
            new = [pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])]
        elif part["type"] == "Whitespace":
            new = [_WORDS]
        elif part["type"] in _REWRITING:
            new = [_BYTE_LEVEL] if part["type"] == "ByteLevel" and part.get("use_regex", True) else []
        elif part["type"] in _LOCAL_PRE_TOKENIZERS:
            new = []
        else:
            return None
        if new and rewritten:
            return None
        patterns += new
        rewritten = rewritten or part["type"] in _REWRITING
    return tuple(patterns)


def _is_wide(normalizer: Spec) -> bool:
    """True for what may look beyond a character and those that combine with it."""
    if normalizer["type"] == "Replace":
        return len(normalizer["pattern"].get("String", "")) != 1
    return normalizer["type"] not in (*_LOCAL_NORMALIZERS, "Precompiled")


def _is_of_blanks(normalizer: Spec) -> bool:
    """True for what makes one blank of a run, or drops blanks at the end of a text."""
    if normalizer["type"] == "Strip":
        return not normalizer["strip_left"]
    runs = normalizer["type"] == "Replace" and normalizer["pattern"].get("Regex") in (" {2,}", " +", r"\s+")
    return runs and normalizer["content"] in (" ", "▁")


def _normalize(normalizers: Collection[Spec], pre_tokenizers: Collection[Spec]) -> Callable[[str], str]:
    """What becomes of one character. One that stands for a blank, such as ▁, is a blank here."""
    members = [part for part in normalizers if part["type"] != "Prepend"]
    marks = [part["content"] for part in members if part["type"] == "Replace" and part["pattern"] == {"String": " "}]
    marks += [part.get("replacement") or "▁" for part in pre_tokenizers if part["type"] == "Metaspace"]
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        "normalizer": {"type": "Sequence", "normalizers": members},
    }
    normalizer = Tokenizer.from_str(json.dumps(spec)).normalizer
    # Such a table of replacements may hold several characters in a row, but not of these.
    only_ascii = any(part["type"] == "Precompiled" for part in members)

    def normalize(char: str) -> str:
        if only_ascii and not char.isascii():
            return ""
        text = normalizer.normalize_str(char) if members else char
        for mark in marks:
            text = text.replace(mark, " ")
        return text

    return normalize
