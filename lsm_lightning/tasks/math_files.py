"""Problems with gold answers from JSON Lines files, refused early and by line when something is amiss."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lsm_lightning.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class GoldProblem:
    """One line of a file."""

    question: str
    answer: str
    """The gold answer: LaTeX or plain, without a box."""


def read_problems(path: Path, question_field: str, answer_field: str) -> list[GoldProblem]:
    """All problems of a file with one JSON object a line, in the order of the file; blank lines are skipped.

    Raises:
        ConfigurationError: The file is missing or holds no problem, or a line is not JSON, lacks a field or leaves it
            empty; the text names the file, the line (from 1), the value and the remedy.
    """
    if not path.is_file():
        raise ConfigurationError(f"{path}: there is no such file. Give the path of a JSON Lines file of problems.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: not UTF-8 ({error}). Convert the file to UTF-8.") from error
    problems = [
        _problem(line, f"{path}, line {number}", question_field, answer_field)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not problems:
        raise ConfigurationError(f"{path}: the file holds no problem. Give a file with one JSON object a line.")
    return problems


def _problem(line: str, place: str, question_field: str, answer_field: str) -> GoldProblem:
    example = json.dumps({question_field: "What is 1+1?", answer_field: "2"})
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{place}: not JSON: {_cut(line)} ({error}). Write it like {example}.") from error
    if not isinstance(row, dict):
        raise ConfigurationError(f"{place}: {_cut(line)} is no JSON object. Write it like {example}.")
    question = _text(row, question_field, "question_field", place)
    return GoldProblem(question, _text(row, answer_field, "answer_field", place))


def _text(row: Mapping[str, object], field: str, setting: str, place: str) -> str:
    if field not in row:
        raise ConfigurationError(f"{place}: no field {field!r} among {sorted(row)}. Set {setting} to one of these.")
    value = row[field]
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ConfigurationError(
            f"{place}: field {field!r} is {_cut(json.dumps(value))}. Make it a text or a number, "
            f"or set {setting} to another field."
        )
    text = str(value).strip()
    if not text:
        raise ConfigurationError(f"{place}: field {field!r} is {value!r}. Fill it in, or take the line out.")
    return text


def _cut(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
