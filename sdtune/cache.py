"""Encode images and captions once, into a cache on disk that later runs share."""

import dataclasses
import hashlib
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object, get_int_from_env
from tqdm.auto import tqdm

from sdtune.batches import batches_of_one_size
from sdtune.dataset import name_of_row, unopened
from sdtune.diffusion import encode_posterior
from sdtune.entries import (
    ENTRY_FORMAT,
    Cache,
    check_entry,
    digest_of,
    digest_of_model,
    path_of_caption,
    path_of_image,
    write_entry,
)
from sdtune.errors import InputError, counted, last_line
from sdtune.failures import is_disk_full
from sdtune.files import existing_place
from sdtune.images import read_content, still_readable
from sdtune.models import drop_weights
from sdtune.plan import tell_size
from sdtune.training import check_agreement, make_loader

CHUNK = 1000  # captions that are cut into tokens at once, and entries that a thread checks


@dataclasses.dataclass(slots=True)
class Wanted:
    """What makes an entry that a run reads: an image of one of several CaptionedImages, or a caption's tokens."""

    path: str
    shapes: dict  # of its arrays, by name
    source: int = 0
    index: int = 0
    is_mirrored: bool = False
    input_ids: np.ndarray | None = None


@dataclasses.dataclass
class CachePlan:
    """The cache of a run, or None, how much of it the run reads, and what is still to be made."""

    cache: Cache | None
    num_entries: int
    num_bytes: int
    missing: list  # of Wanted, the same in all processes


@dataclasses.dataclass
class ImagesToEncode(torch.utils.data.Dataset):
    """Maps a place in a list of Wanted to it and pixel_values uint8 (3, height, width), cropped at the centre."""

    sources: list  # of CaptionedImages
    entries: list

    def __getitem__(self, place):
        entry = self.entries[place]
        images = self.sources[entry.source]
        row = images.rows[entry.index]
        name = name_of_row(row, entry.index)
        with still_readable(name):
            content = read_content(row["image"])
        if hashlib.sha256(content).hexdigest() != images.contents[entry.index]:
            raise InputError(f"{name}: changed since it was checked; start again, and it is checked anew")
        read = {**row, "image": {"bytes": content, "path": name}}
        image = images.open(entry.index, read, (0.5, 0.5), entry.is_mirrored)
        return {"place": place, "pixel_values": np.array(image).transpose(2, 0, 1)}


def check_cache(args, trains_text_encoder=False):
    """Lists what cannot be cached."""
    problems = []
    if args.cache_latents and not args.center_crop and not args.aspect_ratio_buckets:
        problems.append(
            "--cache_latents=True: a random crop is another image in every epoch; add --center_crop or "
            "--aspect_ratio_buckets, or drop this"
        )
    if args.cache_text_embeddings and trains_text_encoder:
        problems.append(
            "--cache_text_embeddings=True: a text encoder that is trained gives others in every step; drop this or "
            "--train_text_encoder"
        )
    return problems


def plan_cache(args, accelerator, pipeline, sources):
    """Finds the entries that `sources`, several CaptionedImages, want of the cache, if flags ask for one, and which of
    them are not there or broken. The pipeline's models are in the precision of passes. All processes call this."""
    if not args.cache_latents and not args.cache_text_embeddings:
        return CachePlan(None, 0, 0, [])
    common = [ENTRY_FORMAT, accelerator.mixed_precision, args.allow_tf32]
    cache = Cache(
        folder=Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE, "encoded"),
        images=digest_of(*common, digest_of_model(pipeline.vae), args.image_interpolation_mode)
        if args.cache_latents
        else None,
        captions=digest_of(*common, digest_of_model(pipeline.text_encoder)) if args.cache_text_embeddings else None,
        prompt_channels=pipeline.text_encoder.config.hidden_size,
    )
    check_agreement(accelerator, {"encoder of images": cache.images, "encoder of captions": cache.captions})
    wanted = {}  # by the name below the folder, which may have another path on another machine
    for number, images in enumerate(sources):
        if cache.images:
            wanted |= {name_of_entry(entry.path): entry for entry in wanted_images(cache, images, number)}
        if cache.captions:
            wanted |= {name_of_entry(entry.path): entry for entry in wanted_captions(cache, images)}
    missing = find_missing(accelerator, wanted)
    return CachePlan(cache, len(wanted), sum(bytes_of(entry) for entry in wanted.values()), missing)


