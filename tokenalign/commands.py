"""What the command line shows of a pair and a text."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, get_args

import numpy as np

from tokenalign.flags import OUTSIDE, Flag, Policy
from tokenalign.paint import Colour, Painter
from tokenalign.pair import Pair
from tokenalign.visible import columns, row, visible
from tokenalign.vocabulary import Vocabulary

POLICIES: tuple[Policy, ...] = get_args(Policy)

_REASONS: tuple[tuple[Flag, str, Colour], ...] = (
    (Flag.PAD, "padding", "grey"),
    (Flag.INVALID_UTF8, "no text, such as half a character", "red"),
    (Flag.NORMALISED, "the teacher's tokenizer changes the text", "magenta"),
    (Flag.TAG | Flag.NONCANONICAL, "a tag that the teacher spells otherwise", "yellow"),
    (Flag.EOS_CLASS | Flag.NONCANONICAL, "an end of turn that the teacher writes otherwise", "cyan"),
    (Flag.NONCANONICAL, "text that the teacher spells otherwise", "blue"),
    (Flag.UNMAPPED, "a token that the teacher does not have", "blue"),
)
"""Flags that must all be set, the first that are decide the colour."""


_OTHERWISE = Flag.NONCANONICAL | Flag.NORMALISED | Flag.UNMAPPED


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a command found."""

    data: dict[str, Any]
    """Of types that JSON has."""
    text: str
    """For people."""
    mismatch: bool
    """True if training must handle something."""


def inspect(pair: Pair, width: int) -> Outcome:
    """The report on a pair."""
    report = pair.report()
    return Outcome(data=report.to_dict(), text=report.screen(min(width, 120)), mismatch=bool(report.mismatches))


def written(pair: Pair, text: bytes) -> list[int]:
    """Ids of a text as the student's tokenizer writes it, control tokens in it included."""
    student, speller = pair.student, pair.spellers[0]
    tags = {tag.encode() for tag in pair.tags}
    controls = {student.pieces[id]: id for id in np.flatnonzero(student.special).tolist()}
    names = sorted(controls.keys() - tags - {b""}, key=len, reverse=True)
    parts = re.split(b"(" + b"|".join(map(re.escape, names)) + b")", text) if names else [text]
    spelled = iter(speller.spell(parts[::2]))
    return [id for place, part in enumerate(parts) for id in (next(spelled) if place % 2 == 0 else [controls[part]])]


def align(pair: Pair, text: bytes, painter: Painter, width: int) -> Outcome:
    """Chunks of a text as both sides tokenize it."""
    ours = written(pair, text)
    theirs = pair.to_teacher([ours]).ids[0].tolist()
    found = pair.align(ours, theirs)
    chunks = found.chunks.tolist()
    alike = sum(chunk == [1, 1] for chunk in chunks)
    share = alike / len(chunks) if chunks else 1.0
    sides = [
        _by_chunk(pair.student, ours, found.student_chunk.tolist(), len(chunks)),
        _by_chunk(pair.teacher, theirs, found.teacher_chunk.tolist(), len(chunks)),
    ]
    cells = [
        (ours, theirs, f"{m}:{n}", None if m == n == 1 else "yellow")
        for ours, theirs, (m, n) in zip(*sides, chunks, strict=True)
    ]
    summary = (
        f"{len(ours)} student tokens, {len(theirs)} teacher tokens, {len(chunks)} chunks, {alike} of them 1:1 "
        f"({share:.1%}); {'the same text' if found.ok else 'NOT the same text'}"
    )
    return Outcome(
        data={
            "ok": found.ok,
            "student": _tokens(pair.student, ours),
            "teacher": _tokens(pair.teacher, theirs),
            "student_chunk": found.student_chunk.tolist(),
            "teacher_chunk": found.teacher_chunk.tolist(),
            "chunks": chunks,
            "one_to_one": share,
        },
        text="\n".join([*_table(("student", "teacher", "m:n"), cells, painter, width), *wrap(summary, width)]),
        mismatch=not found.ok or alike < len(chunks),
    )


