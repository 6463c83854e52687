import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lsm_lightning.objectives.functional import clipped_policy_loss, returns_to_go, support_divergence

SUPPORTS = ["renormalise", "tail_bucket", "generalised", "raw"]
DIVERGENCES = ["reverse_kl", "forward_kl", "jsd"]
ALL = list(itertools.product(SUPPORTS, DIVERGENCES))
PROPER = [(support, divergence) for support, divergence in ALL if support != "raw" or divergence == "jsd"]

logits = st.lists(st.floats(-20, 20), min_size=12, max_size=12)


def log_probs(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log_softmax(-1)


def random_log_probs(*shape: int, seed: int = 0, vocabulary: int = 12) -> Tensor:
    """The first entries of a distribution over more tokens than the support holds."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(*shape[:-1], vocabulary, generator=generator, dtype=torch.float64).mul(3).log_softmax(-1)
    return full[..., : shape[-1]]


def slow_divergence(student: list[float], teacher: list[float], support: str, divergence: str) -> float:
    """The same numbers from probabilities, one token at a time."""
    p, q = [math.exp(x) for x in student], [math.exp(x) for x in teacher]
    if support == "renormalise":
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    if support == "tail_bucket":
        p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
    if divergence == "forward_kl":
        p, q = q, p
    if divergence == "jsd":
        mixture = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return (slow_kl(p, mixture) + slow_kl(q, mixture)) / 2
    extra = sum(q) - sum(p) if support == "generalised" else 0.0
    return slow_kl(p, q) + extra


def slow_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize(("support", "divergence"), ALL)
def test_equals_a_slow_loop(support, divergence):
    student, teacher = random_log_probs(5, 4, seed=1), random_log_probs(5, 4, seed=2)
    slow = [
        slow_divergence(*rows, support, divergence) for rows in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    fast = support_divergence(student, teacher, support=support, divergence=divergence)
    assert_close(fast, torch.tensor(slow, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_raw_reverse_kl_is_least_at_a_student_of_mass_q_over_e():
    teacher = random_log_probs(4)
    student = (teacher - 1).requires_grad_()
    (gradient,) = torch.autograd.grad(support_divergence(student, teacher, support="raw"), student)
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("support", "divergence"), PROPER)
@given(logits, logits, st.integers(1, 12))
def test_never_negative(support, divergence, student, teacher, k):
    value = support_divergence(log_probs(student)[:k], log_probs(teacher)[:k], support=support, divergence=divergence)
    assert value >= -1e-12


def test_raw_sums_can_be_negative():
    teacher = random_log_probs(4)
    assert support_divergence(teacher - 1, teacher, support="raw") < 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@given(logits, logits, st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_renormalised_loss_ignores_what_all_logits_share(divergence, student, teacher, up, down):
    student, teacher = log_probs(student), log_probs(teacher)
    shifted = support_divergence(student + up, teacher + down, divergence=divergence)
    assert_close(shifted, support_divergence(student, teacher, divergence=divergence), rtol=1e-9, atol=1e-10)


def test_only_the_renormalised_loss_ignores_it():
    student, teacher = random_log_probs(4, seed=1), random_log_probs(4, seed=2)
    for support in ("tail_bucket", "generalised", "raw"):
        shifted = support_divergence(student - 1, teacher, support=support)
        assert not torch.isclose(shifted, support_divergence(student, teacher, support=support), rtol=1e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", ["tail_bucket", "generalised", "raw", "renormalise"])
def test_over_the_whole_vocabulary_all_are_the_divergence_itself(support, divergence):
    student, teacher = random_log_probs(5, 12, seed=1), random_log_probs(5, 12, seed=2)
    full = [slow_divergence(*rows, "raw", divergence) for rows in zip(student.tolist(), teacher.tolist(), strict=True)]
    value = support_divergence(student, teacher, support=support, divergence=divergence)
    assert_close(value, torch.tensor(full, dtype=torch.float64), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("support", "divergence"), ALL)
def test_half_precision_is_widened_not_computed_in(support, divergence):
    student, teacher = random_log_probs(50, 4, seed=1).bfloat16(), random_log_probs(50, 4, seed=2).bfloat16()
    value = support_divergence(student, teacher, support=support, divergence=divergence)
    exact = support_divergence(student.double(), teacher.double(), support=support, divergence=divergence)
    assert value.dtype == torch.float32
    assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


def far_apart(dtype: torch.dtype, support: str, divergence: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient where student or teacher is 120 nats below the other; bf16 holds every number."""
    student = torch.tensor([[0.0, 0.0], [0.0, -120.0], [0.0, -120.0]]).to(dtype).requires_grad_()
    teacher = torch.tensor([[0.0, -120.0], [0.0, 0.0], [-120.0, 0.0]]).to(dtype)
    value = support_divergence(student, teacher, support=support, divergence=divergence)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("support", "divergence"), [case for case in ALL if case[0] != "tail_bucket"])
