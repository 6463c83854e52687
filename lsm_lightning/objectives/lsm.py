"""Local support matching: compare student and teacher over the teacher's top K tokens (arXiv 2603.25562, Eq. 8)."""

import warnings

import torch

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives.base import Loss, Objective, Positions
from lsm_lightning.objectives.functional import Divergence, SupportKind, support_divergence
from lsm_lightning.objectives.head import OutputHead


class LocalSupportMatching(Objective):
    """Divergence over the teacher's top K tokens; see `functional.support_divergence`.

    Args:
        k: Size of the support, in tokens (paper: 32; it found 16 unstable).
        support: What happens to the probability outside the support. `renormalise` is the paper's choice and needs no
            student normaliser; `tail_bucket` also sees student mass that leaves the support.
        divergence: `reverse_kl` is the paper's.
        temperature: Divides the logits of both sides; only with `renormalise`, where the normaliser cancels.
    """

    def __init__(
        self,
        k: int = 32,
        support: SupportKind = "renormalise",
        divergence: Divergence = "reverse_kl",
        temperature: float = 1.0,
    ) -> None:
        if k < 1 or (k == 1 and support == "renormalise"):
            raise ConfigurationError(
                f"LocalSupportMatching(k={k}): renormalised over one token both sides are 1 and the loss is always 0. "
                "Use k >= 2 (paper: 32), or `SampledToken` for the baseline that compares one token."
            )
        if temperature <= 0:
            raise ConfigurationError(f"LocalSupportMatching(temperature={temperature}): use a positive number.")
        if temperature != 1 and support != "renormalise":
            raise ConfigurationError(
                f"LocalSupportMatching(support={support!r}, temperature={temperature}): a temperature needs the "
                "normaliser over the whole vocabulary at that temperature; only `renormalise` does without."
            )
        if support == "raw":
            warnings.warn(
                "support='raw' collapses within about 100 steps (arXiv 2603.25562, 'no renormalisation'): use it to "
                "see that, not to train.",
                stacklevel=2,
            )
        self.support_size = k
        self.support: SupportKind = support
        self.divergence: Divergence = divergence
        self.temperature = temperature

    def __call__(self, head: OutputHead, positions: Positions) -> Loss:
        """The divergence, and the probability the teacher has inside the support."""
        teacher = positions.support.log_probs
        student = head.logits(positions.hidden, positions.support.ids)
        if self.support != "renormalise":
            student = student - head.log_normaliser(positions.hidden).unsqueeze(-1)
        value = support_divergence(
            student / self.temperature, teacher / self.temperature, support=self.support, divergence=self.divergence
        )
        metrics = {"kl": value.detach(), "teacher_mass": teacher.exp().sum(-1)}
        if self.support != "renormalise":
            metrics["student_mass"] = student.detach().exp().sum(-1)
        with torch.no_grad():
            agreement = student.argmax(-1) == teacher.argmax(-1)
        return Loss(value=value, metrics=metrics | {"top1_agreement": agreement.float()})
