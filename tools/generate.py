#!/usr/bin/env python
"""Draw pictures with a Stable Diffusion model, beside its base if you like, and a labelled grid of them.

    python generate.py my_model --prompts "a drawing of a cat" "a drawing of a dog" --seeds 0 1 2 3
    python generate.py my_model --prompts "a drawing of a cat" --num_inference_steps 10 25 50 --guidance_scale 3 5 7.5
    python generate.py stable-diffusion-v1-5/stable-diffusion-v1-5 --lora my_lora:0.8 --lora other.safetensors \
        --base stable-diffusion-v1-5/stable-diffusion-v1-5 --config my_recipe.yaml

Every combination of prompt, seed, steps and scale is drawn once per model and written to --output_dir as a PNG file
whose metadata holds the prompt and all settings, as JSON (`settings`) and in the form of A1111 (`parameters`). Base
and result start from the same noise. Pictures that are there already, with the same settings and weights, are kept:
a run that was stopped goes on by the same command. In a recipe, the flags stand under `evaluation:`.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import diffusers
import torch
import transformers
import yaml
from accelerate import PartialState
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

LORA_FILE = "pytorch_lora_weights.safetensors"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCHEDULERS = {  # short name: (class of diffusers, options, name in A1111)
    "ddim": ("DDIMScheduler", {}, "DDIM"),
    "ddpm": ("DDPMScheduler", {}, "DDPM"),
    "deis": ("DEISMultistepScheduler", {}, "DEIS"),
    "dpm++": ("DPMSolverMultistepScheduler", {}, "DPM++ 2M"),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M Karras"),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "DPM++ 2M SDE"),
    "euler": ("EulerDiscreteScheduler", {}, "Euler"),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, "Euler a"),
    "heun": ("HeunDiscreteScheduler", {}, "Heun"),
    "lms": ("LMSDiscreteScheduler", {}, "LMS"),
    "pndm": ("PNDMScheduler", {}, "PLMS"),
    "unipc": ("UniPCMultistepScheduler", {}, "UniPC"),
}
LABELS = {"prompt": "{}", "seed": "seed {}", "steps": "{} steps", "scale": "scale {:.10g}", "model": "{}"}
OTHER_TOOLS_KEYS = set("""caption_column clip_model dataset_config_name image_column instance_prompt max_train_samples
    num_images num_validation_samples resolution skip_bad_images cache_dir train_seed""".split())  # of evaluate.py
TILES = (128, 256)  # smallest and largest long side of a picture in the grid, in pixels
ROWS_PER_GRID = 24  # more go to further grids
COLUMNS_OF_PROMPTS = 8  # more are rows
MARGIN, LABEL_WIDTH, FONT_SIZE = 8, 180, 15
FONTS = ("DejaVuSans.ttf", "arial.ttf", "Arial.ttf")  # of systems; Pillow's own font has few letters beyond a to z


class InputError(ValueError):
    """A mistake in what the user gave; its text is all that they need to see."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """What one picture depends on, apart from what all pictures of the run share."""
    number: int  # of the prompt
    prompt: str
    seed: int
    steps: int
    scale: float
    model: str  # "result" or "base"

    def name(self):
        """The file's name: names sort by prompt, seed, steps and scale, and base comes beside result."""
        slug = re.sub(r"\W+", "-", self.prompt.lower()).strip("-")[:40].strip("-") or "empty"
        whole, _, fraction = str(self.scale).partition(".")
        base = "_base" if self.model == "base" else ""
        return (f"{self.number:03d}_{slug}_seed{self.seed:04d}_steps{self.steps:03d}_scale{whole:0>2}.{fraction}"
                f"{base}.png")