def test_a_finite_log_prob_counts_as_it_is_however_small(support, divergence, dtype):
    """Other than with a tail, which here would hold nothing."""
    for ours, exact in zip(
        far_apart(dtype, support, divergence), far_apart(torch.float64, support, divergence), strict=True
    ):
        assert_close(ours.double(), exact, rtol=2**-8 if ours.dtype == torch.bfloat16 else 1e-6, atol=1e-30)


def test_120_nats_are_120_nats():
    assert far_apart(torch.float32, "renormalise", "reverse_kl")[0][0] == pytest.approx(60 - math.log(2))
    assert far_apart(torch.float32, "renormalise", "forward_kl")[1][1].tolist() == pytest.approx([0.5, -0.5])


def test_a_member_that_the_student_cannot_write_counts_as_the_smallest_normal_number():
    student, teacher = torch.tensor([0.0, -torch.inf]), torch.tensor([0.5, 0.5]).log()
    smallest = math.log(torch.finfo(torch.float32).tiny)
    value = support_divergence(student, teacher, divergence="forward_kl")
    assert value.item() == pytest.approx(-math.log(2) - smallest / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tail_below_epsilon_counts_as_epsilon(dtype):
    eps = torch.finfo(dtype).eps
    student = torch.tensor([1 - eps / 4], dtype=torch.float64).log().to(dtype).requires_grad_()
    teacher = torch.tensor([0.5], dtype=dtype).log()
    value = support_divergence(student, teacher, support="tail_bucket", divergence="forward_kl")
    assert value.item() == pytest.approx(-math.log(2) - math.log(eps) / 2)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.tolist() == pytest.approx([-0.5])  # the member's own share: the tail gives none


@pytest.mark.parametrize("support", SUPPORTS)
def test_rounding_the_inputs_to_bf16_moves_the_loss_by_that_rounding_only(support):
    """A log-prob moves by up to 2^-8 of itself, and the loss by its slope times that, to first order."""
    sides = [random_log_probs(50, 4, seed=seed).requires_grad_() for seed in (1, 2)]
    exact = support_divergence(*sides, support=support)
    slopes = torch.autograd.grad(exact.sum(), sides)
    allowed = 1.1 * sum((slope * side).abs().sum(-1) * 2**-8 for slope, side in zip(slopes, sides, strict=True))

    def moved(dtype: torch.dtype) -> Tensor:
        rounded = [side.detach().to(dtype).bfloat16() for side in sides]
        return (support_divergence(*rounded, support=support) - exact).abs().detach()

    assert (moved(torch.bfloat16) <= allowed + 1e-6).all()
    assert (moved(torch.float8_e4m3fn) > allowed).any()  # which keeps 4 bits in place of 8


@pytest.mark.parametrize(("support", "divergence"), ALL)
def test_a_token_that_neither_side_can_write_changes_nothing(support, divergence):
    student, teacher = random_log_probs(4, seed=1), random_log_probs(4, seed=2)
    impossible = torch.tensor([-torch.inf], dtype=torch.float64)
    padded = torch.cat((student, impossible)).requires_grad_()
    value = support_divergence(padded, torch.cat((teacher, impossible)), support=support, divergence=divergence)
    assert_close(value, support_divergence(student, teacher, support=support, divergence=divergence))
    (gradient,) = torch.autograd.grad(value, padded)
    assert gradient.isfinite().all()
    assert gradient[-1] == 0


def test_leading_axes_are_a_batch():
    student, teacher = random_log_probs(2, 3, 4, seed=1), random_log_probs(2, 3, 4, seed=2)
    one_by_one = [support_divergence(*rows) for rows in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True)]
    assert_close(support_divergence(student, teacher).flatten(), torch.stack(one_by_one))


def test_losses_and_gradients_in_half_precision_are_finite_far_out():
    """Where a softmax in bf16 or a log of 0 would not be."""
    student = torch.tensor([[3e4, -3e4, 0.0], [-torch.inf, 0.0, 0.0]], dtype=torch.bfloat16).requires_grad_()
    teacher = torch.tensor([[-3e4, 3e4, 0.0], [0.0, -torch.inf, -3e38]], dtype=torch.bfloat16)
    for divergence in DIVERGENCES:
        value = support_divergence(student, teacher, divergence=divergence)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


# ---- what the raw sums do to a student ------------------------------------------------------------------------------


def toy_training(support: str, divergence: str = "reverse_kl") -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities of the teacher's top tokens: the student's before and after descent, and the teacher's."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(12, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    logits = (teacher + torch.randn(12, generator=generator, dtype=torch.float64)).requires_grad_()
    ids = teacher.topk(4).indices
    before = logits.detach().softmax(-1)[ids]
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        student = logits.log_softmax(-1)[ids]
        support_divergence(student, teacher[ids], support=support, divergence=divergence).backward()
        optimizer.step()
    return before, logits.detach().softmax(-1)[ids], teacher[ids].exp()


