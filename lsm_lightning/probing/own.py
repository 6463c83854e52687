"""A teacher's own answers: it must score them as it wrote them, find them better than nonsense, and end them."""

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from lsm_lightning.batching import spans
from lsm_lightning.probing.finding import Finding, ok, refused, unknown, warning
from lsm_lightning.probing.scores import Scored, apart
from lsm_lightning.teacher.reading import Reading
from lsm_lightning.types import Turn
from tokenalign import Pair
from tokenalign.visible import visible

APART_ROUNDED, APART_WRONG = 0.2, 0.5
"""Between scoring and writing, as a share of what is told: logits of half precision make up to a tenth."""
AS_WRITTEN = 0.5
"""Share of tokens that a teacher has to read as it wrote them before it can be held to them."""
LIKELY = math.log(2)


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnAnswers:
    """What a teacher wrote, and how it scored that."""

    written: Sequence[Turn]
    """In its own tokens, with their log-probs."""
    scored: Scored
    """The same in the student's tokens, ended as the student ends them."""
    reading: Reading
    """What it read of that."""

    @property
    def places(self) -> list[range]:
        """The positions of each answer among those that were scored."""
        return spans([len(turn.completion.ids) for turn in self.scored.turns])

    @property
    def as_written(self) -> list[int]:
        """How many of the first tokens of each answer it reads as it wrote them; what follows is another text."""
        both = zip(self.written, self.reading.responses, strict=True)
        return [_common(turn.completion.ids, response) for turn, response in both]


def check_writing(own: OwnAnswers, turn_end: AbstractSet[int]) -> Finding:
    """A teacher gives the tokens of its own answers, when asked, the log-probs that it wrote them with.

    Another temperature, prompt, order of tokens or set of weights on either side is seen by this.

    Args:
        own: The answers.
        turn_end: What ends them; an end is scored together with all others.
    """
    check = "scoring"
    scored: list[float] = []
    told: list[float] = []
    sampled, alike = own.scored.support.sampled.tolist(), own.scored.support.alike.tolist()
    for turn, position, place, same in zip(own.written, own.reading.position, own.places, own.as_written, strict=True):
        for row, theirs in zip(place, position.tolist(), strict=True):
            if 0 <= theirs < same and alike[row] and turn.completion.ids[theirs] not in turn_end:
                scored.append(sampled[row])
                told.append(turn.completion.log_probs[theirs])
    if not scored:
        return unknown(check, "None of the tokens of its own answers is read by it as it wrote it")
    scoring, writing = np.array(scored), np.array(told)
    share = apart(scoring, writing)
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


def check_order(own: OwnAnswers, jumbled: Scored) -> Finding:
    """A teacher finds its own answers more probable than the same tokens in another order."""
    check, right, wrong = "own answers", own.scored.mean, jumbled.mean
    if math.isnan(right) or math.isnan(wrong):
        return unknown(check, "There was nothing to compare them with: too short, or of one token only")
    text = f"The teacher gives them {right:.2f} nats a token, shuffled {wrong:.2f}"
    tokens = sum(len(turn.completion.ids) for turn in own.written)
    if right <= wrong and sum(own.as_written) < AS_WRITTEN * tokens:
        return unknown(check, f"{text}, but reads most of them otherwise than it wrote them")
    if right <= wrong:
        return refused(
            check,
            text,
            "It does not mean what it says: its weights, tokenizer and chat template do not belong together, or its "
            "answers are taken at the wrong positions.",
        )
    return ok(check, f"{text}, {right - wrong:.2f} less")


def check_taught_end(own: OwnAnswers, pair: Pair, mask: str) -> Finding:
    """Where its own answers end, the teacher is for ending, and that is the student's end of a turn.

    Args:
        own: The answers.
        pair: Student and teacher.
        mask: See `MaskPolicy`.
    """
    check, support = "end of turn", own.scored.support
    # An end is known to belong there only if all before it is read as it was written.
    ends = {
        place[-1]: turn.completion.log_probs[-1]
        for turn, read, place, same in zip(own.written, own.scored.turns, own.places, own.as_written, strict=True)
        if not read.completion.truncated
        and same >= len(turn.completion.ids) - 1
        and bool(support.comparable[place[-1]])
    }
    if not ends:
        return unknown(check, "None of its answers ended and was read as written, so what it says there is not known")
    at = list(ends)
    ending, sampled = support.turn_end[at].double(), support.sampled[at].double()
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
    taught = float((support.alike[at] & (sampled > ending - LIKELY)).double().mean())
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
