"""Draw pictures with a Stable Diffusion model, beside its base if you like, and a labelled grid of them.

    sdtune generate my_model --prompts "a drawing of a cat" "a drawing of a dog" --seeds 0 1 2 3
    sdtune generate my_model --prompts "a drawing of a cat" --num_inference_steps 10 25 50 --guidance_scale 3 5 7.5
    sdtune generate stable-diffusion-v1-5/stable-diffusion-v1-5 --lora my_lora:0.8 --lora other.safetensors \
        --base stable-diffusion-v1-5/stable-diffusion-v1-5 --config my_recipe.yaml

Every combination of prompt, seed, steps and scale is drawn once per model and written to --output_dir as a PNG file
whose metadata holds the prompt and all settings, as JSON (`settings`) and in the form of A1111 (`parameters`). Base
and result start from the same noise. Pictures that are there already, with the same settings and weights, are kept:
a run that was stopped goes on by the same command. In a recipe, the flags stand under `evaluation:`.
"""

import hashlib
import json
from pathlib import Path

import diffusers
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from sdtune.arguments import SWITCH, guidance_number, new_parser, positive_int, random_seed
from sdtune.errors import InputError, counted, gathered, last_line, raise_problems, told_to_user
from sdtune.fonts import load_font
from sdtune.grids import FONT_SIZE, save_grids
from sdtune.inference import (
    EVALUATE_KEYS,
    add_inference_arguments,
    check_output_dir,
    check_precision,
    find_loras,
    load_pipeline,
    parse_with_config,
    read_configs,
    read_prompts,
)
from sdtune.lora_layouts import LORA_FILE
from sdtune.models import DTYPES, quiet_libraries, vae_factor
from sdtune.pictures import list_pictures, missing, parameters_text, save_picture, settings_of

PROGRAM = "sdtune generate"
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


def make_parser():
    """The command's flags."""
    usage = f"{PROGRAM} MODEL (--prompts PROMPT ... | --prompts_file FILE | --config FILE.yaml) [flags]"
    parser = new_parser(__doc__, usage)
    add_inference_arguments(parser)
    add = parser.add_argument
    add("--prompts", nargs="+", help="what to draw; a prompt that comes twice is drawn once")
    add("--prompts_file", help="text file with a prompt per line")
    add("--negative_prompt", default="", help="what to steer away from")
    add(
        "--seeds",
        "--seed",
        nargs="+",
        type=random_seed,
        default=[0],
        help="a picture of each prompt for each [0, 9e18]",
    )
    add(
        "--num_inference_steps",
        nargs="+",
        type=positive_int,
        default=[25],
        help="numbers of denoising steps [1, inf)",
    )
    add(
        "--guidance_scale",
        nargs="+",
        type=guidance_number,
        default=[7.5],
        help="scales of classifier-free guidance; 1: none [1, inf)",
    )
    add("--scheduler", help=f"class of diffusers, or {', '.join(SCHEDULERS)}; default: the model's own")
    add("--height", type=positive_int, help="pixels; default: the model's own [1, inf)")
    add("--width", type=positive_int, help="pixels; default: the model's own [1, inf)")
    add("--batch_size", type=positive_int, default=1, help="pictures drawn at once [1, inf)")
    add("--mixed_precision", default="no", choices=list(DTYPES), help="half precision of the weights, or no")
    add("--output_dir", default="generated", help="folder for the pictures and grids")
    add("--overwrite", **SWITCH, help="replace pictures that other settings or weights drew")
    return parser


def parse_args(argv=None):
    """Returns the flags, of the command line and the recipe, and what is wrong with them."""
    return parse_with_config(
        make_parser(), argv, EVALUATE_KEYS, aliases={"seed": "seeds"}
    )  # as DreamBooth's recipes say


def check_args(args):
    """Lists what is wrong with the flags, as far as that can be told without weights."""
    problems = check_precision(args.mixed_precision)
    with gathered(problems):
        read_prompts(args.prompts, args.prompts_file)
    with gathered(problems):
        find_loras(args.lora)
    with gathered(problems):
        load_font(args.font, FONT_SIZE)
    problems += check_pipeline(args, "MODEL", args.model)
    if args.base:
        problems += check_pipeline(args, "--base", args.base)
    return problems + check_output_dir(args.output_dir)


