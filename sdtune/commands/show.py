"""Draw a contact sheet of a dataset as training sees it: cropped, flipped, and with the caption of that epoch.

    sdtune show my_images --resolution 512 --random_flip --output sheet.png

With the flags of a training run the sheet shows the first images of an epoch in the order in which that run takes
them, with its crops, flips and captions, as they follow from --seed, --epoch and the image alone. With
--aspect_ratio_buckets the order depends on --samples_per_step too; images have the shape of their bucket.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from sdtune.arguments import (
    BUCKETS_REQUIRES,
    SWITCH,
    add_bucket_arguments,
    add_transform_arguments,
    check_requirements,
    new_parser,
    non_negative_int,
    parse_flags,
    positive_int,
    random_seed,
)
from sdtune.batches import StepCounts, number_buckets, steps_of_epoch
from sdtune.buckets import check_bucket_rule, describe_buckets, fit_of
from sdtune.dataset import CaptionedImages, choose_rows, split_rows
from sdtune.errors import InputError, counted, fitted, in_one_line, raise_problems, told_to_user
from sdtune.files import beside, is_writable
from sdtune.fonts import load_font, shorten, wrap
from sdtune.images import check_images, path_of_findings, still_readable
from sdtune.named_dataset import (
    add_named_dataset_arguments,
    check_dataset_is_named,
    check_outside,
    name_below,
    read_named_rows,
    remedy_for_captions,
)
from sdtune.randomness import SAMPLE, random_numbers

PROGRAM = "sdtune show"
SEE_CHECK = "`sdtune check` names them"
MIN_CELL = 192  # pixels; a caption in less would be a column of single words
INK, FAINT, FRAME, PAPER = (20, 20, 20), (110, 110, 110), (205, 205, 205), (255, 255, 255)


# ------------------------------------------------------------------------------------------------------- arguments
def make_parser():
    """The flags of the command."""
    parser = new_parser(__doc__, "sdtune show DATASET --output FILE.png [flags]")
    add_named_dataset_arguments(parser)
    add = parser.add_argument_group("as in training").add_argument
    add_transform_arguments(add)
    add("--max_train_samples", type=positive_int, help="use so many images, drawn by the seed [1, inf)")
    add(
        "--num_validation_samples",
        type=non_negative_int,
        default=0,
        help="images held out of training to measure the loss on [0, inf)",
    )
    add("--seed", type=random_seed, default=0, help="seed of everything that is drawn at random [0, 9e18]")
    add(
        "--samples_per_step",
        type=positive_int,
        help="images of an optimizer step, over passes and processes; 16 if not given; needs --aspect_ratio_buckets "
        "[1, inf)",
    )
    add("--epoch", type=non_negative_int, default=0, help="pass over the images to show; the first is 0 [0, inf)")
    add_bucket_arguments(parser)
    add = parser.add_argument_group("sheet").add_argument
    add("--output", metavar="FILE.png", help="file to write")
    add("--overwrite", **SWITCH, help="replace it if it exists")
    add("--num_images", type=positive_int, default=20, help="images on the sheet at most [1, inf)")
    add("--columns", type=positive_int, help="images in a row; default: by their number [1, inf)")
    add(
        "--caption_lines",
        type=positive_int,
        default=4,
        help="lines of a caption at most; the rest becomes an ellipsis [1, inf)",
    )
    add("--font", metavar="FILE.ttf", help="font of the captions; default: DejaVu Sans, Arial or Pillow's own")
    add("--config", metavar="FILE.yaml", help="flags of this command by name; the command line wins")
    return parser


def check_args(args):
    """Lists every flag that is wrong, its value and the remedy."""
    problems = check_dataset_is_named(args) + check_bucket_rule(args)
    problems += check_requirements(args, {**BUCKETS_REQUIRES, "samples_per_step": "aspect_ratio_buckets"})
    if not args.output:
        return [*problems, "--output is missing: name a file that ends in .png"]
    output = Path(args.output)
    if not args.output.lower().endswith(".png"):
        problems.append(f"--output={args.output}: name a file that ends in .png")
    if not is_writable(output):
        problems.append(f"--output={args.output}: cannot be written to; name a file elsewhere")
    elif output.is_dir() or (output.exists() and not args.overwrite):
        problems.append(f"--output={args.output}: exists; name another file, or add --overwrite to replace a file")
    return problems + check_outside("output", args.output, args.dataset)


# ------------------------------------------------------------------------------------------------------------ data
def load_images(args):
    """Reads the dataset and leaves out what training leaves out; returns the training images, and what was left out,
    as a text that is empty if nothing was. Raises `InputError`."""
    rows = choose_rows(read_named_rows(args), args.max_train_samples, args.seed)
    findings = check_images(rows, path_of_findings(args.dataset, args.cache_dir))
    captions = list(rows["captions"])
    whole = [index for index, (_, _, _, problem) in enumerate(findings) if not problem]
    good = [index for index in whole if captions[index]]
    left_out = describe_left_out(len(rows) - len(whole), len(whole) - len(good))
    if len(good) < len(whole):
        left_out += f" ({remedy_for_captions(args.dataset)})"
    if not good:
        raise InputError(
            f"DATASET={args.dataset}: none of {counted(len(rows), 'image')} can be used: {left_out}; {SEE_CHECK}"
        )
    training, _ = split_rows(len(good), args.num_validation_samples)
    training, fit = [good[index] for index in training], fit_of(args)
    picture_sizes = np.array([findings[index][1:3] for index in training])
    images = CaptionedImages(
        rows=rows.select(training),
        sizes=fit(picture_sizes) if fit else np.full((len(training), 2), args.resolution),
        picture_sizes=picture_sizes,
        seed=args.seed,
        center_crop=args.center_crop or fit is not None,
        random_flip=args.random_flip,
        image_interpolation_mode=args.image_interpolation_mode,
        caption_dropout=args.caption_dropout,
        # What a view is not made of:
        contents=None,
        tokenizer=None,
        latent_channels=None,
        pixels_per_latent=None,
        num_timesteps=None,
        noise_offset=0,
        input_perturbation=0,
    )
    return images, left_out


def describe_left_out(num_broken, num_without):
    """What is left out, by kind: images that cannot be used, and those without a caption."""
    kinds = []
    if num_broken:
        kinds.append(f"{num_broken} unusable")
    if num_without:
        kinds.append(f"{num_without} without a caption")
    return ", ".join(kinds)


def order_of(images, samples_per_step, seed, epoch):
    """The indices of images (num_images,) in the order in which an epoch takes them."""
    counts = StepCounts(
        num_images=len(images),
        samples_per_pass=samples_per_step,
        samples_per_step=samples_per_step,
        steps_per_epoch=None,
        last_step=None,
        buckets=number_buckets(images.sizes),
    )
    return np.concatenate(steps_of_epoch(counts, seed, epoch))


def look_at(images, indices, epoch, dataset):
    """What an epoch sees of some images of a dataset: a list of (image, caption, name). Raises `InputError`."""
    seen = []
    for index in tqdm(indices, "Reading images", unit="image", disable=None, leave=False):
        row = images.rows[index]
        path = row["image"]["path"] or f"image {index}"
        with still_readable(path):
            place, is_mirrored, caption = images.choose(row, random_numbers(images.seed, SAMPLE, epoch, index))
            image = images.open(index, row, place, is_mirrored)
        seen.append((image, caption, name_below(path, dataset)))
    return seen


# ----------------------------------------------------------------------------------------------------------- sheet
def picture_of(sign, font):
    """What the font draws for a character."""
    mask = font.getmask(sign)
    return mask.size, bytes(mask)


def missing_signs(font, captions):
    """The characters of the captions for which the font has no picture, each once and in order."""
    missing = picture_of("\U0010fffe", font)  # which no font has
    signs = dict.fromkeys(sign for caption in captions for sign in caption if not sign.isspace())
    return [sign for sign in signs if picture_of(sign, font) == missing]


def draw_sheet(seen, font_path, resolution, columns, caption_lines):
    """Draws (image, caption, name) of each cell: images in whole multiples of their size, so that every pixel shows as
    it is, below each its name and its caption, in cells that are as wide as the widest and as high as the highest of
    their row.

    Returns (sheet, the characters that the font lacks).
    """
    factor = max(1, math.ceil(MIN_CELL / resolution))
    shapes = [(image.width * factor, image.height * factor) for image, _, _ in seen]
    width = max(MIN_CELL, *[width for width, _ in shapes])
    columns = min(columns or math.ceil(math.sqrt(len(seen) * 1.5)), len(seen))
    font_size = max(13, resolution * factor // 24)
    font, small_font = load_font(font_path, font_size), load_font(font_path, font_size * 4 // 5)
    gap, line_height = font_size, sum(font.getmetrics()) + 2

    texts = [wrap(caption, font, width, caption_lines) or ["(empty caption)"] for _, caption, _ in seen]
    rows = [range(start, min(start + columns, len(seen))) for start in range(0, len(seen), columns)]
    heights = []
    for row in rows:
        heights.append(max(shapes[index][1] + line_height * (1 + len(texts[index])) for index in row) + gap)
    size = gap + columns * (width + gap), gap + sum(heights) + gap * (len(rows) - 1)
    sheet = Image.new("RGB", size, PAPER)

    draw, top = ImageDraw.Draw(sheet), gap
    for row, height in zip(rows, heights):
        for column, index in enumerate(row):
            image, caption, name = seen[index]
            (image_width, image_height), left = shapes[index], gap + column * (width + gap)
            below = top + image_height + line_height // 4
            sheet.paste(image.resize((image_width, image_height), Image.Resampling.NEAREST), (left, top))
            # White grounds have no edge of their own.
            draw.rectangle((left - 1, top - 1, left + image_width, top + image_height), outline=FRAME)
            end_of_name = shorten(in_one_line(name)[::-1], small_font, width)[::-1]  # by which names differ
            draw.text((left, below), end_of_name, FAINT, small_font)
            for number, line in enumerate(texts[index], 1):
                draw.text((left, below + number * line_height), line, INK if caption else FAINT, font)
        top += height + gap
    return sheet, missing_signs(font, [line for lines in texts for line in lines])


def main(argv=None):
    """Runs the command; a mistake of the user's ends with status 2 and its message."""
    args, problems = parse_flags(make_parser(), argv, {})
    with told_to_user(PROGRAM, errors=(InputError, OSError), stopped="Stopped."):
        raise_problems(problems + check_args(args))
        load_font(args.font, 16)
        images, left_out = load_images(args)
        order = order_of(images, args.samples_per_step or 16, args.seed, args.epoch)
        seen = look_at(images, order[: args.num_images].tolist(), args.epoch, args.dataset)
        sheet, lacking = draw_sheet(seen, args.font, args.resolution, args.columns, args.caption_lines)
        with beside(args.output) as unfinished:
            sheet.save(unfinished, "PNG")
        buckets = describe_buckets(args, images)
    if buckets:
        print("\n  ".join(["Images by width x height of their bucket:", *buckets]))
    if lacking:
        print(f"The font has no picture of {''.join(lacking[:20])} and draws boxes; give another by --font.")
    if left_out:
        print(fitted(f"Left out, since training cannot use them: {left_out}; {SEE_CHECK}."))
    print(f"Wrote {args.output}: {len(seen)} of {counted(len(images), 'image')}, as epoch {args.epoch} takes them.")
