#!/usr/bin/env python
"""Report what is wrong with a dataset of captioned images before anything is trained on it.

    python check_dataset.py my_images --resolution 512
    python check_dataset.py my_images --pretrained_model_name_or_path MODEL --json report.json --html report.html

Looks for what the training scripts look for, images that cannot be used, captions that are cut and images that are
enlarged, and for exact and near duplicates, mirrored ones too; counts sizes, aspect ratios and words. The dataset is
not changed. The status is 0 if nothing was found, 1 if something was, and 2 if the check could not be made.
"""

import argparse
import base64
import contextlib
import csv
import hashlib
import html
import io
import json
import math
import os
import re
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import imagehash
import numpy as np
import yaml
from filelock import FileLock
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

IMAGE_SUFFIXES = set(".avif .bmp .gif .jfif .jpe .jpeg .jpg .png .tif .tiff .webp".split())
MIN_SIDE = 16  # pixels; anything smaller is an icon or a broken file
REPLACED_FLAGS = {}
# A hash is of grey shapes alone, and drawings on a plain ground have the same: near duplicates need alike small
# versions as well. Measured: a difference of 2.5 leaves 2 of 890,000 pairs of rendered creatures and shapes, and takes
# JPEG of quality 75, which differs by at most 2.4 at 64 pixels, and by 0.6 in photo-like noise.
HASH_BITS = 12  # of 64, by which the hashes of near duplicates differ at most
PAIRS = 2**22  # compared at a time
RATIOS = {f"{w}:{h}": w / h for w, h in ((1, 2), (9, 16), (2, 3), (3, 4), (4, 5), (1, 1), (5, 4), (4, 3), (3, 2),
                                         (16, 9), (2, 1))}
MAX_LINES, MAX_SHOWN, MAX_WORDS = 20, 200, 40  # findings of a kind in the text and in the page; words in both
COLUMNS = 100
THUMBNAIL = 160  # pixels
WIDE = {"cut_captions", "exact_duplicates", "near_duplicates"}  # in the page: two images or a long text
KINDS = {  # of findings: (title, what follows from them)
    "unusable": ("Unusable images", "training stops at these, or goes on without them by --skip_bad_images"),
    "cut_captions": ("Cut captions", "longer than {max_tokens} tokens; what is quoted is never seen"),
    "enlarged": ("Small images", "below --resolution={resolution}; enlarging blurs them"),
    "exact_duplicates": ("Exact duplicates", "the same file again; it weighs double"),
    "near_duplicates": ("Near duplicates", "alike but for size, format, compression or mirroring"),
}


class InputError(ValueError):
    """A mistake in what the user gave; its text is all that they need to see."""


# ------------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    """Reads the command line and `--config`; a flag that is wrong by itself ends with status 2 and one message."""
    usage = "%(prog)s DATASET [flags]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n")[0], allow_abbrev=False,
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
    add = parser.add_argument_group("what is wrong").add_argument
    add("--resolution", type=int, default=512, help="side of the square training images in pixels")
    add("--pretrained_model_name_or_path", help="pipeline folder or Hub id, whose tokenizer cuts the captions")
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add("--near_duplicate_difference", type=float, default=2.5,
        help="root mean square difference, of 255, of small versions of near duplicates at most; -1: look for none")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="write everything as JSON")
    add("--html", metavar="FILE", help="write a page with thumbnails that needs no other file")
    add("--overwrite", **switch, help="replace these files if they exist")
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
    problems, outputs = [], {flag: getattr(args, flag) for flag in ("json", "html") if getattr(args, flag)}
    source = args.pretrained_model_name_or_path or ""
    if not args.dataset:
        problems.append("no dataset is given; name a folder, a local dataset or one on the Hub")
    if args.resolution < 1:
        problems.append(f"--resolution={args.resolution}: give a number of pixels, such as 512")
    if not args.near_duplicate_difference >= -1:
        problems.append(f"--near_duplicate_difference={args.near_duplicate_difference}: give a number from 0, or -1")
    if args.revision and not source:
        problems.append("--revision: does nothing without --pretrained_model_name_or_path; add that or drop this")
    if source.endswith((".ckpt", ".safetensors")):
        problems.append(f"--pretrained_model_name_or_path={source}: a single file holds no tokenizer; give a pipeline "
                        "folder or Hub id of the same kind of model")
    for flag, path in outputs.items():
        output = Path(path).resolve()
        place = next(parent for parent in output.parents if parent.exists())
        if output.is_dir() or not (place.is_dir() and os.access(place, os.W_OK)):
            problems.append(f"--{flag}={path}: is a folder, or cannot be written to; name a file elsewhere")
        elif output.exists() and not args.overwrite:
            problems.append(f"--{flag}={path}: exists; name another, or add --overwrite")
        if args.dataset and output.is_relative_to(Path(args.dataset).resolve()):
            problems.append(f"--{flag}={path}: lies in the dataset, which stays as it is; put it elsewhere")
    if len({Path(path).resolve() for path in outputs.values()}) < len(outputs):
        problems.append(f"--json and --html both name {args.json}; name two files")
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


