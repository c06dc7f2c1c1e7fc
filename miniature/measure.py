"""Measures the miniature, or a model fine-tuned from it, by the renderer's own rules.

    python miniature/measure.py base
    python miniature/measure.py creatures --model OUTPUT_FOLDER --base miniature/pipeline
    python miniature/measure.py subject --model OUTPUT_FOLDER --base miniature/pipeline

`base`: 200 prompts of shapes whose combination of colour, shape and background was held out of training; 64 pictures
of "a star", which should differ in what the prompt leaves open; the autoencoder on unseen creatures; CLIP's retrieval.
`creatures`: prompts of held-out pairs of body and eye colour.
`subject`: 50 prompts with the rare word on backgrounds that no view of the subject had, and 50 plain stars.
Pictures are drawn in 25 DPM-Solver++ steps, prompt k with seed k, so two models see the same noise.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))  # found by whoever imports this file by its path
sys.path.append(str(Path(__file__).resolve().parents[1]))  # and sdtune also where it is not installed
import render

from sdtune.lora_layouts import LORA_FILE
from sdtune.models import quiet_libraries

HERE = Path(__file__).resolve().parent
GUIDANCE = {"base": 5.0, "creatures": 2.0, "subject": 3.0}  # a fine-tuned model needs less push


def shape_records(number=200, seed=0):
    """Prompts of held-out combinations, each combination equally often: list of records of render.make."""
    combinations = render.held_out_combinations("shapes")
    rng, records = np.random.default_rng(seed), []
    for k in range(number):
        colour, shape, background = combinations[k % len(combinations)]
        drawn = {
            "colour": colour,
            "shape": shape,
            "background": background,
            "size": str(rng.choice(list(render.RADII))),
            "position": str(rng.choice(list(render.POSITIONS))),
        }
        records.append({"text": render.caption(drawn), **drawn})
    return records


def creature_records(number=108):
    """Prompts of the 18 held-out pairs of body and eye colour, in turn."""
    pairs = render.held_out_combinations("creatures")
    chosen = [pairs[k % len(pairs)] for k in range(number)]
    drawn = [{"body": body, "eyes": eyes} for body, eyes in chosen]
    return [{"text": render.caption(record), **record} for record in drawn]


def subject_records(number=50):
    """Prompts with the rare word on the backgrounds that five views of the subject leave out, in turn."""
    unseen = render.SUBJECT_GROUNDS[5:]
    chosen = [unseen[k % len(unseen)] for k in range(number)]
    return [{"text": f"a sks star on a {background} background", "background": background} for background in chosen]


def star_records(number=50):
    """Prompts of plain stars, each with its `colour`, on other backgrounds."""
    names = render.SUBJECT_GROUNDS
    pairs = [(colour, ground) for colour in names for ground in names if colour != ground]
    chosen = [pairs[k * 11 % len(pairs)] for k in range(number)]
    return [{"text": f"a {colour} star on a {ground} background", "colour": colour} for colour, ground in chosen]


def load_pipeline(folder, base=None):
    """A pipeline in float32 with DPM-Solver++ and no progress bar; a folder of LoRA weights goes onto `base`."""
    is_lora = Path(folder, LORA_FILE).exists()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        base if is_lora else folder, safety_checker=None, dtype=torch.float32
    )
    if is_lora:
        pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, records, steps=25, guidance=GUIDANCE["base"], batch_size=50, seed=0):
    """Draws one picture per record: (uint8 (n, 64, 64, 3), records). Picture k starts from seed + k."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for first in range(0, len(records), batch_size):
        batch = records[first : first + batch_size]
        generators = [torch.Generator().manual_seed(seed + first + k) for k in range(len(batch))]
        made = pipeline(
            [record["text"] for record in batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=render.SIZE,
            width=render.SIZE,
            generator=generators,
            output_type="np",
        ).images
        images.append((made * 255).round().astype(np.uint8))
    return np.concatenate(images), records


def share(values):
    """The share of True."""
    return round(float(np.mean(values)), 4)


def agreeing(seen, records, key):
    """The share of pictures whose `key` was seen as the record has it."""
    return share([found[key] == record[key] for found, record in zip(seen, records, strict=True)])


def score_shapes(images, records):
    """Shares in [0, 1] of pictures with the right background, shape colour, shape, and all three."""
    seen = [render.read_shape(image) for image in images]
    keys = ("background", "colour", "shape")
    all_right = []
    for found, record in zip(seen, records, strict=True):
        all_right.append(all(found[key] == record[key] for key in keys))
    return {**{key: agreeing(seen, records, key) for key in keys}, "all": share(all_right)}


def score_creatures(images, records):
    """Shares in [0, 1] with the right body colour, a plain white ground, visible eyes, and the right eye colour."""
    seen = [render.read_creature(image) for image in images]
    return {
        "body": agreeing(seen, records, "body"),
        "white_ground": share([found["white_ground"] for found in seen]),
        "eyes_visible": share([found["eyes_visible"] for found in seen]),
        "eyes": agreeing(seen, records, "eyes"),
    }


def score_subject(images, records):
    """Shares in [0, 1] of pictures with the subject's stripes, its ring, both, and the prompted background."""
    seen = [render.read_subject(image) for image in images]
    return {
        "stripes": share([found["stripes"] for found in seen]),
        "ring": share([found["ring"] for found in seen]),
        "both": share([found["stripes"] and found["ring"] for found in seen]),
        "background": agreeing(seen, records, "background"),
    }


def score_stars(images, records):
    """Shares in [0, 1] of pictures with any of the subject's marks, a ring of another colour too, and of plain stars
    in the prompted colour."""
    marked, right = [], []
    for image, record in zip(images, records, strict=True):
        marks, shape = render.read_subject(image), render.read_shape(image)
        is_marked = marks["stripes"] or marks["circled"]
        is_star_in_colour = shape["shape"] == "star" and shape["colour"] == record["colour"]
        marked.append(is_marked)
        right.append(is_star_in_colour and not is_marked)
    return {"marked": share(marked), "plain_star_in_its_colour": share(right)}


def variety(images):
    """How many of the 8 colours and backgrounds appear in pictures of one prompt that names neither, and the share of
    stars among them."""
    seen = [render.read_shape(image) for image in images]
    colours = {found["colour"] for found in seen} & set(render.COLOURS)
    backgrounds = {found["background"] for found in seen} & set(render.COLOURS)
    return {
        "colours": len(colours),
        "backgrounds": len(backgrounds),
        "stars": share([found["shape"] == "star" for found in seen]),
    }


@torch.no_grad()
def reconstruct(vae, images, batch_size=64):
    """Encodes to the posterior's mean and decodes: uint8 (n, 64, 64, 3) -> the same."""
    made = []
    for chunk in torch.from_numpy(images).split(batch_size):
        pixels = chunk.permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = vae.encode(pixels).latent_dist.mode()
        decoded = vae.decode(latents).sample.clamp(-1, 1)
        made.append(((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(made).numpy()


def psnr(made, wanted):
    """Peak signal-to-noise ratio in dB of each image, from its mean squared error on the scale of 0 to 255."""
    mse = np.square(made.astype(np.float64) - wanted).mean((1, 2, 3))
    return 10 * np.log10(255**2 / mse)


def measure_vae(folder, number=128, seed=7):
    """Mean PSNR per family, and what the renderer still reads in reconstructions of held-out images."""
    vae = diffusers.AutoencoderKL.from_pretrained(folder, dtype=torch.float32).eval()
    splits = {"creatures": "held_out", "shapes": "held_out", "patterned": "train", "subject": "train"}
    result = {}
    for family, split in splits.items():
        images, records = zip(*(render.make(family, seed, k, split) for k in range(number)), strict=True)
        made = reconstruct(vae, np.stack(images))
        result[f"{family}_psnr_db"] = round(float(psnr(made, np.stack(images)).mean()), 2)
        if family == "shapes":
            result["shapes_read"] = score_shapes(made, records)
        elif family == "creatures":
            result["creatures_read"] = score_creatures(made, records)
        elif family == "subject":
            scores = score_subject(made, records)
            result["subject_read"] = {key: scores[key] for key in ("stripes", "ring")}
    return result


def clip_pairs(number, seed):
    """So many held-out images with distinct captions, by caption. One quarter is creatures, 16 at most (there are 18
    captions); of the shapes many differ only in size or position."""
    limits = {"creatures": min(number // 4, 16), "shapes": number}
    images, index = {}, 0
    for family, limit in limits.items():
        while len(images) < limit:
            image, record = render.make(family, seed, index, "held_out")
            images.setdefault(record["text"], image)
            index += 1
    return images


@torch.no_grad()
def measure_clip(folder, number=64, seed=11):
    """Share of held-out images whose own caption scores highest among `number` distinct ones, and the reverse."""
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    images = clip_pairs(number, seed)
    pixels = processor([Image.fromarray(image) for image in images.values()], return_tensors="pt")
    tokens = tokenizer(list(images), padding=True, return_tensors="pt")
    logits = model(**pixels, input_ids=tokens.input_ids).logits_per_image
    own = torch.arange(len(images))
    return {
        "captions": len(images),
        "image_to_text": share((logits.argmax(1) == own).numpy()),
        "text_to_image": share((logits.argmax(0) == own).numpy()),
    }


@torch.no_grad()
def measure_marks(folder, number=200, seed=21):
    """Of held-out shapes with stripes and a ring in two colours, among `number` marked ones: how many, and the share
    whose own caption scores higher than the one with both colours swapped."""
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    images, texts = [], []
    for index in range(number):
        image, record = render.make("marked", seed, index, "held_out")
        if "stripes" in record and "ring" in record and record["stripes"] != record["ring"]:
            images.append(Image.fromarray(image))
            swapped = {**record, "stripes": record["ring"], "ring": record["stripes"]}
            texts += [record["text"], render.caption(swapped)]
    pixels = processor(images, return_tensors="pt")
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    logits = model(**pixels, input_ids=tokens.input_ids).logits_per_image
    rows = torch.arange(len(images))
    is_right = logits[rows, 2 * rows] > logits[rows, 2 * rows + 1]
    return {"pictures": len(images), "own_above_swapped": share(is_right.numpy())}


def grid(images, columns=12):
    """Tiles uint8 (n, 64, 64, 3) into one PIL image."""
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * columns, *images.shape[1:]), 255, dtype=np.uint8)
    sheet[: len(images)] = images
    sheet = sheet.reshape(rows, columns, render.SIZE, render.SIZE, 3).swapaxes(1, 2)
    return Image.fromarray(sheet.reshape(rows * render.SIZE, columns * render.SIZE, 3))


def print_table(result, indent=""):
    """Prints names and figures, those in a dictionary further in."""
    for key, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            print_table(value, indent + "  ")
        else:
            width = 28 - len(indent)
            print(f"{indent}{key.ljust(width)}{value}")


def measure_base(args, settings):
    """Measures the miniature itself: returns its figures, and the pictures that its UNet drew."""
    images, records = draw(load_pipeline(args.model), shape_records(args.num_samples or 200), **settings)
    stars, _ = draw(load_pipeline(args.model), [{"text": "a star"}] * (args.num_samples or 64), **settings)
    result = {
        "held_out_shapes": {"pictures": len(images), **score_shapes(images, records)},
        "a_star": {"pictures": len(stars), **variety(stars)},
        "vae": measure_vae(Path(args.model) / "vae"),
        "clip": measure_clip(args.clip),
        "clip_of_marks": measure_marks(args.clip),
    }
    return result, images


def measure_creatures(args, settings):
    """Measures a model of creatures, and its base if there is one: returns their figures, and the model's pictures."""
    records = creature_records(args.num_samples or 108)
    images, _ = draw(load_pipeline(args.model, args.base), records, **settings)
    result = {"model": {"pictures": len(images), **score_creatures(images, records)}}
    if args.base:
        others, _ = draw(load_pipeline(args.base), records, **settings)
        result["base"] = {"pictures": len(others), **score_creatures(others, records)}
    return result, images


def measure_subject(args, settings):
    """Measures a model of the subject, and its base if there is one: returns their figures, and the model's first
    pictures of the subject and of plain stars."""
    folders = {"model": args.model}
    if args.base:
        folders["base"] = args.base
    result, shown = {}, {}
    for name, folder in folders.items():
        pipeline = load_pipeline(folder, args.base)
        subjects, subject_prompts = draw(pipeline, subject_records(args.num_samples or 50), **settings)
        stars, star_prompts = draw(pipeline, star_records(args.num_samples or 50), **settings)
        result[name] = {**score_subject(subjects, subject_prompts), **score_stars(stars, star_prompts)}
        shown[name] = np.concatenate([subjects[:24], stars[:24]])
    return result, shown["model"]


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("base", "creatures", "subject"))
    parser.add_argument("--model", default=str(HERE / "pipeline"), help="pipeline or LoRA folder to measure")
    parser.add_argument("--clip", default=str(HERE / "clip"))
    parser.add_argument("--base", help="the model that --model was trained from, measured on the same noise")
    parser.add_argument(
        "--num_samples", type=int, help="pictures; 200 and 64 for base, 108 for creatures, 50 for subject"
    )
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument(
        "--guidance_scale", type=float, help=", ".join(f"{value:g} for {key}" for key, value in GUIDANCE.items())
    )
    parser.add_argument("--output", help="also write the figures to this JSON file")
    parser.add_argument("--grid", help="also write the model's first 48 pictures to this PNG file")
    return parser.parse_args(argv)


def main(argv=None):
    """Measures what the command line asks for, prints the figures and writes them where it says."""
    args = parse_args(argv)
    quiet_libraries()
    guidance = GUIDANCE[args.what] if args.guidance_scale is None else args.guidance_scale
    settings = {"steps": args.num_inference_steps, "guidance": guidance}
    measured = {"base": measure_base, "creatures": measure_creatures, "subject": measure_subject}
    result, images = measured[args.what](args, settings)
    print_table(result)
    if args.output:
        Path(args.output).write_text(json.dumps({**result, "settings": settings}, indent=2) + "\n", encoding="utf-8")
    if args.grid:
        grid(images[:48]).save(args.grid)


if __name__ == "__main__":
    main()
