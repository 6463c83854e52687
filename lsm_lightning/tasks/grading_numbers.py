r"""Answers that are numbers, or lists of them: read and compared exactly, without evaluating anything.

The functions take text that went through `grading_text.clean`.
"""

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from lsm_lightning.tasks.grading_text import compact

_MAX_EXPONENT = 400
"""Of ten; a number with a larger one is left unread."""
_ROUNDED_PLACES = 6
"""A decimal with so many places may stand for the fraction that it rounds."""

_DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
_UNIT_NAMES = (
    "percent|percentage|pct|dollars?|cents?|units?|meters?|metres?|feet|foot|inch(?:es)?|miles?|hours?|minutes?|"
    "seconds?|days?|years?|[cmk]?m|kg|g|ft|h|km/h|m/s|mph|rad|radians?"
)
_UNIT = re.compile(
    rf"(?:(?<=[\w}}%).])\s*\\text\s*\{{[a-zA-Z /.\\^]*\}}|(?<=[\d}}%).])\s*(?:{_UNIT_NAMES})(?![a-zA-Z]))"
    r"\s*(?:\^\s*\{?\s*-?[1-4]\s*\}?)?$"
)
_BRACKETED = re.compile(r"(?:\\\{|[({])(.*?)(?:\\\}|[)}])")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?")
_FORMS = {
    "decimal": re.compile(rf"({_DECIMAL})"),
    "power": re.compile(rf"({_DECIMAL})\s*\\(?:times|cdot)\s*10\s*\^\s*\{{?\s*([+-]?\d{{1,4}})\s*\}}?"),
    "ratio": re.compile(rf"({_DECIMAL})\s*/\s*({_DECIMAL})"),
    "fraction": re.compile(rf"\\frac\s*\{{\s*(-?\s*{_DECIMAL})\s*\}}\s*\{{\s*(-?\s*{_DECIMAL})\s*\}}"),
    "mixed": re.compile(r"(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(?<=\s)(\d+)\s*/\s*(\d+))"),
}
_NAME = re.compile(
    r"^\s*(?:[a-zA-Z]{1,3}|\\[a-z]+)\s*(?:_\s*(?:\w|\{\w+\})\s*)?(?:\(\s*[a-z]\s*\)\s*)?(?:=|\\approx(?![a-z]))"
)
_RAY = re.compile(r"[a-z]\s*(<|>|\\leq|\\geq)\s*([^<>=,]+)")


@dataclass(frozen=True, slots=True)
class Number:
    """A number as somebody wrote it."""

    value: Fraction
    """Before a percent sign is applied."""
    places: int | None
    """Digits after the decimal point; None for what is no decimal, such as a fraction."""
    percent: bool


def read_number(text: str) -> Number | None:
    r"""The integer, decimal, fraction, mixed number or product with a power of ten that the whole text is, else None.

    Thousands may be separated by commas or spaces; a unit after the number is left out.

    >>> read_number(r"3\frac{1}{2}").value, read_number("1,000.5 \\text{ cm}^2").value, read_number("x")
    (Fraction(7, 2), Fraction(2001, 2), None)
    """
    text = without_unit(text)
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    if _THOUSANDS.fullmatch(text):
        text = re.sub("[, ]", "", text)
    while bracketed := _BRACKETED.fullmatch(text):
        text = bracketed[1].strip()
    sign = -1 if text.startswith("-") else 1
    text = text[1:].strip() if text[:1] in ("-", "+") else text
    for kind, form in _FORMS.items():
        if (match := form.fullmatch(text)) and (value := _value(kind, match)) is not None:
            places = len(text.partition(".")[2]) if kind == "decimal" else None
            return Number(sign * value, places, percent)
    return None


def _value(kind: str, match: re.Match[str]) -> Fraction | None:
    parts = [Fraction(part.replace(" ", "").rstrip(".")) for part in match.groups() if part is not None]
    if kind == "decimal":
        return parts[0]
    if kind == "power":
        return parts[0] * Fraction(10) ** int(parts[1]) if abs(parts[1]) <= _MAX_EXPONENT else None
    if parts[-1] == 0:
        return None
    return parts[-2] / parts[-1] + (parts[0] if kind == "mixed" else 0)


def without_unit(text: str) -> str:
    r"""Without a unit after a number: words in \text{} or a common name, and its exponent.

    >>> without_unit(r"15\text{ cm}^2"), without_unit("28 pct"), without_unit("15x")
    ('15', '28', '15x')
    """
    return _UNIT.sub("", text).strip()


