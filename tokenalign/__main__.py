"""`python -m tokenalign`: what two tokenizers do to a text, for people and (`--json`) for programs."""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tokenalign.commands import Outcome
    from tokenalign.pair import Pair

FINE, MISMATCH, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_STATUS = """exit status:
  0 fine, 1 a mismatch was found that training must handle, 2 bad input (told in one line), 130 interrupted

A tokenizer is a Hugging Face folder, a tokenizer.json, or another file that `tokenalign.Pair` reads."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other bad input."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}. See {self.prog} --help.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        outcome: Outcome = options.command(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"tokenalign: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return _print(json.dumps(outcome.data) if options.json else outcome.text, MISMATCH if outcome.mismatch else FINE)


def _print(text: str, status: int) -> int:
    """Write a text, quietly if nobody reads it to the end."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know fewer characters than a text has
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tokenalign",
        description="Where is a comparison of two models' tokens about the text, and where only about spelling?",
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], "Outcome"], summary: str, more: str, example: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {more}",
            epilog=f"example:\n  {example}\n\n{_STATUS}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=run)
        added.add_argument("student", metavar="A", help="the student's tokenizer")
        return added

    inspect = command(
        "inspect",
        _inspect,
        "one screen about two tokenizers",
        "Ends with what goes wrong in training, and what to do.",
        "tokenalign inspect models/student models/teacher",
    )
    align = command(
        "align",
        _align,
        "the chunks of a text as both tokenize it",
        "Control tokens in the text are read as such.",
        "tokenalign align models/student models/teacher '<think>12 + 30</think> 42<|im_end|>'",
    )
    explain = command(
        "explain",
        _explain,
        "a text token by token: both spellings, flags, and what each policy drops",
        "Control tokens in the text are read as such.",
        "tokenalign explain models/student models/teacher --ids '27 26865 29'",
    )
    check = command(
        "selfcheck",
        _selfcheck,
        "round trips over texts, one per line",
        "Without a file a small corpus of many scripts is used.",
        "tokenalign selfcheck models/student models/teacher --file corpus.txt",
    )
    speed = command(
        "bench",
        _bench,
        "tokens per second of align and flags, and of re-encoding",
        "Without a file a small corpus is repeated, which favours what remembers.",
        "tokenalign bench models/student models/teacher --file corpus.txt --tokens 1000000",
    )
    for added in (inspect, align, explain, speed):
        added.add_argument("teacher", metavar="B", help="the teacher's tokenizer")
    check.add_argument("teacher", metavar="B", nargs="?", help="the teacher's tokenizer")
    for added in (align, explain):
        added.add_argument("text", metavar="TEXT", nargs="?", help="the text; without it and --file standard input")
    for added in (align, explain, check, speed):
        added.add_argument("--file", metavar="PATH", help="read the text from a file, - for standard input")
    explain.add_argument("--ids", metavar="IDS", help="the student's ids in place of a text, such as '27 26865 29'")
    explain.add_argument(
        "--policy", metavar="NAME", action="append", help="paper, tags, canonical or strict; repeatable, else all"
    )
    speed.add_argument("--tokens", metavar="N", type=_count, default=200_000, help="student tokens (200000)")
    for added in (inspect, align, explain, check, speed):
        _add_common(added)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tags",
        metavar="TAG[,TAG]",
        action="extend",
        type=lambda text: [tag for tag in text.split(",") if tag],
        default=[],
        help="tags besides the usual ones and those of the chat templates; repeatable",
    )
    for side in ("student", "teacher"):
        parser.add_argument(f"--{side}-size", metavar="N", type=_count, help=f"ids of the {side} model's padded output")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: on a terminal, unless NO_COLOR is set",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _pair(options: argparse.Namespace) -> "Pair":
    from tokenalign.pair import Pair

    return Pair(
        options.student,
        options.teacher,
        tags=options.tags,
        student_size=options.student_size,
        teacher_size=options.teacher_size,
    )


def _inspect(options: argparse.Namespace) -> "Outcome":
    from tokenalign.commands import inspect

    return inspect(_pair(options), _look(options)[1])


def _align(options: argparse.Namespace) -> "Outcome":
    from tokenalign.commands import align

    text = _text(options)
    return align(_pair(options), text, *_look(options))


def _explain(options: argparse.Namespace) -> "Outcome":
    from tokenalign.commands import POLICIES, explain, written

    unknown = [name for name in options.policy or () if name not in POLICIES]
    if unknown:
        raise ValueError(f"policy {unknown[0]!r} is unknown. Use one of {', '.join(POLICIES)}.")
    policies = [name for name in POLICIES if name in (options.policy or POLICIES)]
    if options.ids is not None and (options.text or options.file):
        raise ValueError("both --ids and a text are given. Give one of them.")
    ids, text = (_ids(options.ids), b"") if options.ids is not None else (None, _text(options))
    pair = _pair(options)
    return explain(pair, written(pair, text) if ids is None else ids, policies, *_look(options))


def _selfcheck(options: argparse.Namespace) -> "Outcome":
    from tokenalign.pair import Pair
    from tokenalign.selfcheck import selfcheck

    texts = _corpus(options)
    named = [(options.student, options.student_size), (options.teacher, options.teacher_size)]
    alone = [
        Pair(side, side, tags=options.tags, student_size=size, teacher_size=size)
        for side, size in named
        if side is not None
    ]
    return selfcheck(alone, _pair(options) if len(alone) > 1 else alone[0], texts, _Progress())


def _bench(options: argparse.Namespace) -> "Outcome":
    from tokenalign.speed import bench

    return bench(lambda: _pair(options), _corpus(options), options.tokens, _Progress())


def _look(options: argparse.Namespace) -> tuple[Any, int]:
    """How to paint, and the columns there are."""
    from tokenalign.paint import Painter, wants_colour

    width = shutil.get_terminal_size((100, 24)).columns
    return Painter(wants_colour(options.color, sys.stdout)), max(width, 40)


def _text(options: argparse.Namespace) -> bytes:
    if options.text is not None:
        if options.file is not None:
            raise ValueError("both a text and --file are given. Give one of them.")
        return os.fsencode(options.text)
    return _read(options.file or "-")


def _corpus(options: argparse.Namespace) -> list[bytes]:
    from tokenalign.samples import TEXTS

    if options.file is None:
        return [text.encode() for text in TEXTS]
    return _read(options.file).splitlines(keepends=True)


def _read(path: str) -> bytes:
    if path != "-":
        with open(path, "rb") as file:
            return file.read()
    if sys.stdin.isatty():
        raise ValueError("there is no text. Give it as an argument, by --file, or through standard input.")
    return sys.stdin.buffer.read()


def _ids(text: str) -> list[int]:
    parts = text.replace(",", " ").replace("[", " ").replace("]", " ").split()
    wrong = [part for part in parts if not part.removeprefix("-").isdecimal()]
    if wrong:
        raise ValueError(f"--ids has {wrong[0]!r}, which is no id. Give integers, such as '27 26865 29'.")
    return [int(part) for part in parts]


class _Progress:
    """Says on standard error what is being done, once it takes longer than two seconds."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, stage: str) -> None:
        if time.monotonic() - self._start > 2:
            print(f"tokenalign: {stage} ...", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
