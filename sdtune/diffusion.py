"""The diffusion step: encode images, add noise, compare the prediction with the target."""

import diffusers
import torch
import torch.nn.functional as F


@torch.no_grad()
def encode(vae, batch):
    """Draws the latents of images (batch, 4, height / 8, width / 8) in float32 from the VAE's posterior, or from that
    which a batch has in the place of pixels."""
    if "mean" in batch:
        mean, log_variance = batch["mean"], batch["log_variance"]
    else:
        mean, log_variance = encode_posterior(vae, batch["pixel_values"])
    return draw_latents(vae, mean, log_variance, batch["posterior_noise"])


def encode_posterior(vae, pixel_values):
    """The mean and the logarithm of the variance of the VAE's posterior, (batch, 4, height / 8, width / 8) each in
    float32, for images of 8 bits (batch, 3, height, width)."""
    pixel_values = pixel_values / 127.5 - 1  # [-1, 1], to be rounded once, by the VAE's precision
    posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
    return posterior.mean.float(), posterior.logvar.float()


def draw_latents(vae, mean, log_variance, posterior_noise):
    """Latents that a posterior gives for its noise, scaled as the UNet takes them."""
    std = torch.exp(0.5 * log_variance)
    return (mean + std * posterior_noise) * vae.config.scaling_factor


def encode_prompts(text_encoder, batch):
    """Embeddings of captions (batch, tokens, channels), or the cached ones that a batch has."""
    if "prompt_embeds" in batch:
        return batch["prompt_embeds"]
    return text_encoder(batch["input_ids"])[0]


def diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, batch, snr_gamma=None):
    """One diffusion step: the loss of each sample (batch,), the mean over its latents (arXiv 2006.11239, eq. 14).
    `batch` has `noise` and `added_noise`, of the shape of the latents, and `timestep` (batch,)."""
    noise, timesteps = batch["noise"], batch["timestep"]
    # Latents and noise are float32: add_noise works in their precision, and in bfloat16 the first timesteps would get
    # no noise at all.
    noisy_latents = noise_scheduler.add_noise(latents, batch["added_noise"], timesteps)
    predicts_noise = noise_scheduler.config.prediction_type == "epsilon"
    target = noise if predicts_noise else noise_scheduler.get_velocity(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, prompt_embeds).sample
    losses = F.mse_loss(model_pred.float(), target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is None:
        return losses
    snr = diffusers.training_utils.compute_snr(noise_scheduler, timesteps)
    return losses * min_snr_weights(snr, snr_gamma, predicts_noise)


def min_snr_weights(snr, snr_gamma, predicts_noise):
    """The weights of min-SNR (arXiv 2303.09556, section 3.4) for signal-to-noise ratios (batch,): min(snr, gamma) /
    snr where noise is predicted, min(snr, gamma) / (snr + 1) for v."""
    return snr.clamp(max=snr_gamma) / (snr if predicts_noise else snr + 1)
