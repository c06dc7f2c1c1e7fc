"""Measures a model that was trained on emoji, beside its base from the same noise, and shows what both draw.

    python miniature/measure_emoji.py --model demo/emoji_lora --base miniature/pipeline

Every name that was trained on is drawn from several seeds, every combination of colour and thing that was not from
twice as many: those held out, and those of which there is no emoji. The readers of `emoji.py` tell colour, thing and
ground by pixels. `nearest_is_own` is the share of pictures whose nearest training image is one of their own name,
`copies` that of pictures less than a third as far from it as from the nearest image of another name;
`apart_by_name` and `apart_by_seed` are how far apart pictures of two names from one seed are, and of one name from two
seeds.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))  # found by whoever imports this file by its path
import compare
import emoji
import measure
import render

from sdtune.measures import COPY_RATIO
from sdtune.models import quiet_libraries

BATCH = 50  # pictures at once
# Rows of the picture: names seen, and combinations that were not.
SEEN = ("red heart", "blue square", "orange book", "magnet", "butterfly", "pineapple", "rocket", "smiling face")
UNSEEN = (
    "purple heart",
    "orange circle",
    "yellow square",
    "green book",
    "purple book",
    "pink square",
    "green diamond",
    "blue apple",
)
NOTES = {"train": "", "held_out": " (held out)", "not_there": " (no such emoji)"}


def draw(pipeline, prompts, seeds, steps, guidance):
    """A picture of each prompt, from its seed: uint8 (n, 64, 64, 3)."""
    drawn = []
    for first in range(0, len(prompts), BATCH):
        made = pipeline(
            prompts[first : first + BATCH],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=render.SIZE,
            width=render.SIZE,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[first : first + BATCH]],
            output_type="np",
        ).images
        drawn.append((made * 255).round().astype(np.uint8))
    return np.concatenate(drawn)


def draw_split(pipeline, split, num_seeds, **settings):
    """Pictures of all emoji of a split, each from the seeds 0 to num_seeds - 1: uint8 (emoji, seeds, 64, 64, 3)."""
    records = emoji.records(split)
    prompts = [record["text"] for record in records for _ in range(num_seeds)]
    drawn = draw(pipeline, prompts, list(range(num_seeds)) * len(records), **settings)
    return drawn.reshape(len(records), num_seeds, *drawn.shape[1:])


def read_folder(folder):
    """The images of a folder by the name of their icon: {icon: uint8 (views, 64, 64, 3)}."""
    views = {}
    for line in (Path(folder) / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        views.setdefault(row["icon"], []).append(np.asarray(Image.open(Path(folder) / row["file_name"])))
    return {icon: np.stack(images) for icon, images in views.items()}


def coloured_names():
    """The names seen that have a colour, which come first."""
    return [record for record in emoji.records("train") if record["colour"]]


def score_colours(pictures, records, outlines):
    """Shares in [0, 1] of pictures (emoji, seeds, 64, 64, 3) with the prompted colour, the thing, and both."""
    colours, things = [], []
    for drawn, record in zip(pictures, records, strict=True):
        colours += [emoji.read_colour(image) == record["colour"] for image in drawn]
        things += [emoji.read_thing(image, outlines) == record["thing"] for image in drawn]
    both = np.logical_and(colours, things)
    shares = {"colour": colours, "thing": things, "both": both}
    return {"pictures": len(both), **{name: measure.share(values) for name, values in shares.items()}}


def differences(picture, others):
    """The root mean squared difference, of 255, of a picture (values,) to others (n, values): (n,)."""
    return np.sqrt(np.square(others - picture).mean(1))


def mean_difference(pictures):
    """The mean over all pairs of pictures (n, values)."""
    found = [differences(pictures[k], pictures[k + 1 :]) for k in range(len(pictures) - 1)]
    return float(np.concatenate(found).mean())


def score_names(pictures, views):
    """How well the pictures (emoji, seeds, 64, 64, 3) of all names seen are told apart."""
    flat = pictures.reshape(*pictures.shape[:2], -1).astype(np.float32)
    icons = [record["icon"] for record in emoji.records("train")]
    images = np.concatenate([views[icon] for icon in icons])
    images = images.reshape(len(images), -1).astype(np.float32)
    owners = np.repeat(np.arange(len(icons)), [len(views[icon]) for icon in icons])
    is_own, is_copy = [], []
    for number, drawn in enumerate(flat):
        for picture in drawn:
            away = differences(picture, images)
            nearest = owners[away.argmin()]
            is_own.append(nearest == number)
            is_copy.append(away.min() < away[owners != nearest].min() * COPY_RATIO)
    return {
        "pictures": len(is_own),
        "nearest_is_own": measure.share(is_own),
        "copies": measure.share(is_copy),
        "apart_by_name": round(np.mean([mean_difference(flat[:, seed]) for seed in range(flat.shape[1])]), 1),
        "apart_by_seed": round(np.mean([mean_difference(drawn) for drawn in flat]), 1),
        "white_ground": measure.share([emoji.has_white_ground(image) for drawn in pictures for image in drawn]),
    }


def measure_model(pipeline, views, num_seeds, **settings):
    """All figures of a model."""
    coloured = coloured_names()
    outlines = [(record["thing"], emoji.outline_of(views[record["icon"]][0])) for record in coloured]
    pictures = draw_split(pipeline, "train", num_seeds, **settings)
    result = {
        "names_seen": score_names(pictures, views),
        "colours_seen": score_colours(pictures[: len(coloured)], coloured, outlines),
    }
    for split in ("held_out", "not_there"):
        drawn = draw_split(pipeline, split, 2 * num_seeds, **settings)
        result[split] = score_colours(drawn, emoji.records(split), outlines)
    return result


def draw_rows(pipelines, views, names, **settings):
    """Rows of pictures by label, and their captions, of names in words; where there is no emoji the image is empty."""
    known = {record["text"]: record for split in NOTES for record in emoji.records(split)}
    chosen = [known[emoji.caption(name)] for name in names]
    blank = np.full((1, render.SIZE, render.SIZE, 3), 255, np.uint8)
    rows = {"Noto": [views.get(record["icon"], blank)[0] for record in chosen]}
    for label, pipeline in pipelines.items():
        rows[label] = draw(pipeline, [record["text"] for record in chosen], range(len(chosen)), **settings)
    captions = []
    for name, record in zip(names, chosen, strict=True):
        (split,) = [split for split in NOTES if record in emoji.records(split)]
        captions.append(name + NOTES[split])
    return {label: [Image.fromarray(image) for image in images] for label, images in rows.items()}, captions


def draw_picture(pipelines, views, **settings):
    """The picture of training images, base and result, for names seen above and combinations not seen below."""
    grids = []
    for names in (SEEN, UNSEEN):
        rows, captions = draw_rows(pipelines, views, names, **settings)
        grids.append(compare.make_grid(rows, captions))
    picture = Image.new("RGB", (grids[0].width, sum(grid.height for grid in grids)), "white")
    picture.paste(grids[0], (0, 0))
    picture.paste(grids[1], (0, grids[0].height))
    return picture


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pipeline or LoRA folder to measure")
    parser.add_argument("--base", required=True, help="the model that --model was trained from")
    parser.add_argument("--data_dir", default="demo/emoji", help="folder that `emoji.py render` wrote")
    parser.add_argument("--num_seeds", type=int, default=4, help="pictures of each name seen; twice as many of others")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="that of examples/configs/emoji.yaml")
    parser.add_argument("--output", help="also write the figures to this JSON file")
    parser.add_argument("--picture", help="also show some of the pictures in this PNG file")
    return parser.parse_args(argv)


def main(argv=None):
    """Measures both models, prints the figures and writes what the command line asks for."""
    args = parse_args(argv)
    quiet_libraries()
    settings = {"steps": args.num_inference_steps, "guidance": args.guidance_scale}
    data = Path(args.data_dir)
    views = read_folder(data / "train") | read_folder(data / "held_out")
    pipelines = {
        "base": measure.load_pipeline(args.base),
        "fine-tuned": measure.load_pipeline(args.model, args.base),
    }
    result = {}
    for label, pipeline in pipelines.items():
        result[label] = measure_model(pipeline, views, args.num_seeds, **settings)
    measure.print_table(result)
    if args.output:
        Path(args.output).write_text(json.dumps({**result, "settings": settings}, indent=2) + "\n", encoding="utf-8")
    if args.picture:
        draw_picture(pipelines, views, **settings).save(args.picture)
        print(f"Training images above base above result: {args.picture}")


if __name__ == "__main__":
    main()
