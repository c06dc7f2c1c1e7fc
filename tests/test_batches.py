"""Every epoch sees every sample once, in an order that no number of processes and no interruption changes."""

import dataclasses
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from sdtune.batches import (
    StepCounts,
    batches_of_one_size,
    count_steps,
    find_largest_step,
    max_samples_per_step,
    micro_batches,
    number_buckets,
    step_sizes,
    steps_from,
)

LAYOUTS = [  # num_samples, batch_size, num_processes, accumulation
    (12, 4, 1, 1),
    (13, 4, 1, 3),
    (13, 2, 2, 2),
    (7, 2, 3, 1),
    (2, 2, 3, 2),  # more processes than samples
    (1, 1, 4, 1),
    (5, 16, 1, 1),  # a batch larger than the data
    (30, 4, 2, 2),
]
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def counts_of(num_samples, batch_size, num_processes, accumulation, last_step):
    """The counts of a run, by their definition."""
    per_pass = batch_size * num_processes
    per_step = per_pass * accumulation
    return StepCounts(
        num_images=num_samples,
        samples_per_pass=per_pass,
        samples_per_step=per_step,
        steps_per_epoch=-(-num_samples // per_step),
        last_step=last_step,
    )


def passes_of_rank(layout, rank, first_step, last_step, seed=0):
    """What one process gets: a list of (epoch, index, weight) for each pass."""
    _, _, num_processes, _ = layout
    return list(micro_batches(counts_of(*layout, last_step), num_processes, rank, seed, first_step))


def all_passes(layout, first_step, last_step, seed=0):
    """What every process gets: a list of passes, each with one list of (epoch, index, weight) per process."""
    _, _, num_processes, _ = layout
    ranks = [passes_of_rank(layout, rank, first_step, last_step, seed) for rank in range(num_processes)]
    assert len({len(rank) for rank in ranks}) == 1  # else some would wait forever for the others
    return list(zip(*ranks))


def real_samples(passes):
    """The (epoch, index) in global order, padding left out."""
    return [(epoch, index) for ranks in passes for rank in ranks for epoch, index, weight in rank if weight]


@every_layout
@pytest.mark.parametrize("max_train_steps, num_train_epochs", [(None, 3), (5, 100)])
def test_counts_follow_from_flags(layout, max_train_steps, num_train_epochs):
    num_samples, batch_size, num_processes, accumulation = layout
    args = SimpleNamespace(
        train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_train_steps=max_train_steps,
        num_train_epochs=num_train_epochs,
    )
    counts = count_steps(args, num_samples, num_processes)
    assert counts == counts_of(*layout, max_train_steps or 3 * counts.steps_per_epoch)


@every_layout
def test_every_epoch_sees_every_sample_exactly_once(layout):
    num_samples, batch_size, _, _ = layout
    steps_per_epoch = counts_of(*layout, None).steps_per_epoch
    passes = all_passes(layout, 0, 3 * steps_per_epoch)
    seen = Counter(real_samples(passes))
    assert seen == {(epoch, index): 1 for epoch in range(3) for index in range(num_samples)}
    assert [epoch for epoch, _ in real_samples(passes)] == sorted(epoch for epoch, _ in seen)
    assert all(1 <= len(rank) <= batch_size for ranks in passes for rank in ranks)


@every_layout
def test_weights_sum_to_1_over_the_processes_and_passes_of_a_step(layout):
    num_samples, batch_size, num_processes, accumulation = layout
    per_step = batch_size * num_processes * accumulation
    steps_per_epoch = -(-num_samples // per_step)
    for step in range(2 * steps_per_epoch):
        passes = all_passes(layout, step, step + 1)
        num_in_step = min(per_step, num_samples - step % steps_per_epoch * per_step)
        weights = [weight for ranks in passes for rank in ranks for _, _, weight in rank]
        assert sum(weights) == pytest.approx(1, abs=1e-12)
        assert {weight for weight in weights if weight} == {1 / num_in_step}  # a mean over its samples
        assert len(passes) == -(-num_in_step // (batch_size * num_processes))
        counts = counts_of(*layout, step + 1)
        assert list(step_sizes(counts, 0, step)) == [(num_in_step, len(passes))]


def test_order_is_the_same_for_any_number_of_processes():
    """12 samples a step in every case, over 25: the second step of an epoch is full, the third has one sample."""
    splits = [(12, 1, 1), (6, 2, 1), (4, 3, 1), (3, 2, 2), (1, 3, 4), (1, 1, 12)]
    orders = [real_samples(all_passes((25, *split), 0, 9, seed=3)) for split in splits]
    assert len(orders[0]) == 75
    assert all(order == orders[0] for order in orders)


@every_layout
def test_resume_goes_on_with_the_tail_of_the_full_sequence(layout):
    _, _, num_processes, _ = layout
    for rank in range(num_processes):
        full = [passes_of_rank(layout, rank, step, step + 1, seed=1) for step in range(9)]
        for first_step in range(9):
            tail = passes_of_rank(layout, rank, first_step, 9, seed=1)
            assert tail == [micro_batch for step in full[first_step:] for micro_batch in step]


def test_order_is_a_shuffle_by_seed_and_epoch():
    def epoch_order(seed, epoch):
        return [index for _, index in real_samples(all_passes((50, 50, 1, 1), epoch, epoch + 1, seed))]

    orders = {tuple(epoch_order(seed, epoch)) for seed in range(3) for epoch in range(4)} | {tuple(range(50))}
    assert len(orders) == 13
    assert epoch_order(0, 2) == epoch_order(0, 2)


def test_short_last_batch_is_kept_and_padding_weighs_nothing():
    passes = all_passes((7, 2, 2, 2), 0, 1)  # 8 a step: 4 in the first pass, 3 in the second
    assert [[len(rank) for rank in ranks] for ranks in passes] == [[2, 2], [2, 1]]
    passes = all_passes((5, 2, 2, 2), 0, 1)  # the second pass has one sample, the second process none
    assert [[len(rank) for rank in ranks] for ranks in passes] == [[2, 2], [1, 1]]
    assert [weight for _, _, weight in passes[1][1]] == [0.0]
    assert len(set(real_samples(passes))) == 5


# ------------------------------------------------------------------------------------------------------------- buckets

SHAPES = np.array([(512, 512), (448, 576), (576, 448), (640, 384), (256, 1024), (320, 768), (64, 64)])


def mix_of(generator):
    """The sizes of some images, of one to all shapes, few or many of each."""
    shapes = generator.permutation(SHAPES)[: generator.integers(1, len(SHAPES) + 1)]
    return generator.permutation(np.repeat(shapes, generator.integers(1, 12, len(shapes)), axis=0))


def counts_in_buckets(sizes, batch_size, num_processes, accumulation, num_epochs=2):
    """The counts of a run over images of these sizes."""
    args = SimpleNamespace(
        train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_train_steps=None,
        num_train_epochs=num_epochs,
    )
    return count_steps(args, len(sizes), num_processes, sizes)


def by_step(counts, num_processes, seed=0):
    """For each step its passes, each with one list of (epoch, index, weight) per process."""
    ranks = [list(micro_batches(counts, num_processes, rank, seed, 0)) for rank in range(num_processes)]
    assert len({len(rank) for rank in ranks}) == 1  # else some would wait forever for the others
    passes = list(zip(*ranks))
    sizes = list(step_sizes(counts, seed, 0))
    assert sum(num_passes for _, num_passes in sizes) == len(passes)
    return [[passes.pop(0) for _ in range(num_passes)] for _, num_passes in sizes]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_every_image_counts_once_an_epoch_in_random_mixes_of_buckets(num_processes):
    """Of 200 mixes: no pass has two shapes, all processes have as many passes, weights of a step sum to 1, a step is
    full or the last one of its bucket."""
    for number in range(200):
        generator = np.random.default_rng(number)
        sizes = mix_of(generator)
        batch_size, accumulation = generator.integers(1, 5, 2).tolist()
        counts = counts_in_buckets(sizes, batch_size, num_processes, accumulation)
        seen, lengths = Counter(), []
        for step, passes in enumerate(by_step(counts, num_processes, seed=number)):
            items = [item for ranks in passes for rank in ranks for item in rank]
            assert {epoch for epoch, _, _ in items} == {step // counts.steps_per_epoch}
            assert len(np.unique(sizes[[index for _, index, _ in items]], axis=0)) == 1  # padding too
            assert sum(weight for _, _, weight in items) == pytest.approx(1, abs=1e-12)
            real = [(epoch, index) for epoch, index, weight in items if weight]
            assert {weight for _, _, weight in items} <= {0.0, 1 / len(real)}
            assert all(1 <= len(rank) <= batch_size for ranks in passes for rank in ranks)
            seen.update(real)
            lengths.append(len(real))
        assert seen == {(epoch, index): 1 for epoch in range(2) for index in range(len(sizes))}
        per_step = batch_size * num_processes * accumulation
        _, in_buckets = np.unique(sizes, axis=0, return_counts=True)
        expected = []
        for in_bucket in in_buckets.tolist():
            expected += [per_step] * (in_bucket // per_step) + [in_bucket % per_step] * (in_bucket % per_step > 0)
        assert counts.steps_per_epoch == len(expected)
        assert sorted(lengths[: len(expected)]) == sorted(expected)
        assert sorted(lengths[len(expected) :]) == sorted(expected)


def test_steps_in_buckets_are_the_same_for_every_split():
    """12 images a step, in one pass or many, of one process or many."""
    splits = [(12, 1, 1), (6, 2, 1), (4, 1, 3), (3, 2, 2), (1, 3, 4), (1, 1, 12)]
    for number in range(20):
        sizes = mix_of(np.random.default_rng(number))
        orders = []
        for split in splits:
            steps = by_step(counts_in_buckets(sizes, *split), split[1], seed=3)
            orders.append([real_samples(passes) for passes in steps])
        assert all(order == orders[0] for order in orders)


def test_a_resume_in_buckets_goes_on_with_the_tail():
    sizes = mix_of(np.random.default_rng(5))
    counts = counts_in_buckets(sizes, 2, 1, 1)
    full = list(steps_from(counts, 1, 0))
    assert len(full) == 2 * counts.steps_per_epoch > 8
    for first_step in range(len(full) + 1):
        assert list(steps_from(counts, 1, first_step)) == full[first_step:]


def test_steps_of_buckets_are_mixed_anew_each_epoch():
    """Else a run would see all wide pictures in a row."""
    sizes = np.repeat(SHAPES[:2], 20, axis=0)
    counts = counts_in_buckets(sizes, 2, 1, 1, num_epochs=3)
    wide = [indices[0] < 20 for _, indices in steps_from(counts, 0, 0)]
    epochs = [wide[start : start + 20] for start in (0, 20, 40)]
    assert all(sum(epoch) == 10 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    changes = [sum(a != b for a, b in pairwise(epoch)) for epoch in epochs]
    assert min(changes) >= 4


@every_layout
def test_one_bucket_is_the_plain_permutation(layout):
    """By its definition, to the sample: with a size for each image or without sizes."""
    num_samples, batch_size, num_processes, accumulation = layout
    per_step = batch_size * num_processes * accumulation
    sizes = np.full((num_samples, 2), 512)
    assert number_buckets(sizes) is None
    counts = counts_in_buckets(sizes, batch_size, num_processes, accumulation)
    assert counts == counts_of(*layout, 2 * counts.steps_per_epoch)
    assert counts.buckets is None
    expected = []
    for epoch in range(2):
        order = np.random.default_rng((7, 1, epoch)).permutation(num_samples).tolist()
        expected += [(epoch, order[start : start + per_step]) for start in range(0, num_samples, per_step)]
    assert list(steps_from(counts, 7, 0)) == expected


def test_batches_of_held_out_images_are_of_one_size_each():
    sizes = np.array([(8, 8), (16, 8), (8, 8), (8, 16), (8, 8), (16, 8)])
    items = [(0, index, 1.0) for index in range(6)]
    batches = batches_of_one_size(items, sizes, 2)
    assert [[index for _, index, _ in batch] for batch in batches] == [[0, 2], [4], [1, 5], [3]]
    same = batches_of_one_size(items, np.full((6, 2), 8), 4)
    assert same == [items[:4], items[4:]]  # as a loader cuts them


@pytest.mark.parametrize(
    "num_images, batch_size, in_buckets, most",
    [(3, 4, None, 3), (4, 4, None, 4), (9, 4, None, 4), (None, 4, None, 4), (8, 6, [3, 5], 5), (8, 4, [3, 5], 4)],
)
def test_a_step_has_no_more_samples_than_there_are(num_images, batch_size, in_buckets, most):
    buckets = None if in_buckets is None else np.repeat([0, 1], in_buckets)
    assert max_samples_per_step(StepCounts(num_images, batch_size, batch_size, 1, 1, buckets)) == most


def test_the_largest_step_has_the_most_pixels():
    """Of 3 x 10 pixels x 100 and 5 x 40 x 100, in steps of 2: twice two of the large ones."""
    args = SimpleNamespace(train_batch_size=2, gradient_accumulation_steps=1, max_train_steps=None, num_train_epochs=2)
    sizes = np.array([[10, 100]] * 3 + [[40, 100]] * 5)
    counts = count_steps(args, 8, 1, sizes)
    for first_step in (0, 3):
        largest = find_largest_step(counts, 0, first_step)
        assert first_step <= largest < first_step + counts.steps_per_epoch
        _, samples = next(steps_from(counts, 0, largest))
        assert len(samples) == 2
        assert min(samples) >= 3
    assert find_largest_step(dataclasses.replace(counts, last_step=4), 0, 4) == 4  # none is left
