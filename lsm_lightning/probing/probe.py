"""Looks at one task, its teacher and the student before a run: both write a few answers, and the teacher scores them.

Nothing of the run changes by it. The first process decides; the others take part in what all must do together.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.masks import MaskPolicy, kept, loss_mask
from lsm_lightning.objectives import Objective
from lsm_lightning.probing.answers import Played, in_students_tokens, openings, play, shuffled
from lsm_lightning.probing.endings import check_ending
from lsm_lightning.probing.finding import Finding, Verdict, ok, warning
from lsm_lightning.probing.masked import Masked, check_kept, masked
from lsm_lightning.probing.own import OwnAnswers, check_order, check_taught_end, check_writing
from lsm_lightning.probing.sampling import check_estimate, check_randomness, check_samples
from lsm_lightning.probing.scores import check_count, check_sense, check_sums, split
from lsm_lightning.probing.templates import check_room, check_template, longest_prompt
from lsm_lightning.rollout import Sampling
from lsm_lightning.rollout.collect import Player
from lsm_lightning.seeds import seed_of
from lsm_lightning.tasks.base import Task
from lsm_lightning.teacher import Teacher
from lsm_lightning.teacher.reading import as_it_stands, respelled
from lsm_lightning.types import Message, Support, Turn
from tokenalign import Report
from tokenalign.visible import visible

FEW_SHARED = 0.2
"""Share of the student's tokens, below which a support has few members."""
LOOKED_AHEAD = 4
"""Turns of an episode whose prompts are measured: a history of the last few turns is whole by then."""


@dataclass(frozen=True, kw_only=True)
class Probing:
    """What is to be looked at."""

    name: str
    """Of the task."""
    task: Task
    teacher: Teacher
    """After its `setup`."""
    device: torch.device
    """Where the teacher was asked to leave its supports."""
    student: Player
    """With the weights of the last `engine.sync`, as it writes rollouts."""
    objective: Objective
    mask: MaskPolicy
    samples: int
    """Of each prompt in a step."""
    first: int
    """Number of the first training problem that is played."""
    seed: int
    texts: int
    """How many answers each side writes."""
    tokens: int
    """Longest of them, where the task does not allow less."""
    teacher_writes: bool = True
    """Whether the teacher writes answers of its own; without, what needs them is not looked at."""

    @property
    def turns(self) -> int:
        """Of an episode, at most; where there may be many, some of the texts are later turns."""
        return min(self.task.max_turns, math.isqrt(self.texts))

    @property
    def indices(self) -> range:
        """The training problems that are played."""
        return range(self.first, self.first + math.ceil(self.texts / self.turns))

    @property
    def new(self) -> int:
        """The longest answer."""
        return min(self.task.max_new_tokens, self.tokens)

    @property
    def respell(self) -> bool:
        """Whether the teacher reads its own spelling."""
        return self.mask == "repair"


@dataclass(frozen=True, kw_only=True)
class TaskProbe:
    """What was seen of one task."""

    name: str
    report: Report
    """Of the two tokenizers."""
    findings: list[Finding]
    masked: list[Masked] = field(default_factory=list)
    """What the loss would leave out of the student's answers."""
    texts: dict[str, tuple[str, str]] = field(default_factory=dict)
    """A prompt and its answer by side, as text."""
    rewards: dict[str, list[float]] = field(default_factory=dict)
    """Of the episodes that came to their end, by side."""
    seconds: float = 0.0

    def of(self, *verdicts: Verdict) -> list[Finding]:
        """The findings with one of these verdicts."""
        return [finding for finding in self.findings if finding.verdict in verdicts]


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What both sides wrote."""

    students: Played
    calm: list[Turn]
    """What the student writes at temperature 1, where rollouts are above that."""
    own: Played
    """The teacher's, in its tokens."""
    read: list[Turn]
    """The same in the student's."""
    jumbled: tuple[list[Turn], list[Turn]]
    """Those of the student and of the teacher, in the student's tokens, shuffled."""

    @property
    def groups(self) -> tuple[list[Turn], ...]:
        """What the teacher scores."""
        return self.students.turns, self.read, *self.jumbled