def test_raw_sums_push_the_students_mass_down_to_the_teachers_over_e():
    before, after, teacher = toy_training("raw")
    assert_close(after, teacher / math.e, rtol=1e-2, atol=0)
    assert after.sum() < 0.6 * before.sum()


def test_raw_sums_forward_pull_all_of_it_into_the_support():
    """The divergence of the other direction does not collapse."""
    _, after, teacher = toy_training("raw", "forward_kl")
    assert_close(after / after.sum(), teacher / teacher.sum(), rtol=1e-2, atol=0)
    assert after.sum() > 0.98


def test_renormalised_ones_leave_it_where_it_was():
    before, after, teacher = toy_training("renormalise")
    assert_close(after / after.sum(), teacher / teacher.sum(), rtol=1e-3, atol=0)
    assert_close(after.sum(), before.sum(), rtol=0.1, atol=0)


@pytest.mark.parametrize("support", ["tail_bucket", "generalised"])
def test_with_a_tail_it_becomes_the_teachers(support):
    _, after, teacher = toy_training(support)
    assert_close(after, teacher, rtol=1e-2, atol=0)


# ---- clipped policy loss --------------------------------------------------------------------------------------------


def slow_policy_loss(log_ratio: float, advantage: float, clip: float, dual_clip: float) -> tuple[float, float]:
    """The loss and its slope in the log-ratio, case by case."""
    ratio = math.exp(log_ratio)
    if advantage >= 0:
        return (-ratio * advantage, -ratio * advantage) if ratio < 1 + clip else (-(1 + clip) * advantage, 0.0)
    if ratio < 1 - clip:
        return -(1 - clip) * advantage, 0.0
    return (-ratio * advantage, -ratio * advantage) if ratio < dual_clip else (-dual_clip * advantage, 0.0)


@given(st.floats(-12, 12), st.floats(-9, 9).filter(lambda a: abs(a) > 1e-3), st.floats(0.05, 0.9), st.floats(1.95, 9.0))
def test_the_policy_loss_and_its_slope_are_those_of_every_case_by_itself(log_ratio, advantage, clip, dual_clip):
    new = torch.tensor(log_ratio, dtype=torch.float64).requires_grad_()
    loss = clipped_policy_loss(new, torch.tensor(advantage, dtype=torch.float64), clip=clip, dual_clip=dual_clip)
    (slope,) = torch.autograd.grad(loss, new)
    assert (loss.item(), slope.item()) == pytest.approx(slow_policy_loss(log_ratio, advantage, clip, dual_clip))


@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("log_ratio", [-torch.inf, -1e4, 0.0, 1e4])
def test_the_policy_loss_and_its_slope_are_finite_at_any_ratio(log_ratio, advantage):
    new = torch.tensor(log_ratio).requires_grad_()
    loss = clipped_policy_loss(new, torch.tensor(advantage), clip=0.2, dual_clip=3.0)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, new)[0].isfinite()


# ---- returns --------------------------------------------------------------------------------------------------------

rewards_and_masks = st.integers(1, 8).flatmap(
    lambda t: st.tuples(
        st.lists(st.lists(st.floats(-5, 5), min_size=t, max_size=t), min_size=1, max_size=3),
        st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=3, max_size=3),
    )
)


def slow_returns(rewards: list[float], mask: list[bool], gamma: float) -> list[float]:
    return [
        sum(gamma ** (later - t) * rewards[later] for later in range(t, len(rewards)) if mask[later])
        for t in range(len(rewards))
    ]


@given(rewards_and_masks, st.sampled_from([0.0, 0.25, 0.9, 1.0]))
def test_returns_equal_a_double_loop(case, gamma):
    rewards, masks = case
    masks = masks[: len(rewards)]
    slow = [slow_returns(row, mask, gamma) for row, mask in zip(rewards, masks, strict=True)]
    fast = returns_to_go(torch.tensor(rewards, dtype=torch.float64), torch.tensor(masks), gamma)
    assert_close(fast, torch.tensor(slow, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)], ids=str)
def test_no_rewards_have_no_returns(shape, gamma):
    assert returns_to_go(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), gamma).shape == shape


def test_a_masked_position_keeps_its_distance():
    paid = returns_to_go(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, False, True]]), 0.5)
    assert paid.tolist() == [[2.0, 2.0, 4.0]]


def test_gamma_zero_is_the_reward_itself_and_gamma_one_all_that_follows():
    rewards, everywhere = torch.tensor([[1.0, -2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert returns_to_go(rewards, everywhere, 0.0).tolist() == [[1.0, -2.0, 4.0]]
    assert returns_to_go(rewards, everywhere, 1.0).tolist() == [[3.0, 2.0, 4.0]]


def test_what_stands_at_a_masked_position_is_never_looked_at():
    mask = torch.tensor([[True, False, True]])
    for gamma in (0.0, 0.5, 1.0):
        paid = returns_to_go(torch.tensor([[1.0, 2.0, 4.0]]), mask, gamma)
        broken = returns_to_go(torch.tensor([[1.0, torch.nan, 4.0]]), mask, gamma)
        assert_close(paid, broken)
