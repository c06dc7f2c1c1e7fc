#!/usr/bin/env python
"""Upload a folder of captioned images to the Hub, as the training scripts read it back by --dataset_name.

    python push_dataset.py my_images my_name/my_images --private
    accelerate launch train_text_to_image.py --dataset_name=my_name/my_images ...

The folder is read and checked as the training scripts do, and stays as it is. What goes are its images and one
metadata.jsonl (file_name, text and the other columns), into which captions from .txt files are put, since `datasets`
and the Hub's viewer do not read those. The captions follow when all images have arrived; the same command goes on
with an upload that was stopped, and sends only what is new.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import yaml
from datasets.data_files import DEFAULT_PATTERNS_ALL, get_data_patterns
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from filelock import FileLock
from huggingface_hub import CommitOperationAdd, DatasetCard, DatasetCardData, HfApi
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

IMAGE_SUFFIXES = set(".avif .bmp .gif .jfif .jpe .jpeg .jpg .png .tif .tiff .webp".split())
MIN_SIDE = 16  # pixels; anything smaller is an icon or a broken file
REPLACED_FLAGS = {}
METADATA = "metadata.jsonl"
CARD = "README.md"
# Else `datasets` makes splits of names such as test.png, and leaves the other images out in silence.
CONFIGS = [{"config_name": "default", "data_files": [{"split": "train", "path": "**"}]}]


class InputError(ValueError):
    """A mistake in what the user gave; its text is all that they need to see."""


# ------------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    """Reads the command line and `--config`; a flag that is wrong by itself ends with status 2 and one message."""
    parser = argparse.ArgumentParser(usage="%(prog)s FOLDER REPO_ID [flags]", description=__doc__.split("\n")[0],
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    parser.add_argument("folder", nargs="?", help="folder of images with metadata.jsonl/.csv, or a .txt beside each")
    parser.add_argument("repo_id", nargs="?", help="dataset on the Hub to make or add to: your_name/its_name")
    add = parser.add_argument_group("data").add_argument
    add("--caption_column", default="text", help="column of the captions, in the folder's metadata and on the Hub")
    add("--without_captions", **switch, help="send the images alone, such as photos of one subject for DreamBooth")
    add("--skip_bad_images", **switch, help="go on without images that cannot be used, instead of stopping")
    add("--cache_dir", help="where remembered checks of images go, instead of the Hugging Face cache")
    add = parser.add_argument_group("Hub").add_argument
    add("--private", **switch, help="make the repository private")
    add("--hub_token", help="token for the upload; default: the one that `hf auth login` stored")
    add("--commit_message", help="message of the commit; default: what is sent")
    add("--overwrite_card", **switch, help="replace a dataset card that is on the Hub already")
    add = parser.add_argument_group("run").add_argument
    add("--config", metavar="FILE.yaml", help="flags by name, maybe under `training:`; the command line wins")
    add("--dry_run", **switch, help="check everything, say what would be sent and stop")
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
    """Raises one `InputError` that names every argument that is wrong."""
    problems = []
    if not args.folder or not Path(args.folder).is_dir():
        problems.append(f"FOLDER={args.folder}: name a folder of images")
    try:
        huggingface_hub.utils.validate_repo_id(args.repo_id or "")
    except ValueError:
        problems.append(f"REPO_ID={args.repo_id}: give your_name/its_name, of letters, digits and -_.")
    if args.caption_column in ("file_name", "image"):
        problems.append(f"--caption_column={args.caption_column}: is the column of the images; use another")
    if problems:
        raise InputError("\n  ".join(["", *problems] if len(problems) > 1 else problems))


# --------------------------------------------------------------------------------------------------------- reading
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


def all_captions(captions):
    """The usable captions of a row that holds a string or a list of them. Raises `ValueError` for half a character."""
    captions = captions if isinstance(captions, list) else [captions]
    return [caption for caption in captions if isinstance(caption, str) and caption.encode() and caption.strip()]


def last_line(error):
    """The last line of an exception's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def name_problem(name):
    """Why `datasets` would not read a file of this name back from the Hub, or ""."""
    if name.startswith("../"):
        return "lies outside the folder; move it into it"
    if any(part.startswith((".", "__")) for part in name.split("/")) or "::" in name or "\\" in name:
        return "datasets skips names that start with . or __, and misreads :: and backslashes; rename it"
    if not name.lower().endswith(tuple(ImageFolder.EXTENSIONS)):
        return f"datasets reads no {Path(name).suffix} files; convert it, to PNG for example"
    return ""


