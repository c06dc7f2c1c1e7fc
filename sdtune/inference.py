"""Draw with a fine-tuned model: the flags and recipes of the commands that do, its LoRA files, and its pipeline."""

import os
import re
import sys
from pathlib import Path

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from sdtune.arguments import check_keys, nearest_beside, parse_words, path_name, read_config, setting_words
from sdtune.errors import InputError, is_utf8, last_line, remedy_for_missing
from sdtune.files import existing_place
from sdtune.lora_layouts import LORA_FILE
from sdtune.models import foreign_code, reason_of, refuse_foreign_code, tell_checkpoint, tell_no_pipeline

# The section `evaluation:` of a recipe is for two commands. These are the flags that one of them alone has.
GENERATE_KEYS = {"height", "negative_prompt", "scheduler", "seeds", "width"}
EVALUATE_KEYS = {
    "cache_dir",
    "caption_column",
    "clip_model",
    "dataset_config_name",
    "follow_symlinks",
    "hub_token",
    "image_column",
    "instance_prompt",
    "max_train_samples",
    "num_images",
    "num_validation_samples",
    "resolution",
    "skip_bad_images",
    "train_seed",
}


def add_inference_arguments(parser):
    """Adds which models draw, with which LoRAs, the font of labels, and the recipe."""
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        type=path_name,
        metavar="MODEL",
        help="pipeline folder or Hub id of a Stable Diffusion 1 or 2",
    )
    add("--base", help="model to compare with, such as the one that it was trained from; gets no LoRA")
    add("--lora", action="append", metavar="PATH[:SCALE]", help="LoRA file or folder for MODEL; may be given again")
    add("--font", metavar="FILE.ttf", help="font of the labels; default: DejaVu Sans, Arial or Pillow's own")
    add("--config", metavar="FILE.yaml", help="flags by name, maybe under `evaluation:`; the command line wins")


