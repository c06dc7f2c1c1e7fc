"""DreamBooth's prior preservation: images of the subject's class, drawn by the base, beside the photos."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
from pathlib import Path

import datasets
import diffusers
import numpy as np
import torch
from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm

from sdtune.dataset import METADATA_NAMES, CheckedRows, check_rows, fingerprint_of, read_rows, texts_by_name, warn
from sdtune.errors import InputError, counted, last_line
from sdtune.files import existing_place
from sdtune.images import IMAGE_SUFFIXES, is_hidden, is_image_file, path_of_findings
from sdtune.models import DTYPES, enable_memory_savers, load_base, load_tokenizer
from sdtune.randomness import CLASS, random_numbers

CLASS_RECORD = "class_image"  # the name of the text, in a PNG, that tells what drew it
CLASS_STEPS = 25
CLASS_GUIDANCE = 7.5


@dataclasses.dataclass
class ClassImages:
    """The images of the class that are there, and those that are still to be drawn."""

    checked: CheckedRows | None  # those that are there
    fingerprint: str | None
    missing: list  # file names


def check_subject(args):
    """Lists what is wrong with the prompts and folders of subject and class."""
    problems = []
    if args.with_prior_preservation and not args.class_data_dir:
        problems.append("--with_prior_preservation: needs --class_data_dir")
    has_blank_prompt = any(not prompt.strip() for prompt in class_prompts_of(args))
    if args.with_prior_preservation and has_blank_prompt:
        problems.append("--with_prior_preservation: needs --class_prompt, or --class_prompts of which none is blank")
    if args.class_prompt is not None and args.class_prompts:
        problems.append("--class_prompt and --class_prompts: give one of them")
    is_blank = bool(args.instance_prompt) and args.instance_prompt.isspace()
    lacks_prompt = args.instance_data_dir and not args.instance_prompt and not has_captions(args.instance_data_dir)
    if is_blank or lacks_prompt:
        problems.append(
            "--instance_prompt: give a rare word and the class, such as a photo of sks dog, for photos that have no "
            "captions"
        )
    if args.class_data_dir:
        problems += check_class_folder(args)
    return problems


def class_prompts_of(args):
    """What class images are drawn from, in turn: of no prompt a blank one, which `check_subject` refuses."""
    return args.class_prompts or [args.class_prompt or ""]


def has_captions(folder):
    """Whether a folder holds captions in some place, be they of all images or not."""
    files = [path for path in Path(folder).rglob("*") if not is_hidden(path, folder)]
    texts = texts_by_name(files)
    for path in files:
        beside_image = path.suffix.lower() in IMAGE_SUFFIXES and path.with_suffix("") in texts
        if path.name in METADATA_NAMES or beside_image:
            return True
    return False


def check_class_folder(args):
    """Lists what is wrong with the place of the class images: it may be made, but not inside another folder's."""
    problems, folder = [], Path(args.class_data_dir).resolve()
    local_dataset = args.dataset_name if os.path.isdir(args.dataset_name or "") else None
    others = {
        "instance_data_dir": args.instance_data_dir,
        "output_dir": args.output_dir,
        "dataset_name": local_dataset,
    }
    for flag, other in others.items():
        place = Path(other).resolve() if other else None
        if place and (folder.is_relative_to(place) or place.is_relative_to(folder)):
            problems.append(f"--class_data_dir={args.class_data_dir}: is not apart from --{flag}; name another")
    if not existing_place(folder).is_dir():
        problems.append(f"--class_data_dir={args.class_data_dir}: is a file or lies below one; name another")
    return problems


