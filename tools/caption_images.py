#!/usr/bin/env python
"""Caption every image of a folder with an image-to-text model of transformers.

    python caption_images.py my_images --trigger_word=sks --suffix="on a white background"

Captions go into my_images/metadata.jsonl (file_name, text), whose other rows and columns stay as they are, or with
--format=txt into a .txt beside each image; the training scripts read both. Images that have a caption keep it. Each
batch is noted in my_images/.caption_images.jsonl until the captions are in their place, so the same command goes on
where a run was stopped. BLIP: arXiv 2201.12086.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
import yaml
from filelock import FileLock
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

IMAGE_SUFFIXES = set(".avif .bmp .gif .jfif .jpe .jpeg .jpg .png .tif .tiff .webp".split())
MIN_SIDE = 16  # pixels; anything smaller is an icon or a broken file
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
REPLACED_FLAGS = {}
JOURNAL = ".caption_images.jsonl"
# Whoever changes one of these wants other captions than those that an interrupted run made.
CAPTION_SETTINGS = ["model", "revision", "max_new_tokens", "num_beams", "trigger_word", "prefix", "suffix",
                    "overwrite"]


class InputError(ValueError):
    """A mistake in what the user gave; its text is all that they need to see."""


# ------------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None, check=None):
    """Reads the command line and `--config`; a flag that is wrong by itself ends with status 2 and one message. Given
    settings to `check`, lists which of them are outside the interval in their help."""
    parser = argparse.ArgumentParser(usage="%(prog)s FOLDER [flags]", description=__doc__.split("\n")[0],
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    parser.add_argument("folder", nargs="?", help="folder of images; those in folders below it are captioned too")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="Salesforce/blip-image-captioning-large", help="image-to-text model: Hub id or folder")
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add("--cache_dir", help="where downloads and remembered checks go, instead of the Hugging Face cache")
    add("--precision", default="no", choices=list(DTYPES), help="half precision of the model, or no")
    add("--batch_size", type=int, default=8, help="images per pass [1, inf)")
    add("--max_new_tokens", type=int, default=40, help="limit of a caption's length in tokens [1, inf)")
    add("--num_beams", type=int, help="beams of the search for a caption; default: the model's [1, inf)")
    add = parser.add_argument_group("captions").add_argument
    add("--trigger_word", help="put this and a comma before captions that do not contain it")
    add("--prefix", help="put this before what the model says, such as: a drawing of")
    add("--suffix", help="put this after what the model says")
    add("--format", default="metadata", choices=["metadata", "txt"], help="metadata.jsonl, or .txt beside each image")
    add("--caption_column", default="text", help="column of the captions in metadata.jsonl")
    add("--overwrite", **switch, help="caption images that have a caption too, and replace it")
    add("--skip_bad_images", **switch, help="go on without images that cannot be used, instead of stopping")
    add = parser.add_argument_group("run").add_argument
    add("--config", metavar="FILE.yaml", help="flags by name, maybe under `training:`; the command line wins")
    add("--dry_run", **switch, help="caption five images, print that and write nothing")
    return parse_words(parser, argv) if check is None else check_flags(parser, check)


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


def check_flags(parser, values):
    """Lists flags outside the interval that ends their help, and those given without what it says that they need."""
    problems = []
    for action in parser._actions:
        flag, value, told = action.dest, values.get(action.dest), action.help
        if value is not None and (limits := re.search(r"([\[(])(\S+), (\S+)([\])])$", told)):
            low, high = float(limits[2]), float(limits[3])
            if not (low < value < high or value in [low] * (limits[1] == "[") + [high] * (limits[4] == "]")):
                problems.append(f"--{flag}={value}: must be in {limits[0]}")
        needs = re.sub(r" [\[(].*", "", told.partition("needs ")[2]) if value not in (None, action.default) else ""
        ways = re.findall(r"--(\w+)=?(\w*)", needs)
        if ways and not any(values[name] and word in ("", values[name]) for name, word in ways):
            problems.append(f"--{flag}={value}: does nothing without {needs}; add that or drop this")
    return problems


def check_args(args):
    """Raises one `InputError` that names every setting that is wrong, before images are opened or the model loads."""
    problems, place = parse_args(check=vars(args)), Path(args.folder or "")
    if not args.folder or not place.is_dir():
        problems.append(f"FOLDER={args.folder}: name a folder of images")
    elif not args.dry_run and not os.access(place, os.W_OK):
        problems.append(f"FOLDER={args.folder}: cannot be written to; grant access, or caption a copy")
    if args.precision == "fp16" and not torch.accelerator.is_available():
        problems.append("--precision=fp16: cannot be used on a CPU; use bf16 or no")
    if args.caption_column == "file_name":
        problems.append("--caption_column=file_name: holds the names of the images; use another column")
    try:
        config = transformers.AutoConfig.from_pretrained(args.model, revision=args.revision, cache_dir=args.cache_dir)
        if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            problems.append(f"--model={args.model}: is a {config.model_type}, no image-to-text model such as BLIP")
    except (OSError, ValueError) as error:
        problems.append(f"--model={args.model}: no model's folder, no name of one on the Hub, or no connection "
                        f"({last_line(error)})")
    if problems:
        raise InputError("\n  ".join(["", *problems] if len(problems) > 1 else problems))


# --------------------------------------------------------------------------------------------------------- reading
def read_rows(path):
    """The rows of a metadata.jsonl or .csv as dictionaries with an absolute path as `file_name`, and of a .jsonl the
    lines that they stand on. Raises `InputError` for what is no such row."""
    number, rows, lines = 1, [], []
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]  # JSON may hold other line ends
        for row in map(json.loads, lines) if path.suffix == ".jsonl" else csv.DictReader(io.StringIO(text)):
            rows.append({**row, "file_name": os.path.abspath(path.parent / row["file_name"])})
            number += 1
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise InputError(f"{path}: row {number} is not a file_name and more in UTF-8 ({error!r}); mend it") from None
    return rows, lines


def read_captions(folder, caption_column, overwrite, form):
    """{path of an image: whether it has a caption}, sorted. Raises `InputError` where a caption could not be written
    in the form (metadata or txt) so that the training scripts see it alone."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    images = {str(path): False for path in files if path.suffix.lower() in IMAGE_SUFFIXES
              and not any(part.startswith(".") for part in path.relative_to(folder).parts)}
    if not images:
        raise InputError(f"the folder {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); name another")
    for path in [path for path in files if path.name in ("metadata.jsonl", "metadata.csv")]:
        captioned = [row["file_name"] for row in read_rows(path)[0] if all_captions(row.get(caption_column))]
        if captioned and overwrite and (form == "txt" or path != folder / "metadata.jsonl"):
            raise InputError(f"--overwrite: the captions in {path} would stay in use beside those in --format={form}; "
                             f"move that file away, or use {folder / 'metadata.jsonl'} alone and --format=metadata")
        images.update(dict.fromkeys(images.keys() & set(captioned), True))
    texts = {}
    for image in images:
        texts.setdefault(Path(image).with_suffix(".txt"), []).append(image)
    for text, owners in texts.items():
        if form == "txt" and len(owners) > 1:
            raise InputError(f"--format=txt: {' and '.join(owners)} would share {text}; use --format=metadata")
        if text.is_file():
            has_words = bool(text.read_text(encoding="utf-8-sig", errors="replace").strip())
            images.update((image, images[image] or has_words) for image in owners)
    return images


