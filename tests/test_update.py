"""A step against a slow one, and what it promises to whoever calls it; `test_laws` has what must not change it."""

import dataclasses

import pytest
import torch
from slow import all_response_logits, even_weights, random_support, sampled_ids, tensor_sizes, turn_of
from tiny import random_ids, tiny_model
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from lsm_lightning import update as update_module
from lsm_lightning.batching import TokenBatch
from lsm_lightning.objectives import LocalSupportMatching, Objective, SampledToken
from lsm_lightning.objectives import head as head_module
from lsm_lightning.objectives.functional import clipped_policy_loss, support_divergence
from lsm_lightning.types import Support, Turn
from lsm_lightning.update import StepTotals, accumulate_gradients, micro_batches, student_top_tokens

K = 8
OBJECTIVES = {
    "lsm": LocalSupportMatching(k=K),
    "tail": LocalSupportMatching(k=K, support="tail_bucket", divergence="jsd"),
    "sampled": SampledToken(gamma=0.5, reward_clip=5.0),
}


def some_keep(turns: list[Turn]) -> Tensor:
    """About two positions of three."""
    return torch.rand(len(sampled_ids(turns)), generator=torch.Generator().manual_seed(1)) < 0.65


def step(
    student: PreTrainedModel, objective: Objective, turns: list[Turn], support: Support, weights: Tensor,
    **options: object,
) -> tuple[StepTotals, list[Tensor]]:  # fmt: skip
    """What was summed up, and the gradient of every weight."""
    student.zero_grad()
    totals = accumulate_gradients(
        student, objective, turns, support, weights,
        **{"groups": micro_batches(turns, 60), "backward": lambda loss: loss.backward(), **options},
    )  # fmt: skip
    return totals, [parameter.grad.clone() for parameter in student.parameters()]


def assert_gradients_of(loss: Tensor, student: PreTrainedModel, ours: list[Tensor]) -> None:
    for mine, other in zip(ours, torch.autograd.grad(loss, list(student.parameters())), strict=True):
        assert_close(mine, other, rtol=1e-7, atol=1e-11)


# ---- against a slow step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support_kind", ["renormalise", "tail_bucket"])
def test_loss_and_gradient_are_those_of_one_turn_at_a_time_with_all_logits(student, turns, support_kind):
    support, weights = random_support(turns, K), even_weights(some_keep(turns))
    totals, gradients = step(student, LocalSupportMatching(k=K, support=support_kind), turns, support, weights)
    log_probs = all_response_logits(student, turns).log_softmax(-1)
    values = support_divergence(log_probs.gather(1, support.ids), support.log_probs, support=support_kind)
    assert totals.loss == pytest.approx((values @ weights).item(), rel=1e-10)
    assert totals.kept == int((weights > 0).sum())
    total, count = totals.metrics["kl"]
    assert count == totals.kept
    assert total == pytest.approx(values[weights > 0].sum().item(), rel=1e-10)
    assert_gradients_of(values @ weights, student, gradients)


