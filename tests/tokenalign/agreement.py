"""Pairs about which both the package and the reference are asked, and the questions."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import reference
from reference import Reference, Side
from streams import SNIPPETS, Streams
from tokenizer_kit import (
    CORPUS,
    END,
    IM_END,
    TAGS,
    Wrapped,
    byte_level,
    train,
    train_metaspace,
    unreachable,
    with_tokens,
)
from tokenizers import AddedToken, Tokenizer, normalizers

import tokenalign as ta
from tokenalign import Flag

POLICIES = ("paper", "tags", "canonical", "strict")
PAD = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pair."""

    student: Side
    teacher: Side
    templates: tuple[str | None, str | None] = (None, None)

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.student, self.teacher)

    def pair(self) -> ta.Pair:
        """A new one, which remembers nothing."""
        sides = [self._given(self.student, self.templates[0]), self._given(self.teacher, self.templates[1])]
        return ta.Pair(*sides, student_size=len(self.student.pieces), teacher_size=len(self.teacher.pieces))

    @staticmethod
    def _given(side: Side, template: str | None) -> Wrapped:
        declared = {} if side.pad is None else {"pad_token": side.tokenizer.id_to_token(side.pad)}
        for id in side.ends - (set() if template is None else {side.own_end}):
            declared["eos_token"] = side.tokenizer.id_to_token(id)
        return Wrapped(side.tokenizer, template, declared)

    @cached_property
    def streams(self) -> Streams:
        tokenizer = self.student.tokenizer
        rng = random.Random(0)
        texts = [*CORPUS[:4], *("".join(rng.choices(SNIPPETS, k=8)) for _ in range(40))]
        natural = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        pieces = self.student.pieces
        silent = [id for id, piece in enumerate(pieces) if self.student.special(id) or not piece]
        return Streams(pieces, [*silent, *self.student.ends], natural)


def side(tokenizer: Tokenizer, end: str | None = None, pad: str | None = None, **more: Any) -> Side:
    """A tokenizer with one end-of-turn token and a pad token."""
    end_id, pad_id = (None if token is None else tokenizer.token_to_id(token) for token in (end, pad))
    ends = frozenset() if end_id is None else frozenset([end_id])
    return Side(tokenizer=tokenizer, ends=ends, own_end=end_id, pad=pad_id, **more)


def with_normalizer(tokenizer: Tokenizer, normalizer: normalizers.Normalizer) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.normalizer = normalizer
    return copy


