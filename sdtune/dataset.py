"""Read captioned images from a folder or the Hub, check them, make samples to train on."""

import csv
import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import CLIPTokenizer

from sdtune.errors import InputError, last_line
from sdtune.images import (
    IMAGE_SUFFIXES,
    NO_CAPTION,
    check_images,
    is_image_file,
    leave_out,
    open_square,
    path_of_findings,
    read_content,
    still_readable,
)
from sdtune.models import load_tokenizer, read_latent_shape, read_num_timesteps
from sdtune.randomness import HELD_OUT, SAMPLE, SUBSET, random_numbers

METADATA_NAMES = {"metadata.jsonl", "metadata.csv"}


@dataclasses.dataclass
class CaptionedImages(torch.utils.data.Dataset):
    """Maps (epoch, index, weight) to these and pixel_values uint8 (3, height, width), input_ids (max_length,),
    timestep, and posterior_noise, noise, added_noise in float32 (4, height / 8, width / 8)."""

    rows: datasets.Dataset  # of image and captions
    tokenizer: CLIPTokenizer
    latent_shape: tuple
    num_timesteps: int
    seed: int
    resolution: int
    center_crop: bool
    random_flip: bool
    image_interpolation_mode: str
    caption_dropout: float
    noise_offset: float
    input_perturbation: float

    def __len__(self):
        return len(self.rows)

    def view(self, index, draw):
        """The image and the caption of a row as an epoch sees them; the first numbers of `draw` choose."""
        # All are drawn always and in this order: an option leaves the others' numbers alone.
        left, top, flip, choice, drop = draw.random(5)
        row = self.rows[index]
        place = (0.5, 0.5) if self.center_crop else (left, top)
        resample = Image.Resampling[self.image_interpolation_mode.upper()]
        with still_readable(name_of_row(row, index)):
            image = open_square(read_content(row["image"]), self.resolution, resample, place)
        if self.random_flip and flip < 0.5:
            image = ImageOps.mirror(image)
        caption = row["captions"][int(choice * len(row["captions"]))]
        return image, "" if drop < self.caption_dropout else caption

    def __getitem__(self, item):
        epoch, index, weight = item
        draw = random_numbers(self.seed, SAMPLE, epoch, index)
        image, caption = self.view(index, draw)
        timestep = draw.integers(self.num_timesteps)
        posterior_noise, noise, perturbation = draw.standard_normal((3, *self.latent_shape), np.float32)
        # The offset shifts whole channels; perturbation (arXiv 2301.11706, eq. 3) is added and not to be predicted.
        noise = noise + self.noise_offset * draw.standard_normal((len(noise), 1, 1), np.float32)
        input_ids = self.tokenizer(caption, padding="max_length", truncation=True, return_tensors="np").input_ids[0]
        return {
            "epoch": epoch,
            "index": index,
            "weight": np.float32(weight),
            "pixel_values": np.array(image).transpose(2, 0, 1),
            "input_ids": input_ids,
            "timestep": timestep,
            "posterior_noise": posterior_noise,
            "noise": noise,
            "added_noise": noise + self.input_perturbation * perturbation,
        }


def check_data(args, folder_flag):
    """Lists what is wrong with where the images are; `folder_flag` names the flag for a folder."""
    problems, folder = [], getattr(args, folder_flag)
    source = folder or args.dataset_name
    if bool(args.dataset_name) == bool(folder):
        problems.append(f"--{folder_flag}={folder}: give this or --dataset_name, not both")
    if args.image_column != "image" and not args.dataset_name:
        problems.append(
            f"--image_column={args.image_column}: does nothing without --dataset_name; add that or drop this"
        )
    if folder and not os.path.isdir(folder):
        problems.append(f"--{folder_flag}={folder}: does not exist, or is no folder")
    if source and Path(args.output_dir).resolve().is_relative_to(Path(source).resolve()):
        problems.append(
            f"--output_dir={args.output_dir}: lies in the folder of the images, or below its name; put it elsewhere"
        )
    return problems


def load_data(args, folder, default_caption=None, repeats=1):
    """Reads, checks and splits the images in `folder`, or else those of --dataset_name; returns (training images,
    held-out images, fingerprint of both). The held-out ones are the same for every seed, and always seen alike.
    `default_caption` is that of images without. Raises `InputError`."""
    tokenizer = load_tokenizer(args)
    rows, digests = load_rows(args, tokenizer, folder, default_caption, args.max_train_samples)
    training, held_out = split_rows(len(rows), args.num_validation_samples)
    images = CaptionedImages(
        rows=rows.select(np.repeat(training, repeats)),
        tokenizer=tokenizer,
        latent_shape=read_latent_shape(args),
        num_timesteps=read_num_timesteps(args),
        seed=args.seed,
        resolution=args.resolution,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        image_interpolation_mode=args.image_interpolation_mode,
        caption_dropout=args.caption_dropout,
        noise_offset=args.noise_offset,
        input_perturbation=args.input_perturbation,
    )
    fingerprint = fingerprint_of(args.num_validation_samples, digests)
    return images, seen_alike(images, rows.select(held_out)), fingerprint


