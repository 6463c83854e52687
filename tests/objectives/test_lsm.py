import pytest
import torch
from reference import all_response_logits, sampled_ids, top_support
from tiny import tiny_model
from torch import Tensor
from torch.testing import assert_close

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives import LocalSupportMatching, Positions
from lsm_lightning.objectives.functional import support_divergence
from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.types import Support

N, D, V, K = 8, 6, 30, 4
SUPPORTS = ["renormalise", "tail_bucket", "generalised"]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positions(hidden: Tensor, support: Support, sampled: Tensor | None = None) -> Positions:
    n = len(hidden)
    return Positions(
        hidden=hidden,
        sampled=torch.zeros(n, dtype=torch.long) if sampled is None else sampled,
        turn=torch.zeros(n, dtype=torch.long),
        support=support,
    )


def teacher_support(seed: int = 3, k: int = K) -> Support:
    return top_support(drawn(N, V, seed=seed) * 2, torch.zeros(N, dtype=torch.long), k)


def head_as_logits(n: int = N) -> tuple[OutputHead, Tensor]:
    """A head whose hidden states are the logits themselves, to read gradients in logit space."""
    return OutputHead(weight=torch.eye(V, dtype=torch.float64)), (drawn(n, V, seed=1) * 2).requires_grad_()


def test_k_of_one_is_refused_with_the_reason_and_the_remedy():
    with pytest.raises(ConfigurationError, match=r"k=1\).*always 0.*`SampledToken`"):
        LocalSupportMatching(k=1)
    assert LocalSupportMatching(k=2).support_size == 2


@pytest.mark.parametrize("support", [*SUPPORTS, "raw"])
def test_no_support_at_all_is_refused(support):
    with pytest.raises(ConfigurationError, match="k=0"):
        LocalSupportMatching(k=0, support=support)


def test_one_token_and_a_tail_are_a_comparison():
    head, hidden = head_as_logits()
    loss = LocalSupportMatching(k=1, support="tail_bucket")(head, positions(hidden, teacher_support(k=1)))
    assert (loss.value > 0).all()


def test_raw_sums_come_with_a_warning():
    with pytest.warns(UserWarning, match="collapses"):
        LocalSupportMatching(support="raw")


def test_temperature_needs_the_normaliser_to_cancel():
    with pytest.raises(ConfigurationError, match="only `renormalise`"):
        LocalSupportMatching(support="tail_bucket", temperature=2.0)
    with pytest.raises(ConfigurationError, match="temperature=0"):
        LocalSupportMatching(temperature=0.0)


def test_temperature_compares_both_sides_at_that_temperature():
    head, hidden = head_as_logits()
    support = teacher_support()
    loss = LocalSupportMatching(k=K, temperature=2.0)(head, positions(hidden, support))
    hot = [(x / 2).softmax(-1) for x in (hidden.gather(1, support.ids), support.log_probs)]
    assert_close(loss.value, (hot[0] * (hot[0] / hot[1]).log()).sum(-1))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_equals_the_divergence_of_true_log_probs(support, divergence):
    head = OutputHead(weight=drawn(V, D, seed=2))
    hidden, teacher = drawn(N, D, seed=1), teacher_support()
    student = (hidden @ head.weight.T).log_softmax(-1).gather(1, teacher.ids)
    loss = LocalSupportMatching(k=K, support=support, divergence=divergence)(head, positions(hidden, teacher))
    expected = support_divergence(student, teacher.log_probs, support=support, divergence=divergence)
    assert_close(loss.value, expected)
    assert_close(loss.metrics["kl"], expected)
    assert_close(loss.metrics["teacher_mass"], teacher.log_probs.exp().sum(-1))
    if support != "renormalise":
        assert_close(loss.metrics["student_mass"], student.exp().sum(-1))
    agreement = loss.metrics["top1_agreement"]
    assert_close(agreement.double(), (student.argmax(-1) == 0).double())


def test_metrics_carry_no_gradient():
    head, hidden = head_as_logits()
    loss = LocalSupportMatching(k=K, support="tail_bucket")(head, positions(hidden, teacher_support()))
    assert loss.value.requires_grad
    assert not any(metric.requires_grad for metric in loss.metrics.values())


def logit_gradient(support: str) -> tuple[Tensor, Tensor]:
    """The gradient inside the teacher's support and outside it."""
    head, hidden = head_as_logits()
    teacher = teacher_support()
    loss = LocalSupportMatching(k=K, support=support)(head, positions(hidden, teacher))
    (gradient,) = torch.autograd.grad(loss.value.sum(), hidden)
    inside = torch.zeros(N, V, dtype=torch.bool).scatter_(1, teacher.ids, value=True)
    return gradient[inside], gradient[~inside]


def test_nothing_outside_the_support_gets_a_gradient():
    inside, outside = logit_gradient("renormalise")
    assert (outside == 0).all()
    assert inside.abs().max() > 0.01


def test_with_a_tail_the_outside_does_get_one():
    _, outside = logit_gradient("tail_bucket")
    assert outside.abs().max() > 1e-4


def test_gradient_in_the_gathered_logits_is_the_papers():
    head, hidden = head_as_logits()
    teacher = teacher_support()
    loss = LocalSupportMatching(k=K)(head, positions(hidden, teacher))
    (gradient,) = torch.autograd.grad(loss.value.sum(), hidden)
    pi = hidden.gather(1, teacher.ids).softmax(-1)
    q = teacher.log_probs.softmax(-1)
    written = pi * ((pi / q).log() - loss.value[:, None])
    assert_close(gradient.gather(1, teacher.ids), written)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_student_that_is_its_own_teacher_stays(student, turns, support, divergence):
    largest, value = gradient_towards(student, student, turns, support, divergence)
    assert value.abs().max() < 1e-12
    assert largest < 1e-10


def test_a_student_that_is_not_moves(student, turns):
    largest, value = gradient_towards(student, tiny_model(seed=5).double(), turns, "renormalise", "reverse_kl")
    assert value.mean() > 0.1
    assert largest > 1e-3


def gradient_towards(student, teacher, turns, support, divergence):
    """The largest gradient of any weight, and the loss a position."""
    teacher_says = top_support(all_response_logits(teacher, turns), sampled_ids(turns), 8)
    hidden = torch.cat(
        [
            student.base_model(input_ids=torch.tensor([[*t.prompt.ids, *t.completion.ids]])).last_hidden_state[
                0, len(t.prompt.ids) - 1 : -1
            ]
            for t in turns
        ]
    )
    objective = LocalSupportMatching(k=8, support=support, divergence=divergence)
    loss = objective(OutputHead.of(student), positions(hidden, teacher_says))
    gradients = torch.autograd.grad(loss.value.sum(), list(student.parameters()))
    return max(gradient.abs().max().item() for gradient in gradients), loss.value.detach()
