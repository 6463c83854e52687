"""What must not change the gradient of a step, each with a control that shows the check can fail."""

import dataclasses

import pytest
import torch
from reference import all_response_logits, joined, random_support, sampled_ids, turn_of
from tiny import random_ids
from torch import Tensor
from torch.testing import assert_close

from lsm_lightning import update as update_module
from lsm_lightning.batching import TokenBatch, spans
from lsm_lightning.objectives import LocalSupportMatching, Loss, Objective, SampledToken
from lsm_lightning.objectives.functional import support_divergence
from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.types import Prompt, Support, Turn
from lsm_lightning.update import StepTotals, accumulate_gradients, micro_batches

K = 8
OBJECTIVES = {
    "lsm": LocalSupportMatching(k=K),
    "tail": LocalSupportMatching(k=K, support="tail_bucket", divergence="jsd"),
    "sampled": SampledToken(gamma=0.5, reward_clip=5.0),
}
Step = tuple[StepTotals, list[Tensor]]


def some_keep(turns: list[Turn]) -> Tensor:
    """About two positions of three."""
    n = sum(len(turn.completion.ids) for turn in turns)
    return torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.65


def step(
    student, turns, support: Support, keep: Tensor, *, objective: Objective = OBJECTIVES["lsm"],
    max_tokens: int = 10**6, groups: list[list[int]] | None = None,
) -> Step:  # fmt: skip
    """What was summed up, and the gradient of every weight."""
    student.zero_grad()
    totals = accumulate_gradients(
        student, objective, turns, support, keep,
        groups=micro_batches(turns, max_tokens) if groups is None else groups,
        scale=1 / max(1, int(keep.sum())), backward=lambda loss: loss.backward(),
    )  # fmt: skip
    return totals, [parameter.grad.clone() for parameter in student.parameters()]


def assert_same(ours: Step, theirs: Step) -> None:
    assert ours[0].kept == theirs[0].kept
    assert ours[0].loss == pytest.approx(theirs[0].loss, rel=1e-9, abs=1e-12)
    assert ours[0].metrics == pytest.approx(theirs[0].metrics, rel=1e-9, abs=1e-12)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert_close(mine, other, rtol=1e-7, atol=1e-11)


class BatchMean(Objective):
    """A reduction in the wrong place: divides by the positions of its micro-batch."""

    support_size = K

    def __call__(self, head: OutputHead, positions) -> Loss:
        loss = OBJECTIVES["lsm"](head, positions)
        return Loss(value=loss.value / max(len(loss.value), 1))


# ---- against a reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support_kind", ["renormalise", "tail_bucket"])
def test_loss_and_gradient_are_those_of_one_turn_at_a_time_with_all_logits(student, turns, support_kind):
    support, keep = random_support(turns, K), some_keep(turns)
    ours = step(student, turns, support, keep, objective=LocalSupportMatching(k=K, support=support_kind), max_tokens=60)
    log_probs = all_response_logits(student, turns).log_softmax(-1).gather(1, support.ids)
    loss = support_divergence(log_probs, support.log_probs, support=support_kind)[keep]
    assert ours[0].loss == pytest.approx(loss.sum().item(), rel=1e-10)
    assert ours[0].kept == len(loss)
    for mine, other in zip(ours[1], torch.autograd.grad(loss.mean(), list(student.parameters())), strict=True):
        assert_close(mine, other, rtol=1e-7, atol=1e-11)


def test_the_sampled_tokens_step_is_that_of_one_turn_at_a_time(student, turns):
    support, keep = random_support(turns, 1), some_keep(turns)
    ours = step(student, turns, support, keep, objective=SampledToken(), max_tokens=60)
    log_probs = all_response_logits(student, turns).log_softmax(-1).gather(1, sampled_ids(turns)[:, None])[:, 0]
    loss = (-(support.sampled - log_probs).detach() * log_probs)[keep]
    for mine, other in zip(ours[1], torch.autograd.grad(loss.mean(), list(student.parameters())), strict=True):
        assert_close(mine, other, rtol=1e-7, atol=1e-11)