def read_journal(path, settings):
    """{path of an image below the folder: caption} of a run that was stopped. Raises `InputError` if that had other
    settings. A kill may have cut the last line off: what follows the last line end is removed."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    try:
        rows = [dict(json.loads(line)) for line in lines]
        captions = {row["file_name"]: row["caption"] for row in rows[1:]}
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: is damaged; remove it, and its images are captioned again") from None
    if rows and rows[0] != settings:
        other = ", ".join(f"--{name}={rows[0].get(name)}" for name in settings if rows[0].get(name) != settings[name])
        raise InputError(f"{path}: holds captions of a run that was stopped, made with {other}; go on with that, or "
                         "remove this file to do without them")
    return captions


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


def usable(images, folder, cache_dir, skip_bad_images):
    """The images that can be opened. Raises one `InputError` that names all others, unless `skip_bad_images`."""
    place = hashlib.sha256(str(folder).encode()).hexdigest()[:16]  # where the training scripts look for it too
    memory = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "checked_images" / f"{place}.json"
    found = check_images([{"image": {"path": image, "bytes": None}} for image in images], memory)
    bad = [f"{image}: {problem}" for image, (*_, problem) in zip(images, found) if problem]
    unusable = "\n  ".join([f"{len(bad)} of {len(images)} images are unusable:", *bad[:100]])
    if bad and not skip_bad_images:
        raise InputError(f"{unusable}\nMend or remove them, or add --skip_bad_images.")
    if bad:
        print(f"Left out (--skip_bad_images): {unusable}")
    return [image for image, (*_, problem) in zip(images, found) if not problem]


def last_line(error):
    """The last line of an exception's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


