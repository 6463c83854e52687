import pytest
from tokenizer_kit import END, IM_END, TAGS, Wrapped, train, unreachable, with_tokens
from tokenizers import Tokenizer, normalizers

import tokenalign as ta


@pytest.fixture(scope="session")
def base() -> Tokenizer:
    """Spells the tags in pieces, and has each as one ordinary token that it never writes."""
    return unreachable(train(), TAGS)


@pytest.fixture(scope="session")
def student(base: Tokenizer) -> Wrapped:
    return Wrapped(base, IM_END, {"pad_token": "<|endoftext|>"})


@pytest.fixture(scope="session")
def teacher(base: Tokenizer) -> Wrapped:
    return Wrapped(with_tokens(base, TAGS), END, {"pad_token": "<|endoftext|>"})


@pytest.fixture(scope="session")
def pair(student: Wrapped, teacher: Wrapped) -> ta.Pair:
    """The product's default: one vocabulary, tags whole only at the teacher, turns ended otherwise."""
    return ta.Pair(student, teacher)


@pytest.fixture(scope="session")
def cased(base: Tokenizer) -> Tokenizer:
    """A tokenizer whose normaliser changes text."""
    copy = Tokenizer.from_str(base.to_str())
    copy.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return copy
