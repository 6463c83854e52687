import dataclasses
import math

import pytest
import torch
from slow import positions, top_support
from torch import Tensor
from torch.testing import assert_close

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives import SampledToken
from lsm_lightning.objectives.head import OutputHead

LENGTHS = [3, 1, 4]
N, V = sum(LENGTHS), 12
CLIP, DUAL_CLIP = 0.2, 3.0


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """Three turns, without their masked positions; hidden states are the logits themselves.

    Args:
        masked: Positions that are left out.
        drift: By how much, in nats, the student's log-probs have moved since it sampled, at random.
    """

    def __init__(self, masked: tuple[int, ...] = (), drift: float = 1.5) -> None:
        kept = [i for i in range(N) if i not in masked]
        self.head = OutputHead(weight=torch.eye(V, dtype=torch.float64))
        self.hidden = (drawn(N, V, seed=1)[kept] * 2).requires_grad_()
        self.sampled = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))[kept]
        self.support = top_support(drawn(N, V, seed=3)[kept] * 2, self.sampled, 1)
        self.turn = [[turn for turn, length in enumerate(LENGTHS) for _ in range(length)][i] for i in kept]
        self.old = self.log_probs.detach() + drift * drawn(N, seed=6)[kept]
        self.positions = positions(
            self.hidden, self.support, sampled=self.sampled, sampler_log_probs=self.old,
            turn=torch.tensor(self.turn, dtype=torch.long),
        )  # fmt: skip

    @property
    def log_probs(self) -> Tensor:
        return self.hidden.log_softmax(-1).gather(1, self.sampled[:, None])[:, 0]

    @property
    def rewards(self) -> Tensor:
        return self.support.sampled - self.old

    def advantages(self, gamma: float, limit: float = math.inf) -> list[float]:
        """Written out: each turn by itself, one position at a time."""
        rewards = [max(-limit, min(limit, r)) for r in self.rewards.tolist()]
        return [
            sum(gamma ** (j - i) * rewards[j] for j in range(i, len(rewards)) if self.turn[j] == self.turn[i])
            for i in range(len(rewards))
        ]


def slow_ppo(case: Case, advantages: list[float]) -> tuple[list[float], Tensor]:
    """The loss of each position, and its gradient in the logits by hand, one position at a time."""
    losses, gradients = [], torch.zeros(len(advantages), V, dtype=torch.float64)
    for n, (new, old, advantage) in enumerate(zip(case.log_probs.tolist(), case.old.tolist(), advantages, strict=True)):
        ratio = math.exp(new - old)
        clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
        loss = -min(ratio * advantage, clipped * advantage)
        if advantage < 0:
            loss = min(loss, -DUAL_CLIP * advantage)
        losses.append(loss)
        if loss == -ratio * advantage:  # no clip acts
            one_hot = torch.nn.functional.one_hot(case.sampled[n], V).double()
            gradients[n] = loss * (one_hot - case.hidden[n].detach().softmax(-1))
    return losses, gradients


@pytest.mark.parametrize("masked", [(), (1, 3, 7), tuple(range(N))], ids=["all", "masked", "none left"])
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_loss_and_gradient_are_those_of_clipped_policy_gradient(gamma, limit, masked):
    case = Case(masked)
    loss = SampledToken(gamma=gamma, clip=CLIP, dual_clip=DUAL_CLIP, reward_clip=limit)(case.head, case.positions)
    (gradient,) = torch.autograd.grad(loss.value.sum(), case.hidden)
    losses, written = slow_ppo(case, case.advantages(gamma, limit or math.inf))
    assert_close(loss.value.detach(), torch.tensor(losses, dtype=torch.float64))
    assert_close(gradient, written)


def test_every_clip_acts_in_the_case_above():
    case = Case()
    ratios = (case.log_probs - case.old).exp().detach()
    rewards = case.rewards
    assert ((rewards > 0) & (ratios > 1 + CLIP)).any()
    assert ((rewards < 0) & (ratios < 1 - CLIP)).any()
    assert ((rewards < 0) & (ratios > DUAL_CLIP)).any()


def test_without_drift_the_gradient_is_the_plain_policy_gradient():
    case = Case(drift=0.0)
    (gradient,) = torch.autograd.grad(SampledToken()(case.head, case.positions).value.sum(), case.hidden)
    (plain,) = torch.autograd.grad((-case.rewards * case.log_probs).sum(), case.hidden)
    assert_close(gradient, plain)


def test_a_reward_clip_limits_a_huge_penalty():
    case = Case(drift=0.0)
    assert case.rewards.abs().max() > 2
    free = SampledToken()(case.head, case.positions).value
    limited = SampledToken(reward_clip=0.5)(case.head, case.positions).value
    assert free.abs().max() > 2
    assert limited.abs().max() <= 0.5 + 1e-12


def test_a_reward_pays_only_within_its_own_turn():
    case = Case(drift=0.0)
    advantages = -SampledToken(gamma=1.0)(case.head, case.positions).value.detach()
    assert_close(advantages[3], case.rewards[3])  # a turn of one token
    assert_close(advantages[2], case.rewards[2])  # the last of its turn
    assert_close(advantages[0], case.rewards[:3].sum())


def test_masked_positions_do_not_count_as_distance():
    """Other than in `returns_to_go`: they are left out before it is asked."""
    case = Case(masked=(1,), drift=0.0)
    advantages = -SampledToken(gamma=0.5)(case.head, case.positions).value.detach()
    first, last = case.rewards[:2]
    assert_close(advantages[0], first + 0.5 * last)


def test_what_is_told_is_the_sampled_estimate_unclipped_and_how_often_a_ratio_was():
    case = Case()
    metrics = SampledToken(clip=CLIP, reward_clip=0.1)(case.head, case.positions).metrics
    assert_close(metrics["kl"], -case.rewards)
    assert_close(metrics["reward_positive"], (case.rewards > 0).float())
    ratios = (case.log_probs - case.old).exp()
    assert_close(metrics["ratio_clipped"], ((ratios - 1).abs() > CLIP).float())


def test_a_token_that_the_teacher_rules_out_is_a_finite_penalty():
    case = Case(drift=0.0)
    impossible = dataclasses.replace(case.support, sampled=torch.full_like(case.support.sampled, -torch.inf))
    value = SampledToken()(case.head, dataclasses.replace(case.positions, support=impossible)).value
    assert value.isfinite().all()
    assert (value > 70).all()


def test_the_teacher_is_asked_for_no_token_but_the_sampled_one():
    assert SampledToken.teacher_tokens == SampledToken.student_tokens == 0
    assert SampledToken.compares_sampled


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": -0.1}, {"gamma": 1.1}, {"reward_clip": 0.0}, {"reward_clip": -1.0}, {"clip": 0.0}, {"clip": 1.0},
        {"dual_clip": 1.0}, {"dual_clip": math.nan}, {"reward_clip": math.nan},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name_and_value(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigurationError, match=f"{name}={value}"):
        SampledToken(**settings)
