"""Success on a test split as a torchmetric, summed over processes."""

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from lsm_lightning.evaluation.intervals import wilson_interval


class SuccessRate(Metric):
    """Mean reward of one episode a problem, with the 95 % Wilson interval for problems like these.

    `compute` returns `{"value", "n", "low", "high"}` as 0-dimensional tensors.
    """

    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, rewards: Float[Tensor, " n"]) -> None:
        """Add the rewards of finished episodes, each from 0 to 1."""
        self.total += rewards.double().sum()
        self.count += rewards.numel()

    def compute(self) -> dict[str, Tensor]:
        """The rate so far."""
        n = int(self.count)
        low, high = wilson_interval(float(self.total), n)
        value = float(self.total) / n if n else float("nan")
        return {
            name: torch.tensor(number, dtype=torch.float64)
            for name, number in {"value": value, "n": float(n), "low": low, "high": high}.items()
        }
