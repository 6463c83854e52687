"""Slow ways to the numbers of a step: one turn at a time, logits of the whole vocabulary, no padding."""

from collections.abc import Iterable, Sequence
from dataclasses import fields

import torch
from torch import Tensor
from transformers import PreTrainedModel

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


def top_support(logits: Tensor, sampled: Tensor, k: int, turn_end: Sequence[int] = (1,)) -> Support:
    """What a teacher with these logits says."""
    log_probs = logits.detach().log_softmax(-1)
    top = log_probs.topk(k, -1)
    return Support(
        ids=top.indices,
        log_probs=top.values,
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


def turn_of(turn: Turn, ids: Sequence[int]) -> Turn:
    """The same prompt with another answer."""
    completion = Completion(ids=ids, log_probs=[0.0] * len(ids), truncated=True)
    return Turn(prompt=turn.prompt, completion=completion, answer="")