def load_class_images(args):
    """Checks the class images that are there and names those to be made: class-00000.png and so on, fewer by those
    that came from elsewhere. Raises `InputError`."""
    if not args.class_data_dir:
        return ClassImages(None, None, [])
    folder, number = Path(args.class_data_dir), args.num_class_images or 100
    paths = [path for path in sorted(folder.rglob("*")) if is_image_file(path, folder)]
    check_records(args, paths)
    there = [path.name for path in paths]
    others = [name for name in there if not re.fullmatch(r"class-\d{5}\.png", name)]
    taken = {Path(name).stem for name in others}  # class-00000.jpg may have a caption in class-00000.txt
    free = (k for k in itertools.count() if f"class-{k:05d}" not in taken)
    wanted = [f"class-{k:05d}.png" for k in itertools.islice(free, max(0, number - len(others)))]
    missing = [name for name in wanted if name not in there]
    print(f"Class images in {folder}: {len(missing)} to be drawn, for {number} at least; a pass has one per photo")
    if not there:
        warn_of_prompts(args, [], missing)
        return ClassImages(None, None, missing)
    rows = with_recorded_prompts(read_rows(args, args.class_data_dir, args.class_prompt))
    memory = path_of_findings(args.class_data_dir, args.cache_dir)
    checked = check_rows(rows, memory, args.skip_bad_images, load_tokenizer(args), args.resolution)
    warn_of_prompts(args, rows["captions"], missing)
    return ClassImages(checked, fingerprint_of(0, checked.digests), missing)


def number_of(name):
    """The number of a class image by its name: 7 of class-00007.png."""
    return int(name.removeprefix("class-").removesuffix(".png"))


def prompt_of(args, name):
    """What a class image of that name is drawn from: the prompts take turns."""
    prompts = class_prompts_of(args)
    return prompts[number_of(name) % len(prompts)]


def warn_of_prompts(args, captions, missing):
    """Warns of prompts that no class image has as one of its `captions`, and none of the `missing` ones will have."""
    shown = {prompt_of(args, name) for name in missing}
    for of_one_image in captions:
        shown.update(of_one_image)
    lacking = [prompt for prompt in args.class_prompts or [] if prompt not in shown]
    remedy = "no class image; use a larger --num_class_images or another --class_data_dir"
    warn(f"of --class_prompts has {remedy}", f"of --class_prompts have {remedy}", lacking)


def record_of(args, prompt):
    """What draws a class image, as it records that; of a base in a folder its name alone."""
    base = args.pretrained_model_name_or_path
    return {
        "prompt": prompt,
        "base": os.path.basename(os.path.abspath(base)) if os.path.exists(base) else base,
        "seed": args.seed,
        "steps": CLASS_STEPS,
        "guidance": CLASS_GUIDANCE,
    }


def read_record(path):
    """What drew an image, as it records that; nothing for a photo."""
    if not path.is_file():  # for a pipe a reader would wait
        return {}
    with contextlib.suppress(Exception):  # a broken image is for the check of images
        with Image.open(path, formats=["PNG"]) as image:
            return dict(json.loads(image.info[CLASS_RECORD]))
    return {}


def with_recorded_prompts(rows):
    """Class images, of which those that have no caption get the prompt that they were drawn for, as they record it:
    of --class_prompt the images have no .txt."""
    captions, num_recorded = [], 0
    for row in rows:
        prompt = None if row["captions"] else read_record(Path(row["image"]["path"])).get("prompt")
        captions.append([prompt] if prompt else row["captions"])
        num_recorded += bool(prompt)
    if num_recorded:
        print(f"Class images without a caption that take the prompt which they were drawn for: {num_recorded:,}")
    return rows.remove_columns("captions").add_column("captions", captions)


def check_records(args, paths):
    """Raises `InputError` if a class image was drawn for another prompt; warns of those that another base drew."""
    prompts, of_another_base = class_prompts_of(args), []
    wanted = record_of(args, prompts[0])
    for path in paths:
        record = {**wanted, **read_record(path)}
        if record["prompt"] not in prompts:
            told = "; ".join(prompts)
            flag = f"--class_prompts ({told})" if args.class_prompts else f"--class_prompt={args.class_prompt}"
            raise InputError(
                f"{flag}: {path} was drawn for {record['prompt']!r}; name another "
                "--class_data_dir, or take that prompt"
            )
        if record["base"] != wanted["base"]:
            of_another_base.append(f"{path}: {record['base']}")
    by_another = f"drawn by another base than {wanted['base']}"
    warn(f"class image was {by_another}", f"class images were {by_another}", of_another_base)


