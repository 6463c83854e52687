import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsm_lightning.evaluation import wilson_interval

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def is_plausible(share: float, successes: int, n: int, z: float) -> bool:
    """Whether the score test, which Wilson inverted, accepts this share."""
    return abs(successes / n - share) <= z * math.sqrt(share * (1 - share) / n)


@given(counts, st.floats(0.5, 3))
def test_the_interval_holds_exactly_what_the_score_test_accepts(count, z):
    low, high = wilson_interval(*count, z)
    step = 1e-7
    for inside in (low + step, high - step):
        assert is_plausible(inside, *count, z)
    for outside in (low - step, high + step):
        assert not 0 <= outside <= 1 or not is_plausible(outside, *count, z)


@given(counts)
def test_the_interval_holds_the_share_and_stays_between_none_and_all(count):
    low, high = wilson_interval(*count)
    assert 0 <= low <= count[0] / count[1] + 1e-12
    assert count[0] / count[1] - 1e-12 <= high <= 1


@given(counts)
def test_success_and_failure_are_mirror_images(count):
    successes, n = count
    low, high = wilson_interval(successes, n)
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_more_of_the_same_narrows_the_interval():
    widths = [high - low for low, high in (wilson_interval(n * 0.3, n) for n in (10, 100, 1000, 10000))]
    assert widths == sorted(widths, reverse=True)
    assert widths[2] == pytest.approx(math.sqrt(10) * widths[3], rel=0.02)


@pytest.mark.parametrize(
    ("count", "known"), [((0, 10), (0.0, 0.2775)), ((10, 10), (0.7225, 1.0)), ((81, 263), (0.2553, 0.3662))]
)
def test_known_intervals(count, known):
    assert wilson_interval(*count) == pytest.approx(known, abs=1e-4)


def test_nothing_played_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)