def probe_task(probing: Probing, *, leads: bool, broadcast: Callable[[Any], Any]) -> TaskProbe:
    """Look at one task; all processes call it together, after `engine.sync`.

    Args:
        probing: What to look at.
        leads: True on the process that writes and decides.
        broadcast: Gives every process the object of the one that leads.

    Returns:
        The same on all processes.

    Raises:
        ConfigurationError: A side cannot write or score at all.
    """
    started = time.perf_counter()
    report = probing.teacher.pair.report()
    writer = probing.teacher.player(Sampling(temperature=0.0)) if probing.teacher_writes else None
    findings: list[Finding] = []
    written: _Written | None = None
    with _told_to_all(leads, broadcast):
        if leads:
            findings, written = _prepared(probing, writer, report)
    probe = TaskProbe(name=probing.name, report=report, findings=findings)
    if broadcast(written is not None):
        with _told_to_all(leads, broadcast):
            # One call for all, so that processes that share a teacher go through it equally often.
            turns = [] if written is None else [turn for group in written.groups for turn in group]
            nothing = torch.zeros((sum(len(turn.completion.ids) for turn in turns), 0), dtype=torch.long)
            support = probing.teacher.score(turns, nothing.to(probing.device))
            if written is not None:
                probe = _judged(probing, probe, writer, written, support)
    return broadcast(replace(probe, seconds=time.perf_counter() - started))


@contextmanager
def _told_to_all(leads: bool, broadcast: Callable[[Any], Any]) -> Iterator[None]:
    """Raise on all processes what the one that leads meets, or the others would wait for it."""
    met: Exception | None = None
    try:
        yield
    except Exception as error:
        if not leads:
            raise
        met = error
    alike = met if met is None or isinstance(met, ConfigurationError) else RuntimeError(str(met))
    told = broadcast(alike)
    if met is not None:
        raise met
    if told is not None:
        raise told


def _prepared(probing: Probing, writer: Player | None, report: Report) -> tuple[list[Finding], _Written | None]:
    """What can be told before anything is written, and then what is written; None where that would be for nothing."""
    try:
        turns = openings(probing.task, probing.indices, min(probing.task.max_turns, LOOKED_AHEAD))
    except ConfigurationError as error:
        raise ConfigurationError(f"Task '{probing.name}': {error}") from error
    conversations, sampling = [messages for turn in turns for messages in turn], probing.student.sampling
    findings = [_check_tokenizers(probing, report), check_samples(sampling, probing.samples)]
    findings.append(check_estimate(probing.objective, sampling))
    findings.append(check_template("student", probing.student.tokenizer, conversations))
    findings.append(check_template("teacher", probing.teacher.tokenizer, conversations))
    if not _any_refused(findings):
        findings += _check_rooms(probing, turns)
    if _any_refused(findings):
        return findings, None
    return findings, _write(probing, writer)


def _any_refused(findings: Sequence[Finding]) -> bool:
    return any(finding.verdict == "refused" for finding in findings)


def _check_rooms(probing: Probing, turns: list[list[list[Message]]]) -> list[Finding]:
    sides = (
        ("student", probing.student.tokenizer, probing.student.engine.room(0)),
        ("teacher", probing.teacher.tokenizer, probing.teacher.context),
    )
    new = probing.task.max_new_tokens
    return [
        check_room(side, [longest_prompt(tokenizer, conversations) for conversations in turns], new, room)
        for side, tokenizer, room in sides
    ]


