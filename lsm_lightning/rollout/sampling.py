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
    log_probs = logits.log_softmax(-1)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        scaled = log_probs if sampling.temperature == 1 else (logits / sampling.temperature).log_softmax(-1)
        tokens = _from_all(scaled.exp(), uniform) if sampling.top_p == 1 else _drawn(scaled, uniform, sampling.top_p)
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]


def _drawn(log_probs: Float[Tensor, "b v"], uniform: Float[Tensor, " b"], top_p: float) -> Int[Tensor, " b"]:
    """Most nuclei hold one token, which is found in half the time of a few."""
    highest, tokens = log_probs.max(-1)
    wider = (highest.exp() < top_p).nonzero()[:, 0]
    if len(wider):
        tokens[wider] = _from_nucleus(log_probs[wider], uniform[wider], top_p)
    return tokens


def _from_nucleus(
    log_probs: Float[Tensor, "b v"],
    uniform: Float[Tensor, " b"],
    top_p: float,
    guesses: Sequence[int] = NUCLEUS_GUESSES,
) -> Int[Tensor, " b"]:
    """In falling order of probability."""
    first = min(guesses[0], log_probs.shape[-1]) if guesses else log_probs.shape[-1]
    top, ids = log_probs.topk(first, -1)
    probs = top.exp()
    sums = probs.cumsum(-1)
    nucleus = torch.where(sums - probs < top_p, sums, 0).amax(-1, keepdim=True)
    drawn = uniform[:, None].clamp(max=BELOW_1) * nucleus
    tokens = ids.gather(-1, (sums <= drawn).sum(-1, keepdim=True))[:, 0]
    beyond = (sums[:, -1] < top_p).nonzero()[:, 0]
    if first < log_probs.shape[-1] and len(beyond):
        # Only rows whose nucleus is larger are looked at again: a row's order must not depend on the others.
        tokens[beyond] = _from_nucleus(log_probs[beyond], uniform[beyond], top_p, guesses[1:])
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
