"""How the losses of a step's positions become one number: by a weight for each, computed over all processes."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Reduction = Literal["token_mean", "sequence_mean", "task_mean"]
"""`token_mean`: every position counts alike (arXiv 2603.25562, Eq. 8). `sequence_mean`: every turn does, and within it
every position (what the paper's code comes to). `task_mean`: every task of the step does, and within it every position.

A step of `OnPolicyDistillation` has one task, so that `task_mean` is `token_mean` there: tasks take turns and count
alike by having a step each. It differs for callers of `position_weights` whose steps mix tasks.
"""


def position_weights(
    reduction: Reduction,
    keep: Bool[Tensor, " n"],
    *,
    turn: Int[Tensor, " n"],
    task: Int[Tensor, " n"],
    tasks: int,
    total: Callable[[Tensor], Tensor] = lambda values: values,
) -> Float[Tensor, " n"]:
    """The weight of each position; over all processes they sum to 1, or to 0 where nothing is kept.

    Positions form groups that count alike: weight = 1 / (positions in the group x number of groups).

    Args:
        reduction: What the groups are.
        keep: Which positions count; the others weigh 0.
        turn: The turn of each position, from 0. A turn is on one process, as a whole.
        task: The task of each position, by the same numbers on all processes.
        tasks: How many tasks there are.
        total: Sums a tensor over all processes, which call it together.

    >>> keep, turn = torch.tensor([True, True, False, True]), torch.tensor([0, 0, 0, 1])
    >>> position_weights("sequence_mean", keep, turn=turn, task=torch.zeros_like(turn), tasks=1).tolist()
    [0.25, 0.25, 0.0, 0.5]
    """
    if reduction == "sequence_mean":
        sizes = torch.bincount(turn[keep], minlength=int(turn.max()) + 1 if len(turn) else 1).double()
        return _weights(sizes, total((sizes > 0).sum()), turn, keep)
    group = task if reduction == "task_mean" else torch.zeros_like(turn)
    sizes = total(torch.bincount(group[keep], minlength=tasks).double())
    return _weights(sizes, (sizes > 0).sum(), group, keep)


def _weights(
    sizes: Float[Tensor, " g"], number: Int[Tensor, ""], group: Int[Tensor, " n"], keep: Bool[Tensor, " n"]
) -> Float[Tensor, " n"]:
    return torch.where(keep, 1 / (sizes[group] * number), 0.0)
