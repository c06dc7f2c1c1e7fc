#!/usr/bin/env python
# Built by `make scripts` from recipes/train_dreambooth_lora.py and sdtune/: edit those; a copy is yours to edit.
"""DreamBooth with LoRA: teach Stable Diffusion 1.x or 2.x one subject from three to thirty photos, by adapters.

    python train_dreambooth_lora.py --pretrained_model_name_or_path=MODEL --instance_data_dir=my_dog \
        --instance_prompt="a photo of sks dog" --with_prior_preservation --class_data_dir=dogs \
        --class_prompt="a photo of a dog" --resolution=512 --train_batch_size=1 --learning_rate=1e-4 --rank=16 \
        --max_train_steps=500 --mixed_precision=bf16 --validation_prompt="a sks dog on a beach" --output_dir=my_lora

`my_dog` holds the photos. Prior preservation keeps the class as it was: images of it, drawn by the base before
training, are trained on beside the photos. The result is pytorch_lora_weights.safetensors, and on demand the same
adapter as A1111, Forge and ComfyUI read it. What is random in a sample depends on (seed, epoch, index of the sample)
alone, and no state of a generator is kept: a run that is killed and resumed by the same command ends in the same bits
on a CPU, and on a GPU in the same up to the order in which its kernels add.

Papers: DreamBooth (arXiv 2208.12242), LoRA (2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), latent diffusion
(2112.10752), DDPM (2006.11239), v-prediction (2202.00512), min-SNR (2303.09556), zero terminal SNR (2305.08891), input
perturbation (2301.11706).
"""

# Tested with torch 2.13.0, diffusers 0.42.1, transformers 5.23.0, accelerate 1.15.0, datasets 5.2.0, peft 0.21.2.
# Constants and classes come first, then the functions:
#
#   the script     what is its own: its flags, what it loads and trains, the loss of a step, what it saves, main
#   diffusion      The diffusion step: encode images, add noise, compare the prediction with the target
#   training       Train in PyTorch: the accelerator, the state of a run, and the loop over its steps
#   batches        The order of an epoch, and each process's share of a step
#   randomness     Random numbers as a pure function of the seed and of what they are for
#   dataset        Read captioned images from a folder or the Hub, check them, make samples to train on
#   checkpoints    Write checkpoints that are whole or not there, find them, and go on from one
#   states         The state of a run in PyTorch, of which every process writes its part and reads it back
#   errors         Mistakes of the user's: how they are gathered, told and end the process
#   files          Files: read, written beside their place and renamed when complete, with permissions
#   arguments      The flags that several scripts share, their types, and `--config`
#   metadata       Leave metadata out of image files, which may be broken where the pixels are whole
#   images         Decode images as a viewer shows them, and check every one before training
#   lora_layouts   LoRA files in diffusers' and kohya's layouts: read, renamed, written; tensors keep their bits
#   models         Check and load the models of a Stable Diffusion pipeline
#   entries        Entries of the cache: a file per encoded image or caption, named by a digest of what made it
#   shards         Read shards: parquet, and tar files as WebDataset has them, whose samples are files of one name
#   buckets        Aspect-ratio buckets: pictures keep about their shape, in sizes of about the same area
#   lora           Add adapters to models, go on from those in a file, and save what was trained
#   subject        DreamBooth's prior preservation: images of the subject's class, drawn by the base, beside the photos
#   optimization   The optimizer, its learning rate, and the average of the weights
#   deepspeed      DeepSpeed's ZeRO: processes share out gradients, the optimizer's state, in stage 3 weights
#   sharding       FSDP2: what is trained is shared out over processes, each of which holds a shard of each tensor
#   digests        Digests of the files in a folder, by which a damaged one is found
#   output         The folder of a run: whether it may be used, its log, the pipeline that results
#   runs           What a run left in its folder, read again: log, settings, samples, and whether it learnt
#   plan           The plan that a run prints before its first step
#   progress       How far a run has come: a bar in a terminal, a plain line every so many steps elsewhere
#   model_card     The model card, README.md of a result: how to use it, what made it and how well it learnt
#   endings        What a run says when it ends: what it made, whether it learnt, and what can be done with that
#   hub            The upload of a result to the Hub
#   validation     Look at a run: draw samples, and measure the loss on images that are not trained on
#   signals        Signals that ask a run to stop or to save, and the death of the launcher, which asks it to stop
#   failures       What ends a run too early: it is told in a line, and nothing is lost that can be written
#   script         Run a script: read its flags, tell what is wrong with them, train
#   cache          Encode images and captions once, into a cache on disk that later runs share

import argparse
import collections
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import difflib
import errno
import fnmatch
import functools
import gc
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import operator
import os
import pkgutil
import platform
import re
import secrets
import shlex
import shutil
import signal
import socket
import stat
import struct
import sys
import tarfile
import textwrap
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath

# Almost all that libraries define on import stays; to look for garbage among it takes a quarter of the time.
gc.disable()


def stop_at_once(number, _):
    """Ends the process by a signal that comes before there is a run, or after it, with a line on it."""
    try:
        if os.environ.get("RANK", "0") == "0":
            told = f"{os.path.basename(__file__)}: stopped by {signal.Signals(number).name}"
            os.write(2, f"{told}\n".encode())
    finally:
        os._exit(128 + number)


def await_signals():
    """Answers signals while the imports below take their seconds, until the run does. What asks for a checkpoint is
    ignored, as is a SIGHUP that was before (nohup)."""
    for name, number in signal.Signals.__members__.items():
        is_ignored = name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
        if name in ("SIGUSR1", "SIGUSR2"):
            signal.signal(number, signal.SIG_IGN)
        elif name in ("SIGINT", "SIGTERM", "SIGHUP") and not is_ignored:
            signal.signal(number, stop_at_once)


class Later:
    """A library that is imported when something of it is used; `--help` and a wrong flag use nothing."""

    def __init__(self, name):
        self.__name__ = name
        self.__spec__ = importlib.util.find_spec(name)  # by which other libraries see that it is there

    def __getattr__(self, attribute):
        if sys.modules.get(self.__name__) is self:  # the first use: the library takes this one's place
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), attribute)


if __name__ == "__main__":
    await_signals()
    # What `import` finds under these names; together they take as long as all the others.
    sys.modules.update({name: Later(name) for name in ("diffusers", "transformers")})

import datasets
import diffusers
import huggingface_hub
import numpy as np
import pyarrow.parquet
import safetensors.numpy
import torch
import torch.distributed.checkpoint
import torch.nn.functional as F
import transformers
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    disable_fsdp_ram_efficient_loading,
    gather_object,
    get_int_from_env,
    is_cuda_available,
    parse_flag_from_env,
    send_to_device,
)
from filelock import FileLock, Timeout
from huggingface_hub import DatasetCard, HfApi, ModelCard, ModelCardData
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.utils import validate_repo_id
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.backends.cpu import get_cpu_capability
from torch.cpu import _is_amx_tile_supported, _is_avx512_bf16_supported
from torch.cuda import get_device_name, get_device_properties, is_bf16_supported, max_memory_reserved
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

gc.freeze()  # nor is it looked through later
if __name__ != "__main__":  # else when the flags are checked, for which libraries import more of themselves
    gc.enable()

MAX_LINES = 12  # of a message
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY")  # in the environment
OUT_OF_MEMORY_TEXT = re.compile(r"out of memory|can't allocate memory|RESOURCE_EXHAUSTED", re.IGNORECASE)
# What a process says whose connection to another one ends.
LOST_PEER_TEXT = re.compile(r"Connection (closed|reset) by (peer|remote)|remote process exited", re.IGNORECASE)
# What makes the folders that commands in the READMEs read.
MAKERS = {
    "demo/creatures": "make demo",
    "demo/dreambooth": "make demo-dreambooth",
    "demo/emoji": "make demo-emoji",
    "demo/emoji_lora": "make demo-emoji",
    "demo/flax": "make demo-flax",
    "demo/lora": "make demo-lora",
    "demo/model": "make demo",
    "demo/subject": "make demo-dreambooth",
}


class InputError(ValueError):
    """A mistake in what the user gave; its text is all that they need to see."""


# A stream of random numbers each: what is drawn from one leaves the others as they are.
SAMPLE = 0  # crop, flip, caption, timestep and noise of a sample, by epoch and index, or epoch, shard and row
ORDER = 1  # of an epoch
DROPOUT = 2  # layers, by step and process
SUBSET = 3  # the images that --max_train_samples leaves
HELD_OUT = 4  # the images that are not trained on
CLASS = 5  # order and noise of class images

SWITCH = {"action": argparse.BooleanOptionalAction, "default": False}  # so that a config file can turn it off too
SWITCH_ON = {**SWITCH, "default": True}

# AdamW's own constants; another optimizer may not have them.
ADAM_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8}
NUM_TRAIN_EPOCHS = 100
# diffusers.optimization's, by its names: to ask it would take a second, for which --help does not wait.
LR_SCHEDULERS = """
    linear cosine cosine_with_restarts polynomial constant constant_with_warmup piecewise_constant
""".split()
OFFSET_NOISE = 0.1  # what --offset_noise means in diffusers' scripts
MAX_NAME_BYTES = 255  # of a file or folder, on all usual file systems
MAX_PATH_BYTES = 3000  # which leaves room for what is made below it

# By group, the settings that a resume may change. They leave the result as it is, or what they lead to is compared in
# their place: a digest of the images, the samples of a step, the steps of the schedule. Any other has to be as it was.
MODEL_FREE_ON_RESUME = {"cache_dir"}
ADAPTERS_FREE_ON_RESUME = {"init_lora_weights", "kohya_file_name", "output_kohya_format"}
DATASET_FREE_ON_RESUME = set(
    """
    caption_column dataset_config_name dataset_name follow_symlinks image_column max_train_samples skip_bad_images
    """.split()
)
SUBJECT_FREE_ON_RESUME = {*DATASET_FREE_ON_RESUME, "instance_data_dir"}
CLASS_FREE_ON_RESUME = {"class_data_dir", "num_class_images", "prior_generation_precision", "sample_batch_size"}
OPTIMIZATION_FREE_ON_RESUME = set(
    """
    gradient_accumulation_steps gradient_checkpointing max_nan_steps max_train_steps num_train_epochs train_batch_size
    """.split()
)
MEMORY_FREE_ON_RESUME = {"dataloader_num_workers", "foreach_ema", "offload_ema", "set_grads_to_none", "use_8bit_adam"}
CACHE_FREE_ON_RESUME = {"cache_latents", "cache_text_embeddings"}  # which change the rounding alone
OUTPUT_FREE_ON_RESUME = set(
    """
    allow_changed_resume checkpointing_steps checkpoints_total_limit hub_model_id hub_private_repo hub_token keep_best
    logging_dir logging_steps output_dir overwrite_output_dir push_to_hub report_to resume_from_checkpoint
    save_precision tracker_project_name
    """.split()
)
VALIDATION_FREE_ON_RESUME = set(
    """
    num_validation_images num_validation_samples validation_epochs validation_guidance_scale
    validation_negative_prompt validation_num_inference_steps validation_prompt validation_prompts
    validation_scheduler validation_steps
    """.split()
)
RUN_FREE_ON_RESUME = {"config", "dry_run", "local_rank"}

# Settings of adapters that cannot change: the state in the checkpoint would not fit.
ADAPTERS_FIXED_ON_RESUME = {"lora_target", "rank", "train_text_encoder", "use_dora"}

# Flags of diffusers' DreamBooth scripts that cannot be obeyed here.
OF_ANOTHER_MODEL = "drop it; it is for DeepFloyd IF, and only Stable Diffusion 1.x and 2.x are trained"
SUBJECT_REPLACED_FLAGS = {
    "--validation_images": OF_ANOTHER_MODEL,
    "--text_encoder_use_attention_mask": OF_ANOTHER_MODEL,
    "--class_labels_conditioning": OF_ANOTHER_MODEL,
}

# What is said of words, keys and files that cannot be read as flags.
NOT_UNDERSTOOD = re.compile(": (is no flag|unknown key|is no YAML file)|^--config=.*: there is no such file")

# Flags that do nothing without another one.
DATASET_REQUIRES = {"dataset_config_name": "dataset_name"}
BUCKETS_REQUIRES = {
    "bucket_max": "aspect_ratio_buckets",
    "bucket_min": "aspect_ratio_buckets",
    "bucket_no_upscale": "aspect_ratio_buckets",
    "bucket_step": "aspect_ratio_buckets",
}
CLASS_REQUIRES = {
    "class_data_dir": "with_prior_preservation",
    "class_prompt": "with_prior_preservation",
    "class_prompts": "with_prior_preservation",
    "num_class_images": "with_prior_preservation",
    "prior_generation_precision": "with_prior_preservation",
    "prior_loss_weight": "with_prior_preservation",
    "sample_batch_size": "with_prior_preservation",
}
TEXT_ENCODER_REQUIRES = {"text_encoder_lr": "train_text_encoder"}
ADAPTERS_REQUIRES = {"kohya_file_name": "output_kohya_format", **TEXT_ENCODER_REQUIRES}
AVERAGE_REQUIRES = {"ema_decay": "use_ema", "ema_warmup": "use_ema"}
MEMORY_REQUIRES = {"offload_ema": "use_ema"}
OUTPUT_REQUIRES = {
    "allow_changed_resume": "resume_from_checkpoint",
    "hub_model_id": "push_to_hub",
    "hub_private_repo": "push_to_hub",
    "keep_best": "num_validation_samples",
}

# What other trainers call a setting, by its name here; of several that a script has, the first one is meant. A setting
# that no script has stands under "".
NAMES_ELSEWHERE = {
    "pretrained_model_name_or_path": "model base_model model_id model_name model_path name_or_path checkpoint ckpt",
    "instance_data_dir": "data_dir image_dir images input_dir folder_path train_dir train_data_dir photos",
    "train_data_dir": "data_dir image_dir images input_dir folder_path train_dir instance_data_dir photos",
    "class_data_dir": "reg_data_dir regularization_dir class_images_dir",
    "dataset_name": "dataset data train_dataset dataset_id",
    "prompts": "prompt validation_prompt validation_prompts",
    "instance_prompt": "prompt trigger_word trigger token_word instance_token concept",
    "validation_prompt": "prompt sample_prompt test_prompt preview_prompt",
    "validation_prompts": "prompts sample_prompts test_prompts eval_prompts",
    "output_dir": "output out save_dir output_path output_name",
    "resolution": "size image_size img_size width height reso",
    "height": "size image_size resolution",
    "train_batch_size": "batch_size batch bs",
    "batch_size": "batch bs train_batch_size",
    "learning_rate": "lr unet_lr base_lr unet_learning_rate",
    "text_encoder_lr": "te_lr text_encoder_learning_rate text_lr",
    "max_train_steps": "steps num_steps total_steps iterations max_iterations num_train_steps train_steps",
    "num_inference_steps": "steps num_steps sampling_steps sample_steps validation_num_inference_steps",
    "num_train_epochs": "epochs num_epochs max_epochs max_train_epochs train_epochs",
    "gradient_accumulation_steps": "accumulation accumulate accum accum_iter",
    "gradient_checkpointing": "checkpointing",
    "checkpointing_steps": "save_every save_steps save_every_n_steps save_freq checkpoint_every",
    "checkpoints_total_limit": "save_total_limit keep_checkpoints max_checkpoints save_last_n_steps",
    "resume_from_checkpoint": "resume resume_from resume_path network_state",
    "validation_steps": "sample_every eval_steps eval_every sample_every_n_steps",
    "validation_epochs": "sample_every_n_epochs eval_epochs",
    "mixed_precision": "precision fp16 bf16 amp dtype half fp32",
    "precision": "mixed_precision fp16 bf16 dtype half",
    "rank": "rank network_dim lora_rank lora_r lora_dim dim linear",
    "lora_alpha": "lora_alpha network_alpha alpha linear_alpha",
    "lora_dropout": "lora_dropout network_dropout rank_dropout",
    "init_lora_weights": "network_weights lora_weights",
    "lora": "lora_weights adapter lora_path",
    "train_text_encoder": "text_encoder",
    "lr_warmup_steps": "warmup",
    "adam_weight_decay": "wd",
    "adam_beta1": "betas",
    "max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clipping gradient_clip_val",
    "dataloader_num_workers": "workers max_data_loader_n_workers",
    "enable_xformers_memory_efficient_attention": "xformers mem_eff_attn",
    "use_8bit_adam": "adam8bit adamw8bit",
    "random_flip": "flip_aug hflip horizontal_flip",
    "no_random_flip": "no_flip no_hflip",
    "aspect_ratio_buckets": "enable_bucket buckets bucketing",
    "bucket_min": "min_bucket_reso min_bucket_size",
    "bucket_max": "max_bucket_reso max_bucket_size",
    "bucket_step": "bucket_reso_steps",
    "prediction_type": "v_parameterization v_pred",
    "rescale_betas_zero_snr": "zero_terminal_snr",
    "snr_gamma": "min_snr_gamma min_snr",
    "input_perturbation": "ip_noise_gamma",
    "tokenizer_max_length": "max_token_length",
    "cache_text_embeddings": "cache_text_encoder_outputs",
    "report_to": "log_with logger tracker wandb tensorboard",
    "validation_guidance_scale": "cfg cfg_scale guidance",
    "guidance_scale": "cfg cfg_scale scale validation_guidance_scale",
    "push_to_hub": "hub upload",
    "hub_model_id": "repo_id huggingface_repo_id",
    "hub_token": "token huggingface_token",
    "": "optimizer_args network_args network_module clip_skip keep_tokens save_state device type name path train use",
}
# What people set most, which is meant before others that have the same words.
MOST_USED = """
    pretrained_model_name_or_path instance_data_dir train_data_dir instance_prompt output_dir resolution
    train_batch_size learning_rate max_train_steps num_train_epochs mixed_precision validation_prompt use_ema
""".split()
# What people set first, of which `--help` begins with those ten that a script has.
FIRST_FLAGS = """
    pretrained_model_name_or_path train_data_dir instance_data_dir instance_prompt output_dir resolution
    train_batch_size learning_rate max_train_steps mixed_precision rank validation_prompts dataset_name
""".split()


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that ends, of each flag that has a default, with that."""

    def _get_help_string(self, action):
        text = super()._get_help_string(action)
        return text.removesuffix(" (default: %(default)s)") if action.default is None else text


TEXT = "text"  # the kinds of metadata; this one is all that no viewer obeys
PROFILE = "profile"
EXIF = "exif"
TIFF_TEXT = {269, 270, 271, 272, 285, 305, 306, 315, 316, 330}  # names, dates, and other directories (TIFF 6.0)
TIFF_KINDS = {34665: EXIF, 34853: EXIF, 34675: PROFILE}

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# Of pictures from phones and cameras, and for programs, that Pillow does not read or not as they are seen.
FOREIGN_SUFFIXES = set(".arw .cr2 .cr3 .dng .heic .heif .jxl .nef .orf .psd .raf .rw2 .svg".split())
# What is looked for in a file, whatever its suffix. Pillow knows more, and runs Ghostscript for some.
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"]
NO_CAPTION = "has no caption, in metadata or a .txt beside it"
HOW_TO_CAPTION = "`sdtune caption FOLDER` writes captions"
MAX_FILE_BYTES = 2**32  # of 16-bit pixels as many as are opened have a third
MIN_SIDE = 16  # pixels; anything smaller is an icon or a broken file
LISTINGS = "listings"  # the place, in what is remembered, of the keys of datasets that hold their images
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

LORA_FILE = "pytorch_lora_weights.safetensors"

LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")  # of a pipeline's parts; the last is diffusers'
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

ENTRY_FORMAT = 1  # to be raised where what an entry holds, or how an image is decoded, changes
NOT_OF_THE_WEIGHTS = {"architectures", "dtype", "torch_dtype", "transformers_version"}  # in a model's config


@dataclasses.dataclass
class Cache:
    """Where encoded images and captions lie."""

    folder: Path
    images: str | None  # digest of what the entries of all images have in common; None where none are cached
    captions: str | None  # likewise
    prompt_channels: int  # of the embeddings


NUM_LOOKED_AT = 100  # samples, for columns of these names
ROW_FORMAT = 1  # to be raised where what rows hold changes
ROW_FEATURES = {
    "image": datasets.Image(decode=False),
    "captions": datasets.List(datasets.Value("string")),
    "problem": datasets.Value("string"),  # what is wrong with the sample, or null
}

MAX_CAPTION_BYTES = 2**20  # of a .txt; a tokenizer takes a few hundred
METADATA_NAMES = {"metadata.jsonl", "metadata.csv"}
SAVED_NAMES = {"state.json", "dataset_dict.json"}  # that tell of `save_to_disk`
NO_DATA_NAMES = {*METADATA_NAMES, *SAVED_NAMES, "config.json", "dataset_info.json", "dataset_infos.json"}
SHARDS = "webdataset"  # tar files in which the files of a sample have a name in common
DATA_KINDS = {  # of files that `datasets` loads, by what it calls them; those that hold images come first
    ".tar": SHARDS,
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
SPLITS = {  # what folders of a split are called, as `datasets` has it
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


@dataclasses.dataclass
class CheckedRows:
    """Images that were checked, with their captions, and what is known of them."""

    rows: datasets.Dataset  # of image and captions
    digests: list  # of content and captions
    contents: np.ndarray  # (rows,), SHA-256 of each file
    sizes: np.ndarray  # (rows, 2), width and height in pixels


@dataclasses.dataclass
class CaptionedImages(torch.utils.data.Dataset):
    """Maps (epoch, index, weight) to these and is_mirrored, input_ids (max_length,), timestep, and posterior_noise,
    noise, added_noise in float32 (4, height / 8, width / 8), and with `reads_pixels` to pixel_values uint8 (3, height,
    width). What is in the `cache` comes too: mean and log_variance, of that shape, and prompt_embeds (max_length,
    channels)."""

    rows: datasets.Dataset  # of image, where that is read, and captions
    contents: np.ndarray  # (rows,), SHA-256 of each image's file
    sizes: np.ndarray  # (rows, 2), width and height in pixels to which each image is scaled and cropped
    tokenizer: Callable  # a CLIPTokenizer
    latent_channels: int
    pixels_per_latent: int  # along one side
    num_timesteps: int
    seed: int
    center_crop: bool
    random_flip: bool
    image_interpolation_mode: str
    caption_dropout: float
    noise_offset: float
    input_perturbation: float
    reads_pixels: bool = True
    picture_sizes: np.ndarray | None = None  # (rows, 2), before that, where it is known
    cache: Cache | None = None

    def __len__(self):
        return len(self.rows)

    def latent_shape(self, index):
        """The shape of the latents of a row."""
        width, height = (self.sizes[index] // self.pixels_per_latent).tolist()
        return self.latent_channels, height, width

    def choose(self, row, draw):
        """How an epoch sees a row, by the first numbers of `draw`: the place of the crop, whether it is mirrored, and
        the caption."""
        # All are drawn always and in this order: an option leaves the others' numbers alone.
        left, top, flip, choice, drop = draw.random(5)
        place = (0.5, 0.5) if self.center_crop else (left, top)
        caption = row["captions"][int(choice * len(row["captions"]))]
        return place, self.random_flip and flip < 0.5, "" if drop < self.caption_dropout else caption

    def open(self, index, row, place, is_mirrored):
        """The image of a row, scaled and cropped. Raises `InputError`."""
        with still_readable(name_of_row(row, index)):
            return self.fit(index, row, place, is_mirrored)

    def fit(self, index, row, place, is_mirrored):
        """As `open`. Raises whatever a decoder stumbles over."""
        width, height = self.sizes[index].tolist()
        resample = Image.Resampling[self.image_interpolation_mode.upper()]
        image = open_fitted(read_content(row["image"]), (width, height), resample, place)
        return ImageOps.mirror(image) if is_mirrored else image

    def draw_sample(self, index, row, draw):
        """What a sample of a row has beside pixels, by the numbers of `draw`; returns that and the place of the
        crop."""
        place, is_mirrored, caption = self.choose(row, draw)
        timestep = draw.integers(self.num_timesteps)
        latent_shape = self.latent_shape(index)
        posterior_noise, noise, perturbation = draw.standard_normal((3, *latent_shape), np.float32)
        # The offset shifts whole channels; perturbation (arXiv 2301.11706, eq. 3) is added and not to be predicted.
        noise = noise + self.noise_offset * draw.standard_normal((len(noise), 1, 1), np.float32)
        input_ids = self.tokenizer(caption, padding="max_length", truncation=True, return_tensors="np").input_ids[0]
        sample = {
            "is_mirrored": is_mirrored,
            "input_ids": input_ids,
            "timestep": timestep,
            "posterior_noise": posterior_noise,
            "noise": noise,
            "added_noise": noise + self.input_perturbation * perturbation,
        }
        return sample, place

    def __getitem__(self, item):
        epoch, index, weight = item
        row = self.rows[index]
        sample, place = self.draw_sample(index, row, random_numbers(self.seed, SAMPLE, epoch, index))
        sample |= {"epoch": epoch, "index": index, "weight": np.float32(weight)}
        is_mirrored, input_ids, latent_shape = sample["is_mirrored"], sample["input_ids"], sample["noise"].shape
        if self.reads_pixels:
            sample["pixel_values"] = np.array(self.open(index, row, place, is_mirrored)).transpose(2, 0, 1)
        if self.cache and self.cache.images:
            path = path_of_image(self.cache, self.contents[index], *self.sizes[index], is_mirrored)
            sample |= read_whole_entry(path, {"mean": latent_shape, "log_variance": latent_shape})
        if self.cache and self.cache.captions:
            path = path_of_caption(self.cache, input_ids)
            sample |= read_whole_entry(path, {"prompt_embeds": (len(input_ids), self.cache.prompt_channels)})
        return sample


@dataclasses.dataclass
class StepCounts:
    """How many samples and steps a run has."""

    num_images: int | None  # None, as of what depends on it, where images are a stream
    samples_per_pass: int  # over all processes
    samples_per_step: int
    steps_per_epoch: int | None
    last_step: int
    # (num_images,), the number of each image's bucket: a step is of one. None if all are in the same.
    buckets: np.ndarray | None = dataclasses.field(default=None, compare=False)
    pixels: np.ndarray | None = dataclasses.field(default=None, compare=False)  # (num_images,), where they are known


LARGEST_STEP = 64  # pixels, if no --bucket_step is given
NUM_SHOWN = 8  # buckets that are told


@dataclasses.dataclass
class BucketRule:
    """Which sizes there are."""

    resolution: int  # its square is the area that no size exceeds
    step: int  # of sides, in pixels
    smallest: int  # side in pixels
    largest: int
    upscale: bool  # whether a picture that is smaller than its bucket is enlarged


# Names of layers, of the UNet and of the text encoder.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "fc1", "fc2"]
PROJECTIONS = ["proj_in", "proj_out"]  # into and out of the transformers
RESIDUAL = ["conv1", "conv2", "time_emb_proj", "conv_shortcut"]
LORA_TARGETS = {  # by --lora_target
    "attention": ATTENTION,
    "attention+ff": ATTENTION + FEED_FORWARD,
    "all": ATTENTION + FEED_FORWARD + PROJECTIONS + RESIDUAL,
}

CLASS_RECORD = "class_image"  # the name of the text, in a PNG, that tells what drew it
CLASS_STEPS = 25
CLASS_GUIDANCE = 7.5


@dataclasses.dataclass
class ClassImages:
    """The images of the class that are there, and those that are still to be drawn."""

    checked: CheckedRows | None  # those that are there
    fingerprint: str | None
    missing: list  # file names


OPTIMIZERS = {"adamw": "AdamW", "adamw8bit": "8-bit AdamW", "adafactor": "Adafactor", "prodigy": "Prodigy"}
NEEDED_PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
# What Prodigy learns about the size of its steps; it stands among the settings of its groups.
PRODIGY_PROGRESS = {"d", "d_max", "d_hat", "d_numerator", "d_denom", "k"}
POLYNOMIAL_END = 1e-7  # the rate at which diffusers' polynomial schedule ends
AVERAGED_AT_ONCE = 2**24  # weights whose average is updated at once: 64 MB of differences


class DeepSpeedAccelerator(Accelerator):
    """Accelerate's for DeepSpeed, which keeps weights in float32 and autocasts their passes. Told of bf16 itself,
    accelerate would have DeepSpeed train weights that are rounded to it."""

    def __init__(self, precision, **options):
        self.precision = precision
        super().__init__(mixed_precision="no", **options)

    @property
    def mixed_precision(self):
        """That of passes."""
        return self.precision

    def autocast(self, autocast_handler=None):
        """A context in which passes are in that precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


SHARDS_FOLDER = "shards"  # a folder of a checkpoint, in the place of weights and optimizer
AVERAGE = "ema."  # begins the names of averaged weights among shards

DIGESTS_FILE = "digests.json"

AVERAGED = "_ema"  # ends the names of averaged weights in a checkpoint
# What settings are digests of, or dictionaries of digests.
DIGESTED = {"captioned_images": "images or captions", "class_data": "class images", "photos": "images or captions"}
WHOLE_WEIGHT = 0.999  # of the samples of a step in all, which is 1 but for rounding
# Flags that choose images and captions, of which only the outcome is compared.
CHOOSE_IMAGES = """
    num_validation_samples max_train_samples skip_bad_images dataset_config_name image_column caption_column
""".split()
MAX_NAMED = 5  # of what differs in a setting
REMEDY_FOR_SHARDING = (
    "use the accelerate config of there, under ZeRO with as many processes (accelerate launch --num_processes=N), or "
    "begin a new run from what `sdtune export` makes of the checkpoint"
)


@dataclasses.dataclass
class Weights:
    """The weights that are trained, and how they become files that people can load, and come back from them."""

    models: dict  # by name, that have them
    prepared: dict  # by name, as accelerate prepared them for passes
    parameters: list  # of torch
    write: Callable  # (models, folder, suffix): writes into a folder, with a suffix to the names
    read: Callable  # (models, folder, suffix): reads what was written. Raises whatever a broken file leads to
    skeletons: dict  # by name, models without weights, for those that are shared out over processes


@dataclasses.dataclass
class Run:
    """What a run is and how far it has come. A checkpoint holds `settings`, `progress`, `weights` and `state`."""

    output_dir: Path
    settings: dict  # flags, and what was made of them
    # global_step, base_losses (held-out, before training), losses (not yet logged), nan_steps (skipped ones in a row),
    # skipped_steps (all of them)
    progress: dict
    state: dict  # by name: what has a state_dict, or in JAX arrays
    counts: StepCounts
    weights: Weights | None = None  # None in JAX, where they are part of the state
    is_whole: bool = True  # weights and state belong together; not so in the middle of an optimizer step


OPTIMIZER_FILE = "optimizer.bin"  # as accelerate calls it
STATE_FILE = "state.json"

LOCK_FILE = ".lock"
TOKEN_FILE = ".token"  # what the first process leaves for the other machines to see, for a moment
HISTORY_FILE = "history.jsonl"  # when the run was started, stopped and resumed: of the clock, as the log is not
HALF_FILE = re.compile(r"\.(args\.json|log\.jsonl|best\.json|history\.jsonl)\..+\.new")  # what a kill leaves of one
NEW_RESULT = ".result.partial"  # a folder beside which the old result stays until the new one is whole

INTERVAL = 2  # standard errors on either side of a mean that are an interval of about 95 %
MIN_FOR_INTERVAL = 10  # held-out images: of fewer they are none
# What has to be of a kind to be read, in the log, the history or the settings.
NUMBERS = set(
    "loss lr grad_norm images_per_second device_gb process_gb held_out_loss held_out_gain gain_error".split()
)
WHOLE_NUMBERS = set("last_step max_train_steps samples_per_step num_validation_samples max_train_samples seed".split())
TEXTS = set(
    """
    train_data_dir instance_data_dir dataset_name dataset_config_name image_column caption_column cache_dir
    instance_prompt validation_prompt
    """.split()
)
LISTS = {"changed", "validation_prompts"}  # of texts


@dataclasses.dataclass
class RunRecord:
    """What is there of a run; of an older one, or of one from the Hub, there may be the log alone."""

    name: str
    folder: Path
    rows: list  # of log.jsonl: dictionaries with a step, in which no number is infinite or not a number
    settings: dict  # of args.json
    history: list  # of history.jsonl: dictionaries with time, event and step
    samples: dict  # {step: path of the grid of samples}
    notes: list  # sentences on what cannot be read

    def with_number(self, *names):
        """The rows in which there are all of these numbers."""
        return [row for row in self.rows if all(row.get(name) is not None for name in names)]

    def last_step(self):
        """The last step that is told of; one that was done before the run went back counts no more."""
        starts = [number for number, row in enumerate(self.history) if row.get("event") in ("started", "resumed")]
        newest = starts[-1] if starts else 0
        told = self.rows + self.history[newest:]
        return max([row["step"] for row in told], default=0)

    def planned_step(self):
        """The last step that was planned, or None where nobody knows."""
        planned = [row["last_step"] for row in self.history if row.get("last_step")]
        return planned[-1] if planned else self.settings.get("max_train_steps")

    def changed(self):
        """The flags that were changed from their defaults at the last start, or None where that was not noted."""
        noted = [row["changed"] for row in self.history if row.get("changed") is not None]
        return noted[-1] if noted else None

    def has_interval(self):
        """Whether so many images were held out that standard errors are an interval."""
        return (self.settings.get("num_validation_samples") or 0) >= MIN_FOR_INTERVAL


MARGIN = " " * 13  # before the text of a row
PASSES_IN = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}  # by --mixed_precision

NUM_RECENT = 100  # steps over which loss and speed are averaged: the loss of a single one says nothing
BAR = "{percentage:3.0f}%|{bar}| {n:,}/{total:,}, {remaining} left{postfix}"

# What `sdtune push-model` knows the line by that names the model in a card's code.
NAMES_MODEL = "  # its name on the Hub, or the path of its folder"
TAGS = ["text-to-image", "stable-diffusion", "stable-diffusion-diffusers"]
# Settings that say how a run was carried out, not what was trained; steps and epochs stand in the text.
NOT_ON_CARD = set(
    """
    allow_changed_resume cache_latents cache_text_embeddings caption_column checkpointing_steps
    checkpoints_total_limit config coordinator_address dataloader_num_workers dataset_config_name dry_run
    follow_symlinks foreach_ema from_flax from_pt host_index hub_private_repo image_column keep_best local_rank
    logging_steps max_nan_steps max_train_samples max_train_steps num_hosts num_train_epochs num_validation_images
    num_validation_samples offload_ema output_kohya_format overwrite_output_dir push_to_hub report_to save_flax
    set_grads_to_none shuffle_buffer_size skip_bad_images skip_save_text_encoder validation_epochs
    validation_guidance_scale validation_negative_prompt validation_num_inference_steps validation_prompt
    validation_prompts validation_scheduler validation_steps
    """.split()
)


@dataclasses.dataclass
class Usage:
    """How the result is drawn with, in Python."""

    imports: list  # lines
    loading: list  # lines that make `pipe`
    call: dict  # what is given to it beside the prompt
    notes: list  # paragraphs on what to mind


@dataclasses.dataclass
class Training:
    """What only a script knows of what it trained, for the card."""

    trained: str  # the result, before the name of its base: "LoRA adapters for"
    images: str  # what it was trained on: "5 photos of one subject"
    trigger: str | None  # what a prompt has to hold
    tags: list


NOTHING_TRAINED = "Nothing was trained; the settings are fine."
MAX_COLUMNS = 85  # of a command, beside the name of its row and what joins its lines

HELD_OUT_TIMESTEPS = 4  # at which the loss of each held-out image is measured


class LookGivenUp(Exception):
    """A look at the run was given up by all processes, since one was asked to stop."""


@dataclasses.dataclass
class HeldOut:
    """The images that are held out, and what a process keeps of its share of them, by index and in the CPU's memory:
    nothing of it changes from look to look."""

    images: CaptionedImages  # all of them, which are not opened any more: what a sample draws
    posteriors: dict | None  # mean and log-variance, (4, height / 8, width / 8) each in float32; None if in the cache
    input_ids: dict  # (tokens,)
    prompt_embeds: dict | None  # (tokens, channels); None where the text encoder is trained


# By their names, since Windows lacks some. SIGHUP: the terminal is gone. SIGUSR1, SIGUSR2: what clusters are told to
# send some time before they end a job.
ASK_TO_STOP = {"SIGTERM", "SIGINT", "SIGHUP"}
ASK_TO_SAVE = {"SIGUSR1", "SIGUSR2"}
SAME_REQUEST = 3.0  # seconds in which a signal may come twice: to a group, and handed on by the launcher in it


@dataclasses.dataclass
class Stop:
    """What may ask a run to stop, or to save and go on."""

    launcher: int | None  # number of the process that started this one
    received: list = dataclasses.field(default_factory=list)  # signals that ask to stop
    saves: list = dataclasses.field(default_factory=list)  # signals that ask for a checkpoint, not answered yet


DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What libraries say instead: safetensors, torch, which hides the reason, and torch again.
DISK_FULL_TEXT = re.compile(
    r"No space left|File too large|quota exceeded|iostream error|PytorchStreamWriter failed|unexpected pos",
    re.IGNORECASE,
)

# Of glibc's `mallopt` (malloc.h): parameters, with the largest values that serve.
FREED_MEMORY_IS_KEPT = {-1: 2**31 - 1, -3: 2**30}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, in bytes
MINUTES = datetime.timedelta(minutes=10)  # for what all processes do at the same time
A_DAY = datetime.timedelta(days=1)
PATIENCE_WITH_FOLDERS = 75  # seconds: NFS may keep for 60 that a file is not there
# Flags that may differ between machines: what they name is compared in their place, or has no effect on others.
OWN_TO_A_MACHINE = set(
    """
    cache_dir class_data_dir config dataloader_num_workers dataset_name hub_token init_lora_weights instance_data_dir
    local_rank logging_dir output_dir pretrained_model_name_or_path single_file_config tokenizer_name train_data_dir
    """.split()
)


@dataclasses.dataclass
class Work:
    """What the steps of a run are made of."""

    loader: torch.utils.data.DataLoader  # of this process's batches, from the run's next step on
    training_loss: Callable  # (batch): the loss of each sample (batch,), through the models that are trained
    make_gradients: Callable  # (args, accelerator, run, work, passes): a step's loss, and the norm of its gradient


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


REQUIRES = {
    **ADAPTERS_REQUIRES,
    **DATASET_REQUIRES,
    **BUCKETS_REQUIRES,
    **AVERAGE_REQUIRES,
    **MEMORY_REQUIRES,
    **OUTPUT_REQUIRES,
    **CLASS_REQUIRES,
}
FREE_ON_RESUME = {
    *MODEL_FREE_ON_RESUME,
    *ADAPTERS_FREE_ON_RESUME,
    *SUBJECT_FREE_ON_RESUME,
    *CLASS_FREE_ON_RESUME,
    *OPTIMIZATION_FREE_ON_RESUME,
    *MEMORY_FREE_ON_RESUME,
    *CACHE_FREE_ON_RESUME,
    *OUTPUT_FREE_ON_RESUME,
    *VALIDATION_FREE_ON_RESUME,
    *RUN_FREE_ON_RESUME,
}
FIXED_ON_RESUME = {
    *ADAPTERS_FIXED_ON_RESUME,
    "mixed_precision",
    "channels_last",
    "optimizer",
    "sharding",
    "state",
}  # the state would not fit


# ---------------------------------------------------------------------------------------------------------- the script
def make_parser():
    """The flags of this script."""
    usage = "%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir FOLDER --instance_prompt TEXT [flags]"
    parser = new_parser(__doc__, usage)
    add_model_arguments(parser)
    add_adapter_arguments(parser, list(LORA_TARGETS))
    add_subject_arguments(parser)
    add_bucket_arguments(parser)
    add_class_arguments(parser)
    add_objective_arguments(parser)
    add_optimization_arguments(parser)
    add_memory_arguments(parser)
    add_cache_arguments(parser)
    add_output_arguments(parser)
    add_validation_arguments(parser)
    add_run_arguments(parser)
    parser.set_defaults(output_dir="dreambooth-lora", tracker_project_name="dreambooth", train_batch_size=4)
    put_first(parser, FIRST_FLAGS)
    return parser


def check_args(args, problems=()):
    """Lists what is wrong with the flags, each with its value, what is accepted and the remedy. `problems` are those
    that were found before."""
    found = check_requirements(args, REQUIRES) + check_old_flags(args)
    found += check_data(args, "instance_data_dir") + check_subject(args)
    found += check_cache(args, args.train_text_encoder)
    found += check_optimization(args) + check_optimizer(args)
    found += check_hardware(args) + check_environment(args) + check_trackers(args) + check_validation(args)
    found += check_output(args, foreign_result="model_index.json")
    found += check_model(args) + check_buckets(args)
    if problems or found:  # the layers are not known, or not how their adapters are to be
        return found
    return check_adapters(args)


def train(args, launcher):
    """Trains as `args` say, which have been checked; `launcher` is the process that started this one, or None."""
    accelerator = make_accelerator(args)
    told = []
    with told_in_plan(told):
        images, held_out, fingerprint = load_data(
            args, args.instance_data_dir, args.instance_prompt, args.repeats, fit_of(args)
        )
    with told_in_plan(told):
        class_images = load_class_images(args)
    agree_on_data(accelerator, {"photos": fingerprint, "class_images_to_draw": class_images.missing})
    if class_images.missing and not args.dry_run:
        print(told.pop(), end="", flush=True)  # the plan comes when they are there
        draw_class_images(args, accelerator, class_images.missing)
        with told_in_plan(told):
            class_images = load_class_images(args)
    fingerprints = {"captioned_images": fingerprint, "class_data": class_images.fingerprint}
    agree_on_data(accelerator, fingerprints)
    repo_id = None
    if not args.dry_run:
        repo_id = name_repo(args) if args.push_to_hub and accelerator.is_main_process else None
        start_trackers(args, accelerator)
    pipeline, models, noise_scheduler = load_models_with_adapters(args, accelerator)
    make_faster(args, pipeline.unet)
    counts = count_steps(args, len(images), accelerator.num_processes, images.sizes)
    groups = group_parameters(args, models, peak_learning_rate(args, counts))
    weights, optimizer = prepare(accelerator, models, make_optimizer(args, groups), write_adapters, read_adapters_into)
    unet, text_encoder = weights.prepared["unet"], weights.prepared.get("text_encoder", pipeline.text_encoder)

    def training_loss(batch):
        """The loss of each sample of a batch (batch,)."""
        latents = encode(pipeline.vae, batch)
        prompt_embeds = encode_prompts(text_encoder, batch)
        return diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, batch, args.snr_gamma)

    state = make_state(args, accelerator, optimizer, weights, counts.last_step)
    run = start_run(args, accelerator, counts, state, fingerprints, weights, FREE_ON_RESUME, FIXED_ON_RESUME)
    if args.dry_run:
        class_images = stand_ins(class_images, images)
    samples = with_class_rows(images, class_images)
    cache = plan_cache(args, accelerator, pipeline, [samples, held_out])
    about = {
        "kinds": describe_kinds(images, args.repeats, args.instance_prompt),
        "data": told,
        "trained": f"LoRA of rank {args.rank} on {args.lora_target} of {' and '.join(models)}",
        "frozen": "all else",
        "result_bytes": count_adapter_bytes(args, weights.parameters),
        "buckets": describe_buckets(args, images),
        "cache": describe_cache(cache),
    }
    tell_plan(args, accelerator, run, len(held_out), about)

    prompts = prompts_of(args)
    if not (args.dry_run and cache.missing):
        with told_in_a_line(args, accelerator, "The encoding"):
            samples, held_out = fill_cache(args, accelerator, pipeline, [samples, held_out], cache)
        leave_device(pipeline, cache, prompts)
    batches = batches_of(args, accelerator, run)
    num_classes = len(class_images.checked.rows) if class_images.checked else 0
    batches = with_classes(batches, len(images), num_classes, args.prior_loss_weight, args.seed, counts.buckets)
    loader = make_loader(args, accelerator, samples, batches)
    work = Work(loader, training_loss, add_up_gradients)
    if args.dry_run:
        try_steps(args, accelerator, run, work)
        end_training(accelerator)
        print(NOTHING_TRAINED)
        return

    start_output(args, accelerator, run, make_parser())
    parts = {**pipeline.components, "scheduler": noise_scheduler}
    with told_in_a_line(args, accelerator, "The encoding"):
        held_out = encode_held_out(accelerator, parts["vae"], parts["text_encoder"], held_out, args.train_batch_size)
    look = functools.partial(validate, args, accelerator, run, parts, held_out, prompts)
    stop = Stop(launcher)
    with nothing_lost(args, accelerator, run, stop, functools.partial(write_state_alone, accelerator)):
        train_steps(args, accelerator, run, stop, work, look)
        use_average(run)
        models = whole_models(weights)
        if accelerator.is_main_process:
            photos = describe_subject(args, len(images), num_classes)
            files = save_model(args, pipeline, models, noise_scheduler, run, images, photos, repo_id)
    if repo_id:
        push(args, repo_id, files, counts.last_step)
    end_training(accelerator)
    if accelerator.is_main_process:
        prompt = (prompts or [args.instance_prompt or find_trigger(images.rows) or "a picture"])[0]
        tell_end(args, run, files, command_to_draw(args, pipeline, noise_scheduler, prompt))


def save_model(args, pipeline, models, noise_scheduler, run, images, photos, repo_id):
    """Writes the adapters in diffusers' layout, on demand in kohya's too, and the model card, which says of the
    `photos` what they are; returns patterns that are the adapters' files."""
    with new_result(args.output_dir) as folder:
        files = save_adapters(args, folder, models, len(images), run.counts.last_step)
        usage = use_of_adapters(args, pipeline, noise_scheduler, LORA_FILE, repo_id)
        training = Training(
            trained="DreamBooth: LoRA adapters for",
            images=photos,
            trigger=args.instance_prompt or find_trigger(images.rows),
            tags=["dreambooth", "lora"],
        )
        write_card(args, make_parser(), folder, run, prompts_of(args), usage, training)
    return files


def main(argv=None):
    """Runs the script; a mistake of the user's ends with status 2 and its message."""
    run_launched_script(Path(__file__).name, make_parser(), argv, SUBJECT_REPLACED_FLAGS, check_args, train)


# ----------------------------------------------------------------------------------------------------------- diffusion
@torch.no_grad()
def encode(vae, batch):
    """Draws the latents of images (batch, 4, height / 8, width / 8) in float32 from the VAE's posterior, or from that
    which a batch has in the place of pixels."""
    if "mean" in batch:
        mean, log_variance = batch["mean"], batch["log_variance"]
    else:
        mean, log_variance = encode_posterior(vae, batch["pixel_values"])
    return draw_latents(vae, mean, log_variance, batch["posterior_noise"])


def encode_posterior(vae, pixel_values):
    """The mean and the logarithm of the variance of the VAE's posterior, (batch, 4, height / 8, width / 8) each in
    float32, for images of 8 bits (batch, 3, height, width)."""
    pixel_values = pixel_values / 127.5 - 1  # [-1, 1], to be rounded once, by the VAE's precision
    posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
    return posterior.mean.float(), posterior.logvar.float()


def draw_latents(vae, mean, log_variance, posterior_noise):
    """Latents that a posterior gives for its noise, scaled as the UNet takes them."""
    std = torch.exp(0.5 * log_variance)
    return (mean + std * posterior_noise) * vae.config.scaling_factor


def encode_prompts(text_encoder, batch):
    """Embeddings of captions (batch, tokens, channels), or the cached ones that a batch has."""
    if "prompt_embeds" in batch:
        return batch["prompt_embeds"]
    return text_encoder(batch["input_ids"])[0]


def diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, batch, snr_gamma=None):
    """One diffusion step: the loss of each sample (batch,), the mean over its latents (arXiv 2006.11239, eq. 14).
    `batch` has `noise` and `added_noise`, of the shape of the latents, and `timestep` (batch,)."""
    noise, timesteps = batch["noise"], batch["timestep"]
    # Latents and noise are float32: add_noise works in their precision, and in bfloat16 the first timesteps would get
    # no noise at all.
    noisy_latents = noise_scheduler.add_noise(latents, batch["added_noise"], timesteps)
    predicts_noise = noise_scheduler.config.prediction_type == "epsilon"
    target = noise if predicts_noise else noise_scheduler.get_velocity(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, prompt_embeds).sample
    losses = F.mse_loss(model_pred.float(), target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is None:
        return losses
    snr = diffusers.training_utils.compute_snr(noise_scheduler, timesteps)
    return losses * min_snr_weights(snr, snr_gamma, predicts_noise)


def min_snr_weights(snr, snr_gamma, predicts_noise):
    """The weights of min-SNR (arXiv 2303.09556, section 3.4) for signal-to-noise ratios (batch,): min(snr, gamma) /
    snr where noise is predicted, min(snr, gamma) / (snr + 1) for v."""
    return snr.clamp(max=snr_gamma) / (snr if predicts_noise else snr + 1)


# ------------------------------------------------------------------------------------------------------------ training
def check_hardware(args):
    """Lists what this machine, or accelerate's config, cannot do."""
    problems = []
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if args.allow_tf32 and on_cpu:
        problems.append("--allow_tf32=True: needs an NVIDIA GPU; drop this")
    if args.enable_xformers_memory_efficient_attention and (on_cpu or not diffusers.utils.is_xformers_available()):
        problems.append(
            "--enable_xformers_memory_efficient_attention=True: needs a GPU and xformers; run "
            "`pip install -r requirements_xformers.txt` there, or drop this"
        )
    if args.compile and on_cpu and not shutil.which(os.environ.get("CXX", "g++")):
        problems.append("--compile=True: needs a C++ compiler; install g++, or drop this")
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    told = f"--mixed_precision={precision} (or accelerate's config)"
    if precision not in DTYPES:
        problems.append(f"{told}: must be no, fp16 or bf16; use bf16")
    elif precision == "fp16" and on_cpu:
        problems.append(f"{told}: a CPU cannot train in fp16; use --mixed_precision=no")
    return problems


def check_environment(args):
    """Lists what accelerate would take from its variables without obeying it as its users expect."""
    problems = []
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if asked not in ("1", str(args.gradient_accumulation_steps)):
        problems.append(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={asked} (or accelerate's config): give "
            f"--gradient_accumulation_steps={asked} to this script"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        problems.append(
            f"ACCELERATE_DYNAMO_BACKEND={os.environ['ACCELERATE_DYNAMO_BACKEND']} (or accelerate's config): is not "
            "obeyed here; use no, and --compile"
        )
    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            problems.append(f"accelerate's config asks for {name}, which cannot be used; choose GPUs alone")
    return problems + check_sharding(args) + check_deepspeed(args)


def make_accelerator(args):
    """The accelerator, whose processes have agreed on the flags. They wait for each other for minutes, but for a day
    in `wait_for_everyone`: there one of them draws, reads or saves alone. Raises `InputError`."""
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32  # of convolutions, for which torch's default is True
    make = functools.partial(Accelerator, mixed_precision=args.mixed_precision)
    if uses_deepspeed():
        make = functools.partial(make_deepspeed_accelerator, args)
    is_alone = get_int_from_env(["WORLD_SIZE"], 1) == 1
    with contextlib.nullcontext() if is_alone else ended_by_signals():  # until the other processes come
        accelerator = make(
            log_with=chosen_tracker(args),
            project_dir=Path(args.output_dir, args.logging_dir),
            # The passes of a step are ours to count: accelerate would divide gradients by what its variable says.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                InitProcessGroupKwargs(choose_backend(), timeout=MINUTES),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else every gradient is there twice
            ],
        )
    check_company(accelerator)
    set_up_sharding(accelerator)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.num_processes > 1:
        patient = torch.distributed.new_group(timeout=A_DAY, backend="gloo")
        accelerator.wait_for_everyone = functools.partial(torch.distributed.barrier, patient)
    flags = {name: value for name, value in vars(args).items() if name not in OWN_TO_A_MACHINE}
    check_agreement(accelerator, flags)
    if accelerator.num_processes > 1 and not args.dry_run:  # which writes nothing
        check_shared_output(accelerator, args.output_dir)
    return accelerator


def check_company(accelerator):
    """Raises `InputError` where a launcher started several processes, but accelerate leaves each alone, as it does
    without a GPU: all would train the same, and write into one output folder."""
    number = get_int_from_env(["WORLD_SIZE"], 1)
    if number == 1 or accelerator.num_processes > 1:
        return
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            f"WORLD_SIZE={number}, but LOCAL_RANK is not set, and each process would train alone; start them by "
            "`accelerate launch` or torchrun, or unset WORLD_SIZE"
        )
    raise InputError(
        f"{number} processes were started (WORLD_SIZE), but PyTorch {torch.__version__} finds no GPUs for them, and "
        "each would train alone; use `python` for one process, install a PyTorch that knows your GPUs, or set "
        "ACCELERATE_USE_CPU=true to share CPUs"
    )


def keep_freed_memory():
    """Makes glibc keep what a step frees for the next one. It would give large tensors back to the system, which
    hands them out again page by page, filled with zeros: a tenth of a CPU's time. Other C libraries are left alone."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # there is no such function
        for parameter, value in FREED_MEMORY_IS_KEPT.items():
            ctypes.CDLL(None).mallopt(parameter, value)


def check_agreement(accelerator, values):
    """Compares `values` of all processes, by name: any that differ would have them wait for each other for ever.
    Raises `InputError` in all of them, which names the difference."""
    here = {"host": socket.gethostname(), **values}
    everywhere = gather_object([here])
    differences = []
    for name in values:
        for rank, there in enumerate(everywhere):
            if there[name] != everywhere[0][name]:
                places = [f"on rank 0 ({everywhere[0]['host']})", f"on rank {rank} ({there['host']})"]
                differences.append(tell_difference(name, everywhere[0][name], there[name], *places))
                break
    if differences:
        remedy = "all need the same flags, the same data and one --output_dir that they share"
        raise InputError("\n  ".join([f"the processes do not agree; {remedy}", *differences]))


def check_shared_output(accelerator, output_dir):
    """Asks whether all processes see one output folder: a machine with a folder of its own would not find the
    checkpoint to go on from, nor keep one where the others look for it. Raises `InputError` in all of them."""
    token, problems = secrets.token_hex(16), []
    if accelerator.is_main_process:
        with gathered(problems):
            leave_token(output_dir, token)
    token, problems = broadcast_object_list([token, problems])  # the first process's, once it has left the token
    raise_problems(problems)
    here = {
        "host": socket.gethostname(),
        "folder": Path(output_dir).resolve(),
        "sees": accelerator.is_main_process or sees_token(output_dir, token, PATIENCE_WITH_FOLDERS),
    }
    everywhere = gather_object([here])
    if accelerator.is_main_process:
        remove_token(output_dir)
    first, blind = everywhere[0], [rank for rank, there in enumerate(everywhere) if not there["sees"]]
    if blind:
        there, number = everywhere[blind[0]], f"{len(blind)} of {counted(len(everywhere), 'process', 'processes')}"
        raise InputError(
            f"--output_dir={output_dir}: {number} {'does' if len(blind) == 1 else 'do'} not see what rank 0 writes "
            f"to {first['folder']} on {first['host']}, such as rank {blind[0]}, which looks into {there['folder']} on "
            f"{there['host']}; name one folder that all machines share, by its whole path"
        )


def agree_on_data(accelerator, fingerprints):
    """Waits until all processes have read their images, and compares what they have. Raises `InputError`."""
    accelerator.wait_for_everyone()
    check_agreement(accelerator, fingerprints)


def prepare(accelerator, models, optimizer, write, read):
    """Prepares models, by name, and their optimizer for the accelerator: their passes are autocast then. Returns the
    weights that are trained, with `write` and `read` as `Weights` has them, and the optimizer."""
    skeletons = {name: skeleton_of(model) for name, model in models.items()} if accelerator.is_fsdp2 else {}
    # In one call: an optimizer has to get to know the shards of its weights.
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    *prepared, optimizer = accelerator.prepare(*models.values(), optimizer)
    if accelerator.is_fsdp2:  # which autocasts nothing
        for model in prepared:
            model.forward = accelerator.autocast()(model.forward)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if uses_deepspeed():  # whose optimizer has other tensors
        set_up_engine(*prepared)
        parameters = given
    prepared = dict(zip(models, prepared, strict=True))
    return Weights(models, prepared, parameters, write, read, skeletons), optimizer


def make_state(args, accelerator, optimizer, weights, last_step):
    """All that a checkpoint holds beside weights, by name: optimizer, lr_scheduler, maybe ema and scaler."""
    lr_scheduler = make_schedule(args, optimizer, last_step)
    state = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
    if args.use_ema:
        state["ema"] = make_average(args, held_here(weights.parameters))
        if args.offload_ema:  # at once: the first step needs all memory that there is
            state["ema"].to("cpu")
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler
    return state


def start_run(args, accelerator, counts, state, fingerprints, weights, free, fixed):
    """A run at its start, or where the checkpoint to resume from ended, the same in all processes; `free` and `fixed`
    name settings that may and that cannot differ from the checkpoint's. Raises `InputError`."""
    masks = split_of_step(args, accelerator) if has_dropout(weights.models) else None
    sharding = "FSDP2" if accelerator.is_fsdp2 else name_of_zero(accelerator)
    fingerprints = {**fingerprints, "dropout_masks": masks, "optimizer": optimizer_of(args), "sharding": sharding}
    run = new_run(args, counts, state, accelerator.mixed_precision, fingerprints, weights)
    register_weights(accelerator, run)
    checkpoint, own = choose_checkpoint(accelerator, run, args.resume_from_checkpoint)
    run.settings |= own
    if checkpoint:
        with raised_together(accelerator):  # before they read together, which none of them could do alone
            take_settings(run, checkpoint, free, fixed)
        check_agreement(accelerator, {"global_step": run.progress["global_step"]})
        with told_in_a_line(args, accelerator, "The resume"):
            read_checkpoint(accelerator, run, checkpoint)
    return run


def choose_checkpoint(accelerator, run, wanted):
    """The checkpoint that the first process goes on from, or None, as each process finds it; and of the first one the
    settings that are a machine's own, which are those in the checkpoint. Raises `InputError` in all of them."""
    name, problems = None, []
    if accelerator.is_main_process:
        with gathered(problems):
            name = name_of_choice(run.output_dir, wanted)
    accelerator.wait_for_everyone()
    own = {flag: run.settings[flag] for flag in OWN_TO_A_MACHINE & run.settings.keys()}
    name, problems, own = broadcast_object_list([name, problems, own])
    raise_problems(problems)
    checkpoint = name and find_checkpoint(run.output_dir, name)
    if checkpoint:
        is_seen = (checkpoint / "progress.json").is_file()
        check_agreement(accelerator, {checkpoint.name: "seen" if is_seen else "not seen"})
    return checkpoint, own


@contextlib.contextmanager
def raised_together(accelerator):
    """Raises an `InputError` of one process in all of them, which must not exchange anything in between: who fails
    would exchange its problems meanwhile."""
    problems = []
    with gathered(problems):
        yield
    for found in gather_object([problems]):
        raise_problems(found)


def has_dropout(models):
    """Whether layers of models in training, by name, drop a part of their inputs."""
    modules = [module for model in models.values() for module in model.modules()]
    shares = [module.p for module in modules if isinstance(module, torch.nn.Dropout)]
    others = [vars(module).get("dropout") for module in modules]  # of transformers' attention
    shares += [share for share in others if isinstance(share, float)]
    return any(share > 0 for share in shares)


def split_of_step(args, accelerator):
    """How a step is split: masks of dropout are drawn by pass and process, so that another split draws others."""
    passes = f"{args.train_batch_size} a pass x {args.gradient_accumulation_steps} passes"
    return f"{passes} x {accelerator.num_processes} processes"


def tell_plan(args, accelerator, run, num_held_out, about):
    """Prints what will be done. `about` says what the script knows: which models are `trained`, which are `frozen`,
    `result_bytes`, `buckets` (lines on the sizes of images), and of the `cache` a text, or None, and warnings."""
    parameters, (about_cache, cache_warnings) = run.weights.parameters, about["cache"]
    num_trained = sum(numel_of(parameter) for parameter in parameters)
    rates = run.state["lr_scheduler"].base_lrs  # the UNet's first
    warnings = warn_of_precision(accelerator) + warn_of_rate(args, run.settings["peak_learning_rate"])
    about = {
        **about,
        "device": describe_device(accelerator.device),
        "devices": counted(accelerator.num_processes, "rank"),
        "weights": str(parameters[0].dtype).removeprefix("torch."),
        "optimizer": OPTIMIZERS[optimizer_of(args)],
        "other_rate": f", text encoder at {rates[-1]:g}" if rates[-1] != rates[0] else "",
        "cache": about_cache,
        "warnings": warnings + warn_of_short_steps(run.counts) + cache_warnings,
    }
    print_plan(args, run, num_held_out, num_trained, about)


def start_output(args, accelerator, run, parser):
    """Makes the output folder; `parser` knows the defaults of the flags."""
    if accelerator.is_main_process:
        prepare_output(run, args.overwrite_output_dir, changed_flags(parser, args))
    accelerator.wait_for_everyone()


def batches_of(args, accelerator, run):
    """This process's lists of (epoch, index, weight), from the run's next step on."""
    first_step = first_step_of(args, run)
    return micro_batches(run.counts, accelerator.num_processes, accelerator.process_index, args.seed, first_step)


def first_step_of(args, run):
    """The run's next step; in a dry run with buckets the largest of the next ones, which decides what fits."""
    first_step = run.progress["global_step"]
    if args.dry_run and run.counts.buckets is not None:
        return find_largest_step(run.counts, args.seed, first_step)
    return first_step


def choose_num_workers(wanted):
    """How many processes load images for this one: as many as are wanted, or for None one per core of its share of the
    machine, but for one that trains, and at most 4. On two cores they would only be in each other's way."""
    if wanted is not None:
        return wanted
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_cores = allowed // get_int_from_env(["LOCAL_WORLD_SIZE"], 1)
    return min(4, num_cores - 1) if num_cores > 2 else 0


def make_loader(args, accelerator, samples, batches):
    """Loads the samples of `batches`, lists of what `samples` takes; or the batches of a stream, for None."""
    return torch.utils.data.DataLoader(
        samples,
        **({"batch_size": None} if batches is None else {"batch_sampler": batches}),
        num_workers=choose_num_workers(args.dataloader_num_workers),
        pin_memory=accelerator.device.type != "cpu",
        worker_init_fn=ignore_signals,
    )


def train_steps(args, accelerator, run, stop, work, look):
    """Trains to the last step. `look(is_asked)` is called before training and every --validation_steps; it returns the
    mean held-out loss or None, or raises `LookGivenUp` when `is_asked()`.

    Ends the process with status 128 + signal when `stop` asks for it, 1 after too many losses that are not finite.
    """
    counts, lr_scheduler = run.counts, run.state["lr_scheduler"]
    first_step, validation_steps = run.progress["global_step"], steps_between_looks(args, counts)
    # A run that was stopped had not yet looked at the step that it goes on from.
    if first_step % validation_steps == 0 or first_step == counts.last_step:
        look_and_keep(args, accelerator, run, stop, look)
    steps = passes_by_step(args, run, work.loader)
    bar, recent = start_bar(run, accelerator.is_local_main_process)
    for step in bar:
        started = time.perf_counter()
        num_samples, passes = next(steps)
        requests = is_asked(stop), take_save_requests(stop)
        loss, grad_norm, is_broken, (stop_now, save_now) = take_step(args, accelerator, run, work, passes, requests)
        seconds = time.perf_counter() - started
        done = run.progress["global_step"]
        if args.compile and step == first_step:
            tqdm.write(f"Compiled: the first step took {seconds:.1f} s.")
        if step == first_step + 2 and accelerator.is_main_process and not is_broken:
            left = counts.last_step - done
            with tqdm.external_write_mode():  # above the bar
                tell_cost(counts, accelerator.device, num_samples, seconds, left, datetime.datetime.now())

        # Log
        if not is_broken:
            images_per_second = num_samples / seconds
            recent.append((loss, num_samples, None if step == first_step else seconds))
            tell_step(args, bar, run, accelerator.device, recent)
            if done % args.logging_steps == 0 or done == counts.last_step:
                norm = None if grad_norm is None else grad_norm.item()
                log_losses(accelerator, run, lr_scheduler.get_last_lr()[0], norm, images_per_second)

        # Save and look
        is_due = is_broken or stop_now or save_now or done % args.checkpointing_steps == 0 or done == counts.last_step
        if is_due and run.is_whole:
            # After a broken step none is removed: the last good one may be an older one.
            save_together(accelerator, run, None if is_broken else args.checkpoints_total_limit)
        if stop_now or is_broken:
            leave(accelerator, run, is_broken, stop.received)
        if done % validation_steps == 0 or done == counts.last_step:
            look_and_keep(args, accelerator, run, stop, look)
    tell_skipped(run)


def try_steps(args, accelerator, run, work):
    """Takes two steps of the run, whose effect nobody keeps, and prints what the second one costs. Nothing is written.
    Ends the process with status 1 if that fails."""
    num_steps, seconds = run.counts.last_step - run.progress["global_step"], None
    with told_in_a_line(args, accelerator, "The trial"):
        steps = passes_by_step(args, run, work.loader)
        for step_samples, passes in itertools.islice(steps, 2):
            started = time.perf_counter()
            _, _, is_broken, _ = take_step(args, accelerator, run, work, passes, [])
            if is_broken:
                raise InputError("a loss or gradient that is not finite; use a lower --learning_rate or bf16")
            if accelerator.device.type != "cpu":
                torch.accelerator.synchronize()
            num_samples, seconds = step_samples, time.perf_counter() - started
    if seconds and accelerator.is_main_process:
        tell_cost(run.counts, accelerator.device, num_samples, seconds, num_steps, datetime.datetime.now())
        if (args.cache_latents or args.cache_text_embeddings) and not work.loader.dataset.cache:
            print("  cache      not used by these two steps; a run takes less time and memory")


def passes_by_step(args, run, loader):
    """Yields of each step that is left how many samples it has, and its passes: pairs of a batch, which is loaded when
    it is asked for, and of whether it is the last one."""
    batches = iter(loader)
    for num_samples, num_passes in step_sizes(run.counts, args.seed, first_step_of(args, run)):
        is_last = [False] * (num_passes - 1) + [True]
        yield num_samples, zip(itertools.islice(batches, num_passes), is_last, strict=True)


def take_step(args, accelerator, run, work, passes, requests):
    """Takes one optimizer step. Returns its loss; the norm of its gradient, or None if one of the two is not
    finite; whether it was broken: one such step too many in a row, of which nothing is noted; and which of `requests`
    there are in some process."""
    optimizer, lr_scheduler, step = run.state["optimizer"], run.state["lr_scheduler"], run.progress["global_step"]
    # Dropout layers alone use torch's own generator.
    torch.manual_seed(random_numbers(args.seed, DROPOUT, step, accelerator.process_index).integers(2**32))
    make_gradients = step_by_engine if uses_deepspeed() else work.make_gradients
    weights = []
    step_loss, grad_norm = make_gradients(args, accelerator, run, work, with_weights_noted(passes, weights))

    # Optimizer step, unless a loss or a gradient is not finite in some process.
    weight = sum(weights)
    loss, weight, num_not_finite, *requests = exchange(accelerator, step_loss, weight, grad_norm, requests)
    if weight == 0:  # nothing of a stream could be used
        pass_over(accelerator, run, step)
        return math.nan, None, False, requests
    is_finite = num_not_finite == 0
    is_broken = not is_finite and run.progress["nan_steps"] >= max_nan_steps(args, accelerator)
    if not is_broken:
        run.is_whole = False
        if is_finite or accelerator.scaler is not None:  # which skips the step, and scales losses less from now on
            optimizer.step()  # DeepSpeed's engine has done it
        optimizer.zero_grad()
        if is_finite:
            lr_scheduler.step()
            update_average(args, run, held_here(run.weights.parameters))
        loss = mean_of_usable(loss, weight)
        note_step(run, step, loss, is_finite)
        run.is_whole = True
    return loss, grad_norm if is_finite else None, is_broken, requests


def with_weights_noted(passes, weights):
    """Yields the passes of a step, and adds the weight of each to `weights`, while the batch is still on the host."""
    for batch, is_last in passes:
        weights.append(batch["weight"].sum().item())
        yield batch, is_last


def pass_over(accelerator, run, step):
    """Notes that a step is done of which no sample had weight: it leaves weights, moments and average alone."""
    run.is_whole = False
    if accelerator.scaler is not None:  # it wants to be told that the gradients, which it unscaled, are done with
        accelerator.scaler.update()
    run.state["optimizer"].zero_grad()
    note_passed_over(run, step)
    run.is_whole = True


def add_up_gradients(args, accelerator, run, work, passes):
    """Forward and backward: the passes of a step add up their gradients, which processes share in the last one.
    Returns the step's loss in this process, and the norm of its gradient, which is clipped then."""
    step_loss = torch.zeros((), device=accelerator.device)
    for batch, is_last in passes:
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        with without_sync(accelerator, [] if is_last else run.weights.prepared.values()):
            loss = (work.training_loss(batch) * batch["weight"]).sum()
            accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
        step_loss += loss.detach()
    grad_norm = accelerator.clip_grad_norm_(run.weights.parameters, args.max_grad_norm)
    return step_loss, whole_tensor(grad_norm)


def look_and_keep(args, accelerator, run, stop, look):
    """Looks at the run, and keeps its checkpoint if it is the best one so far and that is asked for. Ends the process
    after a checkpoint, with status 128 + signal, if `stop` asks for it meanwhile: who resumes looks again."""
    try:
        held_out_loss = look(functools.partial(is_asked, stop))
    except LookGivenUp:
        save_together(accelerator, run, args.checkpoints_total_limit)
        leave(accelerator, run, False, stop.received)
    if args.keep_best and held_out_loss is not None:
        keep_best_together(accelerator, run, held_out_loss, args.checkpoints_total_limit)


def max_nan_steps(args, accelerator):
    """How many steps in a row may be skipped: a scaler of fp16 begins too high, and finds its scale by such steps."""
    if args.max_nan_steps is not None:
        return args.max_nan_steps
    return 5 if accelerator.mixed_precision == "fp16" else 0


@contextlib.contextmanager
def without_sync(accelerator, models):
    """Leaves the gradients of `models` in each process, to be shared later."""
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(accelerator.no_sync(model))
        yield


def exchange(accelerator, loss, weight, grad_norm, requests):
    """The step's one exchange between processes: the sums of their losses and of the weights of their samples, and in
    how many of them loss or gradient is not finite, and there is each of `requests`."""
    not_finite = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
    weight, *requests = [torch.full_like(loss, number) for number in (weight, *requests)]
    numbers = torch.stack([loss, weight, not_finite.float(), *requests])
    return accelerator.reduce(numbers, reduction="sum").tolist()


def update_average(args, run, parameters):
    """Moves the average of the weights, if there is one, towards the parameters."""
    ema = run.state.get("ema")
    if ema:
        step_average(ema, parameters, args.foreach_ema, args.offload_ema)


# ------------------------------------------------------------------------------------------------------------- batches
def count_steps(args, num_images, num_processes, sizes=None):
    """Counts the samples of a step and the steps of a run. With `sizes` (num_images, 2) images of one size are a
    bucket, whose last step in an epoch may be short."""
    samples_per_pass = args.train_batch_size * num_processes
    samples_per_step = samples_per_pass * args.gradient_accumulation_steps
    buckets = None if sizes is None else number_buckets(sizes)
    in_buckets = [num_images] if buckets is None else np.bincount(buckets).tolist()
    steps_per_epoch = sum(math.ceil(number / samples_per_step) for number in in_buckets)
    last_step = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    pixels = None if sizes is None else np.prod(sizes, axis=1)
    return StepCounts(num_images, samples_per_pass, samples_per_step, steps_per_epoch, last_step, buckets, pixels)


def mean_samples_per_step(counts):
    """How many samples a step has in the mean."""
    if counts.num_images is None:
        return counts.samples_per_step
    return counts.num_images / counts.steps_per_epoch


def max_samples_per_step(counts):
    """How many samples a step has at most: of fewer images than it could take, all of them or of a bucket."""
    if counts.num_images is None:
        return counts.samples_per_step
    largest = counts.num_images if counts.buckets is None else int(np.bincount(counts.buckets).max())
    return min(counts.samples_per_step, largest)


def number_buckets(sizes):
    """The number of each image's bucket (num_images,), by the order of their `sizes` (num_images, 2); None if all are
    in the same."""
    shapes, numbers = np.unique(sizes, axis=0, return_inverse=True)
    return numbers.reshape(-1) if len(shapes) > 1 else None


def steps_of_epoch(counts, seed, epoch):
    """The indices of each step's images: a permutation by (seed, epoch), of each bucket cut into steps, the last of
    which may be short; the steps of several buckets are mixed."""
    draw = random_numbers(seed, ORDER, epoch)
    order = draw.permutation(counts.num_images)
    in_buckets = [order]
    if counts.buckets is not None:
        ends = np.cumsum(np.bincount(counts.buckets))
        in_buckets = np.split(order[np.argsort(counts.buckets[order], kind="stable")], ends[:-1])
    steps = []
    for indices in in_buckets:
        for start in range(0, len(indices), counts.samples_per_step):
            steps.append(indices[start : start + counts.samples_per_step])
    if counts.buckets is not None:
        steps = [steps[number] for number in draw.permutation(len(steps))]
    return steps


def steps_from(counts, seed, first_step):
    """Yields the epoch of each step from `first_step` on, and the list of its images' indices. They depend on the
    seed, the epoch and the samples of a step alone, not on how passes and processes share a step."""
    for step in range(first_step, counts.last_step):
        epoch, step_in_epoch = divmod(step, counts.steps_per_epoch)
        if step == first_step or step_in_epoch == 0:
            steps = steps_of_epoch(counts, seed, epoch)
        yield epoch, steps[step_in_epoch].tolist()


def step_sizes(counts, seed, first_step):
    """Yields of each step from `first_step` on how many samples and how many forward passes it has."""
    if counts.num_images is None:
        of_each = (counts.samples_per_step, counts.samples_per_step // counts.samples_per_pass)
        yield from itertools.repeat(of_each, counts.last_step - first_step)
        return
    for _, samples in steps_from(counts, seed, first_step):
        yield len(samples), math.ceil(len(samples) / counts.samples_per_pass)


def find_largest_step(counts, seed, first_step):
    """The step with the most pixels, the first of them, of as many as an epoch has from `first_step` on."""
    last_step = min(first_step + counts.steps_per_epoch, counts.last_step)
    steps = steps_from(dataclasses.replace(counts, last_step=last_step), seed, first_step)
    sizes = [int(counts.pixels[samples].sum()) for _, samples in steps]
    return first_step + max(range(len(sizes)), key=sizes.__getitem__, default=0)


def micro_batches(counts, num_processes, process_index, seed, first_step):
    """Yields this process's lists of (epoch, index, weight), one per pass of the steps from `first_step` on. The
    weights of a step sum to 1 over all processes and passes; a process without a sample in a pass gets one of weight
    0, of the same bucket."""
    per_pass = counts.samples_per_pass
    batch_size = per_pass // num_processes
    for epoch, samples in steps_from(counts, seed, first_step):
        for start in range(0, len(samples), per_pass):
            mine = samples[start + process_index * batch_size :][:batch_size]
            yield [(epoch, index, 1 / len(samples)) for index in mine] or [(epoch, samples[0], 0.0)]


def batches_of_one_size(items, sizes, batch_size):
    """Cuts a list of items into batches of one size each; `sizes` (num_items, 2) are those of their images."""
    by_size = {}
    for item, size in zip(items, sizes.tolist(), strict=True):
        by_size.setdefault(tuple(size), []).append(item)
    batches = []
    for group in by_size.values():
        batches += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    return batches


# ---------------------------------------------------------------------------------------------------------- randomness
def random_numbers(seed, stream, *place):
    """A generator of the numbers of a stream at a place, such as an epoch and an index: the same in every process,
    worker and run."""
    return np.random.default_rng((seed, stream, *place))


# ------------------------------------------------------------------------------------------------------------- dataset
def check_data(args, folder_flag):
    """Lists what is wrong with where the images are; `folder_flag` names the flag for a folder."""
    problems, folder = [], getattr(args, folder_flag)
    source = folder or args.dataset_name
    if not source:
        problems.append(f"--{folder_flag} is missing: give a folder of images, or a dataset by --dataset_name")
    if args.dataset_name and folder:
        problems.append(f"--{folder_flag}={folder}: give this or --dataset_name, not both")
    if args.image_column != "image" and not args.dataset_name:
        problems.append(
            f"--image_column={args.image_column}: does nothing without --dataset_name; add that or drop this"
        )
    if folder and not os.path.isdir(folder):
        remedy = remedy_for_missing(folder) or "name one"
        problems.append(f"--{folder_flag}={folder}: does not exist, or is no folder{nearest_beside(folder)}; {remedy}")
    if source and Path(args.output_dir).resolve().is_relative_to(Path(source).resolve()):
        problems.append(
            f"--output_dir={args.output_dir}: lies in the folder of the images, or below its name; put it elsewhere"
        )
    return problems


def load_data(args, folder, default_caption=None, repeats=1, fit=None):
    """Reads, checks and splits the images in `folder`, or else those of --dataset_name; returns (training images,
    held-out images, fingerprint of both). The held-out ones are the same for every seed, and always seen alike.
    `default_caption` is that of images without. `fit` gives, for the sizes of pictures (rows, 2), those to which they
    are scaled and their centres cropped; by default these are squares. Raises `InputError`."""
    tokenizer = load_tokenizer(args)
    checked = load_rows(args, tokenizer, folder, default_caption, args.max_train_samples, fit)
    training, held_out = split_rows(len(checked.rows), args.num_validation_samples)
    training = np.repeat(training, repeats)
    sizes = fit(checked.sizes) if fit else np.full((len(checked.rows), 2), args.resolution)
    latent_channels, pixels_per_latent = read_latent_layout(args)
    images = CaptionedImages(
        rows=checked.rows.select(training),
        contents=checked.contents[training],
        sizes=sizes[training],
        tokenizer=tokenizer,
        latent_channels=latent_channels,
        pixels_per_latent=pixels_per_latent,
        num_timesteps=read_num_timesteps(args),
        seed=args.seed,
        center_crop=args.center_crop or fit is not None,
        random_flip=args.random_flip,
        image_interpolation_mode=args.image_interpolation_mode,
        caption_dropout=args.caption_dropout,
        noise_offset=noise_offset_of(args),
        input_perturbation=args.input_perturbation,
        picture_sizes=checked.sizes[training],
    )
    fingerprint = fingerprint_of(args.num_validation_samples, checked.digests)
    others = dataclasses.replace(
        images,
        rows=checked.rows.select(held_out),
        contents=checked.contents[held_out],
        sizes=sizes[held_out],
        picture_sizes=checked.sizes[held_out],
    )
    return images, seen_alike(others), fingerprint


def seen_alike(images):
    """The images, with nothing about them that changes from epoch to epoch or with the seed."""
    return dataclasses.replace(
        images,
        seed=0,
        center_crop=True,
        random_flip=False,
        caption_dropout=0,
        noise_offset=0,
        input_perturbation=0,
    )


def unopened(images):
    """The images, whose files are not read any more; what a sample draws stays as it is."""
    return dataclasses.replace(images, rows=images.rows.select_columns("captions"), reads_pixels=False)


def load_rows(args, tokenizer, folder, default_caption, max_samples=None, fit=None):
    """Reads and checks the images in `folder`, or else those of --dataset_name, or so many of them; returns the good
    ones. `fit` as in `load_data`. Raises `InputError`."""
    rows = choose_rows(read_rows(args, folder, default_caption), max_samples, args.seed)
    memory = path_of_findings(folder or args.dataset_name, args.cache_dir)
    return check_rows(rows, memory, args.skip_bad_images, tokenizer, args.resolution, fit)


def fingerprint_of(num_held_out, digests):
    """A digest of all images and captions, and of how they are split."""
    return hashlib.sha256(" ".join([f"{num_held_out}", *digests]).encode()).hexdigest()


def read_rows(args, folder, default_caption):
    """Reads a folder, or else --dataset_name, as columns `image` (undecoded) and `captions` (a list that is empty
    where there is none). Raises `InputError`."""
    if folder:
        rows = read_folder(folder, args.caption_column, follows_links=args.follow_symlinks)
    else:
        rows = read_dataset(args, args.dataset_name, default_caption)
    captions = []
    for index, found in enumerate(rows["captions"]):
        try:
            captions.append(all_captions(found) or all_captions(default_caption))
        except ValueError as error:
            raise InputError(f"{folder or args.dataset_name}: row {index}: {error}") from None
    return rows.remove_columns("captions").add_column("captions", captions)


def choose_rows(rows, max_samples, seed):
    """At most so many of the rows, drawn by the seed, in their order; all of them for None."""
    order = random_numbers(seed, SUBSET).permutation(len(rows))
    return rows.select(np.sort(order[:max_samples]))


def split_rows(num_rows, num_held_out):
    """The indices of the rows to train on and of those held out, which no seed changes. Raises `InputError`."""
    if num_held_out >= num_rows:
        raise InputError(
            f"--num_validation_samples={num_held_out}: must leave some of {counted(num_rows, 'image')}; use fewer"
        )
    order = np.random.default_rng(HELD_OUT).permutation(num_rows)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def read_folder(folder, caption_column, takes_train=False, follows_links=False):
    """Reads a folder into rows of `image` and `captions`, from metadata.jsonl or .csv or a .txt beside the image. What
    is missing gives a row too, so that the check names it. Where a .txt cannot be read as text there is a column
    `problem` too, which says so. With `takes_train` a folder of that name in it is read alone. Raises `InputError` for
    metadata that cannot be read as text, and unless it `follows_links` for links that lead out of the folder."""
    folder = Path(os.path.abspath(folder))
    files = list_files(folder)
    captions = {path: [] for path in files if is_image_file(path, folder)}
    metadata = [path for path in files if path.name in METADATA_NAMES]
    if not captions:
        tables = [path.name for path in files if path.suffix.lower() in (".parquet", ".arrow", ".tar")]
        more = f", or its {in_one_line(tables[0])} by --dataset_name={folder}" if tables else ""
        raise InputError(tell_no_images(folder, files) + more)
    texts = texts_by_name(files)
    used = {*captions, *metadata, *[text_beside(image, texts) for image in captions]}
    check_links([path for path in files if path in used], folder, follows_links)
    columns = set()
    for path in metadata:
        for row in read_metadata(path, caption_column, folder, follows_links):
            captions.setdefault(row["file"], []).extend(row["captions"])
            columns |= row["columns"]
    if metadata and caption_column not in columns:
        raise InputError(f"{metadata[0]}: has no {caption_column!r} but {sorted(columns)}; set --caption_column")
    without = [image for image, found in captions.items() if not found]
    beside = {image: text_beside(image, texts) for image in captions}  # of images that metadata names, too
    check_links([beside[image] for image in without if beside[image] not in used], folder, follows_links)
    problems = {}
    for image in without:
        found, problems[image] = read_caption(beside[image])
        captions[image] += found
    tell_left_aside(folder, files, {*captions, *metadata, *beside.values()})
    captions = {image: captions[image] for image in of_split(captions, folder, takes_train)}
    names = [str(path) for path in captions]
    if odd := [name for name in names if not is_utf8(name)]:
        raise InputError(f"{odd[0]!a}: its name is not UTF-8; rename it, or if it is, set PYTHONUTF8=1")
    rows = [{"image": str(path), "captions": found} for path, found in sorted(captions.items())]
    if any(problems.values()):
        rows = [{**row, "problem": problems.get(Path(row["image"]))} for row in rows]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))


def tell_left_aside(folder, files, known):
    """Prints which of the files in a folder, but for hidden ones, are not among those that are `known`, and so not
    used."""
    aside = [path for path in files if path not in known and not is_hidden(path, folder)]
    if foreign := foreign_pictures(aside, folder):
        print(f"Left aside in {folder}: {tell_foreign_pictures(foreign)}.")
    if texts := [path for path in aside if path.suffix.lower() == ".txt"]:
        meant = [path for path in texts if path.with_suffix("") in known]  # such as a.png.txt
        some = in_one_line((meant or texts)[0].name)
        remedy = f"; call it {in_one_line(Path(meant[0].stem).with_suffix('.txt'))}" if meant else ""
        print(f"Left aside in {folder}: {len(texts):,} .txt without a picture of that name, such as {some}{remedy}.")
    told = {*foreign, *texts}
    if others := [path.name for path in aside if path not in told]:
        some = in_one_line(", ".join(others[:5]))
        print(f"Left aside in {folder}: {counted(len(others), 'file')} of other kinds, such as {some}.")


def tell_no_images(folder, files):
    """Why a folder with these files cannot be trained on, which holds no images."""
    if foreign := foreign_pictures(files, folder):
        return f"the folder {folder} holds no images but {tell_foreign_pictures(foreign)}"
    return f"the folder {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); name another"


def foreign_pictures(files, folder):
    """Of some files in a folder the pictures of a kind that is not read, but for hidden ones."""
    return [path for path in files if path.suffix.lower() in FOREIGN_SUFFIXES and not is_hidden(path, folder)]


def tell_foreign_pictures(pictures):
    """What is to be done with pictures of a kind that is not read."""
    kinds = ", ".join(sorted({path.suffix.lower()[1:].upper() for path in pictures}))
    name = in_one_line(pictures[0].name)
    return f"{len(pictures):,} of a kind that is not read ({kinds}), such as {name}; convert to JPEG or PNG first"


def check_links(files, folder, follows_links):
    """Warns of files that are links out of the folder, if it `follows_links`: their owner may have made them on
    purpose. Raises `InputError` otherwise: somebody else's dataset could have private files trained on by them."""
    places, parents = places_of(folder), {}
    links = [str(path) for path in files if path.is_symlink() and not is_inside(path, places, parents)]
    if follows_links:
        warn(
            "picture, caption or data file is a link that leads out of the folder, and is used",
            "pictures, captions or data files are links that lead out of the folder, and are used",
            links,
        )
    elif links:
        some = "\n  ".join(["", *map(in_one_line, links[:5])])
        number = counted(len(links), "file in it is a link that leads", "files in it are links that lead")
        raise InputError(
            f"{folder}: {number} out of it, such as{some}\n"
            "Copy what they lead to, or add --follow_symlinks if you trust whoever made them."
        )


def check_data_files(data_files, folder, follows_links):
    """Raises `InputError` if data files in a folder lead out of it, but for those that are followed, or are no files:
    for a pipe a reader would wait."""
    check_links(data_files, folder, follows_links)
    if odd := [path for path in data_files if not path.is_file()]:
        raise InputError(f"{in_one_line(odd[0])}: is no regular file; remove it")


def places_of(folder):
    """The folders, links resolved, in which the files of a dataset's folder may lie: itself, and in the Hub's cache,
    where a snapshot is all links, the common place of the contents of that dataset."""
    real = Path(os.path.realpath(folder))
    places = [str(real)]
    for place in (real, *real.parents):
        blobs = place.parent.parent / "blobs"
        if place.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            places.append(str(blobs))
    return places


def is_inside(path, places, parents):
    """Whether a path lies in one of the `places`, links resolved; `parents` remembers those of folders."""
    folder, name = os.path.split(os.path.abspath(path))
    if folder not in parents:
        parents[folder] = os.path.realpath(folder)
    real = os.path.join(parents[folder], name)
    if os.path.islink(real):
        real = os.path.realpath(real)
    return any(Path(real).is_relative_to(place) for place in places)


def of_split(images, folder, takes_train):
    """Of the images below a folder those to train on: with `takes_train` those in folders named train, if there are
    any; else all, with a warning of folders whose names say that they are for something else."""
    splits = {image: split_of(image, folder) for image in images}
    aside = [image for image, split in splits.items() if split != "train"]
    if takes_train and aside and "train" in splits.values():
        number = counted(len(aside), "image that is", "images that are")
        print(f"Left aside in {folder}: {number} not in its train folder, as a dataset's.")
        return [image for image, split in splits.items() if split == "train"]
    held_out = [image for image, split in splits.items() if split in ("validation", "test")]
    if held_out and len(held_out) < len(splits):
        places = sorted({f"{os.path.relpath(image.parent, folder)}{os.sep}" for image in held_out})
        named = "named for validation or tests"
        warn(
            f"image is trained on although its folder is {named}",
            f"images are trained on although their folders are {named}",
            places,
            len(held_out),
        )
    return list(images)


def split_of(image, folder):
    """The split for which a folder between `folder` and an image is named, or None."""
    named = [SPLITS[part.lower()] for part in Path(os.path.relpath(image, folder)).parts if part.lower() in SPLITS]
    return named[0] if named else None


def list_files(folder):
    """The files in a folder and below it, sorted; hidden folders are left out, and linked ones listed, not entered.
    Raises `InputError`."""
    closed, files = [], []
    for place, below, names in os.walk(folder, onerror=closed.append):
        below[:] = [name for name in below if not name.startswith(".")]
        links = [name for name in below if os.path.islink(Path(place, name))]
        files += [Path(place, name) for name in [*names, *links]]
    if closed:
        raise InputError(f"{closed[0].filename}: cannot be searched ({closed[0].strerror}); grant access")
    return sorted(files)


def read_metadata(path, caption_column, folder, follows_links=False):
    """Yields of each row of a metadata.jsonl or .csv in `folder` the image's absolute path, its captions, the columns'
    names and the row itself, as `file`, `captions`, `columns` and `row`. Raises `InputError`, which names the row."""
    number, places, parents = 1, places_of(folder), {}
    if not path.is_file():  # but a broken link, or a pipe, for which a reader would wait
        raise InputError(f"{path}: is no regular file; remove it")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":  # lines end by a line feed alone: JSON may hold other line ends
            rows = map(json.loads, filter(str.strip, text.split("\n")))
        else:
            rows = csv.DictReader(io.StringIO(text), strict=True)
        for row in rows:
            if isinstance(row, dict) and "file_name" not in row:
                names = in_one_line(", ".join(map(str, row)))[:80]
                raise InputError(f"has no column file_name but {names}; name it so, and part columns by commas")
            file = locate(row["file_name"], path, folder, follows_links, places, parents)
            captions = all_captions(row.get(caption_column))
            if None in row:
                raise ValueError("too many cells: put captions with commas in quotes")
            yield {"file": file, "captions": captions, "columns": row.keys(), "row": row}
            number += 1
    except InputError as error:
        raise InputError(f"{path}: row {number}: {error}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, csv.Error) as error:
        told = f"row {number} is not a file_name and a caption in UTF-8 ({error!r}); mend it"
        raise InputError(f"{path}: {told}") from None


def locate(file_name, metadata, folder, follows_links, places, parents):
    """The absolute path of a file that a file of metadata names. Raises `InputError` for one that is not in one of the
    `places`: somebody else's dataset could have private pictures trained on, and shown to others."""
    file = Path(os.path.abspath(metadata.parent / file_name))
    is_foreign = os.name != "nt" and PureWindowsPath(file_name).is_absolute()
    is_below = file.is_relative_to(folder)
    if is_foreign or not (is_inside(file, places, parents) or (is_below and follows_links)):
        told = f"the file_name {file_name!r} leads out of {folder}"
        remedy = ", by a link; copy the image, or add --follow_symlinks" if is_below else "; copy the image into that"
        raise InputError(told + ("; copy the image into that" if is_foreign else remedy))
    if "\\" in file_name and not file.exists():
        slashes = file_name.replace("\\", "/")
        if (metadata.parent / slashes).exists():
            raise InputError(f"the file_name {file_name!r} names no file; write it with slashes, {slashes!r}")
    return file


def texts_by_name(files):
    """{path without its suffix: path} of the .txt among some files, of which .txt goes before .TXT."""
    return {path.with_suffix(""): path for path in sorted(files) if path.suffix.lower() == ".txt"}


def text_beside(image, texts):
    """The path of the .txt beside an image, one of `texts_by_name`, or that of one which is not there."""
    return texts.get(image.with_suffix(""), image.with_suffix(".txt"))


def read_caption(beside):
    """The caption in the .txt beside an image, as a list that is empty if there is none; and what is wrong with it, or
    None."""
    if not beside.is_file():
        return [], None
    if beside.stat().st_size > MAX_CAPTION_BYTES:
        return [], f"its caption, a .txt, has more than {MAX_CAPTION_BYTES:,} bytes; shorten or remove it"
    try:
        return [beside.read_text("utf-8-sig").strip()], None
    except UnicodeDecodeError:
        return [], "its caption, a .txt, is not UTF-8; convert it"  # as of tar shards
    except OSError as error:
        return [], f"its caption, a .txt, cannot be read ({error.strerror}); grant access"


def read_dataset(args, name, default_caption=None):
    """Loads the train split of a dataset, on the Hub or local, as columns `image` (undecoded) and `captions`; `args`
    name its columns and configuration. Raises `InputError`."""
    files, pictures, data_files = files_of(name)
    # A local folder of image files is not for `datasets`, which drops images without a caption in silence.
    if pictures and is_picture_folder(name, files, pictures, data_files):
        if (args.dataset_config_name, args.image_column) != (None, "image"):
            raise InputError(f"--dataset_name={name}: holds images; drop --dataset_config_name and --image_column")
        return read_folder(name, args.caption_column, takes_train=True, follows_links=args.follow_symlinks)
    saved = [path for path in files if path.name in SAVED_NAMES]
    seen = [path for path in files if not is_hidden(path, name)]
    others = [path for path in seen if path.suffix.lower() != ".txt" and path.name not in METADATA_NAMES]
    is_empty = os.path.isdir(name) and not others  # captions at most
    if (is_empty or foreign_pictures(files, name)) and not (pictures or data_files or saved):
        raise InputError(tell_no_images(name, files))
    check_data_files([*data_files, *saved], name, args.follow_symlinks)
    whole = without_empty(data_files, name)
    are_aside = bool(pictures) or len(whole) < len(data_files)
    try:
        saved = {path.parent for path in saved}
        dataset = load_train_split(args, name, saved, whole, are_aside, default_caption)
        dataset = with_whole_paths(choose_columns(args, dataset, default_caption), name)
    except Exception as error:  # arrow has one for every pair of types
        cause = error.__cause__ or error  # where `datasets` says no more than that it could not
        if isinstance(error.__cause__, InputError):
            raise InputError(f"--dataset_name={name}: {cause}") from None
        broken = error.__cause__ and find_broken(data_files)  # which reads all, and nothing was read without a cause
        told = f"{broken}: {last_line(cause)}; mend or remove it" if broken else last_line(cause)
        raise InputError(
            f"--dataset_name={name}: cannot be loaded; check it, --dataset_config_name, "
            f"--image_column={args.image_column} and --caption_column={args.caption_column} ({told})"
        ) from None
    check_places(dataset, name, args.cache_dir, args.follow_symlinks)
    return dataset


def choose_columns(args, dataset, default_caption):
    """The dataset with the columns that are named as `image` (undecoded) and `captions`; rows of tar shards also have
    a `problem`. Raises whatever `datasets` does for columns that are not there."""
    if dataset.column_names == [*ROW_FEATURES]:
        return dataset
    image_column, caption_column, field = columns_of(dataset.features, args.image_column, args.caption_column)
    if field:
        found = [row and row.get(field) for row in dataset[caption_column]]
        caption_column, dataset = field, dataset.select_columns([image_column]).add_column(field, found)
    if default_caption and caption_column == "text" and "text" not in dataset.column_names:
        dataset = dataset.add_column(caption_column, [default_caption] * len(dataset))
    dataset = dataset.select_columns([image_column, caption_column])
    dataset = dataset.rename_columns({image_column: "image", caption_column: "captions"})
    return with_label_names(dataset.cast_column("image", datasets.Image(decode=False)))


def files_of(name):
    """The files of a local dataset, a folder or a single file; which of them are pictures, and which are data files.
    Raises `InputError`."""
    if os.path.isfile(name):
        if Path(name).suffix.lower() not in DATA_KINDS:
            raise InputError(f"--dataset_name={name}: is no file that is read ({', '.join(DATA_KINDS)}); name another")
        return [Path(name)], [], [Path(name)]
    files = list_files(name) if os.path.isdir(name) else []
    pictures = [path for path in files if is_image_file(path, name)]
    data_files = [path for path in files if path.suffix.lower() in DATA_KINDS and path.name not in NO_DATA_NAMES]
    return files, pictures, data_files if not pictures else [path for path in data_files if kind_of(path) != SHARDS]


def columns_of(features, image_column, caption_column):
    """The columns of image and captions in a dataset with these features; and, where that column holds JSON, the field
    of it with the captions, or else None. Shards of WebDataset call their columns by the suffixes of files."""
    if "__key__" not in features:
        return image_column, caption_column, None
    if image_column == "image" and image_column not in features:
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        image_column = images[0] if images else image_column
    if caption_column in features:
        return image_column, caption_column, None
    if caption_column == "text" and "txt" in features:
        return image_column, "txt", None
    fields = features["json"] if isinstance(features.get("json"), dict) else ()
    usual = (caption_column, "caption") if caption_column == "text" else (caption_column,)
    for field in usual:
        if field in fields:
            return image_column, "json", field
    return image_column, caption_column, None


def is_picture_folder(name, files, pictures, data_files):
    """Whether a folder's pictures are what is to be trained on, not those that go with its data files. Raises
    `InputError` where nobody can tell."""
    texts = texts_by_name(files)
    has_captions = any(path.name in METADATA_NAMES for path in files)
    if not data_files or has_captions or any(path.with_suffix("") in texts for path in pictures):
        return True
    some, picture = [os.path.relpath(path, name) for path in (data_files[0], pictures[0])]
    if any(path.suffix.lower() in (".parquet", ".arrow") for path in data_files):
        print(
            f"Left aside in {name}: {counted(len(pictures), 'picture')}, such as {picture}; its data files are read."
        )
        return False
    num_files, num_pictures = counted(len(data_files), "data file"), counted(len(pictures), "picture")
    raise InputError(
        f"--dataset_name={name}: holds {num_files}, such as {some}, and {num_pictures}, "
        f"such as {picture}; move the ones away that are not meant"
    )


def load_train_split(args, name, saved, data_files, are_aside, default_caption):
    """The train split of a dataset as `datasets` loads it, or of tar shards with ROW_FEATURES; `saved` are the folders
    in it that `save_to_disk` wrote. Raises `InputError`, or whatever that raises."""
    config_name = args.dataset_config_name
    if saved and (config_name or Path(name) not in saved):
        raise InputError("was written by save_to_disk: name the folder that was, without a configuration")
    if saved:  # caches of later work lie in the same folders
        check_saved(saved)
        dataset = datasets.load_from_disk(name)
        if not isinstance(dataset, datasets.DatasetDict):
            return dataset
        if "train" not in dataset:
            raise InputError(f"has no train split; name the folder of one of its splits, {', '.join(dataset)}")
        return dataset["train"]
    told = describe_source(args, name, data_files, are_aside)
    builder = datasets.load_dataset_builder(**told)
    if builder.name == SHARDS:
        return load_tars(args, names_of_files(name, builder), needs_caption=not default_caption)
    return datasets.load_dataset(**told, split="train")


def names_of_files(name, builder):
    """The files of the train split of a dataset, local paths or addresses, and what they are called in it. Raises
    `InputError` if there is none."""
    paths = (builder.config.data_files or {}).get("train")
    if not paths:
        raise InputError("has no train split; name files that are for training")
    folder, names = name if os.path.isdir(name) else os.path.dirname(name), {}
    for path in paths:
        is_local = os.path.exists(path)
        names[path] = os.path.relpath(path, folder) if is_local else path.split("@", 1)[-1].split("/", 1)[-1]
    return names


def load_tars(args, names, needs_caption):
    """The samples of tar shards, local ones or on the Hub, which have `names`, stored as `datasets` stores what it
    reads. Raises what that makes of an `InputError`."""
    paths = list(names)
    check_columns(paths, args.image_column, args.caption_column, needs_caption, args.hub_token)
    if not os.path.exists(paths[0]):
        where = args.cache_dir and os.path.join(args.cache_dir, "downloads")
        told = datasets.DownloadConfig(cache_dir=where, token=args.hub_token)
        paths = datasets.DownloadManager(download_config=told).download(paths)
    read = {"image_column": args.image_column, "caption_column": args.caption_column}
    states = [os.stat(path) for path in paths]
    known = [ROW_FORMAT, read, *zip(paths, [(state.st_size, state.st_mtime_ns) for state in states], strict=True)]
    return datasets.Dataset.from_generator(
        read_tars,
        datasets.Features(ROW_FEATURES),
        args.cache_dir,
        gen_kwargs={"paths": paths, "names": list(names.values()), **read},
        fingerprint=hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32],
        writer_batch_size=100,  # of rows that wait in memory
    )


def describe_source(args, name, data_files, are_aside):
    """What `datasets` has to be told to load a dataset, on the Hub or of local `data_files`, beside which there may be
    others that `are_aside`. Raises `InputError`."""
    config_name, where = args.dataset_config_name, {"cache_dir": args.cache_dir}
    chosen = without_other_kinds([path for path in data_files if not path.name.startswith("cache-")])
    is_pattern = bool(data_files) and "[" in os.path.abspath(name)  # as `datasets` takes it
    num_configs = count_configs(name)
    if os.path.isfile(name) and config_name:
        raise InputError("is a file, which has no configurations; drop --dataset_config_name")
    are_chosen = is_pattern or len(chosen) < len(data_files) or os.path.isfile(name)
    if are_chosen or (are_aside and not num_configs):
        if config_name or num_configs > 1:
            told = "a bracket in the path, pictures, caches or empty shards hide its configurations"
            raise InputError(f"{told}; rename it, move them away or drop --dataset_config_name")
        # Whole lists: `datasets` would take what there is most of, and all that a pattern fits.
        kind = next(kind for kind in DATA_KINDS.values() if kind in [kind_of(path) for path in chosen])
        chosen = train_files([path for path in chosen if kind_of(path) == kind], name)
        lists = {"train": [glob.escape(os.path.abspath(path)) for path in chosen]}
        return {"path": kind, "data_files": lists, **where}
    check_sources(args, name, config_name)
    return {"path": name, "name": config_name, "token": args.hub_token, **where}


def without_other_kinds(data_files):
    """The data files, or of them the tar shards, if there are any, without the tables that tell of each. Raises
    `InputError` for other files that hold images."""
    shards = [path for path in data_files if kind_of(path) == SHARDS]
    tables = {path.with_suffix("") for path in shards}
    others = [path for path in data_files if path.suffix.lower() in (".parquet", ".arrow")]
    foreign = [path for path in others if path.with_suffix("") not in tables]
    if shards and foreign:
        names = f"{shards[0].name}, and {foreign[0].name}"
        raise InputError(f"holds tar shards, such as {names}; move the ones away that are not meant")
    return shards or data_files


def check_saved(folders):
    """Raises `InputError` if what `save_to_disk` wrote into folders names files that lie elsewhere."""
    for folder in folders:
        path = folder / "state.json"
        rows = read_json(path).get("_data_files", []) if path.is_file() else []
        for row in rows:
            if os.path.basename(row["filename"]) != row["filename"]:
                raise InputError(f"its state.json names the file {row['filename']!r}, which leads out of {folder}")


def check_sources(args, name, config_name):
    """Raises `InputError` if the card of a dataset names data that lies elsewhere, on this machine or on another."""
    builder = datasets.load_dataset_builder(name, config_name, token=args.hub_token, cache_dir=args.cache_dir)
    places, parents = places_of(name), {}
    for file in itertools.chain.from_iterable((builder.config.data_files or {}).values()):
        if not os.path.isdir(name):
            is_own = str(file).startswith(f"hf://datasets/{name}@")
        else:
            path = Path(os.path.abspath(str(file)))
            is_linked = args.follow_symlinks and path.is_relative_to(os.path.abspath(name))
            is_own = "://" not in str(file) and (is_linked or is_inside(path, places, parents))
        if not is_own:
            raise InputError(f"its card names the file {str(file)!r}, which leads out of it")


def kind_of(path):
    """What `datasets` calls the kind of a data file."""
    return DATA_KINDS[path.suffix.lower()]


def count_configs(name):
    """How many configurations, with files of their own, the card of a local dataset names."""
    card = Path(name, "README.md")
    if not card.is_file():
        return 0
    return len(DatasetCard.load(card, ignore_metadata_errors=True).data.get("configs") or [])


def train_files(data_files, folder):
    """Of data files those of the train split, by words in their names or their folders', or all if none has such."""
    splits = {}
    for path in data_files:
        words = re.split(r"[-._ 0-9/\\]+", os.path.relpath(path, folder).lower())
        splits[path] = next((SPLITS[word] for word in words if word in SPLITS), None)
    of_train = [path for path, split in splits.items() if split == "train"]
    return of_train or [path for path, split in splits.items() if split is None]


def with_label_names(dataset):
    """The dataset, with their names in the place of captions that are numbers of classes."""
    feature = dataset.features["captions"]
    label = getattr(feature, "feature", feature)  # of a list of them
    if not isinstance(label, datasets.ClassLabel):
        return dataset
    names = dict(enumerate(label.names))  # a class that is not known has the number -1
    captions = []
    for found in dataset["captions"]:
        captions.append([names.get(number) for number in found] if isinstance(found, list) else names.get(found))
    return dataset.remove_columns("captions").add_column("captions", captions)


def with_whole_paths(dataset, name):
    """The dataset, with paths of images that start from its folder, a local one, where they are relative: else they
    would be looked for where the script was started."""
    folder = os.path.abspath(name)

    def whole(image):
        is_file = image and image["bytes"] is None and image["path"] and not re.match(r"\w+://", image["path"])
        return {**image, "path": os.path.join(folder, image["path"])} if is_file else image

    paths = []
    for images in dataset.data.column("image").chunks:
        paths += images.field("path").filter(images.field("bytes").is_null()).to_pylist()
    if not os.path.isdir(name) or all(path is None or os.path.isabs(path) for path in paths):
        return dataset
    return dataset.map(lambda row: {"image": whole(row["image"])}, keep_in_memory=True, load_from_cache_file=False)


def check_places(dataset, name, cache_dir, follows_links=False):
    """Raises `InputError` for an image that the dataset does not hold, and that lies neither in its folder nor where
    `datasets` puts what it downloads, or that is an address."""
    places = [cache_dir or datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE]
    places = [*map(os.path.realpath, places), *(places_of(name) if os.path.isdir(name) else [])]
    folder, parents = os.path.abspath(name), {}
    start = 0
    for images in dataset.data.column("image").chunks:
        lacks_content = images.field("bytes").is_null().to_numpy(zero_copy_only=False)
        for index in np.flatnonzero(lacks_content).tolist():
            path = images.field("path")[index].as_py()
            row = f"--dataset_name={name}: row {start + index}: the image"
            if path and re.match(r"\w+://", path):
                raise InputError(f"{row} is an address ({path[:80]}); download the images first, into a folder")
            is_linked = follows_links and path and Path(os.path.abspath(path)).is_relative_to(folder)
            if path and not is_linked and not is_inside(path, places, parents):
                raise InputError(f"{row} {path!r} leads out of the dataset; copy it into a folder with metadata.jsonl")
        start += len(images)


def check_rows(rows, memory, skip_bad_images, tokenizer, resolution, fit=None, are_of_stream=False):
    """Checks every image and caption; returns the good rows. Raises one `InputError` for all others, unless
    `skip_bad_images`, and if none is good; warns of images that are enlarged, to a square or by `fit` of `load_data`,
    and of captions that are cut."""
    bad, cut, digests, contents, sizes = [], [], {}, [], []
    captions = list(rows["captions"])
    for index, (digest, width, height, problem) in enumerate(check_images(rows, memory)):
        if not problem and not captions[index]:
            problem = NO_CAPTION
        if problem:
            bad.append(f"{name_of(rows, index)}: {problem}")
            continue
        num_tokens = max(map(len, tokenizer(captions[index], verbose=False).input_ids))
        if num_tokens > tokenizer.model_max_length:
            cut.append(f"{max(captions[index], key=len)[:80]}...")
        digests[index] = hashlib.sha256(json.dumps([digest, captions[index]]).encode()).hexdigest()
        contents.append(digest)
        sizes.append((width, height))

    leave_out(bad, len(rows), skip_bad_images and bool(digests), are_of_stream=are_of_stream)
    good, sizes = list(digests), np.array(sizes, int).reshape(-1, 2)
    wanted = fit(sizes) if fit else resolution
    its, their = ("its bucket", "their bucket") if fit else 2 * (f"--resolution={resolution}",)
    small = []
    for number in np.flatnonzero((sizes < wanted).any(axis=1)).tolist():
        small.append("{}: {} x {}".format(name_of(rows, good[number]), *sizes[number]))
    warn(f"image is smaller than {its} and is enlarged", f"images are smaller than {their} and are enlarged", small)
    limit = f"more than {tokenizer.model_max_length} tokens"
    warn(f"caption has {limit} and is cut", f"captions have {limit} and are cut", cut)
    return CheckedRows(rows.select(good), list(digests.values()), np.array(contents), sizes)


def name_of(rows, index):
    """What a row's image is called: its path, or the row's number where a dataset holds the image itself."""
    return name_of_row(rows[index], index)


def name_of_row(row, index):
    """What a row is called: the path of its image, or its number where a dataset holds the image itself."""
    path = (row["image"] or {}).get("path")
    return in_one_line(path) if path else f"row {index}"


def warn(one, many, found, number=None):
    """Warns of what was found, by number, that of `found` if none is given, in the words for `one` or for `many`, and
    the first five."""
    if found:
        some = map(in_one_line, found[:5])  # names and captions of others
        print("\n  ".join([f"Warning: {counted(number or len(found), one, many)}, such as", *some]))


# --------------------------------------------------------------------------------------------------------- checkpoints
def new_run(args, counts, state, precision, fingerprints, weights=None):
    """A run at its start. `fingerprints` are digests, by name, of what the run is trained on."""
    settings = {
        **vars(args),
        **fingerprints,
        "hub_token": None,
        "mixed_precision": precision,
        "peak_learning_rate": peak_learning_rate(args, counts),
        "samples_per_step": counts.samples_per_step,
        "schedule_steps": None if args.lr_scheduler.startswith("constant") else counts.last_step,
        "state": [*state],
    }
    progress = {"global_step": 0, "base_losses": None, "losses": [], "nan_steps": 0, "skipped_steps": 0}
    return Run(Path(args.output_dir), settings, progress, state, counts, weights)


def list_checkpoints(output_dir):
    """The whole checkpoints of a run, oldest first; half-written ones have another name or no progress.json."""
    found = [path.parent for path in Path(output_dir).glob("checkpoint-*/progress.json")]
    numbered = {path: path.name.removeprefix("checkpoint-") for path in found}
    whole = [path for path, number in numbered.items() if number.isdigit()]
    return sorted(whole, key=lambda path: int(numbered[path]))


def find_checkpoint(output_dir, wanted, num_damaged=0):
    """The checkpoint that `wanted` means: a folder in `output_dir`, a path, or the "latest" of those before the
    `num_damaged` newest; None if there is none."""
    if wanted is None:
        return None
    if wanted == "latest":
        checkpoints = list_checkpoints(output_dir)
        checkpoints = checkpoints[: len(checkpoints) - num_damaged]
        return checkpoints[-1] if checkpoints else None
    inside = Path(output_dir, wanted)
    return inside if inside.is_dir() else Path(wanted)


def count_damaged(output_dir, wanted):
    """How many of the newest checkpoints `latest` has to pass over, which are named: their files are not those that
    were written. For one process alone, which reads them whole. Raises `InputError` if nothing else is left, and if a
    damaged one was asked for by name."""
    if wanted == "latest":
        checkpoints = list_checkpoints(output_dir)[::-1]
    else:
        checkpoints = [checkpoint for checkpoint in [find_checkpoint(output_dir, wanted)] if checkpoint]
    damages = {}
    for checkpoint in checkpoints:
        damage = find_damage(checkpoint)
        if damage is None:
            break
        damages[checkpoint] = f"{checkpoint.name} is damaged ({damage})"
    whole = checkpoints[len(damages) :]
    if damages and not whole:
        told = "\n  ".join(damages.values())
        remedy = "name another one, or start anew in another --output_dir"
        raise InputError(f"--resume_from_checkpoint={wanted}: {told}; {remedy}")
    for told in damages.values():
        print(f"{told}; {whole[0].name} is used instead.")
    return len(damages)


def name_of_choice(output_dir, wanted):
    """What every process finds the checkpoint by that `wanted` means, `latest` without damaged ones: its name in the
    output folder, which each machine may know by a path of its own, or its path; None without one. For one process
    alone. Raises `InputError` as `count_damaged`."""
    found = find_checkpoint(output_dir, wanted, count_damaged(output_dir, wanted))
    return found and (found.name if found.parent == output_dir else str(found))


def find_newer(output_dir, checkpoint):
    """The newest checkpoint of a run if it is newer than another one of it, and not damaged; None otherwise."""
    newer = list_checkpoints(output_dir)
    if checkpoint in newer:
        newer = newer[newer.index(checkpoint) + 1 :]
    return next((path for path in reversed(newer) if find_damage(path) is None), None)


def set_aside_damaged(output_dir, step):
    """Gives what is in the place of checkpoints after `step`, from which a run goes on, another name: it is damaged or
    half there, and the run will write its own."""
    for path in sorted(output_dir.glob("checkpoint-*")):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and int(number) > step:
            names = (f"{path.name}.damaged{suffix}" for suffix in ["", *range(2, 1000)])
            aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
            print(f"{path.name} is renamed to {path.rename(aside).name}.")


def checkpoint_of(run):
    """Where the checkpoint of the run's step is, or will be."""
    return run.output_dir / f"checkpoint-{run.progress['global_step']}"


def save_checkpoint(run, write_state, total_limit):
    """Writes checkpoint-N, in which `write_state(run, folder)` writes the run's weights and state. For one process
    alone. If it fails, nothing of it stays behind. Raises whatever a full disk or the like leads to."""
    partial = begin_checkpoint(run)
    if partial is None:
        return
    with removed_on_failure(partial):
        write_state(run, partial)
        finish_checkpoint(run, partial, total_limit)


def begin_checkpoint(run):
    """Makes the folder of the checkpoint of the run's step, beside its place; None if the checkpoint is there, because
    a step broke just after a save. For one process alone."""
    final = checkpoint_of(run)
    if (final / "progress.json").exists():
        return None
    # Two processes, maybe of two machines, may save after a failure: the first one wins.
    partial = final.with_name(f"{final.name}.{socket.gethostname()}-{os.getpid()}.partial")
    partial.mkdir()
    return partial


@contextlib.contextmanager
def removed_on_failure(partial):
    """Leaves nothing behind of a checkpoint that fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def finish_checkpoint(run, partial, total_limit):
    """Completes a checkpoint whose weights and state are written, and renames it; only then do older ones beyond
    `total_limit` go, but not the best one. For one process alone."""
    for name, content in (("args", run.settings), ("progress", run.progress)):
        (partial / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    copy_mode(run.output_dir / "args.json", partial.rglob("*.safetensors"))
    write_digests(partial)
    sync(partial)  # files before names, or a crash could leave a whole name with half a file
    partial.rename(checkpoint_of(run))
    sync_folder(run.output_dir)
    remove_surplus(run.output_dir, total_limit)


def remove_surplus(output_dir, total_limit):
    """Removes the oldest checkpoints beyond `total_limit`, all but the best one; None for no limit."""
    best = read_best(output_dir)
    surplus = list_checkpoints(output_dir)[:-total_limit] if total_limit else []
    for old in surplus:
        if best is None or old.name != f"checkpoint-{best['step']}":
            try:
                shutil.rmtree(old.rename(old.with_suffix(".partial")))  # which is what a kill would leave of it
            except OSError as error:  # somebody has a file of it open, maybe; the new one is safe
                print(f"Warning: {old} could not be removed ({last_line(error)}); remove what is left of it.")


def read_best(output_dir):
    """The `step` of a run's checkpoint with the lowest held-out loss, and that `held_out_loss`; None without one."""
    path = Path(output_dir, "best.json")
    return read_json(path) if path.is_file() else None


def is_best(run, held_out_loss):
    """Whether a held-out loss is the lowest so far."""
    best = read_best(run.output_dir)
    is_worse = best and best["step"] != run.progress["global_step"] and best["held_out_loss"] <= held_out_loss
    return math.isfinite(held_out_loss) and not is_worse


def note_best(run, held_out_loss, total_limit):
    """Notes that the checkpoint of the run's step is the best one, which makes another one surplus."""
    with beside(run.output_dir / "best.json") as path:
        best = {"step": run.progress["global_step"], "held_out_loss": held_out_loss}
        path.write_text(json.dumps(best) + "\n", encoding="utf-8")
    remove_surplus(run.output_dir, total_limit)


def note_step(run, step, loss, is_finite):
    """Notes that a step is done; one whose loss or gradient was not finite changed nothing."""
    progress = run.progress
    progress["global_step"] = step + 1
    progress["nan_steps"] = 0 if is_finite else progress["nan_steps"] + 1
    if math.isfinite(loss):
        progress["losses"].append(loss)
    if not is_finite:
        progress["skipped_steps"] = progress.get("skipped_steps", 0) + 1  # which older checkpoints do not have
        print(f"\nStep {step + 1}: loss or gradient is not finite; skipped, {progress['nan_steps']} in a row.")


def note_passed_over(run, step):
    """Notes that a step is done of a stream's images of which none could be used."""
    run.progress["global_step"] = step + 1
    print(f"\nStep {step + 1}: of its images none can be used; passed over.")


def mean_of_usable(loss, weight):
    """The mean loss of a step's images that could be used, whose weights add up to less than 1 where a stream left
    others out."""
    return loss / weight if weight < WHOLE_WEIGHT else loss


def tell_skipped(run):
    """Prints how many of the run's steps changed nothing, if there are such: a result may be less than it seems."""
    number = run.progress.get("skipped_steps", 0)
    if number:
        steps = f"{number:,} of {counted(run.progress['global_step'], 'step')} {'was' if number == 1 else 'were'}"
        print(f"\n{steps} skipped, since loss or gradient was not finite.")


def read_undamaged(checkpoint, read):
    """What `read(checkpoint)` gives. Raises `InputError` if that fails."""
    try:
        return read(checkpoint)
    except Exception as error:  # torch and safetensors have one for every way of being broken
        if is_lack_of_memory(error) or is_lost_peer(error):  # which is not the checkpoint's fault
            raise
        told = f"{checkpoint} is damaged, or of another script; name another ({last_line(error)})"
        raise InputError(f"--resume_from_checkpoint: {told}") from None


def read_settings(checkpoint):
    """The settings of the run that wrote a checkpoint, and its progress. Raises `InputError`."""
    return read_json(checkpoint / "args.json"), read_json(checkpoint / "progress.json")


def compare_settings(run, checkpoint, before, free, fixed):
    """Returns the names of settings that were others `before`, in the checkpoint. Those in `free` may differ. Others
    change the result: they raise `InputError`, or are told and take effect if --allow_changed_resume allows that, but
    not those in `fixed`, with which the state would not fit."""
    settings = run.settings
    changed = {}
    for name, value in settings.items():
        # A checkpoint from before a flag was there is one of a run without it.
        is_new = name not in before and value in (None, False, "adamw")
        if name not in free and not is_new and before.get(name) != value:
            changed[name] = tell_difference(name, before.get(name), value)
    if changed.keys() & {"learning_rate", "samples_per_step", "scale_lr"}:
        changed.pop("peak_learning_rate", None)  # which follows from these
    if is_digest(settings.get("captioned_images")) and "captioned_images" in changed:
        changed["captioned_images"] += tell_choice(before, settings)
    if "sharding" in changed:
        changed["sharding"] += f"; {REMEDY_FOR_SHARDING}"
    cannot_change = changed.keys() & fixed
    if "text_encoder_lr" in changed:
        changed.pop("text_encoder_apart", None)  # which follows from it
    told = f"{checkpoint} was made under other settings"
    if cannot_change or (changed and not settings["allow_changed_resume"]):
        remedy = "use those" if cannot_change else "use those, or add --allow_changed_resume"
        raise InputError("\n  ".join([f"--resume_from_checkpoint: {told}; {remedy}", *changed.values()]))
    if changed:
        lines = [f"{told}; from here on those of now hold (--allow_changed_resume)", *changed.values()]
        print(fitted("\n  ".join(lines)))
    return changed.keys()


def tell_choice(before, settings):
    """Says which flags choose other images than they did `before`, in brackets; "" where none does."""
    flags = [name for name in CHOOSE_IMAGES if settings.get(name) != before.get(name)]
    told = [f"--{tell_difference(name, before.get(name), settings.get(name))}" for name in flags]
    return f" ({'; '.join(told)})" if told else ""


def tell_difference(name, first, second, first_place="there", second_place="now"):
    """Says in a line that a setting has two values in two places: of a digest no more, since it says nothing to
    people; of a dictionary which of its keys differ."""
    what, keys = DIGESTED.get(name, "content"), ""
    if isinstance(first, dict) or isinstance(second, dict):
        one, other = [value if isinstance(value, dict) else {} for value in (first, second)]
        differing = sorted(in_one_line(key) for key in one | other if one.get(key) != other.get(key))
        more = f" and {len(differing) - MAX_NAMED} more" if len(differing) > MAX_NAMED else ""
        keys = ": " + ", ".join(differing[:MAX_NAMED]) + more
    if keys or is_digest(first) or is_digest(second):
        return f"{name}: other {what} {second_place} than {first_place}{keys}"
    return f"{name}: {first} {first_place}, {second} {second_place}"


def is_digest(value):
    """Whether a setting is the SHA-256 of something, in hexadecimal digits."""
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def take_progress(run, checkpoint, progress, changed):
    """Sets the run's progress to the checkpoint's. Raises `InputError` if that is beyond the last step."""
    if progress["global_step"] > run.counts.last_step:
        raise InputError(f"--max_train_steps: {checkpoint} is beyond the last step, {run.counts.last_step}; raise it")
    task = {"captioned_images", "image_interpolation_mode", "prediction_type", "rescale_betas_zero_snr", "resolution"}
    task |= {"aspect_ratio_buckets", "bucket_max", "bucket_min", "bucket_no_upscale", "bucket_step"}
    if changed & task:  # held-out losses are of other images, or of another objective
        progress["base_losses"] = None
    run.progress = progress


def take_settings(run, checkpoint, free, fixed):
    """Compares the run's settings with those of a checkpoint, and takes over its progress; `free` and `fixed` as in
    `compare_settings`. Raises `InputError`."""
    before, progress = read_undamaged(checkpoint, read_settings)
    changed = compare_settings(run, checkpoint, before, free, fixed)
    take_progress(run, checkpoint, progress, changed)


# -------------------------------------------------------------------------------------------------------------- states
@contextlib.contextmanager
def averaged(run):
    """Has the averaged weights, if there are any, in the models for a while."""
    ema, parameters = run.state.get("ema"), held_here(run.weights.parameters)
    if not ema:
        yield
        return
    ema.store(parameters)
    try:
        ema.copy_to(parameters)
        yield
    finally:
        ema.restore(parameters)
        forget_gathered(run.weights.models)


def use_average(run):
    """Puts the averaged weights, if there are any, into the models, in float32: those are the result, but no state to
    go on from."""
    run.is_whole = False
    for parameter in run.weights.parameters:
        if parameter.dtype != torch.float32:  # in bfloat16 they would lose what an average is for
            parameter.data = parameter.data.float()
    if "ema" in run.state:
        run.state["ema"].copy_to(held_here(run.weights.parameters))


@contextlib.contextmanager
def holding(parameters, values):
    """Has parameters hold other tensors for a while, wherever and in whatever precision these are: to write them, or
    to read into them."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


def save_together(accelerator, run, total_limit):
    """Writes the checkpoint of the run's step, by all processes together."""
    started = begin_checkpoint(run) if accelerator.is_main_process else None
    [name] = broadcast_object_list([started and started.name])
    if name is None:
        return
    partial = run.output_dir / name  # which each machine may know by a path of its own
    # One process removes it: another one may hear of a failure while the first one completes the checkpoint.
    with removed_on_failure(partial) if accelerator.is_main_process else contextlib.nullcontext():
        write_state(accelerator, run, partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish_checkpoint(run, partial, total_limit)
        accelerator.wait_for_everyone()


def keep_best_together(accelerator, run, held_out_loss, total_limit):
    """Keeps the checkpoint of the run's step, by all processes together, if its held-out loss is the lowest so far."""
    [is_kept] = broadcast_object_list([accelerator.is_main_process and is_best(run, held_out_loss)])
    if is_kept:
        save_together(accelerator, run, None)
        if accelerator.is_main_process:
            note_best(run, held_out_loss, total_limit)


def register_weights(accelerator, run):
    """Has accelerate's checkpoints hold the weights that are trained, as files that people can load, in the place of
    those of the models that it prepared, which would be the whole base."""
    accelerator.register_save_state_pre_hook(functools.partial(replace_saved_weights, accelerator, run))
    accelerator.register_load_state_pre_hook(functools.partial(replace_loaded_weights, run))


def replace_saved_weights(accelerator, run, _, weights, folder):
    """Writes a run's weights into the folder of a checkpoint, instead of what accelerate would write."""
    weights.clear()
    with held_whole(run.weights.parameters):
        if accelerator.is_main_process:
            write_weights(run, Path(folder))


def replace_loaded_weights(run, models, folder):
    """Reads a run's weights from the folder of a checkpoint, instead of what accelerate would read."""
    models.clear()
    if not is_partitioned(run.weights.parameters[0]):  # else DeepSpeed has read them
        read_weights(run, Path(folder))


def write_weights(run, folder):
    """Writes a run's weights, averaged ones too, into a folder."""
    weights = run.weights
    weights.write(weights.models, folder, "")
    if "ema" in run.state:
        with holding(weights.parameters, run.state["ema"].shadow_params):
            weights.write(weights.models, folder, AVERAGED)


def read_weights(run, folder):
    """Reads what `write_weights` wrote: weights into the models, the average into the run's."""
    weights = run.weights
    if "ema" in run.state:
        with holding(weights.parameters, run.state["ema"].shadow_params):
            weights.read(weights.models, folder, AVERAGED)
    weights.read(weights.models, folder, "")


def write_state(accelerator, run, folder):
    """Writes the run's weights and state into the folder of a checkpoint, by all processes together."""
    if accelerator.is_fsdp2:
        write_shards(run, folder / SHARDS_FOLDER)  # accelerate would pickle, and write frozen weights too
    elif uses_deepspeed():
        accelerator.save_state(folder, exclude_frozen_parameters=True)
    else:
        accelerator.save_state(folder)
    if accelerator.is_main_process:
        write_numbers(run, folder)


def write_state_alone(accelerator, run, folder):
    """Writes the run's weights and state into the folder of a checkpoint, by this process alone. Raises `InputError`
    if it does not have all of them."""
    if accelerator.is_fsdp2 or uses_deepspeed():
        raise InputError("no process has all of the state")
    accelerator.save_state(folder)  # by any process but the first one only what each process has of its own
    if not accelerator.is_main_process:
        write_weights(run, folder)
        torch.save(run.state["optimizer"].state_dict(), folder / OPTIMIZER_FILE)
    write_numbers(run, folder)


def write_numbers(run, folder):
    """Writes those parts of the state that are a few numbers."""
    parts = numbers_of(run)
    (folder / STATE_FILE).write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")


def numbers_of(run):
    """The parts of a run's state that are a few numbers, by name: of the schedule, and of the average."""
    parts = {name: run.state[name].state_dict() for name in ("lr_scheduler", "ema") if name in run.state}
    for part in parts.values():
        part.pop("shadow_params", None)
    return parts


def read_checkpoint(accelerator, run, checkpoint):
    """Reads weights and state of a checkpoint into the run, by all processes together. Raises `InputError`."""
    read_undamaged(checkpoint, functools.partial(read_state, accelerator, run))


def read_state(accelerator, run, folder):
    """Reads what `write_state` wrote. Rates and decays stay those asked for now, which are the checkpoint's unless
    they were changed."""
    optimizer, lr_scheduler = run.state["optimizer"], run.state["lr_scheduler"]
    asked = [dict(group) for group in optimizer.param_groups]
    numbers, numbers_now = read_json(folder / STATE_FILE), numbers_of(run)
    if accelerator.is_fsdp2:
        read_shards(run, folder / SHARDS_FOLDER)
    elif uses_deepspeed():
        accelerator.load_state(folder, load_module_strict=False)
    else:
        accelerator.load_state(folder, load_kwargs={"mmap": True})  # tensor by tensor, not all of them at once
        own_tensors(optimizer)
    for group, group_asked in zip(optimizer.param_groups, asked, strict=True):
        kept = group_asked.keys() - {"params", *PRODIGY_PROGRESS}
        group.update({name: group_asked[name] for name in kept})
    for name, part in numbers.items():
        part.update({key: numbers_now[name][key] for key in part.keys() & {"base_lrs", "decay", "use_ema_warmup"}})
        run.state[name].load_state_dict(part)
    for group, factor in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(lr_scheduler.last_epoch)


def own_tensors(optimizer):
    """Has an optimizer's tensors in the CPU's memory be its own, and not parts of the file that they came from."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if torch.is_tensor(value) and value.device.type == "cpu":
                state[name] = value.clone()


# -------------------------------------------------------------------------------------------------------------- errors
def print_any_character():
    """Lets what the encoding of the output lacks, such as a name in Japanese in cp1252 (a redirect on Windows), appear
    as escapes instead of ending the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's own takes everything
            stream.reconfigure(errors="backslashreplace")


def is_utf8(text):
    """Whether a text can be written as UTF-8: Python reads other bytes of a command line, and in a locale that is not
    UTF-8 every letter that is not English, as surrogates, which neither a tokenizer nor a file takes."""
    return text == text.encode("utf-8", "replace").decode("utf-8")


def printable(text):
    """A text without signs that move or colour what a terminal shows: of somebody else's files, names and captions."""
    return "".join(sign if sign.isprintable() or sign in "\n\u00a0\u3000" else repr(sign)[1:-1] for sign in text)


def in_one_line(name):
    """As `printable`, for a name that may hold line ends."""
    return printable(str(name)).replace("\n", "\\n")


def counted(number, one, many=None):
    """A number and what it counts, such as 1 image or 1,234 images; `many` is the plural of a word, or of a phrase,
    that does not end in an s more."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def without_secrets(text):
    """A text with stars in the place of tokens: those of the environment, and what looks like one of the Hub's."""
    for name in SECRETS:
        value = os.environ.get(name, "").strip()
        if len(value) >= 8:  # anything shorter is none, and may be a word
            text = text.replace(value, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "hf_***", text)


def broken(line):
    """The lines that one line makes in a terminal as wide as it is, or of 100 columns where there is none."""
    own = line[: len(line) - len(line.lstrip())]
    margins = {"initial_indent": own, "subsequent_indent": max(own + "  ", "    ")}
    words = {"break_long_words": False, "break_on_hyphens": False}  # paths and flags
    width = shutil.get_terminal_size((100, 24)).columns
    lines = textwrap.wrap(line.lstrip(), width, **margins, **words) or [""]
    lines[-1] += line[len(line.rstrip()) :]  # of a program's name, before a list
    return lines


def fitted(text):
    """A message as it is shown: in lines as wide as the terminal, or of 100 columns where there is none, at most 12 of
    them; of a list that is longer the end is cut. Nothing in it is a secret, or moves what a terminal shows."""
    parts = [broken(line) for line in printable(without_secrets(text)).split("\n")]
    end = [] if len(parts) == 1 or parts[-1][0].startswith(" ") else [parts.pop()]  # the remedy for all of a list
    num_cut = 0
    while len(parts) > 1 and sum(map(len, parts + end)) + bool(num_cut) > MAX_LINES:
        parts.pop()
        num_cut += 1
    cut = [[f"  and {num_cut} more"]] if num_cut else []
    lines = [line for part in parts + cut + end for line in part]
    return "\n".join(lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "  ..."])


def last_line(error):
    """The last line of an exception's text, for a message of one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:200]


def remedy_for(error):
    """What is to be done about what the system says of a file; "" for an `InputError`, which says that itself."""
    if isinstance(error, InputError):
        return ""
    if re.search(r"No space left|File too large|quota exceeded", str(error), re.IGNORECASE):
        return "; make room"
    return "; check that path, and that you may use it" if isinstance(error, OSError) else ""


def remedy_for_missing(path):
    """What is to be done about a path of a command in the READMEs that is not there; "" for any other path."""
    if not path or os.path.exists(path):
        return ""
    place = Path(os.path.normpath(path))
    for made in (place, *place.parents):
        if maker := MAKERS.get(made.as_posix()):
            return f"run `{maker}` in the folder of the repository, which makes it"
    if place.parts[0] in ("miniature", "examples") and not os.path.isdir(place.parts[0]):
        return "start in the folder of the repository, which it comes with"
    return ""


def is_lack_of_memory(error):
    """Whether an exception comes of too little memory, of the machine or of a device."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY_TEXT.search(str(error)))


def is_lost_peer(error):
    """Whether an exception comes of the end of another process: what happened is told there."""
    return bool(LOST_PEER_TEXT.search(str(error)))


def raise_problems(problems):
    """Raises one `InputError` that lists all problems, if there are any."""
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputError("\n  ".join(["", *problems]))


@contextlib.contextmanager
def gathered(problems):
    """Adds the message of an `InputError` to a list, instead of raising it."""
    try:
        yield
    except InputError as error:
        problems.append(str(error))


def end_unread():
    """Ends the process without a word, with the status that SIGPIPE gives other programs, if nobody reads its output
    any more, as of `head`."""
    try:
        if sys.stdout and stat.S_ISFIFO(os.fstat(1).st_mode):  # another pipe may be what broke
            os.write(1, b"\n")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain as it ends
        sys.exit(128 + signal.SIGPIPE)


@contextlib.contextmanager
def told_to_user(program, speaks=True, errors=InputError, stopped=None, patience=0):
    """Ends the process with status 2 and the message after an `InputError`, or the class or classes `errors`; after
    Ctrl-C, or another signal that raised `KeyboardInterrupt` with its number, with the status of that and the line
    `stopped`. Of several processes only the one that `speaks` prints more than mistakes, which another one tells after
    `patience` seconds, if it was not ended by then."""
    try:
        try:
            with contextlib.redirect_stdout(sys.stdout if speaks else io.StringIO()):
                yield
        except BrokenPipeError:
            end_unread()
            raise
        except errors as error:
            time.sleep(patience)  # in which the launcher's signal may come
            print(fitted(f"{program}: {error}{remedy_for(error)}"), file=sys.stderr)
            sys.exit(2)
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        if speaks:
            print(stopped or f"{program}: stopped by {number.name}", file=sys.stderr)
        sys.exit(128 + number)


# --------------------------------------------------------------------------------------------------------------- files
@contextlib.contextmanager
def beside(output, keep_mode=False):
    """Gives a name to write to beside `output`, a file or a folder, and renames what is there when it is complete.
    Files get a new file's usual permissions: safetensors makes them for their owner alone. With `keep_mode` a file
    gets those of the one that it replaces."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    process = f"{socket.gethostname()}-{os.getpid()}"  # other machines may write there too
    new, old = [output.with_name(f".{output.name}.{process}.{word}") for word in ("new", "old")]
    try:
        yield new
        umask = os.umask(0)
        os.umask(umask)
        written = [new, *new.glob("**/*.safetensors")]
        for path in [path for path in written if path.is_file()]:
            path.chmod(0o666 & ~umask)
        if keep_mode and output.exists():
            shutil.copymode(output, new)
        if output.is_dir():  # which a rename does not replace
            output.rename(old)
        new.replace(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        else:
            new.unlink(missing_ok=True)


def sync(folder):
    """Has the system write a folder and all that is in it to the disk: until then a crash of the machine could leave a
    whole name with half a file."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("r+b") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder):
    """Has the system write the names in a folder to the disk, where it can: Windows opens no folders, and some network
    file systems know no such thing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def move_into(staging, folder):
    """Renames what is in `staging` into `folder`, in the place of what has the same name there, and removes it. Files
    go last, and in reverse order, so that a README.md means that all is there."""
    for new in sorted(staging.iterdir(), key=lambda path: (path.is_dir(), path.name), reverse=True):
        place = folder / new.name
        if place.is_dir():  # which a rename does not replace
            old = place.rename(staging / f"{new.name}.old")
            new.rename(place)
            shutil.rmtree(old)
        else:
            new.replace(place)
    staging.rmdir()


def read_json(path):
    """The dictionary in a JSON file. Raises `InputError`."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({last_line(error)})") from None


def existing_place(path):
    """The path itself, or the nearest folder above it that exists."""
    path = Path(path).resolve()
    return next(place for place in (path, *path.parents) if place.exists())


def copy_mode(source, files):
    """Gives files, which safetensors makes for their owner alone, the permissions of another file."""
    for path in files:
        shutil.copymode(source, path)


def name_in(folder, path):
    """What metadata and the Hub call a file: its path below the folder, with slashes."""
    return Path(os.path.relpath(path, folder)).as_posix()


# ----------------------------------------------------------------------------------------------------------- arguments
def checked(text, kind, accepts, accepted):
    """The number that `text` is, of this kind, for the `type` of a flag, whose help gives the interval too. Raises
    `argparse.ArgumentTypeError`, which says what is accepted."""
    try:
        number = kind(text)
    except ValueError:
        number = math.nan  # which no comparison accepts
    if not accepts(number):
        raise argparse.ArgumentTypeError(f"must be {accepted}, not {text!r}")
    return number


def positive_int(text):
    """A whole number in [1, inf)."""
    return checked(text, int, lambda number: number >= 1, "a whole number in [1, inf)")


def non_negative_int(text):
    """A whole number in [0, inf)."""
    return checked(text, int, lambda number: number >= 0, "a whole number in [0, inf)")


def positive_float(text):
    """A number in (0, inf)."""
    return checked(text, float, lambda number: 0 < number < math.inf, "in (0, inf)")


def positive_float_or_inf(text):
    """A number in (0, inf]."""
    return checked(text, float, lambda number: number > 0, "in (0, inf]")


def non_negative_float(text):
    """A number in [0, inf)."""
    return checked(text, float, lambda number: 0 <= number < math.inf, "in [0, inf)")


def fraction(text):
    """A number in [0, 1]."""
    return checked(text, float, lambda number: 0 <= number <= 1, "in [0, 1]")


def fraction_below_one(text):
    """A number in [0, 1)."""
    return checked(text, float, lambda number: 0 <= number < 1, "in [0, 1)")


def guidance_number(text):
    """A scale of classifier-free guidance in [1, inf)."""
    return checked(text, float, lambda number: 1 <= number < math.inf, "in [1, inf)")


def launched_rank(text):
    """A whole number in [-1, inf)."""
    return checked(text, int, lambda number: number >= -1, "a whole number in [-1, inf)")


def random_seed(text):
    """A whole number in [0, 9e18], which every generator takes."""
    return checked(text, int, lambda number: 0 <= number <= 9e18, "a whole number in [0, 9e18]")


def path_name(text):
    """A path, or a name of the Hub or a tracker, that a file system takes."""
    names = re.split(r"[/\\]", text)
    if "\0" in text or max(num_bytes(name) for name in names) > MAX_NAME_BYTES or num_bytes(text) > MAX_PATH_BYTES:
        told = f"holds a zero, or names of more than {MAX_NAME_BYTES} bytes ({MAX_PATH_BYTES:,} in all)"
        raise argparse.ArgumentTypeError(f"{told}; use a shorter one, not {text[:40]!r}...")
    return text


def num_bytes(text):
    """The length of a text in UTF-8."""
    return len(text.encode("utf-8", "replace"))


def repo_name(text):
    """The name of a repository of the Hub, maybe with its owner's."""
    try:
        validate_repo_id(text)
    except ValueError:
        told = f"must be a name or owner/name of at most 96 letters, digits and -_., not {text[:40]!r}"
        raise argparse.ArgumentTypeError(told) from None
    return text


def is_hub_id(name):
    """Whether the name is one of the Hub, no path."""
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not os.path.exists(name)


def missing_here(name):
    """Says that there is no such folder, of a name which may be one of the Hub or a mistyped path, since there is the
    folder that it would lie in; "" of any other name."""
    if not is_hub_id(name) or not os.path.isdir(os.path.dirname(name)):
        return ""
    return f"there is no such folder here{nearest_beside(name)}"


def nearest_beside(name):
    """Asks, of a path that is not there, whether that is meant which has the name most like it of what lies where it
    would; "" if nothing has."""
    if os.path.exists(name):
        return ""
    folder, own_name = os.path.split(str(name).rstrip("/"))
    there = []
    with contextlib.suppress(OSError):  # it is not there either, or closed to us
        there = os.listdir(folder or ".")
    alike = difflib.get_close_matches(own_name, sorted(there), 1)
    return f" (did you mean {os.path.join(folder, alike[0])}?)" if alike else ""


def is_place(flag):
    """Whether a flag of a parser takes what says where something is, or a secret: nothing for others to read."""
    return flag.type in (path_name, repo_name, secret_token)


def secret_token(text):
    """A token, which is never shown: a header that holds other letters would be, in an error."""
    if not re.fullmatch(r"[!-~]+", text):
        raise argparse.ArgumentTypeError("is empty, or holds spaces or other letters than ASCII's; copy it once more")
    return text


def new_parser(description, usage):
    """A parser that takes no shortened flags, and leaves it to `parse_flags` to tell what is wrong."""
    return argparse.ArgumentParser(
        usage=usage,
        description=description.split("\n")[0],
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=HelpWithDefaults,
    )


def put_first(parser, names):
    """Moves the first ten of some flags that a parser has into a group at the head of its help."""
    flags = {flag.dest: flag for flag in parser._actions}
    wanted = [flags[name] for name in names if name in flags][:10]
    for group in parser._action_groups:
        group._group_actions = [flag for flag in group._group_actions if flag not in wanted]
    first = parser.add_argument_group("set by most people")
    first._group_actions = wanted
    parser._action_groups.insert(0, parser._action_groups.pop())


def add_model_arguments(parser):
    """Adds which base model is read, and from where."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrained_model_name_or_path",
        type=path_name,
        help="pipeline folder, Hub id, or original .ckpt/.safetensors file",
    )
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add("--variant", help="variant of the weight files, such as fp16")
    add(
        "--single_file_config",
        type=path_name,
        help="pipeline folder or Hub id with the configs for a single-file model",
    )
    add(
        "--tokenizer_name",
        type=path_name,
        help="folder or Hub id of a tokenizer to use, and save, instead of the model's",
    )
    add(
        "--tokenizer_max_length",
        type=positive_int,
        help="tokens of a caption; default: what the text encoder takes, which is the most [1, inf)",
    )
    add(
        "--cache_dir",
        type=path_name,
        help="where downloads and remembered checks go, instead of the Hugging Face cache",
    )


def add_adapter_arguments(parser, targets):
    """Adds what the adapters of LoRA are like; `targets` are the choices of layers."""
    add = parser.add_argument_group("adapters").add_argument
    add("--rank", type=positive_int, default=4, help="rank of the adapters [1, inf)")
    add("--lora_alpha", type=positive_float, help="scale of the adapters times the rank; default: the rank (0, inf)")
    add(
        "--lora_dropout",
        type=fraction_below_one,
        default=0.0,
        help="share of the adapters' inputs that is dropped [0, 1)",
    )
    add("--use_rslora", **SWITCH, help="scale by alpha / sqrt(rank) instead of alpha / rank")
    add("--use_dora", **SWITCH, help="train the magnitude of the weights apart from their direction")
    add("--lora_target", default="attention", choices=targets, help="layers with adapters")
    add("--train_text_encoder", **SWITCH, help="adapters on the text encoder too")
    add_text_encoder_rate(add)
    add(
        "--init_lora_weights",
        type=path_name,
        metavar="PATH",
        help="go on from such a file of this script, or its folder",
    )
    add("--output_kohya_format", **SWITCH, help="write the adapter as A1111, Forge and ComfyUI read it too")
    add(
        "--kohya_file_name",
        type=path_name,
        help="name of that file; default: that of --output_dir; needs --output_kohya_format",
    )


def add_text_encoder_rate(add):
    """Adds, to the group whose method `add` is, how fast the text encoder is trained."""
    add(
        "--text_encoder_lr",
        type=positive_float,
        help="default: --learning_rate; needs --train_text_encoder (0, inf)",
    )


def add_subject_arguments(parser):
    """Adds the photos of a subject to train on, and what is done to them."""
    add = parser.add_argument_group("data").add_argument
    add(
        "--instance_data_dir",
        type=path_name,
        help="folder of the subject's photos, maybe with captions as for text-to-image",
    )
    add("--instance_prompt", help="caption of photos that have none, with a rare word: a photo of sks dog")
    add("--repeats", type=positive_int, default=1, help="times that each photo counts in an epoch [1, inf)")
    add_dataset_arguments(add)
    add_transform_arguments(add)


def add_dataset_arguments(add):
    """Adds, to the group whose method `add` is, where a dataset is read from and which of its rows are used."""
    add(
        "--dataset_name",
        type=path_name,
        help="dataset on the Hub, or a local folder or file of parquet or WebDataset tar shards",
    )
    add("--dataset_config_name", help="configuration of that dataset; needs --dataset_name")
    add("--image_column", default="image", help="column of its images; needs --dataset_name")
    add("--caption_column", default="text", help="column with a caption, or a list of them: one is drawn per epoch")
    add("--max_train_samples", type=positive_int, help="use so many images, drawn by the seed [1, inf)")
    add("--skip_bad_images", **SWITCH, help="go on without images that cannot be used, instead of stopping")
    add("--follow_symlinks", **SWITCH, help="read what links in the folder lead to elsewhere, too")


def add_transform_arguments(add):
    """Adds, to the group whose method `add` is, what is done to images and captions."""
    add(
        "--resolution",
        type=positive_int,
        default=512,
        help="side of the square training images in pixels [1, inf)",
    )
    add("--center_crop", **SWITCH, help="crop the centre, not a random place")
    add("--random_flip", **SWITCH, help="mirror half of the images, drawn anew each epoch")
    filters = [kind.name.lower() for kind in Image.Resampling]
    add("--image_interpolation_mode", default="lanczos", choices=filters, help="filter for resizing")
    add("--caption_dropout", type=fraction, default=0.0, help="share of captions replaced by the empty one [0, 1]")


def add_bucket_arguments(parser):
    """Adds the sizes in which images keep about their shape."""
    add = parser.add_argument_group("aspect-ratio buckets").add_argument
    add(
        "--aspect_ratio_buckets",
        **SWITCH,
        help="images keep about their shape, in sizes of at most --resolution squared pixels; implies --center_crop",
    )
    needs = "needs --aspect_ratio_buckets"
    add(
        "--bucket_step",
        type=positive_int,
        help="sides are multiples of this, which is one of the VAE's 8 pixels; if not given 64, or an eighth of "
        f"--resolution, in multiples of 8, where that is less; {needs} [1, inf)",
    )
    add("--bucket_min", type=positive_int, help=f"smallest side; half of --resolution if not given; {needs} [1, inf)")
    add("--bucket_max", type=positive_int, help=f"largest side; twice --resolution if not given; {needs} [1, inf)")
    add(
        "--bucket_no_upscale",
        **SWITCH,
        help="do not enlarge an image that is smaller than its bucket: it gets a smaller size of its own shape, a "
        f"step or more at each side; {needs}",
    )


def add_class_arguments(parser):
    """Adds the images of the subject's class, for prior preservation."""
    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", **SWITCH, help="train on images of the class too, so that it stays as it was")
    add(
        "--class_data_dir",
        type=path_name,
        help="their folder; the base draws what is missing; needs --with_prior_preservation",
    )
    add("--class_prompt", help="their caption: a photo of a dog; needs --with_prior_preservation")
    add(
        "--class_prompts",
        nargs="+",
        help="captions instead of it, that images are drawn from in turn, for more of what has to stay: a black dog, "
        "a dog on a beach; needs --with_prior_preservation",
    )
    add(
        "--num_class_images",
        type=positive_int,
        help="how many; 100 if not given; needs --with_prior_preservation [1, inf)",
    )
    add(
        "--sample_batch_size",
        type=positive_int,
        help="how many at once, or 4; needs --with_prior_preservation [1, inf)",
    )
    add(
        "--prior_loss_weight",
        type=non_negative_float,
        help="weight of their loss, or 1; needs --with_prior_preservation [0, inf)",
    )
    add(
        "--prior_generation_precision",
        choices=["no", "fp32", "fp16", "bf16"],
        help="as in training if not given; needs --with_prior_preservation",
    )


def add_objective_arguments(parser):
    """Adds what the UNet is to predict, from which noise, and how its losses are weighted."""
    add = parser.add_argument_group("objective").add_argument
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="what the UNet predicts; default: the model's")
    add("--snr_gamma", type=positive_float, help="min-SNR loss weights with this gamma; 5.0 in the paper (0, inf)")
    add(
        "--noise_offset",
        type=non_negative_float,
        default=0.0,
        help="scale of noise that shifts channels; 0.05 is common [0, inf)",
    )
    add("--offset_noise", **SWITCH, help="the same as --noise_offset=0.1")
    add(
        "--input_perturbation",
        type=non_negative_float,
        default=0.0,
        help="scale of extra input noise; 0.1 in the paper [0, inf)",
    )
    add("--rescale_betas_zero_snr", **SWITCH, help="rescale the schedule to zero terminal SNR; needs v_prediction")


def add_optimization_arguments(parser):
    """Adds the optimizer, its learning rate, the batch, the length of the run, and the average of the weights."""
    add = parser.add_argument_group("optimization").add_argument
    add("--learning_rate", type=positive_float, default=1e-4, help="initial learning rate (0, inf)")
    add("--scale_lr", **SWITCH, help="multiply the learning rate by batch size, accumulation steps and processes")
    add("--lr_scheduler", default="constant", choices=LR_SCHEDULERS, help="its schedule")
    add(
        "--lr_warmup_steps",
        type=non_negative_int,
        default=0,
        help="steps in which the learning rate rises from 0 [0, inf)",
    )
    add(
        "--lr_num_cycles",
        type=positive_int,
        help="cycles, 1 if not given; needs --lr_scheduler=cosine_with_restarts [1, inf)",
    )
    add(
        "--lr_power",
        type=positive_float,
        help="power, 1 if not given; needs --lr_scheduler=polynomial (0, inf)",
    )
    add("--lr_step_rules", help="factor:until_step,...,last factor: 1:10,0.1; needs --lr_scheduler=piecewise_constant")
    add("--train_batch_size", type=positive_int, default=16, help="images per forward pass and process [1, inf)")
    add(
        "--gradient_accumulation_steps",
        type=positive_int,
        default=1,
        help="forward passes per optimizer step [1, inf)",
    )
    add("--gradient_checkpointing", **SWITCH, help="compute activations twice: slower, less memory")
    add(
        "--num_train_epochs",
        type=positive_int,
        default=NUM_TRAIN_EPOCHS,
        help="passes over the images, unless --max_train_steps [1, inf)",
    )
    add("--max_train_steps", type=positive_int, help="optimizer steps [1, inf)")
    add(
        "--max_grad_norm",
        type=positive_float_or_inf,
        default=1.0,
        help="clip the gradient's norm to this; inf: no clipping (0, inf]",
    )
    add(
        "--max_nan_steps",
        type=non_negative_int,
        help="steps in a row whose loss or gradient is not finite that are skipped; 5 in fp16, else 0 [0, inf)",
    )
    add("--adam_beta1", type=fraction_below_one, help="AdamW's beta1 [0, 1)")
    add("--adam_beta2", type=fraction_below_one, help="AdamW's beta2 [0, 1)")
    add("--adam_weight_decay", type=non_negative_float, help="AdamW's weight decay [0, inf)")
    add("--adam_epsilon", type=positive_float, help="AdamW's epsilon (0, inf)")
    parser.set_defaults(**ADAM_DEFAULTS)
    add("--use_ema", **SWITCH, help="average the weights over the steps; samples and result use the average")
    add("--ema_decay", type=fraction, help="highest decay of the average; 0.9999 if not given; needs --use_ema [0, 1]")
    add("--ema_warmup", **SWITCH, help="raise the decay slowly, as 1 - (1 + step) ** -2/3; needs --use_ema")


def add_memory_arguments(parser):
    """Adds what makes training in PyTorch faster or smaller."""
    add = parser.add_argument_group("memory and speed").add_argument
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="precision of passes; default: accelerate's config",
    )
    add(
        "--optimizer",
        choices=["adamw", "adamw8bit", "adafactor", "prodigy"],
        help="adamw if not given; prodigy finds its rate itself: give it --learning_rate=1, which is a factor there",
    )
    add("--use_8bit_adam", **SWITCH, help="the same as --optimizer=adamw8bit: AdamW with 8-bit state, by bitsandbytes")
    add("--offload_ema", **SWITCH, help="keep and update the average in CPU memory; needs --use_ema")
    add("--foreach_ema", **SWITCH_ON, help="update the average with few, large operations; not where it is offloaded")
    add("--enable_xformers_memory_efficient_attention", **SWITCH, help="xFormers' attention instead of torch's")
    add("--compile", **SWITCH, help="compile the UNet's transformer blocks in the first step, by torch.compile")
    add("--channels_last", **SWITCH, help="channels-last layout of the UNet; measured on a CPU it changes nothing")
    add("--allow_tf32", **SWITCH, help="TensorFloat-32 products and convolutions, on GPUs that have them")
    add("--set_grads_to_none", **SWITCH, help="gradients always are; taken so that old commands run")
    add(
        "--dataloader_num_workers",
        type=non_negative_int,
        help="processes that load images; 0: the main one; default: by the cores, at most 4 [0, inf)",
    )


def add_cache_arguments(parser):
    """Adds what is encoded once, before training, and kept for later runs."""
    add = parser.add_argument_group("cache").add_argument
    add("--cache_latents", **SWITCH, help="encode images once, into --cache_dir; needs a centre crop")
    add(
        "--cache_text_embeddings",
        "--pre_compute_text_embeddings",
        **SWITCH,
        help="encode captions once, into --cache_dir; not with a text encoder that is trained",
    )


def add_output_arguments(parser):
    """Adds where results, checkpoints and logs go."""
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=path_name, help="where everything is written")
    add("--overwrite_output_dir", **SWITCH, help="write over the run in --output_dir and remove its checkpoints")
    add(
        "--save_precision", default="no", choices=["no", "fp16", "bf16"], help="half precision of what is saved, or no"
    )
    add(
        "--checkpointing_steps", type=positive_int, default=500, help="write a checkpoint every so many steps [1, inf)"
    )
    add("--checkpoints_total_limit", type=positive_int, help="keep only so many checkpoints, the newest [1, inf)")
    add("--keep_best", **SWITCH, help="keep that with the lowest held-out loss too; needs --num_validation_samples")
    add(
        "--resume_from_checkpoint",
        type=path_name,
        metavar="PATH|latest",
        help="go on from a checkpoint, if there is a latest",
    )
    add("--allow_changed_resume", **SWITCH, help="though the result will change; needs --resume_from_checkpoint")
    add("--report_to", help="tracker of accelerate's (wandb, ...), all or none; default: tensorboard, if installed")
    add("--tracker_project_name", type=path_name, default="text2image-fine-tune", help="project name in the tracker")
    add("--logging_dir", type=path_name, default="logs", help="folder for the tracker's files, in --output_dir")
    add("--logging_steps", type=positive_int, default=10, help="log the mean loss every so many steps [1, inf)")
    add("--push_to_hub", **SWITCH, help="upload the result to the Hub")
    add(
        "--hub_model_id",
        type=repo_name,
        help="repository to upload to; default: the name of --output_dir; needs --push_to_hub",
    )
    add(
        "--hub_token",
        type=secret_token,
        help="token for models, dataset and upload; default: the one that `hf auth login` stored",
    )
    add("--hub_private_repo", **SWITCH, help="make the repository private; needs --push_to_hub")


def add_validation_arguments(parser):
    """Adds the prompts to draw samples for and how they are drawn, the images held out to measure the loss on, and how
    often the run is looked at."""
    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompts", nargs="+", help="prompts to draw samples for, an image of each")
    add("--validation_prompt", help="prompt to draw samples for, several images of it")
    add(
        "--num_validation_images",
        type=non_negative_int,
        help="images of each prompt; 4 if not given, 1 of --validation_prompts; needs one of the two [0, inf)",
    )
    add(
        "--validation_scheduler",
        choices=["DPMSolverMultistepScheduler", "DDPMScheduler"],
        help="sampler; DPMSolverMultistepScheduler if not given; needs a prompt",
    )
    add(
        "--validation_num_inference_steps",
        type=positive_int,
        help="denoising steps of samples; 25 if not given; needs a prompt [1, inf)",
    )
    add(
        "--validation_guidance_scale",
        type=guidance_number,
        help="classifier-free guidance of samples; 7.5 if not given, 1 for none; needs a prompt [1, inf)",
    )
    add("--validation_negative_prompt", help="what samples are not to show; needs a prompt and guidance")
    add(
        "--num_validation_samples",
        type=non_negative_int,
        default=0,
        help="images held out, to measure the loss on [0, inf)",
    )
    needs = "needs a prompt or --num_validation_samples"
    add("--validation_steps", type=positive_int, help=f"draw and measure every so many, or 500; {needs} [1, inf)")
    add("--validation_epochs", type=positive_int, help=f"every so many epochs instead; {needs} [1, inf)")


def add_run_arguments(parser):
    """Adds seed, configuration file and trial."""
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=random_seed, default=0, help="seed of everything that is drawn at random [0, 9e18]")
    add(
        "--config",
        type=path_name,
        metavar="FILE.yaml",
        help="flags by name, maybe under `training:`; the command line wins",
    )
    add("--dry_run", **SWITCH, help="check everything, print the plan and stop")
    add(
        "--local_rank",
        "--local-rank",
        type=launched_rank,
        default=-1,
        help="what old launchers say, the LOCAL_RANK that they set too; nobody else needs it [-1, inf)",
    )


def parse_flags(parser, argv, replaced_flags):
    """Parses `argv`, or the command line, after the flags in its `--config`, so that argparse checks both.

    Returns (args, what is wrong with them): a flag with a wrong value, or that does not exist, is told and left at its
    default, so that the checks that follow can tell the rest. `replaced_flags` maps flags of other scripts to a
    remedy. `~` is expanded. From then on the process does not know its token by `sys.argv`, which trackers record.
    """
    if argv is None:
        argv = sys.argv[1:]
        sys.argv[1:] = with_hidden_tokens(argv)
    args, problems = None, []
    if config := config_of(argv):
        # In two passes: a list in the file would take the first word of the command line as its last item.
        words, problems = config_words(parser, config, vars(parser.parse_args([])), {"training"}, {"evaluation"})
        args, more_problems = parse_words(parser, words)
        problems += more_problems
    args, more_problems = parse_words(parser, argv, args, replaced_flags)
    return args, problems + more_problems


def with_hidden_tokens(words):
    """The words of a command line, with stars in the place of the values of --hub_token."""
    hidden, is_token = [], False
    for word in words:
        if is_token:
            word = "***"
        elif word.startswith("--hub_token="):
            word = "--hub_token=***"
        is_token = word == "--hub_token"
        hidden.append(word)
    return hidden


def config_of(argv):
    """The file that `--config` names in the words of a command line, or None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=path_name)
    try:
        return parser.parse_known_args(argv)[0].config
    except argparse.ArgumentError:  # which is told where all flags are parsed
        return None


def changed_flags(parser, args):
    """The names of the flags whose values are not their defaults."""
    defaults = vars(parser.parse_args([]))
    return [name for name, value in vars(args).items() if value != defaults[name]]


def check_encoding(args):
    """Lists the values that are not UTF-8."""
    problems = []
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not is_utf8(text):
                problems.append(f"--{name}={ascii(text)[1:-1]}: is not UTF-8; if it is, set PYTHONUTF8=1")
    return problems


def parse_words(parser, words, args=None, replaced_flags=None):
    """Parses the words of a command line, over what `args` hold already; returns (args, what is wrong with the words).
    A flag with a wrong value, or that does not exist, is told and left out, as is one of `replaced_flags`, with its
    remedy. `~` is expanded."""
    words, problems = without_unknown(parser, words, replaced_flags or {})
    while True:  # argparse ends at the first wrong value
        try:
            parsed, surplus = parser.parse_known_args(words, argparse.Namespace(**vars(args)) if args else None)
            break
        except argparse.ArgumentError as error:
            problems.append(f"{error.argument_name}: {told_of_value(error)}")
            flag = flag_named(parser, error.argument_name)
            if flag is None:  # a word without a flag
                parsed, surplus = parser.parse_known_args([], args)
                break
            words = without_flag(words, flag)
    for word in surplus:
        problems.append(f"{word!r}: is no flag, nor the value of one; drop it, or put quotes around words with spaces")
    expanded = {
        name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in vars(parsed).items()
    }
    return argparse.Namespace(**expanded), problems


def told_of_value(error):
    """What argparse says of a flag's value, with the remedy."""
    if error.message.startswith("expected"):
        return "lacks its value; give one behind it, such as FLAG=VALUE"
    if error.message.startswith("ignored explicit argument"):
        return f"takes no value; use {error.argument_name.replace('/', ' or ')}"
    return error.message


def without_unknown(parser, words, replaced_flags):
    """Returns (the words of a command line without flags that do not exist and their values, a line on each)."""
    flags = {name: action for action in parser._actions for name in action.option_strings}
    has_positionals = any(not action.option_strings for action in parser._actions)
    kept, problems, num_values = [], [], 0  # how many values are still to be left out
    for number, word in enumerate(words):
        if word == "--":
            return kept + words[number:], problems
        name, joined, _ = word.partition("=")
        if not re.fullmatch(r"--?[A-Za-z][^\s]*", name):
            if num_values:
                num_values -= 1
            else:
                kept.append(word)
        elif name in flags:
            num_values = 0
            kept.append(word)
        else:
            meant = nearest(name, flags)
            if name in replaced_flags:
                problems.append(f"{name} is not taken: {replaced_flags[name]}")
            elif meant:
                problems.append(f"{name}: is no flag; did you mean {meant}?")
            else:
                problems.append(f"{name}: is no flag; --help lists all, drop this")
            num_values = 0 if joined else num_values_of(flags[meant]) if meant else int(not has_positionals)
    return kept, problems


def num_values_of(flag):
    """How many words behind it are a flag's values, of an action of argparse."""
    if flag.nargs == 0:
        return 0
    return 1 if flag.nargs is None else math.inf


def nearest(name, names):
    """The one of `names` that somebody who wrote `name` most likely means, or None: what other trainers call so, else
    one that has all of its words in their order, else one whose words it has, else one with about its letters."""
    plain = {}
    for known in names:
        plain.setdefault(plain_name(known), known)
    wanted = plain_name(name)
    for known in plain:
        if letters_of(known) == letters_of(wanted):
            return plain[known]
    meant = [ours for ours, theirs in NAMES_ELSEWHERE.items() if letters_of(wanted) in letters_of(theirs).split()]
    if meant:
        return next((plain[known] for known in meant if known in plain), None)
    is_negated = wanted.startswith("no_")
    likely = [known for known in plain if known.startswith("no_") == is_negated]
    likely.sort(key=lambda known: (known not in MOST_USED, len(known)))
    words = wanted.split("_")
    for is_like in (operator.eq, is_begun_by, is_alike):
        fitting = [known for known in likely if has_in_order(known.split("_"), words, is_like)]
        of_as_many = [known for known in fitting if len(known.split("_")) == len(words)]
        if of_as_many:  # a misspelling of one of these, of the one with the most of its letters
            return plain[max(of_as_many, key=lambda known: difflib.SequenceMatcher(None, wanted, known).ratio())]
        if fitting:
            return plain[fitting[0]]
    for known in sorted(likely, key=len, reverse=True):
        if has_in_order(words, known.split("_"), operator.eq):
            return plain[known]
    alike = difflib.get_close_matches(wanted, plain, 1, 0.7)
    return plain[alike[0]] if alike else None


def plain_name(name):
    """A flag's name without its dashes, in the letters of a key of YAML."""
    return name.strip("-").replace("-", "_").lower()


def letters_of(name):
    """A name without what parts its words."""
    return name.replace("_", "")


def has_in_order(words, wanted, is_like):
    """Whether for each of the words `wanted` there is one of `words` like it, in the same order."""
    rest = iter(words)
    return all(any(is_like(word, other) for word in rest) for other in wanted)


def is_begun_by(word, start):
    """Whether a word begins so, by some letters."""
    return len(start) >= 3 and word.startswith(start)


def is_alike(word, other):
    """Whether a word is another one, or that may be a misspelling of it."""
    is_misspelling = len(other) >= 4 and difflib.SequenceMatcher(None, word, other).ratio() >= 0.75
    return word == other or is_misspelling


def config_words(parser, path, defaults, sections, other_sections):
    """Returns (the words of a command line that say what the YAML file at `path` says, what is wrong with it): it has
    flags by name, at top level or in one of `sections`. `other_sections` are for other programs."""
    recipe, problems = read_config(path, sections)
    for section in sections & recipe.keys():
        recipe |= recipe.pop(section)
    known = defaults.keys() - {"config"}
    problems += check_keys(path, recipe, known, other_sections)
    return setting_words({key: value for key, value in recipe.items() if key in known}, defaults), problems


def check_keys(path, recipe, known, others):
    """Lists what is wrong with the keys and values of a YAML file's dictionary; `known` are the keys of flags."""
    problems = []
    for key in sorted(map(str, recipe.keys() - known - others)):
        meant = nearest(key, known)
        remedy = f"did you mean {meant}?" if meant else "drop it; keys are the flags of --help without dashes"
        problems.append(f"--config={path}: unknown key {key}; {remedy}")
    for key in list(recipe.keys() & known):
        values = recipe[key] if isinstance(recipe[key], list) else [recipe[key]]
        if any(isinstance(value, dict | list | bytes) for value in values):
            problems.append(f"--{key}: is no single value, nor a list of them, in {path}; give it one")
            del recipe[key]
    return problems


def read_config(path, sections):
    """Returns (what the YAML file at `path` says, as a dictionary, as are those of `sections` that it has, what is
    wrong with it)."""
    try:
        recipe = yaml.safe_load(Path(os.path.expanduser(path)).read_text("utf-8")) or {}
        if not isinstance(recipe, dict):
            raise TypeError("it holds something else")
        for section in sections & recipe.keys():
            recipe[section] = recipe[section] or {}
        if not all(isinstance(recipe[name], dict) for name in sections & recipe.keys()):
            raise TypeError("a section holds something else")
        return recipe, []
    except FileNotFoundError:
        told = f"there is no such file{nearest_beside(path)}"
        return {}, [f"--config={path}: {told}; {remedy_for_missing(path) or 'name one'}"]
    except (OSError, ValueError, yaml.YAMLError, TypeError, RecursionError) as error:
        told = " ".join(str(error).split())[:300]
        return {}, [f"--config={path}: is no YAML file of flags ({told}); write `flag: value`, a line each"]


def setting_words(settings, defaults):
    """The words of a command line that give flags the values that YAML has for them; `defaults` are the flags' own."""
    words = []
    for key, value in settings.items():
        if value is None:
            continue
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif isinstance(value, bool) and isinstance(defaults[key], bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        elif value is False:  # YAML reads a bare `no` as false, but --mixed_precision means the word
            words.append(f"--{key}=no")
        else:
            words.append(f"--{key}={value}")
    return words


def flag_named(parser, name):
    """The flag that argparse calls `name` in a message, `--flag` or `--flag/--no-flag`; None for other arguments."""
    for action in parser._actions:
        if name and "/".join(action.option_strings) == name:
            return action
    return None


def without_flag(words, flag):
    """The words of a command line without a flag, an action of argparse, and without the values behind it."""
    kept, num_values = [], 0  # how many values are still to be dropped
    for word in words:
        name, joined, _ = word.partition("=")
        if name in flag.option_strings:
            num_values = 0 if joined else num_values_of(flag)
        elif word.startswith("--"):
            num_values = 0
            kept.append(word)
        elif num_values:
            num_values -= 1
        else:
            kept.append(word)
    return kept


def check_old_flags(args):
    """Lists what is wrong with flags that old command lines have, and that say again what others say."""
    problems = []
    if args.offset_noise and args.noise_offset not in (0, OFFSET_NOISE):
        problems.append(
            f"--offset_noise=True: means --noise_offset={OFFSET_NOISE}, but --noise_offset={args.noise_offset:g} is "
            "given too; drop one"
        )
    launched = os.environ.get("LOCAL_RANK", "0")  # alone a process is the first one
    if args.local_rank != -1 and str(args.local_rank) != launched:
        problems.append(
            f"--local_rank={args.local_rank}: is not what a launcher set; drop this, and start with "
            "`accelerate launch` or torchrun, which do"
        )
    return problems


def noise_offset_of(args):
    """The scale of noise that shifts channels, by the flag that is given."""
    return OFFSET_NOISE if args.offset_noise else args.noise_offset


def check_requirements(args, requires):
    """Lists the flags that were given but do nothing without another one: `requires` maps them to that."""
    problems = []
    for flag, needed in requires.items():
        value = getattr(args, flag)
        is_given = value is not None and value is not False
        if is_given and not getattr(args, needed):
            problems.append(f"--{flag}={value}: does nothing without --{needed}; add that or drop this")
    return problems


# ------------------------------------------------------------------------------------------------------------ metadata
def without_metadata(encoded, kinds):
    """An image file without its metadata of these kinds: PNG, JPEG, WebP, TIFF and AVIF; any other as it is."""
    if encoded.startswith(b"\x89PNG"):
        return join_parts(png_parts(encoded), kinds)
    if encoded.startswith(b"\xff\xd8\xff"):
        return join_parts(jpeg_parts(encoded), kinds)
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        chunks = join_parts(webp_parts(encoded), kinds)
        return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks
    if encoded.startswith((b"II*\0", b"MM\0*")):
        return tiff_without(encoded, kinds)
    if encoded[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1"):
        return avif_without(encoded, kinds)
    return encoded


def join_parts(parts, kinds):
    """Puts the parts of a file together, pairs of kind and bytes, but those of these kinds."""
    return b"".join(part for kind, part in parts if kind not in kinds)


def png_parts(encoded):
    """Yields (kind of metadata or None, bytes) of each chunk of a PNG (PNG specification, sections 5.3 and 5.4)."""
    yield None, encoded[:8]
    place = 8
    while place < len(encoded):
        (length,) = struct.unpack(">I", encoded[place : place + 4].rjust(4, b"\0"))
        name = encoded[place + 4 : place + 8]
        kind = {b"iCCP": PROFILE, b"eXIf": EXIF, b"tRNS": None}.get(name, TEXT)
        is_needed = name[:1].isupper()  # as the specification has it
        yield None if is_needed else kind, encoded[place : place + 12 + length]
        place += 12 + length


def jpeg_parts(encoded):
    """Yields (kind of metadata or None, bytes) of each segment of a JPEG up to the pixels, and then these (ITU T.81,
    annex B)."""
    yield None, encoded[:2]
    place = 2
    while encoded[place : place + 1] == b"\xff" and encoded[place + 1 : place + 2] != b"\xda":
        marker = encoded[place + 1]
        if marker == 0xFF:  # which fills a gap
            place += 1
            continue
        (length,) = struct.unpack(">H", encoded[place + 2 : place + 4].rjust(2, b"\0"))
        segment = encoded[place : place + 2 + length]
        yield jpeg_kind(marker, segment), segment
        place += 2 + length
    yield None, encoded[place:]


def jpeg_kind(marker, segment):
    """The kind of metadata that a segment holds, or None."""
    if marker in (0xE0, 0xEE) and len(segment) >= 16:
        return None  # JFIF's and Adobe's, which tell how the colours are coded
    if marker == 0xE1 and segment[4:8] == b"Exif":
        return EXIF
    if marker == 0xE2 and segment[4:15] == b"ICC_PROFILE":
        return PROFILE
    return TEXT if 0xE0 <= marker <= 0xEF or marker == 0xFE else None


def webp_parts(encoded):
    """Yields (kind of metadata or None, bytes) of each chunk of a WebP (RFC 9649, section 2.7)."""
    place = 12
    while place < len(encoded):
        (length,) = struct.unpack("<I", encoded[place + 4 : place + 8].ljust(4, b"\0"))
        end = place + 8 + length + length % 2
        kind = {b"XMP ": TEXT, b"ICCP": PROFILE, b"EXIF": EXIF}.get(encoded[place : place + 4])
        yield kind, encoded[place:end]
        place = end


def tiff_without(encoded, kinds):
    """A TIFF without metadata of these kinds in its first directory, in which tags from 700 on are extensions."""
    order = "<" if encoded.startswith(b"II") else ">"
    (start,) = struct.unpack(f"{order}I", encoded[4:8])
    (number,) = struct.unpack(f"{order}H", encoded[start : start + 2].rjust(2, b"\0"))
    end, kept = start + 2 + 12 * number, []
    for place in range(start + 2, end, 12):
        (tag,) = struct.unpack(f"{order}H", encoded[place : place + 2].rjust(2, b"\0"))
        kind = TIFF_KINDS.get(tag, TEXT if tag >= 700 or tag in TIFF_TEXT else None)
        if kind not in kinds:
            kept.append(encoded[place : place + 12])
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + encoded[end : end + 4]
    return encoded[:start] + directory.ljust(end + 4 - start, b"\0") + encoded[end + 4 :]


def avif_without(encoded, kinds):
    """An AVIF in which items of these kinds are of a type that nobody reads (ISO 14496-12, section 8.11.6)."""
    for kind, name in ((EXIF, b"Exif"), (TEXT, b"mime")):
        if kind in kinds:
            encoded = re.sub(rb"(infe[\2\3](?:.{7}|.{9}))" + name, rb"\1skip", encoded, flags=re.DOTALL)
    return encoded


# -------------------------------------------------------------------------------------------------------------- images
def is_image_file(path, folder):
    """Whether the path below `folder` has an image's suffix and is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path, folder)


def is_hidden(path, folder):
    """Whether the path below `folder`, or a folder on the way to it, has a name that starts with a dot."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def open_image(encoded):
    """Decodes an image to 8-bit sRGB as a viewer shows it: upright, by its colour profile, 16-bit greys scaled, alpha
    over white. Raises `OSError`, `ValueError` or `SyntaxError` if Pillow cannot read it to the end."""
    return in_srgb(*open_pixels(encoded))


def open_fitted(encoded, size, resample, place):
    """As `open_image`, scaled so that it covers `size`, a width and a height in pixels, and cropped to that at a
    `place`, which is (0, 0) for the upper left corner and (1, 1) for the lower right one."""
    # Twice the side leaves the resampling its work: measured, pixels of photos change by 0.2 of 255 in the mean.
    enough = None if resample == Image.Resampling.NEAREST else 2 * max(size)
    image, profile = open_pixels(encoded, enough)
    if image.mode == "CMYK":  # where shares of ink do not mix as light does
        image, profile = in_srgb(image, profile), b""
    # Colours are converted last: at full size a profile costs as much time as decoding.
    return in_srgb(ImageOps.fit(image, size, resample, centering=place), profile)


def open_pixels(encoded, enough=None):
    """Decodes an image to its own colours of 8 bits, RGB, L or CMYK, upright and alpha over white; returns it and its
    colour profile, or b"". A JPEG may come in half its size or less, if no side is then below `enough` pixels."""
    image = load_pixels(encoded, enough)
    profile, turn = image.info.get("icc_profile"), ORIENTATIONS.get(orientation_of(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white")
    if image.mode.startswith("I"):  # Pillow would saturate 16-bit greys
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    profiled_mode = {"CMYK": "CMYK", "L": "L", "LA": "L"}.get(image.mode, "RGB")  # which the profile is for
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != profiled_mode:
        image = image.convert(profiled_mode)
    return image, profile if isinstance(profile, bytes) else b""


def in_srgb(image, profile):
    """Converts an image of `open_pixels` from the colours of its profile to sRGB."""
    is_srgb = b"sRGB IEC61966" in profile.replace(b"\0", b"")  # as most are named, in letters of 1 or 2 bytes
    if profile and not is_srgb:
        with contextlib.suppress(ImageCms.PyCMSError):  # a viewer, too, ignores a profile that does not fit
            return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), 0, "RGB")
    return image.convert("RGB")


def load_pixels(encoded, enough):
    """Pillow's image, decoded to the end. Metadata that Pillow stumbles over is left out, as little as will do."""
    try:
        return decode_file(encoded, enough)
    except Exception:  # whatever a decoder stumbles over
        for kinds in ({TEXT}, {TEXT, PROFILE}, {TEXT, EXIF}, {TEXT, PROFILE, EXIF}):
            bare = without_metadata(encoded, kinds)
            if bare != encoded:
                with contextlib.suppress(Exception):
                    return decode_file(bare, enough)
        raise


def open_encoded(encoded):
    """Opens a file, which is not decoded yet, if it is of a format for images."""
    Image.init()
    return Image.open(io.BytesIO(encoded), formats=[name for name in FORMATS if name in Image.OPEN])


def decode_file(encoded, enough):
    """Opens a file and decodes it to the end; a JPEG in reduced size, if no side is then below `enough` pixels."""
    image = open_encoded(encoded)
    width, height = image.size
    for scale in (8, 4, 2):
        # Only where it divides both sides do the edges stay where they are.
        if enough and width % scale == height % scale == 0 and min(width, height) >= scale * enough:
            image.draft(None, (width // scale, height // scale))
            break
    image.load()
    return image


def orientation_of(image):
    """How the image is to be turned, a number in [1, 8] (Exif 2.32, section 4.6.4 A); 1, not at all, where the
    metadata does not tell."""
    with contextlib.suppress(Exception):  # broken EXIF raises whatever it likes
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def read_content(image):
    """The file of an image of a dataset's undecoded column, a dictionary of `bytes` or `path`."""
    content = image["bytes"]
    return Path(image["path"]).read_bytes() if content is None else content


@contextlib.contextmanager
def still_readable(name):
    """Raises `InputError`, which names the image, where one that was checked cannot be decoded any more."""
    try:
        yield
    except MemoryError:  # which is not the image's fault
        raise
    except Exception as error:  # whatever a decoder stumbles over
        told = f"changed since it was checked, and cannot be read now ({last_line(error)}); put it back or start again"
        raise InputError(f"{name}: {told}") from None


def check_image(image, known):
    """Opens one image, unless `known` has it; returns a key, of path, size and time or of the content where a dataset
    holds it, and [sha256, width, height, what is wrong or ""]."""
    try:
        encoded = image["bytes"]
        if encoded is not None:
            key = hashlib.sha256(encoded).hexdigest()
        else:
            status = os.stat(image["path"])
            if not stat.S_ISREG(status.st_mode):  # a reader of a pipe would wait for ever
                return None, ["", 0, 0, "is no regular file; remove it"]
            if status.st_size > MAX_FILE_BYTES:  # which may have a hole, and take no place on the disk
                return None, ["", 0, 0, f"{status.st_size:,} bytes, more than any picture that is opened; shrink it"]
            key = f"{os.path.abspath(image['path'])}|{status.st_size}|{status.st_mtime_ns}"
        if key in known:
            return key, known[key]
        encoded = read_content(image)
        width, height = open_image(encoded).size
        problem = ""
        if min(width, height) < MIN_SIDE:
            problem = f"{width} x {height} pixels; a side needs at least {MIN_SIDE}"
        return key, [hashlib.sha256(encoded).hexdigest(), width, height, problem]
    except FileNotFoundError:
        problem = "there is no such file"
    except TypeError:
        problem = "the row holds no image"
    except UnidentifiedImageError:
        problem = "no image that Pillow knows"
        if Path(image["path"] or "").suffix.lower() in FOREIGN_SUFFIXES:
            problem += "; convert it to JPEG or PNG"
    except Image.DecompressionBombError as error:
        pixels, limit = [int(number) for number in re.findall(r"\d+", str(error))]
        problem = f"{pixels:,} pixels, more than the {limit:,} that are opened; shrink it"
    except Exception as error:  # damaged files raise whatever a decoder stumbles over
        problem = f"cannot be read: {error}"
    return None, ["", 0, 0, problem]


def path_of_findings(place, cache_dir):
    """The file that remembers the check of the images in `place`, a folder or a dataset's name."""
    name = hashlib.sha256(os.path.abspath(place).encode()).hexdigest()[:16]
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "checked_images" / f"{name}.json"


def check_images(rows, memory):
    """Opens every image once, in parallel, and remembers `check_image`'s findings in the file `memory`; returns them,
    with what was wrong with a row as it was read, its `problem`, if it has that column. Of several processes the first
    one does it, the others read what it remembers. Raises `InputError`."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{memory}.lock").acquire()
    except OSError as error:
        raise InputError(f"--cache_dir: {memory.parent} cannot be used ({error.strerror}); name another") from None
    with lock:
        known = {}
        with contextlib.suppress(OSError, TypeError, ValueError):  # not there yet, or broken
            known = dict(json.loads(memory.read_text(encoding="utf-8")))
        findings, new = look_at_all(rows, known)
        if new:
            with contextlib.suppress(OSError), beside(memory) as unfinished:  # a full disk only costs time
                unfinished.write_text(json.dumps({**known, **new}), encoding="utf-8")
    if "problem" not in getattr(rows, "column_names", ()):
        return findings
    return [[*found, told or problem] for (*found, problem), told in zip(findings, rows["problem"], strict=True)]


def look_at_all(rows, known):
    """Returns `check_image`'s findings of all rows, and what of them is to be added to `known`. A dataset that holds
    its images is known as a whole, by its fingerprint, so that nothing of it is read again."""
    listings, name = known.get(LISTINGS, {}), getattr(rows, "_fingerprint", None)
    keys = listings.get(name) or [None] * len(rows)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
        results = pool.map(lambda index: check_row(rows, index, keys[index], known), range(len(rows)))
        results = list(tqdm(results, "Checking images", len(rows), unit="image", disable=None, leave=False))
    new = {key: finding for key, finding in results if key and key not in known}
    by_content = [key if key == finding[0] else None for key, finding in results]  # other keys are paths
    if name and any(by_content) and by_content != keys:
        latest = list({**listings, name: by_content}.items())[-4:]  # other choices of rows may be in use too
        new[LISTINGS] = dict(latest)
    return [finding for _, finding in results], new


def check_row(rows, index, key, known):
    """As `check_image`; does not read the row where `known` has its key."""
    return (key, known[key]) if key in known else check_image(rows[index]["image"], known)


def leave_out(bad, num_images, may_leave_out, remedy="", are_of_stream=False):
    """Tells which of so many images are left out: `bad` are lines of a path and what is wrong. Raises `InputError`
    with these, and one more `remedy`, unless images may be left out; those that are held out of a stream always
    may."""
    if not bad:
        return
    without = [line for line in bad if line.endswith(NO_CAPTION)]
    others = [line for line in bad if not line.endswith(NO_CAPTION)]  # first: a list is cut, and one of them may stop
    are = "is" if len(bad) == 1 else "are"
    number = f"{len(bad)} of {counted(num_images, 'image')} {are} unusable"
    if without:
        number += f", {len(without)} of them for lack of a caption"
    unusable = "\n  ".join([f"{number}:", *map(printable, (others + without)[:100])])
    if not may_leave_out:
        choice = "use a larger --num_validation_samples" if are_of_stream else "add --skip_bad_images"
        mend = f"{HOW_TO_CAPTION}; mend" if without else "Mend"
        raise InputError(f"{unusable}\n{mend} or remove them, or {choice}{remedy}.")
    why = "of what is held out" if are_of_stream else "(--skip_bad_images)"
    print(f"Left out {why}: {unusable}")


# -------------------------------------------------------------------------------------------------------- lora_layouts
def to_kohya(weights, alphas):
    """Renames adapters to kohya's layout: lora_unet_ or lora_te_text_model_, the layer's name with underscores, and
    .lora_down.weight (rank, in, ...), .lora_up.weight (out, rank, ...), .alpha, with DoRA .dora_scale (out, 1, ...).
    A layer's effect is lora_up @ lora_down * alpha / rank, with its alpha in `alphas`, {layer: alpha}."""
    renamed = {}
    for key, weight in weights.items():
        layer, kind = split_weight_name(key)
        name = layer.replace("text_encoder.", "lora_te_text_model.", 1).replace("unet.", "lora_unet.", 1)
        name = name.replace(".", "_")
        if kind == "lora_magnitude_vector":
            ones = [1] * (weights[f"{layer}.lora_A.weight"].ndim - 1)
            renamed[f"{name}.dora_scale"] = weight.reshape(-1, *ones).contiguous()
            continue
        side = "lora_down" if kind == "lora_A" else "lora_up"
        renamed[f"{name}.{side}.weight"] = weight.contiguous()
        exact = torch.tensor(float(alphas[layer]))
        short = exact.to(weight.dtype)
        renamed[f"{name}.alpha"] = short if short == exact else exact  # half precision rounds what rsLoRA needs
    return renamed


def split_weight_name(key):
    """The layer, and which of its tensors, of a name that `lora_weights` gives: lora_A, lora_B or
    lora_magnitude_vector."""
    return re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", key).groups()


def published_names(weights):
    """Adapters by the names of published files, text_encoder.text_model.encoder and so on, which libraries before
    transformers 5 need; later ones read both."""
    return {re.sub(r"^text_encoder\.", "text_encoder.text_model.", key): value for key, value in weights.items()}


# -------------------------------------------------------------------------------------------------------------- models
def quiet_libraries():
    """Turns off the bars and remarks of libraries, which would drown ours."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # diffusers imports bitsandbytes, which warns on a CPU that it lacks a kernel for models in 4 bits: here are none.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # diffusers itself gives this argument, when it reads a config from the Hub.
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated")
    if huggingface_hub.constants.HF_HUB_OFFLINE:  # or it would say at each model that it is
        huggingface_hub.utils.logging.set_verbosity_error()
    if not torch.accelerator.is_available():
        # Or DeepSpeed, which accelerate imports to save a model, wherever it is installed, says that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def config_source(args):
    """Where the configs and the tokenizer of the base are read from: (folder or Hub id, keywords of its loaders)."""
    return (
        args.single_file_config or args.pretrained_model_name_or_path,
        {"revision": args.revision, **how_to_reach(args)},
    )


def how_to_reach(args):
    """Keywords of what loads from the Hub: where that is kept, and a token, by which private models are reached."""
    return {"cache_dir": args.cache_dir, "token": args.hub_token}


def check_model(args):
    """Lists what is wrong with the base's configs, or between them and the flags; reads no weights."""
    source = args.pretrained_model_name_or_path or ""
    name = f"--pretrained_model_name_or_path={source}"
    single_file = source.endswith((".ckpt", ".safetensors"))
    problems = []
    if args.revision and Path(source).exists():
        problems.append(f"--revision={args.revision}: does nothing without a model on the Hub; drop this")
    if args.variant and args.single_file_config:
        problems.append(f"--variant={args.variant}: does nothing with a single file; drop this")
    if not source:
        told = "is missing: name a pipeline folder, a Hub id or a file"
        return [*problems, f"--pretrained_model_name_or_path {told}"]
    if remedy := remedy_for_missing(source):
        return [*problems, f"{name}: does not exist; {remedy}"]
    if single_file and not Path(source).is_file():
        return [*problems, f"{name}: there is no such file; name a pipeline folder, a Hub id or a file"]
    if single_file and not args.single_file_config:
        return [*problems, f"{name}: a single file needs --single_file_config (see --help); add that"]
    if args.single_file_config and not single_file:
        told = "is for a single file alone"
        return [*problems, f"--single_file_config={args.single_file_config}: {told}; drop this, or name one as model"]

    source, where = config_source(args)
    try:
        parts = diffusers.StableDiffusionPipeline.load_config(source, **where)
        if foreign := {"text_encoder_2", "transformer"} & parts.keys():
            remedy = "use a Stable Diffusion 1.x or 2.x model"
            return [*problems, f"{name}: has a {min(foreign)} (SDXL, SD 3 or the like); {remedy}"]
        if strange := foreign_code(parts):
            return [*problems, f"{name}: {strange}"]
        unet = diffusers.UNet2DConditionModel.load_config(source, subfolder="unet", **where)
        vae = diffusers.AutoencoderKL.load_config(source, subfolder="vae", **where)
        scheduler = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler", **where)
        text_config = transformers.CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", **where)
        text_settings = transformers.CLIPTextConfig.get_config_dict(source, subfolder="text_encoder", **where)[0]
        if not text_settings:
            raise OSError("it has no text encoder")  # for which transformers would take a default
        if strange := foreign_kernel(text_settings):
            return [*problems, f"{name}: its text_encoder {strange}"]
        if len(transformers.CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **where)) < 3:
            raise OSError("its tokenizer knows no words")  # nor does transformers' for a folder without one
    except (OSError, ValueError) as error:
        return [*problems, f"{source}: {tell_no_pipeline(source, error)}"]

    problems += check_tokenizer(args, text_config)
    factor = vae_factor(vae)
    if args.resolution % factor:
        usable = args.resolution // factor * factor or factor
        problems.append(f"--resolution={args.resolution}: must be a multiple of {factor} for this VAE; use {usable}")
    if unet["in_channels"] != vae["latent_channels"]:
        problems.append(f"{name}: its UNet takes {unet['in_channels']} channels; use a text-to-image model")
    variant = None if args.variant or args.single_file_config else only_variant(source)
    if variant:
        problems.append(f"{name}: holds {variant} weights alone; add --variant={variant}")
    prediction_type = args.prediction_type or scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        problems.append(f"{name}: predicts {prediction_type!r}; only epsilon and v_prediction can be trained")
    zero_snr = args.rescale_betas_zero_snr or scheduler.get("rescale_betas_zero_snr")
    if prediction_type == "epsilon" and zero_snr:
        problems.append("--rescale_betas_zero_snr: useless for epsilon; drop it or add --prediction_type=v_prediction")
    if prediction_type == "v_prediction" and zero_snr and args.snr_gamma:
        given, remedy = "--rescale_betas_zero_snr", "drop one"
        if not args.rescale_betas_zero_snr:
            given, remedy = "the zero terminal SNR of this base", "drop this"
        problems.append(
            f"--snr_gamma={args.snr_gamma}: with {given} the last timesteps, for which betas are rescaled, would get "
            f"no weight (arXiv 2305.08891 trains by the plain loss); {remedy}"
        )
    return problems


def tell_no_pipeline(source, error):
    """What is wrong with a folder or Hub id whose configs cannot be read, for an exception."""
    if told := tell_checkpoint(source):
        return told
    if Path(source, LORA_FILE).is_file():
        return "holds LoRA weights; name the model that they were trained on"
    return tell_unread("whole pipeline", source, error, "name one that is whole")


def tell_checkpoint(source):
    """What to do with a folder that is a checkpoint of a training, where a model is wanted; "" if it is none."""
    if not Path(source, "progress.json").is_file():
        return ""
    return f"is a checkpoint of a training; make a model of it by `sdtune export {shlex.quote(str(source))} OUTPUT`"


def tell_unread(what, source, error, remedy="name another"):
    """What is wrong with a folder or Hub id that should be a `what` and cannot be read, for an exception. Libraries
    speak of a connection where a path is wrong, too, and where nobody wants one."""
    if os.path.exists(source):
        return f"no {what} ({last_line(error)}); {remedy}"
    told = f"there is no such folder here{nearest_beside(source)}"
    if not is_repo_name(source):
        return f"{told}; {remedy}"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return f"{told}, no whole copy in the Hub's cache, and HF_HUB_OFFLINE=1 is set; drop that, or {remedy}"
    if missing_here(source):
        told += "; looked for a model of that name on the Hub too, which cannot be loaded"
    else:
        told = f"no {what}, no name of one on the Hub, or no connection"
    return f"{told} ({last_line(error)}); {remedy}"


def is_repo_name(source):
    """Whether the Hub can have a repository of that name, with or without an owner."""
    try:
        huggingface_hub.utils.validate_repo_id(source)
    except ValueError:
        return False
    return True


def foreign_code(parts):
    """What is wrong with a pipeline's model_index.json that names classes of others, which are not run, or None."""
    kind = parts.get("_class_name", "")
    if not isinstance(kind, str):
        return f"its model_index.json names code of its own, {kind}, which is not run; use another model"
    for part, entry in parts.items():
        if not part.startswith("_") and isinstance(entry, list | tuple) and entry and entry[0] not in LIBRARIES:
            told = f"its {part} is of {'.'.join(map(str, entry))}, code that is not run"
            return f"{told}; use a model whose parts are of diffusers and transformers"
    return None


def only_variant(folder):
    """The variant, such as fp16, in the names of a pipeline folder's UNet, if there are no weights without one."""
    pattern = r"diffusion_pytorch_model[-\w]*(?:\.(\w+))?\.(?:safetensors|bin|msgpack)"  # the dash is of parts
    matches = [re.fullmatch(pattern, path.name) for path in Path(folder, "unet").glob("*")]
    variants = {match.group(1) for match in matches if match}
    return None if None in variants else min(variants, default=None)


def vae_factor(config):
    """Pixels along one side of a latent, of a VAE with this config: 8 for Stable Diffusion's."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def load_tokenizer(args):
    """The tokenizer, the base's or that of --tokenizer_name, which cuts captions where the text encoder has to."""
    source, where = config_source(args)
    if args.tokenizer_name:
        tokenizer = load_named_tokenizer(args)
    else:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **where)
    text_config = transformers.CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", **where)
    tokenizer.model_max_length = args.tokenizer_max_length or text_config.max_position_embeddings
    return tokenizer


def load_named_tokenizer(args):
    """The tokenizer of --tokenizer_name, whose own code is not run: else transformers asks in the terminal."""
    return transformers.AutoTokenizer.from_pretrained(
        args.tokenizer_name, trust_remote_code=False, **how_to_reach(args)
    )


def parts_instead(args):
    """The parts of a pipeline that flags put in the place of the base's, by name."""
    return {"tokenizer": load_tokenizer(args)} if args.tokenizer_name or args.tokenizer_max_length else {}


def check_tokenizer(args, text_config):
    """Lists what is wrong between the tokenizer that flags name and the text encoder, whose config is given."""
    problems, length = [], text_config.max_position_embeddings
    if args.tokenizer_max_length and args.tokenizer_max_length > length:
        problems.append(
            f"--tokenizer_max_length={args.tokenizer_max_length}: the text encoder takes {length} at most; use that"
        )
    if not args.tokenizer_name:
        return problems
    name = f"--tokenizer_name={args.tokenizer_name}"
    try:
        highest = max(load_named_tokenizer(args).get_vocab().values())
    except Exception as error:  # every format has its own way of being broken
        return [*problems, f"{name}: {tell_unread('folder of a tokenizer', args.tokenizer_name, error)}"]
    if highest >= text_config.vocab_size:
        told = (
            f"has {highest + 1:,} tokens, the text encoder knows {text_config.vocab_size:,}; use the one that it had"
        )
        problems.append(f"{name}: {told}")
    return problems


def read_latent_layout(args):
    """How many channels the latents of the base's VAE have, and how many pixels along a side one of them stands for:
    4 and 8 for Stable Diffusion."""
    source, where = config_source(args)
    vae = diffusers.AutoencoderKL.load_config(source, subfolder="vae", **where)
    return vae["latent_channels"], vae_factor(vae)


def read_num_timesteps(args):
    """How many timesteps the base was trained on: 1000 for Stable Diffusion."""
    source, where = config_source(args)
    schedule = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler", **where)
    return schedule.get("num_train_timesteps", 1000)


def load_base(args, **given):
    """Loads the base's pipeline in float32, without its safety checker; parts that are `given`, by name, take the
    place of the base's, which are not loaded. Raises `InputError`."""
    base, (source, where) = args.pretrained_model_name_or_path, config_source(args)
    parts = {**parts_instead(args), **given}
    try:
        refuse_foreign_code(source, **where)
        if args.single_file_config:  # a .ckpt is read as weights only
            return diffusers.StableDiffusionPipeline.from_single_file(
                base, config=args.single_file_config, dtype=torch.float32, safety_checker=None, **where, **parts
            )
        options = {"dtype": torch.float32, "variant": args.variant, "safety_checker": None}
        return diffusers.StableDiffusionPipeline.from_pretrained(base, **where, **options, **parts)
    except Exception as error:  # every format has its own way of being broken
        if list(Path(base).glob("unet/*.msgpack")) and not list(Path(base).glob("unet/*.[sb]*")):
            told = "has Flax weights alone; use train_text_to_image_flax.py, whose result has PyTorch's too"
            raise InputError(f"{base}: {told}") from None
        raise InputError(f"{base}: cannot be loaded ({reason_of(error)}); mend it, or use another") from None


def foreign_kernel(config):
    """What is wrong with a config of transformers that names code on the Hub for its attention, which is fetched and
    run where `kernels` is installed, or None."""
    for key, value in config.items():
        if isinstance(value, dict) and (strange := foreign_kernel(value)):
            return strange
        if str(key).endswith("_implementation") and re.search(r"[/:]", str(value)):
            return f"asks for code on the Hub, {value}, as {key}, which is not run; remove that from its config.json"
    return None


def refuse_foreign_code(base, **where):
    """Raises `InputError` for a pipeline with classes of others, modules of which diffusers would import, or with a
    text encoder whose attention is code on the Hub."""
    if strange := foreign_code(diffusers.StableDiffusionPipeline.load_config(base, **where)):
        raise InputError(strange)
    if strange := foreign_kernel(
        transformers.CLIPTextConfig.get_config_dict(base, subfolder="text_encoder", **where)[0]
    ):
        raise InputError(f"its text_encoder {strange}")


def reason_of(error):
    """Why weights cannot be loaded, in a line."""
    cause = error
    while cause is not None:
        if type(cause).__name__ == "UnpicklingError":
            return "a file holds more than weights, maybe code, which is not run; get it as .safetensors"
        cause = cause.__cause__ or cause.__context__
    return last_line(error)


def enable_memory_savers(args, unet, device, dtype):
    """Turns on what makes a UNet's passes smaller, as the flags ask for; they will be on a device and in a precision.
    Raises `InputError`."""
    if args.enable_xformers_memory_efficient_attention:
        from diffusers.models.attention_processor import XFormersAttnProcessor

        try:
            probe_xformers(unet, device, dtype)
        except Exception as error:  # xFormers has one for every mismatch
            told = f"xFormers cannot run here in {dtype} ({last_line(error)}); drop this"
            raise InputError(f"--enable_xformers_memory_efficient_attention=True: {told}") from None
        unet.set_attn_processor(XFormersAttnProcessor())
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()


def make_faster(args, unet):
    """Compiles the blocks of a UNet, in its first pass, and lays out its weights, as the flags ask for."""
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)  # which what convolutions give then has too
    if args.compile:
        # A program for each width of the blocks, for training and for drawing: more than it would keep otherwise.
        torch._dynamo.config.recompile_limit = 64
        unet.compile_repeated_blocks(dynamic=True)  # for sizes of images and batches that vary


def probe_xformers(unet, device, dtype):
    """Raises what xFormers raises, if it has no attention for the sizes of a UNet's heads, forward or backward. Where
    diffusers enables it, float32 is probed whatever the precision."""
    from diffusers.models.attention_processor import Attention
    from xformers.ops import memory_efficient_attention

    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    for size in sorted({module.inner_dim // module.heads for module in attentions}):
        query = torch.ones(1, 2, size, device=device, dtype=dtype, requires_grad=True)
        with torch.enable_grad():
            memory_efficient_attention(query, query, query).sum().backward()


def make_noise_scheduler(args, pipeline):
    """The scheduler that adds noise in training, for the objective that the flags name or else the base's."""
    changes = {}
    if args.prediction_type:
        changes["prediction_type"] = args.prediction_type
    if args.rescale_betas_zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return diffusers.DDPMScheduler.from_config(pipeline.scheduler.config, **changes)


def frozen(model, device, dtype):
    """The model itself, which is only used and not trained from now on, on a device in `dtype`."""
    return model.requires_grad_(False).eval().to(device, dtype=dtype)


def drop_weights(model, still_needed):
    """Takes a frozen model off its device: into the CPU's memory where it is `still_needed` now and then, else only
    its config stays."""
    model.to("cpu" if still_needed else "meta")


@contextlib.contextmanager
def on_device(device, *models):
    """Moves models to a device for a while, and then to where they were."""
    places = [model.device for model in models]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, place in zip(models, places, strict=True):
            model.to(place)


def numel_of(parameter):
    """How many numbers a parameter has, in all processes together: where DeepSpeed shares it out, it seems empty."""
    return getattr(parameter, "ds_numel", parameter.numel())


# ------------------------------------------------------------------------------------------------------------- entries
def digest_of(*values):
    """A SHA-256 of values that JSON can write."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digest_of_model(model):
    """A SHA-256 of a model's weights and of its config."""
    weights = model.state_dict()
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        digests = list(pool.map(digest_of_tensor, weights.values()))
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    plain = {
        key: str(value) for key, value in config.items() if not key.startswith("_") and key not in NOT_OF_THE_WEIGHTS
    }
    return digest_of(plain, list(zip(weights, digests, strict=True)))


def digest_of_tensor(tensor):
    """A SHA-256 of a tensor's bytes and shape."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def path_of_image(cache, content, width, height, is_mirrored):
    """The file of an encoded image, of the SHA-256 of its file, fitted to so many pixels."""
    name = hashlib.sha256(f"{cache.images} {content} {width} {height} {bool(is_mirrored)}".encode()).hexdigest()
    return f"{cache.folder}/latents/{name[:2]}/{name}.safetensors"


def path_of_caption(cache, input_ids):
    """The file of an encoded caption, of its padded tokens (tokens,)."""
    name = hashlib.sha256(f"{cache.captions} ".encode() + input_ids.astype("<i8").tobytes()).hexdigest()
    return f"{cache.folder}/captions/{name[:2]}/{name}.safetensors"


def checksum(arrays):
    """A checksum of arrays by name."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(arrays[name], total)
    return f"{total:08x}"


def write_entry(path, arrays):
    """Writes arrays in float32, by name, so that the file appears when it is complete."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # safetensors takes any for such
    with beside(path) as new:
        new.write_bytes(safetensors.numpy.save(arrays, {"crc32": checksum(arrays)}))


def read_entry(path, shapes):
    """Reads an entry through the memory map of its file; its arrays, in float32, have to be of the `shapes`, by name.
    Raises `OSError`, or `ValueError` for one that is broken."""
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            wanted = (file.metadata() or {}).get("crc32")
    except SafetensorError as error:
        raise ValueError(last_line(error)) from None
    found = {name: array.shape for name, array in arrays.items()}
    if found != shapes or any(array.dtype.name != "float32" for array in arrays.values()):
        raise ValueError("it holds other tensors")
    if checksum(arrays) != wanted:
        raise ValueError("its checksum is not that of its content")
    return arrays


def check_entry(path, shapes):
    """Raises `OSError` or `ValueError` for an entry that `read_entry` would refuse; its tensors lie by their names."""
    with open(path, "rb") as file:
        content = file.read()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])  # UnicodeDecodeError and JSONDecodeError are a ValueError
    wanted = header.pop("__metadata__", {}).get("crc32")
    found = {name: tuple(tensor["shape"]) for name, tensor in header.items() if tensor["dtype"] == "F32"}
    if found != shapes or f"{zlib.crc32(memoryview(content)[start:]):08x}" != wanted:
        raise ValueError("its content is another")


def read_whole_entry(path, shapes):
    """As `read_entry`, in the middle of a run. Raises `InputError`."""
    try:
        return read_entry(path, shapes)
    except (OSError, ValueError) as error:
        told = f"this entry of the cache was removed or broken meanwhile ({last_line(error)}); start again"
        raise InputError(f"{path}: {told}, which makes it anew") from None


# -------------------------------------------------------------------------------------------------------------- shards
def all_captions(captions):
    """The usable captions of a row that holds a string or a list of them. Raises `ValueError` for half a character,
    and `InputError` for numbers."""
    captions = captions if isinstance(captions, list) else [captions]
    usable = [caption for caption in captions if isinstance(caption, str) and caption.encode() and caption.strip()]
    # One that is not equal to itself stands for a caption that is missing.
    numbers = [caption for caption in captions if isinstance(caption, int | float) and caption == caption]
    if numbers and not usable:
        raise InputError(f"the caption is a number ({numbers[0]}), not text; name another --caption_column")
    return usable


def without_empty(data_files, dataset_name):
    """Of local data files those that are no empty shards, which are told. Raises `InputError` for shards that are
    broken, as far as their beginning or, of parquet, their end shows that."""
    kinds = {path.suffix.lower() for path in data_files}
    shards = [path for path in data_files if path.suffix.lower() == (".tar" if ".tar" in kinds else ".parquet")]
    empty, broken = [], []
    for path in shards:
        try:
            if is_empty(path):
                empty.append(path)
        except tarfile.TarError:
            broken.append(f"{in_one_line(path.name)}: is no tar file")
        except (OSError, EOFError, ValueError) as error:  # arrow's are among them
            broken.append(f"{in_one_line(path.name)}: {last_line(error)}")
    told = f"--dataset_name={dataset_name}"
    if broken:
        raise InputError("\n  ".join([f"{told}: shards are broken; mend or remove these", *broken]))
    if shards and len(empty) == len(shards):
        raise InputError(f"{told}: holds nothing but empty shards, such as {in_one_line(empty[0].name)}; name another")
    if empty:
        names = ", ".join(in_one_line(path.name) for path in empty[:5])
        print(f"Left out of {in_one_line(dataset_name)}: {counted(len(empty), 'empty shard')}, such as {names}.")
    return [path for path in data_files if path not in empty]


def is_empty(path):
    """Whether a parquet or tar file has no row or file in it. Raises what a broken one leads to."""
    if os.path.getsize(path) == 0:
        return True
    if path.suffix.lower() == ".parquet":
        return pyarrow.parquet.read_metadata(path).num_rows == 0
    with tarfile.open(path, "r|*") as file:
        return file.next() is None


def find_broken(shards):
    """The name of the first of local parquet files that cannot be read to its end, or None."""
    for path in shards:
        if path.suffix.lower() == ".parquet":
            try:
                for _ in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=16):
                    pass
            except (OSError, ValueError):
                return in_one_line(path.name)
    return None


def read_tars(paths, names, image_column, caption_column, token=None):
    """Yields the samples of tar files, local ones or on the Hub, as rows of ROW_FEATURES. Raises `InputError` for a
    file that cannot be read, by its name."""
    for path, name in zip(paths, names, strict=True):
        number = 0
        try:
            for key, files in samples_of(path, image_column, caption_column, token):
                yield row_of(key, files, image_column, caption_column)
                number += 1
        except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
            told = f"cannot be read beyond row {number} ({last_line(error)}); mend or remove it"
            raise InputError(f"{in_one_line(name)}: {told}") from None


def samples_of(path, image_column, caption_column, token=None):
    """Yields of each sample of a tar file its name without suffix, and its files: their content by suffix, or None
    for those that neither column needs. Raises what a broken file leads to."""
    wanted = [*caption_suffixes(caption_column), "json"]
    manager = datasets.StreamingDownloadManager(download_config=datasets.DownloadConfig(token=token))
    key, files = None, {}
    try:
        for name, file in manager.iter_archive(path):
            folder, _, base = name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if not (stem and dot):
                continue
            if key != (folder, stem):
                if files:
                    yield "/".join(filter(None, key)), files
                key, files = (folder, stem), {}
            is_needed = suffix in wanted or is_image(suffix, image_column)
            files[suffix] = file.read() if is_needed else None
    except tarfile.ReadError as error:
        if str(error) != "empty file":
            raise
    if files:
        yield "/".join(filter(None, key)), files


def is_image(suffix, image_column):
    """Whether a file with this suffix is what --image_column means: by default any image."""
    is_any = image_column == "image" and f".{suffix.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES
    return is_any or suffix == image_column


def caption_suffixes(caption_column):
    """The suffixes that --caption_column means, but for fields of a .json."""
    return ("text", "txt") if caption_column == "text" else (caption_column,)


def caption_fields(caption_column):
    """The fields of a .json that --caption_column means."""
    return ("text", "caption") if caption_column == "text" else (caption_column,)


def row_of(key, files, image_column, caption_column):
    """A sample as a row of ROW_FEATURES."""
    images = [suffix for suffix in files if is_image(suffix, image_column)]
    suffix = images[0] if images else next(iter(files))
    row = {"image": {"bytes": files[suffix] if images else b"", "path": f"{key}.{suffix}"}}
    try:
        row["captions"] = captions_of(files, caption_column)
    except ValueError as error:  # `InputError` is one
        return {**row, "captions": [], "problem": str(error)}
    if len(images) > 1 and all("." in suffix for suffix in images):
        told = (
            f"{len(images)} images are one sample, whose name ends at the first dot; rename files with dots in names"
        )
        return {**row, "problem": told}
    if not images:
        there = ", ".join(f".{suffix}" for suffix in files)
        told = f"there is no image to it, but {there}; files of a sample have to follow each other"
        return {**row, "problem": told}
    return {**row, "problem": None}


def captions_of(files, caption_column):
    """The captions of a sample. Raises `ValueError` for those that are not text."""
    for suffix in caption_suffixes(caption_column):
        if suffix in files:
            try:
                return all_captions(files[suffix].decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise ValueError(f"its caption, a .{suffix}, is not UTF-8; convert it") from None
    fields = fields_of(files)
    found = [fields[name] for name in caption_fields(caption_column) if fields.get(name) is not None]
    return all_captions(found[0]) if found else []


def fields_of(files):
    """The fields of a sample's .json, if there is one. Raises `ValueError` if it cannot be read."""
    try:
        fields = json.loads(files.get("json") or b"{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json cannot be read ({last_line(error)})") from None
    return fields if isinstance(fields, dict) else {}


def check_columns(paths, image_column, caption_column, needs_caption=True, token=None):
    """Looks at the first samples of tar files until an image is found, and a caption if it needs one. Raises
    `ValueError` if none has what the columns mean, and lists what there is; a file that is broken is told when it is
    read."""
    samples = itertools.chain.from_iterable(samples_of(path, image_column, caption_column, token) for path in paths)
    suffixes, fields, has_image, has_caption = {}, {}, False, False
    number = 0
    with contextlib.suppress(OSError, EOFError, zlib.error, tarfile.TarError):
        for _, files in itertools.islice(samples, NUM_LOOKED_AT):
            number += 1
            suffixes |= files
            with contextlib.suppress(ValueError):
                fields |= fields_of(files)
            has_image = any(is_image(suffix, image_column) for suffix in suffixes)
            has_caption = suffixes.keys() & {*caption_suffixes(caption_column)}
            has_caption = not needs_caption or has_caption or fields.keys() & {*caption_fields(caption_column)}
            if has_image and has_caption:
                return
        there = ", ".join(map(in_one_line, [*suffixes, *fields]))
        missing = caption_column if has_image else image_column
        told = f"of the first {number} samples none has a column {missing!r}, but {there or 'nothing'}"
        raise ValueError(told if number else f"there is no column {missing!r}: there are no samples")


# ------------------------------------------------------------------------------------------------------------- buckets
def bucket_rule(args):
    """The rule that the flags give."""
    resolution = args.resolution
    return BucketRule(
        resolution=resolution,
        step=args.bucket_step or min(LARGEST_STEP, max(resolution // 64 * 8, 8)),
        smallest=args.bucket_min or math.ceil(resolution / 2),
        largest=args.bucket_max or 2 * resolution,
        upscale=not args.bucket_no_upscale,
    )


def check_buckets(args):
    """Lists what is wrong with the buckets that the flags ask for, or between them and the base's VAE."""
    problems = check_bucket_rule(args)
    if args.aspect_ratio_buckets:
        step, factor = bucket_rule(args).step, 1
        with contextlib.suppress(Exception):  # a base that cannot be read is told by `check_model`
            _, factor = read_latent_layout(args)
        if step % factor:
            usable = step // factor * factor or factor
            problems.append(f"--bucket_step={step}: must be a multiple of {factor} for this VAE; use {usable}")
    return problems


def check_bucket_rule(args):
    """Lists what contradicts itself in the buckets that the flags ask for."""
    if not args.aspect_ratio_buckets:
        return []
    problems, rule, resolution = [], bucket_rule(args), args.resolution
    if rule.step > resolution:
        problems.append(f"--bucket_step={rule.step}: must be at most --resolution={resolution}; use a smaller one")
    if rule.smallest > resolution:
        problems.append(f"--bucket_min={rule.smallest}: must be at most --resolution={resolution}; use a smaller one")
    if rule.largest < resolution:
        problems.append(f"--bucket_max={rule.largest}: must be at least --resolution={resolution}; use a larger one")
    if not problems and not len(list_buckets(rule)):
        problems.append(
            f"--bucket_step={rule.step}: no size of --resolution={resolution} has sides of {rule.smallest} to "
            f"{rule.largest}; use a smaller step, or a smaller --bucket_min"
        )
    return problems


def list_buckets(rule):
    """All buckets (num_buckets, 2), width and height in pixels, in the order of their ratio: for each width the
    largest height whose area is not above the resolution's square, the same turned, and the square."""
    step, sizes = rule.step, set()
    for width in range(math.ceil(rule.smallest / step) * step, rule.largest + 1, step):
        height = min(rule.resolution**2 // width, rule.largest) // step * step
        sizes |= {(width, height), (height, width)}
    square = rule.resolution // step * step
    sizes.add((square, square))
    largest_of = {}  # by ratio
    for width, height in sorted(sizes):
        if min(width, height) >= rule.smallest:
            largest_of[width / height] = (width, height)
    return np.array([largest_of[ratio] for ratio in sorted(largest_of)], int).reshape(-1, 2)


def fit_to_buckets(rule, sizes):
    """The size to which each picture is scaled and cropped (num_images, 2), of their `sizes` (num_images, 2): of the
    bucket whose ratio is nearest by the logarithm, in which 2 : 1 is as far from 1 : 1 as 1 : 2. Without upscaling a
    picture that does not cover its bucket gets a size of its own: its own one, or what of it keeps within area and
    largest side, rounded down to the step."""
    buckets, sizes = list_buckets(rule), np.asarray(sizes)
    log_ratios = np.log(buckets[:, 0] / buckets[:, 1])
    halfway = (log_ratios[1:] + log_ratios[:-1]) / 2
    fitted = buckets[np.searchsorted(halfway, np.log(sizes[:, 0] / sizes[:, 1]))]
    if rule.upscale:
        return fitted
    own = sizes * np.minimum(rule.largest / sizes.max(axis=1), 1)[:, None]
    own = own * np.minimum(rule.resolution / np.sqrt(own.prod(axis=1)), 1)[:, None]
    # A hair more, for what rounding takes from a side that is a multiple of the step.
    own = np.maximum(((own + 1e-6) // rule.step).astype(int), 1) * rule.step
    return np.where((sizes < fitted).any(axis=1)[:, None], own, fitted)


def fit_of(args):
    """The function that gives, for the sizes of pictures (num_images, 2), those to which they are fitted; None without
    buckets."""
    return functools.partial(fit_to_buckets, bucket_rule(args)) if args.aspect_ratio_buckets else None


def cropped_shares(picture_sizes, sizes):
    """The share of each picture (num_images,) that is cropped away where it is scaled so that it covers its size."""
    scales = (sizes / picture_sizes).max(axis=1)
    return 1 - (sizes / picture_sizes).prod(axis=1) / scales**2


def describe_buckets(args, images):
    """Lines on how many images are in which bucket, the fullest first, and on what of the pictures is cropped away;
    none without buckets."""
    if not args.aspect_ratio_buckets:
        return []
    shapes, numbers = np.unique(images.sizes, axis=0, return_counts=True)
    fullest = np.argsort(-numbers, kind="stable")
    lines = []
    for width, height, number in np.column_stack([shapes, numbers])[fullest[:NUM_SHOWN]].tolist():
        lines.append(f"{width} x {height}: {number:,}")
    if len(shapes) > NUM_SHOWN:
        left = int(numbers[fullest[NUM_SHOWN:]].sum())
        lines.append(f"and {len(shapes) - NUM_SHOWN:,} more: {left:,}")
    shares = cropped_shares(images.picture_sizes, images.sizes)
    worst = int(shares.argmax())
    name = os.path.basename(name_of(images.rows, worst))
    at_worst = f", {shares[worst]:.1%} at worst, of {name}" if shares[worst] >= 0.001 else ""
    return [*lines, f"cropped away: {shares.mean():.1%} of a picture on average{at_worst}"]


def warn_of_short_steps(counts):
    """Lists whether there are buckets that do not fill a step."""
    if counts.buckets is None:
        return []
    numbers = np.bincount(counts.buckets)
    num_small = int((numbers < counts.samples_per_step).sum())
    told = f"{num_small} of {len(numbers)} buckets; a larger --bucket_step makes fewer"
    return [f"too few images for a whole step in {told}"] if num_small else []


# ---------------------------------------------------------------------------------------------------------------- lora
def kohya_name(args):
    """The name, without suffix, of the file in kohya's layout."""
    return (args.kohya_file_name or Path(args.output_dir).resolve().name).removesuffix(".safetensors")


def check_adapters(args):
    """Lists what is wrong with the name of kohya's file, or between adapters, layers and the file to go on from. The
    flags of the model have to be right."""
    name = kohya_name(args)
    is_path = Path(name).name != name
    if args.output_kohya_format and (is_path or f"{name}.safetensors" == LORA_FILE):
        return [f"--kohya_file_name={name}: is a path, or the name of the other file; give another name"]
    adapters = args.init_lora_weights
    if adapters and not os.path.exists(adapters):
        told = f"--init_lora_weights={adapters}: there is no such file{nearest_beside(adapters)}"
        return [f"{told}; name a LoRA file, or a folder that these scripts wrote"]
    source, where = config_source(args)
    with torch.device("meta"):  # layers without weights
        unet_config = diffusers.UNet2DConditionModel.load_config(source, subfolder="unet", **where)
        models = {"unet": diffusers.UNet2DConditionModel.from_config(unet_config)}
        if args.train_text_encoder:
            text_config = transformers.CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", **where)
            models["text_encoder"] = transformers.CLIPTextModel(text_config)
        try:
            add_adapters(args, models)
        except Exception as error:  # of the file system, the format, or the layers
            flag = "init_lora_weights" if args.init_lora_weights else "lora_target"
            told = f"cannot be used with these flags and model ({last_line(error)})"
            return [f"--{flag}={getattr(args, flag)}: {told}"]
    return []


def add_adapters(args, models):
    """Adds adapters in float32 to the `unet` and maybe `text_encoder` of `models`, new ones or those in a file: W + B
    A alpha / rank, with A (rank, in) and B (out, rank), arXiv 2106.09685, section 4.1. Raises `ValueError` if no layer
    is a target or if the file does not fit, or what reading it raises."""
    import peft  # here, since with all that it brings it takes a second, for which --help does not wait

    torch.manual_seed(args.seed)
    for model in models.values():
        model.add_adapter(
            peft.LoraConfig(
                r=args.rank,
                lora_alpha=args.lora_alpha or args.rank,
                lora_dropout=args.lora_dropout,
                use_rslora=args.use_rslora,
                use_dora=args.use_dora,
                target_modules=LORA_TARGETS[args.lora_target],
            )
        )
        diffusers.training_utils.cast_training_params(model, torch.float32)
        if args.use_dora:
            measure_magnitudes(model)
    if args.init_lora_weights:
        set_adapters(models, *read_lora(args.init_lora_weights))


def measure_magnitudes(model):
    """Sets DoRA's magnitudes (arXiv 2402.09353, eq. 5) to the lengths by which peft's forward divides, so that
    adapters start as the identity: lengths of the base's rounded weights, not rounded themselves."""
    for layer in model.modules():
        if hasattr(layer, "lora_variant"):  # one of peft's
            base = layer.get_base_layer()
            # A convolution's is left to autocast there, which rounds it on a CPU and not on a GPU; a linear layer's
            # is computed in the precision of the adapters.
            precision = contextlib.nullcontext()
            if isinstance(base, torch.nn.Conv2d) and base.weight.dtype != torch.float32:
                precision = torch.autocast(base.weight.device.type, base.weight.dtype)
            with precision:
                for name, variant in layer.lora_variant.items():
                    variant.init(layer, name, config=model.peft_config[name])
    diffusers.training_utils.cast_training_params(model, torch.float32)


def set_adapters(models, weights, header):
    """Copies the tensors of a LoRA file into adapters that have to be as its header says. Raises `ValueError`."""
    for name, model in models.items():
        config = model.peft_config["default"]
        for key in ("r", "lora_alpha", "use_rslora", "alpha_pattern"):
            here = getattr(config, key)
            there = header.get(f"{name}.{key}", here)
            if there != here:
                raise ValueError(f"{key} is {there} in its {name}, not {here}; use that")
    adapters = lora_weights(models)
    if {key: value.shape for key, value in weights.items()} != {key: value.shape for key, value in adapters.items()}:
        raise ValueError("it is in kohya's layout, or of another base, --rank, --lora_target, --use_dora or encoders")
    for key, value in weights.items():
        adapters[key].copy_(value)


def load_models_with_adapters(args, accelerator):
    """Returns the base's pipeline, frozen and in the precision of passes, its models that get adapters, by name, and
    the noise scheduler. Adapters are in float32. Raises `InputError`."""
    pipeline = load_base(args)
    weight_dtype = DTYPES[accelerator.mixed_precision]
    enable_memory_savers(args, pipeline.unet, accelerator.device, weight_dtype)
    for part in (pipeline.vae, pipeline.text_encoder):
        frozen(part, accelerator.device, weight_dtype)
    # FSDP2 shares out the weights of a layer and of its adapters together, in one precision.
    frozen(pipeline.unet, accelerator.device, torch.float32 if accelerator.is_fsdp2 else weight_dtype)
    models = {"unet": pipeline.unet}
    if args.train_text_encoder:
        models["text_encoder"] = pipeline.text_encoder
        if args.gradient_checkpointing:
            pipeline.text_encoder.activation_checkpointing_enable()
    add_adapters(args, models)
    for model in models.values():
        model.train()
    return pipeline, models, make_noise_scheduler(args, pipeline)


def lora_weights(models):
    """The adapters' tensors as peft names them, such as unet.<layer>.lora_A.weight."""
    import peft

    weights = {}
    for name, model in models.items():
        for key, value in peft.get_peft_model_state_dict(model).items():
            weights[f"{name}.{key}"] = value.detach()
    # transformers finds DoRA's lengths of the text encoder under this name only.
    return {re.sub(r"^(text_encoder\..+_vector)$", r"\1.weight", key): value for key, value in weights.items()}


def read_lora(path):
    """Reads a LoRA file of these scripts, or the one in a folder: returns its tensors by name, and peft's settings."""
    path = Path(path, LORA_FILE) if Path(path).is_dir() else path
    with safe_open(path, "pt") as file:
        header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        weights = {}
        for key in file.keys():  # noqa: SIM118 (it is no dict)
            weights[re.sub(r"^text_encoder\.text_model\.", "text_encoder.", key)] = file.get_tensor(key)
    return weights, header


def count_adapter_bytes(args, parameters):
    """How many bytes the files take that `save_adapters` will write of such parameters."""
    num_files = 2 if args.output_kohya_format else 1
    return num_files * sum(map(numel_of, parameters)) * DTYPES[args.save_precision].itemsize


def save_adapters(args, folder, models, num_images, step):
    """Writes the adapters of `models` into a folder, in diffusers' layout and on demand in kohya's too; returns
    patterns that are the files."""
    dtype = DTYPES[args.save_precision]
    weights = {key: value.to("cpu", dtype) for key, value in lora_weights(models).items()}
    save_lora(models, weights, folder, LORA_FILE)
    files = [LORA_FILE]
    if args.output_kohya_format:
        files.append(save_kohya(args, folder, models, weights, num_images, step))
    return [re.sub(r"([*?[])", r"[\1]", file) for file in files]


def write_adapters(models, folder, suffix=""):
    """Writes the adapters of `models` in float32 into a checkpoint, from which `load_lora_weights` loads them."""
    save_lora(models, lora_weights(models), folder, file_of_adapters(suffix))


def read_adapters_into(models, folder, suffix=""):
    """Reads what `write_adapters` wrote into adapters of the same shapes."""
    set_adapters(models, *read_lora(folder / file_of_adapters(suffix)))


def file_of_adapters(suffix):
    """The name of the file of adapters in a checkpoint."""
    return LORA_FILE.replace(".", f"{suffix}.")


def save_lora(models, weights, folder, file):
    """Writes adapters, as `lora_weights` names them, in diffusers' layout, with rank, alpha and targets in the
    header."""
    layers, settings, weights = {}, {}, published_names(weights)
    for name, model in models.items():
        start = f"{name}."
        own = {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
        layers[f"{name}_lora_layers"] = own
        config = model.peft_config["default"].to_dict()
        settings[f"{name}_lora_adapter_metadata"] = {**config, "base_model_name_or_path": None}
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, **layers, **settings, weight_name=file)


def save_kohya(args, folder, models, weights, num_images, step):
    """Writes adapters, as `lora_weights` names them, in kohya's layout; returns the file's name."""
    name = kohya_name(args)
    # A layer's effect is scaled by alpha / rank there, by alpha / sqrt(rank) in rsLoRA.
    alpha = (args.lora_alpha or args.rank) * (args.rank**0.5 if args.use_rslora else 1)
    header = kohya_header(args, name, models["unet"], alpha, num_images, step)
    alphas = {split_weight_name(key)[0]: alpha for key in weights}
    save_file(to_kohya(weights, alphas), folder / f"{name}.safetensors", header)
    return f"{name}.safetensors"


def kohya_header(args, name, unet, alpha, num_images, step):
    """What interfaces show of a LoRA file for Stable Diffusion 1 or 2, as strings: no captions and no paths."""
    base, side = args.pretrained_model_name_or_path, args.resolution
    version = 2 if unet.config.cross_attention_dim == 1024 else 1
    fields = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": args.rank,
        "ss_network_alpha": alpha,
        "ss_seed": args.seed,
        "ss_output_name": name,
        "ss_sd_model_name": Path(base).name if Path(base).exists() else base,
        "ss_base_model_version": f"sd_v{version}",
        "ss_v2": version == 2,
        "ss_learning_rate": args.learning_rate,
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": num_images,
        "ss_steps": step,
        "modelspec.title": name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.architecture": f"stable-diffusion-v{version}/lora",
    }
    return {"format": "pt", **{key: str(value) for key, value in fields.items() if value is not None}}


# ------------------------------------------------------------------------------------------------------------- subject
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


# -------------------------------------------------------------------------------------------------------- optimization
def check_optimization(args):
    """Lists which flags of the learning rate contradict each other."""
    problems, schedule = [], args.lr_scheduler
    if args.lr_warmup_steps and schedule in ("constant", "piecewise_constant"):
        problems.append(
            f"--lr_warmup_steps={args.lr_warmup_steps}: does nothing without constant_with_warmup or the like; add "
            "that or drop this"
        )
    number = r"\d*\.?\d+(e-?\d+)?"
    rules = re.fullmatch(rf"({number}:\d+,)+{number}", args.lr_step_rules or "")
    if schedule == "piecewise_constant" and not rules:
        given = f"--lr_step_rules={args.lr_step_rules}" if args.lr_step_rules else "--lr_step_rules is missing"
        problems.append(f"{given}: give rules such as 1:10,0.1:20,0.01")
    if schedule == "polynomial" and args.learning_rate <= POLYNOMIAL_END:
        problems.append(f"--learning_rate={args.learning_rate}: must be above 1e-7, its end")
    used_by = {
        "lr_num_cycles": "cosine_with_restarts",
        "lr_power": "polynomial",
        "lr_step_rules": "piecewise_constant",
    }
    for flag, kind in used_by.items():
        value = getattr(args, flag)
        if value is not None and schedule != kind:
            problems.append(f"--{flag}={value}: does nothing without --lr_scheduler={kind}; add that or drop this")
    return problems


def optimizer_of(args):
    """The name of the optimizer that the flags ask for."""
    return "adamw8bit" if args.use_8bit_adam else args.optimizer or "adamw"


def is_installed(package):
    """Whether a package of that name can be imported; it is not."""
    return any(module.name == package for module in pkgutil.iter_modules())


def check_optimizer(args):
    """Lists what is wrong with the optimizer: another one beside --use_8bit_adam, one that is not installed, or flags
    that it does not have."""
    problems, name = [], optimizer_of(args)
    if args.use_8bit_adam and args.optimizer not in (None, "adamw8bit"):
        problems.append(f"--use_8bit_adam=True: contradicts --optimizer={args.optimizer}; drop one")
    package = NEEDED_PACKAGES.get(name)
    if package and not is_installed(package):
        given = "--use_8bit_adam=True" if args.use_8bit_adam else f"--optimizer={name}"
        problems.append(f"{given}: needs {package}; run `pip install {package}`, or drop this")
    for flag in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        value = getattr(args, flag)
        if name == "adafactor" and value != ADAM_DEFAULTS[flag]:
            problems.append(f"--{flag}={value}: does nothing with --optimizer=adafactor; drop this")
    text_encoder_lr = getattr(args, "text_encoder_lr", None)
    if name == "prodigy" and text_encoder_lr not in (None, args.learning_rate):
        problems.append(
            f"--text_encoder_lr={text_encoder_lr}: Prodigy has one rate for all that it trains; drop this, or use "
            "--optimizer=adamw"
        )
    return problems


def warn_of_rate(args, peak):
    """Lists whether Prodigy's factor is another than the one that it is made for."""
    if optimizer_of(args) != "prodigy" or peak == 1:
        return []
    return [f"--learning_rate={args.learning_rate:g}: Prodigy finds the rate, and multiplies it by {peak:g}; use 1"]


def peak_learning_rate(args, counts):
    """The learning rate after warm-up, scaled by the samples of a step if that is asked for."""
    return args.learning_rate * counts.samples_per_step if args.scale_lr else args.learning_rate


def group_parameters(args, models, learning_rate):
    """The parameters of each model that are trained, with their learning rates: the UNet's first."""
    asked = args.text_encoder_lr or args.learning_rate
    rates = {"unet": learning_rate, "text_encoder": learning_rate * asked / args.learning_rate}  # both are scaled
    groups = []
    for name, model in models.items():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups.append({"params": trained, "lr": rates[name]})
    return groups


def make_optimizer(args, groups):
    """The optimizer for groups of parameters with their rates: AdamW (arXiv 1711.05101), its 8-bit form (2110.02861),
    Adafactor with rates that are given (1804.04235), or Prodigy (2306.06101)."""
    name, lr = optimizer_of(args), groups[0]["lr"]
    # Beside each group's parameters, since Prodigy's constructor prints a line if it is told of a decay.
    groups = [{**group, "weight_decay": args.adam_weight_decay} for group in groups]
    adam_flags = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=lr, **adam_flags)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False, warmup_init=False)
    if name == "prodigy":
        from prodigyopt import Prodigy

        has_warm_up = args.lr_warmup_steps > 0
        return Prodigy(groups, lr=lr, use_bias_correction=True, safeguard_warmup=has_warm_up, **adam_flags)
    return torch.optim.AdamW(groups, lr=lr, fused=True, **adam_flags)


def make_schedule(args, optimizer, last_step):
    """The learning rate's schedule, to be stepped once per optimizer step. It must not be prepared by accelerate,
    which would count processes."""
    return diffusers.optimization.get_scheduler(
        args.lr_scheduler,
        optimizer,  # whose default rate is where the polynomial starts
        step_rules=args.lr_step_rules,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=last_step,
        num_cycles=args.lr_num_cycles or 1,
        power=args.lr_power or 1.0,
    )


def make_average(args, parameters):
    """The average of the weights, in float32, with the decay that the flags ask for."""
    decay = 0.9999 if args.ema_decay is None else args.ema_decay
    average = diffusers.training_utils.EMAModel(parameters, decay=decay, use_ema_warmup=args.ema_warmup)
    average.shadow_params = [value.float() for value in average.shadow_params]  # of weights in bfloat16, too
    return average


@torch.no_grad()
def step_average(average, parameters, foreach, offload):
    """Moves an average of the weights one step towards the parameters: average -= (1 - decay) (average - parameter).

    `foreach` updates many tensors at once; `offload` updates an average in the CPU's memory, wherever the parameters
    are. `EMAModel` can do neither in the operations of its loop over tensors, which give the same bits here.
    """
    if not (foreach or offload):
        average.step(parameters)
        return
    average.optimization_step += 1
    average.cur_decay_value = average.get_decay(average.optimization_step)
    rate = 1 - average.cur_decay_value
    if offload:
        update_on_cpu(average.shadow_params, parameters, rate)
        return
    for averages, current in chunks_of(average.shadow_params, parameters):
        differences = torch._foreach_sub(averages, current)
        torch._foreach_mul_(differences, rate)
        torch._foreach_sub_(averages, differences)


def chunks_of(averages, parameters):
    """Yields lists of averages and of their parameters, as many as `AVERAGED_AT_ONCE` allows, or one larger tensor."""
    start, size = 0, 0
    for end, parameter in enumerate(parameters):
        if end > start and size + parameter.numel() > AVERAGED_AT_ONCE:
            yield averages[start:end], parameters[start:end]
            start, size = end, 0
        size += parameter.numel()
    yield averages[start:], parameters[start:]


def update_on_cpu(averages, parameters, rate):
    """Updates averages in the CPU's memory; each parameter goes there once, through a buffer as large as the largest,
    pinned if they come from another device. Such memory is kept by PyTorch from step to step."""
    largest = max(parameter.numel() for parameter in parameters)
    buffer = torch.empty(largest, pin_memory=parameters[0].device.type != "cpu")
    for average, parameter in zip(averages, parameters, strict=True):
        difference = buffer[: parameter.numel()].view_as(average)
        difference.copy_(parameter)
        torch.sub(average, difference, out=difference).mul_(rate)
        average.sub_(difference)


# ----------------------------------------------------------------------------------------------------------- deepspeed
def uses_deepspeed():
    """Whether accelerate's config asks for DeepSpeed."""
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def asked_of_deepspeed(name, default):
    """What accelerate's config says of DeepSpeed, as a text in small letters."""
    return os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", default).lower()


def check_deepspeed(args):
    """Lists what cannot go with DeepSpeed, if accelerate's config asks for that."""
    if not uses_deepspeed():
        return []
    asked = "accelerate's config asks for DeepSpeed"
    if not is_installed("deepspeed"):
        return [f"{asked}, which is not installed; run `pip install -r requirements_deepspeed.txt`"]
    problems, stage = check_deepspeed_config(args, asked), asked_of_deepspeed("ZERO_STAGE", "2")
    if args.mixed_precision == "fp16" or os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        problems.append("--mixed_precision=fp16 (or accelerate's config): does not go with DeepSpeed; use bf16")
    if optimizer_of(args) != "adamw":  # others have to see a weight as a whole, or all weights
        given = "--use_8bit_adam=True" if args.use_8bit_adam else f"--optimizer={args.optimizer}"
        problems.append(f"{given}: does not go with DeepSpeed; use --optimizer=adamw, or choose GPUs alone")
    for flag in ("channels_last", "compile", "full_bf16", "train_text_encoder"):
        if getattr(args, flag, False):
            problems.append(f"--{flag}=True: does not go with DeepSpeed; drop this, or choose GPUs alone")
    if stage == "3" and args.use_ema:
        problems.append("--use_ema=True: does not go with ZeRO-3; use zero_stage: 2, or drop this")
    return problems


def check_deepspeed_config(args, asked):
    """Lists what accelerate's config says of DeepSpeed that cannot be obeyed."""
    problems, stage = [], asked_of_deepspeed("ZERO_STAGE", "2")
    if stage not in ("2", "3"):
        problems.append(f"{asked} with zero_stage: {stage}; use 2 or 3")
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        remedy = "give zero_stage and the like in accelerate's config itself"
        problems.append(f"{asked} with deepspeed_config_file: {file}, which is not read; {remedy}")
    for part in ("optimizer", "param"):
        place = asked_of_deepspeed(f"OFFLOAD_{part.upper()}_DEVICE", "none")
        if place not in ("none", "cpu"):
            problems.append(f"{asked} with offload_{part}_device: {place}, which is not obeyed; use cpu or none")
    if stage == "2" and asked_of_deepspeed("OFFLOAD_PARAM_DEVICE", "none") == "cpu":
        problems.append(f"{asked} with offload_param_device: cpu, which needs zero_stage: 3; use that, or none")
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto").lower()
    if clipping != "auto" and float(clipping) != args.max_grad_norm:
        problems.append(f"{asked} with gradient_clipping: {clipping}; give --max_grad_norm={clipping} to this script")
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        problems.append(f"{asked} and for CPUs, which excludes that; drop use_cpu: without GPUs it takes CPUs")
    elif "LOCAL_RANK" not in os.environ:
        problems.append(f"{asked}, which needs a launcher; start this script by accelerate launch or torchrun")
    return problems


def choose_backend():
    """By what processes send each other tensors: accelerate's default, but DeepSpeed has to be told of CPUs."""
    return "gloo" if uses_deepspeed() and not torch.accelerator.is_available() else "nccl"


def make_deepspeed_accelerator(args, **options):
    """The accelerator for DeepSpeed, with other options of accelerate's."""
    if not torch.accelerator.is_available():
        import deepspeed.ops

        # Or it would compile a sum over processes in shared memory, which takes a minute and a compiler.
        deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of old names, each time
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    plugin = DeepSpeedPlugin(
        gradient_accumulation_steps=1,  # passes are counted here
        gradient_clipping=args.max_grad_norm,
        zero3_init_flag=False,  # which would leave frozen models without weights, too
    )
    config = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    config["zero_force_ds_cpu_optimizer"] = False  # PyTorch's is as quick, and needs no compiler
    if precision == "bf16":
        # No layers whose gradients would be summed in bfloat16.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    accelerator = DeepSpeedAccelerator(precision, deepspeed_plugin=plugin, **options)
    transformers.integrations.unset_hf_deepspeed_config()  # by which transformers would load models without weights
    return accelerator


def name_of_zero(accelerator):
    """What the state in a checkpoint can be read by again: a stage of ZeRO and a number of processes. None without
    DeepSpeed."""
    if not uses_deepspeed():
        return None
    return f"ZeRO-{accelerator.deepspeed_plugin.zero_stage} of {accelerator.num_processes} processes"


def set_up_engine(engine):
    """Has checkpoints of DeepSpeed's engine hold no weights but those that its optimizer keeps, and run nothing."""
    engine.module_state_dict = no_weights
    engine.checkpoint_engine.load = load_tensors


def no_weights(exclude_frozen_parameters=False):
    """The weights in DeepSpeed's own file: those that are trained are in others, and the base is in none."""
    return {}


def load_tensors(path, map_location=None):
    """Loads a file of a checkpoint, which may be anybody's: DeepSpeed would run what is pickled in it. Raises
    `pickle.UnpicklingError` for other objects than those of its own that it writes."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True)


def step_by_engine(args, accelerator, run, work, passes):
    """Forward, backward and the optimizer's step: the passes of a step add up their gradients in DeepSpeed's engine,
    which averages them over processes, clips them and changes the weights, unless a loss or a gradient is not finite
    in some process, or no sample of a stream has weight. Returns the step's loss in this process, and the norm of its
    gradient."""
    (engine,) = run.weights.prepared.values()
    engine.optimizer.clip_grad = args.max_grad_norm  # a checkpoint brings its own
    step_loss, weight = torch.zeros((), device=accelerator.device), torch.zeros((), device=accelerator.device)
    for batch, is_last in passes:
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        engine.set_gradient_accumulation_boundary(is_last)
        loss = (work.training_loss(batch) * batch["weight"]).sum()
        # The engine looks at gradients alone, which may be finite where a loss is not.
        factor = torch.where(torch.isfinite(loss.detach()), float(accelerator.num_processes), math.nan)
        weight += batch["weight"].sum()
        if is_last and getattr(args, "streaming", False) and accelerator.reduce(weight) == 0:
            factor.fill_(math.nan)  # else it would decay weights and moments
        engine.backward(loss * factor, scale_wrt_gas=False)  # gradients are averaged over processes
        step_loss += loss.detach()
    run.is_whole = False
    engine.step()
    run.is_whole = not engine.was_step_applied()
    return step_loss, torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=accelerator.device)


def is_partitioned(parameter):
    """Whether a parameter is shared out over processes by ZeRO-3, and empty between its passes."""
    return hasattr(parameter, "ds_id")


@contextlib.contextmanager
def held_whole(parameters):
    """Has parameters that ZeRO-3 shares out be whole for a while, in all processes, which have to call this together.
    What is changed in them is lost."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(partitioned):
        yield


@contextlib.contextmanager
def passing_alone(model):
    """Has a model that ZeRO-3 shares out be whole for a while, in all processes, which have to call this together; in
    between each does passes without gradients that wait for no other process, as many as it likes."""
    modules = list(model.modules()) if any(map(is_partitioned, model.parameters())) else []
    # DeepSpeed's, which gather the weights of a module before its pass, and give them away after it.
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in modules]
    with held_whole(model.parameters()):
        try:
            for module in modules:
                module._forward_pre_hooks, module._forward_hooks = {}, {}
            yield
        finally:
            for module, before, after in hooks:
                module._forward_pre_hooks, module._forward_hooks = before, after


def gather_for_good(parameters):
    """Has parameters that ZeRO-3 shares out be whole from now on, in all processes, which have to call this
    together: at the end of a run."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if partitioned:
        partitioned[0].all_gather(param_list=partitioned)


# ------------------------------------------------------------------------------------------------------------ sharding
def check_sharding(args):
    """Lists what cannot go with FSDP, if accelerate's config asks for that."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return []
    problems, asked = [], "accelerate's config asks for FSDP"
    if os.environ.get("FSDP_VERSION", "1") != "2":
        problems.append(f"{asked} {os.environ.get('FSDP_VERSION', 1)}, which is not obeyed; use fsdp_version: 2")
    if not hasattr(torch.distributed.checkpoint, "HuggingFaceStorageWriter"):
        problems.append(f"{asked}, which needs torch 2.8 or newer, not {torch.__version__}; install that")
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        problems.append(f"{asked} with fsdp_offload_params, which is not obeyed; use false, and more processes")
    if parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
        remedy = "use false, and --gradient_checkpointing"
        problems.append(f"{asked} with fsdp_activation_checkpointing, which is not obeyed; {remedy}")
    kind = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    if kind != "SHARDED_STATE_DICT":
        problems.append(f"{asked} with fsdp_state_dict_type: {kind}; use SHARDED_STATE_DICT")
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16":
        problems.append("--mixed_precision=fp16 (or accelerate's config): does not go with FSDP; use bf16")
    if optimizer_of(args) != "adamw":
        given = "--use_8bit_adam=True" if args.use_8bit_adam else f"--optimizer={args.optimizer}"
        problems.append(f"{given}: does not go with FSDP; use --optimizer=adamw")
    for flag in ("channels_last", "compile", "full_bf16", "offload_ema", "train_text_encoder"):
        if getattr(args, flag, False):
            problems.append(f"--{flag}=True: does not go with FSDP; drop this, or choose GPUs alone")
    return problems


def set_up_sharding(accelerator):
    """Has accelerate share out the weights in float32, if its config asks for FSDP: passes are autocast as they are
    elsewhere, and gradients are added up in float32. Raises `InputError` where it does not share them out."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if not accelerator.is_fsdp2:
        raise InputError("accelerate's config asks for FSDP, which needs GPUs; choose CPUs alone")
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    # Else transformers leaves models empty in all processes but one, frozen ones too, which are not shared out.
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    disable_fsdp_ram_efficient_loading()


def has_shared_passes(accelerator):
    """Whether processes can only make passes together, since each of them has but a shard of the weights."""
    return accelerator.is_fsdp2


def skeleton_of(model):
    """A copy of a model, with its adapters, in which nothing but the weights is missing."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): empty_like(tensor) for tensor in tensors})


def empty_like(tensor):
    """A tensor, or a parameter, without storage."""
    empty = tensor.detach().to("meta")
    return torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty


def held_here(parameters):
    """What this process holds of parameters: a shard of each that is shared out, else all of it. Changed in place, the
    parameters change."""
    with torch.no_grad():
        return [value.to_local() if isinstance(value, DTensor) else value for value in parameters]


def forget_gathered(models):
    """Frees what passes without a backward pass have gathered of models, by name: the next pass would use it, though
    the shards have changed."""
    for model in models.values():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def whole_tensor(value):
    """A tensor that may be shared out, as all processes have it together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_models(weights):
    """The models that are trained, by name, with whole weights, in the first process. All processes have to call
    this: what is shared out is gathered, of FSDP2 in the CPU's memory."""
    for name, skeleton in weights.skeletons.items():
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        values = get_model_state_dict(weights.models[name], options=options)  # of other processes it has nothing
        skeleton.load_state_dict(values, strict=False, assign=True)
    gather_for_good(weights.parameters)
    return weights.skeletons or weights.models


def write_shards(run, folder):
    """Writes what this process holds of the run's weights, average and moments, in safetensors."""
    writer = torch.distributed.checkpoint.HuggingFaceStorageWriter(folder, save_distributed=True)
    torch.distributed.checkpoint.save(shared_tensors(run), storage_writer=writer)


def read_shards(run, folder):
    """Reads what `write_shards` wrote, as any number of processes, into the run's weights, average and moments."""
    reader = torch.distributed.checkpoint.HuggingFaceStorageReader(folder)
    torch.distributed.checkpoint.load(shared_tensors(run), storage_reader=reader)


def shared_tensors(run):
    """The tensors of a run that are shared out, by name: what changes in them changes the run."""
    options = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
    tensors = {}
    for name, model in run.weights.models.items():
        weights = get_model_state_dict(model, options=options)
        moments = get_optimizer_state_dict(model, run.state["optimizer"], options=options)
        tensors |= {f"{name}.{key}": value for key, value in weights.items()}
        tensors |= {f"optimizer.{name}.{key}": moment for key, moment in moments.items() if torch.is_tensor(moment)}
    if "ema" in run.state:
        own = trained_tensors(run.weights.models).items()
        for (name, parameter), shard in zip(own, run.state["ema"].shadow_params, strict=True):
            tensors[AVERAGE + name] = shared_like(parameter, shard)
    return tensors


def trained_tensors(models):
    """The parameters of models, by name, that are trained, by their names with the model's."""
    return {
        f"{name}.{key}": parameter
        for name, model in models.items()
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def shared_like(parameter, shard):
    """A tensor that is shared out as a parameter is, of which this process holds `shard`."""
    layout = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return DTensor.from_local(shard, parameter.device_mesh, parameter.placements, **layout)


# ------------------------------------------------------------------------------------------------------------- digests
def write_digests(folder):
    """Writes digests.json into a folder: for all files in it, by their paths below it, their bytes and SHA-256."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / DIGESTS_FILE]
    with ThreadPoolExecutor(4) as pool:  # hashing leaves Python's lock to others
        sums = list(pool.map(sha256_of, paths))
    digests = {name_in(folder, path): [path.stat().st_size, sha256] for path, sha256 in zip(paths, sums)}
    (folder / DIGESTS_FILE).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def find_damage(folder, unused=""):
    """What is wrong with the first file of a folder that is missing, or of another size or content than digests.json
    says, or that cannot be read; None for a folder that is whole but for files whose names match the pattern
    `unused`."""
    if not (folder / DIGESTS_FILE).exists():
        return f"{DIGESTS_FILE} is missing"
    try:
        digests = {name: (size, sha256) for name, (size, sha256) in read_json(folder / DIGESTS_FILE).items()}
    except (InputError, ValueError, TypeError):
        return f"{DIGESTS_FILE} cannot be read"
    digests = {name: known for name, known in digests.items() if not fnmatch.fnmatchcase(name, unused)}
    for name, (size, _) in digests.items():  # first what costs nothing
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(readable_sha256_of, [folder / name for name in digests]))
    for (name, (_, sha256)), found in zip(digests.items(), sums):
        if found is None:
            return f"{name} cannot be read"
        if found != sha256:
            return f"the content of {name} has changed since it was written"
    return None


def readable_sha256_of(path):
    """The SHA-256 of a file, or None for one that cannot be read: the disk may be what is damaged."""
    try:
        return sha256_of(path)
    except OSError:
        return None


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------------------- output
def check_output(args, foreign_result):
    """Lists what is wrong with the output folder and the checkpoint to resume from. The file `foreign_result` marks a
    result of another kind of script, which would stay behind beside this one's."""
    problems, wanted = [], args.resume_from_checkpoint
    output = Path(args.output_dir).resolve()
    checkpoint = find_checkpoint(output, wanted)
    existing = existing_place(output)
    is_usable = existing.is_dir() and os.access(existing, os.W_OK)
    is_used = is_usable and existing == output and is_taken(args)
    is_run = (output / "args.json").is_file() and not (output / foreign_result).exists()
    if checkpoint:
        is_own = output == checkpoint.resolve().parent
    else:  # `latest` starts anew, in the folder of a run that was stopped before its first checkpoint
        is_own = wanted == "latest" and is_run and not (output / "README.md").exists()

    if checkpoint and not (checkpoint / "progress.json").is_file():
        problems.append(f"--resume_from_checkpoint={wanted}: is no whole checkpoint folder; name one, or latest")
    if (output / args.logging_dir).resolve() == output:
        problems.append(f"--logging_dir={args.logging_dir}: is --output_dir itself; name a folder in it, such as logs")
    if wanted and args.overwrite_output_dir:
        problems.append("--overwrite_output_dir: contradicts --resume_from_checkpoint; drop one")
    if is_own and checkpoint and (newer := find_newer(output, checkpoint.resolve())):
        problems.append(f"--resume_from_checkpoint={wanted}: {newer} is newer; use that, or another --output_dir")
    if not is_usable:
        told = f"{existing} is a file or cannot be written to; name another folder"
        problems.append(f"--output_dir={args.output_dir}: {told}")
    if is_used and not is_own and args.overwrite_output_dir and not is_run:
        told = "holds no run of this script, which alone --overwrite_output_dir writes over; name another folder"
        problems.append(f"--output_dir={args.output_dir}: {told}")
    elif is_used and not is_own and not args.overwrite_output_dir:
        remedy = "name another (it holds no run of this script)"
        if is_run:
            remedy = (
                "name another, go on with its run by --resume_from_checkpoint=latest, or use --overwrite_output_dir"
            )
        problems.append(f"--output_dir={args.output_dir}: is in use; {remedy}")
    kind = kind_of_checkpoint(checkpoint) if checkpoint else None
    if kind not in (None, "LoRA adapters" if foreign_result == "model_index.json" else "whole models"):
        remedy = "use the script that wrote it, or another checkpoint"
        problems.append(f"--resume_from_checkpoint={wanted}: holds {kind}, which this script does not train; {remedy}")
    return problems


def kind_of_checkpoint(checkpoint):
    """What a checkpoint holds, or None where it holds neither."""
    if (checkpoint / "pytorch_lora_weights.safetensors").is_file():
        return "LoRA adapters"
    return "whole models" if (checkpoint / "unet").is_dir() else None


def check_trackers(args):
    """Lists whether a tracker is asked for that is not installed."""
    installed = ["all", "none", *map(str, get_available_trackers())]
    if args.report_to is not None and args.report_to not in installed:
        return [
            f"--report_to={args.report_to}: installed are {', '.join(installed)}; for tensorboard and wandb run `pip "
            "install -r requirements_trackers.txt`"
        ]
    return []


def is_taken(args):
    """Whether the output folder holds more than a lock, logs of trackers, which get a folder of their own, and what a
    kill at the start left."""
    others = {LOCK_FILE, TOKEN_FILE, *Path(args.logging_dir).parts[:1]}
    names = {path.name for path in Path(args.output_dir).iterdir()} - others
    return any(not HALF_FILE.fullmatch(name) for name in names)


@contextlib.contextmanager
def locked_output(args):
    """Holds the lock of the output folder, which the end of the process releases in every case: a run may still be
    finishing a step when the terminal is free again. A folder that stays empty is removed. Raises `InputError`."""
    output_dir = Path(args.output_dir)
    is_new = not output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # such as a link to a disk that is not there
        raise InputError(
            f"--output_dir={output_dir}: cannot be made ({last_line(error)}); name another folder"
        ) from None
    lock = FileLock(output_dir / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"--output_dir={output_dir}: another run is writing there, maybe one that finishes its last step; wait "
            "for it, or name another folder"
        ) from None
    except (OSError, NotImplementedError) as error:  # network file systems may know no locks; older filelocks say so
        print(f"Warning: {output_dir} cannot be locked ({last_line(error)}); start no other run there meanwhile.")
    try:
        yield
    finally:
        lock.release()
        if is_new and [path.name for path in output_dir.iterdir()] in ([], [LOCK_FILE]):
            shutil.rmtree(output_dir, ignore_errors=True)


def leave_token(output_dir, token):
    """Leaves a token, a text, in the output folder for the other machines to see. Raises `InputError`."""
    try:
        Path(output_dir, TOKEN_FILE).write_text(token, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output_dir={output_dir}: cannot be written to ({last_line(error)}); make room") from None


def sees_token(output_dir, token, seconds):
    """Whether the token that the first process left can be read here within so many seconds: what one machine writes
    to a network file system others may see with a delay."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if Path(output_dir, TOKEN_FILE).read_text(encoding="utf-8") == token:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.25)


def remove_token(output_dir):
    """Removes what `leave_token` left."""
    with contextlib.suppress(OSError):
        Path(output_dir, TOKEN_FILE).unlink()


def chosen_tracker(args):
    """The name of accelerate's tracker to start: the one asked for, or all that are installed, else tensorboard where
    it is installed; None for no tracker."""
    installed = list(map(str, get_available_trackers()))
    if args.report_to is None:
        return "tensorboard" if "tensorboard" in installed else None
    return args.report_to if args.report_to != "none" and installed else None


def prepare_output(run, overwrite, changed):
    """Makes the output folder with args.json, a log up to the first step, and a line more of history that names the
    flags that were `changed` from their defaults; removes what an earlier run left there if it may be overwritten, and
    what it left unfinished. For one process alone."""
    output_dir = run.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    old_files = ["README.md", "best.json", HISTORY_FILE]  # the first of which says that a run has ended
    old_folders = r"samples|checkpoint-\d+"
    unfinished = r"checkpoint-\d+(\..+-\d+)?\.partial|" + re.escape(NEW_RESULT)
    if overwrite:
        for name in old_files:
            (output_dir / name).unlink(missing_ok=True)
    for old in list(output_dir.iterdir()):
        if re.fullmatch(unfinished, old.name) or (overwrite and re.fullmatch(old_folders, old.name)):
            shutil.rmtree(old)
        if HALF_FILE.fullmatch(old.name):
            old.unlink()
    first_step = run.progress["global_step"]
    set_aside_damaged(output_dir, first_step)
    best = read_best(output_dir)
    # The loss may be of other images, or of another objective; or the checkpoint is damaged.
    if best and first_step and (run.progress["base_losses"] is None or best["step"] > first_step):
        (output_dir / "best.json").unlink()
    log = output_dir / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() and first_step else []
    history = output_dir / HISTORY_FILE
    past = []
    with contextlib.suppress(OSError):  # it is no part of what a run needs
        past = history.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    now = history_line(run, "resumed" if first_step else "started", last_step=run.counts.last_step, changed=changed)
    contents = {
        "args.json": json.dumps(run.settings, indent=2) + "\n",
        "log.jsonl": "".join(line for line in lines if was_before(line, first_step)),
        HISTORY_FILE: "".join([line for line in past if line.endswith("}\n")] + [now]),
    }
    try:
        for name, content in contents.items():
            with beside(output_dir / name) as path:
                path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output_dir={output_dir}: cannot be written to ({last_line(error)}); make room") from None


def history_line(run, event, **more):
    """A line of history.jsonl: what happened to the run, and when, after which step."""
    time_of_day = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return json.dumps({"time": time_of_day, "event": event, "step": run.progress["global_step"], **more}) + "\n"


def note_end(accelerator, run, event, why=None):
    """Appends to history.jsonl how a run has ended, by the first process alone, but by each host of JAX. A run that is
    killed notes nothing, and one that cannot write has more to say elsewhere."""
    if accelerator.is_main_process:
        with contextlib.suppress(OSError), (run.output_dir / HISTORY_FILE).open("a", encoding="utf-8") as file:
            file.write(history_line(run, event, **({"why": without_secrets(why)} if why else {})))


def restore_output(run):
    """Makes the output folder anew, with what a checkpoint needs there, if somebody has removed it meanwhile."""
    settings = run.output_dir / "args.json"
    if not settings.exists():
        run.output_dir.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(run.settings, indent=2) + "\n", encoding="utf-8")


def was_before(line, first_step):
    """Whether a line of the log is whole and stays: steps after the checkpoint are done again, and so logged again,
    and so is the held-out loss at its step."""
    if not line.endswith("}\n"):
        return False
    row = json.loads(line)
    return row["step"] < first_step or ("loss" in row and row["step"] == first_step)


def start_trackers(args, accelerator):
    """Starts the trackers. Raises `InputError` for one that does not start."""
    config = {name: str(value) for name, value in vars(args).items() if name != "hub_token"}
    try:
        accelerator.init_trackers(args.tracker_project_name, config)
    except Exception as error:  # each has its own way to say that nobody is logged in
        remedy = "set it up as it asks for"
        if args.report_to == "wandb":
            remedy = "log in to it (wandb login), work offline (WANDB_MODE=offline)"
        told = f"does not start ({last_line(error)}); {remedy}, or use --report_to=none"
        raise InputError(f"--report_to={args.report_to}: {told}") from None


def tell_trackers(accelerator, tell):
    """Calls `tell(tracker)` for every tracker; one that fails is done without from then on."""
    for tracker in list(accelerator.trackers):
        try:
            tell(tracker)
        except Exception as error:  # of a connection, a quota, a disk: its log is not the run
            print(f"Warning: {tracker.name} failed and is done without ({last_line(error)}).", file=sys.stderr)
            accelerator.trackers.remove(tracker)


def end_training(accelerator):
    """Ends the trackers and leaves the other processes."""
    tell_trackers(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers = []
    accelerator.end_training()


def log_losses(accelerator, run, learning_rate, grad_norm, images_per_second):
    """Logs the mean loss of the steps since the last such line, and the last step's other numbers."""
    losses = run.progress["losses"]
    numbers = {
        "loss": sum(losses) / len(losses) if losses else None,  # none if all of them were skipped
        "lr": learning_rate,
        "grad_norm": grad_norm,
        "images_per_second": images_per_second,
        **peak_gigabytes(accelerator.device),
    }
    write_log(accelerator, run.output_dir, run.progress["global_step"], numbers)
    run.progress["losses"] = []


def peak_gigabytes(device):
    """The most memory, in GB by name, that PyTorch took on a device so far, if that is a GPU of NVIDIA's or AMD's, and
    this process in all, which the processes that load images are not part of."""
    peaks = {}
    if device.type != "cpu" and is_cuda_available():
        peaks["device_gb"] = max_memory_reserved(device) / 1e9
    if sys.platform != "win32":
        import resource  # which Windows has not

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["process_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return peaks


def write_log(accelerator, output_dir, step, numbers):
    """Appends numbers to log.jsonl and sends them to the trackers."""
    if accelerator.is_main_process:
        with (output_dir / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
    known = {name: value for name, value in numbers.items() if value is not None}
    tell_trackers(accelerator, lambda tracker: tracker.log(known, step=step))


@contextlib.contextmanager
def new_result(output_dir):
    """Gives a folder to write the result to, which comes into the output folder when it is whole."""
    folder = Path(output_dir, NEW_RESULT)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        copy_mode(Path(output_dir, "args.json"), folder.rglob("*.safetensors"))
        sync(folder)
        move_into(folder, Path(output_dir))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------- runs
def read_run(folder, name):
    """Reads what a run left in its folder. Raises `InputError` if that holds no run."""
    folder = Path(folder)
    log, settings = folder / "log.jsonl", folder / "args.json"
    if not log.is_file() and (folder / "progress.json").is_file():
        raise InputError(f"{folder}: is a checkpoint of a run; name {folder.absolute().parent}")
    if not log.is_file() and not settings.is_file():
        told = "is no folder" if folder.exists() else f"there is no such folder{nearest_beside(folder)}"
        told = "holds no log.jsonl of a training" if folder.is_dir() else told
        remedy = remedy_for_missing(folder) or "name the --output_dir of a run"
        raise InputError(f"{folder}: {told}; {remedy}")
    notes = []
    rows, history = read_rows_of(log, notes), read_rows_of(folder / HISTORY_FILE, notes)
    try:
        known = {**json.loads(settings.read_text(encoding="utf-8"))} if settings.is_file() else {}
    except (OSError, ValueError, TypeError):
        known = {}
        notes.append("args.json cannot be read, so that the settings are not known.")
    (known,) = without_odd([known], settings, notes)
    samples = {}
    for path in sorted(folder.glob("samples/step-*.png")):
        if number := re.fullmatch(r"step-(\d+)", path.stem):
            samples[int(number[1])] = path
    return RunRecord(name, folder, rows, known, history, samples, notes)


def read_rows_of(path, notes):
    """The lines of a JSON file with a step, without what is infinite or odd in it; a line that is none of these, such
    as one that breaks off, is left out, and told in `notes`."""
    rows, num_broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:
                raise ValueError
            rows.append({name: None if is_not_finite(value) else value for name, value in row.items()})
        except (ValueError, TypeError, KeyError):
            num_broken += 1
    if num_broken:
        notes.append(f"{counted(num_broken, 'line')} of {path.name} cannot be read, and left out.")
    return without_odd(rows, path, notes)


def without_odd(rows, path, notes):
    """The rows of a file with None for what is not of its kind, which is told in `notes`."""
    odd = {name for row in rows for name, value in row.items() if value is not None and not is_of_kind(name, value)}
    if odd:
        notes.append(
            f"{path.name} has no number or text where there should be one, left out: {', '.join(sorted(odd))}."
        )
    return [{name: value if is_of_kind(name, value) else None for name, value in row.items()} for row in rows]


def is_of_kind(name, value):
    """Whether a value is of the kind that one of that name has to be."""
    if name in NUMBERS:
        return type(value) in (int, float)
    if name in WHOLE_NUMBERS:
        return type(value) is int
    if name in TEXTS:
        return isinstance(value, str)
    return name not in LISTS or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def is_not_finite(value):
    """Whether a value is a number that JSON, and a plot, have no place for."""
    return isinstance(value, float) and not math.isfinite(value)


def smoothed(values):
    """The means of values and their neighbours, of some fifteenth of all: of less at both ends."""
    reach = max(1, len(values) // 30)
    windows = [values[max(0, number - reach) : number + reach + 1] for number in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def judge(run):
    """Whether the run learnt, as a sentence, and how that is: "good", "bad" or "open"."""
    looks, losses = run.with_number("held_out_loss", "held_out_gain", "gain_error"), run.with_number("loss")
    if not run.rows:
        is_over = run.history and run.history[-1].get("event") in ("finished", "stopped")
        return f"Nothing was logged{'' if is_over else ' yet'}.", "open"
    if not looks:
        told = "No images were held out, so that nothing can be said about learning"
        if len(losses) > 2:  # the means of two are the same
            means = smoothed([row["loss"] for row in losses])
            told += f"; the loss in training, smoothed, went from {means[0]:.3f} to {means[-1]:.3f}"
        return f"{told}. --num_validation_samples holds some out.", "open"
    last, number = looks[-1], run.settings.get("num_validation_samples")
    of_images = f"The loss on {counted(number, 'image')}" if number else "The loss on images"
    verb = "was" if number == 1 else "were"
    loss, gain, margin = last["held_out_loss"], last["held_out_gain"], INTERVAL * last["gain_error"]
    if last["step"] == 0:
        is_held = "is held out" if number == 1 else "are held out"
        return f"{of_images} that {is_held} was {loss:.3f} before training, and not measured since.", "open"
    smallest = abs(gain) if margin == 0 else margin  # of what is told
    digits = 5 if 0 < smallest < 0.002 else 3
    went = f"{'rose' if gain < 0 else 'fell'} from {loss + gain:.{digits}f} to {loss:.{digits}f}"
    told = f"{of_images} that {verb} not trained on {went} after step {last['step']:,}, by {abs(gain):.{digits}f}"
    if not run.has_interval():
        few = "these are too few to say how sure that is" if number else "how many is not known, nor how sure that is"
        return f"{told}; {few}.", "open"
    told += f" \N{PLUS-MINUS SIGN} {margin:.{digits}f} (95 %)"
    best = min(looks, key=lambda row: row["held_out_loss"])
    if abs(gain) <= margin:
        return f"{told}: too little to say that it learnt anything, or that it did harm.", "open"
    if gain < 0:
        return f"{told}: what it draws of images like these got worse.", "bad"
    told += ": it learnt"
    if best["held_out_loss"] < loss - margin:
        told += f", but that loss was lower after step {best['step']:,}, {best['held_out_loss']:.{digits}f}"
    return f"{told}.", "good"


# ---------------------------------------------------------------------------------------------------------------- plan
def print_plan(args, run, num_held_out, num_trained, about):
    """Says, before the first step, what will be done. `about` says what only a script knows: `trained` and `frozen`
    (which models), `device` (its name), `devices` (how many share a pass), `optimizer` (its name), `warnings` (a
    list), and maybe `other_rate` (what stands behind the learning rate), `images` (a remark), `kinds` (lines on
    them), `data` (texts that were told as they were read), `stream` (how they are read), `precision` (of passes, if
    that is not the setting), `weights` (their precision, if not float32), `result_bytes` (of the files that will be
    the result), `buckets` (lines on the sizes of images) and `cache` (a text, or None)."""
    counts, side, tracker = run.counts, args.resolution, chosen_tracker(args)
    first_step, precision = run.progress["global_step"], about.get("precision", run.settings["mixed_precision"])
    buckets, size = about.get("buckets", ()), tell_size(checkpoint_bytes(run))
    shape = f"in buckets of the area of {side} x {side}" if buckets else f"at {side} x {side}"
    number, epochs = "streamed, their number is not known", ""
    if counts.num_images is not None:
        number = f"{counts.num_images:,} to train on"
        epochs = f", {counts.last_step / counts.steps_per_epoch:,.1f} epochs"
    images = f"{number}, {num_held_out:,} held out, {shape} pixels"
    num_passes = counted(args.gradient_accumulation_steps, "pass", "passes")
    passes = f"{args.train_batch_size} a pass x {num_passes} x {about['devices']}"
    often = "step" if args.checkpointing_steps == 1 else f"{args.checkpointing_steps:,} steps"
    rows = {
        "device": about["device"],
        "images": "\n".join([images + about.get("images", ""), *about.get("kinds", []), *buckets]),
        "stream": about.get("stream"),
        "steps": f"{first_step:,} to {counts.last_step:,}{epochs}",
        "per step": f"{tell_images_of_step(counts)}: {passes}",
        "trained": f"{about['trained']}, {num_trained:,} parameters in {about.get('weights', 'float32')}, passes in "
        f"{PASSES_IN[precision]}; frozen: {about['frozen']}",
        "optimizer": f"{about['optimizer']} at {run.settings['peak_learning_rate']:g}{about.get('other_rate', '')}, "
        f"{args.lr_scheduler}; {'an average of the weights (EMA)' if args.use_ema else 'no average of the weights'}",
        "output": f"{args.output_dir}, a checkpoint of {size} every {often}",
        "disk": tell_disk(args, run, about.get("result_bytes")),
        "log": f"log.jsonl and {tracker}" if tracker else "log.jsonl, no tracker",
    }
    rows["cache"] = about.get("cache")
    rows["data"] = "".join(about.get("data", [])).rstrip("\n")
    lines = [as_row(name, text) for name, text in rows.items() if text]
    warned = (
        warn_of_name(args)
        + about["warnings"]
        + warn_of_start(args)
        + warn_of_no_step(run)
        + warn_of_held_out(args, counts, num_held_out)
        + warn_of_warm_up(args, counts)
        + warn_of_disk(args, run)
    )
    warnings = [as_row("warning", text) for text in warned]
    # At once: who is killed for what the first step takes has told it.
    print("\n".join(["Plan", *lines, *warnings]), flush=True)


def tell_images_of_step(counts):
    """How many images a step has, as a text: no more than there are."""
    most = max_samples_per_step(counts)
    return counted(most, "image") + (" at most" if most < counts.samples_per_step else "")


def as_row(name, text):
    """A row of a plan: a name, and lines of text, which are broken where they are wider than the terminal."""
    width = min(100, shutil.get_terminal_size((100, 24)).columns) - len(MARGIN)
    words = {"break_long_words": False, "break_on_hyphens": False}  # paths and flags
    lines = []
    for line in text.split("\n"):
        lines += [line] if len(line) <= width else textwrap.wrap(line, width, **words)
    return f"  {name:<10} " + f"\n{MARGIN}".join(lines)


def describe_device(device):
    """What a device of PyTorch's is: which one, and how large."""
    if device.type == "cpu":
        number = torch.get_num_threads()
        # On a busy machine many wait for each other: a step may take a hundred times as long as by one.
        told = f"{counted(number, 'thread')}{' (OMP_NUM_THREADS sets fewer)' if number > 1 else ''}"
        told = f"CPU, {told}, {get_cpu_capability()}"
    elif is_cuda_available():
        told = f"{get_device_name(device)}, {get_device_properties(device).total_memory / 1e9:.3g} GB"
    else:
        told = device.type
    return f"{told}, by PyTorch {torch.__version__}"  # whose name says which GPUs it knows


@contextlib.contextmanager
def told_in_plan(texts):
    """Adds to `texts` what is printed meanwhile, as images are read, for a row of the plan; if that fails, and there
    will be no plan, it is printed at once."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            yield
    except BaseException:
        print(told.getvalue(), end="", flush=True)
        raise
    texts.append(told.getvalue())


def describe_kinds(images, repeats, prompt):
    """Lines on photos to train on: how often each is there, and how many have captions of their own, where others get
    the `prompt`."""
    lines, number = [], len(images) // repeats
    if repeats > 1:
        lines.append(f"{counted(number, 'photo')}, each {repeats:,} times")
    if prompt:
        num_own = sum(captions != [prompt] for captions in images.rows["captions"]) // repeats
        lines.append(f"{num_own:,} with captions of their own, {number - num_own:,} with --instance_prompt")
    return lines


def count_checkpoints(args, run):
    """How many checkpoints a run will have at once: the newest is there before the oldest goes."""
    steps = range(run.progress["global_step"] + 1, run.counts.last_step + 1)
    number = sum(step % args.checkpointing_steps == 0 or step == run.counts.last_step for step in steps)
    if args.checkpoints_total_limit:
        number = min(number, args.checkpoints_total_limit + 1 + args.keep_best)
    return number


def tell_disk(args, run, result_bytes):
    """What checkpoints and result will take of the disk; nothing if the size of the result is not known."""
    if result_bytes is None:
        return None
    number, one = count_checkpoints(args, run), checkpoint_bytes(run)
    free = shutil.disk_usage(existing_place(args.output_dir)).free
    checkpoints = "no checkpoint"
    if number:
        checkpoints = f"{counted(number, 'checkpoint', 'checkpoints at once')}: {tell_size(number * one)}"
    return f"{checkpoints}, result: {tell_size(result_bytes)}; {tell_size(free)} are free"


def tell_cost(counts, device, num_samples, seconds, num_steps, now):
    """Prints what was measured of a step of `num_samples`, which took so many seconds: the time of a step that has as
    many as the mean, and of `num_steps` from `now` on, and the peak of the memory so far."""
    rate = num_samples / seconds
    seconds = mean_samples_per_step(counts) / rate  # those at the end of an epoch, or of a bucket, may be short
    duration = datetime.timedelta(seconds=round(num_steps * seconds))
    print(
        f"  time       {seconds:.3g} s per step, {rate:.4g} images/s; "
        f"{counted(num_steps, 'step takes', 'steps take')} {duration}, until {now + duration:%Y-%m-%d %H:%M}"
    )
    print(f"  memory     {', '.join(peak_memory(device))} at most")


def peak_memory(device):
    """Lists the most memory that was taken so far, as far as it can be measured."""
    names = {"device_gb": "the device", "process_gb": "this process"}
    peaks = [f"{number:.3g} GB of {names[name]}" for name, number in peak_gigabytes(device).items()]
    return peaks or ["not measured here"]


def warn_of_disk(args, run):
    """Lists whether the checkpoints will not fit on the disk."""
    number = count_checkpoints(args, run)
    needed, free = number * checkpoint_bytes(run), shutil.disk_usage(existing_place(args.output_dir)).free
    if needed <= free:
        return []
    return [
        f"{counted(number, 'checkpoint takes', 'checkpoints take')} {needed / 1e9:.2g} GB, where {free / 1e9:.2g} are "
        "free; make room, or use a smaller --checkpoints_total_limit"
    ]


def warn_of_name(args):
    """Lists whether the base came from the Hub, though its name looks like that of a folder here, mistyped."""
    name = args.pretrained_model_name_or_path
    missing = missing_here(name)
    if not missing:
        return []
    return [f"--pretrained_model_name_or_path={name}: {missing}; it is the Hub's model of that name"]


def warn_of_start(args):
    """Lists whether there is nothing to resume."""
    if args.resume_from_checkpoint != "latest" or list_checkpoints(args.output_dir):
        return []
    return [f"--resume_from_checkpoint=latest: {args.output_dir} holds NO CHECKPOINT; this run starts from step 0"]


def warn_of_no_step(run):
    """Lists whether nothing is left to train of a run that is gone on with."""
    last_step = run.counts.last_step
    if run.progress["global_step"] < last_step:
        return []
    done = "the one step is" if last_step == 1 else f"all of {last_step:,} steps are"
    return [f"{done} done, and only the result is written again; raise --max_train_steps to train on"]


def warn_of_held_out(args, counts, num_held_out):
    """Lists whether no more images are left to train on than are held out."""
    if counts.num_images is None:
        return []
    number = counts.num_images // getattr(args, "repeats", 1)
    if num_held_out < number:
        return []
    told = f"leaves {number:,} to train on, no more than are held out; use fewer, or more images"
    return [f"--num_validation_samples={args.num_validation_samples}: {told}"]


def warn_of_warm_up(args, counts):
    """Lists whether the learning rate never arrives at what was asked for."""
    if args.lr_warmup_steps < counts.last_step:
        return []
    told = f"in {counted(counts.last_step, 'step')} the learning rate never arrives; use fewer"
    return [f"--lr_warmup_steps={args.lr_warmup_steps}: {told}"]


def warn_of_precision(accelerator):
    """Lists whether the device of a run in PyTorch has to emulate the precision that is asked for."""
    precision = accelerator.mixed_precision
    if accelerator.device.type == "cpu":
        is_quick = _is_avx512_bf16_supported() or _is_amx_tile_supported()
        # What others than Intel's and AMD's can, PyTorch does not tell.
        return [] if is_quick else warn_of_slow_bf16(precision, platform.machine() in ("x86_64", "AMD64"))
    if precision != "bf16" or not is_cuda_available() or is_bf16_supported(including_emulation=False):
        return []
    return ["bf16 is only emulated on this GPU, and slow; use --mixed_precision=fp16"]


def warn_of_slow_bf16(precision, is_known=False):
    """Lists whether a precision is slow on a CPU, or may be, unless it is known to have no instructions for it."""
    if precision != "bf16":
        return []
    if is_known:
        told = "bf16 is several times slower than float32 on this CPU, which lacks AVX512-BF16 and AMX"
    else:
        told = "bf16 may be slower than float32 on a CPU"
    return [f"{told}; use --mixed_precision=no"]


def checkpoint_bytes(run):
    """How many bytes the tensors of a checkpoint take, before the first step or later: weights, the optimizer's
    moments, the average."""
    if (run.settings.get("sharding") or "").startswith(
        "ZeRO"
    ):  # weights, once more in float32 in the optimizer, and its two moments
        total = sum(16 * numel_of(parameter) for parameter in run.weights.parameters)
        return total + array_bytes(run.state["ema"].shadow_params if "ema" in run.state else [])
    total = array_bytes(run.weights.parameters) if run.weights else 0
    for name, part in run.state.items():
        if name == "optimizer" and hasattr(part, "param_groups"):  # whose moments are made in the first step
            for group in part.param_groups:
                for parameter in group["params"]:
                    total += moment_bytes(parameter, part.state.get(parameter, {}), run.settings["optimizer"])
        else:
            total += array_bytes(part.state_dict() if hasattr(part, "state_dict") else part)
    return total


def moment_bytes(parameter, state, optimizer):
    """How many bytes the state of an optimizer, by name, takes for a parameter; `state` is what is there of it."""
    size = parameter.numel()
    if optimizer == "adamw8bit":
        # A byte for each moment, and for every 256 a scale; but small tensors, and embeddings, are left in 32 bits.
        is_whole = size < 4096 or ("state1" in state and state["state1"].dtype == torch.float32)
        return 8 * size if is_whole else 2 * (size + 4 * math.ceil(size / 256))
    if optimizer == "adafactor" and parameter.dim() >= 2:  # means over rows and over columns
        return 4 * (size // parameter.shape[-1] + size // parameter.shape[-2])
    if optimizer == "adafactor":
        return 4 * size
    if optimizer == "prodigy":  # two moments, a sum, and the start, unless that was zero
        was_zero = state["p0"].dim() == 0 if "p0" in state else not parameter.any()
        return 4 * size * (3 if was_zero else 4)
    return 2 * parameter.nbytes


def tell_size(size):
    """A number of bytes for people, in units of 1000."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} KB"


def array_bytes(part):
    """How many bytes the tensors or arrays take in a nested structure."""
    if isinstance(part, dict):
        return sum(array_bytes(value) for value in part.values())
    if isinstance(part, list | tuple):
        return sum(array_bytes(value) for value in part)
    return getattr(part, "nbytes", 0)


# ------------------------------------------------------------------------------------------------------------ progress
def start_bar(run, is_shown):
    """A bar over the steps that are left, which shows in a terminal alone, and a place for the recent steps: of each
    its loss, samples and seconds."""
    first_step, last_step = run.progress["global_step"], run.counts.last_step
    bar = tqdm(
        range(first_step, last_step),
        initial=first_step,
        total=last_step,
        unit="step",
        bar_format=BAR,
        disable=None if is_shown else True,  # None: unless it goes to a terminal
        leave=False,  # of a run that ends early it would be drawn once more, below what says why
    )
    return bar, collections.deque(maxlen=NUM_RECENT)


def tell_step(args, bar, run, device, recent):
    """Tells what the `recent` steps come to: on the bar, or without one in a line every --logging_steps."""
    done, last_step = run.progress["global_step"], run.counts.last_step
    loss, rate, seconds = means_of(recent)
    told = [] if loss is None else [f"mean loss {loss:.4f}"]
    told += [] if rate is None else [f"{rate:.3g} images/s"]
    memory = peak_memory(device)[0]
    if not bar.disable:
        bar.set_postfix_str(", ".join([*told, memory.partition(" of ")[0]]), refresh=False)
        bar.leave = done == last_step
    elif done % args.logging_steps == 0 or done == last_step:
        left = []
        if seconds is not None and done < last_step:
            left = [f"{datetime.timedelta(seconds=round(seconds * (last_step - done)))} left"]
        print(f"Step {done:,} of {last_step:,}: {', '.join([*told, memory, *left])}", flush=True)


def means_of(recent):
    """Of steps, each a tuple of loss, samples and seconds: the mean of those losses that are finite, the samples per
    second and the seconds of a step; None for what is not known. The seconds of a first step, which compiles and warms
    up, are None."""
    losses = [loss for loss, _, _ in recent if math.isfinite(loss)]
    timed = [(num_samples, seconds) for _, num_samples, seconds in recent if seconds is not None]
    total = sum(seconds for _, seconds in timed)
    return (
        sum(losses) / len(losses) if losses else None,
        sum(num_samples for num_samples, _ in timed) / total if total else None,
        total / len(timed) if timed else None,
    )


# ---------------------------------------------------------------------------------------------------------- model_card
def plain(text):
    """A text of somebody's as Markdown that shows it in one line, and does nothing else."""
    return re.sub(r"([\\`*~\[\]<>|&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(str(text).split()))


def in_python(text):
    """A text as a literal of Python."""
    return json.dumps(text, ensure_ascii=False)


def name_base(args):
    """The name of the base: that on the Hub, or of a local folder or file its own without the path to it."""
    base = args.pretrained_model_name_or_path
    return os.path.basename(os.path.abspath(base)) if os.path.exists(base) else base


def find_trigger(rows):
    """The words before the first comma that the captions of all rows begin with, such as a trigger word; None if there
    are none, or for None, where images are a stream."""
    if rows is None:
        return None
    starts, num_captions = set(), 0
    for captions in rows["captions"]:
        for caption in captions:
            start, comma, _ = caption.partition(",")
            starts.add(start.strip() if comma else "")
            num_captions += 1
        if len(starts) > 1:
            return None
    return starts.pop() or None if starts and num_captions > 1 else None


def describe_subject(args, num_photos, num_class_images):
    """What DreamBooth is trained on, as a text; a photo counts --repeats times in `num_photos`."""
    number = num_photos // args.repeats
    text = f"{counted(number, 'photo')} of one subject"
    return text + (f", beside {counted(num_class_images, 'image')} of its class" if num_class_images else "")


def name_result(args, repo_id):
    """The name of the result: of its repository on the Hub, or of its folder."""
    return repo_id or Path(args.output_dir).resolve().name


def call_of(args, pipeline):
    """What `pipe` is given beside the prompt: how samples were drawn, and their size if it isn't the model's own."""
    call = {
        "negative_prompt": args.validation_negative_prompt,
        "num_inference_steps": args.validation_num_inference_steps,
        "guidance_scale": args.validation_guidance_scale,
    }
    side = pipeline.unet.config.sample_size
    if isinstance(side, int) and side * pipeline.vae_scale_factor != args.resolution:
        call |= {"height": args.resolution, "width": args.resolution}
    return {name: value for name, value in call.items() if value is not None}


def load_base_lines(args):
    """Returns (lines of Python that name the base, the call that loads it)."""
    base, is_local = args.pretrained_model_name_or_path, not is_hub_id(args.pretrained_model_name_or_path)
    given, loader = ["base"], "from_pretrained"
    if Path(base).is_file():
        loader = "from_single_file"
        if args.single_file_config and not Path(args.single_file_config).exists():
            given.append(f"config={in_python(args.single_file_config)}")
    elif not is_local:
        asked = {"revision": args.revision, "variant": args.variant}
        given += [f"{name}={in_python(value)}" for name, value in asked.items() if value]
    remark = "  # which is not on the Hub: give the path to it" if is_local else ""
    return [f"base = {in_python(name_base(args))}{remark}"], f"StableDiffusionPipeline.{loader}({', '.join(given)})"


def use_of_adapters(args, pipeline, noise_scheduler, file, repo_id):
    """How LoRA adapters in a file are drawn with: the base is `pipeline`, on which they were trained under
    `noise_scheduler`."""
    base_lines, load = load_base_lines(args)
    usage = Usage(
        imports=["import torch", "from diffusers import StableDiffusionPipeline"],
        loading=[
            *base_lines,
            f"model = {in_python(name_result(args, repo_id))}{NAMES_MODEL}",
            f"pipe = {load}",
            f'pipe.load_lora_weights(model, weight_name="{file}")',
        ],
        call={**call_of(args, pipeline), "cross_attention_kwargs": {"scale": 1.0}},
        notes=["`scale` is the strength of the adapters: 1 as trained, less for less of them, 0 for the base."],
    )
    if args.output_kohya_format:
        other = plain(f"{kohya_name(args)}.safetensors")
        usage.notes.append(f"Beside `{file}` *{other}* holds the same adapters for A1111, Forge and ComfyUI.")
    base, trained = pipeline.scheduler.config, noise_scheduler.config
    kind, changes = "type(pipe.scheduler)", {}
    if trained.prediction_type != base.get("prediction_type", "epsilon"):
        changes["prediction_type"] = trained.prediction_type
    if trained.rescale_betas_zero_snr and not base.get("rescale_betas_zero_snr"):
        kind = "DDIMScheduler"  # few samplers can start from pure noise
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        usage.imports[1] = "from diffusers import DDIMScheduler, StableDiffusionPipeline"
    if changes:
        usage.loading += [
            "settings = dict(pipe.scheduler.config)",
            f"settings.update({in_call(changes)})",
            f"pipe.scheduler = {kind}.from_config(settings)",
        ]
        usage.notes.append("The adapters were trained under another schedule than the base's; the code sets it.")
    usage.notes += describe_scheduler(trained)
    return usage


def describe_scheduler(config):
    """Paragraphs on what another sampler, or another program, has to know of how noise was predicted."""
    notes = []
    if config.prediction_type != "epsilon":
        notes.append(
            f"It predicts `{config.prediction_type}`. Make other samplers from the scheduler's settings, as by "
            "`DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`; other programs have to be told."
        )
    if config.get("rescale_betas_zero_snr"):
        notes.append(
            "It was trained to zero terminal SNR (arXiv 2305.08891): samplers need `rescale_betas_zero_snr=True` and "
            '`timestep_spacing="trailing"`. If pictures look burnt, give `guidance_rescale=0.7` to `pipe`.'
        )
    return notes


def in_call(values):
    """Values by name as the arguments of a call in Python."""
    return ", ".join(f"{name}={value if value is True else in_python(value)}" for name, value in values.items())


def code_of(usage, prompt):
    """The Python code that draws a picture, as a block of Markdown."""
    given = [in_python(prompt), *[in_call({name: value}) for name, value in usage.call.items()]]
    lines = [
        *usage.imports,
        "",
        *usage.loading,
        'pipe.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")',
        "image = pipe(",
        *[f"    {argument}," for argument in given],
        ").images[0]",
        'image.save("picture.png")',
    ]
    return "\n".join(["```python", *lines, "```"])


def describe_steps(args, run):
    """How long a run was, as it was: one that was resumed counts its steps from the first one."""
    counts, steps = run.counts, run.progress["global_step"]
    text = f"{counted(steps, 'step')} of {counted(max_samples_per_step(counts), 'image')} each"
    if counts.steps_per_epoch:
        epochs = f"{steps / counts.steps_per_epoch:,.1f}".removesuffix(".0")
        text += f", which is {epochs} {'epoch' if epochs == '1' else 'epochs'}"
    text += f", at a learning rate of at most {run.settings['peak_learning_rate']:g}"
    if args.use_ema:
        text += "; the weights are an average over the steps (EMA)"
    if args.allow_changed_resume:
        text += ". The run was resumed under changed settings: those below are of its last part"
    return text


def describe_gain(args, run):
    """How far the loss on held-out images fell, by the log; None if no image was held out."""
    rows = []
    with contextlib.suppress(OSError, ValueError, TypeError):  # somebody may have moved the log, or written into it
        lines = Path(args.output_dir, "log.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if {"held_out_loss", "held_out_gain", "gain_error"} <= {*row}]
    if not rows or not run.progress["base_losses"]:
        return None
    number, last = len(run.progress["base_losses"]), rows[-1]
    loss, gain, error = last["held_out_loss"], last["held_out_gain"], last["gain_error"]
    images = counted(number, "image that was", "images that were")
    change = f"fell by {gain:.4f}" if gain >= 0 else f"rose by {-gain:.4f}"
    text = f"On {images} not trained on, the loss {change}, from {loss + gain:.4f} to {loss:.4f}"
    if number < MIN_FOR_INTERVAL:
        return f"{text}; these are too few to say how sure that is"
    low, high = gain - INTERVAL * error, gain + INTERVAL * error
    text += f". With a confidence of about 95 % the gain is between {low:.4f} and {high:.4f}"
    return text if low > 0 or high < 0 else f"{text}: it may be chance"


def list_settings(args, parser, run):
    """Rows of the settings that are not the script's defaults, as Markdown: no paths, no names of files, no
    secrets."""
    rows = ["Settings that are not the script's defaults:", "", "| setting | here | default |", "|---|---|---|"]
    used = {**vars(args), "mixed_precision": run.settings["mixed_precision"]}
    defaults = {"mixed_precision": "no"}
    for flag in parser._actions:
        value, default = used.get(flag.dest), defaults.get(flag.dest, flag.default)
        is_private = is_place(flag) or flag.dest in NOT_ON_CARD
        is_file = isinstance(value, str) and os.path.exists(value)
        if flag.dest in used and value != default and not is_private and not is_file:
            rows.append(f"| `--{flag.dest}` | {plain(value)} | {'-' if default is None else plain(default)} |")
    return rows if len(rows) > 4 else ["All settings are the script's defaults."]


def find_licence(args):
    """What the card of the base says of its licence, on disk or on the Hub: license, and maybe license_name and
    license_link; {} if nothing is found."""
    base = args.pretrained_model_name_or_path
    with contextlib.suppress(Exception):  # no card, no connection, bad YAML: a licence must not cost a result
        data = ModelCard.load(base if is_hub_id(base) else Path(base, "README.md"), token=args.hub_token).data
        found = {name: data.get(name) for name in ("license", "license_name", "license_link")}
        if found["license_link"] and not re.match("https?://", str(found["license_link"])):  # a file beside that card
            found["license_link"] = f"https://huggingface.co/{base}" if is_hub_id(base) else None
        if isinstance(found["license"], str):
            return {name: value for name, value in found.items() if isinstance(value, str)}
    return {}


def describe_licence(licence):
    """What holds, as a sentence."""
    if not licence:
        return "Not known here: the licence of the base holds."
    name = licence.get("license_name", licence["license"])
    link = licence.get("license_link")
    shown = f"[{plain(name)}](<{link}>)" if link and re.fullmatch(r"https?://[^\s<>]+", link) else plain(name)
    return f"{shown}, which is that of the base."


def list_samples(args, run, prompts):
    """The newest samples and those of the base, as lines of Markdown, and the path of the newest; ([], None) if there
    are none."""
    names = sorted(path.name for path in Path(args.output_dir, "samples").glob("step-*.png"))
    names = [name for name in names if name <= f"step-{run.progress['global_step']:06d}.png"]
    if not names or not prompts:
        return [], None
    last = f"samples/{names[-1]}"
    different = list(dict.fromkeys(prompts))
    label = "Prompt" if len(different) == 1 else "Prompts, in the order of the pictures"
    lines = [f"![samples]({last})", "", f"{label}: {'; '.join(map(plain, different))}", ""]
    if names[0] == "step-000000.png" != names[-1]:
        lines += ["The base draws this of the same noise:", "", f"![samples of the base](samples/{names[0]})", ""]
    return lines, last


def make_front_matter(args, licence, prompts, picture, training):
    """What the Hub reads of the card."""
    base, data = args.pretrained_model_name_or_path, args.dataset_name or ""
    is_local = not is_hub_id(base)
    different = list(dict.fromkeys(prompts))
    widget = [{"text": prompt} for prompt in different]
    if picture and len(different) == 1:
        widget[0]["output"] = {"url": picture}
    if not licence:
        licence = {"license": "other", "license_name": "as-the-base"}
        if not is_local:
            licence["license_link"] = f"https://huggingface.co/{base}"
    return ModelCardData(
        **licence,
        base_model=None if is_local else base,
        datasets=[data] if is_hub_id(data) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*TAGS, *training.tags],
        instance_prompt=training.trigger,
        widget=widget or None,
    )


def write_card(args, parser, folder, run, prompts, usage, training):
    """Writes the model card into a folder: how to use the result, samples, what it was trained on and how well it
    learnt, the settings that are not the defaults of `parser`, the licence; no paths, no secrets. `prompts` are those
    of the samples; `usage` and `training` are what only the script knows."""
    base, licence = args.pretrained_model_name_or_path, find_licence(args)
    samples, picture = list_samples(args, run, prompts)
    data = make_front_matter(args, licence, prompts, picture, training)
    shown = f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else f"*{plain(name_base(args))}*"
    trigger = f" Put **{plain(training.trigger)}** into a prompt to draw what it learnt." if training.trigger else ""
    shape = "in shapes of the area of" if run.counts.buckets is not None else "at"
    gain = describe_gain(args, run)
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {plain(Path(args.output_dir).resolve().name)}",
        "",
        f"{training.trained} {shown}, trained on {training.images}.{trigger}",
        "",
        *samples,
        "## How to draw with it",
        "",
        code_of(usage, (prompts or [training.trigger or "a picture"])[0]),
        "",
        *[line for note in usage.notes for line in (note, "")],
        "## How it was trained",
        "",
        f"- On {training.images}, {shape} {args.resolution} x {args.resolution} pixels.",
        f"- For {describe_steps(args, run)}.",
        f"- {gain}." if gain else "- No images were held out to measure how well it learnt.",
        "",
        *list_settings(args, parser, run),
        "",
        "## Licence",
        "",
        describe_licence(licence),
        "",
    ]
    Path(folder, "README.md").write_text("\n".join(lines), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- endings
def tell_end(args, run, files, command):
    """Says what a run has left in its folder, how long that took, whether it learnt, the words of the `command` that
    draws with it, or None where only the code on the card does, and how the run is extended. `files` are patterns of
    the result's files. For one process alone."""
    folder = run.output_dir
    record, checkpoints = read_run(folder, folder.name), list_checkpoints(folder)
    result = [path for pattern in files for path in folder.glob(pattern)]
    kind = "LoRA adapters" if (folder / LORA_FILE).is_file() else "a pipeline"
    number = counted(len(checkpoints), "checkpoint")
    in_all = f"{tell_size(size_on_disk([folder]))} in all, of them {tell_size(size_on_disk(checkpoints))} in {number}"
    code = f"the code in {in_one_line(folder / 'README.md')}"
    rows = {
        "made": f"{kind} in {in_one_line(folder)}: {tell_size(size_on_disk(result))} ({in_all})",
        "took": tell_duration(record.history, run.progress["global_step"], datetime.datetime.now(datetime.UTC)),
        "learnt": judge(record)[0],
        "draw": f"{in_lines(command)}\nor by {code}" if command else f"by {code}",
        "extend": f"the same command with {' '.join(words_to_extend(args, run))}",
        "look": in_lines(["sdtune", "report", f"{folder}"]),
    }
    print("\n".join(["Done", *[as_row(name, text) for name, text in rows.items() if text]]), flush=True)


def size_on_disk(paths):
    """How many bytes files, and those in folders, have."""
    total = 0
    for path in paths:
        files = path.rglob("*") if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total


def tell_duration(history, last_step, now):
    """How long it took from the newest start or resume in a history to `last_step`; None if there is none."""
    starts = [row for row in history if row.get("event") in ("started", "resumed")]
    if not starts:
        return None
    seconds = (now - datetime.datetime.fromisoformat(starts[-1]["time"])).total_seconds()
    return f"{datetime.timedelta(seconds=round(seconds))}, from step {starts[-1]['step']:,} to {last_step:,}"


def command_to_draw(args, pipeline, noise_scheduler, prompt):
    """The words of the `sdtune generate` that draws a prompt with the result, as samples were drawn; None where only
    code does: a text encoder, or another schedule of noise, has to be fetched from somewhere."""
    folder, base = Path(args.output_dir), args.pretrained_model_name_or_path
    words = ["sdtune", "generate", f"{folder}"]
    if (folder / LORA_FILE).is_file():
        before, trained = pipeline.scheduler.config, noise_scheduler.config
        is_same = trained.prediction_type == before.get("prediction_type", "epsilon")
        is_same &= bool(trained.rescale_betas_zero_snr) == bool(before.get("rescale_betas_zero_snr"))
        if not is_same or args.revision or args.variant or args.single_file_config:
            return None
        words = ["sdtune", "generate", base, f"--lora={folder}"]
    elif not (folder / "text_encoder").is_dir():
        return None
    given = [f"--{name}={value}" for name, value in call_of(args, pipeline).items()]
    return [*words, "--prompts", prompt, *given]


def words_to_extend(args, run):
    """What is added to the command of a run to go on to twice as many steps."""
    words = ["--resume_from_checkpoint=latest", f"--max_train_steps={2 * run.counts.last_step}"]
    if run.settings["schedule_steps"] is not None:  # the schedule is one over all steps
        words.append("--allow_changed_resume")
    return words + (["and without --overwrite_output_dir"] if args.overwrite_output_dir else [])


def in_lines(words):
    """A command as a shell takes it, in lines that fit a terminal."""
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > MAX_COLUMNS:
            lines.append("  ")
        lines[-1] += word if not lines[-1].strip() else f" {word}"
    return " \\\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------- hub
def name_repo(args):
    """The full name of the repository to upload to, which is made when there is something to upload. Raises
    `InputError` where nobody is logged in."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        user = HfApi(token=args.hub_token).whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PermissionError("the token can only read")
        repo_id = name if "/" in name else f"{user['name']}/{name}"
        validate_repo_id(repo_id)
        return repo_id
    except Exception as error:  # of the Hub, of the connection or of the name
        raise InputError(
            f"--push_to_hub: cannot upload to {name}; log in with `hf auth login` or --hub_token, and check "
            f"--hub_model_id ({last_line(error)})"
        ) from None


def push(args, repo_id, files, step):
    """Makes the repository and uploads `files` of the result, card, log and samples, nothing else; if that fails, says
    how to and ends with status 1."""
    folder = args.output_dir
    files = ["README.md", "log.jsonl", "samples/*", *files]
    try:
        api = HfApi(token=args.hub_token)
        api.create_repo(repo_id, private=args.hub_private_repo or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=f"Train {counted(step, 'step')}", allow_patterns=files
        )
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, the result is safe, which the user should hear
        include = " ".join(map(repr, files))
        print(
            f"The upload failed ({last_line(error)}). The result is whole in {folder}; to send it again:\n"
            f"  hf upload {repo_id} {folder} . --include {include}",
            file=sys.stderr,
        )
        sys.exit(1)


# ---------------------------------------------------------------------------------------------------------- validation
def share_of(accelerator, number):
    """Which of a number of things this process has to look at: every so many, but all of them where weights are shared
    out, so that all processes make the same passes together."""
    if has_shared_passes(accelerator):
        return range(number)
    return range(accelerator.process_index, number, accelerator.num_processes)


def asked_together(accelerator, is_asked):
    """Whether `is_asked()` says yes in some process; all of them have to call this."""
    return accelerator.reduce(torch.tensor(float(is_asked()), device=accelerator.device), "sum").item() > 0


@torch.no_grad()
def encode_held_out(accelerator, vae, text_encoder, images, batch_size):
    """Encodes this process's share of held-out images, and their captions unless the text encoder is trained; not what
    comes out of a cache."""
    posteriors, input_ids, prompt_embeds = {}, {}, {}
    mine = share_of(accelerator, len(images))
    items = [(0, index, 1.0) for index in mine]
    batches = batches_of_one_size(items, images.sizes[mine], batch_size)
    for batch in torch.utils.data.DataLoader(images, batch_sampler=batches):
        indices = batch["index"].tolist()
        input_ids |= zip(indices, batch["input_ids"], strict=True)
        if images.reads_pixels:
            mean, log_variance = encode_posterior(vae, batch["pixel_values"].to(accelerator.device))
            posteriors |= zip(indices, zip(mean.cpu(), log_variance.cpu(), strict=True), strict=True)
        if "prompt_embeds" in batch:
            prompt_embeds |= zip(indices, batch["prompt_embeds"], strict=True)
    if text_encoder.training:
        prompt_embeds = None
    elif not prompt_embeds:
        prompt_embeds = encode_captions(accelerator, text_encoder, input_ids, batch_size)
    return HeldOut(unopened(images), posteriors or None, input_ids, prompt_embeds)


def encode_captions(accelerator, text_encoder, input_ids, batch_size):
    """The embeddings of captions by index, in the CPU's memory, of their tokens by index."""
    prompt_embeds, indices = {}, list(input_ids)
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        tokens = torch.stack([input_ids[index] for index in batch]).to(accelerator.device)
        with accelerator.autocast():
            prompt_embeds |= zip(batch, text_encoder(tokens)[0].cpu(), strict=True)
    return prompt_embeds


@torch.no_grad()
def held_out_losses(
    accelerator, unet, vae, text_encoder, noise_scheduler, held_out, batch_size, is_asked=lambda: False
):
    """The unweighted loss of every held-out image (num_images,), a mean over timesteps spread evenly; noise and
    timesteps are the same in every call and run. Each process does its share. Raises `LookGivenUp` if `is_asked()`,
    which is called before each batch, says yes in some process."""
    images, prompt_embeds = held_out.images, held_out.prompt_embeds
    if prompt_embeds is None:
        prompt_embeds = encode_captions(accelerator, text_encoder, held_out.input_ids, batch_size)
    pairs = [(part, index, 1.0) for index in held_out.input_ids for part in range(HELD_OUT_TIMESTEPS)]
    losses, stopped = torch.zeros(len(images)), torch.zeros(1)
    batches = batches_of_one_size(pairs, images.sizes[[index for _, index, _ in pairs]], batch_size)
    for batch in torch.utils.data.DataLoader(images, batch_sampler=batches):
        if is_asked():
            stopped += 1
            break
        indices = batch["index"].tolist()
        if held_out.posteriors is not None:
            means, log_variances = zip(*[held_out.posteriors[index] for index in indices], strict=True)
            batch |= {"mean": torch.stack(means), "log_variance": torch.stack(log_variances)}
        batch["prompt_embeds"] = torch.stack([prompt_embeds[index] for index in indices])
        batch = send_to_device(batch, accelerator.device, skip_keys="index")
        # Each image comes four times, with the number of a quarter in the place of the epoch: its timestep goes there.
        batch["timestep"] = (batch["timestep"] + batch["epoch"] * images.num_timesteps) // HELD_OUT_TIMESTEPS
        with accelerator.autocast():
            latents = draw_latents(vae, batch["mean"], batch["log_variance"], batch["posterior_noise"])
            part_losses = diffusion_losses(unet, noise_scheduler, latents, batch["prompt_embeds"], batch)
        losses.index_add_(0, batch["index"], part_losses.cpu() / HELD_OUT_TIMESTEPS)
    accelerator.wait_for_everyone()  # patiently: they need not be done at the same time
    # One exchange for both, so that no process waits for one that was stopped.
    kind = "mean" if has_shared_passes(accelerator) else "sum"
    *losses, stopped = accelerator.reduce(torch.cat([losses, stopped]).to(accelerator.device), kind).tolist()
    if stopped:
        raise LookGivenUp
    return torch.tensor(losses)


def log_held_out_losses(accelerator, run, losses):
    """Logs the mean of held-out losses, and its gain over those before training, which the run's progress keeps, with
    the standard error of the paired difference; says in a sentence what that means."""
    progress, is_first = run.progress, not run.progress["base_losses"]
    progress["base_losses"] = progress["base_losses"] or losses.tolist()
    gain = torch.tensor(progress["base_losses"], dtype=losses.dtype) - losses
    error = gain.std().item() / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    numbers = {"held_out_loss": losses.mean().item(), "held_out_gain": gain.mean().item(), "gain_error": error}
    write_log(accelerator, run.output_dir, progress["global_step"], numbers)
    if not accelerator.is_main_process or progress["global_step"] == run.counts.last_step:  # the end tells it
        return
    images = counted(len(losses), "held-out image")
    told = f"Step {progress['global_step']:,}: the loss on {images} is {numbers['held_out_loss']:.4f}."
    if not is_first:
        told = judge(read_run(run.output_dir, run.output_dir.name))[0]
    tqdm.write(fitted(told))  # above a bar


@torch.no_grad()
def draw_samples(args, accelerator, parts, prompts, is_asked):
    """Draws an image per prompt as the flags say, by default in 25 steps of DPM-Solver++ (arXiv 2211.01095), shared
    out over the processes. Returns all of them. Raises `LookGivenUp` if `is_asked()`, which is called before each
    batch and after each denoising step, says yes in some process."""
    is_ancestral = args.validation_scheduler == "DDPMScheduler"
    kind = diffusers.DDPMScheduler if is_ancestral else diffusers.DPMSolverMultistepScheduler
    scheduler = kind.from_config(parts["scheduler"].config)
    pipeline = diffusers.StableDiffusionPipeline(**{**parts, "scheduler": scheduler}, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)

    def interrupt(pipeline, step, timestep, tensors):
        pipeline._interrupt = is_asked()  # which makes it skip the steps that are left
        return tensors

    drawn, negative_prompt = [], args.validation_negative_prompt
    mine = share_of(accelerator, len(prompts))
    for start in range(0, len(mine), args.train_batch_size):
        if is_asked():
            break
        batch = mine[start : start + args.train_batch_size]
        with accelerator.autocast():
            images = pipeline(
                [prompts[number] for number in batch],
                height=args.resolution,
                width=args.resolution,
                num_inference_steps=args.validation_num_inference_steps or 25,
                guidance_scale=args.validation_guidance_scale or 7.5,
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(batch),
                # On the CPU, each from a seed of its own: no other image, process or device changes it.
                generator=[torch.Generator().manual_seed(args.seed + number) for number in batch],
                callback_on_step_end=interrupt,
            ).images
        drawn += zip(batch, images, strict=True)
    accelerator.wait_for_everyone()  # patiently: one may draw an image more
    shares = gather_object([(drawn, is_asked())])
    if any(stopped for _, stopped in shares):
        raise LookGivenUp
    image_of = dict(pair for drawn, _ in shares for pair in drawn)
    return [image_of[number] for number in range(len(prompts))]


def show_samples(accelerator, run, images):
    """Writes a grid of samples to samples/step-N.png and sends them to the trackers that take images. For one process
    alone."""
    step = run.progress["global_step"]
    path = run.output_dir / "samples" / f"step-{step:06d}.png"
    columns = min(len(images), 4)
    padding = [Image.new("RGB", images[0].size, "white")] * (-len(images) % columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_rows = math.ceil(len(images) / columns)
    diffusers.utils.make_image_grid(images + padding, num_rows, columns).save(path)
    tell_trackers(accelerator, functools.partial(track_samples, np.stack(images), step))


def track_samples(drawn, step, tracker):
    """Sends samples, pixels (num_images, height, width, 3), to a tracker that takes images."""
    if hasattr(tracker, "log_images"):
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": drawn}, step=step, **layout)


def validate(args, accelerator, run, parts, held_out, prompts, is_asked):
    """Draws samples and measures the held-out loss, under the averaged weights if there are any; returns the mean of
    the losses. `parts` are those of the pipeline, with the scheduler of training.

    `is_asked()` is called between batches and denoising steps, and has to stay with its yes. If it says yes in some
    process, all of them give up this look, of which nothing is written or logged. Raises `LookGivenUp` then.
    """
    if not prompts and not len(held_out.images):
        return None
    unet, vae, text_encoder = parts["unet"], parts["vae"], parts["text_encoder"]
    losses, images = None, None
    if has_shared_passes(accelerator):
        is_asked = functools.partial(asked_together, accelerator, is_asked)
    trained = torch.nn.ModuleList(part for part in (unet, text_encoder) if part.training).eval()
    try:
        with passing_alone(trained), averaged(run):
            if len(held_out.images):
                losses = held_out_losses(
                    accelerator, unet, vae, text_encoder, parts["scheduler"], held_out, args.train_batch_size, is_asked
                )
            if prompts:
                # Where all that they encode in training is cached, both wait in the CPU's memory.
                with on_device(accelerator.device, vae, text_encoder):
                    images = draw_samples(args, accelerator, parts, prompts, is_asked)
    finally:
        trained.train()
    if losses is not None:
        log_held_out_losses(accelerator, run, losses)
    if images and accelerator.is_main_process:
        show_samples(accelerator, run, images)
    accelerator.wait_for_everyone()
    return None if losses is None else losses.mean().item()


def steps_between_looks(args, counts):
    """Every how many steps a run is looked at."""
    if args.validation_epochs:
        return args.validation_epochs * counts.steps_per_epoch
    return args.validation_steps or 500


def prompts_of(args):
    """The prompt of each sample: one of each of --validation_prompts, four of --validation_prompt, or of each as many
    as --num_validation_images says."""
    number = args.num_validation_images
    prompts = []
    for prompt in args.validation_prompts or []:
        prompts += [prompt] * (1 if number is None else number)
    if args.validation_prompt is not None:
        prompts += [args.validation_prompt] * (4 if number is None else number)
    return prompts


def check_validation(args):
    """Lists the flags on samples that do nothing without a prompt, those on how often to look if there is nothing to
    draw or measure, and what contradicts itself."""
    problems, scale = [], args.validation_guidance_scale
    has_prompt = args.validation_prompt is not None or bool(args.validation_prompts)
    needed = "--validation_prompt or --validation_prompts"
    of_samples = {
        "num_validation_images": args.num_validation_images,
        "validation_scheduler": args.validation_scheduler,
        "validation_num_inference_steps": args.validation_num_inference_steps,
        "validation_guidance_scale": scale,
        "validation_negative_prompt": args.validation_negative_prompt,
    }
    for flag, value in of_samples.items():
        if value is not None and not has_prompt:
            problems.append(f"--{flag}={value}: does nothing without {needed}; add that or drop this")
    needed = "--validation_prompt, --validation_prompts or --num_validation_samples"
    for flag, value in {
        "validation_steps": args.validation_steps,
        "validation_epochs": args.validation_epochs,
    }.items():
        if value and not has_prompt and not args.num_validation_samples:
            problems.append(f"--{flag}={value}: does nothing without {needed}; add that or drop this")
    if args.validation_steps and args.validation_epochs:
        problems.append(
            f"--validation_epochs={args.validation_epochs}: contradicts --validation_steps={args.validation_steps}; "
            "drop one"
        )
    if args.validation_negative_prompt is not None and scale == 1:
        problems.append(
            f"--validation_negative_prompt={args.validation_negative_prompt}: does nothing under "
            "--validation_guidance_scale=1; drop one"
        )
    return problems


# ------------------------------------------------------------------------------------------------------------- signals
def is_asked(stop):
    """Whether the run is to stop: after a signal, or when the launcher is gone, to which alone a SIGTERM goes."""
    return bool(stop.received) or is_orphaned(stop.launcher)


def take_save_requests(stop):
    """Whether signals have asked for a checkpoint since the last call."""
    number = len(stop.saves)
    del stop.saves[:number]
    return number > 0


def find_launcher():
    """The process number of the launcher that started this process, or None without one; to be asked before accelerate
    sets variables of its own."""
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    return os.getppid() if launched else None


def is_orphaned(launcher):
    """Whether the launcher is gone: then this process has another parent."""
    return launcher is not None and os.getppid() != launcher


@contextlib.contextmanager
def noted_signals(stop):
    """Notes in `stop` the signals that ask to stop or to save, which by default end the process. One that came before
    is answered now, if a library has swallowed the exception that it raised, as some do with all exceptions."""
    if (number := swallowed_stop()) is not None:
        raise KeyboardInterrupt(number)
    note_stop = functools.partial(note_signal, stop.received)
    with answered_signals(note_stop, functools.partial(note_save, stop.saves)):
        yield


@contextlib.contextmanager
def stopped_by_signals():
    """Raises `KeyboardInterrupt` with the number of a signal that asks to stop, where there is no step to be finished,
    nor anything to save: what asks for that is ignored."""
    with answered_signals(interrupt, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def ended_by_signals():
    """Lets a signal that asks to stop end the process at once, where it waits for others outside of Python, which
    would not hear of the signal until they come."""
    with answered_signals(signal.SIG_DFL, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def answered_signals(stop_action, save_action):
    """Answers signals that ask to stop or to save by other actions for a while; afterwards they do what they did
    before. An ignored SIGHUP (nohup) stays ignored, and outside the main thread, which alone gets signals, all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    actions = {**dict.fromkeys(ASK_TO_STOP, stop_action), **dict.fromkeys(ASK_TO_SAVE, save_action)}
    number_of = signal.Signals.__members__
    if "SIGHUP" in number_of and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        del actions["SIGHUP"]
    before = {name: signal.getsignal(number) for name, number in known_signals(actions)}
    for name, number in known_signals(actions):
        signal.signal(number, actions[name])
    try:
        yield
    finally:
        for name, number in known_signals(before):
            signal.signal(number, before[name])


def known_signals(names):
    """Pairs of name and number of those signals that this system has."""
    return [(name, number) for name, number in signal.Signals.__members__.items() if name in names]


def on_signals(action, names=ASK_TO_STOP):
    """Answers signals by `action`."""
    for _, number in known_signals(names):
        signal.signal(number, action)


def ignore_signals(_=None):
    """Has a worker ignore what the main process answers, which needs its workers to finish the step."""
    on_signals(signal.SIG_IGN, ASK_TO_STOP | ASK_TO_SAVE)


def note_signal(received, number, _):
    """Appends the signal to `received`; another one ends the process at once, but for what comes with the first."""
    say("Finishing the step and writing a checkpoint; another signal, later, ends at once, without one.")
    received.append(number)
    on_signals(functools.partial(end_at_once, time.monotonic()))


def interrupt(number, _):
    """Raises `KeyboardInterrupt` with the number of the signal, as Ctrl-C does without one; another signal, but for
    what comes with the first, does not wait for what is left then."""
    on_signals(functools.partial(end_at_once, time.monotonic(), after=number))
    raise KeyboardInterrupt(number)


def swallowed_stop():
    """The signal after which `interrupt` raised its exception, where the process goes on nevertheless; or None."""
    if threading.current_thread() is threading.main_thread():
        action = signal.getsignal(signal.SIGTERM)
        if isinstance(action, functools.partial) and action.func is end_at_once:
            return action.keywords.get("after")
    return None


def end_at_once(since, number, _, after=None):
    """Ends the process by the signal, unless it is one with that of the time `since`, `after` which it came: of a
    Ctrl-C that a launcher hands on to a process that has got it too."""
    if time.monotonic() - since > SAME_REQUEST:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def note_save(saves, number, _):
    """Appends the signal to `saves`."""
    say("A checkpoint follows at the end of a step, and the run goes on.")
    saves.append(number)


def say(text):
    """Prints a line about a signal, where printing can be interrupted by it. What is printed from now on goes nowhere
    if the terminal, or a program that reads it, has gone by the same signal: any print would fail."""
    drop_lost_output()
    os.write(2, f"{text}\n".encode())


def drop_lost_output():
    """Sends standard output and errors nowhere if nobody is there to read them any more; returns whether so."""
    is_lost = False
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"\n")
        except OSError:
            is_lost = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
    return is_lost


# ------------------------------------------------------------------------------------------------------------ failures
@contextlib.contextmanager
def nothing_lost(args, accelerator, run, stop, write_state, end=sys.exit):
    """Notes signals in `stop`, and after an exception writes the last state that is whole as a checkpoint, by
    `write_state(run, folder)`, says what happened and ends the process by `end(1)`. Any process may be the one that
    fails, and holds the same state as the others."""
    with noted_signals(stop):
        try:
            yield
            note_end(accelerator, run, "finished")
        except Exception as error:  # of the data, the disk, the memory, a library
            is_unread = drop_lost_output()  # which may be what failed
            reason, remedy = explain(args, error)
            if is_unread and isinstance(error, BrokenPipeError):
                reason = "the end of the program that read its output"
            told_as = name_of_process(accelerator)
            if not reason:
                traceback.print_exception(error)
                reason = last_words(error)
            traceback.clear_frames(error.__traceback__)  # which hold what the step computed
            kept = save_what_is_whole(run, write_state)
            step = run.progress["global_step"]
            told = fitted(f"{told_as}Stopped after step {step} by {reason}. {kept}{remedy}")
            print(f"\n{told}", file=sys.stderr, flush=True)
            note_end(accelerator, run, "stopped", reason)
            end(1)


@contextlib.contextmanager
def told_in_a_line(args, accelerator, what):
    """Ends the process with status 1 after an exception in `what`, of which nothing is to be kept, and says what
    happened. Raises `InputError`, for that."""
    try:
        yield
    except Exception as error:  # of the data, the memory, a library
        # Workers that load images live as long as the frames that began them, and the process as long as they do.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, InputError):
            raise InputError(last_words(error)) from None
        reason, remedy = explain(args, error)
        if not reason:
            traceback.print_exception(error)
            reason = last_words(error)
        told_as = name_of_process(accelerator)
        told = fitted(f"{told_as}{what} was stopped by {reason}{remedy}")
        print(f"\n{told}", file=sys.stderr, flush=True)
        sys.exit(1)


def name_of_process(accelerator):
    """How a message begins, where it has to say of several processes which one it comes from."""
    if accelerator.num_processes == 1:
        return ""
    return f"Rank {accelerator.process_index} on {socket.gethostname()}: "


def explain(args, error):
    """What happened, and a remedy, for a user; ("", "") for what only a developer can understand."""
    if isinstance(error, InputError):
        return last_words(error), ""
    if is_disk_full(error):
        return "a full disk", ". Make room first"
    if is_lack_of_memory(error):
        return f"a lack of memory ({last_words(error)})", f". Use {memory_flags(args)}"
    if not Path(args.output_dir).is_dir():
        return f"the loss of {args.output_dir}, which was removed meanwhile", ""
    if isinstance(error, OSError) and is_below(args.output_dir, error.filename):
        return f"a file that cannot be written ({last_words(error)})", ". Make --output_dir writable first"
    if is_lost_peer(error):
        return f"the end of another process ({last_words(error)})", ""
    return "", ""


def is_below(folder, path):
    """Whether a path, which an exception may lack, is one in a folder."""
    return isinstance(path, str | Path) and Path(folder).absolute() in Path(path).absolute().parents


def is_disk_full(error):
    """Whether an exception comes of a full disk, a quota or a limit on the size of files."""
    return getattr(error, "errno", None) in DISK_FULL or bool(DISK_FULL_TEXT.search(str(error)))


def memory_flags(args):
    """The flags that would make the run smaller and are not used yet."""
    flags = []
    size, passes = args.train_batch_size, args.gradient_accumulation_steps
    if size > 1 and getattr(args, "full_bf16", False):  # which cannot accumulate
        flags.append(f"--train_batch_size={size // 2}")
    elif size > 1:
        parts = next(part for part in range(2, size + 1) if size % part == 0)  # mostly 2
        flags.append(
            f"--train_batch_size={size // parts} --gradient_accumulation_steps={passes * parts} (or what `sdtune "
            "find-batch-size -- COMMAND` finds)"
        )
    for flag in ("gradient_checkpointing", "use_8bit_adam", "offload_ema"):
        useful = flag != "offload_ema" or args.use_ema
        if useful and getattr(args, flag, None) is False:
            flags.append(f"--{flag}")
    if args.mixed_precision in (None, "no"):
        flags.append("--mixed_precision=bf16")
    return ", ".join([*flags, "a smaller --resolution"])


def last_words(error):
    """The last line of an exception's text, without the class that a worker's report begins it with."""
    if is_disk_full(error):
        return "the disk is full"  # which torch says in riddles
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^[\w.]+Error: ", "", lines[-1]).rstrip(".")


def save_what_is_whole(run, write_state):
    """Writes the checkpoint of the run's step, if weights and state belong together; returns what there is to go on
    from."""
    why = "the weights were being changed"
    if run.is_whole:
        try:
            diffusers.training_utils.free_memory()
            restore_output(run)
            save_checkpoint(run, write_state, None)
        except Exception as error:  # the disk may be what is full, or another process was first
            why = last_words(error)
    if (checkpoint_of(run) / "progress.json").exists():
        return f"{checkpoint_of(run)} holds its state; go on with --resume_from_checkpoint=latest"
    whole = list_checkpoints(run.output_dir)
    if not whole:
        return f"No checkpoint could be written ({why}), and there is none before"
    return f"No checkpoint could be written ({why}); go on from {whole[-1]} with --resume_from_checkpoint=latest"


def leave(accelerator, run, broken, received):
    """Ends the process after its last checkpoint, and says why: status 1 for a broken step, else 128 + signal."""
    end_training(accelerator)
    step = run.progress["global_step"]
    why, remedy = "a signal", ""
    if broken:
        why = f"a loss or gradient that is not finite, in step {step + 1}"
        remedy = " --allow_changed_resume and a lower --learning_rate"
        if run.settings["mixed_precision"] == "fp16":
            remedy += ", or start anew with --mixed_precision=bf16, whose numbers reach further"
    kept = f"{checkpoint_of(run)} holds the state after step {step}; go on with --resume_from_checkpoint=latest"
    if not run.is_whole:  # --full_bf16: the step had begun to change the weights
        kept = save_what_is_whole(run, None)
    if not list_checkpoints(run.output_dir):
        kept, remedy = "There is no checkpoint", "; use a lower --learning_rate"
    accelerator.print("\n" + fitted(f"Stopped by {why}. {kept}{remedy}"), file=sys.stderr)
    # Another process, or the launcher, may have got the signal: SIGTERM, then.
    number = received[0] if received else signal.SIGTERM
    note_end(accelerator, run, "stopped", why if broken else signal.Signals(number).name)
    sys.exit(1 if broken else 128 + number)


# -------------------------------------------------------------------------------------------------------------- script
def run_launched_script(program, parser, argv, replaced_flags, check_args, train):
    """Runs a training script as `run_script` does, in a process that a launcher may have started: `train(args,
    launcher)` gets to know that, and of several processes the first one speaks."""
    launcher = find_launcher()  # first of all: it may die soon, and accelerate sets variables of its own
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    is_first = rank == "0"
    if not is_first:
        program = f"{program}, rank {rank} on {socket.gethostname()}"
    # The first process of a machine tells its mistakes. The others do, too, if they live to: their launcher ends them
    # when the first one, which has mostly made the same mistake, has ended.
    patience = 0 if local_rank == "0" else 5

    def start(args):
        with work_of(args, is_first):
            train(args, launcher)

    run_script(program, parser, argv, replaced_flags, check_args, start, is_first, patience)


@contextlib.contextmanager
def work_of(args, is_first):
    """What is done in one of several processes: the first one holds the lock of the output folder, and prints. Raises
    `InputError` if another one has ended."""
    lock = locked_output(args) if is_first and not args.dry_run else contextlib.nullcontext()
    with lock, contextlib.redirect_stdout(sys.stdout if is_first else io.StringIO()):
        try:
            yield
        except Exception as error:
            if not is_lost_peer(error):
                raise
            told = f"another process has ended ({last_line(error)})"
            raise InputError(f"{told}; read its message, mend that, and start all of them again") from None


def run_script(program, parser, argv, replaced_flags, check_args, start, is_first=True, patience=0):
    """Runs a training script: reads its flags, tells all that is wrong with them, and calls `start(args)`, which
    trains. A mistake of the user's ends with status 2 and its message, after `patience` seconds, and a signal that
    asks to stop, where that notes none, with its status and a line.

    `check_args(args, problems)` lists what is wrong beside `problems` with the values of single flags.
    """
    with (
        contextlib.ExitStack() as stack,
        stopped_by_signals(),
        told_to_user(program, speaks=is_first, patience=patience),
    ):
        stack.callback(look_for_garbage)  # after a mistake too: a notebook goes on
        print_any_character()
        args, problems = parse_flags(parser, argv, replaced_flags)
        problems += check_encoding(args)
        if any(NOT_UNDERSTOOD.search(problem) for problem in problems):
            raise_problems(problems)  # at once: what else is wrong depends on what was meant, and to ask takes seconds
        quiet_libraries()
        # What is said of a flag whose value was refused is about its default.
        refused = re.findall(r"^--\w+", "\n".join(problems), re.MULTILINE)
        for problem in check_args(args, problems):
            if not any(re.search(rf"{flag}\b", problem) for flag in refused):
                problems.append(problem)
        raise_problems(problems)
        look_for_garbage()
        start(args)


def look_for_garbage():
    """Has Python look for garbage again, which a script stops while libraries are imported, and but for what these
    made."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


# --------------------------------------------------------------------------------------------------------------- cache
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


if __name__ == "__main__":
    main()
