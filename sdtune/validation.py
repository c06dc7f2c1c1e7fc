"""Look at a run: draw samples, and measure the loss on images that are not trained on."""

import dataclasses
import functools
import math

import diffusers
import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from PIL import Image
from tqdm.auto import tqdm

from sdtune.batches import batches_of_one_size
from sdtune.dataset import CaptionedImages, unopened
from sdtune.deepspeed import passing_alone
from sdtune.diffusion import diffusion_losses, draw_latents, encode_posterior
from sdtune.errors import counted, fitted
from sdtune.models import on_device
from sdtune.output import tell_trackers, write_log
from sdtune.runs import judge, read_run
from sdtune.sharding import has_shared_passes
from sdtune.states import averaged

HELD_OUT_TIMESTEPS = 4  # at which the loss of each held-out image is measured


class LookGivenUp(Exception):
    """A look at the run was given up by all processes, since one was asked to stop."""


def share_of(accelerator, number):
    """Which of a number of things this process has to look at: every so many, but all of them where weights are shared
    out, so that all processes make the same passes together."""
    if has_shared_passes(accelerator):
        return range(number)
    return range(accelerator.process_index, number, accelerator.num_processes)


def asked_together(accelerator, is_asked):
    """Whether `is_asked()` says yes in some process; all of them have to call this."""
    return accelerator.reduce(torch.tensor(float(is_asked()), device=accelerator.device), "sum").item() > 0


@dataclasses.dataclass
class HeldOut:
    """The images that are held out, and what a process keeps of its share of them, by index and in the CPU's memory:
    nothing of it changes from look to look."""

    images: CaptionedImages  # all of them, which are not opened any more: what a sample draws
    posteriors: dict | None  # mean and log-variance, (4, height / 8, width / 8) each in float32; None if in the cache
    input_ids: dict  # (tokens,)
    prompt_embeds: dict | None  # (tokens, channels); None where the text encoder is trained


@torch.no_grad()
def encode_held_out(accelerator, vae, text_encoder, images, batch_size):
    """Encodes this process's share of held-out images, and their captions unless the text encoder is trained; not what
    comes out of a cache."""
    posteriors, input_ids, prompt_embeds = {}, {}, {}
    mine = share_of(accelerator, len(images))
    items = [(0, index, 1.0) for index in mine]
    batches = batches_of_one_size(items, images.sizes[mine], batch_size)
    for batch in torch.utils.data.DataLoader(images, batch_sampler=batches):
        indices = batch["index"].tolist()
        input_ids |= zip(indices, batch["input_ids"], strict=True)
        if images.reads_pixels:
            mean, log_variance = encode_posterior(vae, batch["pixel_values"].to(accelerator.device))
            posteriors |= zip(indices, zip(mean.cpu(), log_variance.cpu(), strict=True), strict=True)
        if "prompt_embeds" in batch:
            prompt_embeds |= zip(indices, batch["prompt_embeds"], strict=True)
    if text_encoder.training:
        prompt_embeds = None
    elif not prompt_embeds:
        prompt_embeds = encode_captions(accelerator, text_encoder, input_ids, batch_size)
    return HeldOut(unopened(images), posteriors or None, input_ids, prompt_embeds)


def encode_captions(accelerator, text_encoder, input_ids, batch_size):
    """The embeddings of captions by index, in the CPU's memory, of their tokens by index."""
    prompt_embeds, indices = {}, list(input_ids)
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        tokens = torch.stack([input_ids[index] for index in batch]).to(accelerator.device)
        with accelerator.autocast():
            prompt_embeds |= zip(batch, text_encoder(tokens)[0].cpu(), strict=True)
    return prompt_embeds


