"""Stand-ins for models, rows and captions, of which a test knows every number."""

import io
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image

from sdtune.dataset import CaptionedImages

SHAPE = (4, 8, 8)  # of latents


class GreyRows:
    """Rows of any number; the image of each is one pixel, as bright as its index."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def select_columns(self, names):
        return self

    def __getitem__(self, index):
        if index == "captions":
            return [[""]] * self.number
        buffer = io.BytesIO()
        Image.new("L", (1, 1), index % 256).save(buffer, format="ppm")
        return {"image": {"bytes": buffer.getvalue(), "path": None}, "captions": ["a"]}


def one_token(caption, **options):
    """Stands for a tokenizer."""
    return SimpleNamespace(input_ids=[np.array([1])])


def make_samples(rows, tokenizer, latent_shape, num_timesteps=1000, resolution=8, **options):
    """CaptionedImages over the rows, with nothing switched on but what the options say."""
    settings = {
        "seed": 0,
        "center_crop": False,
        "random_flip": False,
        "image_interpolation_mode": "lanczos",
        "caption_dropout": 0.0,
        "noise_offset": 0.0,
        "input_perturbation": 0.0,
    }
    return CaptionedImages(
        rows=rows,
        contents=np.array([f"{index:064x}" for index in range(len(rows))]),
        sizes=np.full((len(rows), 2), resolution),
        tokenizer=tokenizer,
        latent_channels=latent_shape[0],
        pixels_per_latent=resolution // latent_shape[1],
        num_timesteps=num_timesteps,
        **{**settings, **options},
    )


def grey_samples(number=1000, latent_shape=SHAPE, **options):
    """CaptionedImages of which the numbers drawn matter, not the pictures."""
    return make_samples(
        GreyRows(number), one_token, latent_shape, image_interpolation_mode="nearest", center_crop=True, **options
    )


def make_scheduler(**options):
    """The noise scheduler with the betas of SD 1."""
    return DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options
    )


class StubUNet:
    """Answers every call with `answer` and keeps what it was called with."""

    def __init__(self, answer=0.0):
        self.answer, self.calls = answer, []

    def __call__(self, noisy_latents, timesteps, prompt_embeds):
        self.calls.append((noisy_latents, timesteps, prompt_embeds))
        return SimpleNamespace(sample=torch.zeros_like(noisy_latents) + self.answer)


class StubVAE:
    """A posterior of fixed moments; remembers the pixels that it was given."""

    dtype = torch.float32
    config = SimpleNamespace(scaling_factor=0.3)

    def __init__(self, mean, std):
        self.posterior = SimpleNamespace(mean=mean, logvar=2 * torch.log(std))

    def encode(self, pixel_values):
        self.pixel_values = pixel_values
        return SimpleNamespace(latent_dist=self.posterior)
