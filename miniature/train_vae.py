"""Trains the miniature's autoencoder from nothing: an AutoencoderKL, 64 x 64 pixels to 8 x 8 latents of 4 channels.

    python miniature/train_vae.py --output_dir miniature/pipeline/vae
    python miniature/train_vae.py --output_dir miniature/pipeline/vae --decoder_of miniature/pipeline/vae

It sees shapes, creatures (of both only the combinations of the training split) and patterned shapes. The loss is
L1 + MSE + differences of neighbouring pixels at two scales, for crisp edges, + KL (Rombach et al. 2022,
arXiv 2112.10752, section 3.1, without the adversarial and perceptual terms). Weights are saved in float16 every
`--save_steps`, so that an interrupted run leaves a result; the scaling factor in the config is measured.

The second command is optional: it goes on with the decoder alone. The latents stay what they were, so a UNet may be
trained on them meanwhile.
"""

import argparse
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from render import make_images
from tqdm import tqdm

MIXED = ("shapes", "creatures", "patterned")


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="miniature/pipeline/vae")
    parser.add_argument("--init_from", help="a trained folder: train it on instead of starting from nothing")
    parser.add_argument("--decoder_of", help="a trained folder: train its decoder on, its encoder frozen")
    parser.add_argument("--num_images", type=int, default=24_000, help="rendered once, then seen again and again")
    parser.add_argument("--mix", type=float, nargs=3, default=[0.3, 0.5, 0.2], help=f"shares of {', '.join(MIXED)}")
    parser.add_argument("--num_steps", type=int, default=6_000)
    parser.add_argument("--max_minutes", type=float, default=math.inf, help="ends earlier, the rate decayed in time")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--kl_weight", type=float, default=1e-5, help="of the KL divergence summed over a latent")
    parser.add_argument("--edge_weight", type=float, default=1.0, help="at the end; it grows from 0 over the run")
    parser.add_argument("--channels", type=int, nargs=4, default=[16, 32, 64, 96])
    parser.add_argument("--save_steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def to_pixels(images):
    """uint8 (batch, 64, 64, 3) -> float (batch, 3, 64, 64) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def edge_loss(made, wanted):
    """L1 of the differences between neighbouring pixels, at full and half size."""
    loss = 0.0
    for scale in (1, 2):
        if scale > 1:
            made, wanted = F.avg_pool2d(made, scale), F.avg_pool2d(wanted, scale)
        for dim in (2, 3):
            loss = loss + F.l1_loss(made.diff(dim=dim), wanted.diff(dim=dim))
    return loss


def rate_at(progress, warm_up=0.03):
    """Linear warm-up, then a cosine to zero: factor in [0, 1] of the peak rate for progress in [0, 1]."""
    if progress < warm_up:
        return progress / warm_up
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up))))


@torch.no_grad()
def evaluate(vae, pixels, batch_size=64):
    """Mean PSNR in dB over images (each from its own MSE on the scale of [0, 1]), and the latents' deviation."""
    scores, moments = [], []
    for chunk in pixels.split(batch_size):
        latents = vae.encode(chunk).latent_dist
        moments.append(latents.sample())
        made = vae.decode(latents.mode()).sample.clamp(-1, 1)
        mse = ((made - chunk) / 2).square().mean((1, 2, 3))
        scores.append(-10 * torch.log10(mse))
    return torch.cat(scores).mean().item(), torch.cat(moments).std().item()


def save(vae, output_dir, probe):
    """Writes the folder in float16; sets the scaling factor, 1 / deviation of the latents of `probe` if given."""
    factor = vae.config.scaling_factor
    if probe is not None:
        _, deviation = evaluate(vae, probe)
        factor = round(1 / deviation, 5)
    # By keyword: from_config ignores a value in the config where the model was once built with the default.
    half = AutoencoderKL.from_config(vae.config, scaling_factor=factor)
    half.load_state_dict(vae.state_dict())
    half.half().save_pretrained(output_dir)
    for file in Path(output_dir).glob("*.safetensors"):
        os.chmod(file, 0o644)  # safetensors ignores the umask


def build_vae(args):
    """The autoencoder to be trained: a new one, one that goes on, or one whose encoder is frozen."""
    if args.decoder_of or args.init_from:
        vae = AutoencoderKL.from_pretrained(args.decoder_of or args.init_from, torch_dtype=torch.float32)
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(not args.decoder_of)
        return vae
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=args.channels,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
    )
    # Starts with little noise on the latents (log-variance -4); with as much noise as signal, learning is slow.
    torch.nn.init.constant_(vae.quant_conv.bias[4:], -4.0)
    return vae


def train(args):
    """Trains the autoencoder, and saves it."""
    torch.manual_seed(args.seed)
    jobs = []
    for family, share in zip(MIXED, args.mix, strict=True):
        jobs += [(family, args.seed + 1000, index) for index in range(round(args.num_images * share))]
    images, _ = make_images(jobs)
    images = torch.from_numpy(images)
    unseen, _ = make_images([("creatures", 7, index, "held_out") for index in range(128)])
    unseen = to_pixels(torch.from_numpy(unseen))

    vae = build_vae(args)
    trainable = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    num_trainable = sum(parameter.numel() for parameter in trainable)
    print(f"{num_trainable:,} trainable parameters, {len(images):,} images")
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    probe = None if args.decoder_of else to_pixels(images[torch.randperm(len(images))[:256]])
    start, order = time.time(), torch.empty(0, dtype=torch.long)
    bar = tqdm(range(args.num_steps), mininterval=5)
    for step in bar:
        progress = max(step / args.num_steps, (time.time() - start) / 60 / args.max_minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate_at(progress)
        if len(order) < args.batch_size:
            order = torch.randperm(len(images))
        batch, order = to_pixels(images[order[: args.batch_size]]), order[args.batch_size :]
        if step % 2:
            batch = batch.flip(3)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            made = vae.decode(posterior.sample()).sample.float()
        mse = F.mse_loss(made, batch)
        # Edges in the wrong place cost more than none, so early on the term would only blur.
        edge_weight = args.edge_weight * (progress if args.decoder_of is None else 1.0)
        edges = edge_weight * edge_loss(made, batch)
        loss = F.l1_loss(made, batch) + mse + edges + args.kl_weight * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        if step % 20 == 0:
            speed = args.batch_size * (step + 1) / (time.time() - start)
            bar.set_postfix(loss=f"{loss.item():.4f}", mse=f"{mse.item():.4f}", images_per_s=f"{speed:.0f}")
        if (step + 1) % args.save_steps == 0:
            save(vae, args.output_dir, probe)
            score, deviation = evaluate(vae, unseen)
            tqdm.write(f"step {step + 1}: {score:.2f} dB on unseen creatures, latent deviation {deviation:.3f}")
    save(vae, args.output_dir, probe)
    score, _ = evaluate(vae, unseen)
    print(f"{score:.2f} dB on unseen creatures after {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    train(parse_args())
