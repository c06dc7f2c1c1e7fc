"""Every epoch sees every sample once, in an order that no number of processes and no interruption changes."""

from collections import Counter
from types import SimpleNamespace

import pytest

from sdtune.batches import StepCounts, count_steps, micro_batches, step_sizes

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
