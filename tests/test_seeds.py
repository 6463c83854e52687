import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from lsm_lightning.seeds import seed_of

keys = st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=5)


@given(keys)
def test_a_seed_fits_every_generator(key):
    assert 0 <= seed_of(*key) < 2**63


@given(keys, keys)
def test_other_keys_have_other_seeds(one, other):
    assert (seed_of(*one) == seed_of(*other)) == (one == other)


def test_neighbours_differ_in_about_half_the_bits():
    flipped = [bin(seed_of(0, step, 7) ^ seed_of(0, step + 1, 7)).count("1") for step in range(200)]
    assert 28 < sum(flipped) / len(flipped) < 35


def test_a_seed_is_the_same_in_every_process():
    code = "from lsm_lightning.seeds import seed_of; print(seed_of(3, 'test', 14))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(printed) == seed_of(3, "test", 14)
