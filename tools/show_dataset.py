#!/usr/bin/env python
"""Draw a contact sheet of a dataset as training sees it: cropped, flipped, and with the caption of that epoch.

    python show_dataset.py my_images --resolution 512 --random_flip --output sheet.png

With the flags of a training run the sheet shows the first images of an epoch in the order in which that run takes
them, with its crops, flips and captions, as they follow from --seed, --epoch and the image alone.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import yaml
from filelock import FileLock
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

IMAGE_SUFFIXES = set(".avif .bmp .gif .jfif .jpe .jpeg .jpg .png .tif .tiff .webp".split())
MIN_SIDE = 16  # pixels; anything smaller is an icon or a broken file
SAMPLE, ORDER, DROPOUT, SUBSET, HELD_OUT = range(5)  # a stream of random numbers each
REPLACED_FLAGS = {}
FONTS = ("DejaVuSans.ttf", "arial.ttf", "Arial.ttf")  # of systems; Pillow's own font has few letters beyond a to z
MIN_CELL = 192  # pixels; a caption in less would be a column of single words
INK, FAINT, FRAME, PAPER = (20, 20, 20), (110, 110, 110), (205, 205, 205), (255, 255, 255)


class InputError(ValueError):
    """A mistake in what the user gave; its text is all that they need to see."""


# ------------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    """Reads the command line and `--config`; a flag that is wrong by itself ends with status 2 and one message."""
    parser = argparse.ArgumentParser(usage="%(prog)s DATASET --output FILE.png [flags]", allow_abbrev=False,
                                     description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    add = parser.add_argument_group("data").add_argument
    add("dataset", nargs="?", default=argparse.SUPPRESS, metavar="DATASET",
        help="folder of images, dataset on the Hub, or a local path that `datasets` can load")
    add("--dataset", default=None, help=argparse.SUPPRESS)  # as --config has it
    add("--dataset_config_name", help="configuration of that dataset")
    add("--image_column", default="image", help="column of the images in that dataset")
    add("--caption_column", default="text", help="column with a caption, or a list of them: one is drawn per epoch")
    add("--instance_prompt", help="caption of images without one, as in DreamBooth")
    add("--hub_token", help="token for the dataset; default: the one that `hf auth login` stored")
    add("--cache_dir", help="where downloads and remembered checks go, instead of the Hugging Face cache")
    add = parser.add_argument_group("as in training").add_argument
    add("--resolution", type=int, default=512, help="side of the square training images in pixels")
    add("--center_crop", **switch, help="crop the centre, not a random place")
    add("--random_flip", **switch, help="mirror half of the images, drawn anew each epoch")
    filters = [kind.name.lower() for kind in Image.Resampling]
    add("--image_interpolation_mode", default="lanczos", choices=filters, help="filter for resizing")
    add("--caption_dropout", type=float, default=0.0, help="share of captions replaced by the empty one")
    add("--max_train_samples", type=int, help="use so many images, drawn by the seed")
    add("--num_validation_samples", type=int, default=0, help="images held out of training to measure the loss on")
    add("--seed", type=int, default=0, help="seed of everything that is drawn at random")
    add("--epoch", type=int, default=0, help="pass over the images to show; the first is 0")
    add = parser.add_argument_group("sheet").add_argument
    add("--output", metavar="FILE.png", help="file to write")
    add("--overwrite", **switch, help="replace it if it exists")
    add("--num_images", type=int, default=20, help="images on the sheet at most")
    add("--columns", type=int, help="images in a row; default: by their number")
    add("--caption_lines", type=int, default=4, help="lines of a caption at most; the rest becomes an ellipsis")
    add("--font", metavar="FILE.ttf", help="font of the captions; default: DejaVu Sans, Arial or Pillow's own")
    add("--config", metavar="FILE.yaml", help="flags of this tool by name; the command line wins")
    return parse_words(parser, argv)


def parse_words(parser, argv):
    """Parses `argv` or the command line, after its `--config` as words, so that argparse checks that; expands `~`."""
    argv, words = sys.argv[1:] if argv is None else list(argv), []
    if replaced := [flag for word in argv if (flag := word.split("=")[0]) in REPLACED_FLAGS]:
        parser.error(f"{replaced[0]} is not taken: {REPLACED_FLAGS[replaced[0]]}")
    path, flags = parser.parse_known_args(argv)[0].config, vars(parser.parse_args([]))
    try:
        recipe = (yaml.safe_load(Path(os.path.expanduser(path)).read_text("utf-8")) if path else None) or {}
        recipe |= recipe.pop("training", None) or {}
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError) as error:
        parser.error(f"--config={path}: is no YAML file of flags ({' '.join(str(error).split())})")
    if unknown := sorted(map(str, recipe.keys() - (flags.keys() - {"config"}) - {"evaluation"})):
        parser.error(f"--config={path}: unknown key {', '.join(unknown)}; keys are the flags of --help without dashes")
    for key, value in [(key, value) for key, value in recipe.items() if key in flags and value is not None]:
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif isinstance(value, bool) and isinstance(flags[key], bool):
            words.append(f"--{'' if value else 'no-'}{key}")
        else:  # YAML reads a bare `no` as false, but --mixed_precision means the word
            words.append(f"--{key}={'no' if value is False else value}")
    return argparse.Namespace(**{name: os.path.expanduser(value) if isinstance(value, str) else value
                                 for name, value in vars(parser.parse_args(words + argv)).items()})


def check_args(args):
    """Raises one `InputError` that names every flag that is wrong, its value and the remedy."""
    problems = []
    if not args.dataset:
        problems.append("no dataset is given; name a folder, a local dataset or one on the Hub")
    for flag, least in (("resolution", 1), ("max_train_samples", 1), ("num_validation_samples", 0), ("seed", 0),
                        ("epoch", 0), ("num_images", 1), ("columns", 1), ("caption_lines", 1)):
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            problems.append(f"--{flag}={getattr(args, flag)}: give a whole number from {least}")
    if not 0 <= args.caption_dropout <= 1:
        problems.append(f"--caption_dropout={args.caption_dropout}: give a number from 0 to 1")
    if not (args.output or "").lower().endswith(".png"):
        problems.append(f"--output={args.output}: name a file that ends in .png")
    output = Path(args.output or "").resolve()
    place = next(parent for parent in output.parents if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        problems.append(f"--output={args.output}: cannot be written to; name a file elsewhere")
    elif output.exists() and args.output and (output.is_dir() or not args.overwrite):
        problems.append(f"--output={args.output}: exists; name another file, or add --overwrite to replace a file")
    if args.dataset and args.output and output.is_relative_to(Path(args.dataset).resolve()):
        problems.append(f"--output={args.output}: lies in the dataset, which stays as it is; put it elsewhere")
    if problems:
        raise InputError("\n  ".join(["", *problems] if len(problems) > 1 else problems))


# ------------------------------------------------------------------------------------------------------------ data
def read_folder(folder, caption_column):
    """Reads a folder into rows of `image` and `captions`, from metadata.jsonl or .csv or a .txt beside the image. What
    is missing gives a row too, so that the check names it. Raises `InputError` for what cannot be read as text."""
    folder, closed, columns = Path(os.path.abspath(folder)), [], set()
    files = sorted(Path(at, name) for at, below, names in os.walk(folder, onerror=closed.append)
                   for name in [*names, *(name for name in below if os.path.islink(Path(at, name)))])
    if closed:
        raise InputError(f"{closed[0].filename}: cannot be searched ({closed[0].strerror}); grant access")
    captions = {path: [] for path in files if path.suffix.lower() in IMAGE_SUFFIXES
                and not any(part.startswith(".") for part in path.relative_to(folder).parts)}
    metadata = [path for path in files if path.name in ("metadata.jsonl", "metadata.csv")]
    if not captions:
        raise InputError(f"the folder {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); name another")
    for path in metadata:
        number = 1
        try:
            text = path.read_text(encoding="utf-8-sig")
            rows = map(json.loads, filter(str.strip, text.split("\n")))  # JSON may hold other line ends
            for row in rows if path.suffix == ".jsonl" else csv.DictReader(io.StringIO(text), strict=True):
                file = Path(os.path.abspath(path.parent / row["file_name"]))
                captions.setdefault(file, []).extend(all_captions(row.get(caption_column)))
                if None in row:
                    raise ValueError("too many cells: put captions with commas in quotes")
                number, columns = number + 1, columns | row.keys()
        except (ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
            raise InputError(f"{path}: row {number} is not a file_name and a caption in UTF-8 ({error!r})") from None
    if metadata and caption_column not in columns:
        raise InputError(f"{metadata[0]}: has no {caption_column!r} but {sorted(columns)}; set --caption_column")
    for image in [image for image, found in captions.items() if not found]:
        beside = image.with_suffix(".txt")
        try:
            captions[image] += [beside.read_text("utf-8-sig").strip()] if beside.is_file() else []
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{beside}: cannot be read as UTF-8 ({last_line(error)}); convert or remove it") from None
    if aside := [path.name for path in sorted({*files} - {*captions, *metadata}) if path.suffix != ".txt"]:
        print(f"Left aside in {folder}: {len(aside)} files of other kinds, such as {', '.join(aside[:5])}.")
    if odd := [name for name in map(str, captions) if name != name.encode("utf-8", "replace").decode("utf-8")]:
        raise InputError(f"{odd[0]!a}: its name is not UTF-8; rename it")
    rows = [{"image": str(path), "captions": found} for path, found in sorted(captions.items())]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))


def read_dataset(name, config_name, image_column, caption_column, cache_dir, token, default_caption=None):
    """Loads the train split of a dataset as columns `image` (undecoded) and `captions`. Raises `InputError`."""
    # A local folder of image files is not for `datasets`, which drops images without a caption in silence.
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in Path(name).rglob("*")):
        if (config_name, image_column) != (None, "image"):
            raise InputError(f"--dataset_name={name}: holds images; drop --dataset_config_name and --image_column")
        return read_folder(name, caption_column)
    try:
        saved = Path(name, "state.json").is_file() and not config_name  # by save_to_disk
        dataset = datasets.load_from_disk(name) if saved else datasets.load_dataset(
            name, config_name, split="train", cache_dir=cache_dir, token=token)
        if default_caption and caption_column == "text" and "text" not in dataset.column_names:
            dataset = dataset.add_column(caption_column, [default_caption] * len(dataset))
        dataset = dataset.select_columns([image_column, caption_column])
        dataset = dataset.rename_columns({image_column: "image", caption_column: "captions"})
        return dataset.cast_column("image", datasets.Image(decode=False))
    except Exception as error:  # arrow has one for every pair of types
        raise InputError(f"--dataset_name={name}: cannot be loaded; check it, --dataset_config_name, --image_column="
                         f"{image_column} and --caption_column={caption_column} ({last_line(error)})") from None


def open_image(encoded):
    """Decodes an image to 8-bit sRGB as a viewer shows it: upright, by its colour profile, 16-bit greys scaled, alpha
    over white. Raises `OSError`, `ValueError` or `SyntaxError` if Pillow cannot read it to the end."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    profile = image.info.get("icc_profile") or b""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white")
    if image.mode.startswith("I"):  # Pillow would saturate 16-bit greys
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    mode = {"CMYK": "CMYK", "L": "L", "LA": "L"}.get(image.mode, "RGB")  # which the profile is for
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode)
    if profile and b"sRGB IEC61966" not in profile.replace(b"\0", b""):  # most name that, in letters of 1 or 2 bytes
        with contextlib.suppress(ImageCms.PyCMSError):  # a viewer, too, ignores a profile that does not fit
            image = ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), 0, "RGB")
    return image.convert("RGB")


