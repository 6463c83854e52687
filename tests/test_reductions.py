import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lsm_lightning.reductions import position_weights

REDUCTIONS = ["token_mean", "sequence_mean", "task_mean"]
TASKS = 3

turns_of_positions = st.lists(
    st.tuples(st.integers(0, TASKS - 1), st.lists(st.booleans(), max_size=5)), min_size=1, max_size=7
)
"""Per turn its task, and which of its positions count."""
Turns = list[tuple[int, list[bool]]]


def weights(reduction: str, turns: Turns, **options: object) -> Tensor:
    keep, turn, task = (
        torch.tensor(values, dtype=kind)
        for values, kind in (
            ([kept for _, keep in turns for kept in keep], torch.bool),
            ([number for number, (_, keep) in enumerate(turns) for _ in keep], torch.long),
            ([task for task, keep in turns for _ in keep], torch.long),
        )
    )
    return position_weights(reduction, keep, turn=turn, task=task, tasks=TASKS, **options)


def slow_mean(reduction: str, turns: Turns, losses: list[list[float]]) -> float:
    """The mean of the means of what counts alike."""
    groups: dict[int, list[float]] = {}
    for number, ((task, keep), of_turn) in enumerate(zip(turns, losses, strict=True)):
        group = {"token_mean": 0, "sequence_mean": number, "task_mean": task}[reduction]
        kept = [loss for loss, counts in zip(of_turn, keep, strict=True) if counts]
        groups.setdefault(group, []).extend(kept)
    means = [sum(values) / len(values) for values in groups.values() if values]
    return sum(means) / len(means) if means else 0.0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(turns=turns_of_positions)
def test_the_weighted_sum_is_the_mean_of_a_slow_loop(reduction, turns):
    losses = [[float(10 * number + place) for place in range(len(keep))] for number, (_, keep) in enumerate(turns)]
    flat = torch.tensor([loss for of_turn in losses for loss in of_turn], dtype=torch.float64)
    assert (weights(reduction, turns) @ flat).item() == pytest.approx(slow_mean(reduction, turns, losses))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(turns=turns_of_positions)
def test_weights_sum_to_one_and_are_zero_where_nothing_counts(reduction, turns):
    made = weights(reduction, turns)
    keep = torch.tensor([kept for _, keep in turns for kept in keep], dtype=torch.bool)
    assert made.isfinite().all()
    assert (made[~keep] == 0).all()
    assert (made[keep] > 0).all()
    assert made.sum().item() == pytest.approx(float(keep.any()))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, TASKS - 1))
def test_turns_of_equal_length_make_tokens_and_sequences_count_alike(length, number, task):
    turns = [(task, [True] * length)] * number
    assert_close(weights("token_mean", turns), weights("sequence_mean", turns))
    assert_close(weights("token_mean", turns), weights("task_mean", turns))


@given(turns=turns_of_positions, task=st.integers(0, TASKS - 1))
def test_in_a_step_of_one_task_the_mean_over_tasks_is_that_over_tokens(turns, task):
    """As in every step of a run."""
    of_one = [(task, keep) for _, keep in turns]
    assert_close(weights("task_mean", of_one), weights("token_mean", of_one))


def test_turns_of_other_lengths_do_not():
    turns = [(0, [True] * 4), (1, [True]), (1, [True, False])]
    token, sequence, task = (weights(reduction, turns).tolist() for reduction in REDUCTIONS)
    assert token == pytest.approx([1 / 6] * 6 + [0])
    assert sequence == pytest.approx([1 / 12] * 4 + [1 / 3, 1 / 3, 0])
    assert task == pytest.approx([1 / 8] * 4 + [1 / 4, 1 / 4, 0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(turns=turns_of_positions, cut=st.integers(0, 7))
def test_two_processes_give_the_weights_of_one(reduction, turns, cut):
    """Each has some of the turns; what they sum over is what both would have handed in."""
    parts = [turns[:cut], turns[cut:]]
    handed_in: list[Tensor] = []
    for part in parts:
        weights(reduction, part, total=lambda values: handed_in.append(values) or values)
    together = sum(handed_in)
    shares = [weights(reduction, part, total=lambda _: together) for part in parts]
    assert_close(torch.cat(shares), weights(reduction, turns))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_processes_that_do_not_sum_would_be_seen(reduction):
    turns = [(0, [True] * 4), (1, [True]), (1, [True, False])]
    alone = torch.cat([weights(reduction, part) for part in (turns[:1], turns[1:])])
    assert (alone - weights(reduction, turns)).abs().max() > 0.05


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_process_sums_once_even_without_positions(reduction):
    """They wait for each other."""
    for turns in ([], [(0, [])], [(0, [False])], [(0, [True])]):
        calls: list[Tensor] = []
        weights(reduction, turns, total=lambda values, calls=calls: calls.append(values) or values)
        assert len(calls) == 1