def load_tokenizer(source, revision, cache_dir):
    """The tokenizer of a pipeline folder or Hub id with the length at which the scripts cut. Raises `InputError`."""
    import transformers  # here, because it takes seconds to import

    transformers.utils.logging.set_verbosity_error()
    where = {"revision": revision, "cache_dir": cache_dir}
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **where)
        config = transformers.CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", **where)
        if len(tokenizer) < 256:  # transformers makes one of two tokens where there is none
            raise OSError("there is no tokenizer")
    except (OSError, ValueError) as error:
        raise InputError(f"--pretrained_model_name_or_path={source}: no pipeline with a tokenizer and a text encoder, "
                         f"no name of one on the Hub, or no connection ({last_line(error)})") from None
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def load_rows(dataset, dataset_config_name, image_column, caption_column, instance_prompt, hub_token, cache_dir, **_):
    """Reads the dataset; returns its rows, the names of the images and what the check of each one found."""
    rows = read_dataset(dataset, dataset_config_name, image_column, caption_column, cache_dir, hub_token,
                        instance_prompt)
    captions = [all_captions(captions) or all_captions(instance_prompt) for captions in rows["captions"]]
    rows = rows.remove_columns("captions").add_column("captions", captions)
    # The scripts' memory, so that they need not look again.
    place = hashlib.sha256(os.path.abspath(dataset).encode()).hexdigest()[:16]
    memory = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "checked_images" / f"{place}.json"
    root, names = Path(os.path.abspath(dataset)), []
    for index, image in enumerate(rows["image"]):
        path = (image or {}).get("path") or f"row {index}"
        inside = os.path.isabs(path) and Path(path).is_relative_to(root)
        names.append(Path(path).relative_to(root).as_posix() if inside else path)
    return rows, names, check_images(rows, memory)


def read_image(rows, index):
    """Decodes the image of a row. Raises `InputError` if that does not go any more."""
    image = rows[index]["image"]
    try:
        return open_image(image["bytes"] or Path(image["path"]).read_bytes())
    except Exception as error:  # as in check_image
        raise InputError(f"{image['path'] or f'row {index}'}: has changed during the check, and cannot be read now "
                         f"({last_line(error)}); start again") from None


# -------------------------------------------------------------------------------------------------------- findings
def lost_words(tokenizer, caption):
    """Returns (number of tokens, the part of the caption that is cut off, from the start of a word that is cut in two;
    "" if none is)."""
    encoded = tokenizer(caption, return_offsets_mapping=True, verbose=False)
    limit, length = tokenizer.model_max_length, len(encoded.input_ids)
    if length <= limit:
        return length, ""
    start = encoded["offset_mapping"][limit - 1][0]  # its place is taken by the token that ends the text
    return length, caption[re.search(r"\S*$", caption[:start]).start() :]


def fingerprint(image):
    """What near duplicates have in common: hash bool (64,) of the image, hash (64,) of its mirror image, and small
    versions, of brightness uint8 (16, 16) and of colour uint8 (8, 8, 2), since JPEG blurs colours most."""
    image = image.resize((64, 64), Image.Resampling.LANCZOS)  # once; unlike `reduce` the same from both sides
    hashes = [imagehash.dhash(view).hash.ravel() for view in (image, ImageOps.mirror(image))]
    image = image.convert("YCbCr")
    brightness, colour = [np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)) for side in (16, 8)]
    return *hashes, brightness[..., 0], colour[..., 1:]


