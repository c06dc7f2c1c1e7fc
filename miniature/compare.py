"""Draws the same captions with the same seeds by two pipelines and sets the pictures one above the other.

    python miniature/compare.py --base miniature/pipeline --model demo/model --output demo/base_above_result.png

The captions are pairs of body and eye colour that `render.py creatures` keeps out of the training set; `--prompts`, or
those of a `--recipe`, replace them. `--photos` sets the training images in a row above.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
import yaml
from PIL import Image, ImageDraw, ImageFont

sys.path.append(str(Path(__file__).resolve().parents[1]))  # sdtune is found also where it is not installed
import measure
import render

from sdtune.fonts import wrap
from sdtune.models import quiet_libraries

TILE = 160  # pixels of a column: 64-pixel images are enlarged to be seen
MARGIN = 8
LABEL_WIDTH = 90
FONT_SIZE = 15
LINE_HEIGHT = round(FONT_SIZE * 1.4)
MAX_LINES = 99  # no caption is cut
DEFAULTS = {"prompts": None, "seed": 0, "num_inference_steps": 25, "guidance_scale": measure.GUIDANCE["creatures"]}


def held_out_captions(number):
    """Returns captions of held-out creatures, every body colour once before any comes twice."""
    turns = {}  # pairs of colours by how many of their body colour came before
    count = Counter()
    for body, eyes in render.held_out_combinations("creatures"):
        turns.setdefault(count[body], []).append((body, eyes))
        count[body] += 1
    ordered = [pair for turn in turns.values() for pair in turn]
    return [render.caption({"body": body, "eyes": eyes}) for body, eyes in ordered[:number]]


@torch.no_grad()
def draw(pipeline, prompts, seed, num_inference_steps, guidance_scale):
    """Returns one image per prompt. The noise of prompt i depends on (seed, i) alone, on the CPU whatever the device,
    so that two models start from the same."""
    pipeline.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipeline(
        prompts, generator=generators, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
    ).images


def make_grid(rows, captions):
    """Returns the picture: captions on top, then for each label of `rows` the label and its images."""
    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrap(caption, font, TILE - MARGIN, MAX_LINES) for caption in captions]
    header = max(max(1, len(lines)) for lines in texts) * LINE_HEIGHT + MARGIN
    step = TILE + MARGIN
    grid = Image.new("RGB", (LABEL_WIDTH + len(captions) * step, header + len(rows) * step), "white")
    pen = ImageDraw.Draw(grid)
    for column, lines in enumerate(texts):
        pen.multiline_text((LABEL_WIDTH + column * step, MARGIN // 2), "\n".join(lines), fill="black", font=font)
    for row, (label, images) in enumerate(rows.items()):
        top = header + row * step
        pen.text((MARGIN, top + TILE // 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            left = LABEL_WIDTH + column * step
            tile = image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)
            grid.paste(tile, (left, top))
            pen.rectangle([left - 1, top - 1, left + TILE, top + TILE], outline="lightgrey")
    return grid


def add_photos(grid, folder):
    """Returns the grid with a row of the photos of a folder above it."""
    photos = [Image.open(path) for path in sorted(Path(folder).glob("*.png"))]
    row = make_grid({"photos": photos}, [""] * len(photos))
    both = Image.new("RGB", (max(row.width, grid.width), row.height + grid.height), "white")
    both.paste(row, (0, 0))
    both.paste(grid, (0, row.height))
    return both


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="pipeline folder, drawn in the upper row")
    parser.add_argument("--model", required=True, help="pipeline or LoRA folder, drawn in the lower row")
    parser.add_argument("--output", required=True, help="PNG to write")
    parser.add_argument("--prompts", nargs="+", help="captions, instead of held-out creatures")
    parser.add_argument(
        "--recipe",
        help="YAML file with `prompts`, steps, guidance and seed under `evaluation:`; the command line wins",
    )
    parser.add_argument("--photos", help="folder of images for a row above")
    parser.add_argument("--num_images", type=int, default=8, help="columns, where --prompts is not given")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--num_inference_steps", type=int, help="default: 25")
    parser.add_argument("--guidance_scale", type=float, help=f"default: {DEFAULTS['guidance_scale']:g}")
    return parser.parse_args(argv)


def main(argv=None):
    """Draws and writes the grid that the command line asks for."""
    args = parse_args(argv)
    quiet_libraries()
    settings = dict(DEFAULTS)
    if args.recipe:
        recipe = yaml.safe_load(Path(args.recipe).read_text(encoding="utf-8"))["evaluation"]
        settings |= {name: value for name, value in recipe.items() if name in settings}
    settings |= {name: value for name, value in vars(args).items() if name in settings and value is not None}
    of_what = ""
    if not settings["prompts"]:
        settings["prompts"] = held_out_captions(args.num_images)
        of_what = ", for prompts that no training image has"
    rows = {
        "base": draw(measure.load_pipeline(args.base), **settings),
        "fine-tuned": draw(measure.load_pipeline(args.model, args.base), **settings),
    }
    grid = make_grid(rows, settings["prompts"])
    if args.photos:
        grid = add_photos(grid, args.photos)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    grid.save(args.output)
    print(f"Base above result{of_what}: {args.output}", flush=True)


if __name__ == "__main__":
    main()
