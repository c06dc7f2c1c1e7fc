"""Drawn pictures that say how they were made: their order, their names, and the settings in their files."""

import dataclasses
import itertools
import json
import re

import diffusers
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdtune.errors import InputError, counted, last_line


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
        words = re.sub(r"\W+", "-", self.prompt.lower()).strip("-")[:40].strip("-") or "empty"
        whole, _, decimals = str(self.scale).partition(".")
        base = "_base" if self.model == "base" else ""
        settings = f"seed{self.seed:04d}_steps{self.steps:03d}_scale{whole:0>2}.{decimals}"
        return f"{self.number:03d}_{words}_{settings}{base}.png"


def list_pictures(prompts, seeds, steps, scales, models):
    """Every combination as a picture, in the order of their names."""
    numbered = list(enumerate(prompts))
    combinations = itertools.product(numbered, sorted(set(seeds)), sorted(set(steps)), sorted(set(scales)), models)
    return [Picture(number, prompt, *rest) for (number, prompt), *rest in combinations]


def settings_of(picture, shared):
    """All settings of a picture, as its metadata holds them: its own, and what is `shared` by those of its model."""
    return {
        "prompt": picture.prompt,
        "seed": picture.seed,
        "num_inference_steps": picture.steps,
        "guidance_scale": picture.scale,
        **shared[picture.model],
    }


def parameters_text(settings):
    """The settings as A1111 and Forge write and read them, LoRAs as tags in the prompt."""
    tags = [f" <lora:{lora['name']}:{lora['scale']:g}>" for lora in settings["lora"]]
    lines = [settings["prompt"] + "".join(tags)]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    values = {
        "Steps": settings["num_inference_steps"],
        "Sampler": settings["sampler"],
        "CFG scale": f"{settings['guidance_scale']:g}",
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": settings["model_hash"],
        "Model": settings["model"],
        "Version": f"diffusers {diffusers.__version__}",
    }
    lines.append(", ".join(f"{key}: {quoted(str(value))}" for key, value in values.items()))
    return "\n".join(lines)


def quoted(value):
    """The text in quotes if it holds what separates values."""
    return json.dumps(value) if "," in value or ":" in value else value


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


def read_settings(path):
    """The settings in a picture's metadata; none where they cannot be read, None without a file."""
    if not path.exists():
        return None
    try:
        with Image.open(path) as image:
            return json.loads(image.info["settings"])
    except (OSError, ValueError, KeyError):
        return {}


def missing(pictures, shared, output_dir, overwrite):
    """The pictures that are still to be drawn. Raises `InputError` for files that are not what would be drawn, unless
    they may be replaced."""
    left, others = [], []
    for picture in pictures:
        path = output_dir / picture.name()
        found = read_settings(path)
        if found == settings_of(picture, shared):
            continue
        left.append(picture)
        if found is not None:
            others.append(path)
    if others and not overwrite:
        number = counted(len(others), "picture is", "pictures are")
        told = (
            f"{number} there that other settings or weights drew; add --overwrite to replace them, "
            "or give another --output_dir:"
        )
        raise InputError("\n  ".join([told, *map(str, others[:5])]))
    return left
