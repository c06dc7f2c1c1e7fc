"""The order of an epoch, and each process's share of a step."""

import dataclasses
import itertools
import math

import numpy as np

from sdtune.randomness import ORDER, random_numbers


@dataclasses.dataclass
class StepCounts:
    """How many samples and steps a run has."""

    num_images: int | None  # None, as of what depends on it, where images are a stream
    samples_per_pass: int  # over all processes
    samples_per_step: int
    steps_per_epoch: int | None
    last_step: int
    # (num_images,), the number of each image's bucket: a step is of one. None if all are in the same.
    buckets: np.ndarray | None = dataclasses.field(default=None, compare=False)
    pixels: np.ndarray | None = dataclasses.field(default=None, compare=False)  # (num_images,), where they are known


def count_steps(args, num_images, num_processes, sizes=None):
    """Counts the samples of a step and the steps of a run. With `sizes` (num_images, 2) images of one size are a
    bucket, whose last step in an epoch may be short."""
    samples_per_pass = args.train_batch_size * num_processes
    samples_per_step = samples_per_pass * args.gradient_accumulation_steps
    buckets = None if sizes is None else number_buckets(sizes)
    in_buckets = [num_images] if buckets is None else np.bincount(buckets).tolist()
    steps_per_epoch = sum(math.ceil(number / samples_per_step) for number in in_buckets)
    last_step = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    pixels = None if sizes is None else np.prod(sizes, axis=1)
    return StepCounts(num_images, samples_per_pass, samples_per_step, steps_per_epoch, last_step, buckets, pixels)


def count_stream_steps(args, num_processes):
    """Counts the samples of a step and the steps of a run whose images are a stream."""
    samples_per_pass = args.train_batch_size * num_processes
    samples_per_step = samples_per_pass * args.gradient_accumulation_steps
    return StepCounts(None, samples_per_pass, samples_per_step, None, args.max_train_steps)


def mean_samples_per_step(counts):
    """How many samples a step has in the mean."""
    if counts.num_images is None:
        return counts.samples_per_step
    return counts.num_images / counts.steps_per_epoch


def max_samples_per_step(counts):
    """How many samples a step has at most: of fewer images than it could take, all of them or of a bucket."""
    if counts.num_images is None:
        return counts.samples_per_step
    largest = counts.num_images if counts.buckets is None else int(np.bincount(counts.buckets).max())
    return min(counts.samples_per_step, largest)


def number_buckets(sizes):
    """The number of each image's bucket (num_images,), by the order of their `sizes` (num_images, 2); None if all are
    in the same."""
    shapes, numbers = np.unique(sizes, axis=0, return_inverse=True)
    return numbers.reshape(-1) if len(shapes) > 1 else None


def steps_of_epoch(counts, seed, epoch):
    """The indices of each step's images: a permutation by (seed, epoch), of each bucket cut into steps, the last of
    which may be short; the steps of several buckets are mixed."""
    draw = random_numbers(seed, ORDER, epoch)
    order = draw.permutation(counts.num_images)
    in_buckets = [order]
    if counts.buckets is not None:
        ends = np.cumsum(np.bincount(counts.buckets))
        in_buckets = np.split(order[np.argsort(counts.buckets[order], kind="stable")], ends[:-1])
    steps = []
    for indices in in_buckets:
        for start in range(0, len(indices), counts.samples_per_step):
            steps.append(indices[start : start + counts.samples_per_step])
    if counts.buckets is not None:
        steps = [steps[number] for number in draw.permutation(len(steps))]
    return steps


def steps_from(counts, seed, first_step):
    """Yields the epoch of each step from `first_step` on, and the list of its images' indices. They depend on the
    seed, the epoch and the samples of a step alone, not on how passes and processes share a step."""
    for step in range(first_step, counts.last_step):
        epoch, step_in_epoch = divmod(step, counts.steps_per_epoch)
        if step == first_step or step_in_epoch == 0:
            steps = steps_of_epoch(counts, seed, epoch)
        yield epoch, steps[step_in_epoch].tolist()


def step_sizes(counts, seed, first_step):
    """Yields of each step from `first_step` on how many samples and how many forward passes it has."""
    if counts.num_images is None:
        of_each = (counts.samples_per_step, counts.samples_per_step // counts.samples_per_pass)
        yield from itertools.repeat(of_each, counts.last_step - first_step)
        return
    for _, samples in steps_from(counts, seed, first_step):
        yield len(samples), math.ceil(len(samples) / counts.samples_per_pass)


def find_largest_step(counts, seed, first_step):
    """The step with the most pixels, the first of them, of as many as an epoch has from `first_step` on."""
    last_step = min(first_step + counts.steps_per_epoch, counts.last_step)
    steps = steps_from(dataclasses.replace(counts, last_step=last_step), seed, first_step)
    sizes = [int(counts.pixels[samples].sum()) for _, samples in steps]
    return first_step + max(range(len(sizes)), key=sizes.__getitem__, default=0)


def micro_batches(counts, num_processes, process_index, seed, first_step):
    """Yields this process's lists of (epoch, index, weight), one per pass of the steps from `first_step` on. The
    weights of a step sum to 1 over all processes and passes; a process without a sample in a pass gets one of weight
    0, of the same bucket."""
    per_pass = counts.samples_per_pass
    batch_size = per_pass // num_processes
    for epoch, samples in steps_from(counts, seed, first_step):
        for start in range(0, len(samples), per_pass):
            mine = samples[start + process_index * batch_size :][:batch_size]
            yield [(epoch, index, 1 / len(samples)) for index in mine] or [(epoch, samples[0], 0.0)]


def batches_of_one_size(items, sizes, batch_size):
    """Cuts a list of items into batches of one size each; `sizes` (num_items, 2) are those of their images."""
    by_size = {}
    for item, size in zip(items, sizes.tolist(), strict=True):
        by_size.setdefault(tuple(size), []).append(item)
    batches = []
    for group in by_size.values():
        batches += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    return batches
