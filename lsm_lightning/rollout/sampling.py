"""From logits to a token, with the random number as an argument: a row does not depend on the rest of the batch."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lsm_lightning.rollout.base import Sampling

NUCLEUS_GUESSES = (16, 256)
"""Most probable tokens looked at first: most nuclei are small, and a full sort costs a third of the decoding."""


def sample(logits: Float[Tensor, "b v"], uniform: Float[Tensor, " b"], sampling: Sampling) -> Int[Tensor, " b"]:
    """One token a row, by inverting the cumulative distribution of its nucleus at `uniform`.

    The nucleus is the smallest set of most probable tokens that holds `top_p`, at the temperature asked for, as in
    vLLM.

    >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([0.5]), Sampling(temperature=0.0))
    tensor([1])
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
    if sampling.top_p == 1:
        return _from_all(scaled.softmax(-1), uniform)
    total = scaled.logsumexp(-1, keepdim=True)
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    rows = torch.arange(len(logits), device=logits.device)
    for guess in (*NUCLEUS_GUESSES, logits.shape[-1]):
        # Only rows whose nucleus is larger are looked at again: a row's order must not depend on the others.
        top, ids = (scaled[rows] if len(rows) < len(logits) else scaled).topk(min(guess, logits.shape[-1]), -1)
        probs = (top - total[rows]).exp()
        tokens[rows] = _from_nucleus(probs, ids, uniform[rows], sampling.top_p)
        rows = rows[probs.sum(-1) < sampling.top_p]
        if guess >= logits.shape[-1] or not len(rows):
            break
    return tokens


def log_probs_of(logits: Float[Tensor, "b v"], tokens: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Nats, at temperature 1 and without top-p."""
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def _from_nucleus(
    ordered: Float[Tensor, "b k"], ids: Int[Tensor, "b k"], uniform: Float[Tensor, " b"], top_p: float
) -> Int[Tensor, " b"]:
    """`ordered` holds probabilities in falling order."""
    before = ordered.cumsum(-1) - ordered
    inside = ordered.masked_fill(before >= top_p, 0.0)
    return ids.gather(-1, _invert(inside, uniform)[:, None])[:, 0]


def _from_all(probs: Float[Tensor, "b v"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """In the order of the vocabulary. A sum over so many loses digits: first blocks are drawn, then one of a block."""
    size = math.isqrt(probs.shape[-1] - 1) + 1
    blocks = torch.nn.functional.pad(probs, (0, -probs.shape[-1] % size)).unflatten(-1, (-1, size))
    sums = blocks.sum(-1)
    block = _invert(sums, uniform)[:, None]
    mass = sums.gather(-1, block)[:, 0]
    before = sums.cumsum(-1).gather(-1, block)[:, 0] - mass
    within = ((uniform * sums.sum(-1) - before) / mass).clamp(0, 1)
    rows = torch.arange(len(probs), device=probs.device)
    return block[:, 0] * size + _invert(blocks[rows, block[:, 0]], within)


def _invert(weights: Float[Tensor, "b k"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Where the running sum passes `uniform` times its end; a place with some weight."""
    sums = weights.cumsum(-1)
    place = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
    # Rounding may put the draw at the very end; the last place with any weight is the first to reach the total.
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(place, last).clamp(max=weights.shape[-1] - 1)[:, 0]
