"""How fast a pair is, on this machine and a given text."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from tokenalign.commands import Outcome
from tokenalign.pair import Pair
from tokenalign.selfcheck import Progress

_LENGTH = 1024
"""Tokens of a row, as long as an ordinary response."""


def bench(make: Callable[[], Pair], texts: Sequence[bytes], count: int, progress: Progress) -> Outcome:
    """Tokens per second of what a training step would call.

    Args:
        make: Builds the pair.
        texts: What to repeat until there are enough tokens. The more they vary, the less is remembered from text to
            text when flags are cold.
        count: Student tokens to measure with.
        progress: Told what is being done.
    """
    progress("building the pair")
    built, pair = _timed(make)
    ours, theirs = pair.spellers
    progress("spelling the text")
    ids = [id for row in ours.spell(texts) for id in row]
    if not ids:
        raise ValueError("the text is empty, so there is nothing to measure. Give one with --file.")
    ids = (ids * (count // len(ids) + 1))[:count]
    rows = [ids[start : start + _LENGTH] for start in range(0, len(ids), _LENGTH)]
    written = [pair.student.pieces[id] for id in ids]
    lines = [b"".join(written[start : start + _LENGTH]) for start in range(0, len(ids), _LENGTH)]
    # What is built once is built before the clock starts.
    pair.flags([ids[:1]])
    progress("re-encoding")
    encoding, encoded = _timed(lambda: theirs.spell(lines))
    progress("flags, cold")
    cold, _ = _timed(lambda: [pair.flags([row]) for row in rows])
    progress("flags, warm")
    warm, _ = _timed(lambda: [pair.flags([row]) for row in rows])
    progress("align")
    pair.align(rows[0], encoded[0])
    aligning, _ = _timed(lambda: [pair.align(row, other) for row, other in zip(rows, encoded, strict=True)])
    seconds = {
        "re-encoding by the teacher": encoding,
        "flags, cold": cold,
        "flags, warm": warm,
        "align": aligning,
    }
    rates = {name: len(ids) / max(taken, 1e-9) for name, taken in seconds.items()}
    return Outcome(
        data={"tokens": len(ids), "build_seconds": built, "tokens_per_second": rates},
        text="\n".join(
            [
                f"{len(ids):,} student tokens in rows of {_LENGTH}; the pair was built in {built:.2f} s",
                *(f"{name:<28}{rate / 1e6:8.2f} M tokens/s" for name, rate in rates.items()),
            ]
        ),
        mismatch=False,
    )


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
