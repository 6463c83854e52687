import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tokenalign import Flag, TokenFlags

POLICIES = ["paper", "tags", "canonical", "strict"]

flagged = arrays(np.uint16, st.tuples(st.integers(1, 3), st.integers(1, 12)), elements=st.integers(0, 1023)).map(
    lambda bits: TokenFlags(ids=np.arange(bits.size).reshape(bits.shape) % 3, bits=bits)
)


def slow_paper(flags: TokenFlags) -> list[list[bool]]:
    """Read each row from the left, remembering what was dropped already."""
    rows = []
    for ids, bits in zip(flags.ids.tolist(), flags.bits.tolist(), strict=True):
        seen: set[object] = set()
        row = []
        for id, bit in zip(ids, bits, strict=True):
            piece = "end" if bit & Flag.EOS_CLASS else id if bit & Flag.TAG and bit & Flag.NONCANONICAL else None
            outside = bool(bit & (Flag.PAD | Flag.PROMPT))
            row.append(not outside and (piece is None or piece in seen))
            if not outside and piece is not None:
                seen.add(piece)
        rows.append(row)
    return rows


@given(flagged)
def test_paper_equals_a_slow_reading(flags):
    assert flags.keep("paper").tolist() == slow_paper(flags)


@given(flagged, st.sampled_from(POLICIES), st.booleans())
def test_padding_and_prompt_are_never_kept(flags, policy, end_class):
    assert not (flags.keep(policy, end_class) & flags.has(Flag.PAD | Flag.PROMPT)).any()


@given(flagged, st.booleans())
def test_policies_are_ordered(flags, end_class):
    tags, canonical, strict = (flags.keep(policy, end_class) for policy in POLICIES[1:])
    assert (canonical <= tags).all()
    assert (strict <= flags.keep("canonical")).all()


@given(flagged, st.sampled_from(POLICIES))
def test_end_class_only_adds_end_tokens(flags, policy):
    added = flags.keep(policy, end_class=True) & ~flags.keep(policy)
    assert not (added & ~flags.has(Flag.EOS_CLASS)).any()
    assert policy != "strict" or not added.any()


@given(flagged)
@settings(max_examples=20)
def test_counts_are_positions(flags):
    assert flags.count() == {flag.name: sum(bool(bit & flag) for bit in flags.bits.ravel().tolist()) for flag in Flag}


def test_unknown_policy_names_the_choice():
    flags = TokenFlags(ids=np.zeros((1, 1), int), bits=np.zeros((1, 1), np.uint16))
    with pytest.raises(ValueError, match=r"'none' is unknown\. Use one of 'paper', 'tags', 'canonical', 'strict'"):
        flags.keep("none")
