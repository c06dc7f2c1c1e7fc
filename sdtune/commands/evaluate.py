"""Measure a fine-tuned Stable Diffusion 1 or 2: does it follow prompts, look like its data, or copy them?

    sdtune evaluate my_model my_images --base stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --num_validation_samples 20
    sdtune evaluate stable-diffusion-v1-5/stable-diffusion-v1-5 my_images --lora my_lora --base ...

It draws --num_images pictures from the captions of the training images (or from --prompts), with the base from the
same noise, and writes to --output_dir evaluation.json and closest_pairs.png:

- CLIP score: 100 max(cos(picture, prompt), 0), arXiv 2104.08718 in the scale of torchmetrics (the paper's is 2.5);
  CLIP image similarity: the mean cosine between a picture and the real images, arXiv 2208.12242.
- KID (arXiv 1801.01401) between pictures and real images, here of CLIP embeddings scaled to the length of sqrt(d):
  compare figures of this command and the same --clip_model alone.
- Held-out loss: of the images that training held out by the same --num_validation_samples (and --max_train_samples
  with its --seed as --train_seed), against the base's; of squares, also after a training in aspect-ratio buckets.
- Memorisation: the share of pictures that are copies of an image, and a verdict: `judge` and COPY_RATIO in
  sdtune/measures.py hold the rule. Distances are between the patch features of CLIP's last layer, which keep what is
  where. CLIP's embedding keeps what a caption says, so that an honest new picture of a caption would pass for a copy.
  Mirrored copies count; exact duplicates among the images are one image, near duplicates hide a copy (find them by
  `sdtune check`).

Differences to the base are paired: by picture, or by image. Intervals are of 95 %: by Student's t, but for KID, where
they are 1.96 standard errors to both sides, and the share of copies, where they are those of Clopper and Pearson.
"""

import argparse
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import time
from collections import Counter
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from sdtune.arguments import SWITCH, checked, guidance_number, new_parser, non_negative_int, positive_int, random_seed
from sdtune.clip import Clip, check_clip, image_features, load_clip, text_features
from sdtune.dataset import CaptionedImages, load_data, name_of
from sdtune.errors import InputError, counted, gathered, in_one_line, last_line, raise_problems, told_to_user
from sdtune.files import beside
from sdtune.fonts import load_font
from sdtune.grids import FONT_SIZE, PAIR_TILE, draw_pairs
from sdtune.inference import (
    GENERATE_KEYS,
    add_inference_arguments,
    check_output_dir,
    check_precision,
    find_loras,
    load_pipeline,
    parse_with_config,
    read_configs,
    read_prompts,
    split_scale,
)
from sdtune.measures import COPY_RATIO, Nearest, compare_kid, judge, paired
from sdtune.models import quiet_libraries, vae_factor
from sdtune.named_dataset import add_named_dataset_arguments, check_outside, named_dataset
from sdtune.validation import HELD_OUT_TIMESTEPS, encode_held_out, held_out_losses

PROGRAM = "sdtune evaluate"
USUAL_RESOLUTION = 512  # of Stable Diffusion 1
MIN_FOR_KID = 30  # images: of so many the error that KID says is right within a fifth (tests/test_evaluate.py)
PAIRS = 8  # in the picture of the closest pairs


@dataclasses.dataclass
class Conditions:
    """What is the same for the model and its base."""

    accelerator: Accelerator
    clip: Clip
    prompts: list  # of each picture
    held_out: CaptionedImages


@dataclasses.dataclass
class Measured:
    """What a model drew, and what was measured of it."""

    pictures: list  # PIL images in the size of a tile
    embeds: torch.Tensor  # (pictures, d), CLIP's embeddings
    patches: torch.Tensor  # (pictures, f), CLIP's patch features
    scores: torch.Tensor  # (pictures,), CLIP's
    losses: torch.Tensor  # (held-out images,)
    objective: tuple  # models whose losses can be compared share it: digest of the VAE, what is predicted, betas


