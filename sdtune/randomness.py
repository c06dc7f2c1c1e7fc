"""Random numbers as a pure function of the seed and of what they are for."""

import numpy as np

# A stream of random numbers each: what is drawn from one leaves the others as they are.
SAMPLE = 0  # crop, flip, caption, timestep and noise of a sample, by epoch and index, or epoch, shard and row
ORDER = 1  # of an epoch
DROPOUT = 2  # layers, by step and process
SUBSET = 3  # the images that --max_train_samples leaves
HELD_OUT = 4  # the images that are not trained on
CLASS = 5  # order and noise of class images
ROUNDING = 6  # of weights in bfloat16, by step
SHARDS_ORDER = 7  # of the shards of a stream, by epoch
BUFFER = 8  # of rows that wait to be shuffled, by epoch, process and worker


def random_numbers(seed, stream, *place):
    """A generator of the numbers of a stream at a place, such as an epoch and an index: the same in every process,
    worker and run."""
    return np.random.default_rng((seed, stream, *place))