def seen_alike(images, rows):
    """The images of other rows, with nothing about them that changes from epoch to epoch or with the seed."""
    return dataclasses.replace(
        images,
        rows=rows,
        seed=0,
        center_crop=True,
        random_flip=False,
        caption_dropout=0,
        noise_offset=0,
        input_perturbation=0,
    )


def load_rows(args, tokenizer, folder, default_caption, max_samples=None):
    """Reads and checks the images in `folder`, or else those of --dataset_name, or so many of them; returns the good
    rows and a digest of each. Raises `InputError`."""
    rows = choose_rows(read_rows(args, folder, default_caption), max_samples, args.seed)
    memory = path_of_findings(folder or args.dataset_name, args.cache_dir)
    return check_rows(rows, memory, args.skip_bad_images, tokenizer, args.resolution)


def fingerprint_of(num_held_out, digests):
    """A digest of all images and captions, and of how they are split."""
    return hashlib.sha256(" ".join([f"{num_held_out}", *digests]).encode()).hexdigest()


def read_rows(args, folder, default_caption):
    """Reads a folder, or else --dataset_name, as columns `image` (undecoded) and `captions` (a list that is empty
    where there is none). Raises `InputError`."""
    if folder:
        rows = read_folder(folder, args.caption_column)
    else:
        rows = read_dataset(args, args.dataset_name, default_caption)
    captions = [all_captions(found) or all_captions(default_caption) for found in rows["captions"]]
    return rows.remove_columns("captions").add_column("captions", captions)


def choose_rows(rows, max_samples, seed):
    """At most so many of the rows, drawn by the seed, in their order; all of them for None."""
    order = random_numbers(seed, SUBSET).permutation(len(rows))
    return rows.select(np.sort(order[:max_samples]))


def split_rows(num_rows, num_held_out):
    """The indices of the rows to train on and of those held out, which no seed changes. Raises `InputError`."""
    if num_held_out >= num_rows:
        raise InputError(f"--num_validation_samples={num_held_out}: must leave some of {num_rows} images")
    order = np.random.default_rng(HELD_OUT).permutation(num_rows)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def read_folder(folder, caption_column):
    """Reads a folder into rows of `image` and `captions`, from metadata.jsonl or .csv or a .txt beside the image. What
    is missing gives a row too, so that the check names it. Raises `InputError` for what cannot be read as text."""
    folder = Path(os.path.abspath(folder))
    files = list_files(folder)
    captions = {path: [] for path in files if is_image_file(path, folder)}
    metadata = [path for path in files if path.name in METADATA_NAMES]
    if not captions:
        raise InputError(f"the folder {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); name another")
    columns = set()
    for path in metadata:
        for row in read_metadata(path, caption_column):
            captions.setdefault(row["file"], []).extend(row["captions"])
            columns |= row["columns"]
    if metadata and caption_column not in columns:
        raise InputError(f"{metadata[0]}: has no {caption_column!r} but {sorted(columns)}; set --caption_column")
    for image in [image for image, found in captions.items() if not found]:
        captions[image] += read_caption_beside(image)
    known = {*captions, *metadata}
    if aside := [path.name for path in files if path not in known and path.suffix != ".txt"]:
        print(f"Left aside in {folder}: {len(aside)} files of other kinds, such as {', '.join(aside[:5])}.")
    names = [str(path) for path in captions]
    if odd := [name for name in names if name != name.encode("utf-8", "replace").decode("utf-8")]:
        raise InputError(f"{odd[0]!a}: its name is not UTF-8; rename it, or if it is, set PYTHONUTF8=1")
    rows = [{"image": str(path), "captions": found} for path, found in sorted(captions.items())]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))


def list_files(folder):
    """The files in a folder and below it, sorted; linked folders are listed, not entered. Raises `InputError`."""
    closed, files = [], []
    for place, below, names in os.walk(folder, onerror=closed.append):
        links = [name for name in below if os.path.islink(Path(place, name))]
        files += [Path(place, name) for name in [*names, *links]]
    if closed:
        raise InputError(f"{closed[0].filename}: cannot be searched ({closed[0].strerror}); grant access")
    return sorted(files)


