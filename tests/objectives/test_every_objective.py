"""Laws of every objective at positions by themselves; `test_laws` has those of a whole step.

The head is the identity, so that hidden states are logits and gradients can be read in logit space.
"""

import dataclasses
import inspect
import itertools
import warnings

import pytest
import torch
from slow import positions, top_support
from torch import Tensor
from torch.testing import assert_close

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives import FullVocabulary, LocalSupportMatching, Loss, Objective, SampledToken
from lsm_lightning.objectives.functional import support_divergence
from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.types import Support

N, V, K = 6, 12, 4
SOURCES = ["teacher", "student", "union", "sampled_added"]
SUPPORTS = ["renormalise", "tail_bucket", "generalised", "raw"]
DIVERGENCES = ["reverse_kl", "forward_kl", "jsd"]


def matching(**settings: object) -> LocalSupportMatching:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raw warns
        return LocalSupportMatching(k=K, **settings)


MATCHING = {
    f"{source}-{support}-{divergence}": matching(source=source, support=support, divergence=divergence)
    for source, support, divergence in itertools.product(SOURCES, SUPPORTS, DIVERGENCES)
}
OTHERS = {
    **{f"full-{divergence}": FullVocabulary(divergence) for divergence in DIVERGENCES},
    **{f"sampled-gamma={gamma}": SampledToken(gamma=gamma) for gamma in (0.0, 0.5, 1.0)},
}
ALL = MATCHING | OTHERS
PROPER = {name: objective for name, objective in ALL.items() if "raw" not in name or "jsd" in name}
RENORMALISED = {name: objective for name, objective in MATCHING.items() if "renormalise" in name}


