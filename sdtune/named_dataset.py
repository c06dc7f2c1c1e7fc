"""The dataset that the first word of a command names: its flags, its rows, and files that must not lie in it."""

import argparse
from pathlib import Path

from sdtune.arguments import SWITCH, path_name, secret_token
from sdtune.dataset import read_rows
from sdtune.errors import InputError


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
    add("--hub_token", type=secret_token, help="token for the dataset; default: the one that `hf auth login` stored")
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
    source = argparse.Namespace(**vars(args), dataset_name=args.dataset)
    try:
        return read_rows(source, None, args.instance_prompt)
    except InputError as error:
        raise InputError(str(error).replace("--dataset_name=", "DATASET=")) from None
