"""Trains the miniature's UNet from nothing on shapes, dotted, marked and eyed ones too, completing the pipeline.

    python miniature/train_unet.py --pipeline_dir miniature/pipeline

Needs the folder's vae (train_vae.py), text_encoder and tokenizer (train_clip.py); both stay frozen. Latents are
cached as the posterior's mean and deviation, and sampled anew each time; prompt embeddings are computed once for each
distinct caption. Each image has several captions, most of which leave out attributes at random, so that what a prompt
does not say is diverse. The objective is that of Stable Diffusion 1, epsilon prediction on 1000 scaled-linear steps
with 10 % empty captions, weighted by min-SNR (arXiv 2303.09556) because that learns faster. Every `--save_steps` the
averaged weights are saved in float16 with a complete pipeline around them, and a few held-out prompts are drawn and
read back.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

sys.path.append(str(Path(__file__).resolve().parents[1]))  # sdtune is found also where it is not installed
import measure
import render
from train_vae import rate_at, to_pixels

from sdtune.diffusion import min_snr_weights

NUM_CAPTIONS = 8  # of each image
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline_dir", default="miniature/pipeline")
    parser.add_argument("--init_from", help="a trained UNet's folder: train it on instead of starting from nothing")
    parser.add_argument("--num_images", type=int, default=16_000)
    parser.add_argument("--dotted", type=float, default=0.2, help="the share of the images that are dotted shapes")
    parser.add_argument("--marked", type=float, default=0.25, help="the share that has stripes, a ring or both")
    parser.add_argument("--eyed", type=float, default=0.15, help="the share that has eyes")
    parser.add_argument("--num_steps", type=int, default=6_000)
    parser.add_argument("--max_minutes", type=float, default=math.inf, help="ends earlier, the rate decayed in time")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--snr_gamma", type=float, default=5.0, help="inf: every timestep weighs the same")
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--channels", type=int, nargs=2, default=[64, 120])
    parser.add_argument("--save_steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@torch.no_grad()
def encode_images(vae, images, batch_size=100):
    """uint8 (n, 64, 64, 3) -> mean and deviation of the posterior, scaled: two floats (n, 4, 8, 8)."""
    means, deviations = [], []
    for chunk in tqdm(images.split(batch_size), desc="latents", mininterval=5):
        posterior = vae.encode(to_pixels(chunk)).latent_dist
        means.append(posterior.mean * vae.config.scaling_factor)
        deviations.append(posterior.std * vae.config.scaling_factor)
    return torch.cat(means), torch.cat(deviations)


@torch.no_grad()
def encode_captions(tokenizer, text_encoder, captions, batch_size=200):
    """List of captions -> last hidden states of the text tower: float (n, 77, width)."""
    hidden = []
    for first in range(0, len(captions), batch_size):
        chunk = captions[first : first + batch_size]
        tokens = tokenizer(chunk, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        hidden.append(text_encoder(tokens).last_hidden_state)
    return torch.cat(hidden)


def load_data(args, vae, tokenizer, text_encoder):
    """Everything a step needs: latent means and deviations, ids of each image's captions, embeddings by id.

    Embedding 0 is that of the empty caption.
    """
    shares = {"dotted": args.dotted, "marked": args.marked, "eyed": args.eyed}
    numbers = {family: round(args.num_images * share) for family, share in shares.items()}
    numbers["shapes"] = args.num_images - sum(numbers.values())
    jobs = [(family, args.seed + 3000, index) for family, number in numbers.items() for index in range(number)]
    images, records = render.make_images(jobs)
    means, deviations = encode_images(vae, torch.from_numpy(images))
    rng, number = np.random.default_rng(args.seed), {"": 0}
    caption_ids = []
    for record in records:
        captions = [render.varied_caption(rng, record)[0] for _ in range(NUM_CAPTIONS)]
        caption_ids.append([number.setdefault(text, len(number)) for text in captions])
    print(f"{len(images):,} images, {len(number):,} distinct captions")
    return means, deviations, torch.tensor(caption_ids), encode_captions(tokenizer, text_encoder, list(number))


def build_unet(args, cross_attention_dim):
    """The UNet to be trained: a new one, or one that goes on."""
    if args.init_from:
        return UNet2DConditionModel.from_pretrained(args.init_from, torch_dtype=torch.float32)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=cross_attention_dim,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=args.channels,
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def save(unet, ema, vae, tokenizer, text_encoder, pipeline_dir):
    """Writes the averaged UNet in float16, the scheduler and model_index.json; returns the pipeline in float32."""
    averaged = UNet2DConditionModel.from_config(unet.config)
    averaged.load_state_dict(unet.state_dict())
    ema.copy_to(averaged.parameters())
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=averaged,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    averaged.half().save_pretrained(f"{pipeline_dir}/unet")
    averaged.float()
    scheduler.save_pretrained(f"{pipeline_dir}/scheduler")
    pipeline.save_config(pipeline_dir)
    for file in Path(pipeline_dir).glob("*/*.safetensors"):
        os.chmod(file, 0o644)  # safetensors ignores the umask
    return pipeline


def train(args):
    """Trains the UNet, and saves the pipeline."""
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(f"{args.pipeline_dir}/vae").eval()
    text_encoder = CLIPTextModel.from_pretrained(f"{args.pipeline_dir}/text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(f"{args.pipeline_dir}/tokenizer")
    means, deviations, caption_ids, embeddings = load_data(args, vae, tokenizer, text_encoder)
    unet = build_unet(args, embeddings.shape[-1])
    unet.set_attn_processor(AttnProcessor())  # under autocast, backward through SDPA takes twice as long on a CPU
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    print(f"{num_parameters:,} parameters")
    ema = EMAModel(unet.parameters(), decay=args.ema_decay, foreach=True)
    noise_scheduler = DDPMScheduler(**SCHEDULE)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=1e-2)
    start, order = time.time(), torch.empty(0, dtype=torch.long)
    bar = tqdm(range(args.num_steps), mininterval=5)
    average = None
    for step in bar:
        progress = max(step / args.num_steps, (time.time() - start) / 60 / args.max_minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate_at(progress)
        if len(order) < args.batch_size:
            order = torch.randperm(len(means))
        chosen, order = order[: args.batch_size], order[args.batch_size :]
        latents = means[chosen] + deviations[chosen] * torch.randn_like(means[chosen])
        said = caption_ids[chosen].gather(1, torch.randint(NUM_CAPTIONS, (len(chosen), 1)))[:, 0]
        said = said.masked_fill(torch.rand(len(said)) < args.caption_dropout, 0)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (len(chosen),))
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            model_pred = unet(noisy_latents, timesteps, embeddings[said]).sample
        losses = F.mse_loss(model_pred.float(), noise, reduction="none").mean((1, 2, 3))
        weights = min_snr_weights(compute_snr(noise_scheduler, timesteps), args.snr_gamma, predicts_noise=True)
        loss = (losses * weights).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.step(unet.parameters())
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 20 == 0:
            speed = args.batch_size * (step + 1) / (time.time() - start)
            bar.set_postfix(loss=f"{average:.4f}", images_per_s=f"{speed:.0f}")
        if (step + 1) % args.save_steps == 0:
            pipeline = save(unet, ema, vae, tokenizer, text_encoder, args.pipeline_dir)
            scores = measure.score_shapes(*measure.draw(pipeline, measure.shape_records(32)))
            variety = measure.variety(measure.draw(pipeline, [{"text": "a star"}] * 32)[0])
            tqdm.write(f"step {step + 1}: held-out prompts {scores}, a star {variety}")
    save(unet, ema, vae, tokenizer, text_encoder, args.pipeline_dir)
    print(f"trained in {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    train(parse_args())
