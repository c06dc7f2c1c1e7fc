"""Numbers that are drawn at random depend on the seed, on what they are for, and on their place, on nothing else."""

import numpy as np
import pytest

from sdtune import randomness
from sdtune.randomness import random_numbers

STREAMS = {"SAMPLE": 0, "ORDER": 1, "DROPOUT": 2, "SUBSET": 3, "HELD_OUT": 4, "CLASS": 5, "ROUNDING": 6}
STREAMS |= {"SHARDS_ORDER": 7, "BUFFER": 8}


def test_streams_are_distinct_and_stay():
    """Other numbers would give the runs that are to be resumed other samples."""
    found = {name: value for name, value in vars(randomness).items() if name.isupper()}
    assert found == STREAMS
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("place", [(), (3,), (3, 17), (2, 100_000)])
def test_numbers_are_those_of_the_generator_of_seed_stream_and_place(place):
    for seed in (0, 7, 2**62):
        drawn = random_numbers(seed, randomness.CLASS, *place).random(5)
        assert np.array_equal(drawn, np.random.default_rng([seed, 5, *place]).random(5))
        assert np.array_equal(drawn, random_numbers(seed, randomness.CLASS, *place).random(5))
