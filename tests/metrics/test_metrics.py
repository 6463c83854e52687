import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lsm_lightning.evaluation import wilson_interval
from lsm_lightning.metrics import SuccessRate, global_means

counted = st.tuples(st.floats(-50, 50), st.integers(0, 99))
rewards = st.lists(st.floats(0, 1, width=32), max_size=20)


@given(st.dictionaries(st.sampled_from("abcde"), st.tuples(st.floats(-50, 50), st.integers(1, 99))))
def test_means_are_sums_over_counts(sums):
    assert global_means(sums) == pytest.approx({name: total / count for name, (total, count) in sums.items()})


def test_what_nobody_counted_has_no_mean():
    assert global_means({"seen": (3.0, 2), "unseen": (0.0, 0)}) == {"seen": 1.5}


@given(st.dictionaries(st.sampled_from("abcde"), st.lists(counted, min_size=2, max_size=2)))
def test_means_of_two_processes_are_those_of_one(parts):
    """They sum once, whatever the number of names; a process with many counts more than one with few."""
    shares = [{name: part[process] for name, part in parts.items()} for process in (0, 1)]
    handed_in: list[Tensor] = []
    for share in shares:
        global_means(share, lambda values: handed_in.append(values.clone()) or values)
    together = sum(handed_in)
    assert len(handed_in) == 2
    whole = {name: (one[0] + other[0], one[1] + other[1]) for name, (one, other) in parts.items()}
    assert [global_means(share, lambda _: together) for share in shares] == [global_means(whole)] * 2


@given(st.lists(rewards, min_size=1, max_size=4))
def test_success_does_not_depend_on_how_rewards_are_split(parts):
    split, whole = SuccessRate(), SuccessRate()
    for part in parts:
        split.update(torch.tensor(part))
    whole.update(torch.tensor([reward for part in parts for reward in part]))
    for ours, theirs in zip(split.compute().values(), whole.compute().values(), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_success_comes_with_its_wilson_interval():
    rate = SuccessRate()
    rate.update(torch.tensor([1.0] * 8 + [0.0] * 2))
    score = {name: value.item() for name, value in rate.compute().items()}
    low, high = wilson_interval(8, 10)
    assert score == pytest.approx({"value": 0.8, "n": 10, "low": low, "high": high})


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric SuccessRate was called before")
def test_without_episodes_nothing_is_known():
    score = SuccessRate().compute()
    assert math.isnan(score["value"])
    assert (score["low"], score["high"], score["n"]) == (0, 1, 0)
