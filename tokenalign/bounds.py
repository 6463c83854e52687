"""What a program from somebody else may use up: steps, characters and seconds.

An operation is weighed before it runs, by the size of what it works on times that of its arguments, and its result is
counted after. So one operation is never long, and the clock, which is read between operations, stops a row of many.
"""

import re
import time
from collections.abc import ItemsView, Iterable, KeysView, ValuesView
from typing import Any

MAX_SIZE = 1_000_000
"""Characters of a text, entries of a container with all that it contains, and the weight of one operation."""
MAX_TOTAL = 20_000_000
"""Characters and entries of all results together."""
MAX_STEPS = 200_000
"""Loop passes, calls, operators and look-ups."""
MAX_SECONDS = 2.0

_NUMBER = re.compile(r"\d+")
_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)


class ExceededError(ValueError):
    """More was asked for than the bounds allow."""


class Budget:
    """Counts what is used; every method raises `ExceededError` where it is too much."""

    def __init__(self) -> None:
        self.seconds = MAX_SECONDS
        self.start()

    def start(self) -> None:
        """Count anew, but for the seconds that are left."""
        self._steps = self._total = 0
        self._started = time.perf_counter()

    def stop(self) -> None:
        """No seconds pass until the next start."""
        self.seconds -= time.perf_counter() - self._started

    def step(self, count: int = 1) -> None:
        """An operation, or a pass of a loop."""
        self._steps += count
        if self._steps > MAX_STEPS:
            raise ExceededError(f"it takes more than {MAX_STEPS} steps")
        if time.perf_counter() - self._started > self.seconds:
            raise ExceededError(f"it takes more than {MAX_SECONDS} seconds")

    def weigh(self, *sizes: int) -> None:
        """An operation on things of these sizes."""
        self.step()
        weight = 1
        for size in sizes:
            weight *= max(size, 1)
            _require(weight)

    def take(self, value: Any) -> Any:
        """The result of an operation, which is handed back."""
        self.step()
        self._count(size_of(value))
        return value

    def join(self, pieces: Iterable[str]) -> str:
        """All pieces in one text, no further than the bounds."""
        texts, size = [], 0
        for piece in pieces:
            texts.append(piece)
            size += len(piece)
            _require(size)
        self._count(size)
        return "".join(texts)

    def _count(self, size: int) -> None:
        _require(size)
        self._total += size
        if self._total > MAX_TOTAL:
            raise ExceededError(f"it builds more than {MAX_TOTAL} characters in all")


def _require(size: int) -> None:
    if size > MAX_SIZE:
        raise ExceededError(f"it builds more than {MAX_SIZE} characters at once")


def size_of(value: Any, *, counts: bool = False) -> int:
    """Characters of a text, digits of a number, entries of a container and the sizes of these; else 1.

    Args:
        value: Anything. Beyond `MAX_SIZE` it is counted no further.
        counts: A number stands for so many characters or entries, as the width does to which a text is filled up.

    >>> size_of("word"), size_of(["word", [1, 2]]), size_of(500), size_of(500, counts=True)
    (4, 10, 3, 500)
    """
    total, pending = 0, [value]
    while pending and total <= MAX_SIZE:
        value = pending.pop()
        if isinstance(value, str | bytes | range):
            total += len(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            total += abs(value) if counts else 1 + value.bit_length() * 3 // 10
        elif isinstance(value, _CONTAINERS):
            total += len(value)
            pending.extend(value)
            pending.extend(value.values() if isinstance(value, dict) else ())
        else:
            total += 1
    return total


def size_of_layout(layout: str) -> int:
    """Characters that a format string can fill up: its own, and every number in it taken for a width.

    Raises:
        ExceededError: A width is to be computed from a value (`{:{width}}`), which could be any.

    >>> size_of_layout("%5d and %s")
    15
    """
    if re.search(r"\{[^{}]*\{", layout):
        raise ExceededError("it formats to a width that it computes")
    numbers = _NUMBER.findall(layout)
    return len(layout) + sum(int(number) if len(number) < 8 else MAX_SIZE for number in numbers)
