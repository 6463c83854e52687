r"""Is the answer in the last \boxed{} of a response the gold answer?"""

import re
from enum import Enum

MAX_ANSWER = 300
"""Longest answer that is looked at, in characters."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


class Verdict(Enum):
    """What `grade` says about a response."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_BOX = "no_box"
    """There is no closed box after the thinking."""
    TIMEOUT = "timeout"
    """The symbolic comparison did not come to an end: counts as wrong, reported apart."""


def extract_answer(response: str) -> str | None:
    r"""What stands in the last \boxed{} after the last </think>, or None without one that closes within the limit.

    >>> extract_answer(r"<think>\boxed{1}?</think> So \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    text = response.rpartition("</think>")[2]
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    box = _BOX.match(text, start) if start >= 0 else None
    return _until_closed(text, box.end()) if box else None


def _until_closed(text: str, begin: int) -> str | None:
    depth = 1
    for position in range(begin, min(len(text), begin + MAX_ANSWER + 1)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def grade(gold: str, response: str) -> Verdict:
    """Compare the boxed answer of a response with the gold answer."""
    answer = extract_answer(response)
    if answer is None:
        return Verdict.NO_BOX
    return Verdict.CORRECT if answer.strip() == gold.strip() else Verdict.WRONG
