"""The diffusion step against closed forms, computed here in float64 and without the libraries that it uses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from closed_forms import alphas_cumprod, hand_computed, min_snr_weights
from diffusers import StableDiffusionPipeline
from stubs import SHAPE, StubUNet, StubVAE, make_scheduler

from sdtune.diffusion import diffusion_losses, encode


def drawn(noise, timesteps, added_noise=None):
    """What `diffusion_losses` takes of a batch: the noise to predict, the noise to add, and timesteps."""
    return {"noise": noise, "added_noise": noise if added_noise is None else added_noise, "timestep": timesteps}


@pytest.mark.parametrize("snr_gamma", [None, 5.0, 0.5])
@pytest.mark.parametrize(  # epsilon at zero terminal SNR is refused by the script
    "prediction_type, rescaled", [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_losses_equal_those_computed_by_hand(prediction_type, rescaled, snr_gamma):
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.tensor([0, 1, 100, 500, 750, 999])
    latents, noise, answer = (torch.randn(6, *SHAPE, generator=generator) for _ in range(3))
    scheduler = make_scheduler(prediction_type=prediction_type, rescale_betas_zero_snr=rescaled)
    batch = drawn(noise, timesteps)
    losses = diffusion_losses(StubUNet(answer), scheduler, latents, torch.zeros(6, 1), batch, snr_gamma)
    expected = hand_computed(prediction_type, answer, latents, noise, timesteps, rescaled)
    if snr_gamma is not None:
        expected *= min_snr_weights(prediction_type, timesteps.numpy(), snr_gamma, rescaled)
    assert losses.shape == (6,)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_perfect_prediction_costs_nothing_and_perturbation_stays_out_of_the_target(prediction_type):
    generator = torch.Generator().manual_seed(1)
    timesteps = torch.tensor([3, 300, 900])
    latents, noise, extra = (torch.randn(3, *SHAPE, generator=generator) for _ in range(3))
    alphas = torch.from_numpy(alphas_cumprod()[timesteps])[:, None, None, None]
    velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    unet = StubUNet(noise if prediction_type == "epsilon" else velocity.float())
    scheduler, added_noise = make_scheduler(prediction_type=prediction_type), noise + 0.1 * extra
    embeds = torch.arange(3.0)
    losses = diffusion_losses(unet, scheduler, latents, embeds, drawn(noise, timesteps, added_noise))
    assert losses.max() < 1e-9
    ((noisy_latents, seen_timesteps, seen_embeds),) = unet.calls
    expected = alphas.sqrt() * latents + (1 - alphas).sqrt() * added_noise
    torch.testing.assert_close(noisy_latents, expected.float(), rtol=0, atol=1e-5)
    assert torch.equal(seen_timesteps, timesteps)
    assert torch.equal(seen_embeds, embeds)


def snr_weights(scheduler, timesteps, gamma):
    """The losses of a UNet that is off by 1 everywhere."""
    zeros = torch.zeros(len(timesteps), *SHAPE)
    return diffusion_losses(StubUNet(1.0), scheduler, zeros, None, drawn(zeros, timesteps), gamma)


def test_weights_of_min_snr_at_every_timestep():
    timesteps = torch.arange(1000)
    for prediction_type in ("epsilon", "v_prediction"):
        weights = snr_weights(make_scheduler(prediction_type=prediction_type), timesteps, 5.0)
        expected = min_snr_weights(prediction_type, timesteps.numpy(), 5.0)
        np.testing.assert_allclose(weights.numpy(), expected, rtol=2e-4)
    # Values that can be read off the formulas: above gamma the epsilon weight is gamma / snr, below it is 1.
    snr = alphas_cumprod() / (1 - alphas_cumprod())
    epsilon = snr_weights(make_scheduler(), timesteps, 5.0).numpy()
    assert (epsilon[snr < 4.99] == 1).all()
    np.testing.assert_allclose(epsilon[snr > 5] * snr[snr > 5], 5, rtol=2e-4)


def test_snr_is_that_of_the_rescaled_schedule():
    scheduler = make_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    timesteps = torch.arange(1000)
    weights = snr_weights(scheduler, timesteps, 5.0).numpy()
    np.testing.assert_allclose(weights, min_snr_weights("v_prediction", timesteps, 5.0, True), rtol=1e-3, atol=1e-6)
    plain = min_snr_weights("v_prediction", timesteps, 5.0)
    assert np.abs(weights - plain).max() > 0.004  # else the test could not tell the two apart
    assert weights[-1] == 0  # pure noise: snr = 0


def test_noise_is_added_in_float32_under_bfloat16():
    """bfloat16 has 8 bits: sqrt(alphas_cumprod[0]) = 0.99957 would round to 1 and sqrt(1 - 1) add no noise."""
    unet, timesteps = StubUNet(), torch.zeros(2, dtype=torch.int64)
    generator = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(2, *SHAPE, generator=generator) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        diffusion_losses(unet, make_scheduler(), latents, torch.zeros(2, 1), drawn(noise, timesteps))
    noisy_latents = unet.calls[0][0]
    assert noisy_latents.dtype == torch.float32
    added = (noisy_latents.double() - (1 - 0.00085) ** 0.5 * latents.double()) / 0.00085**0.5
    torch.testing.assert_close(added, noise.double(), rtol=0, atol=1e-3)


def test_bfloat16_predictions_are_compared_in_float32():
    def unet(*_):
        return SimpleNamespace(sample=torch.zeros(1, *SHAPE, dtype=torch.bfloat16))

    noise = torch.full((1, *SHAPE), 1 + 2**-10)  # rounds to 1 in bfloat16
    losses = diffusion_losses(unet, make_scheduler(), noise, noise, drawn(noise, torch.tensor([10])))
    assert losses.dtype == torch.float32
    assert losses.item() == pytest.approx((1 + 2**-10) ** 2, rel=1e-7)


# -------------------------------------------------------------------------------------------------------------- encode


def test_latents_are_mean_plus_std_times_own_noise_scaled():
    generator = torch.Generator().manual_seed(3)
    mean, std = torch.randn(2, *SHAPE, generator=generator), torch.rand(2, *SHAPE, generator=generator)
    vae, own = StubVAE(mean, std), torch.randn(2, *SHAPE, generator=generator)
    pixel_values = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(2, 3, 64, 64)
    latents = encode(vae, {"pixel_values": pixel_values, "posterior_noise": own})
    torch.testing.assert_close(latents, (mean + std * own) * 0.3, rtol=0, atol=1e-6)
    assert torch.allclose(vae.pixel_values[0, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0]), atol=1e-6)


def test_encode_with_a_real_vae(tiny_pipeline):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    generator = torch.Generator().manual_seed(4)
    pixel_values = torch.randint(256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)
    own = torch.randn(3, 4, 4, 4, generator=generator)
    latents = encode(pipeline.vae, {"pixel_values": pixel_values, "posterior_noise": own})
    with torch.no_grad():
        moments = pipeline.vae.quant_conv(pipeline.vae.encoder(pixel_values.float() / 127.5 - 1))
        mean, log_variance = moments.chunk(2, dim=1)
        expected = (mean + (log_variance / 2).exp() * own) * 0.18215
    assert latents.shape == (3, 4, 4, 4)
    assert not latents.requires_grad
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