# ------------------------------------------------------------------------------------------------------- arguments
def image_count(text):
    """A whole number in [3, inf)."""
    return checked(text, int, lambda number: number >= 3, "a whole number in [3, inf)")


def make_parser():
    """The command's flags."""
    parser = new_parser(__doc__, f"{PROGRAM} MODEL DATASET [--base MODEL] [flags]")
    add_inference_arguments(parser)
    add_named_dataset_arguments(parser)
    add = parser.add_argument
    add("--clip_model", default="openai/clip-vit-large-patch14", help="CLIP that measures, a folder or Hub id")
    add(
        "--num_validation_samples",
        type=non_negative_int,
        default=0,
        help="images that training held out, as its flag said [0, inf)",
    )
    add("--max_train_samples", type=positive_int, help="images that training used, as its flag said [1, inf)")
    add(
        "--train_seed",
        type=random_seed,
        default=0,
        help="seed that drew those of training; needs --max_train_samples [0, 9e18]",
    )
    add(
        "--resolution",
        type=positive_int,
        help="side of the square images in pixels; default: the training's, by args.json beside LoRA or model, else "
        "the model's own; after one in buckets squares all the same [1, inf)",
    )
    add("--skip_bad_images", **SWITCH, help="go on without images that cannot be used, instead of stopping")
    add("--prompts", nargs="+", help="what to draw, in turn, instead of the training images' captions")
    add("--prompts_file", help="text file with a prompt per line, the same")
    add("--num_images", type=image_count, default=256, help="pictures to draw with each model [3, inf)")
    add("--num_inference_steps", type=positive_int, default=25, help="denoising steps [1, inf)")
    add(
        "--guidance_scale",
        type=guidance_number,
        default=7.5,
        help="scale of classifier-free guidance; 1: none [1, inf)",
    )
    add("--batch_size", type=positive_int, default=4, help="pictures or images at once [1, inf)")
    add("--seed", type=random_seed, default=0, help="seed of the pictures: number k has the seed + k [0, 9e18]")
    add("--mixed_precision", default="no", choices=["no", "fp16", "bf16"], help="precision of passes")
    add("--output_dir", default="evaluation", help="folder for evaluation.json and closest_pairs.png")
    add("--overwrite", **SWITCH, help="replace an evaluation in --output_dir")
    return parser


def parse_args(argv=None):
    """Returns the flags, of the command line and the recipe, and what is wrong with them."""
    return parse_with_config(make_parser(), argv, GENERATE_KEYS, aliases={})


def check_args(args):
    """Lists what is wrong with the flags, as far as that can be told without weights."""
    problems = check_precision(args.mixed_precision)
    if args.train_seed and not args.max_train_samples:
        problems.append(
            f"--train_seed={args.train_seed}: does nothing without --max_train_samples; add that or drop this"
        )
    with gathered(problems):
        read_given_prompts(args)
    with gathered(problems):
        find_loras(args.lora)
    with gathered(problems):
        load_font(args.font, FONT_SIZE)
    problems += check_pipeline(args, "MODEL", args.model)
    if args.base:
        problems += check_pipeline(args, "--base", args.base)
    if not args.dataset:
        problems.append("DATASET is missing: name the folder or dataset that the model was trained on")
    return problems + check_clip(args.clip_model, args.hub_token) + check_output(args)


def with_resolution(args):
    """The flags, with a resolution where none is given, that of the run which left its args.json beside a LoRA or the
    model, or else the model's own; and what is to be said of it. One without is no model, as its check tells."""
    if args.resolution:
        return args, ""
    for folder in folders_of_training(args):
        resolution = read_settings(folder).get("resolution")
        if type(resolution) is int and resolution > 0:
            told = f"Resolution: {resolution}, as in the training that {folder / 'args.json'} tells of."
            return argparse.Namespace(**{**vars(args), "resolution": resolution}), told
    resolution = own_resolution(args.model, args.hub_token) or USUAL_RESOLUTION
    told = f"Resolution: {resolution}, the model's own."
    return argparse.Namespace(**{**vars(args), "resolution": resolution}), told


