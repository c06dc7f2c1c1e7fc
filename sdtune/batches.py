"""The order of an epoch, and each process's share of a step."""

import dataclasses
import math

from sdtune.randomness import ORDER, random_numbers


@dataclasses.dataclass
class StepCounts:
    """How many samples and steps a run has."""

    num_images: int
    samples_per_pass: int  # over all processes
    samples_per_step: int
    steps_per_epoch: int
    last_step: int


def count_steps(args, num_images, num_processes):
    """Counts the samples of a step and the steps of a run; the last step of an epoch may be short."""
    samples_per_pass = args.train_batch_size * num_processes
    samples_per_step = samples_per_pass * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(num_images / samples_per_step)
    last_step = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    return StepCounts(num_images, samples_per_pass, samples_per_step, steps_per_epoch, last_step)


def samples_in_step(counts, step):
    """How many samples a step has: fewer in the last one of an epoch."""
    taken = step % counts.steps_per_epoch * counts.samples_per_step
    return min(counts.samples_per_step, counts.num_images - taken)


def passes_in_step(counts, step):
    """How many forward passes a step has: fewer in the last one of an epoch."""
    return math.ceil(samples_in_step(counts, step) / counts.samples_per_pass)


def micro_batches(counts, num_processes, process_index, seed, first_step):
    """Yields this process's lists of (epoch, index, weight), one per pass of the steps from `first_step` on. An epoch
    is a permutation by (seed, epoch), cut into steps, the last of which may be short. The weights of a step sum to 1
    over all processes and passes; a process without a sample in a pass gets one of weight 0."""
    per_pass, per_step = counts.samples_per_pass, counts.samples_per_step
    batch_size = per_pass // num_processes
    for step in range(first_step, counts.last_step):
        epoch, step_in_epoch = divmod(step, counts.steps_per_epoch)
        if step == first_step or step_in_epoch == 0:
            order = random_numbers(seed, ORDER, epoch).permutation(counts.num_images).tolist()
        samples = order[step_in_epoch * per_step :][:per_step]
        for start in range(0, len(samples), per_pass):
            mine = samples[start + process_index * batch_size :][:batch_size]
            yield [(epoch, index, 1 / len(samples)) for index in mine] or [(epoch, samples[0], 0.0)]