def check_image(image, known):
    """Opens one image, unless `known` has it; returns a key, of path, size and time or of the content where a dataset
    holds it, and [sha256, width, height, what is wrong or ""]."""
    try:
        if encoded := image["bytes"]:
            key = hashlib.sha256(encoded).hexdigest()
        else:
            key = "{0}|{1.st_size}|{1.st_mtime_ns}".format(os.path.abspath(image["path"]), os.stat(image["path"]))
        if key in known:
            return key, known[key]
        encoded = encoded or Path(image["path"]).read_bytes()
        width, height = open_image(encoded).size
        tiny = f"{width} x {height} pixels; a side needs at least {MIN_SIDE}" if min(width, height) < MIN_SIDE else ""
        return key, [hashlib.sha256(encoded).hexdigest(), width, height, tiny]
    except Exception as error:  # damaged files raise whatever a decoder stumbles over
        known_as = {FileNotFoundError: "there is no such file", TypeError: "the row holds no image",
                    UnidentifiedImageError: "no image that Pillow knows"}
        return None, ["", 0, 0, known_as.get(type(error), f"cannot be read: {error}")]


def check_images(rows, memory):
    """Opens every image once, in parallel, and remembers `check_image`'s findings, which it returns, in the file
    `memory`. Of several processes the first one does it, the others read what it remembers."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{memory}.lock").acquire()
    except OSError as error:
        raise InputError(f"--cache_dir: {memory.parent} cannot be used ({error.strerror}); name another") from None
    with lock, ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
        known = {}
        with contextlib.suppress(OSError, ValueError):  # not there yet, or half written
            known = json.loads(memory.read_text(encoding="utf-8"))
        results = pool.map(lambda index: check_image(rows[index]["image"], known), range(len(rows)))
        results = list(tqdm(results, "Checking images", len(rows), unit="image", disable=None, leave=False))
        memory.write_text(json.dumps({**known, **{key: found for key, found in results if key}}), encoding="utf-8")
    return [found for _, found in results]


def all_captions(captions):
    """The usable captions of a row that holds a string or a list of them. Raises `ValueError` for half a character."""
    captions = captions if isinstance(captions, list) else [captions]
    return [caption for caption in captions if isinstance(caption, str) and caption.encode() and caption.strip()]


def last_line(error):
    """The last line of an exception's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def load_rows(dataset, dataset_config_name, image_column, caption_column, instance_prompt, hub_token, cache_dir,
              max_train_samples, num_validation_samples, seed, **_):
    """Reads the dataset and leaves out what training leaves out; returns the rows of the rest in the order of their
    index, and how many of all cannot be used. Raises `InputError`."""
    rows = read_dataset(dataset, dataset_config_name, image_column, caption_column, cache_dir, hub_token,
                        instance_prompt)
    captions = [all_captions(captions) or all_captions(instance_prompt) for captions in rows["captions"]]
    rows = rows.remove_columns("captions").add_column("captions", captions)
    rows = rows.select(np.sort(np.random.default_rng((seed, SUBSET)).permutation(len(rows))[:max_train_samples]))
    place = hashlib.sha256(os.path.abspath(dataset).encode()).hexdigest()[:16]
    memory = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "checked_images" / f"{place}.json"
    captions = rows["captions"]
    good = [index for index, found in enumerate(check_images(rows, memory)) if captions[index] and not found[3]]
    if num_validation_samples >= len(good):
        raise InputError(f"--num_validation_samples={num_validation_samples}: leaves none of the {len(good)} images "
                         "that can be used; tools/check_dataset.py tells what is wrong with others")
    order = np.random.default_rng(HELD_OUT).permutation(len(good))
    training = np.sort(order[num_validation_samples:])
    return rows.select([good[index] for index in training]), len(rows) - len(good)