def usable_rows(folder, caption_column, without_captions, cache_dir, skip_bad_images):
    """{name on the Hub: captions} of the images that training can use. Raises one `InputError` that names all others,
    unless `skip_bad_images`."""
    rows = read_folder(folder, caption_column)
    place = hashlib.sha256(str(folder).encode()).hexdigest()[:16]  # where the training scripts look for it too
    memory = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "checked_images" / f"{place}.json"
    good, bad = {}, []
    for row, (*_, problem) in zip(rows, check_images(rows, memory)):
        name = Path(os.path.relpath(row["image"]["path"], folder)).as_posix()
        captions = all_captions(row["captions"])
        problem = problem or name_problem(name)
        if not problem and not captions and not without_captions:
            problem = "has no caption, in metadata or a .txt beside it"
        if problem:
            bad.append(f"{row['image']['path']}: {problem}")
        else:
            good[name] = captions
    unusable = "\n  ".join([f"{len(bad)} of {len(rows)} images are unusable:", *bad[:100]])
    if bad and not (skip_bad_images and good):
        raise InputError(f"{unusable}\nMend or remove them, or add --skip_bad_images; images without captions can be "
                         "captioned by caption_images.py or sent --without_captions.")
    if bad:
        print(f"Left out (--skip_bad_images): {unusable}")
    return good


def other_columns(folder, caption_column):
    """{name of an image: its other columns} of all metadata files, which `read_folder` has found to be whole. Raises
    `InputError` for a column that `datasets` would take for images."""
    found = {}
    for path in sorted([*folder.rglob("metadata.jsonl"), *folder.rglob("metadata.csv")]):
        text = path.read_text(encoding="utf-8-sig")
        lines = filter(str.strip, text.split("\n"))
        for row in map(json.loads, lines) if path.suffix == ".jsonl" else csv.DictReader(io.StringIO(text)):
            name = Path(os.path.relpath(path.parent / row.pop("file_name"), folder)).as_posix()
            row.pop(caption_column, None)
            if taken := [key for key in row if key == "image" or key.endswith(("file_name", "file_names"))]:
                raise InputError(f"{path}: datasets takes the column {taken[0]!r} for images; rename it")
            found.setdefault(name, {}).update(row)
    return found


def make_metadata(captions, columns, caption_column):
    """The text of metadata.jsonl: of every image a caption, or a list where an image has several, and the other
    columns. Raises `InputError` if a column mixes kinds of values, which `datasets` does not read."""
    several = any(len(found) > 1 for found in captions.values())
    names = list(dict.fromkeys(key for name in captions for key in columns.get(name, {})))
    rows = [{"file_name": name, caption_column: found if several else found[0],
             **{key: columns.get(name, {}).get(key) for key in names}} for name, found in captions.items()]
    try:
        datasets.Dataset.from_list(rows)
    except Exception as error:  # arrow has one for every pair of types
        raise InputError(f"the metadata's columns {', '.join(names)} hold values of several kinds, which datasets "
                         f"does not read ({last_line(error)})") from None
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --------------------------------------------------------------------------------------------------------- writing
def make_card(repo_id, num_images, caption_column, without_captions):
    """The text of the dataset card."""
    size = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M"][min(max(len(str(num_images)) - 3, 0), 3)]
    data = DatasetCardData(task_categories=["text-to-image"], size_categories=[size], configs=CONFIGS)
    what = "" if without_captions else f", each with a caption in the column `{caption_column}`"
    return (f"---\n{data.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\n{num_images:,} images{what}.\n\n"
            f'```python\nimport datasets\n\ndatasets.load_dataset("{repo_id}", split="train")\n```\n')