# ------------------------------------------------------------------------------------------------------ captioning
def load_models(args):
    """Returns what prepares images, what turns tokens into text, and the model. Raises `InputError`."""
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(args.model, **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, **where)
        model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, dtype=DTYPES[args.precision],
                                                                         **where)
    except Exception as error:  # of the connection, of a file, or of a class that does not fit
        raise InputError(f"--model={args.model}: cannot be loaded ({last_line(error)})") from None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return processor, tokenizer, model.to(device).eval()


def open_again(path):
    """Opens an image that was checked. Raises `InputError` if it changed since."""
    try:
        return open_image(Path(path).read_bytes())
    except Exception as error:  # whatever a decoder stumbles over
        raise InputError(f"{path}: changed since it was checked ({last_line(error)}); start again") from None


def caption(images, models, batch_size, max_new_tokens, num_beams, **_):
    """Yields [(path, what the model says)] of one batch after the other; while the model looks at one, the next is
    opened. Raises `InputError`."""
    processor, tokenizer, model = models
    batches = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
    limits = {"max_new_tokens": max_new_tokens} | ({"num_beams": num_beams} if num_beams else {})

    def open_batch(paths):
        return processor(images=[open_again(path) for path in paths], return_tensors="pt").pixel_values

    with ThreadPoolExecutor(1) as pool, torch.inference_mode():
        waiting = [pool.submit(open_batch, batch) for batch in batches[:1]]
        for number, batch in enumerate(batches, 1):
            try:
                pixel_values = waiting.pop().result().to(model.device, model.dtype)  # (batch, 3, height, width)
                waiting += [pool.submit(open_batch, following) for following in batches[number : number + 1]]
                tokens = model.generate(pixel_values=pixel_values, do_sample=False, **limits)
            except torch.OutOfMemoryError:
                raise InputError(f"--batch_size={batch_size}: is too much for this memory; lower it") from None
            except (AttributeError, RuntimeError, TypeError) as error:
                raise InputError(f"--model: does not caption images by themselves ({last_line(error)})") from None
            yield list(zip(batch, tokenizer.batch_decode(tokens, skip_special_tokens=True)))


def compose(said, trigger_word, prefix, suffix, **_):
    """The caption: trigger word, prefix, what the model said, suffix; "" if that is nothing."""
    if not said.strip():
        return ""
    text = re.sub(r" ([,.;:!?])", r"\1", " ".join(" ".join(filter(None, [prefix, said, suffix])).split()))
    known = trigger_word and re.search(rf"(?<!\w){re.escape(trigger_word)}(?!\w)", text)
    return f"{trigger_word}, {text}" if trigger_word and not known else text