def check_pipeline(args, flag, source):
    """Lists what is wrong with a model's configs, or between them and the flags; reads no weights."""
    try:
        vae, scheduler = read_configs(flag, source)
    except InputError as error:
        return [str(error)]
    problems, factor = [], vae_factor(vae)
    for side, value in (("height", args.height), ("width", args.width)):
        if value is not None and value % factor:
            usable = value // factor * factor or factor
            problems.append(f"--{side}={value}: must be a multiple of {factor} for this VAE; use {usable}")
    num_timesteps = scheduler.get("num_train_timesteps", 1000)
    for steps in args.num_inference_steps:
        if steps > num_timesteps:
            problems.append(f"--num_inference_steps={steps}: must be at most {num_timesteps}, the steps of training")
    usable_steps = [steps for steps in args.num_inference_steps if steps <= num_timesteps]
    return problems + check_scheduler(args.scheduler, scheduler, usable_steps, source)


def check_scheduler(name, config, num_inference_steps, source):
    """Lists whether a scheduler does not exist, or cannot be used with the config of `source` and these steps."""
    try:
        kind, options, _ = choose_scheduler(name, config)
        for steps in num_inference_steps:
            kind.from_config(config, **options).set_timesteps(steps)
    except InputError as error:
        return [str(error)]
    except Exception as error:  # every scheduler has its own reasons
        told = f"cannot be used for {num_inference_steps} steps of {source} ({last_line(error)})"
        return [f"--scheduler={name}: {told}"]
    return []


def choose_scheduler(name, config):
    """Returns (class, options, name in A1111) of the scheduler with this name or, without one, of the model's config.
    Raises `InputError`."""
    if name in SCHEDULERS:
        class_name, options, known_as = SCHEDULERS[name]
    else:
        class_name, options = name or config["_class_name"], {}
        known = {kind: label for kind, more, label in SCHEDULERS.values() if not more}
        known_as = known.get(class_name, class_name)
    kind = getattr(diffusers, class_name, None)
    if "DDIMScheduler" not in getattr(kind, "_compatibles", []):
        raise InputError(
            f"--scheduler={class_name}: is no scheduler of diffusers for Stable Diffusion; use "
            f"{', '.join(SCHEDULERS)} or the name of a class"
        )
    return kind, options, known_as


