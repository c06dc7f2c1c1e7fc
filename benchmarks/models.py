"""Pipelines with random weights, in the shapes that are measured, and images to train them on.

    python benchmarks/models.py SIZE FOLDER

Speed and memory depend on shapes alone, so nothing is downloaded. The tokenizer is the miniature's.
"""

import argparse
import io
import json
from pathlib import Path

import diffusers  # as a whole, and used in functions alone: its parts load when they are used, and warn then
import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw

REPO = Path(__file__).resolve().parents[1]
MINIATURE = REPO / "miniature" / "pipeline"

# What differs from diffusers' and transformers' defaults, which are those of Stable Diffusion 1.
SIZES = {
    "toy": {
        "unet": {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "norm_num_groups": 8,
        },
        "vae": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
        "text_encoder": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 803},
    },
    # The VAE takes an eighth of a step at 256 pixels, the text encoder a fiftieth: about as with SD 1.5 at 512.
    "35m": {
        "unet": {"block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 256},
        "vae": {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1},
        "text_encoder": {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 803},
    },
    "sd15": {
        "unet": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768},
        "vae": {"block_out_channels": (128, 256, 512, 512)},
        "text_encoder": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    },
    "sd21": {
        "unet": {
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "vae": {"block_out_channels": (128, 256, 512, 512)},
        "text_encoder": {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16},
    },
}


def make_unet(size, **changes):
    """A UNet of a size; all its levels but the last have cross-attention."""
    config = {"attention_head_dim": 8, "layers_per_block": 2, **SIZES[size]["unet"], **changes}
    below = len(config["block_out_channels"]) - 1
    return diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D",) * below + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * below,
        **config,
    )


def make_vae(size):
    """An autoencoder of a size, which makes a latent of 8 x 8 pixels."""
    config = {"layers_per_block": 2, "latent_channels": 4, **SIZES[size]["vae"]}
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **config
    )


def make_text_encoder(size, tokenizer):
    """A CLIP text encoder of a size."""
    config = {"vocab_size": 49408, **SIZES[size]["text_encoder"]}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    width = config["hidden_size"]
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(intermediate_size=4 * width, projection_dim=width, **ids, **config)
    )


def make_pipeline(size, folder, seed=0):
    """Writes a pipeline with random weights into a folder, if it is not there yet; returns the folder."""
    folder = Path(folder)
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(seed)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(MINIATURE / "tokenizer")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=make_vae(size),
        text_encoder=make_text_encoder(size, tokenizer),
        tokenizer=tokenizer,
        unet=make_unet(size),
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def draw_image(index, width, height):
    """Image `index`: a disc on a ground that runs from one colour to another."""
    rng = np.random.default_rng(index)
    start, end, disc = rng.integers(0, 256, (3, 3))
    ramp = np.linspace(0, 1, width)[None, :, None]
    ground = np.broadcast_to(start + (end - start) * ramp, (height, width, 3)).astype(np.uint8)
    image = Image.fromarray(ground)
    left, top, radius = rng.random(3) * (width / 2, height / 2, min(width, height) / 4)
    ImageDraw.Draw(image).ellipse([left, top, left + 2 * radius + 4, top + 2 * radius + 4], tuple(disc.tolist()))
    return image


def encoded(image):
    """The bytes of an image as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def caption_of(index):
    """The caption of image `index`."""
    return f"a drawing of disc number {' '.join(str(index))} on a plain ground"


def make_images(folder, num_images, width, height, with_captions=True):
    """Writes JPEG files, and metadata.jsonl, into a folder, if it is not there yet; returns the folder."""
    folder = Path(folder)
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    rows = []
    for index in range(num_images):
        name = f"{index:06d}.jpg"
        (folder / name).write_bytes(encoded(draw_image(index, width, height)))
        rows.append(json.dumps({"file_name": name, "text": caption_of(index)}) + "\n")
    if with_captions:
        (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def main(argv=None):
    """Writes the pipeline that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder")
    args = parser.parse_args(argv)
    print(make_pipeline(args.size, args.folder))


if __name__ == "__main__":
    main()
