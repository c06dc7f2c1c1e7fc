"""Draws the same captions with the same seeds by two pipelines and sets the pictures one above the other.

    python miniature/compare.py --base miniature/pipeline --model demo/model --output demo/base_above_result.png

The captions are pairs of body and eye colour that `render.py creatures` keeps out of the training set; `--prompts`
replaces them.
"""

import argparse
from pathlib import Path

import measure
import render
import torch
import yaml
from PIL import Image, ImageDraw, ImageFont

TILE = 160  # pixels of a column: 64-pixel images are enlarged to be seen
MARGIN = 8
LABEL_WIDTH = 90
FONT_SIZE = 15


def held_out_captions(number):
    """Returns captions of held-out creatures, every body colour once before any comes twice."""
    rest, ordered = list(render.held_out_combinations("creatures")), []
    while rest:
        bodies = set()
        turn = [pair for pair in rest if not (pair[0] in bodies or bodies.add(pair[0]))]
        ordered += turn
        rest = [pair for pair in rest if pair not in turn]
    return [render.creature_caption(*pair) for pair in ordered[:number]]


@torch.no_grad()
def draw(pipeline, prompts, seed, num_inference_steps, guidance_scale):
    """Returns one image per prompt. The noise of prompt i depends on (seed, i) alone, on the CPU whatever the device,
    so that two models start from the same."""
    pipeline.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipeline(
        prompts, generator=generators, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
    ).images


def wrap(text, font, width):
    """Returns the text broken into lines of at most `width` pixels, a word at least."""
    lines = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def make_grid(rows, captions):
    """Returns the picture: captions on top, then for each (label, images) of `rows` the label and its images."""
    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrap(caption, font, TILE - MARGIN) for caption in captions]
    header = max(text.count("\n") + 1 for text in texts) * round(FONT_SIZE * 1.4) + MARGIN
    size = (LABEL_WIDTH + len(captions) * (TILE + MARGIN), header + len(rows) * (TILE + MARGIN))
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for column, text in enumerate(texts):
        pen.multiline_text((LABEL_WIDTH + column * (TILE + MARGIN), MARGIN // 2), text, fill="black", font=font)
    for row, (label, images) in enumerate(rows):
        top = header + row * (TILE + MARGIN)
        pen.text((MARGIN, top + TILE // 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            left = LABEL_WIDTH + column * (TILE + MARGIN)
            grid.paste(image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC), (left, top))
            pen.rectangle([left - 1, top - 1, left + TILE, top + TILE], outline="lightgrey")
    return grid


def add_photos(grid, folder):
    """Returns the grid with a row of the photos of a folder above it."""
    photos = [Image.open(path) for path in sorted(Path(folder).glob("*.png"))]
    row = make_grid([("photos", photos)], [""] * len(photos))
    both = Image.new("RGB", (max(row.width, grid.width), row.height + grid.height), "white")
    both.paste(row, (0, 0))
    both.paste(grid, (0, row.height))
    return both


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="pipeline folder, drawn in the upper row")
    parser.add_argument("--model", required=True, help="pipeline or LoRA folder, drawn in the lower row")
    parser.add_argument("--output", required=True, help="PNG to write")
    parser.add_argument("--prompts", nargs="+", help="captions, instead of held-out creatures")
    parser.add_argument("--recipe", help="YAML file with `prompts`, steps, guidance and seed under `evaluation:`")
    parser.add_argument("--photos", help="folder of images for a row above")
    parser.add_argument("--num_images", type=int, default=8, help="columns, where --prompts is not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=measure.GUIDANCE)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    recipe = yaml.safe_load(Path(args.recipe).read_text(encoding="utf-8"))["evaluation"] if args.recipe else {}
    prompts = recipe.get("prompts") or args.prompts or held_out_captions(args.num_images)
    options = [prompts, *(recipe.get(name, getattr(args, name)) for name in (
        "seed", "num_inference_steps", "guidance_scale"))]
    rows = [("base", draw(measure.load_pipeline(args.base), *options)),
            ("fine-tuned", draw(measure.load_pipeline(args.model, args.base), *options))]
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    grid = make_grid(rows, prompts)
    grid = add_photos(grid, args.photos) if args.photos else grid
    grid.save(args.output)
    print(f"Base above result, for prompts that no training image has: {args.output}", flush=True)


if __name__ == "__main__":
    main()