def difference(first, second):
    """Root mean square difference of small versions (pairs, 16, 16) and (pairs, 8, 8, 2), the larger of brightness's
    and colour's: (pairs,) in [0, 255]."""
    squares = [np.square(a.astype(np.float32) - b).reshape(len(a), -1).mean(1) for a, b in zip(first, second)]
    return np.sqrt(np.maximum(*squares))


def alike_pairs(hashes, others):
    """Yields arrays (late, early), early < late, of the pairs of `hashes` and `others`, uint64, that differ little."""
    rows = max(1, PAIRS // len(hashes))
    for start in range(0, len(hashes), rows):
        alike = np.bitwise_count(hashes[start : start + rows, None] ^ others[None]) <= HASH_BITS
        late, early = np.nonzero(np.tril(alike, start - 1))
        for part in range(0, len(late), 2**16):
            yield late[part : part + 2**16] + start, early[part : part + 2**16]


def near_duplicates(prints, limit):
    """Finds images that are like an earlier one, given what `fingerprint` returned for each.

    Returns {index: (difference, whether mirrored, index of the earlier one that is most alike)}.
    """
    hashes, mirrored, brightness, colour = map(np.stack, zip(*prints))
    hashes, mirrored = [np.packbits(bits, axis=1).view(np.uint64)[:, 0] for bits in (hashes, mirrored)]
    found = {}
    for others, step in ((hashes, 1), (mirrored, -1)):
        for late, early in alike_pairs(hashes, others):
            gaps = difference((brightness[late], colour[late]),
                              (brightness[early, :, ::step], colour[early, :, ::step]))
            for index in np.flatnonzero(gaps <= limit):
                match = float(gaps[index]), step < 0, int(early[index])
                found[int(late[index])] = min(match, found.get(int(late[index]), match))
    return found


def find_duplicates(rows, names, results, limit):
    """Lists exact duplicates, and near ones among the images that differ."""
    first, exact, near = {}, [], []
    for index, (digest, _, _, problem) in enumerate(results):
        if not problem and first.setdefault(digest, index) != index:
            exact.append({"image": names[index], "same_as": names[first[digest]], "rows": [index, first[digest]]})
    unique = sorted(first.values())
    if limit >= 0 and len(unique) > 1:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
            prints = pool.map(lambda index: fingerprint(read_image(rows, index)), unique)
            prints = list(tqdm(prints, "Comparing images", len(unique), unit="image", disable=None, leave=False))
        for late, (gap, mirrored, early) in sorted(near_duplicates(prints, limit).items()):
            late, early = unique[late], unique[early]
            near.append({"image": names[late], "like": names[early], "mirrored": mirrored,
                         "difference": round(gap, 2), "rows": [late, early]})
    return exact, near


def find_cuts(rows, names, usable, tokenizer):
    """Lists the captions of usable images that the tokenizer cuts."""
    cut = []
    for index in usable:
        for caption in rows[index]["captions"]:
            length, lost = lost_words(tokenizer, caption)
            if lost:
                cut.append({"image": names[index], "tokens": length, "lost": lost, "caption": caption,
                            "rows": [index]})
    return cut


def spread(values):
    """Smallest, median and largest of some numbers."""
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)} if values else {}


def make_report(rows, names, results, tokenizer, dataset, resolution, near_duplicate_difference, **_):
    """Gathers findings and counts into what --json writes; `rows` of a finding are numbers in the dataset."""
    captions, unusable, enlarged, usable = rows["captions"], [], [], []
    for index, (_, width, height, problem) in enumerate(results):
        problem = problem or ("" if captions[index] else "has no caption, in metadata or a .txt beside it")
        if problem:
            unusable.append({"image": names[index], "problem": problem, "rows": [index]})
            continue
        usable.append(index)
        if min(width, height) < resolution:
            enlarged.append({"image": names[index], "width": width, "height": height,
                             "factor": round(resolution / min(width, height), 2), "rows": [index]})
    exact, near = find_duplicates(rows, names, results, near_duplicate_difference)
    sizes = [(width, height) for _, width, height, problem in results if not problem]
    ratios = Counter(min(RATIOS, key=lambda name: abs(math.log(width / height / RATIOS[name])))
                     for width, height in sizes)
    texts = [caption for found in captions for caption in found]
    words = Counter(word for text in texts for word in set(re.findall(r"\w+(?:['’-]\w+)*", text.casefold())))
    return {
        "dataset": dataset, "num_images": len(rows), "num_usable": len(usable), "num_captions": len(texts),
        "resolution": resolution, "max_tokens": tokenizer and tokenizer.model_max_length,
        "unusable": unusable, "cut_captions": find_cuts(rows, names, usable, tokenizer) if tokenizer else None,
        "enlarged": enlarged, "exact_duplicates": exact,
        "near_duplicates": near if near_duplicate_difference >= 0 else None,
        "sizes": {f"{width} x {height}": count for (width, height), count in Counter(sizes).most_common()},
        "aspect_ratios": {name: ratios[name] for name in RATIOS if ratios[name]},
        "cropped_away": round(float(np.mean([1 - min(size) / max(size) for size in sizes])), 4) if sizes else 0,
        "words_per_caption": spread([len(text.split()) for text in texts]),
        "captions_with_word": dict(sorted(words.items(), key=lambda item: (-item[1], item[0]))),
    }


