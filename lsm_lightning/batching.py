"""Micro-batches of turns: grouped by length, padded on the right, with the places that predict the response."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.types import Turn


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """Sequences (prompt, then response) and where their N response tokens are predicted.

    A batch of no sequences holds one token, so that a model can run on it, and predicts nothing.
    """

    ids: Int[Tensor, "b t"]
    """One sequence a row, padded on the right with token 0; or all of them in one row, one after the other."""
    position_ids: Int[Tensor, "b t"] | None
    """Of packed sequences: from 0 in each, by which the model keeps them apart."""
    sequence: Int[Tensor, " n"]
    """The sequence of each response token, not decreasing."""
    row: Int[Tensor, " n"]
    """Its row in `ids`."""
    column: Int[Tensor, " n"]
    """The position before each response token: its hidden state predicts the token."""
    targets: Int[Tensor, " n"]
    """The response tokens."""

    @classmethod
    def pad(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
    ) -> "TokenBatch":
        """Pad sequences to a common length; each prompt has at least one token."""
        sequence, column = _places(prompts, responses, device)
        return cls(
            ids=torch.from_numpy(padded(_rows(prompts, responses))[0]).to(device),
            position_ids=None,
            sequence=sequence,
            row=sequence,
            column=column,
            targets=end_to_end(responses, device),
        )

    @classmethod
    def pack(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
    ) -> "TokenBatch":
        """Lay sequences one after the other, without padding; each prompt has at least one token."""
        rows = _rows(prompts, responses)
        starts = torch.tensor([places.start for places in spans([len(row) for row in rows])], device=device)
        sequence, column = _places(prompts, responses, device)
        return cls(
            ids=end_to_end(rows, device)[None],
            position_ids=end_to_end([range(len(row)) for row in rows], device)[None],
            sequence=sequence,
            row=torch.zeros_like(sequence),
            column=column + starts[sequence],
            targets=end_to_end(responses, device),
        )


def padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids `[B, T]` of some sequences, padded with 0 on the right or `left`, and True where they stand.

    >>> ids, there = padded([[5, 6, 7], [8]], left=True)
    >>> ids.tolist(), there[1].tolist()
    ([[5, 6, 7], [0, 0, 8]], [False, False, True])
    """
    lengths = np.array([len(row) for row in rows], np.int64)[:, None]
    place = np.arange(lengths.max(initial=0))
    there = place >= len(place) - lengths if left else place < lengths
    ids = np.zeros(there.shape, np.int64)
    ids[there] = _joined(rows)
    return ids, there


def padded_responses(turns: Sequence[Turn]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Response ids `[B, T]` of the turns, one turn a row and padded on the right with 0, and True where they stand."""
    return padded([turn.completion.ids for turn in turns])


def end_to_end(rows: Iterable[Sequence[int]], device: torch.device) -> Int[Tensor, " n"]:
    """Sequences laid one after the other."""
    return torch.from_numpy(_joined(rows)).to(device)


def sampled_ids(turns: Sequence[Turn], device: torch.device) -> Int[Tensor, " n"]:
    """What the student sampled in some turns, laid end to end."""
    return end_to_end([turn.completion.ids for turn in turns], device)


def rows_of(places: Sequence[range], members: Sequence[int], device: torch.device) -> Int[Tensor, " m"]:
    """Where the positions of some turns lie among those of all turns, whose `spans` are given."""
    return end_to_end([places[i] for i in members], device)


def _joined(rows: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    """By numpy, since torch takes eight times as long to read lists."""
    return np.fromiter(chain.from_iterable(rows), np.int64)


def _rows(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)] or [[0]]


def _places(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Of each response token the number of its sequence, and the position before it there."""
    lengths = np.array([len(response) for response in responses], np.int64)
    number = np.repeat(np.arange(len(lengths)), lengths)
    first = np.array([len(prompt) for prompt in prompts], np.int64) - (lengths.cumsum() - lengths) - 1
    column = np.arange(len(number)) + first[number]
    return torch.from_numpy(number).to(device), torch.from_numpy(column).to(device)


def hidden_states(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, "n d"]:
    """The model's last hidden states at the positions that predict the response.

    No attention mask is passed: padding stands on the right, where causal attention never looks from a real token,
    and without a mask the fused causal kernels are used. Packed sequences are told apart by their positions.
    """
    output = model.base_model(input_ids=batch.ids, position_ids=batch.position_ids, use_cache=False)
    return output.last_hidden_state[batch.row, batch.column]


@torch.no_grad()
def check_packing(model: PreTrainedModel, name: str) -> None:
    """Compare hidden states of packed sequences with those of each sequence alone.

    Models with a recurrent state, ALiBi or learned positions may take no notice of `position_ids` without a word.

    Args:
        model: In eval mode.
        name: For the message.

    Raises:
        ConfigurationError: They differ by more than rounding: the model lets packed sequences read each other.
    """
    embedding: Any = model.get_input_embeddings()
    rows = len(embedding.weight)
    # Short, so that what stands before them is not forgotten, and all different.
    prompts = [[5 * i % rows] for i in range(8)]
    responses = [[(5 * i + j) % rows for j in range(1, 5)] for i in range(8)]
    packed = hidden_states(model, TokenBatch.pack(prompts, responses, model.device)).float()
    alone = torch.cat(
        [
            hidden_states(model, TokenBatch.pad([prompt], [response], model.device)).float()
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    )
    error = float((packed - alone).norm() / alone.norm())
    exact = torch.finfo(model.dtype).bits >= 32 and not getattr(model, "is_quantized", False)
    if not error < (0.001 if exact else 0.03):
        raise ConfigurationError(
            f"model.packing: {type(model).__name__} ('{name}') does not keep packed sequences apart (its hidden states "
            f"differ by {error:.2g} of their size from those of one sequence at a time). Set model.packing to false."
        )


def group_by_length(lengths: Sequence[int], max_tokens: int, *, packed: bool = False) -> list[list[int]]:
    """Split indices into groups of like length whose size stays within `max_tokens` where it can.

    The size of a group is that of its padded batch, or without padding where `packed`. A single sequence longer than
    that makes a group of its own.

    >>> group_by_length([5, 90, 6, 10], max_tokens=20)
    [[0, 2], [3], [1]]
    >>> group_by_length([5, 90, 6, 10], max_tokens=21, packed=True)
    [[0, 2, 3], [1]]
    """
    groups: list[list[int]] = []
    size = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        grown = size + lengths[index] if packed else (len(groups[-1]) + 1 if groups else 1) * lengths[index]
        if groups and grown <= max_tokens:
            groups[-1].append(index)
            size += lengths[index]
        else:
            groups.append([index])
            size = lengths[index]
    return groups


def spans(lengths: Sequence[int]) -> list[range]:
    """Where each of several runs of positions lies when they are laid end to end.

    >>> spans([2, 3])
    [range(0, 2), range(2, 5)]
    """
    ends = torch.tensor(list(lengths), dtype=torch.long).cumsum(0).tolist()
    return [range(end - length, end) for length, end in zip(lengths, ends, strict=True)]
