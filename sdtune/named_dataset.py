"""The dataset that the first word of a command names: its flags, its rows, and files that must not lie in it."""

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path

import datasets
from huggingface_hub.utils import validate_repo_id

from sdtune.arguments import SWITCH, nearest_beside, path_name, secret_token
from sdtune.dataset import read_rows
from sdtune.errors import InputError, fitted, remedy_for_missing, told_in_lines
from sdtune.images import HOW_TO_CAPTION, is_image_file


def add_named_dataset_arguments(parser):
    """Adds the dataset and how it is read."""
    add = parser.add_argument_group("data").add_argument
    add(
        "dataset",
        nargs="?",
        default=argparse.SUPPRESS,
        type=path_name,
        metavar="DATASET",
        help="folder of images, dataset on the Hub, or a local path that `datasets` can load",
    )
    add("--dataset", default=None, help=argparse.SUPPRESS)  # as --config has it
    add("--dataset_config_name", help="configuration of that dataset")
    add("--image_column", default="image", help="column of the images in that dataset")
    add("--caption_column", default="text", help="column with a caption, or a list of them: one is drawn per epoch")
    add("--follow_symlinks", **SWITCH, help="read what links in the folder lead to elsewhere, too")
    add("--instance_prompt", help="caption of images without one, as in DreamBooth")
    add(
        "--hub_token",
        type=secret_token,
        help="token for what is private on the Hub; default: the one that `hf auth login` stored",
    )
    add(
        "--cache_dir",
        type=path_name,
        help="where downloads and remembered checks go, instead of the Hugging Face cache",
    )


def check_dataset_is_named(args):
    """Lists what is wrong with the name of the dataset."""
    return [] if args.dataset else ["DATASET is missing: name a folder, a local dataset or one on the Hub"]


def check_outside(flag, path, dataset):
    """Lists what is wrong with a file to write that may lie in the dataset."""
    if dataset and Path(path).resolve().is_relative_to(Path(dataset).resolve()):
        return [f"--{flag}={path}: lies in the dataset, which stays as it is; put it elsewhere"]
    return []


def read_named_rows(args):
    """Reads the dataset as columns `image` (undecoded) and `captions`. Raises `InputError`."""
    with named_dataset(args.dataset):
        return read_rows(argparse.Namespace(**vars(args), dataset_name=args.dataset), None, args.instance_prompt)


@contextlib.contextmanager
def named_dataset(name):
    """Reads, inside, the dataset that a command's first word names: says before if it is looked for on the Hub, since
    it is no path here. Raises `InputError`, which calls it by that word, and at once for what the Hub cannot have."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # which show themselves in a file of what was said, too
    is_here, meant = os.path.exists(name), ""
    if not is_here:
        meant = nearest_beside(name)
        check_hub_name(name, meant)
        print(fitted(f"There is no folder or file {name} here{meant}; looking for a dataset of that name on the Hub."))
    try:
        with told_in_lines():
            yield
    except InputError as error:
        told = str(error).replace("--dataset_name=", "DATASET=")
        told = told.replace(HOW_TO_CAPTION, remedy_for_captions(name))
        if not is_here:
            fails = f"DATASET={name}: cannot be loaded; "
            looked = (
                f"no such folder here{meant}; looked for a dataset of that name on the Hub too, which cannot be loaded"
            )
            told = told.replace(fails, f"DATASET={name}: {looked}; ")
        raise InputError(told) from None


def check_hub_name(name, meant):
    """Raises `InputError` for the name of a path that is not there, and that cannot be a dataset's on the Hub."""
    remedy = remedy_for_missing(name)
    try:
        validate_repo_id(name)
    except ValueError:
        remedy = remedy or f"check its name{meant}"
    if remedy:
        raise InputError(f"DATASET={name}: there is no such folder or file; {remedy}")


def name_below(name, dataset):
    """The name of an image, below the folder where the dataset is one and holds it."""
    root = Path(os.path.abspath(dataset))
    is_inside = os.path.isabs(name) and Path(name).is_relative_to(root)
    return Path(name).relative_to(root).as_posix() if is_inside else name


def remedy_for_captions(dataset):
    """How images of a dataset that have no captions get some."""
    if os.path.isdir(dataset) and any(is_image_file(path, dataset) for path in Path(dataset).rglob("*")):
        return f"`sdtune caption {shlex.quote(str(dataset))}` writes them, or give one for all by --instance_prompt"
    return "name another --caption_column, or give one for all by --instance_prompt"
