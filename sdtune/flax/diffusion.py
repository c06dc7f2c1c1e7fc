"""The diffusion step in JAX: draw latents, add noise, compare the prediction with the target."""

import jax.numpy as jnp


def encode(batch, scaling_factor):
    """Latents (batch, 4, height / 8, width / 8) in float32, drawn from the VAE's posterior, whose `moments` the batch
    has: mean and log-variance, (batch, 2 x 4, height / 8, width / 8)."""
    mean, log_variance = jnp.split(batch["moments"], 2, axis=1)
    std = jnp.exp(0.5 * log_variance.clip(-30, 20))
    return (mean + std * batch["posterior_noise"]) * scaling_factor


def diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, batch, snr_gamma=None):
    """One diffusion step: the loss of each sample (batch,), the mean over its latents (arXiv 2006.11239, eq. 14).
    `batch` has `noise` and `added_noise`, of the shape of the latents, and `timestep` (batch,)."""
    noise, timesteps = batch["noise"], batch["timestep"]
    # Latents and noise are float32: in bfloat16 the first timesteps would get no noise at all.
    alphas = jnp.asarray(noise_scheduler.alphas_cumprod.numpy())[timesteps]
    signal_rate = jnp.sqrt(alphas)[:, None, None, None]
    noise_rate = jnp.sqrt(1 - alphas)[:, None, None, None]
    noisy_latents = signal_rate * latents + noise_rate * batch["added_noise"]
    predicts_noise = noise_scheduler.config.prediction_type == "epsilon"
    target = noise if predicts_noise else signal_rate * noise - noise_rate * latents
    model_pred = unet(noisy_latents, timesteps, prompt_embeds)
    losses = jnp.square(model_pred.astype(jnp.float32) - target).mean(axis=(1, 2, 3))
    if snr_gamma is None:
        return losses
    snr = alphas / (1 - alphas)
    return losses * min_snr_weights(snr, snr_gamma, predicts_noise)


def min_snr_weights(snr, snr_gamma, predicts_noise):
    """The weights of min-SNR (arXiv 2303.09556, section 3.4) for signal-to-noise ratios (batch,): min(snr, gamma) /
    snr where noise is predicted, min(snr, gamma) / (snr + 1) for v."""
    return jnp.minimum(snr, snr_gamma) / (snr if predicts_noise else snr + 1)