def read_metadata(path, caption_column):
    """Yields of each row of a metadata.jsonl or .csv the image's absolute path, its captions, the columns' names and
    the row itself, as `file`, `captions`, `columns` and `row`. Raises `InputError`, which names the row."""
    number = 1
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":  # lines end by a line feed alone: JSON may hold other line ends
            rows = map(json.loads, filter(str.strip, text.split("\n")))
        else:
            rows = csv.DictReader(io.StringIO(text), strict=True)
        for row in rows:
            file = Path(os.path.abspath(path.parent / row["file_name"]))
            captions = all_captions(row.get(caption_column))
            if None in row:
                raise ValueError("too many cells: put captions with commas in quotes")
            yield {"file": file, "captions": captions, "columns": row.keys(), "row": row}
            number += 1
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        raise InputError(f"{path}: row {number} is not a file_name and a caption in UTF-8 ({error!r})") from None


def read_caption_beside(image):
    """The caption in the .txt beside an image, as a list that is empty if there is none. Raises `InputError`."""
    beside = image.with_suffix(".txt")
    try:
        return [beside.read_text("utf-8-sig").strip()] if beside.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{beside}: cannot be read as UTF-8 ({last_line(error)}); convert or remove it") from None


def all_captions(captions):
    """The usable captions of a row that holds a string or a list of them. Raises `ValueError` for half a character."""
    captions = captions if isinstance(captions, list) else [captions]
    return [caption for caption in captions if isinstance(caption, str) and caption.encode() and caption.strip()]


def read_dataset(args, name, default_caption=None):
    """Loads the train split of a dataset, on the Hub or local, as columns `image` (undecoded) and `captions`; `args`
    name its columns and configuration. Raises `InputError`."""
    # A local folder of image files is not for `datasets`, which drops images without a caption in silence.
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in Path(name).rglob("*")):
        if (args.dataset_config_name, args.image_column) != (None, "image"):
            raise InputError(f"--dataset_name={name}: holds images; drop --dataset_config_name and --image_column")
        return read_folder(name, args.caption_column)
    image_column, caption_column = args.image_column, args.caption_column
    try:
        if Path(name, "state.json").is_file() and not args.dataset_config_name:  # by save_to_disk
            dataset = datasets.load_from_disk(name)
        else:
            dataset = datasets.load_dataset(
                name, args.dataset_config_name, split="train", cache_dir=args.cache_dir, token=args.hub_token
            )
        if default_caption and caption_column == "text" and "text" not in dataset.column_names:
            dataset = dataset.add_column(caption_column, [default_caption] * len(dataset))
        dataset = dataset.select_columns([image_column, caption_column])
        dataset = dataset.rename_columns({image_column: "image", caption_column: "captions"})
        return dataset.cast_column("image", datasets.Image(decode=False))
    except Exception as error:  # arrow has one for every pair of types
        raise InputError(
            f"--dataset_name={name}: cannot be loaded; check it, --dataset_config_name, --image_column={image_column} "
            f"and --caption_column={caption_column} ({last_line(error)})"
        ) from None


def check_rows(rows, memory, skip_bad_images, tokenizer, resolution):
    """Checks every image and caption; returns the good rows and a digest of each one's content and captions. Raises
    one `InputError` for all others, unless `skip_bad_images`; warns of small images and of captions that are cut."""
    bad, small, cut, digests = [], [], [], {}
    captions = list(rows["captions"])
    for index, (digest, width, height, problem) in enumerate(check_images(rows, memory)):
        if not problem and not captions[index]:
            problem = NO_CAPTION
        if problem:
            bad.append(f"{name_of(rows, index)}: {problem}")
            continue
        if min(width, height) < resolution:
            small.append(f"{name_of(rows, index)}: {width} x {height}")
        num_tokens = max(map(len, tokenizer(captions[index], verbose=False).input_ids))
        if num_tokens > tokenizer.model_max_length:
            cut.append(f"{max(captions[index], key=len)[:80]}...")
        digests[index] = hashlib.sha256(json.dumps([digest, captions[index]]).encode()).hexdigest()

    leave_out(bad, len(rows), may_leave_out=skip_bad_images and bool(digests))
    warn(f"images are smaller than --resolution={resolution} and are enlarged", small)
    warn(f"captions have more than {tokenizer.model_max_length} tokens and are cut", cut)
    return rows.select(list(digests)), list(digests.values())


def name_of(rows, index):
    """What a row's image is called: its path, or the row's number where a dataset holds the image itself."""
    return name_of_row(rows[index], index)


def name_of_row(row, index):
    """What a row is called: the path of its image, or its number where a dataset holds the image itself."""
    return (row["image"] or {}).get("path") or f"row {index}"


def warn(what, found):
    """Warns of what was found, by number and the first five."""
    if found:
        print("\n  ".join([f"Warning: {len(found)} {what}, such as", *found[:5]]))