def wanted_images(cache, images, number):
    """Yields the entries of images, one of the sources, and of their mirror images where they are mirrored."""
    for index, content in enumerate(images.contents):
        shape = images.latent_shape(index)
        for is_mirrored in (False, True) if images.random_flip else (False,):
            path = path_of_image(cache, content, *images.sizes[index], is_mirrored)
            yield Wanted(path, {"mean": shape, "log_variance": shape}, number, index, is_mirrored)


def wanted_captions(cache, images):
    """Yields the entries of the captions of images, and of the empty one."""
    captions = sorted({"", *(caption for captions in images.rows["captions"] for caption in captions)})
    for start in range(0, len(captions), CHUNK):
        options = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
        for input_ids in images.tokenizer(captions[start : start + CHUNK], **options).input_ids:
            shape = (len(input_ids), cache.prompt_channels)
            yield Wanted(path_of_caption(cache, input_ids), {"prompt_embeds": shape}, input_ids=input_ids)


def bytes_of(entry):
    """How many bytes the arrays of an entry take."""
    return sum(4 * math.prod(shape) for shape in entry.shapes.values())


def find_missing(accelerator, wanted):
    """The entries, of those wanted by name, that are not there or broken, which is told, on some machine: each may
    have a disk of its own, so the processes of one share out all entries."""
    num_local = get_int_from_env(["LOCAL_WORLD_SIZE"], accelerator.num_processes)
    mine = sorted(wanted)[accelerator.local_process_index :: num_local]
    chunks = [[wanted[name] for name in mine[start : start + CHUNK]] for start in range(0, len(mine), CHUNK)]
    missing, broken = [], []
    with ThreadPoolExecutor() as pool:
        bar = tqdm(
            pool.map(check_entries, chunks),
            "Checking the cache",
            len(chunks),
            disable=None if accelerator.is_local_main_process else True,
            leave=False,
        )
        for lacking, damaged in bar:
            missing += lacking
            broken += damaged
    accelerator.wait_for_everyone()
    everywhere = gather_object([(missing, broken)])
    broken = sorted({path for _, damaged in everywhere for path in damaged})
    if broken:
        number = counted(len(broken), "entry of the cache is", "entries of the cache are")
        accelerator.print(f"Warning: {number} broken and made anew, such as {broken[0]}")
    return [wanted[name] for name in sorted({name_of_entry(path) for lacking, _ in everywhere for path in lacking})]


def name_of_entry(path):
    """What an entry is called below the cache's folder: its kind and its file."""
    return "/".join(path.split("/")[-3:])


def check_entries(entries):
    """The paths of those entries that cannot be used, and of those among them that are there but broken."""
    missing, broken = [], []
    for entry in entries:
        try:
            check_entry(entry.path, entry.shapes)
        except FileNotFoundError:
            missing.append(entry.path)
        except (NotADirectoryError, PermissionError) as error:  # not the entry's fault
            raise InputError(f"{entry.path}: cannot be read ({last_line(error)}); name another --cache_dir") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # of a header, whatever it may hold
            missing.append(entry.path)
            broken.append(entry.path)
    return missing, broken


def describe_cache(plan):
    """What the plan of a run says of its cache, or None without one, and a list of warnings."""
    if plan.cache is None:
        return None, []
    needed = sum(bytes_of(entry) for entry in plan.missing)
    free = shutil.disk_usage(existing_place(plan.cache.folder)).free
    size = f", {tell_size(needed)}" if needed else ""
    row = (
        f"{counted(plan.num_entries, 'entry', 'entries')}, {tell_size(plan.num_bytes)}, in {plan.cache.folder}\n"
        f"{len(plan.missing):,} to be made{size}; {tell_size(free)} are free"
    )
    if needed <= free:
        return row, []
    told = f"the cache takes {tell_size(needed)} more, where {tell_size(free)} are free"
    return row, [f"{told}; make room, or name another --cache_dir"]