def test_the_reference_check_can_fail(student, turns, monkeypatch):
    """Hidden states one place too late are a plausible mistake, and visible."""
    right = TokenBatch.pad

    def shifted(*args):
        batch = right(*args)
        return dataclasses.replace(batch, column=(batch.column + 1).clamp(max=batch.ids.shape[1] - 1))

    monkeypatch.setattr(update_module.TokenBatch, "pad", shifted)
    with pytest.raises(AssertionError):
        test_loss_and_gradient_are_those_of_one_turn_at_a_time_with_all_logits(student, turns, "renormalise")


# ---- micro-batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 25, 40, 60, 100], ids="max_tokens={}".format)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_micro_batch_size_changes_nothing(student, turns, objective, max_tokens):
    case = student, turns, random_support(turns, objective.support_size), some_keep(turns)
    whole = step(*case, objective=objective)
    assert_same(step(*case, objective=objective, max_tokens=max_tokens), whole)


def test_the_micro_batch_check_can_fail(student, turns):
    with pytest.raises(AssertionError):
        test_micro_batch_size_changes_nothing(student, turns, BatchMean(), 25)


def test_micro_batches_differ_between_the_sizes_tested(turns):
    assert [len(micro_batches(turns, size)) for size in (1, 10**6)] == [len(turns), 1]
    assert 1 < len(micro_batches(turns, 60)) < len(turns)


def test_order_of_turns_changes_nothing(student, turns):
    support, keep = random_support(turns, K), some_keep(turns)
    places = spans([len(turn.completion.ids) for turn in turns])
    order = [3, 0, 5, 1, 4, 2]
    rows = torch.tensor([place for i in order for place in places[i]])
    shuffled = step(student, [turns[i] for i in order], support.rows(rows), keep[rows], max_tokens=60)
    assert_same(shuffled, step(student, turns, support, keep, max_tokens=60))


def test_the_order_check_can_fail(student, turns):
    """Turns that move without their supports are another step."""
    support, keep = random_support(turns, K), torch.ones(len(sampled_ids(turns)), dtype=torch.bool)
    with pytest.raises(AssertionError):
        assert_same(step(student, turns[::-1], support, keep), step(student, turns, support, keep))


# ---- padding and masks ----------------------------------------------------------------------------------------------


def with_a_long_turn(turns: list[Turn], support: Support, keep: Tensor, *, counts: bool) -> tuple:
    """The same step and a turn of 120 tokens, so that every other one is padded far."""
    long = turn_of(turns[0], random_ids(seed=8, length=120))
    added = random_support([long], K, seed=9)
    more = torch.full((120,), counts)
    return [*turns, long], joined([support, added]), torch.cat((keep, more))


def test_padding_and_a_turn_that_does_not_count_change_nothing(student, turns):
    case = turns, random_support(turns, K), some_keep(turns)
    assert_same(step(student, *with_a_long_turn(*case, counts=False)), step(student, *case))


def test_the_padding_check_can_fail(student, turns):
    case = turns, random_support(turns, K), some_keep(turns)
    with pytest.raises(AssertionError):
        assert_same(step(student, *with_a_long_turn(*case, counts=True)), step(student, *case))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_masked_position_may_hold_anything(student, turns, objective):
    support, keep = random_support(turns, objective.support_size), some_keep(turns)
    broken = Support(
        ids=support.ids.masked_fill(~keep[:, None], 7),
        log_probs=support.log_probs.masked_fill(~keep[:, None], -torch.inf),
        sampled=support.sampled.masked_fill(~keep, -torch.inf),
        turn_end=support.turn_end,
    )
    clean = step(student, turns, support, keep, objective=objective)
    assert_same(step(student, turns, broken, keep, objective=objective), clean)


