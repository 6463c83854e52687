r"""Is the answer in the last \boxed{} of a response the gold answer?

Cheap rules on the text decide nearly always; what is left goes to math-verify in a process with a time limit. Model
text is untrusted: it is never evaluated in this process, and what could keep any process busy is refused by its looks.
"""

import re
from enum import Enum

from lsm_lightning.tasks.grading_numbers import (
    as_union,
    is_name,
    read_number,
    same_in_any_order,
    same_list,
    same_number,
    split_items,
    without_unit,
)
from lsm_lightning.tasks.grading_process import SymbolicComparer
from lsm_lightning.tasks.grading_text import clean, compact, without_text

MAX_BOX = 2000
"""Longest box that is read, in characters."""
MAX_EXPRESSION = 300
"""Longest answer that is compared other than as text, in characters."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BARE_BOX = re.compile(r"\\boxed\s+([-+]?[\w.,/]*\w)")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z]+\}|\\[a-zA-Z]+")
_HEDGE = re.compile(r"(?<![a-zA-Z\\])(?:or|maybe|perhaps|possibly|either)(?![a-zA-Z])")
_SEVERAL = re.compile(r"[,;]|\\pm|\\cup|\\\{|(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])")
_RELATION = re.compile(r"=|\\approx|[<>]|\\[lg]eq|\\neq|\\in(?![a-z])")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?|\(([A-Z])\) .*|([A-Z])[.:] .*", re.DOTALL)
_BASED = re.compile(r"(\d+)\s*_\s*\{?\s*(\d+)\s*\}?")
_RATIO = re.compile(r"(\d+)\s*:\s*(\d+)")
_ALLOWED = re.compile(r"[A-Za-z0-9\s\\{}()\[\]|^_+\-*/=<>,.:!&'%]+")
_BUSY = re.compile(
    r"\*\*|__|\d{50}|"
    r"\^\s*\{?\s*-?\s*\d{5}|\^\s*\{?\s*\d+\s*\^|"  # huge exponents, towers of powers
    r"\d{4}\s*\)?\s*!|!\s*\)?\s*!|\^[^()]*\)\s*!|\}\s*!"  # huge factorials
)

_comparer = SymbolicComparer()


class Verdict(Enum):
    """What `grade` says about a response."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_BOX = "no_box"
    """There is no closed box after the thinking."""
    TIMEOUT = "timeout"
    """The symbolic comparison did not come to an end: counts as wrong, reported apart."""