def _write(probing: Probing, writer: Player | None) -> _Written:
    def played(player: Player) -> Played:
        return play(
            probing.task,
            player,
            indices=probing.indices,
            max_turns=probing.turns,
            max_new_tokens=probing.new,
            seed=probing.seed,
        )

    def jumbled(turns: Sequence[Turn]) -> list[Turn]:
        mixed = [shuffled(turn, seed_of(probing.seed, "shuffled", number)) for number, turn in enumerate(turns)]
        return [turn for turn in mixed if turn is not None]

    students, sampling = played(probing.student), probing.student.sampling
    at_one = replace(probing.student, sampling=replace(sampling, temperature=1.0))
    calm = played(at_one).turns if sampling.temperature > 1 else []
    own = Played(turns=[], rewards=[]) if writer is None else played(writer)
    read = in_students_tokens(
        own.turns,
        probing.teacher.pair,
        probing.student.tokenizer,
        respell=probing.respell,
        turn_end=frozenset() if writer is None else writer.turn_end,
    )
    return _Written(students=students, calm=calm, own=own, read=read, jumbled=(jumbled(students.turns), jumbled(read)))


def _judged(
    probing: Probing, probe: TaskProbe, writer: Player | None, written: _Written, support: Support
) -> TaskProbe:
    """The findings that follow from what was written and how the teacher scored it."""
    pair, tokens = probing.teacher.pair, probing.objective.teacher_tokens
    students, read, students_jumbled, read_jumbled = split(support, *written.groups)
    mask = loss_mask(pair, students.turns, probing.mask)
    keep = kept(mask, students.support, sampled=probing.objective.compares_sampled)
    check_end = partial(check_ending, new=probing.new, cut=probing.new < probing.task.max_new_tokens)
    found = [
        check_randomness(students.turns, written.calm, probing.student.sampling, pair.student),
        check_sums(students, tokens),
        check_count(students.support, tokens, pair),
        check_sense(students, students_jumbled, keep, pair),
        check_end("student", students.turns, probing.student.turn_end, pair.student, pair.tags),
    ]
    if writer is not None:
        as_read = respelled(read.turns, pair) if probing.respell else as_it_stands(read.turns, pair.teacher.size)
        own = OwnAnswers(written=written.own.turns, scored=read, reading=as_read)
        found += [
            check_end("teacher", own.written, writer.turn_end, pair.teacher, pair.tags),
            check_writing(own, writer.turn_end),
            check_order(own, read_jumbled),
            check_taught_end(own, pair, probing.mask),
        ]
    found.append(check_kept(keep.cpu().numpy(), students.support, probing.mask, tokens))
    sides = {"student": (students.turns, written.students.rewards)}
    if writer is not None:
        sides["teacher"] = (written.own.turns, written.own.rewards)
    return replace(
        probe,
        findings=[*probe.findings, *found],
        masked=masked(pair, students.turns, keep.cpu().numpy()),
        texts={side: (_text_of(turns[0]), turns[0].answer) for side, (turns, _) in sides.items() if turns},
        rewards={side: rewards for side, (_, rewards) in sides.items()},
    )


def _text_of(turn: Turn) -> str:
    """The last thing that was said before the answer."""
    return turn.prompt.messages[-1]["content"]


def _check_tokenizers(probing: Probing, report: Report) -> Finding:
    """How the two tokenizers differ, and whether the mask copes with it."""
    check = "tokenizers"
    text = f"{report.relation.value}, {report.shared:.1%} of the student's tokens exist in the teacher"
    if probing.respell:
        if report.shared < FEW_SHARED:
            return warning(check, text, "Supports will have few members: take a teacher whose vocabulary is nearer.")
        return ok(check, f"{text}; the teacher reads its own spelling")
    spelt = [name for name in report.mismatches if name != "prompts"]
    if not spelt:
        return ok(check, f"{text}; both spell alike")
    names = ", ".join(visible(name, blanks=False) for name in spelt)
    return warning(
        check,
        f"{text}; otherwise spelt: {names}, and model.mask is {probing.mask}",
        "Set it to repair, which lets the teacher read its own spelling.",
    )
