from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from tokenalign.patterns import Adjacency, is_read, neighbours

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s+(?!\S)|\s"
)
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
STEPS = [
    r"\p{N}{1,3}",
    "[一-龥ぁ-ん]+",
    r"[!-/:-@][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s+",
]
PATTERNS = {"gpt2": [GPT2], "llama": [LLAMA], "possessive": [POSSESSIVE], "cased": [CASED], "steps": STEPS}
CHARS = "aBsl12.'(/ \n\t中éñ"
texts = st.text(CHARS, max_size=12)


def parts(patterns: list[str], text: str) -> list[str]:
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns])
    return [text[start:end] for _, (start, end) in split.pre_tokenize_str(text)]


def refined(patterns: list[str], text: str, cuts: list[int]) -> list[str]:
    """The parts, cut further."""
    ends = accumulate(map(len, parts(patterns, text)))
    return [text[start:end] for start, end in pairwise(sorted({0, *ends, *cuts}))]


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_a_text_cut_between_characters_that_are_not_joined_is_searched_as_the_whole(patterns, text):
    group, joined = neighbours(patterns, CHARS)
    of = dict(zip(CHARS, group.tolist(), strict=True))
    cuts = [place for place in range(1, len(text)) if not joined[of[text[place - 1]], of[text[place]]]]
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    apart = [part for piece in pieces for part in parts(patterns, piece)]
    assert apart == refined(patterns, text, cuts) if text else not apart


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
def test_many_neighbours_are_not_joined(patterns):
    group, joined = neighbours(patterns, CHARS)
    assert joined[np.ix_(group, group)].mean() < 0.6


def test_control_a_cut_between_joined_characters_changes_the_search():
    for text, cut in [("12345", 1), ("a  b", 3)]:
        group, joined = neighbours([LLAMA], text)
        assert joined[group[cut - 1], group[cut]]
        apart = parts([LLAMA], text[:cut]) + parts([LLAMA], text[cut:])
        assert apart != refined([LLAMA], text, [cut])


def test_looking_ahead_joins_from_inside_groups_too():
    for pattern in (r"a+(?!b)", r"a(?:(?!b))", r"(?:x|a(?!b))+", r"a(?:c|(?=b))", "a$"):
        group, joined = neighbours([pattern, *"abcx"], "abcx")
        assert joined[group[0], group[1]], pattern
        assert not joined[group[2], group[1]], pattern


def test_limited_repetition_reads_as_any_repetition():
    for pattern in ("a{2}", "a{2,}", "a{0,3}b", "(?:a{1}){2}"):
        group, joined = neighbours([pattern], "ac")
        assert joined[group[0], group[0]], pattern
    group, joined = neighbours(["a{1}b?"], "ab")
    assert not joined[group[0], group[0]]


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?<=a)b",
        r"(?<!a)b",
        r"\bword\b",
        r"^a",
        r"\Aa",
        r"(a)\1",
        r"(?x) a",
        r"(?im:a)",
        r"a(?!bc)",
        r"(?=a*)b",
        r"a*",
        r"(?:a",
        r"a)",
        r"[ab",
        r"*a",
        r"\Ra",
        "(?i:ß)",
        "",
    ],
)
def test_what_is_not_read_is_refused_and_not_misread(pattern):
    assert not is_read(pattern)
    with pytest.raises(ValueError, match="pattern"):
        Adjacency(pattern)


def test_a_class_that_the_engine_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="cannot be read"):
        neighbours([r"\p{Nonsense}"], "a")
