"""What every objective is given, and what it returns."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.types import Support


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """N response positions of B turns, one turn after the other; masked positions are not among them."""

    hidden: Float[Tensor, "n d"]
    """The student's last hidden state before each response token, with gradient."""
    sampled: Int[Tensor, " n"]
    """The token that the student sampled there."""
    turn: Int[Tensor, " n"]
    """Number of the turn within this micro-batch, not decreasing."""
    support: Support


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A loss a position, not reduced: one place, the module, sums and divides."""

    value: Float[Tensor, " n"]
    """Nats; its gradient trains the student."""
    metrics: dict[str, Float[Tensor, " n"]] = field(default_factory=dict)
    """Further numbers a position, without gradient, to be averaged and logged."""


class Objective(ABC):
    """Turns K student logits and K teacher log-probs a position into a loss."""

    support_size: int
    """K: how many tokens a position the teacher has to deliver."""

    @abstractmethod
    def __call__(self, head: OutputHead, positions: Positions) -> Loss:
        """The loss at every position."""