def explain(pair: Pair, ids: Sequence[int], policies: Sequence[Policy], painter: Painter, width: int) -> Outcome:
    """A text token by token: what both sides write, why a position may not count, and which policy drops it."""
    flags = pair.flags([list(ids)])
    spelled = pair.to_teacher([list(ids)])
    chunk, theirs = spelled.alignments[0].student_chunk.tolist(), spelled.ids[0].tolist()
    of_chunk: dict[int, list[int]] = {}
    for place, id in zip(spelled.alignments[0].teacher_chunk.tolist(), theirs, strict=True):
        of_chunk.setdefault(place, []).append(id)
    bits = [Flag(bit) for bit in flags.bits[0].tolist()]
    dropped = {policy: ~flags.keep(policy)[0] for policy in policies}
    drops = [[policy for policy in policies if dropped[policy][place]] for place in range(len(ids))]
    shown = [place == 0 or place < 0 or chunk[place] != chunk[place - 1] for place in range(len(ids))]
    cells = [
        (
            visible(pair.student.pieces[id]),
            _pieces(pair.teacher, of_chunk.get(chunk[place], [])) if shown[place] else "〃",
            "".join(policy[0] if policy in drops[place] else "·" for policy in policies),
            " ".join(_names(bits[place])),
            _reason(bits[place])[1],
        )
        for place, id in enumerate(ids)
    ]
    counts = {policy: int(dropped[policy].sum()) for policy in policies}
    return Outcome(
        data={
            "tokens": [
                {
                    **token,
                    "chunk": chunk[place],
                    "teacher": _tokens(pair.teacher, of_chunk.get(chunk[place], [])),
                    "flags": _names(bits[place]),
                    "dropped_by": drops[place],
                }
                for place, token in enumerate(_tokens(pair.student, ids))
            ],
            "counts": flags.count(),
            "dropped": counts,
            "ok": spelled.alignments[0].ok,
        },
        text="\n".join(
            [
                *_table(("student", "teacher", "drop", "flags"), cells, painter, width),
                "",
                *_legend(bits, painter),
                f"dropped of {len(ids)}: "
                + ", ".join(f"{policy} ({policy[0]}) {count}" for policy, count in counts.items()),
            ]
        ),
        mismatch=bool((flags.has(_OTHERWISE) & ~flags.has(OUTSIDE)).any()),
    )


def _legend(bits: Iterable[Flag], painter: Painter) -> list[str]:
    """The reasons that occur, each in its colour."""
    reasons = dict.fromkeys(_reason(bit) for bit in bits)
    return [painter(f"■ {label}", colour) for label, colour in reasons if label]


def _reason(bits: Flag) -> tuple[str, Colour | None]:
    return next(((label, colour) for flags, label, colour in _REASONS if flags & bits == flags), ("", None))


def _names(bits: Flag) -> list[str]:
    return [str(flag.name) for flag in Flag if flag in bits]


def _tokens(vocabulary: Vocabulary, ids: Iterable[int]) -> list[dict[str, Any]]:
    return [{"id": id, "piece": vocabulary.pieces[id].decode(errors="backslashreplace")} for id in ids]


def _pieces(vocabulary: Vocabulary, ids: Iterable[int]) -> str:
    return " ".join(visible(vocabulary.pieces[id]) for id in ids)


def _by_chunk(vocabulary: Vocabulary, ids: Sequence[int], chunk: Sequence[int], count: int) -> list[str]:
    pieces: list[list[int]] = [[] for _ in range(count)]
    for id, place in zip(ids, chunk, strict=True):
        if place >= 0:
            pieces[place].append(id)
    return [_pieces(vocabulary, ids) for ids in pieces]


def _table(heads: Sequence[str], rows: Sequence[tuple[Any, ...]], painter: Painter, width: int) -> list[str]:
    """Rows of cells, each with the colour of the whole row at its end; the first two columns give way where it is
    narrow."""
    widths = [max([columns(head), *(columns(cells[i]) for cells in rows)]) for i, head in enumerate(heads)]
    room = width - sum(widths[2:]) - 2 * (len(heads) - 1)
    widths[:2] = _shared_room(widths[:2], max(room, 16))
    return [
        painter(row(heads, widths), "bold"),
        *(painter(row(cells, widths), colour) for *cells, colour in rows),
    ]


def _shared_room(widths: Sequence[int], room: int) -> list[int]:
    """Two widths that together need no more than the room; the narrower one keeps what it needs up to a half."""
    left, right = widths
    if left + right <= room:
        return [left, right]
    if left <= room // 2:
        return [left, room - left]
    return [room - right, right] if right <= room // 2 else [room - room // 2, room // 2]