@torch.no_grad()
def held_out_losses(
    accelerator, unet, vae, text_encoder, noise_scheduler, held_out, batch_size, is_asked=lambda: False
):
    """The unweighted loss of every held-out image (num_images,), a mean over timesteps spread evenly; noise and
    timesteps are the same in every call and run. Each process does its share. Raises `LookGivenUp` if `is_asked()`,
    which is called before each batch, says yes in some process."""
    images, prompt_embeds = held_out.images, held_out.prompt_embeds
    if prompt_embeds is None:
        prompt_embeds = encode_captions(accelerator, text_encoder, held_out.input_ids, batch_size)
    pairs = [(part, index, 1.0) for index in held_out.input_ids for part in range(HELD_OUT_TIMESTEPS)]
    losses, stopped = torch.zeros(len(images)), torch.zeros(1)
    batches = batches_of_one_size(pairs, images.sizes[[index for _, index, _ in pairs]], batch_size)
    for batch in torch.utils.data.DataLoader(images, batch_sampler=batches):
        if is_asked():
            stopped += 1
            break
        indices = batch["index"].tolist()
        if held_out.posteriors is not None:
            means, log_variances = zip(*[held_out.posteriors[index] for index in indices], strict=True)
            batch |= {"mean": torch.stack(means), "log_variance": torch.stack(log_variances)}
        batch["prompt_embeds"] = torch.stack([prompt_embeds[index] for index in indices])
        batch = send_to_device(batch, accelerator.device, skip_keys="index")
        # Each image comes four times, with the number of a quarter in the place of the epoch: its timestep goes there.
        batch["timestep"] = (batch["timestep"] + batch["epoch"] * images.num_timesteps) // HELD_OUT_TIMESTEPS
        with accelerator.autocast():
            latents = draw_latents(vae, batch["mean"], batch["log_variance"], batch["posterior_noise"])
            part_losses = diffusion_losses(unet, noise_scheduler, latents, batch["prompt_embeds"], batch)
        losses.index_add_(0, batch["index"], part_losses.cpu() / HELD_OUT_TIMESTEPS)
    accelerator.wait_for_everyone()  # patiently: they need not be done at the same time
    # One exchange for both, so that no process waits for one that was stopped.
    kind = "mean" if has_shared_passes(accelerator) else "sum"
    *losses, stopped = accelerator.reduce(torch.cat([losses, stopped]).to(accelerator.device), kind).tolist()
    if stopped:
        raise LookGivenUp
    return torch.tensor(losses)


def log_held_out_losses(accelerator, run, losses):
    """Logs the mean of held-out losses, and its gain over those before training, which the run's progress keeps, with
    the standard error of the paired difference; says in a sentence what that means."""
    progress, is_first = run.progress, not run.progress["base_losses"]
    progress["base_losses"] = progress["base_losses"] or losses.tolist()
    gain = torch.tensor(progress["base_losses"], dtype=losses.dtype) - losses
    error = gain.std().item() / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    numbers = {"held_out_loss": losses.mean().item(), "held_out_gain": gain.mean().item(), "gain_error": error}
    write_log(accelerator, run.output_dir, progress["global_step"], numbers)
    if not accelerator.is_main_process or progress["global_step"] == run.counts.last_step:  # the end tells it
        return
    images = counted(len(losses), "held-out image")
    told = f"Step {progress['global_step']:,}: the loss on {images} is {numbers['held_out_loss']:.4f}."
    if not is_first:
        told = judge(read_run(run.output_dir, run.output_dir.name))[0]
    tqdm.write(fitted(told))  # above a bar


@torch.no_grad()
def draw_samples(args, accelerator, parts, prompts, is_asked):
    """Draws an image per prompt as the flags say, by default in 25 steps of DPM-Solver++ (arXiv 2211.01095), shared
    out over the processes. Returns all of them. Raises `LookGivenUp` if `is_asked()`, which is called before each
    batch and after each denoising step, says yes in some process."""
    is_ancestral = args.validation_scheduler == "DDPMScheduler"
    kind = diffusers.DDPMScheduler if is_ancestral else diffusers.DPMSolverMultistepScheduler
    scheduler = kind.from_config(parts["scheduler"].config)
    pipeline = diffusers.StableDiffusionPipeline(**{**parts, "scheduler": scheduler}, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)

    def interrupt(pipeline, step, timestep, tensors):
        pipeline._interrupt = is_asked()  # which makes it skip the steps that are left
        return tensors

    drawn, negative_prompt = [], args.validation_negative_prompt
    mine = share_of(accelerator, len(prompts))
    for start in range(0, len(mine), args.train_batch_size):
        if is_asked():
            break
        batch = mine[start : start + args.train_batch_size]
        with accelerator.autocast():
            images = pipeline(
                [prompts[number] for number in batch],
                height=args.resolution,
                width=args.resolution,
                num_inference_steps=args.validation_num_inference_steps or 25,
                guidance_scale=args.validation_guidance_scale or 7.5,
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(batch),
                # On the CPU, each from a seed of its own: no other image, process or device changes it.
                generator=[torch.Generator().manual_seed(args.seed + number) for number in batch],
                callback_on_step_end=interrupt,
            ).images
        drawn += zip(batch, images, strict=True)
    accelerator.wait_for_everyone()  # patiently: one may draw an image more
    shares = gather_object([(drawn, is_asked())])
    if any(stopped for _, stopped in shares):
        raise LookGivenUp
    image_of = dict(pair for drawn, _ in shares for pair in drawn)
    return [image_of[number] for number in range(len(prompts))]


