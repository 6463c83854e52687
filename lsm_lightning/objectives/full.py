"""The reference: divergence over the whole vocabulary, for models small enough to afford it."""

import torch

from lsm_lightning.objectives.base import Loss, Objective, Positions, comparison_metrics, refuse_null, student_metrics
from lsm_lightning.objectives.functional import Divergence, support_divergence
from lsm_lightning.objectives.head import OutputHead


class FullVocabulary(Objective):
    """Divergence over every token that both sides have; `[N, V]` logits of both are in memory at once.

    Where the vocabularies differ, the mass that one side keeps elsewhere counts as in `generalised`
    (`functional.support_divergence`); where they are the same, that is the divergence itself.

    Args:
        divergence: `reverse_kl` is the paper's.
    """

    teacher_tokens = None

    def __init__(self, divergence: Divergence = "reverse_kl") -> None:
        refuse_null("FullVocabulary", divergence=divergence)
        self.divergence: Divergence = divergence

    def __call__(self, head: OutputHead, positions: Positions) -> Loss:
        """The divergence; logged besides: the mass of both sides on tokens that the other lacks."""
        teacher = positions.support.log_probs
        student = head.all_logits(positions.hidden, exact=True).log_softmax(-1).gather(-1, positions.support.ids)
        value = support_divergence(student, teacher, support="generalised", divergence=self.divergence)
        members = student.detach().masked_fill(teacher == -torch.inf, -torch.inf)
        compared = comparison_metrics(value, members, teacher, 1 - members.exp().sum(-1))
        return Loss(value=value, metrics=compared | student_metrics(head, positions))
