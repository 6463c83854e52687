"""Whether what a teacher says about answers can be what it means: its log-probs, its own answers, ends of turns."""

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from lsm_lightning.batching import spans
from lsm_lightning.probing.answers import ended
from lsm_lightning.probing.finding import Finding, ok, refused, unknown, warning
from lsm_lightning.teacher.reading import Reading
from lsm_lightning.types import Support, Turn
from tokenalign import Pair
from tokenalign.visible import visible
from tokenalign.vocabulary import Vocabulary

SUM_ROUNDED, SUM_WRONG = 1.01, 1.05
"""A sum of probabilities may exceed 1 by the rounding of half precision."""
TOLD_TWICE = 0.1
"""Nats between two places where a token's log-prob stands."""
APART_ROUNDED, APART_WRONG = 0.2, 0.5
"""Between scoring and writing, as a share of what is told: logits of half precision make up to a tenth."""
FLOOR = 0.0001
"""Nats a token that are nothing, whatever their share."""
SAME_MODEL = 0.02
"""Between student and teacher, as a share of what is told, below which they are taken for one model."""
SENSE = 1.0
"""Nats a token that a text has to be more probable than its tokens in another order, to make any sense."""
SURE = math.log(0.5)
NATURAL = "Let it answer with natural logarithms over its whole vocabulary, at temperature 1."


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Some turns in the student's tokens, and what the teacher says at their positions, laid end to end."""

    turns: Sequence[Turn]
    support: Support

    @property
    def ids(self) -> Int[Tensor, " n"]:
        """The tokens that stand there."""
        ids = [i for turn in self.turns for i in turn.completion.ids]
        return torch.tensor(ids, dtype=torch.long, device=self.support.ids.device)

    def mean(self, keep: Bool[Tensor, " n"] | None = None) -> float:
        """The teacher's mean log-prob of these tokens, in nats, where it reads them (and may count); NaN for none."""
        here = self.support.alike if keep is None else self.support.alike & keep
        return float(self.support.sampled[here].double().mean())


def split(support: Support, *groups: Sequence[Turn]) -> list[Scored]:
    """The supports of groups of turns that were scored together."""
    parts = spans([sum(len(turn.completion.ids) for turn in group) for group in groups])
    rows = [torch.arange(part.start, part.stop, device=support.ids.device) for part in parts]
    return [Scored(turns=group, support=support.rows(row)) for group, row in zip(groups, rows, strict=True)]


# ---- log-probs ------------------------------------------------------------------------------------------------------


def check_sums(scored: Scored, tokens: int | None) -> Finding:
    """Probabilities are some, sum to at most 1, and a token's is the same wherever it stands.

    Args:
        scored: Any turns.
        tokens: How many of its top tokens the teacher was asked for; None: all, which must sum to 1.
    """
    check, support = "log-probs", scored.support
    members, sampled = support.log_probs[support.comparable].double(), support.sampled[support.alike].double()
    if bool(members.isnan().any() | sampled.isnan().any()):
        return refused(check, "Some are no numbers", NATURAL)
    largest = max([float(values.max()) for values in (members, sampled) if values.numel()], default=-math.inf)
    if largest > math.log(SUM_WRONG):
        return refused(check, f"One is {largest:.3g}, more than a log-prob can be", NATURAL)
    if (apart := _two_places_apart(scored)) > TOLD_TWICE:
        return refused(check, f"A token's own is {apart:.2g} nats from that among the top tokens, on average", NATURAL)
    sums = members.exp().sum(-1)
    if tokens == 0 or not sums.numel():
        return ok(check, "The objective asks for those of sampled tokens only, and none is above 0")
    if float(sums.max()) > SUM_WRONG:
        return refused(check, f"Probabilities sum to {float(sums.max()):.3g} at a position", NATURAL)
    whole = sums + support.lost[support.comparable].double()
    if tokens is None and float(whole.min()) < 2 - SUM_WRONG:
        return refused(check, f"Those of all tokens sum to {float(whole.min()):.3g} only at a position", NATURAL)
    if float(sums.max()) > SUM_ROUNDED:
        return warning(
            check, f"Probabilities sum to {float(sums.max()):.3g} at a position", "Set the teacher's dtype to float32."
        )
    of = "all tokens" if tokens is None else f"the top {tokens}"
    return ok(
        check, f"Probabilities of {of} sum to {float(sums.mean()):.3f} on average, {float(sums.max()):.4f} at most"
    )


def _two_places_apart(scored: Scored) -> float:
    """Nats between the log-prob of the token that stands there and what is told of it as a member."""
    support = scored.support
    same = (support.ids == scored.ids.unsqueeze(-1)) & (support.log_probs > -torch.inf) & support.alike.unsqueeze(-1)
    place = same.any(-1)
    if not bool(place.any()):
        return 0.0
    as_member = support.log_probs.masked_fill(~same, -torch.inf).amax(-1)[place]
    return float((as_member - support.sampled[place]).double().abs().mean())