def each(objectives: dict[str, Objective]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("objective", objectives.values(), ids=objectives)


def drawn(seed: int, n: int = N) -> Tensor:
    return torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def sampled_of(logits: Tensor) -> Tensor:
    """Neither side's favourite throughout."""
    return torch.arange(len(logits)) % V


def teach(objective: Objective, student: Tensor, teacher: Tensor) -> Support:
    """The teacher's answer at the tokens that the objective asks for."""
    sampled = sampled_of(student)
    added = [sampled[:, None]] if objective.adds_sampled else []
    added.append(student.detach().topk(objective.student_tokens, -1).indices)
    k = V if objective.teacher_tokens is None else objective.teacher_tokens
    return top_support(teacher, sampled, k, torch.cat(added, -1))


def loss_of(
    objective: Objective, logits: Tensor, support: Support, bias: Tensor | None = None, sampler: Tensor | None = None
) -> Loss:
    """The loss of a student with these logits that sampled from them, or from others."""
    sampled = sampled_of(logits)
    # Near the student's own, so that no probability ratio is clipped.
    sampler = logits.detach() * 0.98 if sampler is None else sampler
    return objective(
        OutputHead(weight=torch.eye(V, dtype=logits.dtype), bias=bias),
        positions(
            logits,
            support,
            sampled=sampled,
            sampler_log_probs=sampler.log_softmax(-1).gather(1, sampled[:, None])[:, 0],
            turn=torch.arange(len(logits)) // 3,
        ),
    )


def gradient_of(objective: Objective, logits: Tensor, support: Support, **options: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each position, and its gradient."""
    logits = logits.clone().requires_grad_()
    value = loss_of(objective, logits, support, **options).value
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        *((LocalSupportMatching, name) for name in ("k", "source", "support", "divergence", "temperature")),
        *((SampledToken, name) for name in ("gamma", "clip", "dual_clip")),
        (FullVocabulary, "divergence"),
    ],
)
def test_null_is_refused_by_name(kind, setting):
    unchecked = inspect.unwrap(kind.__init__)  # as it runs where types are not checked
    with pytest.raises(ConfigurationError, match=rf"{kind.__name__}\({setting}=null\): give a value"):
        unchecked(kind.__new__(kind), **{setting: None})


def test_null_stays_what_it_is_where_it_has_a_meaning():
    assert SampledToken(reward_clip=None).reward_clip is None


# ---- at equality ----------------------------------------------------------------------------------------------------


@each(PROPER)
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(objective):
    student = drawn(1)
    value, gradient = gradient_of(objective, student, teach(objective, student, student), sampler=student)
    assert value.abs().max() < 1e-14
    assert gradient.abs().max() < 1e-14


@each(PROPER)
def test_a_student_unlike_its_teacher_has_both(objective):
    """The check above can fail."""
    value, gradient = gradient_of(objective, drawn(1), teach(objective, drawn(1), drawn(2)))
    assert value.abs().max() > 0.05
    assert gradient.abs().max() > 0.05


@each({name: objective for name, objective in ALL.items() if name not in PROPER})
def test_raw_sums_are_the_exception(objective):
    value, gradient = gradient_of(objective, drawn(1), teach(objective, drawn(1), drawn(1)))
    assert value.abs().max() < 1e-14
    assert gradient.abs().max() > 0.01


# ---- gradients ------------------------------------------------------------------------------------------------------


def finite_differences(objective: Objective, logits: Tensor, support: Support, **options: Tensor) -> Tensor:
    """Central differences, one logit at a time; positions do not depend on each other, for `sampler` stays."""
    step, slopes = 1e-6, torch.zeros_like(logits)
    for v in range(V):
        moved = torch.nn.functional.one_hot(torch.tensor(v), V) * step
        up, down = (loss_of(objective, logits + sign * moved, support, **options).value for sign in (1, -1))
        slopes[:, v] = (up - down) / (2 * step)
    return slopes


@each(ALL)
def test_the_gradient_equals_finite_differences(objective):
    support, sampler = teach(objective, drawn(1), drawn(2)), drawn(1) * 0.98
    _, gradient = gradient_of(objective, drawn(1), support, sampler=sampler)
    assert_close(gradient, finite_differences(objective, drawn(1), support, sampler=sampler), rtol=1e-5, atol=1e-7)


def written_out(objective: Objective, logits: Tensor, support: Support, sampler: Tensor) -> Tensor:
    r"""Gradient in the logits by hand: with $w_v = dL / d \log\pi_v$ it is $w - \pi \sum_v w_v$."""
    pi = logits.softmax(-1)
    weight = torch.zeros_like(pi)
    if isinstance(objective, SampledToken):
        sampled = sampled_of(logits)[:, None]
        log_pi, old = (x.log_softmax(-1).gather(1, sampled)[:, 0] for x in (logits, sampler))
        rewards = (support.sampled - old).tolist()
        returns = [
            sum(objective.gamma ** (j - i) * rewards[j] for j in range(i, len(rewards)) if i // 3 == j // 3)
            for i in range(len(rewards))
        ]
        advantages = torch.tensor(returns, dtype=pi.dtype)
        weight.scatter_(1, sampled, -(advantages * (log_pi - old).exp())[:, None])
        return weight - pi * weight.sum(-1, keepdim=True)
    member = support.log_probs > -torch.inf
    p, q = pi.gather(1, support.ids), support.log_probs.exp()
    ratio = (p / q).log().masked_fill(~member, 0.0)
    kind = getattr(objective, "support", "generalised")
    if kind == "renormalise":
        inside, of_teacher = (p * member).sum(-1, keepdim=True), q.sum(-1, keepdim=True)
        ratio = ratio - (inside / of_teacher).log()
        p = p / inside
        loss = (p * ratio * member).sum(-1, keepdim=True)
        part = p * (ratio - loss)
    elif kind == "tail_bucket":
        tails = [1 - (x * member).sum(-1, keepdim=True) for x in (p, q)]
        part = p * (ratio - (tails[0] / tails[1]).log())
    else:
        part = p * (ratio + (kind == "raw"))
    weight.scatter_add_(1, support.ids, part * member)
    return weight if kind == "renormalise" else weight - pi * weight.sum(-1, keepdim=True)


@each({name: objective for name, objective in ALL.items() if "forward_kl" not in name and "jsd" not in name})
def test_the_gradient_is_the_one_written_out(objective):
    """Of the paper's loss: $\\hat\\pi_v (\\log\\hat\\pi_v - \\log\\hat q_v - L)$, arXiv 2603.25562."""
    support, sampler = teach(objective, drawn(1), drawn(2)), drawn(1) * 0.98
    _, gradient = gradient_of(objective, drawn(1), support, sampler=sampler)
    assert_close(gradient, written_out(objective, drawn(1), support, sampler), rtol=1e-9, atol=1e-12)


def outside(objective: Objective) -> Tensor:
    """The gradient at the tokens that are no members of the support."""
    support = teach(objective, drawn(1), drawn(2))
    _, gradient = gradient_of(objective, drawn(1), support)
    member = torch.zeros_like(gradient, dtype=torch.bool)
    for row, (ids, log_probs) in enumerate(zip(support.ids, support.log_probs, strict=True)):
        member[row, ids[log_probs > -torch.inf]] = True
    assert gradient[member].abs().max() > 0.01
    return gradient[~member]


@each(RENORMALISED)
def test_nothing_outside_the_support_gets_a_gradient(objective):
    assert (outside(objective) == 0).all()


@each({name: o for name, o in MATCHING.items() if "tail_bucket" in name or "generalised" in name})
def test_with_a_normaliser_the_outside_does_get_one(objective):
    assert outside(objective).abs().max() > 1e-3


# ---- what all logits share ------------------------------------------------------------------------------------------


@each(ALL)
def test_adding_a_constant_changes_nothing(objective):
    """To all logits of a position, on either side."""
    up, down = (torch.linspace(-300, 300, N, dtype=torch.float64)[:, None] * sign for sign in (1, -1))
    support = teach(objective, drawn(1), drawn(2))
    shifted = gradient_of(objective, drawn(1) + up, teach(objective, drawn(1), drawn(2) + down), sampler=drawn(1))
    for ours, theirs in zip(shifted, gradient_of(objective, drawn(1), support, sampler=drawn(1)), strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@each(ALL)
def test_adding_it_to_half_of_them_changes_something(objective):
    half = torch.arange(V) % 2
    support = teach(objective, drawn(1), drawn(2))
    moved, _ = gradient_of(objective, drawn(1) + half, support, sampler=drawn(1))
    still, _ = gradient_of(objective, drawn(1), support, sampler=drawn(1))
    assert (moved - still).abs().max() > 0.01


# ---- what is told ---------------------------------------------------------------------------------------------------


@each(ALL)
def test_the_students_entropy_is_told_where_it_is_watched(objective):
    logits, watched = drawn(1), torch.arange(N) % 2 == 0
    told = objective(
        OutputHead(weight=torch.eye(V, dtype=logits.dtype)),
        positions(logits, teach(objective, logits, drawn(2)), sampled=sampled_of(logits), watched=watched),
    ).metrics["student_entropy"]
    assert_close(told, torch.distributions.Categorical(logits=logits).entropy()[watched])


# ---- odd inputs -----------------------------------------------------------------------------------------------------

ODD = ["ties", "impossible to the student", "impossible to the teacher", "no members", "certain", "far apart", "none"]


def odd_case(kind: str, objective: Objective) -> tuple[Tensor, Support, Tensor]:
    """Logits, what the teacher says, and a bias over the student's vocabulary."""
    student, teacher, bias = drawn(1), drawn(2), torch.zeros(V, dtype=torch.float64)
    if kind == "ties":
        student, teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    if kind == "impossible to the student":
        bias[1::2] = -torch.inf
    if kind == "impossible to the teacher":
        teacher[:, torch.arange(V) % 4 > 0] = -torch.inf  # so that fewer than K are left
    if kind == "certain":
        student, teacher = student * 1e3, teacher * 1e3
    if kind == "far apart":
        student, teacher = student * 1e15, -student * 1e15
    if kind == "none":
        student, teacher = student[:0], teacher[:0]
    support = teach(objective, student + bias, teacher)
    if kind == "no members":
        support.log_probs.fill_(-torch.inf)
        support.ids.zero_()
    return student, support, bias


@pytest.mark.parametrize("kind", ODD)
@each(ALL)
def test_odd_inputs_give_finite_losses_gradients_and_metrics(objective, kind):
    for dtype in (torch.float64, torch.float32):
        student, support, bias = odd_case(kind, objective)
        wide = {name: getattr(support, name).to(dtype) for name in ("log_probs", "sampled", "turn_end", "lost")}
        logits = student.to(dtype).requires_grad_()
        loss = loss_of(objective, logits, dataclasses.replace(support, **wide), bias.to(dtype))
        (gradient,) = torch.autograd.grad(loss.value.sum(), logits)
        assert loss.value.isfinite().all()
        assert gradient.isfinite().all()
        assert all(values.isfinite().all() for values in loss.metrics.values())
        assert not any(values.requires_grad for values in loss.metrics.values())


def test_the_odd_inputs_are_odd():
    """A plain sum of p (log p - log q) over the support is not finite for them."""
    for kind in ("impossible to the student", "impossible to the teacher", "no members"):
        student, support, bias = odd_case(kind, MATCHING["teacher-raw-reverse_kl"])
        log_pi = (student + bias).log_softmax(-1).gather(1, support.ids)
        assert not (log_pi.exp() * (log_pi - support.log_probs)).sum(-1).isfinite().any(), kind


@each(MATCHING)
def test_an_id_that_is_there_twice_is_two_members(objective):
    """Sources never ask for that (`Support`); if someone does, it counts as two tokens of that probability would.

    To a renormalised loss that is nothing new, the others grow by it.
    """
    once = teach(objective, drawn(1), drawn(2))
    twice = dataclasses.replace(once, ids=once.ids.repeat(1, 2), log_probs=once.log_probs.repeat(1, 2))
    value, gradient = gradient_of(objective, drawn(1), twice)
    logits = drawn(1).requires_grad_()
    two = support_divergence(
        logits.log_softmax(-1).gather(1, twice.ids),
        twice.log_probs,
        support=objective.support,
        divergence=objective.divergence,
    )
    assert_close(value, two.detach(), rtol=1e-9, atol=1e-12)
    assert_close(gradient, torch.autograd.grad(two.sum(), logits)[0], rtol=1e-9, atol=1e-12)
    of_one, _ = gradient_of(objective, drawn(1), once)
    if objective.support == "renormalise":
        assert_close(value, of_one, rtol=1e-9, atol=1e-12)
    else:
        assert (value - of_one).abs().max() > 0.01
    if objective.support in ("generalised", "raw"):
        assert_close(value, 2 * of_one, rtol=1e-9, atol=1e-12)
