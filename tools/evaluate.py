#!/usr/bin/env python
"""Measure a fine-tuned Stable Diffusion 1 or 2: does it follow prompts, look like its data, or copy them?

    python evaluate.py my_model my_images --base stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --num_validation_samples 20 --resolution 512
    python evaluate.py stable-diffusion-v1-5/stable-diffusion-v1-5 my_images --lora my_lora --base ...

It draws --num_images pictures from the captions of the training images (or from --prompts), with the base from the
same noise, and writes to --output_dir evaluation.json and closest_pairs.png:

- CLIP score: 100 max(cos(picture, prompt), 0), arXiv 2104.08718 in the scale of torchmetrics (the paper's is 2.5);
  CLIP image similarity: the mean cosine between a picture and the real images, arXiv 2208.12242.
- KID: the unbiased squared MMD under the kernel (x.y / d + 1)^3, arXiv 1801.01401, between pictures and real images.
  It is taken over all pairs, which is the mean over all random subsets, and its standard error is the jackknife's:
  subsets overlap, so that their spread over the root of their number would promise too much. It is negative by chance,
  and far below 0 where pictures are copies of few images. Here x is a CLIP
  embedding scaled to the length of sqrt(d): compare figures of this tool and the same --clip_model alone.
- Held-out loss: of the images that training held out by the same --num_validation_samples (and --max_train_samples
  with its --seed as --train_seed), against the base's.
- Memorisation: a picture is a copy of its nearest training image if its distance to that is below COPY_RATIO, 1/3, of
  that to the second nearest (arXiv 2310.02664, after Yoon et al., ICML 2023 workshop on structured probabilistic
  inference). The model is reported as memorising if more than COPY_SHARE, 25 %, of its pictures are
  copies, and more than of the base's, which never saw the images: if the lower end of its 95 % interval is above 25 %
  and above the upper end of the base's. It is cleared if the upper end is at most 25 %; between the two, or with fewer
  than 3 different images, the verdict is "cannot say".
  Distances are between the patch features of CLIP's last layer, which keep what is where. CLIP's embedding keeps what
  a caption says, so that an honest new picture of a caption would pass for a copy. Mirrored copies count; exact
  duplicates among the images are one image, near duplicates hide a copy (find them by check_dataset.py).
  The 25 % were measured on the miniature: of new drawings by the renderer for the captions of 8 images, which no
  model saw, 10 to 12 % were below 1/3 by chance, for those of 216 images none; of a model trained on the 8 all.

Differences to the base are paired: by picture, or by image. Intervals are of 95 %: by Student's t, but for KID, where
they are 1.96 standard errors to both sides, and the share of copies, where they are those of Clopper and Pearson.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.training_utils import compute_snr
from filelock import FileLock
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from scipy import stats
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTokenizer

IMAGE_SUFFIXES = set(".avif .bmp .gif .jfif .jpe .jpeg .jpg .png .tif .tiff .webp".split())
MIN_SIDE = 16  # pixels; anything smaller is an icon or a broken file
HELD_OUT_TIMESTEPS = 4  # at which the loss of each held-out image is measured
SAMPLE, ORDER, DROPOUT, SUBSET, HELD_OUT = range(5)  # a stream of random numbers each
LORA_FILE = "pytorch_lora_weights.safetensors"
COPY_RATIO, COPY_SHARE = 1 / 3, 0.25  # the rule of memorising, see above
PATCHES = 8  # patch features are averaged down to so many a side: enough to tell a copy, and small enough to compare
PAIRS = 8  # in the picture of the closest pairs
TILE, MARGIN, FONT_SIZE = 192, 8, 15  # pixels
OTHER_TOOLS_KEYS = {"height", "negative_prompt", "scheduler", "seeds", "width"}  # in a recipe; of generate.py
FONTS = ("DejaVuSans.ttf", "arial.ttf", "Arial.ttf")  # of systems; Pillow's own font has few letters beyond a to z


class InputError(ValueError):
    """A mistake in what the user gave; its text is all that they need to see."""


# ------------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None, check=None):
    """Reads the command line and `--config`; a flag that is wrong by itself ends with status 2 and one message. Given
    settings to `check`, lists which of them are outside the interval in their help."""
    parser = argparse.ArgumentParser(usage="%(prog)s MODEL DATASET [--base MODEL] [flags]", allow_abbrev=False,
                                     description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="pipeline folder or Hub id")
    add("dataset", nargs="?", metavar="DATASET", help="folder or dataset on the Hub that it was trained on")
    add("--base", help="model that it was trained from, to compare with; gets no LoRA")
    add("--lora", action="append", metavar="PATH[:SCALE]", help="LoRA file or folder for MODEL; may be given again")
    add("--clip_model", default="openai/clip-vit-large-patch14", help="CLIP that measures, a folder or Hub id")
    add("--num_validation_samples", type=int, default=0,
        help="images that training held out, as its flag said [0, inf)")
    add("--max_train_samples", type=int, help="images that training used, as its flag said [1, inf)")
    add("--train_seed", type=int, default=0, help="seed that drew those of training; needs --max_train_samples")
    add("--resolution", type=int, default=512, help="side of the square images in pixels, as in training [1, inf)")
    add("--dataset_config_name", help="configuration of a dataset on the Hub")
    add("--image_column", default="image", help="column of the images in that dataset")
    add("--caption_column", default="text", help="column with a caption, or a list of them")
    add("--instance_prompt", help="caption of images without one, as in DreamBooth")
    add("--skip_bad_images", **switch, help="go on without images that cannot be used, instead of stopping")
    add("--cache_dir", help="where downloads and remembered checks go, instead of the Hugging Face cache")
    add("--prompts", nargs="+", help="what to draw, in turn, instead of the training images' captions")
    add("--prompts_file", help="text file with a prompt per line, the same")
    add("--num_images", type=int, default=256, help="pictures to draw with each model [3, inf)")
    add("--num_inference_steps", type=int, default=25, help="denoising steps [1, inf)")
    add("--guidance_scale", type=float, default=7.5, help="scale of classifier-free guidance; 1: none [1, inf)")
    add("--batch_size", type=int, default=4, help="pictures or images at once [1, inf)")
    add("--seed", type=int, default=0, help="seed of the pictures: number k has the seed + k [0, 4e18]")
    add("--mixed_precision", default="no", choices=["no", "fp16", "bf16"], help="precision of passes")
    add("--output_dir", default="evaluation", help="folder for evaluation.json and closest_pairs.png")
    add("--overwrite", **switch, help="replace an evaluation in --output_dir")
    add("--font", metavar="FILE.ttf", help="font of the labels; default: DejaVu Sans, Arial or Pillow's own")
    add("--config", metavar="FILE.yaml", help="flags by name, maybe under `evaluation:`; the command line wins")
    return parse_recipe(parser, argv) if check is None else check_flags(parser, check)


def parse_recipe(parser, argv):
    """Parses `argv`, or the command line if that is None, after the flags under `evaluation:` in its `--config`, or
    at the top of a file without that. What YAML says becomes words too, so that argparse checks types and choices.
    The section is for both tools, so that keys of the other one alone are left to that."""
    argv, words = sys.argv[1:] if argv is None else list(argv), []
    given, flags = parser.parse_known_args(argv)[0], vars(parser.parse_args([]))
    try:
        path = given.config and os.path.expanduser(given.config)
        recipe = (yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path else None) or {}
        others = OTHER_TOOLS_KEYS if "evaluation" in recipe else set()
        recipe = dict(recipe.get("evaluation", recipe) or {})
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError) as error:
        parser.error(f"--config={given.config}: is no YAML file of flags ({' '.join(str(error).split())})")
    if "seed" in recipe and "seeds" in flags:  # the recipes of DreamBooth have one
        recipe.setdefault("seeds", recipe.pop("seed"))
    if unknown := sorted(map(str, recipe.keys() - (flags.keys() - {"config", "model", "dataset"}) - others)):
        parser.error(f"--config={given.config}: unknown key {', '.join(unknown)}; keys are the flags of --help "
                     "without dashes, in a training recipe under `evaluation:`")
    taken = {"prompts", "prompts_file"} if given.prompts or given.prompts_file else set()  # whichever of the two it is
    taken |= {"lora"} if given.lora else set()  # which would be appended to
    for key, value in [(key, value) for key, value in recipe.items() if key not in taken | others]:
        if key == "lora":
            words += [f"--lora={item}" for item in (value if isinstance(value, list) else [value])]
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif isinstance(value, bool) and isinstance(flags[key], bool):
            words.append(f"--{'' if value else 'no-'}{key}")
        elif value is not None:  # YAML reads a bare `no` as false, but --mixed_precision means the word
            words.append(f"--{key}={'no' if value is False else value}")
    # In two passes: a list in the recipe would take MODEL as its last item.
    recipe = parser.parse_args(words)
    if recipe.model:
        parser.error(f"--config={given.config}: {recipe.model} stands in a list where one value is taken")
    expand = os.path.expanduser  # which neither a shell does after `=`, nor YAML
    return argparse.Namespace(**{name: expand(value) if isinstance(value, str) else value
                                 for name, value in vars(parser.parse_args(argv, recipe)).items()})


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
    """Checks everything that can be checked without weights; returns (prompts or None, LoRAs as (file, scale)).
    Raises one `InputError` that names every problem."""
    problems, prompts, loras = parse_args(check=vars(args)), None, []
    if args.mixed_precision == "fp16" and not torch.accelerator.is_available():
        problems.append("--mixed_precision=fp16: a CPU cannot compute in it; use bf16 or no")
    try:
        prompts = read_prompts(**vars(args)) if args.prompts or args.prompts_file else None
    except InputError as error:
        problems.append(str(error))
    try:
        loras = find_loras(**vars(args))
    except InputError as error:
        problems.append(str(error))
    try:
        load_font(args.font, FONT_SIZE)
    except InputError as error:
        problems.append(str(error))
    problems += check_source("MODEL", args.model, args.resolution)
    problems += check_source("--base", args.base, args.resolution) if args.base else []
    problems += [] if args.dataset else ["DATASET: name the folder or dataset that the model was trained on"]
    try:
        CLIPConfig.from_pretrained(args.clip_model)
        CLIPTokenizer.from_pretrained(args.clip_model)
        CLIPImageProcessorPil.from_pretrained(args.clip_model)
    except (OSError, ValueError) as error:
        problems.append(f"--clip_model={args.clip_model}: no whole CLIP, no name of one on the Hub, or no connection "
                        f"({last_line(error)})")
    output = Path(args.output_dir)
    place = next(path for path in (output, *output.resolve().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        problems.append(f"--output_dir={output}: {place} is a file or cannot be written to; name another folder")
    elif args.dataset and output.resolve().is_relative_to(Path(args.dataset).resolve()):
        problems.append(f"--output_dir={output}: lies in the dataset, which stays as it is; put it elsewhere")
    elif any((output / name).exists() for name in ("evaluation.json", "closest_pairs.png")) and not args.overwrite:
        problems.append(f"--output_dir={output}: holds an evaluation; name another, or add --overwrite")
    if problems:
        raise InputError("\n  ".join(["", *problems] if len(problems) > 1 else problems))
    return prompts, loras


def read_prompts(prompts, prompts_file, **_):
    """The prompts, each once. Raises `InputError`."""
    if bool(prompts) == bool(prompts_file):
        raise InputError("--prompts: give this, --prompts_file or a recipe with prompts, and one of them alone")
    try:
        lines = prompts or Path(prompts_file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts_file={prompts_file}: cannot be read as UTF-8 ({last_line(error)})") from None
    lines = [line.strip() for line in lines]
    if odd := [line for line in lines if line != line.encode("utf-8", "replace").decode("utf-8")]:
        raise InputError(f"--prompts: {odd[0]!a} is not UTF-8")
    lines = list(dict.fromkeys(line for line in lines if line or prompts))  # an empty line is no prompt, "" is one
    if not lines:
        raise InputError(f"--prompts_file={prompts_file}: holds no prompts; write one per line")
    return lines


def find_loras(lora, **_):
    """The LoRA files of `--lora PATH[:SCALE]` with their scales. Raises `InputError` for what cannot be loaded."""
    found, problems = [], []
    for item in lora or []:
        path, _, number = item.rpartition(":")
        scale = float(number) if re.fullmatch(r"[-+]?\d*\.?\d+", number) and not Path(item).exists() else None
        path = Path(os.path.expanduser(item if scale is None else path))
        path = path / LORA_FILE if path.is_dir() else path
        found.append((path, 1.0 if scale is None else scale))
        try:
            with safe_open(path, "pt") as file:
                keys = list(file.keys())
        except (OSError, SafetensorError) as error:
            problems.append(f"--lora={item}: {path} is no LoRA in a .safetensors file ({last_line(error)})")
            continue
        if any(key.endswith(".dora_scale") for key in keys):  # diffusers would leave them out, and draw something else
            problems.append(f"--lora={item}: is DoRA in kohya's layout; convert it by convert_lora.py --to diffusers")
    if problems:
        raise InputError("\n  ".join(problems))
    return found


def check_source(flag, source, resolution):
    """Lists what is wrong with a model's configs, or between them and the flags; reads no weights."""
    name = f"{flag}={source}"
    if not source:
        return [f"{flag}: name a pipeline folder or Hub id"]
    if Path(source, LORA_FILE).is_file() and not Path(source, "model_index.json").is_file():
        return [f"{name}: holds LoRA weights; give the model that they were trained on, and --lora={source}"]
    try:
        parts = diffusers.StableDiffusionPipeline.load_config(source)
        if foreign := {"text_encoder_2", "transformer"} & parts.keys():
            return [f"{name}: has a {min(foreign)} (SDXL, SD 3 or the like); use a Stable Diffusion 1 or 2"]
        vae = diffusers.AutoencoderKL.load_config(source, subfolder="vae")
    except (OSError, ValueError) as error:
        return [f"{name}: no whole pipeline, no name of one on the Hub, or no connection ({last_line(error)})"]
    divisor = 2 ** (len(vae["block_out_channels"]) - 1)
    wrong = resolution < divisor or resolution % divisor
    return [f"--resolution={resolution}: must be a multiple of {divisor} for this VAE"] if wrong else []


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