def make_repo(api, repo_id, private):
    """Makes the repository if there is none; returns its full name and what is in it. Raises `InputError`."""
    try:
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True).repo_id
        info = api.dataset_info(repo_id)
    except Exception as error:  # of the Hub, of the connection or of the name
        raise InputError(f"REPO_ID={repo_id}: cannot be made; log in with `hf auth login` or --hub_token, and check "
                         f"the name ({last_line(error)})") from None
    if private and not info.private:
        raise InputError(f"--private: {repo_id} exists and is public; make it private in its settings on the Hub, or "
                         "drop this")
    return repo_id, {file.rfilename for file in info.siblings}


def check_repo(repo_id, present, names, staging, card, without_captions):
    """Raises `InputError` if what is in the repository would keep `datasets` from reading these images and captions.
    `card` is the text of the card that will be there."""
    own = set() if without_captions else {METADATA}
    foreign = sorted(path for path in present - own if path.split("/")[-1] in ImageFolder.METADATA_FILENAMES)
    if foreign:
        raise InputError(f"REPO_ID={repo_id}: holds {foreign[0]}, which would be read too; remove it on the Hub, or "
                         "name another repository")
    if "configs" not in DatasetCard(card, ignore_metadata_errors=True).data and \
            get_data_patterns(str(staging)) != DEFAULT_PATTERNS_ALL:
        raise InputError(f"the dataset card has no `configs`, so datasets would make splits of names such as "
                         f"{names[0]}; add --overwrite_card, or to the card's header:\n"
                         f"{yaml.safe_dump({'configs': CONFIGS}, sort_keys=False)}")


def push_all(args, folder, captions, metadata):
    """Sends the images, then captions and card. Raises `InputError`; ends with status 1 if the upload fails."""
    api = HfApi(token=args.hub_token)
    repo_id, present = make_repo(api, args.repo_id, args.private)
    keep = CARD in present and not args.overwrite_card
    with tempfile.TemporaryDirectory() as staging:  # of links, so that nothing else of the folder can be sent
        for name in captions:
            link = Path(staging, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder / name)
        try:
            own = folder / CARD
            card = (DatasetCard.load(repo_id, token=args.hub_token, ignore_metadata_errors=True).content if keep
                    else own.read_text(encoding="utf-8") if own.is_file()
                    else make_card(repo_id, len(captions), args.caption_column, args.without_captions))
            check_repo(repo_id, present, list(captions), staging, card, args.without_captions)
            last = {} if args.without_captions else {METADATA: metadata}
            last |= {} if keep else {CARD: card}
            where = {"repo_id": repo_id, "repo_type": "dataset",
                     "commit_message": args.commit_message or f"Add {len(captions)} images"}
            api.upload_folder(folder_path=staging, **where)
            if last:
                api.create_commit(operations=[CommitOperationAdd(name, text.encode("utf-8"))
                                              for name, text in last.items()], **where)
        except InputError:
            raise
        except Exception as error:  # whatever it is, the folder is safe and the user should hear that
            print(f"The upload failed ({last_line(error)}). {folder} is as it was, and what has arrived is kept: the "
                  "same command goes on from there.", file=sys.stderr)
            sys.exit(1)
    if keep:
        print("The dataset card on the Hub is kept; --overwrite_card replaces it.")
    print(f"Sent {len(captions)} images to {api.endpoint}/datasets/{repo_id}; train on them with "
          f"--dataset_name={repo_id}")


def main(argv=None):
    """Runs the tool; a mistake of the user's ends with status 2 and its message, Ctrl-C with status 130."""
    args = parse_args(argv)
    huggingface_hub.utils.logging.set_verbosity_error()  # that an unchanged file is not sent again is no warning
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    try:
        check_args(args)
        folder = Path(os.path.abspath(args.folder))
        captions = usable_rows(folder, args.caption_column, args.without_captions, args.cache_dir,
                               args.skip_bad_images)
        columns = {} if args.without_captions else other_columns(folder, args.caption_column)
        metadata = None if args.without_captions else make_metadata(captions, columns, args.caption_column)
        if metadata and any((folder / name).with_suffix(".txt").is_file() for name in captions.keys() - columns):
            print(f"Captions in .txt files go into {METADATA} on the Hub; {folder} stays as it is.")
        if args.dry_run:
            print(f"Would send {len(captions)} images{', ' + METADATA if metadata else ''} and a card to "
                  f"{args.repo_id}.")
            return
        push_all(args, folder, captions, metadata)
    except (InputError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(__file__).name}: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