def stand_ins(class_images, images):
    """The class images, or where none is drawn yet the photos in their place, for a trial of some steps."""
    if class_images.checked or not class_images.missing:
        return class_images
    photos = CheckedRows(images.rows, [], images.contents, images.picture_sizes)
    return dataclasses.replace(class_images, checked=photos)


def with_class_rows(images, class_images):
    """The photos of the subject, and behind them the images of its class, once for each bucket of photos, in the order
    of their numbers."""
    checked = class_images.checked
    if checked is None:
        return images
    shapes = np.unique(images.sizes, axis=0)
    return dataclasses.replace(
        images,
        rows=datasets.concatenate_datasets([images.rows, *[checked.rows] * len(shapes)]),
        contents=np.concatenate([images.contents, np.tile(checked.contents, len(shapes))]),
        sizes=np.concatenate([images.sizes, np.repeat(shapes, len(checked.rows), axis=0)]),
        picture_sizes=None,
    )


def with_classes(batches, num_instances, num_classes, prior_loss_weight, seed, buckets=None):
    """Appends to each pass of (epoch, index, weight) a class image for every instance, if there are any, its weight
    multiplied: the sum of weighted losses is then the mean over instances plus `prior_loss_weight`, 1 if None, times
    that over class images (arXiv 2208.12242, eq. 2). These come in permutations, each by (seed, its number), and
    fitted to the instance's bucket, of which `buckets` (num_instances,) are the numbers."""
    factor = 1.0 if prior_loss_weight is None else prior_loss_weight
    for batch in batches:
        partners = []
        for epoch, index, weight in batch if num_classes else []:
            turn, place = divmod(epoch * num_instances + index, num_classes)
            order = random_numbers(seed, CLASS, turn).permutation(num_classes)
            bucket = 0 if buckets is None else int(buckets[index])
            partner = num_instances + bucket * num_classes + int(order[place])
            partners.append((turn, partner, weight * factor))
        yield batch + partners


@torch.no_grad()
def draw_class_images(args, accelerator, names):
    """Draws the class images `names` by the base, each from a seed of its own, shared out over the processes; one that
    is there is whole, so that an interrupted run goes on where it stopped. Raises `InputError`."""
    folder, mine = Path(args.class_data_dir), names[accelerator.process_index :: accelerator.num_processes]
    accelerator.wait_for_everyone()  # all have listed what is missing before the first image appears
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--class_data_dir={folder}: cannot be made ({last_line(error)}); name another") from None
    pipeline = load_base(args)  # not the one to be trained: that may have dropout, and adapters
    dtype = {**DTYPES, "fp32": torch.float32}[args.prior_generation_precision or accelerator.mixed_precision]
    enable_memory_savers(args, pipeline.unet, accelerator.device, dtype)
    pipeline.to(accelerator.device, dtype).set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    size = args.sample_batch_size or 4
    for start in tqdm(
        range(0, len(mine), size), "Class images", disable=None if accelerator.is_main_process else True
    ):
        batch = mine[start : start + size]
        batch_prompts = [prompt_of(args, name) for name in batch]
        seeds = [random_numbers(args.seed, CLASS, 0, number_of(name)).integers(2**63) for name in batch]
        drawn = pipeline(
            batch_prompts,
            height=args.resolution,
            width=args.resolution,
            num_inference_steps=CLASS_STEPS,
            guidance_scale=CLASS_GUIDANCE,
            generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds],
        ).images
        for name, prompt, image in zip(batch, batch_prompts, drawn, strict=True):
            if args.class_prompts:  # each image has a caption of its own then
                (folder / name).with_suffix(".txt").write_text(prompt, encoding="utf-8")
            record = PngImagePlugin.PngInfo()
            record.add_text(CLASS_RECORD, json.dumps(record_of(args, prompt)))
            image.save(folder / f".{name}", "PNG", pnginfo=record)
            (folder / f".{name}").rename(folder / name)
    accelerator.wait_for_everyone()
    if lost := [name for name in names if not (folder / name).exists()]:
        number = counted(len(lost), "drawn image is", "drawn images are")
        raise InputError(f"--class_data_dir={folder}: {number} not there; all machines need the same folder")
