"""Local support matching: compare student and teacher over a few tokens a position (arXiv 2603.25562, Eq. 8)."""

import math
import warnings
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives.base import (
    Loss,
    Objective,
    Positions,
    comparison_metrics,
    refuse_null,
    student_metrics,
)
from lsm_lightning.objectives.functional import Divergence, SupportKind, support_divergence
from lsm_lightning.objectives.head import OutputHead

Source = Literal["teacher", "student", "union", "sampled_added"]


class LocalSupportMatching(Objective):
    """Divergence over K tokens a position; see `functional.support_divergence`.

    Args:
        k: Size of the support, in tokens (paper: 32; it found 16 unstable).
        source: Whose top K tokens: the `teacher`'s (paper), the `student`'s, the `union` of both, or the teacher's with
            the token that the student sampled (`sampled_added`). `student` and `union` cost one more forward pass.
        support: What happens to the probability outside the support. `renormalise` is the paper's choice and needs no
            student normaliser; `tail_bucket` also sees student mass that leaves the support, as does `generalised`;
            `raw` collapses with `reverse_kl` and is there to show it.
        divergence: `reverse_kl` is the paper's.
        temperature: Divides the logits of both sides; only with `renormalise`, where the normaliser cancels.
    """

    def __init__(
        self,
        k: int = 32,
        source: Source = "teacher",
        support: SupportKind = "renormalise",
        divergence: Divergence = "reverse_kl",
        temperature: float = 1.0,
    ) -> None:
        refuse_null(
            "LocalSupportMatching", k=k, source=source, support=support, divergence=divergence, temperature=temperature
        )
        if k < 1:
            raise ConfigurationError(f"LocalSupportMatching(k={k}): use a positive number of tokens (paper: 32).")
        if k == 1 and support == "renormalise" and source in ("teacher", "student"):
            raise ConfigurationError(
                f"LocalSupportMatching(k={k}): renormalised over one token both sides are 1 and the loss is always 0. "
                "Use k >= 2 (paper: 32), or `SampledToken` for the baseline that compares one token."
            )
        if not 0 < temperature < math.inf:
            raise ConfigurationError(f"LocalSupportMatching(temperature={temperature}): use a positive, finite number.")
        if temperature != 1 and support != "renormalise":
            raise ConfigurationError(
                f"LocalSupportMatching(support={support!r}, temperature={temperature}): a temperature needs the "
                "normaliser over the whole vocabulary at that temperature; only `renormalise` does without."
            )
        if support == "raw" and divergence == "reverse_kl":
            warnings.warn(
                "support='raw' with reverse_kl is least where the student has 1/e of the teacher's probabilities, and "
                "collapses within about 100 steps (arXiv 2603.25562, 'no renormalisation'): use it to see that, not to "
                "train.",
                stacklevel=2,
            )
        self.teacher_tokens = 0 if source == "student" else k
        self.student_tokens = k if source in ("student", "union") else 0
        self.adds_sampled = source == "sampled_added"
        self.support: SupportKind = support
        self.divergence: Divergence = divergence
        self.temperature = temperature

    def __call__(self, head: OutputHead, positions: Positions) -> Loss:
        """The divergence; logged besides: the mass of both sides outside the support, and how often the first agree."""
        teacher = positions.support.log_probs
        student = head.logits(positions.hidden, positions.support.ids)
        if self.support != "renormalise":
            student = student - head.log_normaliser(positions.hidden).unsqueeze(-1)
        value = support_divergence(
            student / self.temperature, teacher / self.temperature, support=self.support, divergence=self.divergence
        )
        members = student.detach().masked_fill(teacher == -torch.inf, -torch.inf)
        outside = self._student_outside(head, positions, members)
        least = 2 if self.support == "renormalise" else 1
        compared = comparison_metrics(value, members, teacher, outside, least=least)
        return Loss(value=value, metrics=compared | student_metrics(head, positions))

    @torch.no_grad()
    def _student_outside(
        self, head: OutputHead, positions: Positions, members: Float[Tensor, "n k"]
    ) -> Float[Tensor, " _"]:
        """At every position if log-probs are at hand, else at the watched ones."""
        if self.support == "renormalise":
            watched = positions.watched
            members = members[watched] - head.log_normaliser(positions.hidden[watched]).unsqueeze(-1)
        return 1 - members.exp().sum(-1)