def test_a_masked_end_is_as_if_the_turn_were_shorter(student, turns):
    """Nothing before a masked tail knows that it is there."""
    lengths = [len(turn.completion.ids) for turn in turns]
    cut = [max(1, length - 2) for length in lengths]
    support = random_support(turns, K)
    keep = torch.tensor([j < short for length, short in zip(lengths, cut, strict=True) for j in range(length)])
    shorter = [turn_of(turn, list(turn.completion.ids)[:short]) for turn, short in zip(turns, cut, strict=True)]
    masked = step(student, turns, support, keep, max_tokens=60)
    deleted = step(student, shorter, support.rows(keep.nonzero()[:, 0]), torch.ones(sum(cut), dtype=torch.bool))
    assert_same(masked, deleted)


def test_the_mask_check_can_fail(student, turns):
    support, keep = random_support(turns, K), some_keep(turns)
    with pytest.raises(AssertionError):
        assert_same(step(student, turns, support, keep), step(student, turns, support, torch.ones_like(keep)))


def test_prompt_tokens_are_conditions_and_no_targets(student, turns):
    """A turn whose prompt and answer are cut elsewhere is the same sequence with other positions to learn."""
    turn = turn_of(turns[1], random_ids(seed=5, length=10))
    later = Turn(
        prompt=Prompt(messages=turn.prompt.messages, ids=[*turn.prompt.ids, *turn.completion.ids[:4]]),
        completion=turn_of(turn, turn.completion.ids[4:]).completion,
        answer="",
    )
    support, last = random_support([turn], K), torch.arange(4, 10)
    only_last = step(student, [turn], support, torch.arange(10) >= 4)
    assert_same(step(student, [later], support.rows(last), torch.ones(6, dtype=torch.bool)), only_last)
    with pytest.raises(AssertionError):  # and the first four would have counted
        assert_same(only_last, step(student, [turn], support, torch.ones(10, dtype=torch.bool)))


# ---- nothing to learn from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_groups_without_turns_change_nothing(student, turns, objective):
    case = student, turns, random_support(turns, objective.support_size), some_keep(turns)
    groups = micro_batches(turns, 60)
    padded = step(*case, objective=objective, groups=[*groups, [], []])
    assert_same(padded, step(*case, objective=objective, groups=groups))


def test_every_group_runs_the_student_and_calls_backward_once(student, turns):
    """Processes with fewer micro-batches keep up with the others."""
    calls, runs = [], []
    handle = student.base_model.register_forward_hook(lambda *_: runs.append(1))
    accumulate_gradients(
        student, OBJECTIVES["lsm"], turns, random_support(turns, K), some_keep(turns),
        groups=[[0, 1], [], [2], []], scale=1.0, backward=lambda loss: calls.append(loss.item()),
    )  # fmt: skip
    handle.remove()
    assert len(calls) == len(runs) == 4
    assert calls[1] == calls[3] == 0 != calls[0]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_step_with_nothing_kept_has_a_zero_gradient(student, turns, objective):
    nothing = torch.zeros(len(sampled_ids(turns)), dtype=torch.bool)
    support = random_support(turns, objective.support_size)
    totals, gradients = step(student, turns, support, nothing, objective=objective, max_tokens=60)
    assert totals.kept == totals.loss == 0
    assert all(value == 0 for value in totals.metrics.values())
    assert all((gradient == 0).all() for gradient in gradients)


def test_scale_multiplies_the_gradient_and_not_what_is_reported(student, turns):
    case = turns, random_support(turns, K), some_keep(turns)
    once = step(student, *case)
    student.zero_grad()
    totals = accumulate_gradients(
        student, OBJECTIVES["lsm"], *case,
        groups=[list(range(len(turns)))], scale=2 / once[0].kept, backward=lambda loss: loss.backward(),
    )  # fmt: skip
    assert totals.loss == pytest.approx(once[0].loss)
    for mine, other in zip((p.grad for p in student.parameters()), once[1], strict=True):
        assert_close(mine, 2 * other)
