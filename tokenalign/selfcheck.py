"""Round trips over a corpus: is what the package says of a tokenizer true of it?"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tokenalign.commands import Outcome
from tokenalign.flags import Flag
from tokenalign.pair import Pair
from tokenalign.visible import visible

Progress = Callable[[str], None]
"""Told what is being done."""
Rows = Sequence[Sequence[int]]

_SHOWN = 5
"""Failures that are shown of each check; all are counted."""


def selfcheck(alone: Sequence[Pair], cross: Pair, texts: Sequence[bytes], progress: Progress) -> Outcome:
    """Check each text on its own.

    1. bytes: the bytes of a tokenizer's tokens are the text, byte for byte.
    2. canonical: its own spelling is what it would write itself.
    3. align: the spellings of the two sides align with `ok`, and chunks hold every token.
    4. teacher: what the teacher reads in place of the student's tokens is how it spells the text itself.

    Args:
        alone: Each tokenizer paired with itself.
        cross: The two paired; of one tokenizer, it paired with itself.
        texts: UTF-8; bytes that are no text are spelled one by one.
        progress: Told what is being done.
    """
    rows = []
    failures: dict[str, list[str]] = {}
    for pair in alone:
        name = pair.names[0]
        progress(f"{name}: spelling {len(texts)} texts")
        rows.append(pair.spellers[0].spell(texts))
        failures[f"{name}: bytes"] = [*_changed(pair, texts, rows[-1])]
        progress(f"{name}: flags")
        failures[f"{name}: canonical"] = [*_not_canonical(pair, texts, rows[-1])]
    progress("aligning")
    failures["align"] = [*_misaligned(cross, texts, rows[0], rows[-1])]
    failures["teacher"] = [*_respelled(cross, texts, rows[0], rows[-1])]
    tokens = {pair.names[0]: sum(map(len, side)) for pair, side in zip(alone, rows, strict=True)}
    counted = ", ".join(f"{count:,} tokens of {name}" for name, count in tokens.items())
    return Outcome(
        data={
            "texts": len(texts),
            "tokens": tokens,
            "checks": {
                check: {"right": len(texts) - len(found), "wrong": len(found), "first": found[:_SHOWN]}
                for check, found in failures.items()
            },
        },
        text="\n".join([f"{len(texts):,} texts, {counted}", *_lines(failures, len(texts))]),
        mismatch=any(failures.values()),
    )


def _lines(failures: dict[str, list[str]], count: int) -> Iterator[str]:
    width = max(map(len, failures))
    for check, found in failures.items():
        yield f"{check:<{width}}  {count - len(found)} right, {len(found)} wrong"
        yield from (f"  {failure}" for failure in found[:_SHOWN])


def _changed(pair: Pair, texts: Sequence[bytes], rows: Rows) -> Iterator[str]:
    for text, ids in zip(texts, rows, strict=True):
        again = pair.student.text(np.array(ids, np.int64))
        if again != text:
            yield f"{_short(text)} became {_short(again)}"


def _not_canonical(pair: Pair, texts: Sequence[bytes], rows: Rows) -> Iterator[str]:
    for text, ids in zip(texts, rows, strict=True):
        otherwise = pair.flags([list(ids)]).has(Flag.NONCANONICAL)[0]
        if otherwise.any():
            place = int(otherwise.argmax())
            yield f"{_short(text)}: token {place}, {_short(pair.student.pieces[ids[place]])}, is spelled otherwise"


def _misaligned(pair: Pair, texts: Sequence[bytes], ours: Rows, theirs: Rows) -> Iterator[str]:
    for text, student, teacher in zip(texts, ours, theirs, strict=True):
        found = pair.align(student, teacher)
        held = found.chunks.sum(0).tolist()
        if not found.ok:
            yield f"{_short(text)}: the two sides are not the same text"
        elif held != [len(student), len(teacher)]:
            yield f"{_short(text)}: chunks hold {held} of {[len(student), len(teacher)]} tokens"


def _respelled(pair: Pair, texts: Sequence[bytes], ours: Rows, theirs: Rows) -> Iterator[str]:
    for text, student, teacher in zip(texts, ours, theirs, strict=True):
        given = pair.to_teacher([list(student)]).ids[0].tolist()
        if given != list(teacher):
            yield f"{_short(text)}: the teacher reads {len(given)} tokens, its own spelling has {len(teacher)}"


def _short(text: bytes, length: int = 40) -> str:
    shown = visible(text[: 4 * length])
    return shown if len(shown) <= length else shown[: length - 1] + "…"
