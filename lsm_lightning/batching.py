"""Micro-batches of turns: grouped by length, padded on the right, with the places that predict the response."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """B sequences (prompt, then response) and where their N response tokens are predicted."""

    ids: Int[Tensor, "b t"]
    """Padded on the right with token 0."""
    row: Int[Tensor, " n"]
    """The sequence of each response token, not decreasing."""
    column: Int[Tensor, " n"]
    """The position before each response token: its hidden state predicts the token."""
    targets: Int[Tensor, " n"]
    """The response tokens."""

    @classmethod
    def pad(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
    ) -> "TokenBatch":
        """Pad sequences to a common length; each prompt has at least one token."""
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        width = max(len(row) for row in rows)
        places = [
            (row, len(prompt) + j - 1)
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
            for j in range(len(response))
        ]
        place = torch.tensor(places, dtype=torch.long, device=device).reshape(-1, 2)
        return cls(
            ids=torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device),
            row=place[:, 0],
            column=place[:, 1],
            targets=torch.tensor([i for response in responses for i in response], dtype=torch.long, device=device),
        )


def hidden_states(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, "n d"]:
    """The model's last hidden states at the positions that predict the response.

    No attention mask is passed: padding stands on the right, where causal attention never looks from a real token,
    and without a mask the fused causal kernels are used.
    """
    output = model.base_model(input_ids=batch.ids, use_cache=False)
    return output.last_hidden_state[batch.row, batch.column]


def group_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split indices into groups of like length whose padded size stays within `max_tokens` where it can.

    A single sequence longer than that makes a group of its own.

    >>> group_by_length([5, 90, 6, 10], max_tokens=20)
    [[0, 2], [3], [1]]
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def spans(lengths: Sequence[int]) -> list[range]:
    """Where each of several runs of positions lies when they are laid end to end.

    >>> spans([2, 3])
    [range(0, 2), range(2, 5)]
    """
    ends = torch.tensor(list(lengths), dtype=torch.long).cumsum(0).tolist()
    return [range(end - length, end) for length, end in zip(lengths, ends, strict=True)]
