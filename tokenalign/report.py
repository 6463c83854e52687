"""One screen about a pair of tokenizers, ending in what to do."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from tokenalign.convention import Convention
from tokenalign.flags import Flag, Policy, TokenFlags
from tokenalign.relation import Relation
from tokenalign.samples import ORDINARY
from tokenalign.speller import Speller
from tokenalign.tags import Held
from tokenalign.visible import fitted, row, visible
from tokenalign.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenalign.pair import Pair

_LABEL = 11
_TAG_ROWS = 6
_RARE = 0.01
"""Share of ordinary text that may be split otherwise before it is worth to mask all of that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What is known about a pair; `str()` is for people. Of two values the student's comes first."""

    student: str
    teacher: str
    relation: Relation
    sizes: tuple[int, int]
    shared: float
    """Share of the student's tokens that the teacher has with the same bytes and role."""
    collisions: int
    """Ids that mean something else on the other side."""
    collision: tuple[int, str, str] | None
    """The lowest such id, and what it means on either side."""
    tags: dict[str, tuple[list[str], list[str]]]
    """The pieces of each tag."""
    held: dict[str, tuple[Held, Held]]
    """How each side holds each tag."""
    bos: tuple[str | None, str | None]
    turn_ends: tuple[list[str], list[str]]
    pad: tuple[str | None, str | None]
    prefixes: tuple[str, str]
    """Generation prefixes."""
    default_systems: tuple[str | None, str | None]
    prompts_alike: bool
    """True if both write bos, default system prompt, roles and prefix alike, or a side has no chat template."""
    ends_alike: bool
    """True if no end-of-turn token of the student is anything else to the teacher."""
    split_otherwise: float
    """Share of the tokens of an ordinary sample text that the teacher spells otherwise."""
    response: list[str]
    """The tokens of a typical response with tags and an end of turn, as the student's tokenizer writes it."""
    dropped: dict[Policy, list[int]]
    """The positions in it that each policy would leave out."""
    problems: list[str]
    """Chat templates that cannot be rendered."""

    @property
    def mismatches(self) -> list[str]:
        """What training must handle; empty where the two differ in nothing that a trainer sees."""
        found = {
            "ids": self.relation is Relation.DIFFERENT or self.collisions > 0,
            "text": self.split_otherwise > 0,
            **{tag: bool(_differs(self.tags[tag], self.held[tag])) for tag in self.tags},
            "the end of a turn": not self.ends_alike,
            "prompts": not self.prompts_alike,
        }
        return [name for name, is_found in found.items() if is_found]

    @property
    def policy(self) -> Policy:
        """The policy to start from."""
        return "canonical" if self.relation is Relation.DIFFERENT or self.split_otherwise > _RARE else "tags"

    @property
    def advice(self) -> str:
        """The sentence that a user needs: what goes wrong, and what to do."""
        wrong = [name for name in self.mismatches if name not in ("ids", "text", "prompts")]
        end = "" if self.ends_alike else " Score ends of turns as one class (merge_class, end_class=True)."
        if self.relation is Relation.DIFFERENT:
            return (
                "Student ids mean other tokens to this teacher: let it read pair.to_teacher(ids), carry its support "
                "over by project_topk, compare where a chunk starts on both sides, and where single tokens are "
                f'compared use policy "canonical".{end}'
            )
        moved = f"{self.collisions:,} ids mean other tokens to the teacher"
        teacher = f"{moved}, which" if self.collisions else "The teacher"
        if self.policy == "canonical":
            return (
                f"{teacher} splits {self.split_otherwise:.0%} of ordinary text otherwise, so its log-probabilities "
                "punish spelling: let it read pair.to_teacher(ids) and compare where a chunk starts on both sides, or "
                f'drop those positions by policy "canonical".{end}'
            )
        if wrong:
            return (
                f"{teacher} spells {_listed(wrong)} otherwise and would punish the student for a right text: use "
                'policy "tags", and let the teacher read pair.to_teacher(ids), since a mask hides a position from the '
                f"loss only, not from what the teacher reads.{end}"
            )
        if self.collisions:
            return f'{moved}: let it read pair.to_teacher(ids), and use policy "tags".'
        if not self.prompts_alike:
            return (
                "Both tokenizers spell alike but the two format prompts otherwise: render the teacher's prompts by its "
                'own chat template, and use policy "tags".'
            )
        return (
            "Both tokenizers spell alike; only a student that departs from its own tokenizer will be misjudged, which "
            'policy "tags" masks at no cost.'
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, and `mismatches`, `policy` and `advice`, of types that JSON has."""
        fields = asdict(self) | {"mismatches": self.mismatches, "policy": self.policy, "advice": self.advice}
        return {name: _plain(value) for name, value in fields.items()}

    def __str__(self) -> str:
        return self.screen()

    def screen(self, width: int = 100) -> str:
        """The report in lines of at most so many columns; what does not fit is cut."""
        relation = f"{self.relation.value}; {self.shared:.1%} of the student's tokens exist in the teacher"
        collide = f"{self.collisions:,} ids mean something else"
        if self.collision:
            id, ours, theirs = self.collision
            collide += f", e.g. {id}: {visible(ours)} to the student, {visible(theirs)} to the teacher"
        head = [
            ("student", f"{self.student}, {self.sizes[0]:,} ids"),
            ("teacher", f"{self.teacher}, {self.sizes[1]:,} ids"),
            ("relation", relation),
            ("collisions", collide),
            ("text", f"{self.split_otherwise:.1%} of ordinary text is split otherwise"),
        ]
        sides = [
            ("", "student", "teacher"),
            ("bos", *(_or_none(token) for token in self.bos)),
            ("turn ends", *(" ".join(map(visible, names)) or "unknown" for names in self.turn_ends)),
            ("pad", *(_or_none(token) for token in self.pad)),
            ("prefix", *(_or_none(prefix) for prefix in self.prefixes)),
            ("system", *(_or_none(system) for system in self.default_systems)),
            *self._tag_rows(),
        ]
        prompts = "formatted otherwise: render each side's by its own template"
        policies = (f"{policy} {len(places)}" for policy, places in self.dropped.items())
        pieces = " ".join(visible(self.response[place]) for place in self.dropped[self.policy])
        tail = [
            *([] if self.prompts_alike else [("prompts", prompts)]),
            ("would drop", f"{', '.join(policies)} of the {len(self.response)} tokens of a typical response"),
            ("", f"{self.policy}: {pieces or 'nothing'}"),
            *(("problem", problem) for problem in self.problems),
        ]
        wide, side = (_LABEL, width - _LABEL - 2), (width - _LABEL - 5) // 2
        lines = [
            *(row(line, wide) for line in head),
            *(f"{fitted(label, _LABEL)}  {row(cells, (side, side), ' │ ')}" for label, *cells in sides),
            *(row(line, wide) for line in tail),
            *textwrap.wrap(self.advice, width, break_on_hyphens=False),
        ]
        return "\n".join(lines)

    def _tag_rows(self) -> list[tuple[str, str, str]]:
        """One row for each tag and what closes it: those that the sides hold otherwise first, no more than fit."""
        groups = {tag: [tag] for tag in self.tags if not _closes(tag)}
        for tag in self.tags:
            groups.setdefault(tag.replace("/", "", 1) if _closes(tag) else tag, []).append(tag)
        named = {label: list(dict.fromkeys(tags)) for label, tags in groups.items()}
        differ = {label: any(_differs(self.tags[tag], self.held[tag]) for tag in tags) for label, tags in named.items()}
        labels = sorted(named, key=lambda label: not differ[label])
        rows = [(label, self._held(named[label], 0), self._held(named[label], 1)) for label in labels[:_TAG_ROWS]]
        left = len(labels) - len(rows)
        return [*rows, *([("", f"and {left} more tags", "")] if left else [])]

    def _held(self, tags: Sequence[str], side: int) -> str:
        kinds = dict.fromkeys(self.held[tag][side].value for tag in tags)
        pieces = (" ".join(map(visible, self.tags[tag][side])) for tag in tags)
        return f"{', '.join(kinds)}: {'  '.join(pieces)}"


def _closes(tag: str) -> bool:
    return tag[1:2] == "/"


def _differs(pieces: tuple[list[str], list[str]], held: tuple[Held, Held]) -> bool:
    return pieces[0] != pieces[1] or held[0] is not held[1]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, str) else value


def _or_none(text: str | None) -> str:
    return visible(text, blanks=False) if text else "none"


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def make_report(pair: "Pair") -> Report:
    """Look at everything that can go wrong between the two."""
    student, teacher = pair.student, pair.teacher
    ours, theirs = pair.spellers
    conventions = pair.conventions
    sides = [*zip((student, teacher), conventions, strict=True)]
    end_flags = pair.flags(np.array([sorted(conventions[0].turn_end)], np.int64))
    sample = pair.flags([ours.spell([ORDINARY.encode()])[0]])
    response = pair.flags([typical_response(ours, conventions[0])])
    mapped = pair.vocab.to_teacher[student.lengths > 0]
    lowest = int(pair.collisions[0]) if len(pair.collisions) else None
    return Report(
        student=pair.names[0],
        teacher=pair.names[1],
        relation=pair.relation,
        sizes=(student.size, teacher.size),
        shared=float((mapped >= 0).mean()) if len(mapped) else 0.0,
        collisions=len(pair.collisions),
        collision=None if lowest is None else (lowest, _text(student, lowest), _text(teacher, lowest)),
        tags={tag: (_pieces(ours, tag), _pieces(theirs, tag)) for tag in pair.tags},
        held={tag: (conventions[0].tags[tag], conventions[1].tags[tag]) for tag in pair.tags},
        bos=_two(_token(side, convention.bos) for side, convention in sides),
        turn_ends=_two([_text(side, id) for id in sorted(convention.turn_end)] for side, convention in sides),
        pad=_two(_token(side, convention.pad) for side, convention in sides),
        prefixes=_two(convention.generation_prefix for convention in conventions),
        default_systems=_two(convention.default_system for convention in conventions),
        prompts_alike=_alike([_prompting(side, convention) for side, convention in sides]),
        ends_alike=not (end_flags.has(Flag.EOS_CLASS) & end_flags.has(Flag.NONCANONICAL)).any(),
        split_otherwise=float(sample.has(Flag.NONCANONICAL).mean()) if sample.bits.size else 0.0,
        response=[_text(student, id) for id in response.ids.ravel().tolist()],
        dropped={policy: _dropped(response, policy) for policy in get_args(Policy)},
        problems=[convention.problem for convention in conventions if convention.problem],
    )


def _prompting(vocabulary: Vocabulary, convention: Convention) -> tuple[Any, ...] | None:
    """All that a chat template writes around a prompt, None where there is no template."""
    if not convention.roles:
        return None
    bos = _token(vocabulary, convention.bos)
    return bos, convention.default_system, dict(convention.roles), convention.generation_prefix


def _alike(prompting: Sequence[Any]) -> bool:
    return None in prompting or prompting[0] == prompting[1]


def typical_response(speller: Speller, convention: Convention) -> list[int]:
    """Ids of reasoning, an action and an answer, ended as the side ends its turns."""
    opening, closing = convention.reasoning_tags if len(convention.reasoning_tags) == 2 else ("<think>", "</think>")
    text = (
        f"{opening}\nThe train leaves at 14:05 and needs 2.5 hours.\n{closing}\n\n"
        "<action>look up 16:35</action>\nIt arrives at \\boxed{16:35}."
    )
    end = [] if convention.own_turn_end is None else [convention.own_turn_end]
    return speller.spell([text.encode()])[0] + end


def _dropped(flags: TokenFlags, policy: Policy) -> list[int]:
    return np.flatnonzero(~flags.keep(policy)).tolist()


def _two(values: Iterable[Any]) -> tuple[Any, Any]:
    ours, theirs = values
    return ours, theirs


def _pieces(speller: Speller, text: str) -> list[str]:
    return [_text(speller.vocabulary, id) for id in speller.spell([text.encode()])[0]]


def _token(vocabulary: Vocabulary, id: int | None) -> str | None:
    return None if id is None else _text(vocabulary, id)


def _text(vocabulary: Vocabulary, id: int) -> str:
    return vocabulary.pieces[id].decode(errors="backslashreplace")