def extract_answer(response: str) -> str | None:
    r"""What stands in the last \boxed{} after the last </think>, or None without one that closes within `MAX_BOX`.

    >>> extract_answer(r"<think>\boxed{1}?</think> So \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    text = response.rpartition("</think>")[2]
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    if box := _BOX.match(text, start):
        return _until_closed(text, box.end())
    bare = _BARE_BOX.match(text, start)
    return bare[1] if bare else None


def _until_closed(text: str, begin: int) -> str | None:
    depth = 1
    for position in range(begin, min(len(text), begin + MAX_BOX + 1)):
        if text[position] in "{}" and text[position - 1] != "\\":
            depth += 1 if text[position] == "{" else -1
        if depth == 0:
            return text[begin:position]
    return None


def grade(gold: str, response: str) -> Verdict:
    r"""Compare the boxed answer of a response with the gold answer (LaTeX or plain, without a box).

    >>> grade("0.5", r"<think>Half of 1.</think>\boxed{\frac12}")
    <Verdict.CORRECT: 'correct'>
    """
    answer = extract_answer(response)
    return Verdict.NO_BOX if answer is None else _compare(clean(gold), clean(answer))


def _compare(gold: str, answer: str) -> Verdict:
    if compact(gold) == compact(answer) != "":
        return Verdict.CORRECT
    if not answer or len(answer) > MAX_EXPRESSION or _hedges(gold, answer):
        return Verdict.WRONG
    decided = _by_words(gold, answer)
    if decided is not None:
        return _verdict(decided)
    value = answer if _RELATION.search(gold) else _value_of(gold, answer)
    decided = _by_numbers(gold, value)
    return _by_algebra(gold, value) if decided is None else _verdict(decided)


def _verdict(equal: bool | None) -> Verdict:
    return {True: Verdict.CORRECT, False: Verdict.WRONG, None: Verdict.TIMEOUT}[equal]


def _hedges(gold: str, answer: str) -> bool:
    """Whether a single-valued gold answer is met by alternatives, or by an equation of different numbers."""
    if not _SEVERAL.search(without_text(gold)) and _HEDGE.search(without_text(answer)):
        return True
    sides = [[read_number(side) for side in part.split("=")] for part in answer.split("\\approx")]
    numbers = [[number for number in part if number] for part in sides]
    unequal = any(not same_number(part[0], other) for part in numbers for other in part[1:])
    values = [part[0].value for part in numbers if part]
    return not _RELATION.search(gold) and (
        unequal or any(abs(value - values[0]) > abs(values[0]) / 100 for value in values[1:])
    )


def _value_of(gold: str, answer: str) -> str:
    r"""`5` of `x = 2 + 3 = 5` and of `5 = x`; of `\frac13 \approx 0.33` the side that is as exact as the gold."""
    if len(split_items(answer)) > 1:
        return answer
    gold_number = read_number(gold)
    rounded = gold_number is not None and bool(gold_number.places)
    side = _values(answer.split("\\approx"))[-1 if rounded else 0]
    value = _values(side.split("="))[-1]
    return re.sub(r"^\s*[a-z]\s*\\in(?![a-z])", "", value).strip()


def _values(sides: list[str]) -> list[str]:
    return [side for side in sides if not is_name(side)] or sides[-1:]


def _by_words(gold: str, answer: str) -> bool | None:
    """Compare words and letters of multiple choice; None where the gold answer is mathematics."""
    plain = without_text(gold).strip()
    chosen, right = _choice(answer), _choice(gold)
    if chosen and right and len(plain) <= len("(A)"):
        return chosen.casefold() == right.casefold() if "\\text" in gold else chosen == right
    if not re.fullmatch(r"[\w\s.,:'&()-]*[A-Za-z][\w\s.,:'&()-]*", plain) or read_number(gold):
        return None
    if len(plain) > 1 and _fold_words(gold) == _fold_words(answer):
        return True
    return False if "\\text" in gold else None


def _choice(text: str) -> str | None:
    match = _CHOICE.fullmatch(without_text(text).strip())
    return next(filter(None, match.groups())) if match else None


def _fold_words(text: str) -> str:
    return re.sub(r"[\s().]", "", without_text(text)).casefold()


def _by_numbers(gold: str, answer: str) -> bool | None:
    """Compare numbers, lists of numbers, numerals with a base, ratios; None where one of them is something else."""
    gold_number, answer_number = read_number(gold), read_number(answer)
    if same_in_any_order(gold, answer):
        return True
    if gold_number and answer_number:
        return same_number(gold_number, answer_number)
    if based := _BASED.fullmatch(gold):
        other = _BASED.fullmatch(answer)
        return (other.groups() if other else (answer, based[2])) == based.groups()
    if ratio := _RATIO.fullmatch(gold):
        other = _RATIO.fullmatch(answer)
        return other is not None and [*map(int, ratio.groups())] == [*map(int, other.groups())]
    return same_list(gold, answer)


def _by_algebra(gold: str, answer: str) -> Verdict:
    """Let math-verify compare, if it may see the answer: mathematical characters, no words, nothing to keep it busy."""
    words = re.findall("[A-Za-z]{4,}", _COMMAND.sub(" ", answer))
    presentable = _ALLOWED.fullmatch(answer) and all(word in gold for word in words)
    if not presentable or (_BUSY.search(answer) and not _BUSY.search(gold)):
        return Verdict.WRONG
    return _verdict(_comparer.equal(gold, as_union(without_unit(answer))))
