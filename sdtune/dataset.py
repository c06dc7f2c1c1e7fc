"""Read captioned images from a folder or the Hub, check them, make samples to train on."""

import csv
import dataclasses
import glob
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path, PureWindowsPath

import datasets
import numpy as np
import torch
from huggingface_hub import DatasetCard
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image, ImageOps

from sdtune.arguments import nearest_beside, noise_offset_of
from sdtune.entries import Cache, path_of_caption, path_of_image, read_whole_entry
from sdtune.errors import InputError, counted, in_one_line, is_utf8, last_line, remedy_for_missing
from sdtune.files import read_json
from sdtune.images import (
    FOREIGN_SUFFIXES,
    IMAGE_SUFFIXES,
    NO_CAPTION,
    check_images,
    is_hidden,
    is_image_file,
    leave_out,
    open_fitted,
    path_of_findings,
    read_content,
    still_readable,
)
from sdtune.models import load_tokenizer, read_latent_layout, read_num_timesteps
from sdtune.randomness import HELD_OUT, SAMPLE, SUBSET, random_numbers
from sdtune.shards import (
    ROW_FEATURES,
    ROW_FORMAT,
    all_captions,
    check_columns,
    find_broken,
    read_tars,
    without_empty,
)

MAX_CAPTION_BYTES = 2**20  # of a .txt; a tokenizer takes a few hundred
METADATA_NAMES = {"metadata.jsonl", "metadata.csv"}
SAVED_NAMES = {"state.json", "dataset_dict.json"}  # that tell of `save_to_disk`
NO_DATA_NAMES = {*METADATA_NAMES, *SAVED_NAMES, "config.json", "dataset_info.json", "dataset_infos.json"}
SHARDS = "webdataset"  # tar files in which the files of a sample have a name in common
DATA_KINDS = {  # of files that `datasets` loads, by what it calls them; those that hold images come first
    ".tar": SHARDS,
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
SPLITS = {  # what folders of a split are called, as `datasets` has it
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


@dataclasses.dataclass
class CheckedRows:
    """Images that were checked, with their captions, and what is known of them."""

    rows: datasets.Dataset  # of image and captions
    digests: list  # of content and captions
    contents: np.ndarray  # (rows,), SHA-256 of each file
    sizes: np.ndarray  # (rows, 2), width and height in pixels


@dataclasses.dataclass
class CaptionedImages(torch.utils.data.Dataset):
    """Maps (epoch, index, weight) to these and is_mirrored, input_ids (max_length,), timestep, and posterior_noise,
    noise, added_noise in float32 (4, height / 8, width / 8), and with `reads_pixels` to pixel_values uint8 (3, height,
    width). What is in the `cache` comes too: mean and log_variance, of that shape, and prompt_embeds (max_length,
    channels)."""

    rows: datasets.Dataset  # of image, where that is read, and captions
    contents: np.ndarray  # (rows,), SHA-256 of each image's file
    sizes: np.ndarray  # (rows, 2), width and height in pixels to which each image is scaled and cropped
    tokenizer: Callable  # a CLIPTokenizer
    latent_channels: int
    pixels_per_latent: int  # along one side
    num_timesteps: int
    seed: int
    center_crop: bool
    random_flip: bool
    image_interpolation_mode: str
    caption_dropout: float
    noise_offset: float
    input_perturbation: float
    reads_pixels: bool = True
    picture_sizes: np.ndarray | None = None  # (rows, 2), before that, where it is known
    cache: Cache | None = None

    def __len__(self):
        return len(self.rows)

    def latent_shape(self, index):
        """The shape of the latents of a row."""
        width, height = (self.sizes[index] // self.pixels_per_latent).tolist()
        return self.latent_channels, height, width

    def choose(self, row, draw):
        """How an epoch sees a row, by the first numbers of `draw`: the place of the crop, whether it is mirrored, and
        the caption."""
        # All are drawn always and in this order: an option leaves the others' numbers alone.
        left, top, flip, choice, drop = draw.random(5)
        place = (0.5, 0.5) if self.center_crop else (left, top)
        caption = row["captions"][int(choice * len(row["captions"]))]
        return place, self.random_flip and flip < 0.5, "" if drop < self.caption_dropout else caption

    def open(self, index, row, place, is_mirrored):
        """The image of a row, scaled and cropped. Raises `InputError`."""
        with still_readable(name_of_row(row, index)):
            return self.fit(index, row, place, is_mirrored)

    def fit(self, index, row, place, is_mirrored):
        """As `open`. Raises whatever a decoder stumbles over."""
        width, height = self.sizes[index].tolist()
        resample = Image.Resampling[self.image_interpolation_mode.upper()]
        image = open_fitted(read_content(row["image"]), (width, height), resample, place)
        return ImageOps.mirror(image) if is_mirrored else image

    def draw_sample(self, index, row, draw):
        """What a sample of a row has beside pixels, by the numbers of `draw`; returns that and the place of the
        crop."""
        place, is_mirrored, caption = self.choose(row, draw)
        timestep = draw.integers(self.num_timesteps)
        latent_shape = self.latent_shape(index)
        posterior_noise, noise, perturbation = draw.standard_normal((3, *latent_shape), np.float32)
        # The offset shifts whole channels; perturbation (arXiv 2301.11706, eq. 3) is added and not to be predicted.
        noise = noise + self.noise_offset * draw.standard_normal((len(noise), 1, 1), np.float32)
        input_ids = self.tokenizer(caption, padding="max_length", truncation=True, return_tensors="np").input_ids[0]
        sample = {
            "is_mirrored": is_mirrored,
            "input_ids": input_ids,
            "timestep": timestep,
            "posterior_noise": posterior_noise,
            "noise": noise,
            "added_noise": noise + self.input_perturbation * perturbation,
        }
        return sample, place

    def __getitem__(self, item):
        epoch, index, weight = item
        row = self.rows[index]
        sample, place = self.draw_sample(index, row, random_numbers(self.seed, SAMPLE, epoch, index))
        sample |= {"epoch": epoch, "index": index, "weight": np.float32(weight)}
        is_mirrored, input_ids, latent_shape = sample["is_mirrored"], sample["input_ids"], sample["noise"].shape
        if self.reads_pixels:
            sample["pixel_values"] = np.array(self.open(index, row, place, is_mirrored)).transpose(2, 0, 1)
        if self.cache and self.cache.images:
            path = path_of_image(self.cache, self.contents[index], *self.sizes[index], is_mirrored)
            sample |= read_whole_entry(path, {"mean": latent_shape, "log_variance": latent_shape})
        if self.cache and self.cache.captions:
            path = path_of_caption(self.cache, input_ids)
            sample |= read_whole_entry(path, {"prompt_embeds": (len(input_ids), self.cache.prompt_channels)})
        return sample


def check_data(args, folder_flag):
    """Lists what is wrong with where the images are; `folder_flag` names the flag for a folder."""
    problems, folder = [], getattr(args, folder_flag)
    source = folder or args.dataset_name
    if not source:
        problems.append(f"--{folder_flag} is missing: give a folder of images, or a dataset by --dataset_name")
    if args.dataset_name and folder:
        problems.append(f"--{folder_flag}={folder}: give this or --dataset_name, not both")
    if args.image_column != "image" and not args.dataset_name:
        problems.append(
            f"--image_column={args.image_column}: does nothing without --dataset_name; add that or drop this"
        )
    if folder and not os.path.isdir(folder):
        remedy = remedy_for_missing(folder) or "name one"
        problems.append(f"--{folder_flag}={folder}: does not exist, or is no folder{nearest_beside(folder)}; {remedy}")
    if source and Path(args.output_dir).resolve().is_relative_to(Path(source).resolve()):
        problems.append(
            f"--output_dir={args.output_dir}: lies in the folder of the images, or below its name; put it elsewhere"
        )
    return problems


def load_data(args, folder, default_caption=None, repeats=1, fit=None):
    """Reads, checks and splits the images in `folder`, or else those of --dataset_name; returns (training images,
    held-out images, fingerprint of both). The held-out ones are the same for every seed, and always seen alike.
    `default_caption` is that of images without. `fit` gives, for the sizes of pictures (rows, 2), those to which they
    are scaled and their centres cropped; by default these are squares. Raises `InputError`."""
    tokenizer = load_tokenizer(args)
    checked = load_rows(args, tokenizer, folder, default_caption, args.max_train_samples, fit)
    training, held_out = split_rows(len(checked.rows), args.num_validation_samples)
    training = np.repeat(training, repeats)
    sizes = fit(checked.sizes) if fit else np.full((len(checked.rows), 2), args.resolution)
    latent_channels, pixels_per_latent = read_latent_layout(args)
    images = CaptionedImages(
        rows=checked.rows.select(training),
        contents=checked.contents[training],
        sizes=sizes[training],
        tokenizer=tokenizer,
        latent_channels=latent_channels,
        pixels_per_latent=pixels_per_latent,
        num_timesteps=read_num_timesteps(args),
        seed=args.seed,
        center_crop=args.center_crop or fit is not None,
        random_flip=args.random_flip,
        image_interpolation_mode=args.image_interpolation_mode,
        caption_dropout=args.caption_dropout,
        noise_offset=noise_offset_of(args),
        input_perturbation=args.input_perturbation,
        picture_sizes=checked.sizes[training],
    )
    fingerprint = fingerprint_of(args.num_validation_samples, checked.digests)
    others = dataclasses.replace(
        images,
        rows=checked.rows.select(held_out),
        contents=checked.contents[held_out],
        sizes=sizes[held_out],
        picture_sizes=checked.sizes[held_out],
    )
    return images, seen_alike(others), fingerprint


def seen_alike(images):
    """The images, with nothing about them that changes from epoch to epoch or with the seed."""
    return dataclasses.replace(
        images,
        seed=0,
        center_crop=True,
        random_flip=False,
        caption_dropout=0,
        noise_offset=0,
        input_perturbation=0,
    )


def unopened(images):
    """The images, whose files are not read any more; what a sample draws stays as it is."""
    return dataclasses.replace(images, rows=images.rows.select_columns("captions"), reads_pixels=False)


def load_rows(args, tokenizer, folder, default_caption, max_samples=None, fit=None):
    """Reads and checks the images in `folder`, or else those of --dataset_name, or so many of them; returns the good
    ones. `fit` as in `load_data`. Raises `InputError`."""
    rows = choose_rows(read_rows(args, folder, default_caption), max_samples, args.seed)
    memory = path_of_findings(folder or args.dataset_name, args.cache_dir)
    return check_rows(rows, memory, args.skip_bad_images, tokenizer, args.resolution, fit)


def fingerprint_of(num_held_out, digests):
    """A digest of all images and captions, and of how they are split."""
    return hashlib.sha256(" ".join([f"{num_held_out}", *digests]).encode()).hexdigest()


def read_rows(args, folder, default_caption):
    """Reads a folder, or else --dataset_name, as columns `image` (undecoded) and `captions` (a list that is empty
    where there is none). Raises `InputError`."""
    if folder:
        rows = read_folder(folder, args.caption_column, follows_links=args.follow_symlinks)
    else:
        rows = read_dataset(args, args.dataset_name, default_caption)
    captions = []
    for index, found in enumerate(rows["captions"]):
        try:
            captions.append(all_captions(found) or all_captions(default_caption))
        except ValueError as error:
            raise InputError(f"{folder or args.dataset_name}: row {index}: {error}") from None
    return rows.remove_columns("captions").add_column("captions", captions)


def choose_rows(rows, max_samples, seed):
    """At most so many of the rows, drawn by the seed, in their order; all of them for None."""
    order = random_numbers(seed, SUBSET).permutation(len(rows))
    return rows.select(np.sort(order[:max_samples]))


def split_rows(num_rows, num_held_out):
    """The indices of the rows to train on and of those held out, which no seed changes. Raises `InputError`."""
    if num_held_out >= num_rows:
        raise InputError(
            f"--num_validation_samples={num_held_out}: must leave some of {counted(num_rows, 'image')}; use fewer"
        )
    order = np.random.default_rng(HELD_OUT).permutation(num_rows)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def read_folder(folder, caption_column, takes_train=False, follows_links=False):
    """Reads a folder into rows of `image` and `captions`, from metadata.jsonl or .csv or a .txt beside the image. What
    is missing gives a row too, so that the check names it. Where a .txt cannot be read as text there is a column
    `problem` too, which says so. With `takes_train` a folder of that name in it is read alone. Raises `InputError` for
    metadata that cannot be read as text, and unless it `follows_links` for links that lead out of the folder."""
    folder = Path(os.path.abspath(folder))
    files = list_files(folder)
    captions = {path: [] for path in files if is_image_file(path, folder)}
    metadata = [path for path in files if path.name in METADATA_NAMES]
    if not captions:
        tables = [path.name for path in files if path.suffix.lower() in (".parquet", ".arrow", ".tar")]
        more = f", or its {in_one_line(tables[0])} by --dataset_name={folder}" if tables else ""
        raise InputError(tell_no_images(folder, files) + more)
    texts = texts_by_name(files)
    used = {*captions, *metadata, *[text_beside(image, texts) for image in captions]}
    check_links([path for path in files if path in used], folder, follows_links)
    columns = set()
    for path in metadata:
        for row in read_metadata(path, caption_column, folder, follows_links):
            captions.setdefault(row["file"], []).extend(row["captions"])
            columns |= row["columns"]
    if metadata and caption_column not in columns:
        raise InputError(f"{metadata[0]}: has no {caption_column!r} but {sorted(columns)}; set --caption_column")
    without = [image for image, found in captions.items() if not found]
    beside = {image: text_beside(image, texts) for image in captions}  # of images that metadata names, too
    check_links([beside[image] for image in without if beside[image] not in used], folder, follows_links)
    problems = {}
    for image in without:
        found, problems[image] = read_caption(beside[image])
        captions[image] += found
    tell_left_aside(folder, files, {*captions, *metadata, *beside.values()})
    captions = {image: captions[image] for image in of_split(captions, folder, takes_train)}
    names = [str(path) for path in captions]
    if odd := [name for name in names if not is_utf8(name)]:
        raise InputError(f"{odd[0]!a}: its name is not UTF-8; rename it, or if it is, set PYTHONUTF8=1")
    rows = [{"image": str(path), "captions": found} for path, found in sorted(captions.items())]
    if any(problems.values()):
        rows = [{**row, "problem": problems.get(Path(row["image"]))} for row in rows]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))


def tell_left_aside(folder, files, known):
    """Prints which of the files in a folder, but for hidden ones, are not among those that are `known`, and so not
    used."""
    aside = [path for path in files if path not in known and not is_hidden(path, folder)]
    if foreign := foreign_pictures(aside, folder):
        print(f"Left aside in {folder}: {tell_foreign_pictures(foreign)}.")
    if texts := [path for path in aside if path.suffix.lower() == ".txt"]:
        meant = [path for path in texts if path.with_suffix("") in known]  # such as a.png.txt
        some = in_one_line((meant or texts)[0].name)
        remedy = f"; call it {in_one_line(Path(meant[0].stem).with_suffix('.txt'))}" if meant else ""
        print(f"Left aside in {folder}: {len(texts):,} .txt without a picture of that name, such as {some}{remedy}.")
    told = {*foreign, *texts}
    if others := [path.name for path in aside if path not in told]:
        some = in_one_line(", ".join(others[:5]))
        print(f"Left aside in {folder}: {counted(len(others), 'file')} of other kinds, such as {some}.")


def tell_no_images(folder, files):
    """Why a folder with these files cannot be trained on, which holds no images."""
    if foreign := foreign_pictures(files, folder):
        return f"the folder {folder} holds no images but {tell_foreign_pictures(foreign)}"
    return f"the folder {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); name another"


def foreign_pictures(files, folder):
    """Of some files in a folder the pictures of a kind that is not read, but for hidden ones."""
    return [path for path in files if path.suffix.lower() in FOREIGN_SUFFIXES and not is_hidden(path, folder)]


def tell_foreign_pictures(pictures):
    """What is to be done with pictures of a kind that is not read."""
    kinds = ", ".join(sorted({path.suffix.lower()[1:].upper() for path in pictures}))
    name = in_one_line(pictures[0].name)
    return f"{len(pictures):,} of a kind that is not read ({kinds}), such as {name}; convert to JPEG or PNG first"


def check_links(files, folder, follows_links):
    """Warns of files that are links out of the folder, if it `follows_links`: their owner may have made them on
    purpose. Raises `InputError` otherwise: somebody else's dataset could have private files trained on by them."""
    places, parents = places_of(folder), {}
    links = [str(path) for path in files if path.is_symlink() and not is_inside(path, places, parents)]
    if follows_links:
        warn(
            "picture, caption or data file is a link that leads out of the folder, and is used",
            "pictures, captions or data files are links that lead out of the folder, and are used",
            links,
        )
    elif links:
        some = "\n  ".join(["", *map(in_one_line, links[:5])])
        number = counted(len(links), "file in it is a link that leads", "files in it are links that lead")
        raise InputError(
            f"{folder}: {number} out of it, such as{some}\n"
            "Copy what they lead to, or add --follow_symlinks if you trust whoever made them."
        )


def check_data_files(data_files, folder, follows_links):
    """Raises `InputError` if data files in a folder lead out of it, but for those that are followed, or are no files:
    for a pipe a reader would wait."""
    check_links(data_files, folder, follows_links)
    if odd := [path for path in data_files if not path.is_file()]:
        raise InputError(f"{in_one_line(odd[0])}: is no regular file; remove it")


def places_of(folder):
    """The folders, links resolved, in which the files of a dataset's folder may lie: itself, and in the Hub's cache,
    where a snapshot is all links, the common place of the contents of that dataset."""
    real = Path(os.path.realpath(folder))
    places = [str(real)]
    for place in (real, *real.parents):
        blobs = place.parent.parent / "blobs"
        if place.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            places.append(str(blobs))
    return places


def is_inside(path, places, parents):
    """Whether a path lies in one of the `places`, links resolved; `parents` remembers those of folders."""
    folder, name = os.path.split(os.path.abspath(path))
    if folder not in parents:
        parents[folder] = os.path.realpath(folder)
    real = os.path.join(parents[folder], name)
    if os.path.islink(real):
        real = os.path.realpath(real)
    return any(Path(real).is_relative_to(place) for place in places)


def of_split(images, folder, takes_train):
    """Of the images below a folder those to train on: with `takes_train` those in folders named train, if there are
    any; else all, with a warning of folders whose names say that they are for something else."""
    splits = {image: split_of(image, folder) for image in images}
    aside = [image for image, split in splits.items() if split != "train"]
    if takes_train and aside and "train" in splits.values():
        number = counted(len(aside), "image that is", "images that are")
        print(f"Left aside in {folder}: {number} not in its train folder, as a dataset's.")
        return [image for image, split in splits.items() if split == "train"]
    held_out = [image for image, split in splits.items() if split in ("validation", "test")]
    if held_out and len(held_out) < len(splits):
        places = sorted({f"{os.path.relpath(image.parent, folder)}{os.sep}" for image in held_out})
        named = "named for validation or tests"
        warn(
            f"image is trained on although its folder is {named}",
            f"images are trained on although their folders are {named}",
            places,
            len(held_out),
        )
    return list(images)


def split_of(image, folder):
    """The split for which a folder between `folder` and an image is named, or None."""
    named = [SPLITS[part.lower()] for part in Path(os.path.relpath(image, folder)).parts if part.lower() in SPLITS]
    return named[0] if named else None


def list_files(folder):
    """The files in a folder and below it, sorted; hidden folders are left out, and linked ones listed, not entered.
    Raises `InputError`."""
    closed, files = [], []
    for place, below, names in os.walk(folder, onerror=closed.append):
        below[:] = [name for name in below if not name.startswith(".")]
        links = [name for name in below if os.path.islink(Path(place, name))]
        files += [Path(place, name) for name in [*names, *links]]
    if closed:
        raise InputError(f"{closed[0].filename}: cannot be searched ({closed[0].strerror}); grant access")
    return sorted(files)


def read_metadata(path, caption_column, folder, follows_links=False):
    """Yields of each row of a metadata.jsonl or .csv in `folder` the image's absolute path, its captions, the columns'
    names and the row itself, as `file`, `captions`, `columns` and `row`. Raises `InputError`, which names the row."""
    number, places, parents = 1, places_of(folder), {}
    if not path.is_file():  # but a broken link, or a pipe, for which a reader would wait
        raise InputError(f"{path}: is no regular file; remove it")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":  # lines end by a line feed alone: JSON may hold other line ends
            rows = map(json.loads, filter(str.strip, text.split("\n")))
        else:
            rows = csv.DictReader(io.StringIO(text), strict=True)
        for row in rows:
            if isinstance(row, dict) and "file_name" not in row:
                names = in_one_line(", ".join(map(str, row)))[:80]
                raise InputError(f"has no column file_name but {names}; name it so, and part columns by commas")
            file = locate(row["file_name"], path, folder, follows_links, places, parents)
            captions = all_captions(row.get(caption_column))
            if None in row:
                raise ValueError("too many cells: put captions with commas in quotes")
            yield {"file": file, "captions": captions, "columns": row.keys(), "row": row}
            number += 1
    except InputError as error:
        raise InputError(f"{path}: row {number}: {error}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, csv.Error) as error:
        told = f"row {number} is not a file_name and a caption in UTF-8 ({error!r}); mend it"
        raise InputError(f"{path}: {told}") from None


def locate(file_name, metadata, folder, follows_links, places, parents):
    """The absolute path of a file that a file of metadata names. Raises `InputError` for one that is not in one of the
    `places`: somebody else's dataset could have private pictures trained on, and shown to others."""
    file = Path(os.path.abspath(metadata.parent / file_name))
    is_foreign = os.name != "nt" and PureWindowsPath(file_name).is_absolute()
    is_below = file.is_relative_to(folder)
    if is_foreign or not (is_inside(file, places, parents) or (is_below and follows_links)):
        told = f"the file_name {file_name!r} leads out of {folder}"
        remedy = ", by a link; copy the image, or add --follow_symlinks" if is_below else "; copy the image into that"
        raise InputError(told + ("; copy the image into that" if is_foreign else remedy))
    if "\\" in file_name and not file.exists():
        slashes = file_name.replace("\\", "/")
        if (metadata.parent / slashes).exists():
            raise InputError(f"the file_name {file_name!r} names no file; write it with slashes, {slashes!r}")
    return file


def texts_by_name(files):
    """{path without its suffix: path} of the .txt among some files, of which .txt goes before .TXT."""
    return {path.with_suffix(""): path for path in sorted(files) if path.suffix.lower() == ".txt"}


def text_beside(image, texts):
    """The path of the .txt beside an image, one of `texts_by_name`, or that of one which is not there."""
    return texts.get(image.with_suffix(""), image.with_suffix(".txt"))


def read_caption(beside):
    """The caption in the .txt beside an image, as a list that is empty if there is none; and what is wrong with it, or
    None."""
    if not beside.is_file():
        return [], None
    if beside.stat().st_size > MAX_CAPTION_BYTES:
        return [], f"its caption, a .txt, has more than {MAX_CAPTION_BYTES:,} bytes; shorten or remove it"
    try:
        return [beside.read_text("utf-8-sig").strip()], None
    except UnicodeDecodeError:
        return [], "its caption, a .txt, is not UTF-8; convert it"  # as of tar shards
    except OSError as error:
        return [], f"its caption, a .txt, cannot be read ({error.strerror}); grant access"


def read_dataset(args, name, default_caption=None):
    """Loads the train split of a dataset, on the Hub or local, as columns `image` (undecoded) and `captions`; `args`
    name its columns and configuration. Raises `InputError`."""
    files, pictures, data_files = files_of(name)
    # A local folder of image files is not for `datasets`, which drops images without a caption in silence.
    if pictures and is_picture_folder(name, files, pictures, data_files):
        if (args.dataset_config_name, args.image_column) != (None, "image"):
            raise InputError(f"--dataset_name={name}: holds images; drop --dataset_config_name and --image_column")
        return read_folder(name, args.caption_column, takes_train=True, follows_links=args.follow_symlinks)
    saved = [path for path in files if path.name in SAVED_NAMES]
    seen = [path for path in files if not is_hidden(path, name)]
    others = [path for path in seen if path.suffix.lower() != ".txt" and path.name not in METADATA_NAMES]
    is_empty = os.path.isdir(name) and not others  # captions at most
    if (is_empty or foreign_pictures(files, name)) and not (pictures or data_files or saved):
        raise InputError(tell_no_images(name, files))
    check_data_files([*data_files, *saved], name, args.follow_symlinks)
    whole = without_empty(data_files, name)
    are_aside = bool(pictures) or len(whole) < len(data_files)
    try:
        saved = {path.parent for path in saved}
        dataset = load_train_split(args, name, saved, whole, are_aside, default_caption)
        dataset = with_whole_paths(choose_columns(args, dataset, default_caption), name)
    except Exception as error:  # arrow has one for every pair of types
        cause = error.__cause__ or error  # where `datasets` says no more than that it could not
        if isinstance(error.__cause__, InputError):
            raise InputError(f"--dataset_name={name}: {cause}") from None
        broken = error.__cause__ and find_broken(data_files)  # which reads all, and nothing was read without a cause
        told = f"{broken}: {last_line(cause)}; mend or remove it" if broken else last_line(cause)
        raise InputError(
            f"--dataset_name={name}: cannot be loaded; check it, --dataset_config_name, "
            f"--image_column={args.image_column} and --caption_column={args.caption_column} ({told})"
        ) from None
    check_places(dataset, name, args.cache_dir, args.follow_symlinks)
    return dataset


def choose_columns(args, dataset, default_caption):
    """The dataset with the columns that are named as `image` (undecoded) and `captions`; rows of tar shards also have
    a `problem`. Raises whatever `datasets` does for columns that are not there."""
    if dataset.column_names == [*ROW_FEATURES]:
        return dataset
    image_column, caption_column, field = columns_of(dataset.features, args.image_column, args.caption_column)
    if field:
        found = [row and row.get(field) for row in dataset[caption_column]]
        caption_column, dataset = field, dataset.select_columns([image_column]).add_column(field, found)
    if default_caption and caption_column == "text" and "text" not in dataset.column_names:
        dataset = dataset.add_column(caption_column, [default_caption] * len(dataset))
    dataset = dataset.select_columns([image_column, caption_column])
    dataset = dataset.rename_columns({image_column: "image", caption_column: "captions"})
    return with_label_names(dataset.cast_column("image", datasets.Image(decode=False)))


def files_of(name):
    """The files of a local dataset, a folder or a single file; which of them are pictures, and which are data files.
    Raises `InputError`."""
    if os.path.isfile(name):
        if Path(name).suffix.lower() not in DATA_KINDS:
            raise InputError(f"--dataset_name={name}: is no file that is read ({', '.join(DATA_KINDS)}); name another")
        return [Path(name)], [], [Path(name)]
    files = list_files(name) if os.path.isdir(name) else []
    pictures = [path for path in files if is_image_file(path, name)]
    data_files = [path for path in files if path.suffix.lower() in DATA_KINDS and path.name not in NO_DATA_NAMES]
    return files, pictures, data_files if not pictures else [path for path in data_files if kind_of(path) != SHARDS]


def columns_of(features, image_column, caption_column):
    """The columns of image and captions in a dataset with these features; and, where that column holds JSON, the field
    of it with the captions, or else None. Shards of WebDataset call their columns by the suffixes of files."""
    if "__key__" not in features:
        return image_column, caption_column, None
    if image_column == "image" and image_column not in features:
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        image_column = images[0] if images else image_column
    if caption_column in features:
        return image_column, caption_column, None
    if caption_column == "text" and "txt" in features:
        return image_column, "txt", None
    fields = features["json"] if isinstance(features.get("json"), dict) else ()
    usual = (caption_column, "caption") if caption_column == "text" else (caption_column,)
    for field in usual:
        if field in fields:
            return image_column, "json", field
    return image_column, caption_column, None


def is_picture_folder(name, files, pictures, data_files):
    """Whether a folder's pictures are what is to be trained on, not those that go with its data files. Raises
    `InputError` where nobody can tell."""
    texts = texts_by_name(files)
    has_captions = any(path.name in METADATA_NAMES for path in files)
    if not data_files or has_captions or any(path.with_suffix("") in texts for path in pictures):
        return True
    some, picture = [os.path.relpath(path, name) for path in (data_files[0], pictures[0])]
    if any(path.suffix.lower() in (".parquet", ".arrow") for path in data_files):
        print(
            f"Left aside in {name}: {counted(len(pictures), 'picture')}, such as {picture}; its data files are read."
        )
        return False
    num_files, num_pictures = counted(len(data_files), "data file"), counted(len(pictures), "picture")
    raise InputError(
        f"--dataset_name={name}: holds {num_files}, such as {some}, and {num_pictures}, "
        f"such as {picture}; move the ones away that are not meant"
    )


def load_train_split(args, name, saved, data_files, are_aside, default_caption):
    """The train split of a dataset as `datasets` loads it, or of tar shards with ROW_FEATURES; `saved` are the folders
    in it that `save_to_disk` wrote. Raises `InputError`, or whatever that raises."""
    config_name = args.dataset_config_name
    if saved and (config_name or Path(name) not in saved):
        raise InputError("was written by save_to_disk: name the folder that was, without a configuration")
    if saved:  # caches of later work lie in the same folders
        check_saved(saved)
        dataset = datasets.load_from_disk(name)
        if not isinstance(dataset, datasets.DatasetDict):
            return dataset
        if "train" not in dataset:
            raise InputError(f"has no train split; name the folder of one of its splits, {', '.join(dataset)}")
        return dataset["train"]
    told = describe_source(args, name, data_files, are_aside)
    builder = datasets.load_dataset_builder(**told)
    if builder.name == SHARDS:
        return load_tars(args, names_of_files(name, builder), needs_caption=not default_caption)
    return datasets.load_dataset(**told, split="train")


def names_of_files(name, builder):
    """The files of the train split of a dataset, local paths or addresses, and what they are called in it. Raises
    `InputError` if there is none."""
    paths = (builder.config.data_files or {}).get("train")
    if not paths:
        raise InputError("has no train split; name files that are for training")
    folder, names = name if os.path.isdir(name) else os.path.dirname(name), {}
    for path in paths:
        is_local = os.path.exists(path)
        names[path] = os.path.relpath(path, folder) if is_local else path.split("@", 1)[-1].split("/", 1)[-1]
    return names


def load_tars(args, names, needs_caption):
    """The samples of tar shards, local ones or on the Hub, which have `names`, stored as `datasets` stores what it
    reads. Raises what that makes of an `InputError`."""
    paths = list(names)
    check_columns(paths, args.image_column, args.caption_column, needs_caption, args.hub_token)
    if not os.path.exists(paths[0]):
        where = args.cache_dir and os.path.join(args.cache_dir, "downloads")
        told = datasets.DownloadConfig(cache_dir=where, token=args.hub_token)
        paths = datasets.DownloadManager(download_config=told).download(paths)
    read = {"image_column": args.image_column, "caption_column": args.caption_column}
    states = [os.stat(path) for path in paths]
    known = [ROW_FORMAT, read, *zip(paths, [(state.st_size, state.st_mtime_ns) for state in states], strict=True)]
    return datasets.Dataset.from_generator(
        read_tars,
        datasets.Features(ROW_FEATURES),
        args.cache_dir,
        gen_kwargs={"paths": paths, "names": list(names.values()), **read},
        fingerprint=hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32],
        writer_batch_size=100,  # of rows that wait in memory
    )


def describe_source(args, name, data_files, are_aside):
    """What `datasets` has to be told to load a dataset, on the Hub or of local `data_files`, beside which there may be
    others that `are_aside`. Raises `InputError`."""
    config_name, where = args.dataset_config_name, {"cache_dir": args.cache_dir}
    chosen = without_other_kinds([path for path in data_files if not path.name.startswith("cache-")])
    is_pattern = bool(data_files) and "[" in os.path.abspath(name)  # as `datasets` takes it
    num_configs = count_configs(name)
    if os.path.isfile(name) and config_name:
        raise InputError("is a file, which has no configurations; drop --dataset_config_name")
    are_chosen = is_pattern or len(chosen) < len(data_files) or os.path.isfile(name)
    if are_chosen or (are_aside and not num_configs):
        if config_name or num_configs > 1:
            told = "a bracket in the path, pictures, caches or empty shards hide its configurations"
            raise InputError(f"{told}; rename it, move them away or drop --dataset_config_name")
        # Whole lists: `datasets` would take what there is most of, and all that a pattern fits.
        kind = next(kind for kind in DATA_KINDS.values() if kind in [kind_of(path) for path in chosen])
        chosen = train_files([path for path in chosen if kind_of(path) == kind], name)
        lists = {"train": [glob.escape(os.path.abspath(path)) for path in chosen]}
        return {"path": kind, "data_files": lists, **where}
    check_sources(args, name, config_name)
    return {"path": name, "name": config_name, "token": args.hub_token, **where}


def without_other_kinds(data_files):
    """The data files, or of them the tar shards, if there are any, without the tables that tell of each. Raises
    `InputError` for other files that hold images."""
    shards = [path for path in data_files if kind_of(path) == SHARDS]
    tables = {path.with_suffix("") for path in shards}
    others = [path for path in data_files if path.suffix.lower() in (".parquet", ".arrow")]
    foreign = [path for path in others if path.with_suffix("") not in tables]
    if shards and foreign:
        names = f"{shards[0].name}, and {foreign[0].name}"
        raise InputError(f"holds tar shards, such as {names}; move the ones away that are not meant")
    return shards or data_files


def check_saved(folders):
    """Raises `InputError` if what `save_to_disk` wrote into folders names files that lie elsewhere."""
    for folder in folders:
        path = folder / "state.json"
        rows = read_json(path).get("_data_files", []) if path.is_file() else []
        for row in rows:
            if os.path.basename(row["filename"]) != row["filename"]:
                raise InputError(f"its state.json names the file {row['filename']!r}, which leads out of {folder}")


def check_sources(args, name, config_name):
    """Raises `InputError` if the card of a dataset names data that lies elsewhere, on this machine or on another."""
    builder = datasets.load_dataset_builder(name, config_name, token=args.hub_token, cache_dir=args.cache_dir)
    places, parents = places_of(name), {}
    for file in itertools.chain.from_iterable((builder.config.data_files or {}).values()):
        if not os.path.isdir(name):
            is_own = str(file).startswith(f"hf://datasets/{name}@")
        else:
            path = Path(os.path.abspath(str(file)))
            is_linked = args.follow_symlinks and path.is_relative_to(os.path.abspath(name))
            is_own = "://" not in str(file) and (is_linked or is_inside(path, places, parents))
        if not is_own:
            raise InputError(f"its card names the file {str(file)!r}, which leads out of it")


def kind_of(path):
    """What `datasets` calls the kind of a data file."""
    return DATA_KINDS[path.suffix.lower()]


def count_configs(name):
    """How many configurations, with files of their own, the card of a local dataset names."""
    card = Path(name, "README.md")
    if not card.is_file():
        return 0
    return len(DatasetCard.load(card, ignore_metadata_errors=True).data.get("configs") or [])


def train_files(data_files, folder):
    """Of data files those of the train split, by words in their names or their folders', or all if none has such."""
    splits = {}
    for path in data_files:
        words = re.split(r"[-._ 0-9/\\]+", os.path.relpath(path, folder).lower())
        splits[path] = next((SPLITS[word] for word in words if word in SPLITS), None)
    of_train = [path for path, split in splits.items() if split == "train"]
    return of_train or [path for path, split in splits.items() if split is None]


def with_label_names(dataset):
    """The dataset, with their names in the place of captions that are numbers of classes."""
    feature = dataset.features["captions"]
    label = getattr(feature, "feature", feature)  # of a list of them
    if not isinstance(label, datasets.ClassLabel):
        return dataset
    names = dict(enumerate(label.names))  # a class that is not known has the number -1
    captions = []
    for found in dataset["captions"]:
        captions.append([names.get(number) for number in found] if isinstance(found, list) else names.get(found))
    return dataset.remove_columns("captions").add_column("captions", captions)


def with_whole_paths(dataset, name):
    """The dataset, with paths of images that start from its folder, a local one, where they are relative: else they
    would be looked for where the script was started."""
    folder = os.path.abspath(name)

    def whole(image):
        is_file = image and image["bytes"] is None and image["path"] and not re.match(r"\w+://", image["path"])
        return {**image, "path": os.path.join(folder, image["path"])} if is_file else image

    paths = []
    for images in dataset.data.column("image").chunks:
        paths += images.field("path").filter(images.field("bytes").is_null()).to_pylist()
    if not os.path.isdir(name) or all(path is None or os.path.isabs(path) for path in paths):
        return dataset
    return dataset.map(lambda row: {"image": whole(row["image"])}, keep_in_memory=True, load_from_cache_file=False)


def check_places(dataset, name, cache_dir, follows_links=False):
    """Raises `InputError` for an image that the dataset does not hold, and that lies neither in its folder nor where
    `datasets` puts what it downloads, or that is an address."""
    places = [cache_dir or datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE]
    places = [*map(os.path.realpath, places), *(places_of(name) if os.path.isdir(name) else [])]
    folder, parents = os.path.abspath(name), {}
    start = 0
    for images in dataset.data.column("image").chunks:
        lacks_content = images.field("bytes").is_null().to_numpy(zero_copy_only=False)
        for index in np.flatnonzero(lacks_content).tolist():
            path = images.field("path")[index].as_py()
            row = f"--dataset_name={name}: row {start + index}: the image"
            if path and re.match(r"\w+://", path):
                raise InputError(f"{row} is an address ({path[:80]}); download the images first, into a folder")
            is_linked = follows_links and path and Path(os.path.abspath(path)).is_relative_to(folder)
            if path and not is_linked and not is_inside(path, places, parents):
                raise InputError(f"{row} {path!r} leads out of the dataset; copy it into a folder with metadata.jsonl")
        start += len(images)


def check_rows(rows, memory, skip_bad_images, tokenizer, resolution, fit=None, are_of_stream=False):
    """Checks every image and caption; returns the good rows. Raises one `InputError` for all others, unless
    `skip_bad_images`, and if none is good; warns of images that are enlarged, to a square or by `fit` of `load_data`,
    and of captions that are cut."""
    bad, cut, digests, contents, sizes = [], [], {}, [], []
    captions = list(rows["captions"])
    for index, (digest, width, height, problem) in enumerate(check_images(rows, memory)):
        if not problem and not captions[index]:
            problem = NO_CAPTION
        if problem:
            bad.append(f"{name_of(rows, index)}: {problem}")
            continue
        num_tokens = max(map(len, tokenizer(captions[index], verbose=False).input_ids))
        if num_tokens > tokenizer.model_max_length:
            cut.append(f"{max(captions[index], key=len)[:80]}...")
        digests[index] = hashlib.sha256(json.dumps([digest, captions[index]]).encode()).hexdigest()
        contents.append(digest)
        sizes.append((width, height))

    leave_out(bad, len(rows), skip_bad_images and bool(digests), are_of_stream=are_of_stream)
    good, sizes = list(digests), np.array(sizes, int).reshape(-1, 2)
    wanted = fit(sizes) if fit else resolution
    its, their = ("its bucket", "their bucket") if fit else 2 * (f"--resolution={resolution}",)
    small = []
    for number in np.flatnonzero((sizes < wanted).any(axis=1)).tolist():
        small.append("{}: {} x {}".format(name_of(rows, good[number]), *sizes[number]))
    warn(f"image is smaller than {its} and is enlarged", f"images are smaller than {their} and are enlarged", small)
    limit = f"more than {tokenizer.model_max_length} tokens"
    warn(f"caption has {limit} and is cut", f"captions have {limit} and are cut", cut)
    return CheckedRows(rows.select(good), list(digests.values()), np.array(contents), sizes)


def name_of(rows, index):
    """What a row's image is called: its path, or the row's number where a dataset holds the image itself."""
    return name_of_row(rows[index], index)


def name_of_row(row, index):
    """What a row is called: the path of its image, or its number where a dataset holds the image itself."""
    path = (row["image"] or {}).get("path")
    return in_one_line(path) if path else f"row {index}"


def warn(one, many, found, number=None):
    """Warns of what was found, by number, that of `found` if none is given, in the words for `one` or for `many`, and
    the first five."""
    if found:
        some = map(in_one_line, found[:5])  # names and captions of others
        print("\n  ".join([f"Warning: {counted(number or len(found), one, many)}, such as", *some]))