# --------------------------------------------------------------------------------------------------------- writing
def describe(kind, finding):
    """One line about a finding, after the name of its image."""
    mirrored = ", mirrored" if finding.get("mirrored") else ""
    return {
        "unusable": "{problem}",
        "cut_captions": "{tokens} tokens; lost: “{lost}”",
        "enlarged": "{width} x {height}, enlarged {factor:.2f} times",
        "exact_duplicates": "same as {same_as}",
        "near_duplicates": f"like {{like}}{mirrored}, differs by {{difference:.2f}}",
    }[kind].format(**finding)


def headlines(report):
    """{kind: (title with the number of findings, what follows from them)}; None counts what was not looked for."""
    lines = {}
    for kind, (title, consequence) in KINDS.items():
        if report[kind] is None:
            flag = "--near_duplicate_difference" if kind == "near_duplicates" else "--pretrained_model_name_or_path"
            lines[kind] = f"{title}: not checked", f"give {flag} to look for them"
        else:
            lines[kind] = f"{title}: {len(report[kind])}", consequence.format(**report) if report[kind] else ""
    return lines


def statistics(report):
    """{title: text} of what is counted."""
    def counts(numbers, limit, ends=""):
        shown = [f"{name}{ends} {count:,}" for name, count in list(numbers.items())[:limit]]
        return ", ".join(shown) + (f" and {len(numbers) - limit:,} more" if len(numbers) > limit else "")

    words = report["words_per_caption"]
    return {
        "Sizes": counts(report["sizes"], 12, ":") or "none",
        "Aspect ratios": f"{counts(report['aspect_ratios'], 12, ' in') or 'none'}; a square crop cuts "
                         f"{report['cropped_away']:.0%} of the pixels off",
        "Words per caption": "{min} to {max}, median {median:g}".format(**words) if words else "no captions",
        "Captions with the word": counts(report["captions_with_word"], MAX_WORDS) or "none",
    }


