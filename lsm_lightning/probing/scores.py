"""Whether what a teacher says about answers can be log-probs, and makes sense."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from lsm_lightning.batching import spans
from lsm_lightning.probing.finding import Finding, ok, refused, unknown, warning
from lsm_lightning.types import Support, Turn
from tokenalign import Pair

SUM_ROUNDED, SUM_WRONG = 1.01, 1.05
"""A sum of probabilities may exceed 1 by the rounding of half precision."""
TOLD_TWICE = 0.1
"""Nats between two places where a token's log-prob stands."""
FLOOR = 0.0001
"""Nats a token that are nothing, whatever their share."""
SAME_MODEL = 0.05
"""Between student and teacher, as a share of what is told, below which they are taken for one model."""
SENSE = 1.0
"""Nats a token that a text has to be more probable than its tokens in another order, to make any sense."""
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

    @property
    def mean(self) -> float:
        """The teacher's mean log-prob of these tokens, in nats, where it reads them; NaN for none."""
        return float(self.support.sampled[self.support.alike].double().mean())


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
    if (between := _between_places(scored)) > TOLD_TWICE:
        return refused(
            check, f"A token's own is {between:.2g} nats from that among the top tokens, on average", NATURAL
        )
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


def _between_places(scored: Scored) -> float:
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


# ---- sense ----------------------------------------------------------------------------------------------------------


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
    chance, shuffled = -math.log(pair.teacher.known), jumbled.mean
    text = (
        f"The teacher gives them {float(theirs.mean()):.2f} nats a token, shuffled {shuffled:.2f} (chance: "
        f"{chance:.2f}), and the student itself {float(ours.mean()):.2f}"
    )
    if apart(ours.cpu().numpy(), theirs.cpu().numpy()) < SAME_MODEL and float(-ours.sum()) > 1:
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


def apart(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """How far log-probs of the same tokens are apart, as a share of the smaller surprise.

    Where a model is sure, another temperature moves next to nothing, but a multiple of that.
    """
    told = min(-ours.sum(), -theirs.sum())
    return float(np.abs(ours - theirs).sum() / (told + FLOOR * len(ours)))
