"""The held-out loss is measured at timesteps and with noise that never change, and where there is something to see."""

from types import SimpleNamespace

import torch
from accelerate import Accelerator
from stubs import StubUNet, StubVAE, grey_samples, make_scheduler
from training import draws, parse

from sdtune.validation import check_validation, held_out_losses


class OnePixelVAE(StubVAE):
    """Latents (batch, 1, 1, 1) that are the first value of the image."""

    def __init__(self):
        super().__init__(None, None)

    def encode(self, pixel_values):
        mean = pixel_values[:, :1, ::8, ::8]
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.zeros_like(mean)))


def measure(batch_size):
    """The losses of 40 held-out images, of a UNet that predicts 0, and the timesteps at which they were measured."""
    unet, images = StubUNet(), grey_samples(40, latent_shape=(1, 1, 1))
    losses = held_out_losses(
        Accelerator(cpu=True), unet, OnePixelVAE(), lambda ids: (ids,), make_scheduler(), images, batch_size
    )
    return losses, torch.cat([timesteps for _, timesteps, _ in unet.calls])


def test_held_out_timesteps_cover_the_range_evenly_and_never_change():
    losses, timesteps = measure(40)
    parts = 4
    assert losses.shape == (40,)
    assert timesteps.shape == (40 * parts,)
    for part in range(parts):  # each image has one timestep in every part of the range
        column = timesteps[part::parts]
        drawn = [draws(0, part, index, (1, 1, 1)).timestep for index in range(40)]
        assert torch.equal(column, (torch.tensor(drawn) + part * 1000) // parts)
        assert column.min() >= part * 1000 // parts
        assert column.max() < (part + 1) * 1000 // parts
        assert column.unique().numel() > 25
    middle = timesteps.float().mean().item()
    assert abs(middle - 499.5) < 5 * 1000 / parts / 12**0.5 / 40**0.5
    again, _ = measure(40)
    in_sevens, _ = measure(7)
    assert torch.equal(losses, again)
    torch.testing.assert_close(losses, in_sevens)
    # The UNet predicts 0, so that the loss of an image is the mean square of the numbers that are its noise.
    noise = [[draws(0, part, index, (1, 1, 1)).noise for part in range(parts)] for index in range(40)]
    torch.testing.assert_close(losses, torch.tensor(noise).square().mean(dim=1))


def test_a_rhythm_needs_something_to_look_at():
    (problem,) = check_validation(parse("--validation_steps=2"), "validation_prompts")
    assert "--validation_steps=2: does nothing without --validation_prompts or --num_validation_samples" in problem
    assert "add that or drop this" in problem
    for words in (["--validation_prompts", "a"], ["--num_validation_samples=1"]):
        assert check_validation(parse("--validation_steps=2", *words), "validation_prompts") == []
    assert check_validation(parse(), "validation_prompts") == []
