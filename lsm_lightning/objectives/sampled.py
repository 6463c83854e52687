"""The baseline: reward each sampled token with the teacher's log-prob minus the student's (policy gradient)."""

import torch
from jaxtyping import Float
from torch import Tensor

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives.base import Loss, Objective, Positions
from lsm_lightning.objectives.functional import returns_to_go
from lsm_lightning.objectives.head import OutputHead


class SampledToken(Objective):
    r"""Sampled-token on-policy distillation: $r_t = \log q(y_t) - \log \pi(y_t)$, the paper's "K=1" baseline.

    The loss is $-A_t \log \pi(y_t)$ with $A_t$ the discounted sum of the rewards that follow, held constant. A step
    makes one update from its own samples, so the policy ratio of PPO is 1 and its clipping has nothing to do.

    Args:
        gamma: Discount of later rewards: 0 is token level (lowest variance), 1 is sequence level.
        reward_clip: Limits a token's reward to plus or minus this many nats; none leaves it alone, which spelling
            differences can turn into a huge penalty.
    """

    support_size = 1

    def __init__(self, gamma: float = 0.0, reward_clip: float | None = None) -> None:
        if not 0 <= gamma <= 1:
            raise ConfigurationError(f"SampledToken(gamma={gamma}): use a number from 0 (token) to 1 (sequence level).")
        if reward_clip is not None and reward_clip <= 0:
            raise ConfigurationError(f"SampledToken(reward_clip={reward_clip}): use a positive number or null.")
        self.gamma = gamma
        self.reward_clip = reward_clip

    def __call__(self, head: OutputHead, positions: Positions) -> Loss:
        """The policy-gradient loss; `kl` is the sampled estimate of the reverse KL."""
        logits = head.logits(positions.hidden, positions.sampled.unsqueeze(-1)).squeeze(-1)
        log_probs = logits - head.log_normaliser(positions.hidden)
        rewards = (positions.support.sampled - log_probs).detach()
        limit = self.reward_clip if self.reward_clip is not None else torch.inf
        advantages = self._advantages(rewards.clamp(-limit, limit), positions)
        return Loss(value=-advantages * log_probs, metrics={"kl": -rewards, "reward_positive": (rewards > 0).float()})

    def _advantages(self, rewards: Float[Tensor, " n"], positions: Positions) -> Float[Tensor, " n"]:
        if self.gamma == 0 or len(rewards) == 0:
            return rewards
        lengths = torch.bincount(positions.turn).tolist()
        padded = torch.nn.utils.rnn.pad_sequence(list(rewards.split(lengths)), batch_first=True)
        real = (
            torch.arange(padded.shape[1], device=padded.device) < torch.tensor(lengths, device=padded.device)[:, None]
        )
        return returns_to_go(padded, real, self.gamma)[real]