# --------------------------------------------------------------------------------------------------------- writing
def replace_text(path, text):
    """Writes a file beside its place, complete, and renames it; it keeps the permissions of the one it replaces."""
    path = Path(os.path.realpath(path))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_captions(folder, captions, caption_column, form):
    """Puts {path below the folder: caption} in their place. Of a metadata.jsonl, rows of other images keep their
    bytes and rows of these images their other columns."""
    if form == "txt":
        for name, text in captions.items():
            replace_text((folder / name).with_suffix(".txt"), text + "\n")
        return
    path, new, written = folder / "metadata.jsonl", dict(captions), []
    for row, line in zip(*read_rows(path)) if path.exists() else []:
        name = Path(os.path.relpath(row["file_name"], folder)).as_posix()
        if name in captions:
            line = json.dumps({**json.loads(line), caption_column: captions[name]}, ensure_ascii=False)
            new.pop(name, None)
        written.append(line)
    written += [json.dumps({"file_name": name, caption_column: text}, ensure_ascii=False)
                for name, text in new.items()]
    replace_text(path, "".join(f"{line}\n" for line in written))


def run(args):
    """Captions as `args` say. Whatever ends it, the captions that were made are written or in the journal."""
    check_args(args)
    folder = Path(os.path.abspath(args.folder))
    journal, settings = folder / JOURNAL, {name: getattr(args, name) for name in CAPTION_SETTINGS}
    images = read_captions(folder, args.caption_column, args.overwrite, args.format)
    wanted = {Path(image).relative_to(folder).as_posix(): image for image, has_caption in images.items()
              if args.overwrite or not has_caption}
    made = {name: text for name, text in read_journal(journal, settings).items() if name in wanted}
    todo = usable([image for name, image in wanted.items() if name not in made], folder, args.cache_dir,
                  args.skip_bad_images)
    print(f"{len(images)} images: {len(images) - len(wanted)} keep their captions, {len(made)} were captioned before "
          f"a stop, {len(todo)} are to be captioned.")
    if args.dry_run:
        for batch in caption(todo[:5], load_models(args), **vars(args)) if todo else []:
            for path, said in batch:
                print(f"  {os.path.relpath(path, folder)}: {compose(said, **vars(args))}")
        return
    if todo:
        caption_all(folder, todo, made, load_models(args), settings, vars(args))
    elif made:
        write_captions(folder, made, args.caption_column, args.format)
    journal.unlink(missing_ok=True)
    silent = [image for image in todo if Path(image).relative_to(folder).as_posix() not in made]
    if silent:
        print("\n  ".join([f"Warning: the model says nothing of {len(silent)} images, such as", *silent[:5]]))
    print(f"Captioned {len(made)} images in {folder}.")


def caption_all(folder, todo, made, models, settings, options):
    """Captions the images `todo` into `made`, noting each batch in the journal, and writes the captions at the end or
    when it is stopped. Replaced captions are all replaced or none: until then the journal alone has them."""
    journal, complete = folder / JOURNAL, False
    lines = [settings, *({"file_name": name, "caption": text} for name, text in made.items())]
    replace_text(journal, "".join(json.dumps(line) + "\n" for line in lines))
    try:
        with journal.open("a", encoding="utf-8") as file, tqdm(total=len(todo), unit="image", disable=None) as bar:
            for batch in caption(todo, models, **options):
                new = {Path(path).relative_to(folder).as_posix(): compose(said, **options) for path, said in batch}
                new = {name: text for name, text in new.items() if text}
                file.write("".join(json.dumps({"file_name": name, "caption": text}) + "\n"
                                   for name, text in new.items()))
                file.flush()
                made.update(new)
                bar.update(len(batch))
        complete = True
    finally:
        if complete or not options["overwrite"]:
            write_captions(folder, made, options["caption_column"], options["format"])
            journal.unlink(missing_ok=True)


def main(argv=None):
    """Runs the tool; a mistake of the user's ends with status 2 and its message, Ctrl-C with status 130."""
    args = parse_args(argv)
    transformers.utils.logging.set_verbosity_error()  # its bars and remarks would drown ours
    transformers.utils.logging.disable_progress_bar()
    try:
        run(args)
    except (InputError, OSError, UnicodeError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(__file__).name}: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