def show_samples(accelerator, run, images):
    """Writes a grid of samples to samples/step-N.png and sends them to the trackers that take images. For one process
    alone."""
    step = run.progress["global_step"]
    path = run.output_dir / "samples" / f"step-{step:06d}.png"
    columns = min(len(images), 4)
    padding = [Image.new("RGB", images[0].size, "white")] * (-len(images) % columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_rows = math.ceil(len(images) / columns)
    diffusers.utils.make_image_grid(images + padding, num_rows, columns).save(path)
    tell_trackers(accelerator, functools.partial(track_samples, np.stack(images), step))


def track_samples(drawn, step, tracker):
    """Sends samples, pixels (num_images, height, width, 3), to a tracker that takes images."""
    if hasattr(tracker, "log_images"):
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": drawn}, step=step, **layout)


def validate(args, accelerator, run, parts, held_out, prompts, is_asked):
    """Draws samples and measures the held-out loss, under the averaged weights if there are any; returns the mean of
    the losses. `parts` are those of the pipeline, with the scheduler of training.

    `is_asked()` is called between batches and denoising steps, and has to stay with its yes. If it says yes in some
    process, all of them give up this look, of which nothing is written or logged. Raises `LookGivenUp` then.
    """
    if not prompts and not len(held_out.images):
        return None
    unet, vae, text_encoder = parts["unet"], parts["vae"], parts["text_encoder"]
    losses, images = None, None
    if has_shared_passes(accelerator):
        is_asked = functools.partial(asked_together, accelerator, is_asked)
    trained = torch.nn.ModuleList(part for part in (unet, text_encoder) if part.training).eval()
    try:
        with passing_alone(trained), averaged(run):
            if len(held_out.images):
                losses = held_out_losses(
                    accelerator, unet, vae, text_encoder, parts["scheduler"], held_out, args.train_batch_size, is_asked
                )
            if prompts:
                # Where all that they encode in training is cached, both wait in the CPU's memory.
                with on_device(accelerator.device, vae, text_encoder):
                    images = draw_samples(args, accelerator, parts, prompts, is_asked)
    finally:
        trained.train()
    if losses is not None:
        log_held_out_losses(accelerator, run, losses)
    if images and accelerator.is_main_process:
        show_samples(accelerator, run, images)
    accelerator.wait_for_everyone()
    return None if losses is None else losses.mean().item()


def steps_between_looks(args, counts):
    """Every how many steps a run is looked at."""
    if args.validation_epochs:
        return args.validation_epochs * counts.steps_per_epoch
    return args.validation_steps or 500


def prompts_of(args):
    """The prompt of each sample: one of each of --validation_prompts, four of --validation_prompt, or of each as many
    as --num_validation_images says."""
    number = args.num_validation_images
    prompts = []
    for prompt in args.validation_prompts or []:
        prompts += [prompt] * (1 if number is None else number)
    if args.validation_prompt is not None:
        prompts += [args.validation_prompt] * (4 if number is None else number)
    return prompts


def check_validation(args):
    """Lists the flags on samples that do nothing without a prompt, those on how often to look if there is nothing to
    draw or measure, and what contradicts itself."""
    problems, scale = [], args.validation_guidance_scale
    has_prompt = args.validation_prompt is not None or bool(args.validation_prompts)
    needed = "--validation_prompt or --validation_prompts"
    of_samples = {
        "num_validation_images": args.num_validation_images,
        "validation_scheduler": args.validation_scheduler,
        "validation_num_inference_steps": args.validation_num_inference_steps,
        "validation_guidance_scale": scale,
        "validation_negative_prompt": args.validation_negative_prompt,
    }
    for flag, value in of_samples.items():
        if value is not None and not has_prompt:
            problems.append(f"--{flag}={value}: does nothing without {needed}; add that or drop this")
    needed = "--validation_prompt, --validation_prompts or --num_validation_samples"
    for flag, value in {
        "validation_steps": args.validation_steps,
        "validation_epochs": args.validation_epochs,
    }.items():
        if value and not has_prompt and not args.num_validation_samples:
            problems.append(f"--{flag}={value}: does nothing without {needed}; add that or drop this")
    if args.validation_steps and args.validation_epochs:
        problems.append(
            f"--validation_epochs={args.validation_epochs}: contradicts --validation_steps={args.validation_steps}; "
            "drop one"
        )
    if args.validation_negative_prompt is not None and scale == 1:
        problems.append(
            f"--validation_negative_prompt={args.validation_negative_prompt}: does nothing under "
            "--validation_guidance_scale=1; drop one"
        )
    return problems
