"""Means over all processes of what one step counted."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def global_means(
    sums: Mapping[str, tuple[float, float]], total: Callable[[Tensor], Tensor] = lambda values: values
) -> dict[str, float]:
    """Turn (sum, count) of this process into means over all of them; a count of 0 everywhere leaves the name out.

    Args:
        sums: By name; every process passes the same names.
        total: Sums a tensor over all processes, which call it together; called once, whatever the number of names.

    >>> global_means({"reward": (3.0, 4), "turns": (0.0, 0)})
    {'reward': 0.75}
    """
    names = sorted(sums)
    totals = total(torch.tensor([sums[name] for name in names], dtype=torch.float64)).tolist()
    return {name: amount / count for name, (amount, count) in zip(names, totals, strict=True) if count > 0}