def with_instance_prompt(args):
    """The flags, with a caption for images without one where none is given, that of the run which left its args.json
    beside a LoRA or the model, if it had one; and what is to be said of it."""
    if args.instance_prompt:
        return args, ""
    known = [folder for folder in folders_of_training(args) if read_settings(folder)]
    prompt = read_settings(known[0]).get("instance_prompt") if known else None
    if not (prompt and isinstance(prompt, str)):
        return args, ""
    told = f"Caption of images without one: {in_one_line(prompt)}, as in the training that {known[0] / 'args.json'}"
    return argparse.Namespace(**{**vars(args), "instance_prompt": prompt}), f"{told} tells of."


def folders_of_training(args):
    """The folders in which a training may have left its args.json: those of LoRAs, then the model's."""
    loras = [split_scale(item)[0] for item in args.lora or []]
    return [path if path.is_dir() else path.parent for path in loras] + [Path(args.model or "")]


def read_settings(folder):
    """The settings that a training left in its folder; none where there are none that can be read."""
    try:
        return dict(json.loads((folder / "args.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def own_resolution(source, token=None):
    """The side in pixels of the images that a pipeline's UNet was made for, or None where it does not say."""
    try:
        vae = diffusers.AutoencoderKL.load_config(source, subfolder="vae", token=token)
        side = diffusers.UNet2DConditionModel.load_config(source, subfolder="unet", token=token)["sample_size"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return side * vae_factor(vae) if type(side) is int else None


def read_given_prompts(args):
    """The prompts of the flags, None if the captions are drawn. Raises `InputError`."""
    return read_prompts(args.prompts, args.prompts_file) if args.prompts or args.prompts_file else None


def check_pipeline(args, flag, source):
    """Lists what is wrong with a model's configs, or between them and the flags; reads no weights."""
    try:
        vae, _ = read_configs(flag, source, args.hub_token)
    except InputError as error:
        return [str(error)]
    factor = vae_factor(vae)
    if args.resolution % factor:
        return [f"--resolution={args.resolution}: must be a multiple of {factor} for this VAE"]
    return []


def check_output(args):
    """Lists why the evaluation cannot be written to its folder."""
    output = Path(args.output_dir)
    problems = check_output_dir(output) or check_outside("output_dir", output, args.dataset)
    is_used = any((output / name).exists() for name in ("evaluation.json", "closest_pairs.png"))
    if is_used and not problems and not args.overwrite:
        problems.append(f"--output_dir={output}: holds an evaluation; name another, or add --overwrite")
    return problems


# ------------------------------------------------------------------------------------------------------------ data
def load_images(args):
    """Reads the dataset as training does; returns (training images, held-out images), which are plain: no flips, no
    random crops. Raises `InputError`."""
    settings = argparse.Namespace(
        pretrained_model_name_or_path=args.model,
        single_file_config=None,
        tokenizer_name=None,
        tokenizer_max_length=None,
        revision=None,
        cache_dir=args.cache_dir,
        dataset_name=args.dataset,
        dataset_config_name=args.dataset_config_name,
        image_column=args.image_column,
        caption_column=args.caption_column,
        hub_token=args.hub_token,
        max_train_samples=args.max_train_samples,
        num_validation_samples=args.num_validation_samples,
        skip_bad_images=args.skip_bad_images,
        follow_symlinks=args.follow_symlinks,
        seed=args.train_seed,
        resolution=args.resolution,
        center_crop=True,
        random_flip=False,
        image_interpolation_mode="lanczos",
        caption_dropout=0,
        noise_offset=0,
        offset_noise=False,
        input_perturbation=0,
    )
    with named_dataset(args.dataset):
        images, held_out, _ = load_data(settings, folder=None, default_caption=args.instance_prompt)
    return images, held_out


def plan_prompts(prompts, images, num_images, seed):
    """The prompt of each picture: those given in turn, or the first caption of training images in random order."""
    if prompts:
        return [prompts[k % len(prompts)] for k in range(num_images)]
    captions = images.rows["captions"]
    plan = []
    while len(plan) < num_images:
        order = np.random.default_rng((seed, len(plan) // len(images))).permutation(len(images))
        plan += [captions[index][0] for index in order.tolist()]
    return plan[:num_images]


# ------------------------------------------------------------------------------------------------------- measuring
@torch.no_grad()
def draw(args, accelerator, pipeline, prompts):
    """Yields the pictures of a batch of prompts, PIL images; number k of all from the seed + k, on the CPU whatever
    the device, so that two models start from the same noise."""
    for first in range(0, len(prompts), args.batch_size):
        batch = prompts[first : first + args.batch_size]
        seeds = range(args.seed + first, args.seed + first + len(batch))
        with accelerator.autocast():
            yield pipeline(
                batch,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                height=args.resolution,
                width=args.resolution,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images


def time_trial(args, conditions, pipeline):
    """Draws a batch in one step and in three, and looks at it, of which nothing stays; returns the seconds that it
    takes in one step, those of each further step, and those of a look by CLIP."""
    seconds = []
    for num_steps in (1, 1, 3):  # the first one takes longer, whatever it does
        trial = argparse.Namespace(**{**vars(args), "num_inference_steps": num_steps})
        start = time.perf_counter()
        pictures = next(draw(trial, conditions.accelerator, pipeline, conditions.prompts))
        seconds.append(time.perf_counter() - start)
    for _ in range(2):
        start = time.perf_counter()
        image_features(conditions.clip, pictures)
        look = time.perf_counter() - start
    return seconds[1], max(seconds[2] - seconds[1], 0) / 2, look


def estimate_seconds(args, num_images, num_held_out, first_step, step, look):
    """How long all takes, by the seconds of a batch: drawn in one step, in each further one, looked at by CLIP."""
    drawing = math.ceil(args.num_images / args.batch_size) * (
        first_step + (args.num_inference_steps - 1) * step + look
    )
    passes = num_held_out * HELD_OUT_TIMESTEPS / args.batch_size
    measuring = passes * (step / 2 if args.guidance_scale > 1 else step)  # guidance makes two passes of a step
    looking = 2 * (num_images + num_held_out) / args.batch_size * look  # mirrored too
    return (2 if args.base else 1) * (drawing + measuring) + looking


def tell_time(args, conditions, num_images, pipeline):
    """Prints how long all will take, before the first picture."""
    seconds = estimate_seconds(args, num_images, len(conditions.held_out), *time_trial(args, conditions, pipeline))
    duration = datetime.timedelta(seconds=math.ceil(seconds))
    models = "each of model and base" if args.base else "the model"
    until = f"{datetime.datetime.now() + duration:%Y-%m-%d %H:%M}"
    print(
        f"Takes about {duration}, until {until}, by a trial of a few steps:\n"
        f"  {counted(args.num_images, 'picture')} by {models}, {counted(args.num_inference_steps, 'step')} each, at "
        f"{args.resolution} pixels; CLIP looks at {counted(num_images + len(conditions.held_out), 'image')}.",
        flush=True,
    )


def measure_model(args, conditions, source, loras, title, tell=None):
    """Draws with a model and measures it; `tell(pipeline)`, if given, is called before. Raises `InputError`."""
    accelerator, clip, prompts = conditions.accelerator, conditions.clip, conditions.prompts
    pipeline = load_pipeline(source, loras, torch.float32, accelerator.device, args.hub_token, safety_checker=None)
    if tell:
        tell(pipeline)
    pictures, embeds, patches = [], [], []
    bar = tqdm(total=len(prompts), desc=title, unit="picture", disable=None)
    for drawn in draw(args, accelerator, pipeline, prompts):
        drawn_embeds, drawn_patches = image_features(clip, drawn)
        embeds.append(drawn_embeds)
        patches.append(drawn_patches)
        pictures += [image.resize((PAIR_TILE, PAIR_TILE), Image.Resampling.BICUBIC) for image in drawn]
        bar.update(len(drawn))
    bar.close()
    noise_scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    return Measured(
        pictures=pictures,
        embeds=torch.cat(embeds),
        patches=torch.cat(patches),
        scores=clip_scores(clip, torch.cat(embeds), prompts),
        losses=measure_losses(args, conditions, pipeline, noise_scheduler),
        objective=objective_of(pipeline, noise_scheduler),
    )


def clip_scores(clip, embeds, prompts):
    """100 max(cos, 0) of each picture's embedding (n, d) and that of its prompt (n,)."""
    texts = {prompt: text_features(clip, [prompt])[0] for prompt in set(prompts)}
    cosines = (embeds * torch.stack([texts[prompt] for prompt in prompts])).sum(1)
    return 100 * cosines.clamp(min=0)


def measure_losses(args, conditions, pipeline, noise_scheduler):
    """The loss of each held-out image, none if there are none, as training measures it."""
    if not len(conditions.held_out):
        return torch.zeros(0)
    parts = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    for part in parts:
        part.requires_grad_(False).eval()
    accelerator, (unet, vae, text_encoder) = conditions.accelerator, parts
    held_out = encode_held_out(accelerator, vae, text_encoder, conditions.held_out, args.batch_size)
    return held_out_losses(accelerator, unet, vae, text_encoder, noise_scheduler, held_out, args.batch_size)


def objective_of(pipeline, noise_scheduler):
    """What the loss depends on beside UNet and prompt; models whose losses can be compared have it in common."""
    digest = hashlib.sha256()
    for tensor in pipeline.vae.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest(), noise_scheduler.config.prediction_type, noise_scheduler.betas.numpy().tobytes()


def look_at(images, clip, queries, batch_size, title):
    """Goes through images once; returns the embeddings of the different ones (n, d), their indexes, and for each of
    `queries`, patch features (m, f), which of them is nearest. Mirrored images count as views of the same."""
    nearest = [Nearest.of(query) for query in queries]
    seen, kept, embeds = set(), [], []
    loader = torch.utils.data.DataLoader(images, batch_size, sampler=[(0, index, 1.0) for index in range(len(images))])
    for batch in tqdm(loader, title, disable=None, leave=False):
        new = []
        for pixel_values, index in zip(batch["pixel_values"].numpy(), batch["index"].tolist()):
            digest = hashlib.sha256(pixel_values.tobytes()).digest()
            if digest not in seen:
                seen.add(digest)
                new.append(Image.fromarray(pixel_values.transpose(1, 2, 0)))
                kept.append(index)
        if not new:
            continue
        new_embeds, patches = image_features(clip, new)
        _, mirrored = image_features(clip, [ImageOps.mirror(image) for image in new])
        embeds.append(new_embeds)
        for query in nearest:
            query.see(torch.stack([patches, mirrored], dim=1), first=len(kept) - len(new))
    return torch.cat(embeds) if embeds else torch.zeros(0, 1), kept, nearest


def compare(measured, nearest, real, unseen):
    """All figures by name, of the model and, if there is one, its base: `measured` of each, `Nearest` of the pictures
    of each, and the embeddings of the different training (n, d) and held-out images (m, d)."""
    embeds = [part.embeds.double().numpy() for part in measured]
    scores = [part.scores.double().numpy() for part in measured]
    losses = [part.losses.double().numpy() for part in measured if part.objective == measured[0].objective]
    mean_real = real.double().numpy().mean(0)
    similarities = [1 - part.distance.double().numpy() ** 2 / 2 for part in nearest]  # the cosine: lengths are 1
    copies = [(part.ratios() < COPY_RATIO).numpy() for part in nearest]
    return {
        "clip_score": paired(*scores),
        "clip_image_similarity": paired(*[part @ mean_real for part in embeds]),
        "kid": compare_kid(real, *embeds),
        "kid_held_out": compare_kid(unseen, *embeds),
        "held_out_loss": paired(*losses, less_is_better=True) if len(losses[0]) else {},
        "nearest_similarity": paired(*similarities),
        "memorisation": judge(len(real), *copies),
    }


# ---------------------------------------------------------------------------------------------------------- report
def print_table(figures, num_images, num_held_out):
    """Prints the figures, with standard errors, and the verdict."""
    rows = {  # with which figures are the better ones
        "CLIP score": ("higher", figures["clip_score"]),
        "CLIP image similarity": ("higher", figures["clip_image_similarity"]),
        f"KID, {num_images} images": ("lower", figures["kid"]),
        f"KID, {num_held_out} held out": ("lower", figures["kid_held_out"]),
        "held-out loss": ("lower", figures["held_out_loss"]),
        "to the nearest image": ("-", figures["nearest_similarity"]),
    }
    print(f"{'':22} {'better':7}{'model':17} {'base':17} gain (95 % interval)")
    for label, (better, found) in rows.items():
        if found:
            cells = [mean_cell(found["model"]), mean_cell(found.get("base")), gain_cell(found.get("gain"))]
            print(f"{label:22} {better:7}{cells[0]:17} {cells[1]:17} {cells[2]}")
    print("A gain above 0 is for the better, except in the line “to the nearest image”: there 1 is a copy.")
    of_kid = {num_images: figures["kid"], num_held_out: figures["kid_held_out"]}
    if "model" in figures["memorisation"]:
        of_kid[figures["memorisation"]["model"]["pictures"]] = figures["kid"]
    if few := [number for number, found in of_kid.items() if found and number < MIN_FOR_KID]:
        told = f"Of fewer than {MIN_FOR_KID} images or pictures, such as {min(few)}, KID may be further off"
        print(f"{told} than it says here.")
    verdict = figures["memorisation"]
    for name in ("model", "base"):
        if name in verdict:
            found = verdict[name]
            share = f"{found['share']:.1%} ({found['low']:.1%} to {found['high']:.1%})"
            print(f"copies of images, {name}: {found['copies']} of {found['pictures']} pictures, {share}")
    print(f"Memorisation (above {verdict['limit']:.1%}): {verdict['verdict']}")


def mean_cell(numbers):
    """A mean and its standard error, in a cell of the table."""
    if not numbers:
        return "-"
    error = f" \N{PLUS-MINUS SIGN} {numbers['standard_error']:.2g}" if "standard_error" in numbers else ""
    return f"{numbers['mean']:.4g}{error}"


def gain_cell(numbers):
    """A gain and its interval, in a cell of the table."""
    if not numbers:
        return "-"
    reach = f" ({numbers['low']:+.3g} to {numbers['high']:+.3g})" if "low" in numbers else ""
    return f"{numbers['mean']:+.3g}{reach}"


def list_findings(scores, nearest, prompts, names, seed):
    """What was found of each picture of the model, with the base's beside; `names` are those of the different images,
    which `nearest` counts."""
    findings = []
    for k, prompt in enumerate(prompts):
        found = {"prompt": prompt, "seed": seed + k, "clip_score": scores[k].item()}
        for prefix, part in zip(["", "base_"], nearest):
            ratio = part.ratios()[k].item()
            found[f"{prefix}nearest"] = names[part.index[k]]
            found[f"{prefix}ratio"] = ratio
            found[f"{prefix}copy"] = ratio < COPY_RATIO
            found[f"{prefix}similarity"] = 1 - part.distance[k].item() ** 2 / 2
        findings.append(found)
    return findings


def closest_pictures(findings):
    """The numbers of the PAIRS pictures that come closest to an image, each image once before one comes twice."""
    times, ranked = Counter(), []
    for k in sorted(range(len(findings)), key=lambda k: -findings[k]["similarity"]):
        nearest = findings[k]["nearest"]
        ranked.append((times[nearest], len(ranked), k))
        times[nearest] += 1
    return [k for _, _, k in sorted(ranked)[:PAIRS]]


def tile_of(images, index):
    """An image as training sees it, in the size of a tile."""
    pixels = images[(0, index, 1.0)]["pixel_values"].transpose(1, 2, 0)
    return Image.fromarray(pixels).resize((PAIR_TILE, PAIR_TILE), Image.Resampling.BICUBIC)


def save_report(output_dir, result, sheet):
    """Writes the picture and the figures beside their places, then renames both. Raises `InputError`."""
    try:
        with (
            beside(output_dir / "evaluation.json") as new_figures,
            beside(output_dir / "closest_pairs.png") as new_sheet,
        ):
            sheet.save(new_sheet, "png")
            new_figures.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:  # a full disk
        raise InputError(f"--output_dir={output_dir}: cannot be written to ({last_line(error)})") from None


def evaluate(args):
    """Measures everything and writes it. Raises `InputError`."""
    images, held_out = load_images(args)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if accelerator.num_processes > 1:
        raise InputError(f"runs as one process; start it by `{PROGRAM}`")
    clip = load_clip(args.clip_model, accelerator.device, args.hub_token)
    prompts = plan_prompts(read_given_prompts(args), images, args.num_images, args.seed)

    conditions = Conditions(accelerator, clip, prompts, held_out)
    tell = functools.partial(tell_time, args, conditions, len(images))
    measured = [measure_model(args, conditions, args.model, find_loras(args.lora), "Model", tell)]
    if args.base:
        measured.append(measure_model(args, conditions, args.base, [], "Base"))
    patches = [part.patches for part in measured]
    real, kept, nearest = look_at(images, clip, patches, args.batch_size, "Images")
    unseen, _, _ = look_at(held_out, clip, [], args.batch_size, "Held-out images")
    figures = compare(measured, nearest, real, unseen)

    names = [Path(name_of(images.rows, index)).name for index in kept]
    findings = list_findings(measured[0].scores, nearest, prompts, names, args.seed)
    closest = closest_pictures(findings)
    columns = []
    for k in closest:
        drawn, *drawn_by_base = [part.pictures[k] for part in measured]
        columns.append([drawn, tile_of(images, kept[nearest[0].index[k]]), *drawn_by_base])
    labels = ["drawn", "nearest image", "base"][: len(columns[0])]
    sheet = draw_pairs([findings[k] for k in closest], columns, labels, args.font)

    counts = {"training_images": len(images), "different_images": len(kept), "held_out_images": len(held_out)}
    settings = {name: value for name, value in vars(args).items() if name != "hub_token"}
    result = {**counts, **figures, "settings": settings, "pictures": findings}
    save_report(Path(args.output_dir), result, sheet)
    print_table(figures, len(kept), len(unseen))
    if measured[-1].objective != measured[0].objective:
        print("The held-out losses cannot be compared: VAE, prediction type or noise schedule differ.")
    print(f"Figures: {Path(args.output_dir, 'evaluation.json')}, closest pairs: closest_pairs.png beside it")


def main(argv=None):
    """Runs the command; a mistake of the user's ends with status 2 and its message."""
    args, problems = parse_args(argv)
    quiet_libraries()
    with told_to_user(PROGRAM, errors=(InputError, OSError), stopped="Stopped; nothing was written."):
        args, of_resolution = with_resolution(args)
        args, of_prompt = with_instance_prompt(args)
        raise_problems(problems + check_args(args))
        for told in filter(None, (of_resolution, of_prompt)):
            print(told)
        evaluate(args)