# ------------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    """Reads the command line and `--config`; a flag that is wrong by itself ends with status 2 and one message."""
    usage = "%(prog)s MODEL (--prompts PROMPT ... | --prompts_file FILE | --config FILE.yaml) [flags]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="pipeline folder or Hub id of a Stable Diffusion 1 or 2")
    add("--base", help="model to draw the same pictures with, for comparison; gets no LoRA")
    add("--lora", action="append", metavar="PATH[:SCALE]", help="LoRA file or folder for MODEL; may be given again")
    add("--prompts", nargs="+", help="what to draw; a prompt that comes twice is drawn once")
    add("--prompts_file", help="text file with a prompt per line")
    add("--negative_prompt", default="", help="what to steer away from")
    add("--seeds", "--seed", nargs="+", type=int, default=[0], help="a picture of each prompt for each")
    add("--num_inference_steps", nargs="+", type=int, default=[25], help="numbers of denoising steps")
    add("--guidance_scale", nargs="+", type=float, default=[7.5], help="scales of classifier-free guidance; 1: none")
    add("--scheduler", help=f"class of diffusers, or {', '.join(SCHEDULERS)}; default: the model's own")
    add("--height", type=int, help="pixels; default: the model's own")
    add("--width", type=int, help="pixels; default: the model's own")
    add("--batch_size", type=int, default=1, help="pictures drawn at once")
    add("--mixed_precision", default="no", choices=list(DTYPES), help="half precision of the weights, or no")
    add("--output_dir", default="generated", help="folder for the pictures and grids")
    add("--overwrite", action=argparse.BooleanOptionalAction, default=False,
        help="replace pictures that other settings or weights drew")
    add("--font", metavar="FILE.ttf", help="font of the labels; default: DejaVu Sans, Arial or Pillow's own")
    add("--config", metavar="FILE.yaml", help="flags by name, maybe under `evaluation:`; the command line wins")
    return parse_recipe(parser, argv)


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