def local_folder(source):
    """The folder of a model; one on the Hub is downloaded. Raises `InputError`."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(diffusers.StableDiffusionPipeline.download(source))
    except Exception as error:  # of the Hub or of the connection
        raise InputError(f"{source}: cannot be downloaded ({last_line(error)})") from None


def weights_hash(path):
    """The first ten hexadecimal digits of a SHA-256 of a file, or of the weights in a pipeline folder."""
    files = [path]
    if path.is_dir():
        parts = [file for part in ("text_encoder", "unet", "vae") for file in (path / part).glob("*")]
        files = sorted(file for file in parts if file.suffix in (".safetensors", ".bin"))
    digest = hashlib.sha256()
    for name in files:
        with name.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:10]


def describe_model(args, source, folder, loras):
    """The settings that all pictures of one model share, without paths: pictures are passed on."""
    config = diffusers.DDPMScheduler.load_config(folder, subfolder="scheduler")
    unet = diffusers.UNet2DConditionModel.load_config(folder, subfolder="unet")
    vae = diffusers.AutoencoderKL.load_config(folder, subfolder="vae")
    size = unet["sample_size"]  # of the latents
    own_height, own_width = [size, size] if isinstance(size, int) else size
    kind, options, known_as = choose_scheduler(args.scheduler, config)
    return {
        "negative_prompt": args.negative_prompt,
        "height": args.height or own_height * vae_factor(vae),
        "width": args.width or own_width * vae_factor(vae),
        "scheduler": {"class": kind.__name__, **options},
        "sampler": known_as,
        "precision": args.mixed_precision,
        "model": Path(source).resolve().name if Path(source).exists() else source,
        "model_hash": weights_hash(folder),
        "lora": [describe_lora(path, scale) for path, scale in loras],
    }


def describe_lora(path, scale):
    """The settings of a picture that say which LoRA it was drawn with."""
    name = path.parent.name if path.name == LORA_FILE else path.stem
    return {"name": name, "scale": scale, "hash": weights_hash(path)}


def load_drawing_pipeline(args, folder, loras, device):
    """Loads a pipeline with its LoRAs and the scheduler that was asked for."""
    pipeline = load_pipeline(folder, loras, DTYPES[args.mixed_precision], device)
    kind, options, _ = choose_scheduler(args.scheduler, pipeline.scheduler.config)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)
    return pipeline


def warn_of_cut_prompts(tokenizer, prompts):
    """Says which prompts are longer than the text encoder can read."""
    limit = tokenizer.model_max_length
    cut = [prompt for prompt in prompts if len(tokenizer(prompt, verbose=False).input_ids) > limit]
    if cut:
        limit = f"more than {limit} tokens"
        told = (
            f"Warning: {counted(len(cut), f'prompt has {limit} and is', f'prompts have {limit} and are')} cut, such as"
        )
        print("\n  ".join([told, *[f"{prompt[:80]}..." for prompt in cut[:5]]]))


@torch.no_grad()
def draw(pipeline, pictures, settings, batch_size):
    """Yields (picture, image, whether the model's safety checker blackened it), batch by batch. The noise of a picture
    depends on its seed alone, since it is drawn on the CPU."""
    alike = {}
    for picture in pictures:
        alike.setdefault((picture.steps, picture.scale), []).append(picture)
    for (steps, scale), group in alike.items():
        for first in range(0, len(group), batch_size):
            batch = group[first : first + batch_size]
            made = pipeline(
                [picture.prompt for picture in batch],
                num_inference_steps=steps,
                guidance_scale=scale,
                negative_prompt=[settings["negative_prompt"]] * len(batch),
                height=settings["height"],
                width=settings["width"],
                generator=[torch.Generator().manual_seed(picture.seed) for picture in batch],
            )
            yield from zip(batch, made.images, made.nsfw_content_detected or [False] * len(batch))


def generate(args):
    """Draws what is missing, then the grids. Several processes share the pictures. Raises `InputError`."""
    state, output_dir = PartialState(), Path(args.output_dir)
    prompts = read_prompts(args.prompts, args.prompts_file)
    models = {"result": (args.model, find_loras(args.lora))}
    if args.base:
        models["base"] = (args.base, [])
    folders = {name: local_folder(source) for name, (source, _) in models.items()}
    shared = {name: describe_model(args, source, folders[name], loras) for name, (source, loras) in models.items()}
    pictures = list_pictures(prompts, args.seeds, args.num_inference_steps, args.guidance_scale, list(models))
    left = missing(pictures, shared, output_dir, args.overwrite)
    state.wait_for_everyone()  # every process has looked before the first one writes
    output_dir.mkdir(parents=True, exist_ok=True)

    mine = left[state.process_index :: state.num_processes]
    num_blackened = 0
    bar = tqdm(total=len(mine), unit="picture", disable=None if state.is_main_process else True)
    for name, (_, loras) in models.items():
        wanted = [picture for picture in mine if picture.model == name]
        if not wanted:
            continue
        pipeline = load_drawing_pipeline(args, folders[name], loras, state.device)
        if state.is_main_process:
            warn_of_cut_prompts(pipeline.tokenizer, prompts)
        for picture, image, is_black in draw(pipeline, wanted, shared[name], args.batch_size):
            settings = settings_of(picture, shared)
            texts = {"parameters": parameters_text(settings), "settings": json.dumps(settings)}
            save_picture(image, output_dir / picture.name(), texts)
            num_blackened += is_black
            bar.update()
        del pipeline  # before the next one is loaded
    bar.close()

    state.wait_for_everyone()
    if state.is_main_process:
        grids = save_grids(pictures, shared, output_dir, args.font) if len(pictures) > 1 else []
        num_others = counted(len(pictures) - len(left), "was", "were")
        print(f"{counted(len(left), 'picture')} drawn, {num_others} there: {output_dir}")
        for path in grids:
            print(f"Grid: {path}")
    if num_blackened:
        print(f"Warning: the model's safety checker made {num_blackened} of them black.")


def main(argv=None):
    """Runs the command; a mistake of the user's ends with status 2 and its message."""
    args, problems = parse_args(argv)
    quiet_libraries()
    stopped = "Stopped; the same command goes on from here."
    with told_to_user(PROGRAM, errors=(InputError, OSError), stopped=stopped):
        raise_problems(problems + check_args(args))
        generate(args)
