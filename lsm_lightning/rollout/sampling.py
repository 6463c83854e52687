"""From logits to a token, with the random number as an argument: a row does not depend on the rest of the batch."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lsm_lightning.rollout.base import Sampling

NUCLEUS_GUESSES = (16, 256)
"""Most probable tokens looked at first: most nuclei are small, and a full sort costs a third of the decoding."""

BELOW_1 = 1 - 2**-22
"""So far below 1 that a product with it is smaller in float32: a draw then falls on a token with some probability."""


def sample(
    logits: Float[Tensor, "b v"], uniform: Float[Tensor, " b"], sampling: Sampling
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """One token a row, by inverting the cumulative distribution of its nucleus at `uniform`.

    The nucleus is the smallest set of most probable tokens that holds `top_p`, at the temperature asked for, as in
    vLLM.

    Returns:
        The tokens, and their log-probs in nats: raw ones, at temperature 1 and without top-p.

    >>> tokens, log_probs = sample(torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([0.5]), Sampling(temperature=0.0))
    >>> tokens, log_probs.exp()
    (tensor([1]), tensor([0.8438]))
    """
    total = logits.logsumexp(-1)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    elif sampling.top_p == 1:
        tokens = _from_all((logits / sampling.temperature).softmax(-1), uniform)
    elif sampling.temperature == 1:
        tokens = _from_nucleus(logits, total, uniform, sampling.top_p)
    else:
        scaled = logits / sampling.temperature
        tokens = _from_nucleus(scaled, scaled.logsumexp(-1), uniform, sampling.top_p)
    return tokens, logits.gather(-1, tokens[:, None])[:, 0] - total


def _from_nucleus(
    logits: Float[Tensor, "b v"],
    total: Float[Tensor, " b"],
    uniform: Float[Tensor, " b"],
    top_p: float,
    guesses: Sequence[int] = NUCLEUS_GUESSES,
) -> Int[Tensor, " b"]:
    """In falling order of probability; `total` is the logarithm of the sum of all."""
    first = min(guesses[0], logits.shape[-1]) if guesses else logits.shape[-1]
    top, ids = logits.topk(first, -1)
    probs = (top - total[:, None]).exp()
    sums = probs.cumsum(-1)
    last = (sums - probs < top_p).sum(-1, keepdim=True).clamp(min=1) - 1  # of the nucleus
    drawn = uniform[:, None].clamp(max=BELOW_1) * sums.gather(-1, last)
    tokens = ids.gather(-1, (sums <= drawn).sum(-1, keepdim=True))[:, 0]
    beyond = sums[:, -1] < top_p
    if first < logits.shape[-1] and bool(beyond.any()):
        # Only rows whose nucleus is larger are looked at again: a row's order must not depend on the others.
        tokens[beyond] = _from_nucleus(logits[beyond], total[beyond], uniform[beyond], top_p, guesses[1:])
    return tokens


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
    tokens = block[:, 0] * size + _invert(blocks[rows, block[:, 0]], within)
    return tokens.clamp(max=probs.shape[-1] - 1)


def _invert(weights: Float[Tensor, "b k"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Where the running sum passes `uniform` times its end; a place with some weight."""
    sums = weights.cumsum(-1)
    drawn = uniform[:, None].clamp(max=BELOW_1) * sums[:, -1:]
    # Of what is no number, the last: whoever asked looks at log-probs.
    return torch.searchsorted(sums, drawn, right=True)[:, 0].clamp(max=weights.shape[-1] - 1)