def same_number(first: Number, second: Number) -> bool:
    """Equal exactly, or one is a fraction and the other this fraction rounded to 6 places or more.

    A percent sign may be left out (28 % and 28) or worked out (28 % and 0.28).
    """
    if first.percent != second.percent and _close(_worked_out(first), _worked_out(second)):
        return True
    return _close(first, second)


def _worked_out(number: Number) -> Number:
    return Number(number.value / 100, None, False) if number.percent else number


def _close(first: Number, second: Number) -> bool:
    if first.value == second.value:
        return True
    places = [number.places for number in (first, second) if number.places is not None]
    rounded = len(places) == 1 and places[0] >= _ROUNDED_PLACES
    return rounded and abs(first.value - second.value) * 10 ** places[0] <= Fraction(1, 2)


def split_items(text: str) -> list[str]:
    r"""The values of a list or finite set, split at commas and at "and" outside brackets.

    >>> split_items(r"\{1, (2,3) and x\}"), split_items("12,000")
    (['1', '(2,3)', 'x'], ['12,000'])
    """
    text = re.sub(r"^\s*\\?\{(.*?)\\?\}\s*$", r"\1", text) if text.count("{") == 1 else text
    if _THOUSANDS.fullmatch(text.strip()):
        return [text.strip()]
    text = re.sub(r"(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", ",", text)
    items, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def same_list(gold: str, answer: str) -> bool | None:
    """Whether two lists hold the same numbers in any order; None where this cannot be told from their text.

    Names (`x=1`) count where both lists give them. One value is never a list of several, nor the other way round.
    """
    golds, answers = split_items(gold), split_items(answer)
    if len(golds) == len(answers) == 1 or "\\pm" in gold + answer:
        return None
    if len(golds) > 1:
        golds, answers = _distinct(golds), _distinct(answers)
    if len(golds) != len(answers):
        return None if _is_tuple(golds) or _is_tuple(answers) else False
    named = all(_NAME.match(item) for item in golds + answers)
    keys = [[_key(item, named=named) for item in items] for items in (golds, answers)]
    if None in keys[0] or None in keys[1]:
        return None
    return Counter(keys[0]) == Counter(keys[1])


def _distinct(items: list[str]) -> list[str]:
    return list({compact(item): item for item in items}.values())


def _is_tuple(items: list[str]) -> bool:
    return len(items) == 1 and items[0].startswith(("(", "["))


def _key(item: str, *, named: bool) -> tuple[str, Fraction] | None:
    name = _NAME.match(item)
    number = read_number(without_name(item))
    return (compact(name[0]) if name and named else "", number.value) if number else None


def without_name(text: str) -> str:
    """`5` of `x = 5`, of `f(x) = 5` and of `5`.

    >>> without_name("a_{37} = 19"), without_name("2x = 19")
    ('19', '2x = 19')
    """
    return _NAME.sub("", text, count=1).strip()


def same_in_any_order(gold: str, answer: str) -> bool:
    """Whether two plain lists have the same texts in them; also tells `200,100` from the number of thousands it may be.

    >>> same_in_any_order("100,200", "200, 100"), same_in_any_order("(1,2)", "(2,1)")
    (True, False)
    """
    golds, answers = (Counter(compact(text).split(",")) for text in (gold, answer))
    return golds == answers and not re.search(r"[(\[{]", gold + answer)


def is_name(text: str) -> bool:
    """Whether nothing stands here but a name (or nothing at all), as on the left of `x = 5` and of `f(x) = 5`.

    >>> is_name("x"), is_name("2x")
    (True, False)
    """
    return not text.strip() or _NAME.fullmatch(f"{text}=") is not None


def as_union(text: str) -> str:
    r"""The intervals that alternatives such as `x < 2 or x \geq 3` describe; any other text as it is.

    >>> as_union(r"x<2 or x \geq 3")
    '(-\\infty,2)\\cup[3,\\infty)'
    """
    rays = [_RAY.fullmatch(part.strip()) for part in re.split(r"(?<![a-zA-Z\\])or(?![a-zA-Z])", text)]
    shapes = {"<": r"(-\infty,{})", ">": r"({},\infty)", r"\leq": r"(-\infty,{}]", r"\geq": r"[{},\infty)"}
    if len(rays) < 2 or None in rays:
        return text
    return r"\cup".join(shapes[ray[1]].format(ray[2].strip()) for ray in rays if ray)