def see(row, index, epoch, seed, resolution, center_crop, random_flip, image_interpolation_mode, caption_dropout, **_):
    """What training sees of a row in an epoch, as `CaptionedImages` in the scripts makes it: an image (resolution,
    resolution) and a caption. The draws and their order are the same. Raises `InputError`."""
    left, top, flip, choice, drop = np.random.default_rng((seed, SAMPLE, epoch, index)).random(5)
    place = (0.5, 0.5) if center_crop else (left, top)
    try:
        image = open_image(row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes())
    except Exception as error:  # as in check_image
        raise InputError(f"{row['image']['path'] or f'image {index}'}: has changed since the check, and cannot be "
                         f"read now ({last_line(error)}); start again") from None
    resample = Image.Resampling[image_interpolation_mode.upper()]
    image = ImageOps.fit(image, (resolution, resolution), resample, centering=place)
    if random_flip and flip < 0.5:
        image = ImageOps.mirror(image)
    captions = row["captions"]
    return image, "" if drop < caption_dropout else captions[int(choice * len(captions))]


# ----------------------------------------------------------------------------------------------------------- sheet
def load_font(path, size):
    """The font of a file, of the system, or Pillow's own. Raises `InputError`."""
    try:
        if path:
            return ImageFont.truetype(path, size)
    except OSError as error:
        raise InputError(f"--font={path}: is no font file that FreeType can read ({last_line(error)})") from None
    for name in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def missing_signs(font, captions):
    """The characters of the captions for which the font has no picture, each once and in order."""
    def picture(sign):
        mask = font.getmask(sign)
        return mask.size, bytes(mask)

    missing = picture("\U0010fffe")  # which no font has
    signs = dict.fromkeys(sign for caption in captions for sign in caption if not sign.isspace())
    return [sign for sign in signs if picture(sign) == missing]


