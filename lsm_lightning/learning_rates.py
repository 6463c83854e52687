"""Schedules of the learning rate that torch has no class for."""

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lsm_lightning.errors import ConfigurationError


class WarmupCosine(LRScheduler):
    """Up in a straight line, then down in half a cosine: step t (from 0) takes the optimiser's learning rate times

        (t + 1) / (warmup_steps + 1)                          for t < warmup_steps
        final + (1 - final) (1 + cos(pi p)) / 2               with p = (t - warmup_steps) / (max_steps - warmup_steps)

    and stays at `final` from `max_steps` on.

    Args:
        optimizer: Whose learning rates change.
        warmup_steps: Before the full rate; 0 starts with it.
        max_steps: Where the cosine ends; as a rule `trainer.max_steps`.
        final: Share of the rate that is left there.
        last_epoch: Of the step before the first one.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int, max_steps: int, final: float = 0.0, last_epoch: int = -1
    ) -> None:
        if not 0 <= warmup_steps < max_steps or not 0 <= final <= 1:
            raise ConfigurationError(
                f"WarmupCosine(warmup_steps={warmup_steps}, max_steps={max_steps}, final={final}): the warm-up must "
                "end before max_steps, and final is a share from 0 to 1."
            )
        self.warmup_steps, self.max_steps, self.final = warmup_steps, max_steps, final
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Of each parameter group."""
        return [base * self._share(self.last_epoch) for base in self.base_lrs]

    def _share(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / (self.max_steps - self.warmup_steps))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