def check_rows(rows, memory, skip_bad_images, tokenizer, resolution):
    """Checks every image and caption; returns the good rows and a digest of each one's content and captions. Raises
    one `InputError` for all others, unless `skip_bad_images`; warns of small images and of captions that are cut."""
    bad, small, cut, good = [], [], [], {}
    captions = list(rows["captions"])
    for index, (digest, width, height, problem) in enumerate(check_images(rows, memory)):
        problem = problem or ("" if captions[index] else "has no caption, in metadata or a .txt beside it")
        if problem or min(width, height) < resolution:
            name = (rows[index]["image"] or {}).get("path") or f"row {index}"
            (bad if problem else small).append(f"{name}: {problem or f'{width} x {height}'}")
        if not problem:
            good[index] = hashlib.sha256(json.dumps([digest, captions[index]]).encode()).hexdigest()
            if max(map(len, tokenizer(captions[index], verbose=False).input_ids)) > tokenizer.model_max_length:
                cut.append(f"{max(captions[index], key=len)[:80]}...")
    unusable = "\n  ".join([f"{len(bad)} of {len(rows)} images are unusable:", *bad[:100]])
    if bad and not (skip_bad_images and good):
        raise InputError(f"{unusable}\nMend or remove them, or add --skip_bad_images.")
    if bad:
        print(f"Left out (--skip_bad_images): {unusable}")
    for what, warned in ((f"images are smaller than --resolution={resolution} and are enlarged", small),
                         (f"captions have more than {tokenizer.model_max_length} tokens and are cut", cut)):
        if warned:
            print("\n  ".join([f"Warning: {len(warned)} {what}, such as", *warned[:5]]))
    return rows.select(list(good)), list(good.values())


