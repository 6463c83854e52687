"""What every objective is given, and what it returns."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.types import Support

LEAST = math.log(torch.finfo(torch.float32).tiny)
"""Nats that stand for an impossible token where a sum has to stay finite."""
SAMPLER_GAP = "sampler_gap"
"""Nats between the student's log-prob of a token and the one it was sampled with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """N response positions of B turns, one turn after the other; masked positions are not among them."""

    hidden: Float[Tensor, "n d"]
    """The student's last hidden state before each response token, with gradient."""
    sampled: Int[Tensor, " n"]
    """The token that the student sampled there."""
    sampler_log_probs: Float[Tensor, " n"]
    """Nats: its log-prob when it was sampled."""
    turn: Int[Tensor, " n"]
    """Number of the turn within this micro-batch, not decreasing."""
    watched: Bool[Tensor, " n"]
    """A bounded number of positions a step, for measurements that need logits of the whole vocabulary."""
    support: Support


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A loss a position, not reduced: one place, `update`, weighs and sums."""

    value: Float[Tensor, " n"]
    """Nats; its gradient trains the student."""
    metrics: dict[str, Float[Tensor, " _"]] = field(default_factory=dict)
    """Further numbers, without gradient, at all positions or at some, to be averaged and logged."""


@torch.no_grad()
def student_metrics(head: OutputHead, positions: Positions) -> dict[str, Float[Tensor, " _"]]:
    """What is logged of the student by itself, whatever it is compared with, at the watched positions.

    That is its entropy, and by how much its log-prob of the sampled token differs from that of the sampler.
    """
    hidden, sampled = positions.hidden[positions.watched], positions.sampled[positions.watched]
    entropy, normaliser = head.entropy_and_normaliser(hidden)
    log_probs = head.logits(hidden, sampled.unsqueeze(-1)).squeeze(-1) - normaliser
    sampler = positions.sampler_log_probs[positions.watched].to(log_probs.dtype)
    return {"student_entropy": entropy, SAMPLER_GAP: (log_probs.clamp(min=LEAST) - sampler).abs()}


@torch.no_grad()
def comparison_metrics(
    value: Float[Tensor, " n"],
    student: Float[Tensor, "n k"],
    teacher: Float[Tensor, "n k"],
    student_outside: Float[Tensor, " _"],
    *,
    least: int = 1,
) -> dict[str, Float[Tensor, " _"]]:
    """What is logged where two distributions are compared over some tokens.

    Args:
        value: The divergence.
        student: Logits or log-probs; -inf at what is no member of the support.
        teacher: Log-probs, likewise.
        student_outside: The student's mass outside the support, at all positions or at some.
        least: So many members make a comparison. A position with fewer has no loss but counts in its mean all the
            same; `support_empty` is the share of those.
    """
    empty = (teacher > -torch.inf).sum(-1) < least
    return {
        "kl": value.detach(),
        "teacher_mass_outside": 1 - teacher.exp().sum(-1),
        "student_mass_outside": student_outside,
        "support_empty": empty.float(),
        "top1_agreement": (student.argmax(-1) == teacher.argmax(-1))[~empty].float(),
    }


def refuse_null(objective: str, **settings: object) -> None:
    """The command line takes null for any setting; say which one cannot be it.

    Raises:
        ConfigurationError: One of them is None.
    """
    for name, value in settings.items():
        if value is None:
            raise ConfigurationError(f"{objective}({name}=null): give a value, or leave it out for its default.")


class Objective(ABC):
    """Turns logits of the student and log-probs of the teacher into a loss a position."""

    teacher_tokens: int | None
    """How many of its top tokens the teacher delivers at a position; None: all that both sides have."""
    student_tokens: int = 0
    """How many of the student's own top tokens are compared as well."""
    adds_sampled: bool = False
    """Whether the sampled token is compared as well."""
    compares_sampled: bool = False
    """Whether a position is of use only where the teacher reads the very token that the student sampled."""

    @abstractmethod
    def __call__(self, head: OutputHead, positions: Positions) -> Loss:
        """The loss at every position."""