def parse_with_config(parser, argv, other_keys, aliases):
    """Parses `argv`, or the command line if that is None, after the flags under `evaluation:` in its `--config`, or at
    the top of a file without that section.

    Returns (args, what is wrong with them), as `parse_flags` does. `other_keys` are those that the section may hold
    for the other command; `aliases` maps other names that a recipe may have for a flag to the flag's.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    given, problems = parse_words(parser, argv)
    if not given.config:
        return given, problems
    words, recipe_problems = words_of_config(parser, given, other_keys, aliases)
    # In two passes: a list in the recipe would take MODEL as its last item.
    recipe, more_problems = parse_words(parser, words)
    if recipe.model:
        told = f"{recipe.model} stands in a list where one value is taken; use one"
        more_problems.append(f"--config={given.config}: {told}")
        recipe.model = None
    args, _ = parse_words(parser, argv, recipe)
    return args, recipe_problems + more_problems + problems


def words_of_config(parser, given, other_keys, aliases):
    """Returns (the words of a command line that say what the recipe in `given.config` says, but for what `given`, the
    flags of the command line, replaces, what is wrong with the recipe)."""
    recipe, problems = read_config(given.config, {"evaluation"})
    settings = dict(recipe.get("evaluation", recipe))
    for name, flag in aliases.items():
        if name in settings:
            value = settings.pop(name)
            settings.setdefault(flag, value)

    defaults = vars(parser.parse_args([]))
    left_aside = set(other_keys) if "evaluation" in recipe else set()
    known = defaults.keys() - {"config", "model", "dataset"}
    problems += check_keys(given.config, settings, known, left_aside)
    if given.prompts or given.prompts_file:
        left_aside |= {"prompts", "prompts_file"}
    if given.lora:  # which would be appended to
        left_aside.add("lora")

    settings = {key: value for key, value in settings.items() if key in known - left_aside}
    loras = settings.pop("lora", None) or []
    loras = loras if isinstance(loras, list) else [loras]
    return [*setting_words(settings, defaults), *[f"--lora={lora}" for lora in loras]], problems


def read_prompts(prompts, prompts_file):
    """The prompts, each once, from a list or else the lines of a file. Raises `InputError`."""
    if not prompts and not prompts_file:
        raise InputError("--prompts is missing: give this, --prompts_file or a recipe with prompts")
    if prompts and prompts_file:
        raise InputError("--prompts: contradicts --prompts_file; drop one")
    if prompts:
        found = [prompt.strip() for prompt in prompts]
    else:
        try:
            lines = Path(prompts_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts_file={prompts_file}: cannot be read as UTF-8 ({last_line(error)})") from None
        found = [line.strip() for line in lines if line.strip()]  # an empty line is no prompt, as "" is in a list
    if odd := [prompt for prompt in found if not is_utf8(prompt)]:
        raise InputError(f"--prompts: {odd[0]!a} is not UTF-8; if it is, set PYTHONUTF8=1")
    if not found:
        raise InputError(f"--prompts_file={prompts_file}: holds no prompts; write one per line")
    return list(dict.fromkeys(found))


def find_loras(loras):
    """The LoRA files of a list of `PATH[:SCALE]`, which may be None, with their scales. Raises `InputError` for what
    cannot be loaded."""
    found, problems = [], []
    for item in loras or []:
        path, scale = split_scale(item)
        path = path / LORA_FILE if path.is_dir() else path
        found.append((path, scale))
        try:
            with safe_open(path, "pt") as file:
                keys = list(file.keys())
        except (OSError, SafetensorError) as error:
            told = f"is no LoRA in a .safetensors file ({last_line(error)})"
            if not path.exists():
                remedy = remedy_for_missing(path) or f"name a LoRA file, or a folder with {LORA_FILE}"
                told = f"does not exist{nearest_beside(path)}; {remedy}"
            problems.append(f"--lora={item}: {path} {told}")
            continue
        if any(key.endswith(".dora_scale") for key in keys):  # diffusers would leave them out, and draw something else
            remedy = "convert it by `sdtune convert-lora --to diffusers`"
            problems.append(f"--lora={item}: is DoRA in kohya's layout; {remedy}")
    if problems:
        raise InputError("\n  ".join(problems))
    return found


def split_scale(item):
    """The path and the scale of `PATH[:SCALE]`; the scale is 1 where there is none, or where it is part of the name of
    what is there."""
    path, _, number = item.rpartition(":")
    if re.fullmatch(r"[-+]?\d*\.?\d+", number) and not Path(item).exists():
        return Path(os.path.expanduser(path)), float(number)
    return Path(os.path.expanduser(item)), 1.0


def read_configs(flag, source, token=None):
    """The configs of the VAE and the scheduler of a pipeline, which `flag` names; reads no weights. A `token` reaches
    a private one on the Hub. Raises `InputError` for what is no whole pipeline of Stable Diffusion 1 or 2."""
    if not source:
        raise InputError(f"{flag} is missing: name a pipeline folder or Hub id")
    name = f"{flag}={source}"
    if remedy := remedy_for_missing(source):
        raise InputError(f"{name}: does not exist; {remedy}")
    if Path(source, LORA_FILE).is_file() and not Path(source, "model_index.json").is_file():
        remedy = f"give the model that they were trained on, and --lora={source}"
        raise InputError(f"{name}: holds LoRA weights; {remedy}")
    if told := tell_checkpoint(source):
        raise InputError(f"{name}: {told}")
    try:
        parts = diffusers.StableDiffusionPipeline.load_config(source, token=token)
        vae = diffusers.AutoencoderKL.load_config(source, subfolder="vae", token=token)
        scheduler = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler", token=token)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {tell_no_pipeline(source, error)}") from None
    if foreign := {"text_encoder_2", "transformer"} & parts.keys():
        remedy = "use a Stable Diffusion 1 or 2"
        raise InputError(f"{name}: has a {min(foreign)} (SDXL, SD 3 or the like); {remedy}")
    if strange := foreign_code(parts):
        raise InputError(f"{name}: {strange}")
    return vae, scheduler


def check_precision(mixed_precision):
    """Lists whether this machine cannot compute in a precision."""
    if mixed_precision == "fp16" and not torch.accelerator.is_available():
        return ["--mixed_precision=fp16: a CPU cannot compute in it; use bf16 or no"]
    return []


def check_output_dir(output_dir):
    """Lists whether nothing can be written to a folder, which need not be there yet."""
    output = Path(output_dir)
    existing = existing_place(output)
    if existing.is_dir() and os.access(existing, os.W_OK):
        return []
    return [f"--output_dir={output}: {existing} is a file or cannot be written to; name another folder"]


def load_pipeline(source, loras, dtype, device, token=None, **parts):
    """Loads a pipeline, with `parts` instead of its own, and LoRAs, [(file, scale)], onto the device. A `token`
    reaches a private one on the Hub. Raises `InputError`."""
    try:
        refuse_foreign_code(source, token=token)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(source, dtype=dtype, token=token, **parts)
    except Exception as error:  # every format has its own way of being broken
        raise InputError(f"{source}: cannot be loaded ({reason_of(error)})") from None
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, (path, _) in zip(names, loras):
        load_lora(pipeline, path, name, source)
    if loras:
        pipeline.set_adapters(names, [scale for _, scale in loras])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


def load_lora(pipeline, path, name, source):
    """Adds the adapters in a file to the pipeline from `source`, under a name of their own. Raises `InputError` unless
    all of them fit."""
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    except Exception as error:  # of other models, or of layers that this one lacks; torch lists every one
        why = "its layers have other sizes" if "size mismatch" in str(error) else last_line(error)
        raise InputError(f"--lora={path}: does not fit {source} ({why}); give the model that it is for") from None
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    num_wanted = sum(bool(re.search(r"lora_A|lora_down|lora\.down", key)) for key in keys)
    parameters = [*pipeline.unet.named_parameters(), *pipeline.text_encoder.named_parameters()]
    num_loaded = sum(f".lora_A.{name}." in parameter for parameter, _ in parameters)
    if num_loaded != num_wanted or num_wanted == 0:  # which diffusers says in a warning at most
        raise InputError(
            f"--lora={path}: only {num_loaded} of its {num_wanted} layers are in {source}; give the model that it was "
            "trained on"
        )