@dataclasses.dataclass
class CaptionedImages(torch.utils.data.Dataset):
    """Maps (epoch, index, weight) to these and pixel_values uint8 (3, height, width), input_ids (max_length,),
    timestep, and posterior_noise, noise, added_noise in float32 (4, height / 8, width / 8)."""
    rows: datasets.Dataset  # of image and captions
    tokenizer: CLIPTokenizer
    latent_shape: tuple
    num_timesteps: int
    flags: dict  # by name: seed, resolution, center_crop, random_flip, ... as load_data takes them

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        (epoch, index, weight), flags = item, self.flags
        # All that is random in a sample, drawn always and in this order: an option leaves the others' numbers alone.
        draw = np.random.default_rng((flags["seed"], SAMPLE, epoch, index))
        left, top, flip, choice, drop = draw.random(5)
        timestep = draw.integers(self.num_timesteps)
        posterior_noise, noise, perturbation = draw.standard_normal((3, *self.latent_shape), np.float32)
        # The offset shifts whole channels; perturbation (arXiv 2301.11706, eq. 3) is added and not to be predicted.
        noise = noise + flags["noise_offset"] * draw.standard_normal((len(noise), 1, 1), np.float32)

        row, place = self.rows[index], (0.5, 0.5) if flags["center_crop"] else (left, top)
        image = open_image(row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes())
        resample = Image.Resampling[flags["image_interpolation_mode"].upper()]
        image = ImageOps.fit(image, (flags["resolution"], flags["resolution"]), resample, centering=place)
        if flags["random_flip"] and flip < 0.5:
            image = ImageOps.mirror(image)
        caption = "" if drop < flags["caption_dropout"] else row["captions"][int(choice * len(row["captions"]))]
        input_ids = self.tokenizer(caption, padding="max_length", truncation=True, return_tensors="np").input_ids[0]
        return {"pixel_values": np.array(image).transpose(2, 0, 1), "input_ids": input_ids, "timestep": timestep,
                "posterior_noise": posterior_noise, "noise": noise, "epoch": epoch, "index": index,
                "added_noise": noise + flags["input_perturbation"] * perturbation, "weight": np.float32(weight)}