def stripping(tokenizer: Tokenizer) -> Tokenizer:
    """With tokens that take the blanks beside them along."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_tokens(
        [AddedToken("<x>", rstrip=True, normalized=False), AddedToken("ink", lstrip=True, normalized=False)]
    )
    copy.add_tokens([AddedToken("42", lstrip=True, rstrip=True, normalized=False)])
    return copy


def _cases() -> dict[str, Callable[[], Case]]:
    base = unreachable(train(), TAGS)
    ours = side(base, "<|im_end|>", PAD)

    def to(tokenizer: Tokenizer, **more: Any) -> Case:
        return Case(student=side(base), teacher=side(tokenizer, **more))

    return {
        "tags whole, turns ended otherwise": lambda: Case(
            student=ours, teacher=side(with_tokens(base, TAGS), "<|end|>", PAD), templates=(IM_END, END)
        ),
        "pad ends turns": lambda: Case(student=side(base, PAD, PAD), teacher=side(base, "<|im_end|>", PAD)),
        "two tokens end turns": lambda: Case(
            student=replace(ours, ends=ours.ends | {base.token_to_id("<|end|>")}),
            teacher=side(base, "<|im_end|>"), templates=(IM_END, IM_END),
        ),
        "control tokens are words to the teacher": lambda: Case(
            student=ours, teacher=side(with_tokens(train(special=[]), ["<|im_end|>", "<|im_start|>"])),
            templates=(IM_END, None),
        ),
        "itself": lambda: Case(student=ours, teacher=ours, templates=(IM_END, IM_END)),
        "tags as control tokens": lambda: Case(
            student=side(train()), teacher=side(with_tokens(train(), TAGS, special=True))
        ),
        "student's tags are control tokens": lambda: Case(
            student=side(with_tokens(train(), TAGS, special=True)), teacher=side(train())
        ),
        "strangers": lambda: to(byte_level(r"\p{L}+|\p{N}{1,2}|[^\p{L}\p{N}]+")),
        "other ids": lambda: Case(
            student=ours, teacher=side(train(special=["<pad>", PAD]), pad=PAD), templates=(IM_END, None)
        ),
        "more ids than tokens": lambda: Case(student=side(base, surplus=5), teacher=side(train(), surplus=9)),
        "longer words": lambda: to(with_tokens(base, ["the think", " the", "think>"])),
        "blanks taken along": lambda: to(stripping(base)),
        "blanks taken along by the student": lambda: Case(student=side(stripping(base)), teacher=side(base)),
        "lower case": lambda: to(with_normalizer(base, normalizers.Lowercase())),
        "composed": lambda: to(with_normalizer(base, normalizers.NFC())),
        "byte-level to marked": lambda: to(train_metaspace("first"), marked=True),
        "unsplit to marked": lambda: to(train_metaspace("never", split=False), marked=True),
        "marked to byte-level": lambda: Case(student=side(train_metaspace("always"), marked=True), teacher=side(base)),
        "marked to itself": lambda: Case(
            student=side(train_metaspace("first"), end="</s>", marked=True),
            teacher=side(train_metaspace("always"), end="</s>", marked=True),
        ),
    }  # fmt: skip


CASES = _cases()

COARSER = Flag.NONCANONICAL | Flag.MISALIGNED
UNSURE = Flag.NORMALISED | COARSER


def joins(coarse: Sequence[int], fine: Sequence[int]) -> bool:
    """True if the same tokens have a chunk, and each coarse chunk is one or several fine ones."""
    pairs = set(zip(fine, coarse, strict=True))
    return len(pairs) == len(set(fine)) and all((one < 0) == (other < 0) for one, other in pairs)


def check(
    case: Case, pair: ta.Pair, rows: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], dtype: Any = int
) -> None:
    """Flags, policies and the teacher's text of a batch of equally long rows.

    Raises:
        AssertionError: Package and reference disagree.
    """
    width = len(rows[0])
    ids = np.array(rows, dtype).reshape(len(rows), width)
    mask = np.array(masks, bool).reshape(len(rows), width)
    flags, spelled = pair.flags(ids, mask), pair.to_teacher(ids, mask)
    for place, (row, own) in enumerate(zip(rows, masks, strict=True)):
        expected = case.reference.row(row, own)
        bits, alignment = flags.bits[place].tolist(), spelled.alignments[place]
        assert spelled.ids[place].tolist() == expected.teacher_ids, row
        assert expected.broken or alignment.ok == expected.ok, row
        found = [*alignment.student_chunk.tolist(), *alignment.teacher_chunk.tolist()]
        chunks = [*expected.student_chunk, *expected.teacher_chunk]
        assert expected.broken or found == chunks or (expected.changed and joins(found, chunks)), (row, found, chunks)
        # What the package cannot tell apart it flags, and nothing else.
        allowed = UNSURE if expected.broken else COARSER if expected.changed else Flag(0)
        agree = [
            a | allowed == b | allowed and (expected.broken or a & b == b)
            for a, b in zip(bits, expected.bits, strict=True)
        ]
        assert all(agree), _told(case, row, bits, expected.bits)
        assert alignment.chunks.sum(axis=0).tolist() == [
            (alignment.student_chunk >= 0).sum(),
            len(expected.teacher_ids),
        ]
        assert (alignment.chunks >= 1).all()
    for policy in POLICIES:
        for end_class in (False, True):
            kept = flags.keep(policy, end_class).tolist()
            for row, bits, own in zip(rows, flags.bits.tolist(), kept, strict=True):
                assert own == reference.keep(row, bits, policy, end_class), (policy, row)


def _told(case: Case, row: Sequence[int], found: Sequence[int], expected: Sequence[int]) -> str:
    lines = [
        f"{id:5} {case.student.pieces[id]!r:16} found {Flag(a)!r:60} expected {Flag(b)!r}"
        for id, a, b in zip(row, found, expected, strict=True)
    ]
    return "\n".join([str(list(row)), *lines])
