import pytest
import torch
from reference import top_support
from torch import Tensor
from torch.testing import assert_close

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives import Positions, SampledToken
from lsm_lightning.objectives.head import OutputHead

LENGTHS = [3, 1, 4]
N, V = sum(LENGTHS), 12


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """Three turns, without their masked positions; hidden states are the logits themselves."""

    def __init__(self, masked: tuple[int, ...] = ()) -> None:
        kept = [i for i in range(N) if i not in masked]
        self.head = OutputHead(weight=torch.eye(V, dtype=torch.float64))
        self.hidden = (drawn(N, V, seed=1)[kept] * 2).requires_grad_()
        self.sampled = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))[kept]
        self.support = top_support(drawn(N, V, seed=3)[kept] * 2, self.sampled, 1)
        self.turn = [turn for turn, length in enumerate(LENGTHS) for _ in range(length)]
        self.turn = [self.turn[i] for i in kept]
        self.positions = Positions(
            hidden=self.hidden,
            sampled=self.sampled,
            turn=torch.tensor(self.turn, dtype=torch.long),
            support=self.support,
        )

    @property
    def log_probs(self) -> Tensor:
        return self.hidden.log_softmax(-1).gather(1, self.sampled[:, None])[:, 0]

    def advantages(self, gamma: float, clip: float = float("inf")) -> list[float]:
        """Written out: each turn by itself, one position at a time."""
        rewards = [max(-clip, min(clip, r)) for r in (self.support.sampled - self.log_probs).tolist()]
        return [
            sum(gamma ** (j - i) * rewards[j] for j in range(i, len(rewards)) if self.turn[j] == self.turn[i])
            for i in range(len(rewards))
        ]


@pytest.mark.parametrize("masked", [(), (1, 3, 7), tuple(range(N))], ids=["all", "masked", "none left"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_gradient_is_the_policy_gradient(gamma, clip, masked):
    case = Case(masked)
    loss = SampledToken(gamma=gamma, reward_clip=clip)(case.head, case.positions)
    (gradient,) = torch.autograd.grad(loss.value.sum(), case.hidden)
    one_hot = torch.nn.functional.one_hot(case.sampled, V).double()
    advantages = torch.tensor(case.advantages(gamma, clip or float("inf")), dtype=torch.float64)
    score = one_hot - case.hidden.softmax(-1)  # the gradient of log pi(y)
    written = -advantages[:, None] * score
    assert_close(gradient, written)


def test_clipping_limits_a_huge_penalty_and_can_change_the_gradient():
    case = Case()
    assert max(abs(a) for a in case.advantages(0.0)) > 2
    free = SampledToken()(case.head, case.positions).value
    clipped = SampledToken(reward_clip=0.5)(case.head, case.positions).value
    assert (clipped.abs() <= 0.5 * case.log_probs.abs() + 1e-12).all()
    assert not torch.allclose(free, clipped)


def test_a_reward_pays_only_within_its_own_turn():
    case = Case()
    advantages = (-SampledToken(gamma=1.0)(case.head, case.positions).value / case.log_probs).detach()
    rewards = (case.support.sampled - case.log_probs).detach()
    assert_close(advantages[3], rewards[3])  # a turn of one token
    assert_close(advantages[2], rewards[2])  # the last of its turn
    assert_close(advantages[0], rewards[:3].sum())


def test_kl_is_the_sampled_estimate_and_unclipped():
    case = Case()
    metrics = SampledToken(reward_clip=0.1)(case.head, case.positions).metrics
    assert_close(metrics["kl"], (case.log_probs - case.support.sampled).detach())
    assert_close(metrics["reward_positive"], (case.support.sampled > case.log_probs).float())


def test_a_student_like_its_teacher_is_neither_rewarded_nor_moved():
    case = Case()
    support = top_support(case.hidden, case.sampled, 1)
    same = Positions(hidden=case.hidden, sampled=case.sampled, turn=case.positions.turn, support=support)
    loss = SampledToken(gamma=1.0)(case.head, same)
    (gradient,) = torch.autograd.grad(loss.value.sum(), case.hidden)
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


@pytest.mark.parametrize("settings", [{"gamma": -0.1}, {"gamma": 1.1}, {"reward_clip": 0.0}, {"reward_clip": -1.0}])
def test_impossible_settings_are_refused_by_name_and_value(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigurationError, match=f"{name}={value}"):
        SampledToken(**settings)
