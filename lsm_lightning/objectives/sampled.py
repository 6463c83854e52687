"""The baseline: reward each sampled token with the teacher's log-prob minus the student's (policy gradient)."""

import torch
from jaxtyping import Float
from torch import Tensor

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives.base import LEAST, Loss, Objective, Positions, refuse_null, student_metrics
from lsm_lightning.objectives.functional import clipped_policy_loss, returns_to_go
from lsm_lightning.objectives.head import OutputHead


class SampledToken(Objective):
    r"""Sampled-token on-policy distillation: $r_t = \log q(y_t) - \log \pi_{old}(y_t)$, the paper's "K=1" baseline.

    A token's advantage is the discounted sum of the rewards from it on, held constant, and the loss PPO's with both
    clips. Masked positions are as if they were not there: they pay nothing, and what lies behind them is discounted
    by the kept positions between only.

    $\pi_{old}$ is the student as it sampled: since a step makes one update from its own samples, the ratio of new and
    old probability leaves 1 only where sampling and training compute otherwise (another engine, bf16).

    Args:
        gamma: Discount of later rewards: 0 is token level (lowest variance), 1 is sequence level.
        clip: The probability ratio counts from 1 - clip to 1 + clip only (paper: 0.2).
        dual_clip: With a negative advantage, the ratio counts up to this only (paper: 3).
        reward_clip: Limits a token's reward to plus or minus this many nats; none leaves it alone, which spelling
            differences can turn into a huge penalty.
    """

    teacher_tokens = 0
    compares_sampled = True

    def __init__(
        self, gamma: float = 0.0, clip: float = 0.2, dual_clip: float = 3.0, reward_clip: float | None = None
    ) -> None:
        refuse_null("SampledToken", gamma=gamma, clip=clip, dual_clip=dual_clip)
        if not 0 <= gamma <= 1:
            raise ConfigurationError(f"SampledToken(gamma={gamma}): use a number from 0 (token) to 1 (sequence level).")
        if not 0 < clip < 1 or not dual_clip > 1:
            raise ConfigurationError(
                f"SampledToken(clip={clip}, dual_clip={dual_clip}): clip lies between 0 and 1, dual_clip above 1."
            )
        if reward_clip is not None and not reward_clip > 0:
            raise ConfigurationError(f"SampledToken(reward_clip={reward_clip}): use a positive number or null.")
        self.gamma = gamma
        self.clip = clip
        self.dual_clip = dual_clip
        self.reward_clip = reward_clip

    def __call__(self, head: OutputHead, positions: Positions) -> Loss:
        """The policy-gradient loss; `kl` is the sampled estimate of the reverse KL."""
        logits = head.logits(positions.hidden, positions.sampled.unsqueeze(-1)).squeeze(-1)
        log_probs = logits - head.log_normaliser(positions.hidden)
        sampler = positions.sampler_log_probs.to(log_probs.dtype)
        # A token that the teacher rules out is as bad as the smallest normal number, and the sum stays finite.
        rewards = positions.support.sampled.masked_fill(positions.support.sampled == -torch.inf, LEAST) - sampler
        limit = self.reward_clip if self.reward_clip is not None else torch.inf
        advantages = self._advantages(rewards.clamp(-limit, limit), positions)
        value = clipped_policy_loss(log_probs - sampler, advantages, clip=self.clip, dual_clip=self.dual_clip)
        ratio = (log_probs.detach() - sampler).exp()
        metrics = {
            "kl": -rewards,
            "reward_positive": (rewards > 0).float(),
            "ratio_clipped": ((ratio - 1).abs() > self.clip).float(),
        }
        return Loss(value=value, metrics=metrics | student_metrics(head, positions))

    def _advantages(self, rewards: Float[Tensor, " n"], positions: Positions) -> Float[Tensor, " n"]:
        if self.gamma == 0 or len(rewards) == 0:
            return rewards
        lengths = torch.bincount(positions.turn).tolist()
        padded = torch.nn.utils.rnn.pad_sequence(list(rewards.split(lengths)), batch_first=True)
        real = (
            torch.arange(padded.shape[1], device=padded.device) < torch.tensor(lengths, device=padded.device)[:, None]
        )
        return returns_to_go(padded, real, self.gamma)[real]