@torch.no_grad()
def fill_cache(args, accelerator, pipeline, sources, plan):
    """Makes the entries that the plan misses, shared out over the processes; one that is there is whole, so that an
    interrupted run goes on where it stopped. Returns the sources, which read them. Raises `InputError`."""
    if plan.cache is None:
        return sources
    mine = plan.missing[accelerator.process_index :: accelerator.num_processes]
    try:
        encode_images(args, accelerator, pipeline.vae, sources, [entry for entry in mine if "mean" in entry.shapes])
        captions = [entry for entry in mine if "prompt_embeds" in entry.shapes]
        encode_captions_into(args, accelerator, pipeline.text_encoder, captions)
    except OSError as error:
        folder, remedy = plan.cache.folder, "name another --cache_dir"
        if not is_disk_full(error):
            raise InputError(f"{folder}: cannot be written to ({last_line(error)}); {remedy}") from None
        needed = sum(bytes_of(entry) for entry in mine if not os.path.exists(entry.path))
        told = f"the disk is full; {needed / 1e9:.2g} GB more are needed there"
        raise InputError(f"{folder}: {told}; make room, or {remedy}") from None
    accelerator.wait_for_everyone()  # patiently: they need not be done at the same time
    if lost := [entry.path for entry in plan.missing if not os.path.exists(entry.path)]:
        number = counted(len(lost), "new entry is", "new entries are")
        raise InputError(f"{plan.cache.folder}: {number} not there; all machines need the same --cache_dir")
    return [with_cache(images, plan.cache) for images in sources]


def with_cache(images, cache):
    """The images, which read what the cache has of them."""
    return dataclasses.replace(unopened(images) if cache.images else images, cache=cache)


def encode_images(args, accelerator, vae, sources, entries):
    """Encodes images into their entries, in batches of one size, as a step does it."""
    sizes = np.array([sources[entry.source].sizes[entry.index] for entry in entries])
    batches = batches_of_one_size(list(range(len(entries))), sizes, args.train_batch_size)
    loader = make_loader(args, accelerator, ImagesToEncode(sources, entries), batches)
    with progress_bar(accelerator, "Encoding images", len(entries), "image") as bar:
        for batch in loader if entries else []:
            mean, log_variance = encode_posterior(vae, batch["pixel_values"].to(accelerator.device, non_blocking=True))
            moments = zip(batch["place"].tolist(), mean.cpu().numpy(), log_variance.cpu().numpy(), strict=True)
            for place, *arrays in moments:
                write_entry(entries[place].path, dict(zip(("mean", "log_variance"), arrays, strict=True)))
                bar.update()


def encode_captions_into(args, accelerator, text_encoder, entries):
    """Encodes captions into their entries, as a step does it."""
    with progress_bar(accelerator, "Encoding captions", len(entries), "caption") as bar:
        for batch in cut(entries, args.train_batch_size):
            input_ids = torch.from_numpy(np.stack([entry.input_ids for entry in batch])).to(accelerator.device)
            prompt_embeds = text_encoder(input_ids)[0].float().cpu().numpy()
            for entry, embeds in zip(batch, prompt_embeds, strict=True):
                write_entry(entry.path, {"prompt_embeds": embeds})
                bar.update()


def cut(items, size):
    """A list in pieces of a size, the last of which may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def progress_bar(accelerator, what, number, unit):
    """A bar over so many of this process's units, shown once on a machine."""
    is_hidden = not number or not accelerator.is_local_main_process
    return tqdm(desc=what, total=number, unit=unit, disable=True if is_hidden else None)


def leave_device(pipeline, plan, prompts):
    """Takes what has nothing more to encode off the device, and out of memory where no samples need it."""
    if plan.cache is None:
        return
    if plan.cache.images:
        drop_weights(pipeline.vae, bool(prompts))
    if plan.cache.captions:
        drop_weights(pipeline.text_encoder, bool(prompts))
