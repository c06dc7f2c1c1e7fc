"""Look at a run: draw samples, and measure the loss on images that are not trained on."""

import functools
import math

import diffusers
import numpy as np
import torch
from accelerate.utils import send_to_device
from diffusers.utils import make_image_grid
from PIL import Image

from sdtune.checkpoints import averaged
from sdtune.diffusion import diffusion_losses, encode
from sdtune.output import tell_trackers, write_log

HELD_OUT_TIMESTEPS = 4  # at which the loss of each held-out image is measured


@torch.no_grad()
def held_out_losses(accelerator, unet, vae, text_encoder, noise_scheduler, images, batch_size):
    """The unweighted loss of every held-out image (num_images,), a mean over timesteps spread evenly; noise and
    timesteps are the same in every call and run. Each process does its share."""
    pairs = [(part, index, 1.0) for index in range(len(images)) for part in range(HELD_OUT_TIMESTEPS)]
    mine = pairs[accelerator.process_index :: accelerator.num_processes]
    losses = torch.zeros(len(images))
    for batch in torch.utils.data.DataLoader(images, batch_size, sampler=mine):
        batch = send_to_device(batch, accelerator.device, skip_keys="index")
        # Each image comes four times, with the number of a quarter in the place of the epoch: its timestep goes there.
        batch["timestep"] = (batch["timestep"] + batch["epoch"] * images.num_timesteps) // HELD_OUT_TIMESTEPS
        with accelerator.autocast():
            latents, prompt_embeds = encode(vae, batch), text_encoder(batch["input_ids"])[0]
            part_losses = diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, batch)
        losses.index_add_(0, batch["index"], part_losses.cpu() / HELD_OUT_TIMESTEPS)
    return accelerator.reduce(losses.to(accelerator.device), "sum").cpu()


def log_held_out_losses(accelerator, run, losses):
    """Logs and prints the mean of held-out losses, and its gain over those before training, which the run's progress
    keeps, with the standard error of the paired difference."""
    progress = run.progress
    progress["base_losses"] = progress["base_losses"] or losses.tolist()
    gain = torch.tensor(progress["base_losses"], dtype=losses.dtype) - losses
    error = gain.std().item() / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    numbers = {"held_out_loss": losses.mean().item(), "held_out_gain": gain.mean().item(), "gain_error": error}
    write_log(accelerator, run.output_dir, progress["global_step"], numbers)
    shown = [f"{name} {value:.5f}" for name, value in numbers.items()]
    accelerator.print(f"\nStep {progress['global_step']}:", *shown)


@torch.no_grad()
def draw_samples(accelerator, parts, prompts, resolution, seed, path):
    """Draws an image per prompt by 25 steps of DPM-Solver++ (arXiv 2211.01095), and their grid to `path`."""
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(parts["scheduler"].config)
    pipeline = diffusers.StableDiffusionPipeline(**{**parts, "scheduler": scheduler}, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    with accelerator.autocast():
        for number, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed + number)
            drawn = pipeline(prompt, resolution, resolution, num_inference_steps=25, generator=generator)
            images.append(drawn.images[0])
    columns = min(len(images), 4)
    padding = [Image.new("RGB", images[0].size, "white")] * (-len(images) % columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images + padding, math.ceil(len(images) / columns), columns).save(path)
    return images


def show_samples(args, accelerator, run, parts, prompts):
    """Draws samples to samples/step-N.png and sends them to the trackers that take images."""
    step = run.progress["global_step"]
    path = run.output_dir / "samples" / f"step-{step:06d}.png"
    drawn = np.stack(draw_samples(accelerator, parts, prompts, args.resolution, args.seed, path))
    tell_trackers(accelerator, functools.partial(track_samples, drawn, step))


def track_samples(drawn, step, tracker):
    """Sends samples, pixels (num_images, height, width, 3), to a tracker that takes images."""
    if hasattr(tracker, "log_images"):
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": drawn}, step=step, **layout)


def validate(args, accelerator, run, parts, held_out, prompts, is_asked):
    """Draws samples and measures the held-out loss, under the averaged weights if there are any. `parts` are those of
    the pipeline, with the scheduler of training."""
    if not prompts and not len(held_out):
        return None
    unet, vae, text_encoder = parts["unet"], parts["vae"], parts["text_encoder"]
    held_out_loss = None
    trained = torch.nn.ModuleList(part for part in (unet, text_encoder) if part.training).eval()
    with averaged(run):
        if len(held_out):
            losses = held_out_losses(
                accelerator, unet, vae, text_encoder, parts["scheduler"], held_out, args.train_batch_size
            )
            log_held_out_losses(accelerator, run, losses)
            held_out_loss = losses.mean().item()
        if prompts and accelerator.is_main_process:
            show_samples(args, accelerator, run, parts, prompts)
    trained.train()
    accelerator.wait_for_everyone()
    return held_out_loss


def check_validation(args, prompt_flag):
    """Lists --validation_steps if there is nothing to draw or measure; `prompt_flag` names the flag for samples."""
    if args.validation_steps and not getattr(args, prompt_flag) and not args.num_validation_samples:
        needed = f"--{prompt_flag} or --num_validation_samples"
        return [f"--validation_steps={args.validation_steps}: does nothing without {needed}; add that or drop this"]
    return []


def prompts_of(args):
    """The prompts of the samples: one several times, for as many images."""
    return [args.validation_prompt] * (args.num_validation_images or 4) if args.validation_prompt else []
