"""Look at a run in JAX: samples by PyTorch's pipeline, the loss on images not trained on."""

import functools

import jax
import numpy as np
import torch
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from sdtune.flax.encoding import look_up, stack
from sdtune.flax.weights import copy_weights, result_weights
from sdtune.validation import HELD_OUT_TIMESTEPS, LookGivenUp, draw_samples, log_held_out_losses, show_samples


def make_measure(losses, mesh, encoded, batch_size):
    """`held_out_losses` of the images of `encoded` as a function of weights and of whether to stop; `losses(weights,
    batch)` gives the loss of each sample of a batch, which all devices share."""
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    program = jax.jit(losses, out_shardings=everywhere)  # every host gets all of them
    return functools.partial(held_out_losses, program, split, encoded, batch_size)


def held_out_losses(program, split, encoded, batch_size, weights, is_asked):
    """The unweighted loss of every held-out image (num_images,), a mean over timesteps spread evenly; noise and
    timesteps are the same in every call and run. `split` is how the batches of `program` lie on the devices. Raises
    `LookGivenUp` if `is_asked()`, which is called before each batch, says yes on some host."""
    images, losses = encoded.samples, []
    pairs = [(part, index, 1.0) for index in range(len(images)) for part in range(HELD_OUT_TIMESTEPS)]
    for start in range(0, len(pairs), batch_size):
        if on_some_host(is_asked()):
            raise LookGivenUp
        samples = [images[pair] for pair in pairs[start : start + batch_size]]
        batch = stack(samples)
        # The part, which stands in the place of the epoch, moves a timestep into its quarter of them all.
        batch["timestep"] = (batch["timestep"] + batch["epoch"] * images.num_timesteps) // HELD_OUT_TIMESTEPS
        padded = look_up(encoded, batch, batch_size)
        arrays = {
            name: jax.make_array_from_callback(array.shape, split, array.__getitem__) for name, array in padded.items()
        }
        losses += np.asarray(program(weights, arrays))[: len(samples)].tolist()
    return np.reshape(losses, (len(images), HELD_OUT_TIMESTEPS)).mean(axis=1)


def on_some_host(condition):
    """Whether a condition holds on some host; all of them have to ask together."""
    return bool(multihost_utils.process_allgather(np.array(condition)).any())


def validate(args, accelerator, run, pipeline, noise_scheduler, measure, prompts, is_asked):
    """Draws samples, on the first host, and measures the held-out loss, under the averaged weights if there are any.
    `measure(weights, is_asked)` gives the held-out losses, which takes all hosts; it is None if there are no such
    images. `is_asked()`, and what is returned, are as in PyTorch."""
    weights, is_first = result_weights(run), jax.process_index() == 0
    losses, images, is_stopped = None, None, False
    try:
        if measure:
            losses = torch.from_numpy(measure(weights, is_asked))
        if prompts and is_first:
            copy_weights(weights, pipeline.unet)
            parts = {**pipeline.components, "scheduler": noise_scheduler}
            images = draw_samples(args, accelerator, parts, prompts, is_asked)
    except LookGivenUp:
        is_stopped = True
    if on_some_host(is_stopped):  # which the others know of the measuring, and not of the drawing
        raise LookGivenUp
    if losses is not None and is_first:
        log_held_out_losses(accelerator, run, losses)
    if images:
        show_samples(accelerator, run, images)
    return None if losses is None else losses.mean().item()