def test_weights_of_any_size_are_taken_as_they_are(student, turns):
    support = random_support(turns, K)
    weights = torch.rand(len(sampled_ids(turns)), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    totals, gradients = step(student, OBJECTIVES["lsm"], turns, support, weights)
    values = support_divergence(all_response_logits(student, turns).gather(1, support.ids), support.log_probs)
    assert totals.loss == pytest.approx((values @ weights).item(), rel=1e-10)
    assert_gradients_of(values @ weights, student, gradients)


def test_the_sampled_tokens_step_is_that_of_one_turn_at_a_time(student, turns):
    support, weights = random_support(turns, 1), even_weights(some_keep(turns))
    totals, gradients = step(student, SampledToken(), turns, support, weights)
    log_probs = all_response_logits(student, turns).log_softmax(-1).gather(1, sampled_ids(turns)[:, None])[:, 0]
    sampler = torch.tensor([value for turn in turns for value in turn.completion.log_probs]).double()
    values = clipped_policy_loss(log_probs - sampler, support.sampled - sampler, clip=0.2, dual_clip=3.0)
    assert totals.loss == pytest.approx((values @ weights).item(), rel=1e-10)
    assert_gradients_of(values @ weights, student, gradients)


def test_the_reference_check_can_fail(student, turns, monkeypatch):
    """Hidden states one place too late are a plausible mistake, and visible."""
    right = TokenBatch.pad

    def shifted(*args):
        batch = right(*args)
        return dataclasses.replace(batch, column=(batch.column + 1).clamp(max=batch.ids.shape[1] - 1))

    monkeypatch.setattr(update_module.TokenBatch, "pad", shifted)
    with pytest.raises(AssertionError):
        test_loss_and_gradient_are_those_of_one_turn_at_a_time_with_all_logits(student, turns, "renormalise")


# ---- the student's own top tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("elements", [1, 2000, 2**23], ids="elements={}".format)
def test_the_students_top_tokens_are_those_of_all_logits(student, turns, monkeypatch, packed, elements):
    monkeypatch.setattr(update_module, "NORMALISER_ELEMENTS", elements)
    groups = [*micro_batches(turns, 60, packed=packed), []]
    top = student_top_tokens(student, turns, K, groups=groups, packed=packed)
    assert top.tolist() == all_response_logits(student, turns).topk(K, -1).indices.tolist()
    assert not top.requires_grad


def test_the_students_top_tokens_follow_their_turns(student, turns):
    """The check above could fail: in another order they are others."""
    backwards = student_top_tokens(student, turns[::-1], K, groups=[list(range(len(turns)))])
    assert backwards.tolist() != all_response_logits(student, turns).topk(K, -1).indices.tolist()


# ---- micro-batches --------------------------------------------------------------------------------------------------


def test_micro_batches_differ_between_sizes(turns):
    assert [len(micro_batches(turns, size)) for size in (1, 10**6)] == [len(turns), 1]
    assert 1 < len(micro_batches(turns, 60)) < len(turns)
    assert len(micro_batches(turns, 60, packed=True)) <= len(micro_batches(turns, 60))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_groups_without_turns_change_nothing(student, turns, objective):
    case = student, objective, turns, random_support(turns, objective.teacher_tokens), even_weights(some_keep(turns))
    groups = micro_batches(turns, 60)
    padded, whole = step(*case, groups=[*groups, [], []]), step(*case, groups=groups)
    assert padded[0] == whole[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(padded[1], whole[1], strict=True))


def test_every_group_runs_the_student_and_calls_backward_once(student, turns):
    """Processes with fewer micro-batches keep up with the others."""
    calls, runs = [], []
    handle = student.base_model.register_forward_hook(lambda *_: runs.append(1))
    case = student, OBJECTIVES["lsm"], turns, random_support(turns, K), even_weights(some_keep(turns))
    groups = [[0, 1], [], [2], []]
    accumulate_gradients(*case, groups=groups, backward=lambda loss: calls.append(loss.item()))
    handle.remove()
    assert len(calls) == len(runs) == 4
    assert calls[1] == calls[3] == 0 != calls[0]


def test_scale_multiplies_the_gradient_and_not_what_is_reported(student, turns):
    case = student, OBJECTIVES["lsm"], turns, random_support(turns, K), even_weights(some_keep(turns))
    once, twice = step(*case), step(*case, scale=2.0)
    assert twice[0] == once[0]
    for mine, other in zip(twice[1], once[1], strict=True):
        assert_close(mine, 2 * other)


# ---- memory and measurements ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_logits_of_the_whole_vocabulary_are_never_made_for_all_positions(turns, monkeypatch, objective):
    vocabulary, limit = 5000, 40_000
    student = tiny_model(vocabulary=vocabulary, hidden_size=8, intermediate_size=8)
    long = [turn_of(turn, random_ids(seed=i, length=60)) for i, turn in enumerate(turns)]
    for name in ("GATHER_ELEMENTS", "NORMALISER_ELEMENTS"):
        monkeypatch.setattr(head_module, name, limit)
    monkeypatch.setattr(update_module, "NORMALISER_ELEMENTS", limit)
    case = student, objective, long, random_support(long, objective.teacher_tokens), torch.ones(len(sampled_ids(long)))
    groups = [list(range(len(long)))]
    with tensor_sizes() as sizes:
        step(*case, groups=groups)
        student_top_tokens(student, long, K, groups=groups)
    assert sizes.largest <= vocabulary * 8  # the embedding and its gradient
    with tensor_sizes() as sizes:
        student(input_ids=torch.tensor([random_ids(seed=0, length=60)]))
    assert sizes.largest == 60 * vocabulary  # the watch can see them


@pytest.mark.parametrize(("length", "looked_at"), [(100, 100), (256, 256), (600, 300), (2000, 286)])
def test_what_is_dear_to_measure_is_measured_at_a_bounded_number_of_positions(student, turns, length, looked_at):
    """At every nth position of a step, whatever its micro-batches."""
    parts = [turn_of(turns[0], random_ids(seed=i, length=50)) for i in range(length // 50)]
    parts += [turn_of(turns[0], random_ids(seed=9, length=length % 50))] * (length % 50 > 0)
    case = student, OBJECTIVES["lsm"], parts, random_support(parts, K), torch.ones(length)
    for groups in ([[i] for i in range(len(parts))], [list(range(len(parts)))]):
        totals = accumulate_gradients(*case, groups=groups, backward=lambda loss: None)
        assert totals.metrics["student_mass_outside"][1] == looked_at
        assert totals.metrics["kl"][1] == length
