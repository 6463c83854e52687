"""Slow ways to the numbers of a step: one turn at a time, logits of the whole vocabulary, no padding."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lsm_lightning.objectives import Positions
from lsm_lightning.types import Completion, Support, Turn


def response_logits(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """`[T, V]` logits of what comes at each place of the response."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    return logits[len(prompt) - 1 : len(prompt) + len(response) - 1]


def all_response_logits(model: PreTrainedModel, turns: Iterable[Turn]) -> Tensor:
    """The same for turns laid end to end."""
    return torch.cat([response_logits(model, turn.prompt.ids, turn.completion.ids) for turn in turns])


def sampled_ids(turns: Iterable[Turn]) -> Tensor:
    return torch.tensor([token for turn in turns for token in turn.completion.ids])


def top_support(
    logits: Tensor, sampled: Tensor, k: int, added: Tensor | None = None, turn_end: Sequence[int] = (1,)
) -> Support:
    """What a teacher with these logits says; of the `added` ids none is a member a second time."""
    log_probs = logits.detach().log_softmax(-1)
    ids = log_probs.topk(k, -1).indices.tolist()
    members = [row[top].tolist() for row, top in zip(log_probs, ids, strict=True)]
    for n, more in enumerate([] if added is None else added.tolist()):
        for token in more:
            members[n].append(-torch.inf if token in ids[n] else log_probs[n, token].item())
            ids[n].append(token)
    width = k + (0 if added is None else added.shape[1])
    values = torch.tensor(members, dtype=log_probs.dtype).reshape(len(ids), width)
    return Support(
        ids=torch.tensor(ids, dtype=torch.long).reshape(len(ids), width).masked_fill(values == -torch.inf, 0),
        log_probs=values,
        sampled=log_probs.gather(-1, sampled[:, None])[:, 0],
        turn_end=log_probs[:, list(turn_end)].logsumexp(-1),
        lost=torch.zeros(len(log_probs), dtype=log_probs.dtype),
        comparable=torch.ones(len(log_probs), dtype=torch.bool),
        alike=torch.ones(len(log_probs), dtype=torch.bool),
    )


def random_support(turns: Sequence[Turn], k: int, seed: int = 0, vocabulary: int = 340) -> Support:
    """A teacher who knows nothing, in float64."""
    sampled = sampled_ids(turns)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(sampled), vocabulary, generator=generator, dtype=torch.float64) * 3
    return top_support(logits, sampled, k)


def joined(supports: Sequence[Support]) -> Support:
    """Supports laid end to end."""
    return Support(**{f.name: torch.cat([getattr(part, f.name) for part in supports]) for f in fields(Support)})


def positions(hidden: Tensor, support: Support, **others: Any) -> Positions:
    """Positions of one turn, all watched, sampled as the teacher's first token with probability 1, if not given."""
    n = len(hidden)
    return Positions(
        **{
            "hidden": hidden,
            "sampled": support.ids[:, 0] if support.ids.shape[1] else torch.zeros(n, dtype=torch.long),
            "sampler_log_probs": torch.zeros(n, dtype=hidden.dtype),
            "turn": torch.zeros(n, dtype=torch.long),
            "watched": torch.ones(n, dtype=torch.bool),
            "support": support,
            **others,
        }
    )


def even_weights(keep: Tensor) -> Tensor:
    """Every kept position counts alike."""
    return keep.double() / max(1, int(keep.sum()))


def turn_of(turn: Turn, ids: Sequence[int]) -> Turn:
    """The same prompt with another answer."""
    completion = Completion(ids=ids, log_probs=[-3.0] * len(ids), truncated=True)
    return Turn(prompt=turn.prompt, completion=completion, answer="")


class _Sizes(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, in forward and backward passes."""

    largest = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        # An expanded tensor takes no memory.
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(result)
            if torch.is_tensor(leaf)
        ]
        self.largest = max(self.largest, *sizes, 0)
        return result


@contextmanager
def tensor_sizes() -> Iterator[_Sizes]:
    """Watch how large tensors get; the answer is there afterwards."""
    with _Sizes() as sizes:
        yield sizes
