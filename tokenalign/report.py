"""One screen about a pair of tokenizers, ending in what to do."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenalign.convention import Convention
from tokenalign.flags import Flag, Policy
from tokenalign.relation import Relation
from tokenalign.speller import Speller
from tokenalign.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenalign.pair import Pair

SAMPLE = (
    "Let's see: the train leaves at 14:05 and needs 2.5 hours, so it arrives at 16:35.\n\n"
    "def area(radius):\n    return 3.14159 * radius ** 2\n\n"
    "\\[ x^2 + 1{,}000 \\le \\frac{1}{3} \\] Çà et là — naïve café, 東京は雨です, Привет! 🙂\n"
)
"""Ordinary text of several kinds, to see whether the two split it alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What is known about a pair; `str()` is for people."""

    student: str
    teacher: str
    relation: Relation
    sizes: tuple[int, int]
    shared: float
    """Share of the student's tokens that the teacher has with the same bytes and role."""
    collisions: int
    """Ids that mean something else on the other side."""
    tags: dict[str, tuple[list[str], list[str]]]
    """The pieces of each reasoning tag, student's and teacher's tokenizer."""
    turn_ends: tuple[list[str], list[str]]
    prefixes: tuple[str, str]
    """Generation prefixes."""
    default_systems: tuple[str | None, str | None]
    ends_alike: bool
    """True if no end-of-turn token of the student is anything else to the teacher."""
    split_otherwise: float
    """Share of the tokens of an ordinary sample text that the teacher spells otherwise."""
    problems: list[str]
    """Chat templates that cannot be rendered."""

    @property
    def policy(self) -> Policy:
        """The policy to start from."""
        return "canonical" if self.relation is Relation.DIFFERENT or self.split_otherwise > 0.01 else "tags"

    @property
    def advice(self) -> str:
        """The sentence that a user needs."""
        if self.relation is Relation.DIFFERENT:
            return (
                "Student ids mean nothing to this teacher: give it pair.to_teacher(ids), compare where a chunk starts "
                'on both sides, and use policy "canonical".'
            )
        if self.policy == "canonical":
            return (
                f"The teacher splits {self.split_otherwise:.0%} of ordinary text otherwise, so its log-probabilities "
                'of the student\'s tokens punish spelling: use policy "canonical".'
            )
        wrong = [repr(tag) for tag, (ours, theirs) in self.tags.items() if ours != theirs]
        wrong += [] if self.ends_alike else ["the end of a turn"]
        if wrong:
            return (
                f"The teacher spells {', '.join(wrong)} otherwise and would punish the student for a right text: use "
                'policy "tags" (end_class=True if the loss scores end-of-turn tokens as one class).'
            )
        return (
            "Both tokenizers spell alike; only a student that departs from its own tokenizer will be misjudged, which "
            'policy "tags" masks at no cost.'
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, and `policy` and `advice`, of types that JSON has."""
        return asdict(self) | {"relation": self.relation.value, "policy": self.policy, "advice": self.advice}

    def __str__(self) -> str:
        lines = [
            f"student     {self.student} ({self.sizes[0]:,} ids)",
            f"teacher     {self.teacher} ({self.sizes[1]:,} ids)",
            f"relation    {self.relation.value}: {self.shared:.1%} of the student's tokens exist in the teacher, "
            f"{self.collisions:,} ids collide",
            f"text        {self.split_otherwise:.1%} of a sample is split otherwise",
            *(f"{tag:<11} {' '.join(ours)}   |   {' '.join(theirs)}" for tag, (ours, theirs) in self.tags.items()),
            _line("turn ends", *(" ".join(names) or "unknown" for names in self.turn_ends)),
            _line("prefix", *map(repr, self.prefixes)),
            _line("system", *map(repr, self.default_systems)),
            *(f"problem     {_short(problem, 100)}" for problem in self.problems),
        ]
        return "\n".join([*lines, "", self.advice])


def _line(name: str, ours: str, theirs: str) -> str:
    return f"{name:<11} {_short(ours)}   |   {_short(theirs)}"


def _short(text: str, width: int = 48) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def make_report(pair: "Pair") -> Report:
    """Look at everything that can go wrong between the two."""
    student, teacher = pair.student, pair.teacher
    ours, theirs = pair.spellers
    end_flags = pair.flags(np.array([sorted(pair.conventions[0].turn_end)], np.int64))
    sample = pair.flags([ours.spell([SAMPLE.encode()])[0]])
    mapped = pair.vocab.to_teacher[student.lengths > 0]
    return Report(
        student=pair.names[0],
        teacher=pair.names[1],
        relation=pair.relation,
        sizes=(student.size, teacher.size),
        shared=float((mapped >= 0).mean()),
        collisions=len(pair.collisions),
        tags={tag: (_pieces(ours, tag), _pieces(theirs, tag)) for tag in pair.tags},
        turn_ends=(_ends(student, pair.conventions[0]), _ends(teacher, pair.conventions[1])),
        prefixes=(pair.conventions[0].generation_prefix, pair.conventions[1].generation_prefix),
        default_systems=(pair.conventions[0].default_system, pair.conventions[1].default_system),
        ends_alike=not (end_flags.has(Flag.EOS_CLASS) & end_flags.has(Flag.NONCANONICAL)).any(),
        split_otherwise=float(sample.has(Flag.NONCANONICAL).mean()),
        problems=[convention.problem for convention in pair.conventions if convention.problem],
    )


def _pieces(speller: Speller, text: str) -> list[str]:
    return [_readable(speller.vocabulary, id) for id in speller.spell([text.encode()])[0]]


def _ends(vocabulary: Vocabulary, convention: Convention) -> list[str]:
    return [_readable(vocabulary, id) for id in sorted(convention.turn_end)]


def _readable(vocabulary: Vocabulary, id: int) -> str:
    return vocabulary.pieces[id].decode(errors="replace")