def load_data(pretrained_model_name_or_path, single_file_config, revision, cache_dir, train_data_dir, dataset_name,
              dataset_config_name, image_column, caption_column, hub_token, max_train_samples, num_validation_samples,
              skip_bad_images, resolution, seed, default_caption=None, repeats=1, **flags):
    """Reads, checks and splits the images; returns (training images, held-out images, fingerprint of both). The
    held-out ones are the same for every seed, and always seen alike. `default_caption` is that of images without."""
    source, where = single_file_config or pretrained_model_name_or_path, {"revision": revision, "cache_dir": cache_dir}
    tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **where)
    text_config = CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", **where)
    tokenizer.model_max_length = text_config.max_position_embeddings
    vae = diffusers.AutoencoderKL.load_config(source, subfolder="vae", **where)
    latent_shape = (vae["latent_channels"], *[resolution // 2 ** (len(vae["block_out_channels"]) - 1)] * 2)
    schedule = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler", **where)
    rows = read_folder(train_data_dir, caption_column) if train_data_dir else read_dataset(
        dataset_name, dataset_config_name, image_column, caption_column, cache_dir, hub_token, default_caption)
    captions = [all_captions(found) or [default_caption] * bool(default_caption) for found in rows["captions"]]
    rows = rows.remove_columns("captions").add_column("captions", captions)  # before a selection, which it would copy
    subset = np.random.default_rng((seed, SUBSET)).permutation(len(rows))[:max_train_samples]
    place = hashlib.sha256(os.path.abspath(train_data_dir or dataset_name).encode()).hexdigest()[:16]
    memory = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "checked_images" / f"{place}.json"
    rows, digests = check_rows(rows.select(np.sort(subset)), memory, skip_bad_images, tokenizer, resolution)
    if num_validation_samples >= len(rows):
        raise InputError(f"--num_validation_samples={num_validation_samples}: must leave some of {len(rows)} images")
    order = np.random.default_rng(HELD_OUT).permutation(len(rows))
    held_out, training = np.sort(order[:num_validation_samples]), np.sort(order[num_validation_samples:])
    fingerprint = hashlib.sha256(" ".join([f"{num_validation_samples}", *digests]).encode()).hexdigest()
    flags |= {"seed": seed, "resolution": resolution}
    images = CaptionedImages(rows.select(np.repeat(training, repeats)), tokenizer, latent_shape,
                             schedule.get("num_train_timesteps", 1000), flags)
    plain = dict.fromkeys(["random_flip", "seed", "caption_dropout", "noise_offset", "input_perturbation"], 0)
    held_out = dataclasses.replace(images, rows=rows.select(held_out), flags={**flags, **plain, "center_crop": True})
    return images, held_out, fingerprint


def load_images(model, dataset, train_seed, instance_prompt, **settings):
    """Reads the dataset as training does; returns (training images, held-out images), which are plain: no flips, no
    random crops. Raises `InputError`."""
    plain = {"pretrained_model_name_or_path": model, "single_file_config": None, "revision": None,
             "train_data_dir": None, "dataset_name": dataset, "hub_token": None, "center_crop": True,
             "random_flip": False, "image_interpolation_mode": "lanczos", "default_caption": instance_prompt,
             **dict.fromkeys(["caption_dropout", "noise_offset", "input_perturbation"], 0)}
    try:
        images, held_out, _ = load_data(**{**settings, **plain, "seed": train_seed})
    except InputError as error:
        raise InputError(str(error).replace("--dataset_name=", "DATASET=")) from None
    return images, held_out


def name_of(image, index):
    """What to call an image: its file, or its row."""
    return Path(image["path"]).name if image["path"] else f"row {index}"


def tile_of(images, index):
    """An image as training sees it, in the size of a tile."""
    pixels = images[(0, index, 1.0)]["pixel_values"].transpose(1, 2, 0)
    return Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------- models
def last_line(error):
    """The last line of an exception's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def load_pipeline(folder, loras, dtype, device, **parts):
    """Loads a pipeline, with `parts` instead of its own, and its LoRAs, [(file, scale)], onto the device. Raises
    `InputError`."""
    try:
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, **parts)
    except Exception as error:  # every format has its own way of being broken
        raise InputError(f"{folder}: cannot be loaded ({last_line(error)})") from None
    for number, (path, _) in enumerate(loras):
        try:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=f"lora_{number}")
        except Exception as error:  # of other models, or of layers that this one lacks; torch lists every one
            why = "its layers have other sizes" if "size mismatch" in str(error) else last_line(error)
            raise InputError(f"--lora={path}: does not fit {folder} ({why}); give the model that it is for") from None
        with safe_open(path, "pt") as file:
            wanted = sum(bool(re.search(r"lora_A|lora_down|lora\.down", key)) for key in file.keys())  # noqa: SIM118
        names = [name for part in (pipeline.unet, pipeline.text_encoder) for name, _ in part.named_parameters()]
        loaded = sum(f".lora_A.lora_{number}." in name for name in names)
        if loaded != wanted or not wanted:  # which diffusers says in a warning at most
            raise InputError(f"--lora={path}: only {loaded} of its {wanted} layers are in {folder}; give the model "
                             "that it was trained on")
    if loras:
        pipeline.set_adapters([f"lora_{number}" for number in range(len(loras))], [scale for _, scale in loras])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


def load_clip(source, device):
    """The CLIP that measures, its tokenizer and its image processor. Raises `InputError`."""
    try:
        model = CLIPModel.from_pretrained(source, dtype=torch.float32).eval().to(device)
    except Exception as error:  # every format has its own way of being broken
        raise InputError(f"--clip_model={source}: cannot be loaded ({last_line(error)})") from None
    return model, CLIPTokenizer.from_pretrained(source), CLIPImageProcessorPil.from_pretrained(source)


@torch.no_grad()
def image_features(clip, images):
    """Returns CLIP's embeddings of PIL images (n, d), of length 1, and the patch features of its last layer, averaged
    over at most PATCHES x PATCHES places (n, f), of length 1; both in float32 on the CPU."""
    model, _, processor = clip
    pixel_values = processor(images, return_tensors="pt").pixel_values.to(model.device)
    output = model.vision_model(pixel_values)
    embeds = model.visual_projection(output.pooler_output)
    patches = output.last_hidden_state[:, 1:].transpose(1, 2)
    side = round(patches.shape[-1] ** 0.5)
    patches = F.adaptive_avg_pool2d(patches.unflatten(2, (side, side)), min(side, PATCHES)).flatten(1)
    return F.normalize(embeds).cpu(), F.normalize(patches).cpu()


@torch.no_grad()
def text_features(clip, prompts):
    """Returns CLIP's embeddings of texts (n, d), of length 1, in float32 on the CPU."""
    model, tokenizer, _ = clip
    limit = model.config.text_config.max_position_embeddings
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(model.device)
    return F.normalize(model.text_projection(model.text_model(**tokens).pooler_output)).cpu()


# ----------------------------------------------------------------------------------------------------- mathematics
@torch.no_grad()
def encode(vae, batch):
    """Encodes images to latents (batch, 4, height / 8, width / 8) in float32, drawn from the VAE's posterior."""
    pixel_values = batch["pixel_values"] / 127.5 - 1  # [-1, 1], in float32: half precision would round them
    posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
    return (posterior.mean.float() + posterior.std.float() * batch["posterior_noise"]) * vae.config.scaling_factor


def diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, noise, added_noise, timesteps, snr_gamma=None):
    """One diffusion step: the loss of each sample (batch,), the mean over its latents (arXiv 2006.11239, eq. 14)."""
    # All is float32 up to the UNet: in bfloat16 the first timesteps would get no noise at all.
    noisy_latents = noise_scheduler.add_noise(latents, added_noise, timesteps)
    predicts_noise = noise_scheduler.config.prediction_type == "epsilon"
    target = noise if predicts_noise else noise_scheduler.get_velocity(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, prompt_embeds).sample
    losses = F.mse_loss(model_pred.float(), target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:  # min-SNR, arXiv 2303.09556, section 3.4: min(snr, gamma) / snr, or / (snr + 1) for v
        snr = compute_snr(noise_scheduler, timesteps)
        losses = losses * (snr.clamp(max=snr_gamma) / (snr if predicts_noise else snr + 1))
    return losses


@torch.no_grad()
def held_out_losses(accelerator, unet, vae, text_encoder, noise_scheduler, images, batch_size):
    """The unweighted loss of every held-out image (num_images,), a mean over timesteps spread evenly; noise and
    timesteps are the same in every call and run. Each process does its share."""
    pairs = [(part, index, 1.0) for index in range(len(images)) for part in range(HELD_OUT_TIMESTEPS)]
    mine = pairs[accelerator.process_index :: accelerator.num_processes]
    losses = torch.zeros(len(images))
    for batch in torch.utils.data.DataLoader(images, batch_size, sampler=mine):
        batch = send_to_device(batch, accelerator.device, skip_keys="index")
        timesteps = (batch["timestep"] + batch["epoch"] * images.num_timesteps) // HELD_OUT_TIMESTEPS
        with accelerator.autocast():
            latents, prompt_embeds = encode(vae, batch), text_encoder(batch["input_ids"])[0]
            part_losses = diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, batch["noise"],
                                           batch["noise"], timesteps)
        losses.index_add_(0, batch["index"], part_losses.cpu() / HELD_OUT_TIMESTEPS)
    return accelerator.reduce(losses.to(accelerator.device), "sum").cpu()


def interval(values):
    """The mean of independent values, its standard error, and its 95 % interval by Student's t; of fewer than two
    values, the mean alone."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return {"mean": float(values.mean())} if len(values) else {}
    mean, error = values.mean(), values.std(ddof=1) / len(values) ** 0.5
    reach = stats.t.ppf(0.975, len(values) - 1) * error
    return {"mean": float(mean), "standard_error": float(error), "low": float(mean - reach),
            "high": float(mean + reach)}


def squared_mmd(x, y):
    """The unbiased squared MMD of x (m, d) and y (n, d) under k(x, y) = (x.y / d + 1)^3 (arXiv 1801.01401), and
    its values without each row of x (m,) and without each of y (n,). m and n are at least 3."""
    x, y = [np.asarray(values, dtype=np.float64) for values in (x, y)]
    (m, d), n = x.shape, len(y)

    def sums(a, b):  # of the kernel over b, for each row of a; in slices, as a data set may be large
        slices = [a[first : first + 256] for first in range(0, len(a), 256)]
        return np.concatenate([((part @ b.T / d + 1) ** 3).sum(1) for part in slices])

    xx, yy = [sums(z, z) - ((z * z).sum(1) / d + 1) ** 3 for z in (x, y)]  # without k(z, z)
    xy, yx = sums(x, y), sums(y, x)
    value = xx.sum() / (m * (m - 1)) + yy.sum() / (n * (n - 1)) - 2 * xy.sum() / (m * n)
    without_x = ((xx.sum() - 2 * xx) / ((m - 1) * (m - 2)) + yy.sum() / (n * (n - 1))
                 - 2 * (xy.sum() - xy) / ((m - 1) * n))
    without_y = (xx.sum() / (m * (m - 1)) + (yy.sum() - 2 * yy) / ((n - 1) * (n - 2))
                 - 2 * (xy.sum() - yx) / (m * (n - 1)))
    return float(value), without_x, without_y


def jackknife_error(*groups):
    """The standard error of a statistic of independent samples, given for each its values without one of the sample's
    members (Efron and Stein 1981): the root of the sum of (n - 1) / n * sum((value - mean)^2)."""
    return float(sum((len(values) - 1) / len(values) * np.square(values - values.mean()).sum()
                     for values in groups) ** 0.5)


def compare_kid(embeds, base_embeds, real):
    """KID of the model's pictures and, if not None, of the base's to real images, with standard errors, and how much
    the model's is lower. Embeddings have length 1. Empty where there are fewer than 3 images."""
    if len(real) < 3:
        return {}
    scale, drawn = real.shape[1] ** 0.5, {"model": embeds, "base": base_embeds}
    found = {name: squared_mmd(x * scale, real * scale) for name, x in drawn.items() if x is not None}
    result = {name: {"mean": value, "standard_error": jackknife_error(*without)}
              for name, (value, *without) in found.items()}
    if "base" in found:  # picture k of both comes from the same prompt and noise, so that both go at once
        value, *without = [b - a for a, b in zip(found["model"], found["base"])]
        error = jackknife_error(*without)
        result["gain"] = {"mean": value, "standard_error": error, "low": value - 1.96 * error,
                          "high": value + 1.96 * error}
    return result


@dataclasses.dataclass
class Nearest:
    """The nearest of images that come one after the other, and the distance of the second nearest, for each query."""
    queries: torch.Tensor  # (n, f)
    distance: torch.Tensor  # (n,), of the nearest
    second: torch.Tensor  # (n,)
    index: torch.Tensor  # (n,), of the nearest

    @classmethod
    def of(cls, queries):
        """Begins, with nothing near."""
        return cls(queries, *torch.full((2, len(queries)), torch.inf), torch.full((len(queries),), -1))

    def see(self, features, first):
        """Looks at images number `first` and on: features (k, views, f), of which the nearest view counts."""
        for number, views in enumerate(features, first):
            distance = torch.cdist(self.queries, views).amin(1)
            nearer = distance < self.distance
            self.second = torch.where(nearer, self.distance, torch.minimum(self.second, distance))
            self.distance, self.index = distance.minimum(self.distance), self.index.where(~nearer, number)

    def ratios(self):
        """The distance to the nearest image over that to the second nearest, in [0, 1]; 1 without a second one."""
        return torch.where(self.second.isfinite(), self.distance / self.second.clamp(min=1e-9), 1.0).clamp(max=1.0)


def share(copies):
    """The share of True among n, and its 95 % interval (Clopper and Pearson 1934)."""
    k, n = int(np.sum(copies)), len(copies)
    low = float(stats.beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(stats.beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return {"copies": k, "pictures": n, "share": k / n, "low": low, "high": high}


def judge(copies, base_copies, num_images):
    """The verdict on memorising, by the rule at the top of this file, from whether each picture is a copy, of the
    model and of the base, which may be None, and the number of different training images."""
    result = {"model": share(copies)} | ({"base": share(base_copies)} if base_copies is not None else {})
    limit = max(COPY_SHARE, result["base"]["high"] if "base" in result else 0.0)
    if num_images < 3:
        verdict = "cannot say: a copy shows among 3 different images at least"
    elif result["model"]["low"] > limit:
        verdict = "memorising"
    elif result["model"]["high"] <= COPY_SHARE:
        verdict = "not memorising"
    else:
        verdict = "cannot say: too few pictures, or the base comes as near"
    return {"verdict": verdict, "limit": limit, **result}


# -------------------------------------------------------------------------------------------------------- measuring
@torch.no_grad()
def draw(accelerator, pipeline, prompts, seed, resolution, num_inference_steps, guidance_scale, batch_size, **_):
    """Yields the pictures of a batch of prompts, PIL images; number k of all from the seed + k, on the CPU whatever
    the device, so that two models start from the same noise."""
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        with accelerator.autocast():
            yield pipeline(batch, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
                           height=resolution, width=resolution, generator=[
                               torch.Generator().manual_seed(seed + first + k) for k in range(len(batch))]).images


def plan_prompts(prompts, images, num_images, seed):
    """The prompt of each picture: those given in turn, or the first caption of training images in random order."""
    if prompts:
        return [prompts[k % len(prompts)] for k in range(num_images)]
    rounds = [np.random.default_rng((seed, part)).permutation(len(images))
              for part in range(-(-num_images // len(images)))]
    captions = images.rows["captions"]
    return [captions[index][0] for index in np.concatenate(rounds)[:num_images].tolist()]


def measure_model(accelerator, clip, held_out, prompts, settings, title, source, loras):
    """Draws with a model and measures it; returns its pictures (PIL), embeds (n, d), patches (n, f), scores (n,) and
    held-out losses (n,), and what makes those comparable: a digest of its VAE, what it predicts, its betas."""
    pipeline = load_pipeline(source, loras, torch.float32, accelerator.device, safety_checker=None)
    bar, pictures, features = tqdm(total=len(prompts), desc=title, unit="picture", disable=None), [], []
    for made in draw(accelerator, pipeline, **{**settings, "prompts": prompts}):
        features.append(image_features(clip, made))
        pictures += [image.resize((TILE, TILE), Image.Resampling.BICUBIC) for image in made]  # for closest_pairs.png
        bar.update(len(made))
    bar.close()
    embeds, patches = map(torch.cat, zip(*features))
    texts = {prompt: text_features(clip, [prompt])[0] for prompt in set(prompts)}
    scores = 100 * (embeds * torch.stack([texts[prompt] for prompt in prompts])).sum(1).clamp(min=0)
    noise_scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    losses = held_out_losses(accelerator, pipeline.unet, pipeline.vae, pipeline.text_encoder, noise_scheduler,
                             held_out, settings["batch_size"]) if len(held_out) else torch.zeros(0)
    digest = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in pipeline.vae.state_dict().values()))
    return {"pictures": pictures, "embeds": embeds, "patches": patches, "scores": scores, "losses": losses,
            "latents": (digest.hexdigest(), noise_scheduler.config.prediction_type,
                        noise_scheduler.betas.numpy().tobytes())}


def look_at(images, clip, queries, batch_size, title):
    """Goes through images once; returns the embeddings of the different ones (n, d), their indexes, and for each of
    `queries`, patch features (m, f), which of them is nearest. Mirrored images count as views of the same."""
    nearest, seen, embeds, kept = [Nearest.of(query) for query in queries], set(), [], []
    loader = torch.utils.data.DataLoader(images, batch_size, sampler=[(0, index, 1.0) for index in range(len(images))])
    for batch in tqdm(loader, title, disable=None, leave=False):
        pixels = {hashlib.sha256(image.numpy().tobytes()).digest(): (image, index)
                  for image, index in zip(batch["pixel_values"], batch["index"].tolist())}
        new = [pixels[digest] for digest in pixels if digest not in seen]
        if not new:
            continue
        seen |= pixels.keys()
        upright = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image, _ in new]
        views = [image_features(clip, shown) for shown in (upright, [ImageOps.mirror(image) for image in upright])]
        for query in nearest:
            query.see(torch.stack([patches for _, patches in views], dim=1), len(kept))
        embeds.append(views[0][0])
        kept += [index for _, index in new]
    return torch.cat(embeds) if embeds else torch.zeros(0, 1), kept, nearest


def paired(model, base, less_is_better=False):
    """The mean of the model's values, of the base's if there are any, and of what the model gains on it, paired."""
    result = {"model": interval(model)}
    if base is not None:
        gain = np.asarray(model, dtype=np.float64) - np.asarray(base, dtype=np.float64)
        result |= {"base": interval(base), "gain": interval(-gain if less_is_better else gain)}
    return result


def compare(model, base, real, unseen, nearest, num_different):
    """All figures by name, from what `measure_model` returns, embeddings of training and of held-out images, and
    `Nearest` of each model's pictures. `base` may be None."""
    def of(name, change=lambda values: values.double().numpy()):
        return change(model[name]), change(base[name]) if base else None

    likeness = of("embeds", lambda embeds: embeds.double().numpy() @ real.double().numpy().mean(0))
    losses = of("losses") if not base or base["latents"] == model["latents"] else (of("losses")[0], None)
    similarity = [1 - part.distance.double().numpy() ** 2 / 2 for part in nearest]  # the cosine: lengths are 1
    copies = [(part.ratios() < COPY_RATIO).numpy() for part in nearest]
    if not base:
        similarity, copies = [*similarity, None], [*copies, None]
    return {"clip_score": paired(*of("scores")), "clip_image_similarity": paired(*likeness),
            "kid": compare_kid(*of("embeds"), real), "kid_held_out": compare_kid(*of("embeds"), unseen),
            "held_out_loss": paired(*losses, less_is_better=True) if len(losses[0]) else {},
            "nearest_similarity": paired(*similarity), "memorisation": judge(*copies, num_different)}


# ---------------------------------------------------------------------------------------------------------- report
def print_table(result, num_images, num_held_out):
    """Prints the figures, with standard errors, and the verdict."""
    def cell(numbers, wanted):
        if not numbers:
            return "-"
        if wanted == "gain":
            return f"{numbers['mean']:+.3g}" + (
                f" ({numbers['low']:+.3g} to {numbers['high']:+.3g})" if "low" in numbers else "")
        return f"{numbers['mean']:.4g}" + (
            f" +- {numbers['standard_error']:.2g}" if "standard_error" in numbers else "")

    print(f"{'':23}{'model':20}{'base':20}gain (95 % interval)")
    for name, label in (("clip_score", "CLIP score"), ("clip_image_similarity", "CLIP image similarity"),
                        ("kid", f"KID, {num_images} images"), ("kid_held_out", f"KID, {num_held_out} held out"),
                        ("held_out_loss", "held-out loss"), ("nearest_similarity", "to the nearest image")):
        if found := result[name]:
            print(f"{label:23}" + "".join(f"{cell(found.get(part), part):20}" for part in ("model", "base", "gain")))
    found = result["memorisation"]
    for name in ("model", "base"):
        if name in found:
            print("copies of images, {}: {copies} of {pictures} pictures, {share:.1%} "
                  "({low:.1%} to {high:.1%})".format(name, **found[name]))
    print(f"Memorisation (above {found['limit']:.1%}): {found['verdict']}")


def list_pictures(model, nearest, prompts, names, seed):
    """What was found of each picture of the model, with the base's beside."""
    keys, rows = ("", "base_")[: len(nearest)], []
    for k, prompt in enumerate(prompts):
        row = {"prompt": prompt, "seed": seed + k, "clip_score": model["scores"][k].item()}
        for key, part in zip(keys, nearest):
            ratio = part.ratios()[k].item()
            row |= {f"{key}nearest": names[part.index[k]], f"{key}ratio": ratio, f"{key}copy": ratio < COPY_RATIO,
                    f"{key}similarity": 1 - part.distance[k].item() ** 2 / 2}
        rows.append(row)
    return rows


def closest_pictures(rows):
    """The numbers of the PAIRS pictures that come closest to an image, each image once before one comes twice."""
    times, ranked = Counter(), []
    for k in sorted(range(len(rows)), key=lambda k: -rows[k]["similarity"]):
        ranked.append((times[rows[k]["nearest"]], len(ranked), k))
        times[rows[k]["nearest"]] += 1
    return [k for _, _, k in sorted(ranked)[:PAIRS]]


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


def draw_pairs(rows, columns, labels, font=None):
    """A picture of the closest pairs: rows of findings (see `list_pictures`) above columns of tiles, which have these
    labels on the left."""
    font, line, left = load_font(font, FONT_SIZE), round(FONT_SIZE * 1.4), 90
    texts = [[*wrap(row["prompt"], font, TILE - MARGIN, 4), *wrap(row["nearest"], font, TILE - MARGIN, 2),
              f"similarity {row['similarity']:.3f}", f"ratio {row['ratio']:.2f}{': a copy' if row['copy'] else ''}"]
             for row in rows]
    top = max(map(len, texts)) * line + MARGIN
    size = (left + len(rows) * (TILE + MARGIN), top + len(labels) * (TILE + MARGIN))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for number, label in enumerate(labels):
        pen.multiline_text((MARGIN, top + number * (TILE + MARGIN)), "\n".join(wrap(label, font, left - MARGIN, 4)),
                           fill="black", font=font)
    for number, (text, tiles) in enumerate(zip(texts, columns)):
        x = left + number * (TILE + MARGIN)
        pen.multiline_text((x, MARGIN // 2), "\n".join(text), fill="black", font=font)
        for row, tile in enumerate(tiles):
            sheet.paste(tile, (x, top + row * (TILE + MARGIN)))
    return sheet


def save_report(output_dir, result, sheet):
    """Writes the picture and the figures beside their places, then renames both. Raises `InputError`."""
    places = [output_dir / name for name in ("closest_pairs.png", "evaluation.json")]
    unfinished = [path.with_name(f".{path.name}.unfinished") for path in places]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        sheet.save(unfinished[0], "png")
        unfinished[1].write_text(json.dumps(result, indent=2) + "\n")
        for path, place in zip(unfinished, places):
            path.replace(place)
    except OSError as error:  # a full disk
        raise InputError(f"--output_dir={output_dir}: cannot be written to ({last_line(error)})") from None
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)


def evaluate(args):
    """Measures everything and writes it. Raises `InputError`."""
    given, loras = check_args(args)
    images, held_out = load_images(**vars(args))
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if accelerator.num_processes > 1:
        raise InputError("runs as one process; start it by `python evaluate.py`")
    clip = load_clip(args.clip_model, accelerator.device)
    prompts = plan_prompts(given, images, args.num_images, args.seed)
    measure = functools.partial(measure_model, accelerator, clip, held_out, prompts, vars(args))
    model = measure("Model", args.model, loras)
    base = measure("Base", args.base, []) if args.base else None
    both = [model, base] if base else [model]
    real, kept, nearest = look_at(images, clip, [part["patches"] for part in both], args.batch_size, "Images")
    unseen, *_ = look_at(held_out, clip, [], args.batch_size, "Held-out images")
    result = compare(model, base, real, unseen, nearest, len(kept))
    names = [name_of(images.rows[index]["image"], index) for index in kept]
    rows = list_pictures(model, nearest, prompts, names, args.seed)
    closest = closest_pictures(rows)
    tiles = [[model["pictures"][k], tile_of(images, kept[nearest[0].index[k]])] + (
        [base["pictures"][k]] if base else []) for k in closest]
    sheet = draw_pairs([rows[k] for k in closest], tiles, ["drawn", "nearest image", "base"][: len(tiles[0])],
                       args.font)
    numbers = {"training_images": len(images), "different_images": len(kept), "held_out_images": len(held_out)}
    save_report(Path(args.output_dir), {**numbers, **result, "settings": vars(args), "pictures": rows}, sheet)
    print_table(result, len(kept), len(unseen))
    if base and base["latents"] != model["latents"]:
        print("The held-out losses cannot be compared: VAE, prediction type or noise schedule differ.")
    print(f"Figures: {Path(args.output_dir, 'evaluation.json')}, closest pairs: closest_pairs.png beside it")


def main(argv=None):
    """Runs the tool; a mistake of the user's ends with status 2 and its message."""
    args = parse_args(argv)
    for library in (diffusers, transformers):  # their bars and remarks would drown ours
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        evaluate(args)
    except (InputError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped; nothing was written.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