def check_args(args):
    """Checks everything that can be checked without weights; returns (prompts, LoRAs as (file, scale)). Raises one
    `InputError` that names every problem."""
    problems, found = check_numbers(**vars(args)), []
    for read in (read_prompts, find_loras):
        try:
            found.append(read(**vars(args)))
        except InputError as error:
            problems.append(str(error))
    try:
        load_font(args.font, FONT_SIZE)
    except InputError as error:
        problems.append(str(error))
    problems += check_pipeline("MODEL", args.model, **vars(args))
    problems += check_pipeline("--base", args.base, **vars(args)) if args.base else []
    output = Path(args.output_dir)
    place = next(path for path in (output, *output.resolve().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        problems.append(f"--output_dir={output}: {place} is a file or cannot be written to; name another folder")
    if problems:
        raise InputError("\n  ".join(["", *problems] if len(problems) > 1 else problems))
    return found


def check_numbers(seeds, num_inference_steps, guidance_scale, batch_size, mixed_precision, **_):
    """Lists which numbers are out of range or cannot be obeyed here."""
    problems = []
    for flag, accepted, values, holds in (
        ("seeds", "from 0 to 2**63 - 1", seeds, lambda value: 0 <= value < 2**63),
        ("num_inference_steps", "1 or more", num_inference_steps, lambda value: value >= 1),
        ("guidance_scale", "1 (no guidance) or more", guidance_scale, lambda value: 1 <= value < math.inf),
        ("batch_size", "1 or more", [batch_size], lambda value: value >= 1),
    ):
        problems += [f"--{flag}={value}: must be {accepted}" for value in values if not holds(value)]
    if mixed_precision == "fp16" and not torch.accelerator.is_available():
        problems.append("--mixed_precision=fp16: a CPU cannot compute in it; use bf16 or no")
    return problems


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


def check_pipeline(flag, source, scheduler, num_inference_steps, height, width, lora, **_):
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
        config = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler")
    except (OSError, ValueError) as error:
        return [f"{name}: no whole pipeline, no name of one on the Hub, or no connection ({last_line(error)})"]
    divisor = 2 ** (len(vae["block_out_channels"]) - 1)
    problems = [f"--{side}={value}: must be a multiple of {divisor} for this VAE; use {value // divisor * divisor}"
                for side, value in (("height", height), ("width", width))
                if value is not None and (value < divisor or value % divisor)]
    most = config.get("num_train_timesteps", 1000)
    problems += [f"--num_inference_steps={steps}: must be at most {most}, the steps of training"
                 for steps in num_inference_steps if steps > most]
    try:
        kind, options, _ = choose_scheduler(scheduler, config)
        for steps in [steps for steps in num_inference_steps if 0 < steps <= most]:
            kind.from_config(config, **options).set_timesteps(steps)
    except InputError as error:
        problems.append(str(error))
    except Exception as error:  # every scheduler has its own reasons
        problems.append(f"--scheduler={scheduler}: cannot be used for {num_inference_steps} steps of {source} "
                        f"({last_line(error)})")
    return problems


def choose_scheduler(name, config):
    """Returns (class, options, name in A1111) of the scheduler with this name or, without one, of the model's config.
    Raises `InputError`."""
    kind, options, known_as = SCHEDULERS.get(name) or (name or config["_class_name"], {}, None)
    scheduler = getattr(diffusers, kind, None)
    if "DDIMScheduler" not in getattr(scheduler, "_compatibles", []):
        raise InputError(f"--scheduler={kind}: is no scheduler of diffusers for Stable Diffusion; use "
                         f"{', '.join(SCHEDULERS)} or the name of a class")
    plain = [label for other, more, label in SCHEDULERS.values() if other == kind and not more]
    return scheduler, options, known_as or (plain or [kind])[0]


def last_line(error):
    """The last line of an exception's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


# ---------------------------------------------------------------------------------------------------------- models
def local_folder(source):
    """The folder of a model; one on the Hub is downloaded. Raises `InputError`."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(diffusers.StableDiffusionPipeline.download(source))
    except Exception as error:  # of the Hub or of the connection
        raise InputError(f"{source}: cannot be downloaded ({last_line(error)})") from None


def weights_hash(paths):
    """The first ten hexadecimal digits of the SHA-256 of files, or of the weights in a pipeline folder."""
    digest = hashlib.sha256()
    for path in paths:
        parts = [path] if path.is_file() else sorted(
            file for part in ("text_encoder", "unet", "vae") for file in (path / part).glob("*")
            if file.suffix in (".safetensors", ".bin"))
        for part in parts:
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:10]


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


# -------------------------------------------------------------------------------------------------------- pictures
def list_pictures(prompts, seeds, num_inference_steps, guidance_scale, base, **_):
    """Every picture of the run, in the order of their names."""
    models = ["result", "base"] if base else ["result"]
    axes = [list(enumerate(prompts)), *map(sorted, map(set, (seeds, num_inference_steps, guidance_scale))), models]
    return [Picture(number, prompt, *rest) for (number, prompt), *rest in itertools.product(*axes)]


def describe(source, folder, loras, scheduler, negative_prompt, height, width, mixed_precision, **_):
    """The settings that all pictures of one model share, without paths: pictures are passed on."""
    config = diffusers.DDPMScheduler.load_config(folder, subfolder="scheduler")
    unet = diffusers.UNet2DConditionModel.load_config(folder, subfolder="unet")
    vae = diffusers.AutoencoderKL.load_config(folder, subfolder="vae")
    size, factor = unet["sample_size"], 2 ** (len(vae["block_out_channels"]) - 1)
    own_height, own_width = [size, size] if isinstance(size, int) else size
    kind, options, known_as = choose_scheduler(scheduler, config)
    return {"negative_prompt": negative_prompt, "height": height or own_height * factor,
            "width": width or own_width * factor, "scheduler": {"class": kind.__name__, **options},
            "sampler": known_as, "precision": mixed_precision,
            "model": Path(source).resolve().name if Path(source).exists() else source,
            "model_hash": weights_hash([folder]),
            "lora": [{"name": path.parent.name if path.name == LORA_FILE else path.stem, "scale": scale,
                      "hash": weights_hash([path])} for path, scale in loras]}


def settings_of(picture, shared):
    """All settings of a picture, as its metadata holds them."""
    return {"prompt": picture.prompt, "seed": picture.seed, "num_inference_steps": picture.steps,
            "guidance_scale": picture.scale, **shared[picture.model]}


def parameters_text(settings):
    """The settings as A1111 and Forge write and read them, LoRAs as tags in the prompt."""
    tags = "".join(f" <lora:{lora['name']}:{lora['scale']:g}>" for lora in settings["lora"])
    values = {"Steps": settings["num_inference_steps"], "Sampler": settings["sampler"],
              "CFG scale": f"{settings['guidance_scale']:g}", "Seed": settings["seed"],
              "Size": f"{settings['width']}x{settings['height']}", "Model hash": settings["model_hash"],
              "Model": settings["model"], "Version": f"diffusers {diffusers.__version__}"}
    quoted = [f"{key}: {json.dumps(str(value)) if set(str(value)) & set(',:') else value}"
              for key, value in values.items()]
    negative = f"Negative prompt: {settings['negative_prompt']}\n" if settings["negative_prompt"] else ""
    return f"{settings['prompt']}{tags}\n{negative}{', '.join(quoted)}"


def save_picture(image, path, texts):
    """Writes a PNG with text chunks beside its place, then renames it: nobody ever sees half of one. Raises
    `InputError`."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)  # as international text where Latin-1 lacks a letter
    unfinished = path.with_name(f".{path.name}.unfinished")  # what a killed run leaves is written over by the next
    try:
        with unfinished.open("wb") as file:
            image.save(file, "png", pnginfo=info)
        unfinished.replace(path)
    except OSError as error:  # a full disk
        raise InputError(f"{path}: cannot be written ({last_line(error)})") from None
    finally:
        unfinished.unlink(missing_ok=True)


def missing(pictures, shared, output_dir, overwrite):
    """The pictures that are still to be drawn. Raises `InputError` for files that are not what would be drawn, unless
    they may be replaced."""
    left, others = [], []
    for picture in pictures:
        path, found = output_dir / picture.name(), None
        if path.exists():
            try:
                with Image.open(path) as image:
                    found = json.loads(image.info["settings"])
            except (OSError, ValueError, KeyError):
                found = {}
        if found != settings_of(picture, shared):
            left.append(picture)
            others += [path] if found is not None else []
    if others and not overwrite:
        raise InputError("\n  ".join([f"{len(others)} pictures are there that other settings or weights drew; add "
                                      "--overwrite to replace them, or give another --output_dir:",
                                      *map(str, others[:5])]))
    return left


@torch.no_grad()
def draw(pipeline, pictures, settings, device, batch_size):
    """Yields (picture, image, whether the model's safety checker blackened it), batch by batch. The noise of a picture
    depends on its seed alone, since it is drawn on the CPU."""
    alike = {}
    for picture in pictures:
        alike.setdefault((picture.steps, picture.scale), []).append(picture)
    for (steps, scale), group in alike.items():
        for first in range(0, len(group), batch_size):
            batch = group[first : first + batch_size]
            made = pipeline(
                [picture.prompt for picture in batch], num_inference_steps=steps, guidance_scale=scale,
                negative_prompt=[settings["negative_prompt"]] * len(batch),
                height=settings["height"], width=settings["width"],
                generator=[torch.Generator().manual_seed(picture.seed) for picture in batch])
            yield from zip(batch, made.images, made.nsfw_content_detected or [False] * len(batch))


# ------------------------------------------------------------------------------------------------------------ grid
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


def layout(pictures):
    """Sorts pictures into {row: {column: picture}}, by labels (tuples of texts) that say what varies. Columns are
    scales, else steps, else seeds, else a few prompts, else models; base stands above or left of result."""
    values = {axis: list(dict.fromkeys(getattr(picture, axis) for picture in pictures)) for axis in LABELS}
    values["model"].sort()  # base before result
    varying = [axis for axis in ("scale", "steps", "seed", "prompt", "model") if len(values[axis]) > 1]
    many = len(values["prompt"]) > COLUMNS_OF_PROMPTS
    across = next((axis for axis in varying if axis != "prompt" or not many), None)
    down = [axis for axis in ("prompt", "seed", "steps", "scale", "model") if axis in varying and axis != across]
    rows = {}
    for picture in sorted(pictures, key=lambda picture: [values[axis].index(getattr(picture, axis))
                                                         for axis in (*down, *([across] if across else []))]):
        row = tuple(LABELS[axis].format(getattr(picture, axis)) or "(empty prompt)" for axis in down)
        column = (LABELS[across].format(getattr(picture, across)) or "(empty prompt)") if across else ""
        rows.setdefault(row, {})[column] = picture
    return rows


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


def make_grid(rows, folder, title, font):
    """Pastes the pictures of {row: {column: picture}} below a title, with labels above and to the left."""
    font = load_font(font, FONT_SIZE)
    line = round(FONT_SIZE * 1.4)
    columns = list(next(iter(rows.values())))
    with Image.open(folder / next(iter(next(iter(rows.values())).values())).name()) as first:
        factor = min(max(max(first.size), TILES[0]), TILES[1]) / max(first.size)
        width, height = [max(1, round(side * factor)) for side in first.size]
    left = LABEL_WIDTH if any(rows) else MARGIN
    total = max(left + len(columns) * (width + MARGIN), 3 * LABEL_WIDTH)
    heading = wrap(title, font, total - 2 * MARGIN, 4)
    labels = [wrap(column, font, width - MARGIN, 6) for column in columns]
    top = (len(heading) + max(map(len, labels))) * line + 2 * MARGIN
    texts = {row: [text for label in row for text in wrap(label, font, left - 2 * MARGIN, max(1, height // line - 3))]
             for row in rows}
    step = max(height, max(map(len, texts.values())) * line) + MARGIN
    grid = Image.new("RGB", (total, top + len(rows) * step), "white")
    pen = ImageDraw.Draw(grid)
    pen.multiline_text((MARGIN, MARGIN // 2), "\n".join(heading), fill="black", font=font)
    for column, label in enumerate(labels):
        place = (left + column * (width + MARGIN), MARGIN + len(heading) * line)
        pen.multiline_text(place, "\n".join(label), fill="black", font=font)
    for number, (row, pictures) in enumerate(rows.items()):
        y = top + number * step
        pen.multiline_text((MARGIN, y), "\n".join(texts[row]), fill="black", font=font)
        for column, label in enumerate(columns):
            with Image.open(folder / pictures[label].name()) as image:
                tile = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            grid.paste(tile, (left + column * (width + MARGIN), y))
    return grid


def save_grids(pictures, shared, folder, font):
    """Writes labelled grids of the pictures, named by their settings; returns the files."""
    settings = [settings_of(picture, shared) for picture in pictures]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    common = shared["result"]
    alone = {axis: LABELS[axis].format(next(iter(values))) for axis in ("prompt", "seed", "steps", "scale")
             if len(values := {getattr(picture, axis) for picture in pictures}) == 1}
    loras = [f"LoRA {lora['name']} at {lora['scale']:g}" for lora in common["lora"]]
    base = [f"base: {shared['base']['model']}"] if "base" in shared else []
    title = ", ".join([*alone.values(), common["sampler"], f"model: {common['model']}", *loras, *base])
    rows, paths = list(layout(pictures).items()), []
    for page in range(math.ceil(len(rows) / ROWS_PER_GRID)):
        paths.append(folder / f"grid_{name}{f'_{page + 1:03d}' if len(rows) > ROWS_PER_GRID else ''}.png")
        if not paths[-1].exists():  # else it shows these very pictures
            part = dict(rows[page * ROWS_PER_GRID : (page + 1) * ROWS_PER_GRID])
            grid = make_grid(part, folder, title, font)
            save_picture(grid, paths[-1], {"settings": json.dumps({"title": title, "rows": [
                {"label": row, "pictures": [picture.name() for picture in pictures.values()]}
                for row, pictures in part.items()]})})
    return paths


def warn_of_cut_prompts(tokenizer, prompts):
    """Says which prompts are longer than the text encoder can read."""
    cut = [prompt for prompt in prompts
           if len(tokenizer(prompt, verbose=False).input_ids) > tokenizer.model_max_length]
    if cut:
        print("\n  ".join([f"Warning: {len(cut)} prompts have more than {tokenizer.model_max_length} tokens and are "
                           "cut, such as", *[f"{prompt[:80]}..." for prompt in cut[:5]]]))


def generate(args):
    """Draws what is missing, then the grids. Several processes share the pictures. Raises `InputError`."""
    prompts, loras = check_args(args)
    state, output_dir = PartialState(), Path(args.output_dir)
    sources = {"result": (args.model, loras)} | ({"base": (args.base, [])} if args.base else {})
    folders = {name: local_folder(source) for name, (source, _) in sources.items()}
    shared = {name: describe(source, folders[name], adapters, **vars(args))
              for name, (source, adapters) in sources.items()}
    pictures = list_pictures(**{**vars(args), "prompts": prompts})
    left = missing(pictures, shared, output_dir, args.overwrite)
    state.wait_for_everyone()  # every process has looked before the first one writes
    output_dir.mkdir(parents=True, exist_ok=True)
    mine, blackened = left[state.process_index :: state.num_processes], 0
    bar = tqdm(total=len(mine), unit="picture", disable=None if state.is_main_process else True)
    for name, (_, adapters) in sources.items():
        wanted = [picture for picture in mine if picture.model == name]
        if not wanted:
            continue
        pipeline = load_pipeline(folders[name], adapters, DTYPES[args.mixed_precision], state.device)
        kind, options, _ = choose_scheduler(args.scheduler, pipeline.scheduler.config)
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)
        if state.is_main_process:
            warn_of_cut_prompts(pipeline.tokenizer, prompts)
        for picture, image, unsafe in draw(pipeline, wanted, shared[name], state.device, args.batch_size):
            settings = settings_of(picture, shared)
            save_picture(image, output_dir / picture.name(), {"parameters": parameters_text(settings),
                                                             "settings": json.dumps(settings)})
            blackened += unsafe
            bar.update()
        del pipeline
    bar.close()
    state.wait_for_everyone()
    if state.is_main_process:
        grids = save_grids(pictures, shared, output_dir, args.font) if len(pictures) > 1 else []
        print(f"{len(left)} pictures drawn, {len(pictures) - len(left)} were there: {output_dir}",
              *[f"Grid: {path}" for path in grids], sep="\n")
    if blackened:
        print(f"Warning: the model's safety checker made {blackened} of them black.")


def main(argv=None):
    """Runs the tool; a mistake of the user's ends with status 2 and its message."""
    args = parse_args(argv)
    for library in (diffusers, transformers):  # their bars and remarks would drown ours
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        generate(args)
    except (InputError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