def printable(text):
    """A text without line ends, nor what could steer a terminal."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(text.split()))


def as_text(report):
    """The report in lines of at most 100 columns."""
    lines = ["{dataset}: {num_images:,} images, {num_usable:,} usable, {num_captions:,} captions".format(**report), ""]
    for kind, (title, consequence) in headlines(report).items():
        lines.append(f"{title} ({consequence})" if consequence else title)
        for finding in (report[kind] or [])[:MAX_LINES]:
            finding = finding | ({"lost": textwrap.shorten(finding["lost"], 200)} if "lost" in finding else {})
            lines.append(f"  {finding['image']}: {describe(kind, finding)}")
        if len(report[kind] or []) > MAX_LINES:
            lines.append(f"  and {len(report[kind]) - MAX_LINES:,} more, which --json lists")
    lines += ["", *[f"{title}: {text}" for title, text in statistics(report).items()]]
    margins = [line[: len(line) - len(line.lstrip())] for line in lines]
    return "\n".join(textwrap.fill(printable(line), COLUMNS, initial_indent=margin, subsequent_indent=margin + " " * 4)
                     for line, margin in zip(lines, margins))


STYLE = f"""
body {{ font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 1200px; margin: 2em auto;
  padding: 0 1em; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5em; }} h2 {{ font-size: 1.15em; margin: 2em 0 .2em; }} p {{ margin: .2em 0 .8em; color: #555; }}
table {{ border-collapse: collapse; }} th {{ text-align: left; vertical-align: top; font-weight: 600; width: 13em; }}
th, td {{ padding: .3em 1em .3em 0; border-top: 1px solid #ddd; }}
.cards {{ display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax({THUMBNAIL + 22}px, 1fr)); }}
.cards.wide {{ grid-template-columns: repeat(auto-fill, minmax({2 * THUMBNAIL + 32}px, 1fr)); }}
.card {{ border: 1px solid #ddd; border-radius: 6px; padding: 10px; font-size: 13px; }}
.card img {{ max-width: {THUMBNAIL}px; max-height: {THUMBNAIL}px; margin: 0 6px 6px 0; vertical-align: top; }}
.card b {{ display: block; }} .text {{ max-height: 13em; overflow-y: auto; }} .none {{ color: #2a7d36; }}
"""


def thumbnail(rows, index):
    """An image as a small JPEG inside of an <img>."""
    image, encoded = read_image(rows, index), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(encoded, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}">'


def card(rows, shown, title, text):
    """A box with the images of some rows, a title and a text, which are escaped."""
    images = "".join(thumbnail(rows, index) for index in shown)
    return (f'<div class="card">{images}<b>{html.escape(printable(title))}</b>'
            f'<div class="text">{html.escape(printable(text))}</div></div>\n')


def as_page(report, rows, names, results):
    """The report as one HTML page: all of the text, thumbnails of findings and of images from all over the dataset."""
    title = html.escape("{dataset}: {num_images:,} images".format(**report))
    parts = [f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n<style>{STYLE}'
             f"</style></head><body>\n<h1>{title}</h1>\n<p>{report['num_usable']:,} usable, "
             f"{report['num_captions']:,} captions</p>\n<table>\n"]
    parts += [f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in statistics(report).items()]
    parts.append("\n</table>\n")
    for kind, (heading, consequence) in headlines(report).items():
        findings = report[kind] or []
        parts.append(f'<h2{"" if findings else " class=none"}>{heading}</h2>\n<p>{html.escape(consequence)}</p>\n'
                     f'<div class="cards{" wide" if kind in WIDE else ""}">\n')
        for finding in tqdm(findings[:MAX_SHOWN], heading, unit="image", disable=None, leave=False):
            shown = [index for index in finding["rows"] if not results[index][3]]
            parts.append(card(rows, shown, finding["image"], describe(kind, finding)))
        more = len(findings) - MAX_SHOWN
        parts.append(f"</div>\n{f'<p>and {more:,} more, which --json lists</p>' if more > 0 else ''}\n")
    good = [index for index, found in enumerate(results) if not found[3]]
    good = [good[place * len(good) // MAX_SHOWN] for place in range(MAX_SHOWN)] if len(good) > MAX_SHOWN else good
    parts.append(f'<h2>{len(good)} of the images</h2>\n<p>With their captions.</p>\n<div class="cards">\n')
    for index in tqdm(good, "Thumbnails", unit="image", disable=None, leave=False):
        width, height = results[index][1:3]
        captions = " | ".join(rows[index]["captions"]) or "no caption"
        parts.append(card(rows, [index], names[index], f"{width} x {height}: {captions}"))
    return "".join([*parts, "</div>\n</body></html>\n"])


def write_whole(path, text):
    """Writes a file beside its place and renames it when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def main(argv=None):
    """Runs the tool; returns 1 if something was found, else 0. A mistake of the user's ends with status 2."""
    args = parse_args(argv)
    try:
        check_args(args)
        source = args.pretrained_model_name_or_path
        tokenizer = load_tokenizer(source, args.revision, args.cache_dir) if source else None
        rows, names, results = load_rows(**vars(args))
        report = make_report(rows, names, results, tokenizer, **vars(args))
        page = as_page(report, rows, names, results) if args.html else ""
        if args.json:
            write_whole(args.json, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        if args.html:
            write_whole(args.html, page)
    except (InputError, OSError) as error:
        print(f"{Path(__file__).name}: {error}".replace("--dataset_name=", "DATASET="), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    print(as_text(report))
    return 1 if any(report[kind] for kind in KINDS) else 0


if __name__ == "__main__":
    sys.exit(main())