def fitting(text, font, width):
    """How many of the first characters of a text are no wider than `width` pixels together."""
    return next((end - 1 for end in range(1, len(text) + 1) if font.getlength(text[:end]) > width), len(text))


def shorten(text, font, width):
    """The text, or its start and an ellipsis if it is wider than `width` pixels."""
    if fitting(text, font, width) == len(text):
        return text
    return f"{text[: fitting(text, font, width - font.getlength('...'))].rstrip()}..."


def wrap(text, font, width, max_lines):
    """Breaks a text into lines of at most `width` pixels, inside words where it must; "..." stands for the rest."""
    lines = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append(word)
        while len(lines) <= max_lines and len(lines[-1]) > 1 and font.getlength(lines[-1]) > width:
            fits = next(n for n in range(1, len(lines[-1])) if font.getlength(lines[-1][: n + 1]) > width)
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], f"{last.rstrip()}..."]
    return lines


def draw_sheet(seen, font_path, resolution, columns, caption_lines):
    """Draws (image, caption, name) of each cell: images in whole multiples of their size, so that every pixel shows as
    it is, below each its name and its caption, in cells that are as high as the highest of their row.

    Returns (sheet, the characters that the font lacks).
    """
    scale = max(1, math.ceil(MIN_CELL / resolution))
    width, columns = resolution * scale, min(columns or math.ceil(math.sqrt(len(seen) * 1.5)), len(seen))
    size = max(13, width // 24)
    font, small = load_font(font_path, size), load_font(font_path, size * 4 // 5)
    gap, line_height = size, sum(font.getmetrics()) + 2
    texts = [wrap(caption, font, width, caption_lines) or ["(empty caption)"] for _, caption, _ in seen]
    rows = [range(start, min(start + columns, len(seen))) for start in range(0, len(seen), columns)]
    heights = [width + line_height * (1 + max(len(texts[index]) for index in row)) + gap for row in rows]
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + sum(heights) + gap * (len(rows) - 1)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, y in zip(rows, np.cumsum([gap, *[height + gap for height in heights[:-1]]]).tolist()):
        for index in row:
            image, caption, name = seen[index]
            x, below = gap + (index - row[0]) * (width + gap), y + width + line_height // 4
            sheet.paste(image.resize((width, width), Image.Resampling.NEAREST), (x, y))
            draw.rectangle((x - 1, y - 1, x + width, y + width), outline=FRAME)  # white grounds have no edge
            draw.text((x, below), shorten(name[::-1], small, width)[::-1], FAINT, small)  # names differ at the end
            for number, line in enumerate(texts[index], 1):
                draw.text((x, below + number * line_height), line, INK if caption else FAINT, font)
    return sheet, missing_signs(font, [line for lines in texts for line in lines])


def save_whole(image, path):
    """Writes a PNG beside its place and renames it when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        image.save(unfinished, "PNG")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def main(argv=None):
    """Runs the tool; a mistake of the user's ends with status 2 and its message."""
    args = parse_args(argv)
    try:
        check_args(args)
        load_font(args.font, 16)
        rows, num_bad = load_rows(**vars(args))
        order = np.random.default_rng((args.seed, ORDER, args.epoch)).permutation(len(rows))[: args.num_images]
        seen = []
        for index in tqdm(order.tolist(), "Reading images", unit="image", disable=None, leave=False):
            image, caption = see(rows[index], index, **vars(args))
            seen.append((image, caption, Path(rows[index]["image"]["path"] or f"image {index}").name))
        sheet, lacking = draw_sheet(seen, args.font, args.resolution, args.columns, args.caption_lines)
        save_whole(sheet, Path(args.output))
    except (InputError, OSError) as error:
        print(f"{Path(__file__).name}: {error}".replace("--dataset_name=", "DATASET="), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    if lacking:
        print(f"The font has no picture of {''.join(lacking[:20])} and draws boxes; give another by --font.")
    if num_bad:
        print(f"Left out {num_bad} images that cannot be used; tools/check_dataset.py names them.")
    print(f"Wrote {args.output}: {len(seen)} of {len(rows)} images, as epoch {args.epoch} takes them.")


if __name__ == "__main__":
    main()
