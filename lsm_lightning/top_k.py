"""The K largest of many."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def top_k(values: Float[Tensor, "n v"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """What `values.topk(k)` gives, in less time on a CPU where rows are many.

    Columns are dealt out to groups. The K largest values lie in the K groups with the largest maxima, and maxima take
    one quick pass, so that only few columns are put in order.

    Returns:
        The values of each row in falling order, and their columns.

    >>> top_k(torch.tensor([[0.0, 5.0, 1.0, 9.0, 4.0, 2.0, 7.0, 3.0]]), 2)
    (tensor([[9., 7.]]), tensor([[3, 6]]))
    """
    columns = values.shape[1]
    size = math.isqrt(columns // max(k, 1))  # groups are then about as many as the members of the best of them
    if values.is_cuda or size < 2:
        top, ids = values.topk(k, -1)
        return top, ids
    groups = columns // size
    best = values[:, : groups * size].unflatten(-1, (size, groups)).amax(1).topk(k, -1, sorted=False).indices
    members = (best.unsqueeze(-1) + groups * torch.arange(size)).flatten(1)
    rest = torch.arange(groups * size, columns).expand(len(values), -1)
    candidates = torch.cat((members, rest), -1)
    top, place = values.gather(-1, candidates).topk(k, -1)
    return top, candidates.gather(-1, place)