def check_count(support: Support, tokens: int | None, pair: Pair) -> Finding:
    """As many top tokens arrive as were asked for, but for those that the student lacks."""
    check = "top tokens"
    if not tokens:
        return ok(check, "The objective asks for none" if tokens == 0 else "The objective asks for all")
    rows = support.log_probs[support.comparable]
    most = int((rows > -torch.inf).sum(-1).max()) if len(rows) else 0
    lacking = int((pair.vocab.to_student[: pair.teacher.known] < 0).sum())
    if len(rows) and most < tokens - lacking:
        return refused(
            check,
            f"{tokens} were asked for, and {most} came",
            f"Lower model.objective.init_args.k to {most}, or let the teacher answer with more.",
        )
    return ok(check, f"{tokens} were asked for, and {'as many' if most >= tokens else f'up to {most} known ones'} came")


def check_writing(written: Sequence[Turn], reading: Reading, own: Scored, turn_end: AbstractSet[int]) -> Finding:
    """A teacher gives the tokens of its own answer, when asked, the log-probs that it wrote them with.

    Another temperature, prompt, order of tokens or set of weights on either side is seen by this.

    Args:
        written: Its answers in its own tokens, with their log-probs.
        reading: What it reads of the same answers when it scores them.
        own: How it scored them.
        turn_end: Its own; an end is scored together with all others.
    """
    check = "scoring"
    scored: list[float] = []
    told: list[float] = []
    places = spans([len(turn.completion.ids) for turn in own.turns])
    sampled, alike = own.support.sampled.tolist(), own.support.alike.tolist()
    for turn, response, position, place in zip(written, reading.responses, reading.position, places, strict=True):
        ids = turn.completion.ids
        same = _common(ids, response)
        for row, theirs in zip(place, position.tolist(), strict=True):
            if 0 <= theirs < same and alike[row] and ids[theirs] not in turn_end:
                scored.append(sampled[row])
                told.append(turn.completion.log_probs[theirs])
    if not scored:
        return unknown(check, "None of the tokens of its own answers is read by it as it wrote it")
    scoring, writing = np.array(scored), np.array(told)
    share = _apart(scoring, writing)
    text = (
        f"Its own answers have {scoring.mean():.2g} nats a token when it scores them, and {writing.mean():.2g} when it "
        f"writes them ({len(scored)} tokens)"
    )
    if not share <= APART_WRONG:
        return refused(
            check,
            text,
            "Its log-probs must be raw (temperature 1, no penalties), and its weights, tokenizer and chat template one "
            "model's on both ways.",
        )
    if share > APART_ROUNDED:
        return warning(check, text, "Set its dtype to float32, or see whether rounding explains it.")
    return ok(check, text)


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many of the first tokens agree."""
    return next(
        (n for n, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), min(len(ids), len(others))
    )


def _apart(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """How far log-probs of the same tokens are apart, as a share of the smaller surprise.

    Where a model is sure, another temperature moves next to nothing, but a multiple of that.
    """
    told = min(-ours.sum(), -theirs.sum())
    return float(np.abs(ours - theirs).sum() / (told + FLOOR * len(ours)))


# ---- sense ----------------------------------------------------------------------------------------------------------


def check_order(own: Scored, mixed: Scored) -> Finding:
    """A teacher finds its own answers more probable than the same tokens in another order."""
    check, right, wrong = "own answers", own.mean(), mixed.mean()
    if math.isnan(right) or math.isnan(wrong):
        return unknown(check, "There was nothing to compare them with: too short, or of one token only")
    text = f"{right:.2f} nats a token, and {wrong:.2f} for the same tokens shuffled"
    if right <= wrong:
        return refused(
            check,
            text,
            "It does not mean what it says: its weights, tokenizer and chat template do not belong together, or its "
            "answers are taken at the wrong positions.",
        )
    return ok(check, f"{text}: {right - wrong:.2f} more")


def check_sense(students: Scored, jumbled: Scored, keep: Bool[Tensor, " n"], pair: Pair) -> Finding:
    """A teacher sees some sense in what a student is sure of, and is not that student itself.

    Args:
        students: The student's answers.
        jumbled: The same with their tokens shuffled.
        keep: Which of their positions count.
        pair: Student and teacher.
    """
    check = "student's answers"
    here = students.support.alike & keep
    if not bool(here.any()):
        return unknown(check, "It reads none of the student's tokens as they are, so they have no log-probs")
    theirs = students.support.sampled[here].double()
    values = [value for turn in students.turns for value in turn.completion.log_probs]
    ours = torch.tensor(values, dtype=torch.float64, device=theirs.device)[here]
    chance, shuffled = -math.log(pair.teacher.known), jumbled.mean()
    text = (
        f"{float(theirs.mean()):.2f} nats a token, {shuffled:.2f} shuffled, {chance:.2f} by chance; "
        f"by the student itself {float(ours.mean()):.2f}"
    )
    if _apart(ours.cpu().numpy(), theirs.cpu().numpy()) < SAME_MODEL and float(-ours.sum()) > 1:
        return warning(
            check,
            f"{text}: student and teacher give the same probabilities",
            "There is nothing to learn from oneself: check model.student and the teacher's path.",
        )
    senseless = float(theirs.mean()) < min(chance, shuffled + SENSE)
    if senseless and float(ours.mean()) > chance / 2:
        return refused(
            check,
            text,
            "The teacher sees no sense in them: its weights and its tokenizer do not belong together, or the mask lets "
            "it read what it cannot.",
        )
    return ok(check, text)


# ---- ends of turns --------------------------------------------------------------------------------------------------


def check_ending(
    side: str,
    turns: Sequence[Turn],
    turn_end: AbstractSet[int],
    vocabulary: Vocabulary,
    tags: Sequence[str],
    *,
    new: int,
    cut: bool,
) -> Finding:
    """A side's answers end, and do not run on past a control token that looks like their end.

    Args:
        side: `student` or `teacher`.
        turns: In its own tokens, with their log-probs.
        turn_end: What ends its turn.
        vocabulary: Its own.
        tags: Texts that are no end, although they may be control tokens.
        new: Longest answer that they were allowed.
        cut: Whether that is less than the task allows.
    """
    check = f"{side}'s turn end"
    names = " ".join(visible(vocabulary.pieces[i]) for i in sorted(turn_end)) or "nothing"
    done = sum(ended(turn, turn_end) for turn in turns)
    if done:
        return ok(check, f"{done} of {len(turns)} answers ended, by {names} (limit {new} tokens)")
    past = [i for turn in turns for i in _surely(turn, turn_end, vocabulary, tags)]
    if past:
        return refused(
            check,
            f"None of {len(turns)} answers ended by {names}; they went on after {visible(vocabulary.pieces[past[0]])}",
            f"Add id {past[0]} to eos_token_id in generation_config.json of the {side}, or set a chat_template that "
            "shows it.",
        )
    text = f"None of {len(turns)} answers ended within {new} tokens, by {names}"
    if cut:
        return unknown(check, text, "Give the probe more by --probing.tokens.")
    return warning(check, text, f"Raise the task's max_new_tokens, if the {side} needs longer.")


def _surely(turn: Turn, turn_end: AbstractSet[int], vocabulary: Vocabulary, tags: Sequence[str]) -> list[int]:
    """Control tokens that end nothing and were no accident."""
    no_end = {tag.encode() for tag in tags}
    return [
        i
        for i, value in zip(turn.completion.ids, turn.completion.log_probs, strict=True)
        if vocabulary.special[i] and i not in turn_end and value > SURE and vocabulary.pieces[i] not in no_end
    ]


def check_taught_end(written: Sequence[Turn], own: Scored, pair: Pair, mask: str) -> Finding:
    """Where its own answer ends, the teacher is for ending, and that is the student's end of a turn.

    Args:
        written: A teacher's own answers.
        own: The same in the student's tokens, ended as the student ends them, and how the teacher scored them.
        pair: Student and teacher.
        mask: See `MaskPolicy`.
    """
    check = "end of turn"
    places = spans([len(turn.completion.ids) for turn in own.turns])
    ends = {
        place[-1]: turn.completion.log_probs[-1]
        for place, turn, read in zip(places, written, own.turns, strict=True)
        if not read.completion.truncated and bool(own.support.comparable[place[-1]])
    }
    if not ends:
        return unknown(check, "No answer of the teacher's ended, so nothing is known of what it says there")
    at = list(ends)
    ending, sampled = own.support.turn_end[at].double(), own.support.sampled[at].double()
    probability, wrote = float(ending.exp().mean()), float(np.exp(list(ends.values())).mean())
    student, teacher = (
        "nothing" if side.own_turn_end is None else visible(vocabulary.pieces[side.own_turn_end])
        for side, vocabulary in zip(pair.conventions, (pair.student, pair.teacher), strict=True)
    )
    if probability < wrote / 2:
        return refused(
            check,
            f"Its own answers end with probability {wrote:.2g} when it writes them, {probability:.2g} when it scores "
            "them",
            "Name what ends its turn in eos_token_id of its generation_config.json, and serve these weights.",
        )
    taught = float((own.support.alike[at] & (sampled > ending + SURE)).double().mean())
    if taught > 0.5:
        return ok(check, f"Where its answers end, {student} has probability {float(sampled.exp().mean()):.2f}")
    text = f"Where its answers end (probability {probability:.2f}), the teacher means {teacher}, not {student}"
    if mask == "repair" or mask == "none":
        return refused(
            check,
            f"{text}: the student would never learn to end its turn",
            "Give both a chat_template that ends answers, or a turn end by eos_token_id."
            if mask == "repair"
            else "Set model.mask to repair, which takes them for one, or to tags.",
        )
    return warning(
        check, f"{text}: ends are masked, and not taught", "Set model.mask to repair, which takes them for one."
    )
