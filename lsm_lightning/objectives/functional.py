r"""The maths of the objectives: pure functions, no reduction over positions.

Source: arXiv 2603.25562. Notation: $\pi$ the student, $q$ the teacher, $S$ the support (the teacher's top K tokens).
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SupportKind = Literal["renormalise", "tail_bucket", "generalised", "raw"]
Divergence = Literal["reverse_kl", "forward_kl", "jsd"]


def support_divergence(
    student: Float[Tensor, "*b k"],
    teacher: Float[Tensor, "*b k"],
    *,
    support: SupportKind = "renormalise",
    divergence: Divergence = "reverse_kl",
) -> Float[Tensor, "*b"]:
    r"""Divergence of student and teacher over K gathered tokens, in nats.

    `reverse_kl` is $\sum_{v \in S} \pi_v (\log \pi_v - \log q_v)$, `forward_kl` swaps the two, `jsd` is the mean of
    both against their mixture. What $\pi$ and $q$ are depends on `support`:

    - `renormalise`: both are divided by their sum over $S$ (arXiv 2603.25562, Eq. 8). Takes any logits.
    - `tail_bucket`: one more entry holds $1 - \sum_S$ of each side, or the type's epsilon where that is less
      (float32: 1.2e-7, so a tail below it has no gradient). Takes log-probs, as do the next two.
    - `generalised`: as they are, plus $\sum_S (q_v - \pi_v)$ (sign swapped for `forward_kl`), which makes it a
      divergence of unnormalised measures.
    - `raw`: as they are; not a divergence, save `jsd`: the minimum of `reverse_kl` lies at $\pi_S = q_S / e$, and
      training collapses; that of `forward_kl` has all of $\pi$ on $S$.

    A token that the teacher gives probability 0 is no member of the support, on neither side; a position without
    members has no divergence. A member that the student gives probability 0 (-inf) counts as if it had the smallest
    normal number (float32: -87.3 nats), without gradient; finite log-probs count as they are, however small.

    Computed in float32 or wider, finite for every input that has neither NaN nor +inf.

    >>> support_divergence(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 6.0]))
    tensor(0.)
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    member = teacher > -torch.inf
    log_pi, log_q = (side.to(wide).masked_fill(~member, -torch.inf) for side in (student, teacher))
    if support == "renormalise":
        log_pi, log_q = _log_softmax(log_pi), _log_softmax(log_q)
    elif support == "tail_bucket":
        log_pi, log_q = _with_tail(log_pi), _with_tail(log_q)
    if divergence == "jsd":
        # Where both are -inf, any finite number will do: such entries weigh 0, but would have a NaN gradient.
        neither = (log_pi == -torch.inf) & (log_q == -torch.inf)
        mixture = torch.logaddexp(log_pi.masked_fill(neither, 0.0), log_q.masked_fill(neither, 0.0)) - math.log(2)
        return (_kl(log_pi, mixture) + _kl(log_q, mixture)) / 2
    first, second = (log_pi, log_q) if divergence == "reverse_kl" else (log_q, log_pi)
    value = _kl(first, second)
    return value + (second.exp() - first.exp()).sum(-1) if support == "generalised" else value


def returns_to_go(rewards: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], gamma: float) -> Float[Tensor, "b t"]:
    r"""Discounted sums of what follows, $\sum_{t' \ge t} \gamma^{t' - t} r_{t'}$; masked positions pay nothing.

    They still lie between the others: a reward behind one is discounted as often as if it had paid.
    `gamma` 0 is the token-level estimator, 1 the sequence-level one (arXiv 2603.25562, Sec. 3).

    >>> returns_to_go(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]]), gamma=0.5)
    tensor([[3., 4., 4.]])
    """
    paid = rewards.masked_fill(~mask, 0.0)
    if gamma == 0 or paid.shape[1] == 0:
        return paid
    following = torch.zeros_like(paid[:, 0])
    sums = []
    for reward in paid.unbind(1)[::-1]:
        following = reward + gamma * following
        sums.append(following)
    return torch.stack(sums[::-1], 1)


def clipped_policy_loss(
    log_ratio: Float[Tensor, "*b"], advantages: Float[Tensor, "*b"], *, clip: float, dual_clip: float
) -> Float[Tensor, "*b"]:
    r"""PPO's loss $-\min(\rho A, \text{clip}(\rho, 1 \pm \epsilon) A)$, with $\rho$ = new / old probability.

    With a negative advantage the loss is at most $-c A$ ($c$ = `dual_clip`, arXiv 1912.09729), so that one token whose
    probability grew by orders of magnitude does not rule the step.

    Args:
        log_ratio: Log-prob now (with gradient) minus log-prob when sampled.
        advantages: Without gradient.
        clip: $\epsilon$.
        dual_clip: $c$.

    >>> clipped_policy_loss(torch.zeros(2), torch.tensor([1.0, -2.0]), clip=0.2, dual_clip=3.0)
    tensor([-1.,  2.])
    """
    ratio = log_ratio.clamp(max=20.0).exp()  # far beyond both clips, and finite: 0 times inf would be a NaN gradient
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages)
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def _kl(log_p: Float[Tensor, "*b k"], log_q: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    """An entry with p = 0 counts 0; q = 0 counts as the smallest normal number, so that the sum stays finite."""
    smallest = math.log(torch.finfo(log_q.dtype).tiny)
    ratio = torch.where(log_p == -torch.inf, 0.0, log_p - log_q.masked_fill(log_q == -torch.inf, smallest))
    return (log_p.exp() * ratio).sum(-1)


def _log_softmax(logits: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
    """Rows without a finite entry stay as they are, where `log_softmax` would make them NaN."""
    nothing = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.masked_fill(nothing, 0.0).log_softmax(-1).masked_fill(logits == -torch.inf, -torch.inf)


def _with_tail(log_probs: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k1"]:
    """Append $\\log(1 - \\sum_S)$; rounding may make the sum exceed 1, so it stops short of it."""
    limit = 1 - torch.finfo(log_probs.dtype).eps
    inside = log_probs.exp().sum(-1, keepdim=True).clamp(max=limit)
    return torch.cat((log_probs, torch.log1p(-inside)), -1)
