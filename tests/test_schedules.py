import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.schedules import Alternating, Repeating

TASKS = ["math", "game", "chat"]


@given(st.integers(0, 10**6), st.integers(1, 3))
def test_alternating_gives_each_task_one_of_as_many_steps_in_order(first, n):
    tasks = TASKS[:n]
    found = [Alternating().task_of(step, tasks) for step in range(first * n, first * n + 2 * n)]
    assert found == tasks * 2


@given(st.lists(st.sampled_from(TASKS), min_size=1, max_size=6), st.integers(0, 10**6))
def test_repeating_follows_its_pattern_from_step_zero(pattern, round_):
    start = round_ * len(pattern)
    assert [Repeating(pattern).task_of(start + i, TASKS) for i in range(len(pattern))] == pattern


def test_an_empty_pattern_and_an_unknown_task_are_refused():
    with pytest.raises(ConfigurationError, match="pattern"):
        Repeating([])
    with pytest.raises(ConfigurationError, match="'poetry'; the tasks are math, game"):
        Repeating(["math", "poetry"]).check(TASKS)
