"""The optimizer in JAX, its learning rate, and the step: gradient, clipping, update, average."""

import jax
import jax.numpy as jnp
import optax
import torch

from sdtune.optimization import make_schedule


def make_optimizer(args):
    """AdamW (arXiv 1711.05101) for a learning rate of 1: `train_step` has the step's."""
    return optax.chain(
        optax.scale_by_adam(args.adam_beta1, args.adam_beta2, args.adam_epsilon),
        optax.add_decayed_weights(args.adam_weight_decay),
    )


def learning_rate_of_step(args, learning_rate, last_step):
    """The learning rate as a function of the step, by diffusers' schedules."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)  # they want one, and are not told more
    factor = make_schedule(args, optimizer, last_step).lr_lambdas[0]
    return lambda step: learning_rate * factor(step)


def loss_and_gradient(training_loss, weights, batch):
    """The weighted sum of losses over the passes of a step (num_passes, images, ...), and its gradient."""

    def loss_of(weights, one_pass):
        return (training_loss(weights, one_pass) * one_pass["weight"]).sum()

    def add_pass(total, one_pass):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(weights, one_pass)), None

    if len(batch["weight"]) == 1:  # without a loop, in which XLA's convolutions are five times slower on a CPU
        return jax.value_and_grad(loss_of)(weights, {name: array[0] for name, array in batch.items()})
    nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
    total, _ = jax.lax.scan(add_pass, nothing, batch)
    return total


def train_step(state, batch, learning_rate, ema_decay, training_loss, optimizer, max_grad_norm):
    """One optimizer step over passes (num_passes, images, ...); `training_loss(weights, one_pass)` gives the loss of
    each sample. `state` has `unet` (weights), `optimizer` (moments) and maybe `ema` (weights).

    Returns the new state, or the old one if loss or gradient is not finite or no sample has weight, and [loss,
    gradient's norm, weight of all samples, the most that a host asks for].
    """
    # Forward and backward
    loss, grads = loss_and_gradient(training_loss, state["unet"], batch)
    grad_norm = optax.global_norm(grads)
    grads = jax.tree.map(lambda grad: grad * jnp.minimum(1, max_grad_norm / (grad_norm + 1e-6)), grads)

    # Optimizer step
    updates, moments = optimizer.update(grads, state["optimizer"], state["unet"])
    updates = jax.tree.map(lambda update: -learning_rate * update, updates)
    after = {"unet": optax.apply_updates(state["unet"], updates), "optimizer": moments}
    if "ema" in state:
        after["ema"] = optax.incremental_update(after["unet"], state["ema"], 1 - ema_decay)

    # Unless a loss or a gradient is not finite, or nothing of a stream could be used
    weight = batch["weight"].sum()
    is_useful = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (weight > 0)
    after = jax.tree.map(lambda new, old: jnp.where(is_useful, new, old), after, state)
    return after, jnp.stack([loss, grad_norm, weight, batch["asked"].max()])
