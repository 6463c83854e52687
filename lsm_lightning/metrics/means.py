"""Means over all processes of what one step counted."""

from collections.abc import Mapping

import torch
from torchmetrics import MeanMetric


def global_means(sums: Mapping[str, tuple[float, float]], device: torch.device) -> dict[str, float]:
    """Turn (sum, count) of this process into means over all of them; a count of 0 everywhere leaves the name out.

    Every process passes the same names.
    """
    means = {}
    for name in sorted(sums):
        total, count = sums[name]
        metric = MeanMetric(nan_strategy="ignore").to(device)  # "disable" would also drop the weights
        metric.update(total / count if count else 0.0, weight=count)
        value = metric.compute().item()
        if metric.weight > 0:
            means[name] = value
    return means
