#!/usr/bin/env python
"""Fine-tune the UNet of Stable Diffusion 1.x or 2.x on captioned images, in JAX: on TPUs, GPUs or a CPU.

    python train_text_to_image_flax.py --pretrained_model_name_or_path=MODEL --train_data_dir=my_images \
        --resolution=512 --center_crop --train_batch_size=4 --learning_rate=1e-5 --max_train_steps=5000 --use_ema \
        --mixed_precision=bf16 --validation_prompts "a drawing of a cat" --output_dir=my_model

`my_images` holds images and a metadata.jsonl (file_name, text), or a .txt beside each image; the result is a pipeline
folder for PyTorch, with `--save_flax` for Flax as well. The networks are functions of PyTorch's weights. All devices
share a batch; what is random in a sample depends on (seed, epoch, index of the sample) alone. Papers: latent diffusion
(arXiv 2112.10752), DDPM (2006.11239), v-prediction (2202.00512), min-SNR (2303.09556), zero terminal SNR (2305.08891).
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from filelock import FileLock
from flax import serialization, traverse_util
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

IMAGE_SUFFIXES = set(".avif .bmp .gif .jfif .jpe .jpeg .jpg .png .tif .tiff .webp".split())
MIN_SIDE = 16  # pixels; anything smaller is an icon or a broken file
HELD_OUT_TIMESTEPS = 4  # at which the loss of each held-out image is measured
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of the saved result
SAMPLE, ORDER, DROPOUT, SUBSET, HELD_OUT = range(5)  # a stream of random numbers each
REPLACED_FLAGS = {
    "--from_pt": "PyTorch weights are what is read; for Flax weights (.msgpack) use --from_flax",
    "--local_rank": "start this on every host, with --coordinator_address; devices are found",
    "--validation_epochs": "use --validation_steps",
    **dict.fromkeys(["--use_8bit_adam", "--allow_tf32", "--enable_xformers_memory_efficient_attention",
                     "--offload_ema", "--foreach_ema"], "drop it; what is compiled here has no need of it"),
}
# Settings that a resume may change: they leave the result as it is, or what follows from them is compared instead.
FREE_ON_RESUME = """allow_changed_resume cache_dir caption_column checkpointing_steps checkpoints_total_limit config
    coordinator_address dataloader_num_workers dataset_config_name dataset_name dry_run gradient_accumulation_steps
    gradient_checkpointing host_index hub_model_id hub_private_repo hub_token image_column logging_dir logging_steps
    max_train_samples max_train_steps num_hosts num_train_epochs num_validation_samples output_dir overwrite_output_dir
    push_to_hub report_to resume_from_checkpoint save_flax save_precision skip_bad_images tracker_project_name
    train_batch_size train_data_dir validation_prompts validation_steps""".split()
FIXED_ON_RESUME = {"state"}  # the checkpoint's state would not fit
# Keys of the configs that the networks below obey or that do not bear on them; any other must be at its default.
UNDERSTOOD = {
    "unet": """attention_head_dim block_out_channels cross_attention_dim down_block_types flip_sin_to_cos freq_shift
        in_channels layers_per_block norm_eps norm_num_groups out_channels sample_size split_head_dim up_block_types
        transformer_layers_per_block upcast_attention use_linear_projection use_memory_efficient_attention""".split(),
    "vae": """block_out_channels down_block_types force_upcast in_channels latent_channels layers_per_block
        norm_num_groups out_channels sample_size scaling_factor up_block_types use_post_quant_conv""".split(),
    "text_encoder": """architectures attention_dropout bos_token_id dropout dtype eos_token_id hidden_act hidden_size
        initializer_factor initializer_range intermediate_size layer_norm_eps max_position_embeddings pad_token_id
        num_attention_heads num_hidden_layers projection_dim torch_dtype transformers_version vocab_size""".split(),
}
BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "DownEncoderBlock2D",
          "UpDecoderBlock2D"}
# The modules of which Flax writes `name_0` where PyTorch writes `name.0`, and its older names of the VAE's attention.
FLAX_LISTS = "down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|net|to_out"
FLAX_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
FLAX_FILES = {"unet": "diffusion_flax_model.msgpack", "vae": "diffusion_flax_model.msgpack",
              "text_encoder": "flax_model.msgpack"}


class InputError(ValueError):
    """A mistake in what the user gave; its text is all that they need to see."""


# ------------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None, check=None):
    """Reads the command line and `--config` or ends with status 2; lists what is wrong with settings to `check`."""
    usage = "%(prog)s --pretrained_model_name_or_path MODEL (--train_data_dir FOLDER | --dataset_name NAME) [flags]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", help="pipeline folder, Hub id, or original .ckpt/.safetensors file")
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--single_file_config", help="pipeline folder or Hub id with the configs for a single-file model")
    add("--from_flax", **switch, help="read the Flax weights (.msgpack) of a pipeline folder or Hub id")
    add("--cache_dir", help="where downloads and remembered checks go, instead of the Hugging Face cache")
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="folder of images with metadata.jsonl/.csv (file_name, text), or a .txt beside each")
    add("--dataset_name", help="dataset on the Hub, or a local path that `datasets` can load")
    add("--dataset_config_name", help="configuration of that dataset; needs --dataset_name")
    add("--image_column", default="image", help="column of its images; needs --dataset_name")
    add("--caption_column", default="text", help="column with a caption, or a list of them: one is drawn per epoch")
    add("--max_train_samples", type=int, help="use so many images, drawn by the seed [1, inf)")
    add("--skip_bad_images", **switch, help="go on without images that cannot be used, instead of stopping")
    add("--resolution", type=int, default=512, help="side of the square training images in pixels [1, inf)")
    add("--center_crop", **switch, help="crop the centre, not a random place")
    add("--random_flip", **switch, help="mirror half of the images, drawn anew each epoch")
    filters = [kind.name.lower() for kind in Image.Resampling]
    add("--image_interpolation_mode", default="lanczos", choices=filters, help="filter for resizing")
    add("--caption_dropout", type=float, default=0.0, help="share of captions replaced by the empty one [0, 1]")
    add("--dataloader_num_workers", type=int, default=0, help="threads that load images; 1 if 0 [0, inf)")
    add = parser.add_argument_group("objective").add_argument
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="what the UNet predicts; default: the model's")
    add("--snr_gamma", type=float, help="min-SNR loss weights with this gamma; 5.0 in the paper (0, inf)")
    add("--noise_offset", type=float, default=0.0, help="scale of noise that shifts channels; 0.05 is common [0, inf)")
    add("--input_perturbation", type=float, default=0.0, help="scale of extra input noise; 0.1 in the paper [0, inf)")
    add("--rescale_betas_zero_snr", **switch, help="rescale the schedule to zero terminal SNR; needs v_prediction")
    add = parser.add_argument_group("optimization").add_argument
    add("--learning_rate", type=float, default=1e-4, help="initial learning rate (0, inf)")
    add("--scale_lr", **switch, help="multiply the learning rate by batch size, accumulation steps and processes")
    add("--lr_scheduler", default="constant", choices=[kind.value for kind in SchedulerType], help="its schedule")
    add("--lr_warmup_steps", type=int, default=0, help="steps in which the learning rate rises from 0 [0, inf)")
    add("--lr_num_cycles", type=int, help="cycles, 1 if not given; needs --lr_scheduler=cosine_with_restarts [1, inf)")
    add("--lr_power", type=float, help="power, 1 if not given; needs --lr_scheduler=polynomial (0, inf)")
    add("--lr_step_rules", help="factor:until_step,...,last factor: 1:10,0.1; needs --lr_scheduler=piecewise_constant")
    add("--train_batch_size", type=int, default=16, help="images per forward pass and process [1, inf)")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward passes per optimizer step [1, inf)")
    add("--num_train_epochs", type=int, default=100, help="passes over the images, unless --max_train_steps [1, inf)")
    add("--max_train_steps", type=int, help="optimizer steps [1, inf)")
    add("--max_grad_norm", type=float, default=1.0, help="clip the gradient's norm to this; inf: no clipping (0, inf]")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's beta1 [0, 1)")
    add("--adam_beta2", type=float, default=0.999, help="AdamW's beta2 [0, 1)")
    add("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay [0, inf)")
    add("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon (0, inf)")
    add("--use_ema", **switch, help="average the weights over the steps; samples and result use the average")
    add("--ema_decay", type=float, help="highest decay of the average; 0.9999 if not given; needs --use_ema [0, 1]")
    add("--ema_warmup", **switch, help="raise the decay slowly, as 1 - (1 + step) ** -2/3; needs --use_ema")
    add = parser.add_argument_group("memory and speed").add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of passes; no if not given")
    add("--gradient_checkpointing", **switch, help="compute activations twice: slower, less memory")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="sd-model-finetuned", help="where everything is written")
    add("--overwrite_output_dir", **switch, help="write over the run in --output_dir and remove its checkpoints")
    add("--save_precision", default="no", choices=list(DTYPES), help="half precision of what is saved, or no")
    add("--save_flax", **switch, help="write the weights as Flax (.msgpack) too")
    add("--checkpointing_steps", type=int, default=500, help="write a checkpoint every so many steps [1, inf)")
    add("--checkpoints_total_limit", type=int, help="keep only so many checkpoints, the newest [1, inf)")
    add("--resume_from_checkpoint", metavar="PATH|latest", help="go on from a checkpoint, if there is a latest")
    add("--allow_changed_resume", **switch, help="though the result will change; needs --resume_from_checkpoint")
    add("--validation_prompts", nargs="+", help="prompts to draw samples for")
    add("--num_validation_samples", type=int, default=0, help="images held out, to measure the loss on [0, inf)")
    add("--validation_steps", type=int,
        help="draw and measure every so many, or 500; needs --validation_prompts or --num_validation_samples [1, inf)")
    add("--report_to", default="tensorboard", help="tracker of accelerate's (tensorboard, wandb, ...), all or none")
    add("--tracker_project_name", default="text2image-fine-tune", help="project name in the tracker")
    add("--logging_dir", default="logs", help="folder for the tracker's files, in --output_dir")
    add("--logging_steps", type=int, default=10, help="log the mean loss every so many steps [1, inf)")
    add("--push_to_hub", **switch, help="upload the result to the Hub")
    add("--hub_model_id", help="repository to upload to; default: the name of --output_dir; needs --push_to_hub")
    add("--hub_token", help="token for dataset and upload; default: the one that `hf auth login` stored")
    add("--hub_private_repo", **switch, help="make the repository private; needs --push_to_hub")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, help="seed of everything that is drawn at random [0, 9e18]")
    add("--config", metavar="FILE.yaml", help="flags by name, maybe under `training:`; the command line wins")
    add("--dry_run", **switch, help="check everything, print the plan and stop")
    add = parser.add_argument_group("several hosts").add_argument
    add("--coordinator_address", metavar="HOST:PORT|auto", help="where host 0 is found; auto: as the cluster says")
    add("--num_hosts", type=int, help="hosts on which this is started; needs --coordinator_address [1, inf)")
    add("--host_index", type=int, help="number of this host, from 0; needs --coordinator_address [0, inf)")
    return parse_words(parser, argv) if check is None else check_flags(parser, check)


def parse_words(parser, argv):
    """Parses `argv` or the command line, after its `--config` as words, so that argparse checks that; expands `~`."""
    argv, words = sys.argv[1:] if argv is None else list(argv), []
    if replaced := [flag for word in argv if (flag := word.split("=")[0]) in REPLACED_FLAGS]:
        parser.error(f"{replaced[0]} is not taken: {REPLACED_FLAGS[replaced[0]]}")
    path, flags = parser.parse_known_args(argv)[0].config, vars(parser.parse_args([]))
    try:
        recipe = (yaml.safe_load(Path(os.path.expanduser(path)).read_text("utf-8")) if path else None) or {}
        recipe |= recipe.pop("training", None) or {}
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError) as error:
        parser.error(f"--config={path}: is no YAML file of flags ({' '.join(str(error).split())})")
    if unknown := sorted(map(str, recipe.keys() - (flags.keys() - {"config"}) - {"evaluation"})):
        parser.error(f"--config={path}: unknown key {', '.join(unknown)}; keys are the flags of --help without dashes")
    for key, value in [(key, value) for key, value in recipe.items() if key in flags and value is not None]:
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif isinstance(value, bool) and isinstance(flags[key], bool):
            words.append(f"--{'' if value else 'no-'}{key}")
        else:  # YAML reads a bare `no` as false, but --mixed_precision means the word
            words.append(f"--{key}={'no' if value is False else value}")
    return argparse.Namespace(**{name: os.path.expanduser(value) if isinstance(value, str) else value
                                 for name, value in vars(parser.parse_args(words + argv)).items()})


def check_flags(parser, values):
    """Lists flags outside the interval that ends their help, and those given without what it says that they need."""
    problems = []
    for action in parser._actions:
        flag, value, told = action.dest, values.get(action.dest), action.help
        if value is not None and (limits := re.search(r"([\[(])(\S+), (\S+)([\])])$", told)):
            low, high = float(limits[2]), float(limits[3])
            if not (low < value < high or value in [low] * (limits[1] == "[") + [high] * (limits[4] == "]")):
                problems.append(f"--{flag}={value}: must be in {limits[0]}")
        needs = re.sub(r" [\[(].*", "", told.partition("needs ")[2]) if value not in (None, action.default) else ""
        ways = re.findall(r"--(\w+)=?(\w*)", needs)
        if ways and not any(values[name] and word in ("", values[name]) for name, word in ways):
            problems.append(f"--{flag}={value}: does nothing without {needs}; add that or drop this")
    return problems


def check_args(args):
    """Raises one `InputError` that names every flag that is wrong, its value, what is accepted and the remedy."""
    problems = parse_args(check=vars(args)) + check_settings(vars(args)) + check_output(**vars(args))
    problems += check_model(**vars(args)) or check_networks(**vars(args))
    if problems:
        raise InputError("\n  ".join(["", *problems] if len(problems) > 1 else problems))


def check_settings(settings):
    """Lists which flags contradict each other or cannot be obeyed here."""
    get, schedule = settings.get, settings["lr_scheduler"]
    source = Path(get("pretrained_model_name_or_path") or "")
    rules = re.fullmatch(r"({0}:\d+,)+{0}".format(r"\d*\.?\d+(e-?\d+)?"), get("lr_step_rules") or "")
    trackers = ["all", "none", *map(str, get_available_trackers())]
    numbered = get("num_hosts") is not None and get("host_index") is not None
    flax_file, is_folder = source / "unet" / FLAX_FILES["unet"], (source / "unet").is_dir()
    others = {path.suffix for path in source.glob("unet/diffusion_pytorch_model*")} & {".bin", ".safetensors"}
    return [f"--{flag}={get(flag)}: {remedy}" for wrong, flag, remedy in (
        (get("revision") and source.exists(), "revision", "does nothing without a model on the Hub; drop this"),
        (get("variant") and (get("single_file_config") or get("from_flax")), "variant",
         "does nothing without a PyTorch pipeline folder or Hub id; drop this"),
        (get("lr_warmup_steps") and schedule in ("constant", "piecewise_constant"), "lr_warmup_steps",
         "does nothing without constant_with_warmup or the like; add that or drop this"),
        (schedule == "piecewise_constant" and not rules, "lr_step_rules", "give rules such as 1:10,0.1:20,0.01"),
        (bool(get("dataset_name")) == bool(get("train_data_dir")), "train_data_dir",
         "give this or --dataset_name, not both"),
        (schedule == "polynomial" and get("learning_rate") <= 1e-7, "learning_rate", "must be above 1e-7, its end"),
        (get("report_to") not in trackers, "report_to", f"installed are {', '.join(trackers)}"),
        (get("mixed_precision") == "fp16", "mixed_precision", "gradients would vanish; use bf16 or no"),
        (get("coordinator_address") and numbered == (get("coordinator_address") == "auto"), "coordinator_address",
         "HOST:PORT needs --num_hosts and --host_index, auto finds them"),
        (numbered and get("host_index") >= (get("num_hosts") or 0), "host_index", "must be below --num_hosts"),
        (is_folder and get("from_flax") and not flax_file.exists(), "from_flax", f"needs {flax_file}; drop this"),
        (is_folder and flax_file.exists() and not others and not get("from_flax"), "from_flax",
         "this pipeline has Flax weights alone; add --from_flax"),
        (get("from_flax") and get("single_file_config"), "from_flax", "a single file is PyTorch's; drop this"),
    ) if wrong]


def check_output(output_dir, resume_from_checkpoint, overwrite_output_dir, **settings):
    """Lists what is wrong with the folders and the checkpoint to resume from."""
    output, wanted = Path(output_dir).resolve(), resume_from_checkpoint
    checkpoint, newest = find_checkpoint(output, wanted), find_checkpoint(output, "latest")
    place = next(path for path in (output, *output.parents) if path.exists())
    other = "model_index.json" if "rank" in settings else "pytorch_lora_weights.safetensors"  # which stays behind
    run = (output / "args.json").is_file() and not (output / other).exists()
    # Without a checkpoint `latest` starts anew, in the folder of a run that was stopped before its first one.
    begun = wanted == "latest" and run and not (output / "README.md").exists()
    own = output == checkpoint.resolve().parent if checkpoint else begun
    usable = place.is_dir() and os.access(place, os.W_OK)
    used = usable and place == output and any(output.iterdir())
    data = "train_data_dir" if "train_data_dir" in settings else "instance_data_dir"
    folder = settings[data] or settings["dataset_name"]
    return [f"--{flag}: {told}" for wrong, flag, told in (
        (checkpoint and not (checkpoint / "progress.json").is_file(), f"resume_from_checkpoint={wanted}",
         "is no whole checkpoint folder; name one, or latest"),
        (wanted and overwrite_output_dir, "overwrite_output_dir", "contradicts --resume_from_checkpoint; drop one"),
        (own and newest and checkpoint.resolve() != newest.resolve(), f"resume_from_checkpoint={wanted}",
         f"{newest} is newer; use that, or another --output_dir"),
        (not usable, f"output_dir={output_dir}", f"{place} is a file or cannot be written to; name another folder"),
        (used and not own and not (overwrite_output_dir and run), f"output_dir={output_dir}", "is in use; name another"
         ", go on with its run by --resume_from_checkpoint=latest, or, if of this kind, use --overwrite_output_dir"),
        (settings[data] and not os.path.isdir(folder), f"{data}={folder}", "does not exist, or is no folder"),
        (folder and output.is_relative_to(Path(folder or "").resolve()), f"output_dir={output_dir}",
         "lies in the folder of the images, or below its name; put it elsewhere"),
    ) if wrong]


def check_model(pretrained_model_name_or_path, single_file_config, revision, cache_dir, resolution, prediction_type,
                rescale_betas_zero_snr, **_):
    """Lists what is wrong with the model's configs, or between them and the flags; reads no weights."""
    source = pretrained_model_name_or_path or ""
    name, single_file = f"--pretrained_model_name_or_path={source}", source.endswith((".ckpt", ".safetensors"))
    if not source or (single_file and not Path(source).is_file()):
        return [f"{name}: there is no such file; name a pipeline folder, a Hub id or a file"]
    if single_file != bool(single_file_config):
        return [f"{name}: a single file, and only that, needs --single_file_config (see --help)"]
    source, where = single_file_config or source, {"revision": revision, "cache_dir": cache_dir}
    try:
        parts = diffusers.StableDiffusionPipeline.load_config(source, **where)
        if foreign := {"text_encoder_2", "transformer"} & parts.keys():
            return [f"{name}: has a {min(foreign)} (SDXL, SD 3 or the like); use a Stable Diffusion 1.x or 2.x model"]
        unet = diffusers.UNet2DConditionModel.load_config(source, subfolder="unet", **where)
        vae = diffusers.AutoencoderKL.load_config(source, subfolder="vae", **where)
        scheduler = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler", **where)
        CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", **where)
        if len(CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **where)) < 3:
            raise OSError("its tokenizer knows no words")  # nor does transformers' for a folder without one
    except (OSError, ValueError) as error:
        return [f"{source}: no whole pipeline, no name of one on the Hub, or no connection ({last_line(error)})"]
    problems, divisor = [], 2 ** (len(vae["block_out_channels"]) - 1)
    if resolution % divisor:
        usable = resolution // divisor * divisor or divisor
        problems.append(f"--resolution={resolution}: must be a multiple of {divisor} for this VAE; use {usable}")
    if unet["in_channels"] != vae["latent_channels"]:
        problems.append(f"{name}: its UNet takes {unet['in_channels']} channels; use a text-to-image model")
    prediction_type = prediction_type or scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        problems.append(f"{name}: predicts {prediction_type!r}; only epsilon and v_prediction can be trained")
    if prediction_type == "epsilon" and (rescale_betas_zero_snr or scheduler.get("rescale_betas_zero_snr")):
        problems.append("--rescale_betas_zero_snr: useless for epsilon; drop it or add --prediction_type=v_prediction")
    return problems


def check_networks(pretrained_model_name_or_path, single_file_config, revision, cache_dir, **_):
    """Lists what the networks below would not compute as PyTorch's do: unknown keys and values of the configs."""
    source, where = single_file_config or pretrained_model_name_or_path, {"revision": revision, "cache_dir": cache_dir}
    problems = []
    for name, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        config = kind.load_config(source, subfolder=name, **where)
        defaults = {key: known.default for key, known in inspect.signature(kind.__init__).parameters.items()}
        problems += [f"{name}: {key}={value!r} is not known in JAX" for key, value in config.items()
                     if not key.startswith("_") and key not in UNDERSTOOD[name]
                     and (key not in defaults or value != defaults[key])]
        blocks = [block for key in ("down_block_types", "up_block_types") for block in config.get(key, [])]
        problems += [f"{name}: blocks of type {block} are not known in JAX" for block in {*blocks} - BLOCKS]
        if not isinstance(width := config.get("cross_attention_dim", 0), int):
            problems.append(f"{name}: cross_attention_dim={width!r} is not known in JAX")
    config, defaults = CLIPTextConfig.get_config_dict(source, subfolder="text_encoder", **where)[0], CLIPTextConfig()
    problems += [f"text_encoder: {key}={value!r} is not known in JAX" for key, value in config.items()
                 if not key.startswith("_") and key not in UNDERSTOOD["text_encoder"]
                 and value != getattr(defaults, key, None)]
    if config.get("hidden_act", "quick_gelu") not in ("gelu", "quick_gelu"):
        problems.append(f"text_encoder: hidden_act={config['hidden_act']!r} is not known in JAX")
    return [f"{problem}; use train_text_to_image.py for this model" for problem in problems]


# ------------------------------------------------------------------------------------------------------------ data
def read_folder(folder, caption_column):
    """Reads a folder into rows of `image` and `captions`, from metadata.jsonl or .csv or a .txt beside the image. What
    is missing gives a row too, so that the check names it. Raises `InputError` for what cannot be read as text."""
    folder, closed, columns = Path(os.path.abspath(folder)), [], set()
    files = sorted(Path(at, name) for at, below, names in os.walk(folder, onerror=closed.append)
                   for name in [*names, *(name for name in below if os.path.islink(Path(at, name)))])
    if closed:
        raise InputError(f"{closed[0].filename}: cannot be searched ({closed[0].strerror}); grant access")
    captions = {path: [] for path in files if path.suffix.lower() in IMAGE_SUFFIXES
                and not any(part.startswith(".") for part in path.relative_to(folder).parts)}
    metadata = [path for path in files if path.name in ("metadata.jsonl", "metadata.csv")]
    if not captions:
        raise InputError(f"the folder {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); name another")
    for path in metadata:
        number = 1
        try:
            text = path.read_text(encoding="utf-8-sig")
            rows = map(json.loads, filter(str.strip, text.split("\n")))  # JSON may hold other line ends
            for row in rows if path.suffix == ".jsonl" else csv.DictReader(io.StringIO(text), strict=True):
                file = Path(os.path.abspath(path.parent / row["file_name"]))
                captions.setdefault(file, []).extend(all_captions(row.get(caption_column)))
                if None in row:
                    raise ValueError("too many cells: put captions with commas in quotes")
                number, columns = number + 1, columns | row.keys()
        except (ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
            raise InputError(f"{path}: row {number} is not a file_name and a caption in UTF-8 ({error!r})") from None
    if metadata and caption_column not in columns:
        raise InputError(f"{metadata[0]}: has no {caption_column!r} but {sorted(columns)}; set --caption_column")
    for image in [image for image, found in captions.items() if not found]:
        beside = image.with_suffix(".txt")
        try:
            captions[image] += [beside.read_text("utf-8-sig").strip()] if beside.is_file() else []
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{beside}: cannot be read as UTF-8 ({last_line(error)}); convert or remove it") from None
    if aside := [path.name for path in sorted({*files} - {*captions, *metadata}) if path.suffix != ".txt"]:
        print(f"Left aside in {folder}: {len(aside)} files of other kinds, such as {', '.join(aside[:5])}.")
    if odd := [name for name in map(str, captions) if name != name.encode("utf-8", "replace").decode("utf-8")]:
        raise InputError(f"{odd[0]!a}: its name is not UTF-8; rename it")
    rows = [{"image": str(path), "captions": found} for path, found in sorted(captions.items())]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))


def read_dataset(name, config_name, image_column, caption_column, cache_dir, token, default_caption=None):
    """Loads the train split of a dataset as columns `image` (undecoded) and `captions`. Raises `InputError`."""
    # A local folder of image files is not for `datasets`, which drops images without a caption in silence.
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in Path(name).rglob("*")):
        if (config_name, image_column) != (None, "image"):
            raise InputError(f"--dataset_name={name}: holds images; drop --dataset_config_name and --image_column")
        return read_folder(name, caption_column)
    try:
        saved = Path(name, "state.json").is_file() and not config_name  # by save_to_disk
        dataset = datasets.load_from_disk(name) if saved else datasets.load_dataset(
            name, config_name, split="train", cache_dir=cache_dir, token=token)
        if default_caption and caption_column == "text" and "text" not in dataset.column_names:
            dataset = dataset.add_column(caption_column, [default_caption] * len(dataset))
        dataset = dataset.select_columns([image_column, caption_column])
        dataset = dataset.rename_columns({image_column: "image", caption_column: "captions"})
        return dataset.cast_column("image", datasets.Image(decode=False))
    except Exception as error:  # arrow has one for every pair of types
        raise InputError(f"--dataset_name={name}: cannot be loaded; check it, --dataset_config_name, --image_column="
                         f"{image_column} and --caption_column={caption_column} ({last_line(error)})") from None


def open_image(encoded):
    """Decodes an image to 8-bit sRGB as a viewer shows it: upright, by its colour profile, 16-bit greys scaled, alpha
    over white. Raises `OSError`, `ValueError` or `SyntaxError` if Pillow cannot read it to the end."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    profile = image.info.get("icc_profile") or b""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white")
    if image.mode.startswith("I"):  # Pillow would saturate 16-bit greys
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    mode = {"CMYK": "CMYK", "L": "L", "LA": "L"}.get(image.mode, "RGB")  # which the profile is for
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode)
    if profile and b"sRGB IEC61966" not in profile.replace(b"\0", b""):  # most name that, in letters of 1 or 2 bytes
        with contextlib.suppress(ImageCms.PyCMSError):  # a viewer, too, ignores a profile that does not fit
            image = ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), 0, "RGB")
    return image.convert("RGB")


def check_image(image, known):
    """Opens one image, unless `known` has it; returns a key, of path, size and time or of the content where a dataset
    holds it, and [sha256, width, height, what is wrong or ""]."""
    try:
        if encoded := image["bytes"]:
            key = hashlib.sha256(encoded).hexdigest()
        else:
            key = "{0}|{1.st_size}|{1.st_mtime_ns}".format(os.path.abspath(image["path"]), os.stat(image["path"]))
        if key in known:
            return key, known[key]
        encoded = encoded or Path(image["path"]).read_bytes()
        width, height = open_image(encoded).size
        tiny = f"{width} x {height} pixels; a side needs at least {MIN_SIDE}" if min(width, height) < MIN_SIDE else ""
        return key, [hashlib.sha256(encoded).hexdigest(), width, height, tiny]
    except Exception as error:  # damaged files raise whatever a decoder stumbles over
        known_as = {FileNotFoundError: "there is no such file", TypeError: "the row holds no image",
                    UnidentifiedImageError: "no image that Pillow knows"}
        return None, ["", 0, 0, known_as.get(type(error), f"cannot be read: {error}")]


def check_images(rows, memory):
    """Opens every image once, in parallel, and remembers `check_image`'s findings, which it returns, in the file
    `memory`. Of several processes the first one does it, the others read what it remembers."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{memory}.lock").acquire()
    except OSError as error:
        raise InputError(f"--cache_dir: {memory.parent} cannot be used ({error.strerror}); name another") from None
    with lock, ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
        known = {}
        with contextlib.suppress(OSError, ValueError):  # not there yet, or half written
            known = json.loads(memory.read_text(encoding="utf-8"))
        results = pool.map(lambda index: check_image(rows[index]["image"], known), range(len(rows)))
        results = list(tqdm(results, "Checking images", len(rows), unit="image", disable=None, leave=False))
        memory.write_text(json.dumps({**known, **{key: found for key, found in results if key}}), encoding="utf-8")
    return [found for _, found in results]


def all_captions(captions):
    """The usable captions of a row that holds a string or a list of them. Raises `ValueError` for half a character."""
    captions = captions if isinstance(captions, list) else [captions]
    return [caption for caption in captions if isinstance(caption, str) and caption.encode() and caption.strip()]


def check_rows(rows, memory, skip_bad_images, tokenizer, resolution):
    """Checks every image and caption; returns the good rows and a digest of each one's content and captions. Raises
    one `InputError` for all others, unless `skip_bad_images`; warns of small images and of captions that are cut."""
    bad, small, cut, good = [], [], [], {}
    captions = list(rows["captions"])
    for index, (digest, width, height, problem) in enumerate(check_images(rows, memory)):
        problem = problem or ("" if captions[index] else "has no caption, in metadata or a .txt beside it")
        if problem or min(width, height) < resolution:
            name = (rows[index]["image"] or {}).get("path") or f"row {index}"
            (bad if problem else small).append(f"{name}: {problem or f'{width} x {height}'}")
        if not problem:
            good[index] = hashlib.sha256(json.dumps([digest, captions[index]]).encode()).hexdigest()
            if max(map(len, tokenizer(captions[index], verbose=False).input_ids)) > tokenizer.model_max_length:
                cut.append(f"{max(captions[index], key=len)[:80]}...")
    unusable = "\n  ".join([f"{len(bad)} of {len(rows)} images are unusable:", *bad[:100]])
    if bad and not (skip_bad_images and good):
        raise InputError(f"{unusable}\nMend or remove them, or add --skip_bad_images.")
    if bad:
        print(f"Left out (--skip_bad_images): {unusable}")
    for what, warned in ((f"images are smaller than --resolution={resolution} and are enlarged", small),
                         (f"captions have more than {tokenizer.model_max_length} tokens and are cut", cut)):
        if warned:
            print("\n  ".join([f"Warning: {len(warned)} {what}, such as", *warned[:5]]))
    return rows.select(list(good)), list(good.values())


@dataclasses.dataclass
class CaptionedImages(torch.utils.data.Dataset):
    """Maps (epoch, index, weight) to these and pixel_values uint8 (3, height, width), input_ids (max_length,),
    timestep, and posterior_noise, noise, added_noise in float32 (4, height / 8, width / 8)."""
    rows: datasets.Dataset  # of image and captions
    tokenizer: CLIPTokenizer
    latent_shape: tuple
    num_timesteps: int
    flags: dict  # by name: seed, resolution, center_crop, random_flip, ... as load_data takes them

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        (epoch, index, weight), flags = item, self.flags
        # All that is random in a sample, drawn always and in this order: an option leaves the others' numbers alone.
        draw = np.random.default_rng((flags["seed"], SAMPLE, epoch, index))
        left, top, flip, choice, drop = draw.random(5)
        timestep = draw.integers(self.num_timesteps)
        posterior_noise, noise, perturbation = draw.standard_normal((3, *self.latent_shape), np.float32)
        # The offset shifts whole channels; perturbation (arXiv 2301.11706, eq. 3) is added and not to be predicted.
        noise = noise + flags["noise_offset"] * draw.standard_normal((len(noise), 1, 1), np.float32)

        row, place = self.rows[index], (0.5, 0.5) if flags["center_crop"] else (left, top)
        image = open_image(row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes())
        resample = Image.Resampling[flags["image_interpolation_mode"].upper()]
        image = ImageOps.fit(image, (flags["resolution"], flags["resolution"]), resample, centering=place)
        if flags["random_flip"] and flip < 0.5:
            image = ImageOps.mirror(image)
        caption = "" if drop < flags["caption_dropout"] else row["captions"][int(choice * len(row["captions"]))]
        input_ids = self.tokenizer(caption, padding="max_length", truncation=True, return_tensors="np").input_ids[0]
        return {"pixel_values": np.array(image).transpose(2, 0, 1), "input_ids": input_ids, "timestep": timestep,
                "posterior_noise": posterior_noise, "noise": noise, "epoch": epoch, "index": index,
                "added_noise": noise + flags["input_perturbation"] * perturbation, "weight": np.float32(weight)}


def load_data(pretrained_model_name_or_path, single_file_config, revision, cache_dir, train_data_dir, dataset_name,
              dataset_config_name, image_column, caption_column, hub_token, max_train_samples, num_validation_samples,
              skip_bad_images, resolution, seed, default_caption=None, repeats=1, **flags):
    """Reads, checks and splits the images; returns (training images, held-out images, fingerprint of both). The
    held-out ones are the same for every seed, and always seen alike. `default_caption` is that of images without."""
    source, where = single_file_config or pretrained_model_name_or_path, {"revision": revision, "cache_dir": cache_dir}
    tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **where)
    text_config = CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", **where)
    tokenizer.model_max_length = text_config.max_position_embeddings
    vae = diffusers.AutoencoderKL.load_config(source, subfolder="vae", **where)
    latent_shape = (vae["latent_channels"], *[resolution // 2 ** (len(vae["block_out_channels"]) - 1)] * 2)
    schedule = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler", **where)
    rows = read_folder(train_data_dir, caption_column) if train_data_dir else read_dataset(
        dataset_name, dataset_config_name, image_column, caption_column, cache_dir, hub_token, default_caption)
    captions = [all_captions(found) or [default_caption] * bool(default_caption) for found in rows["captions"]]
    rows = rows.remove_columns("captions").add_column("captions", captions)  # before a selection, which it would copy
    subset = np.random.default_rng((seed, SUBSET)).permutation(len(rows))[:max_train_samples]
    place = hashlib.sha256(os.path.abspath(train_data_dir or dataset_name).encode()).hexdigest()[:16]
    memory = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "checked_images" / f"{place}.json"
    rows, digests = check_rows(rows.select(np.sort(subset)), memory, skip_bad_images, tokenizer, resolution)
    if num_validation_samples >= len(rows):
        raise InputError(f"--num_validation_samples={num_validation_samples}: must leave some of {len(rows)} images")
    order = np.random.default_rng(HELD_OUT).permutation(len(rows))
    held_out, training = np.sort(order[:num_validation_samples]), np.sort(order[num_validation_samples:])
    fingerprint = hashlib.sha256(" ".join([f"{num_validation_samples}", *digests]).encode()).hexdigest()
    flags |= {"seed": seed, "resolution": resolution}
    images = CaptionedImages(rows.select(np.repeat(training, repeats)), tokenizer, latent_shape,
                             schedule.get("num_train_timesteps", 1000), flags)
    plain = dict.fromkeys(["random_flip", "seed", "caption_dropout", "noise_offset", "input_perturbation"], 0)
    held_out = dataclasses.replace(images, rows=rows.select(held_out), flags={**flags, **plain, "center_crop": True})
    return images, held_out, fingerprint


def micro_batches(num_samples, batch_size, num_processes, process_index, accumulation, seed, first_step, last_step):
    """Yields this process's lists of (epoch, index, weight), one per pass of the steps first_step to last_step - 1. An
    epoch is a permutation by (seed, epoch), cut into steps, the last of which may be short. The weights of a step sum
    to 1 over all processes and passes; a process without a sample in a pass gets one of weight 0."""
    per_pass, per_step = batch_size * num_processes, batch_size * num_processes * accumulation
    for step in range(first_step, last_step):
        epoch, step_in_epoch = divmod(step, math.ceil(num_samples / per_step))
        if step == first_step or step_in_epoch == 0:
            order = np.random.default_rng((seed, ORDER, epoch)).permutation(num_samples).tolist()
        samples = order[step_in_epoch * per_step :][:per_step]
        for start in range(0, len(samples), per_pass):
            mine = samples[start + process_index * batch_size :][:batch_size]
            yield [(epoch, index, 1 / len(samples)) for index in mine] or [(epoch, samples[0], 0.0)]


# ------------------------------------------------------------------------------------------------- networks in JAX
# Pure functions of PyTorch's state dict, of which the three whole networks make a tree by the parts of the names.
# Inside, images and latents are (batch, height, width, channels), which convolutions on every backend prefer.
def in_order(layers):
    """The layers of a list, by their numbers: under `jax.jit` 10 comes before 2."""
    return [layers[str(number)] for number in range(len(layers))]


def dense(weights, x):
    """A linear layer, or a convolution of 1 x 1, over the last axis."""
    kernel = weights["weight"]
    y = x @ kernel.reshape(kernel.shape[:2]).T
    return y + weights["bias"] if "bias" in weights else y


def conv(weights, x, stride=1, padding=(1, 1)):
    """A convolution with the same padding in both directions."""
    y = jax.lax.conv_general_dilated(x, weights["weight"], (stride, stride), [padding, padding],
                                     dimension_numbers=("NHWC", "OIHW", "NHWC"))
    return y + weights["bias"]


def norm(weights, x, eps, groups=None):
    """Layer normalization (arXiv 1607.06450), or group normalization (1803.08494) of x (batch, ..., channels) in so
    many `groups`, with statistics in float32."""
    grouped, axes = x.astype(jnp.float32).reshape(len(x), -1, groups or 1, x.shape[-1] // (groups or 1)), (1, 3)
    centred = grouped - grouped.mean(axes if groups else 3, keepdims=True)
    variance = jnp.square(centred).mean(axes if groups else 3, keepdims=True)
    normal = (centred * jax.lax.rsqrt(variance + eps)).reshape(x.shape)
    return (normal * weights["weight"] + weights["bias"]).astype(x.dtype)


def attention(weights, x, context, num_heads, names="to_q to_k to_v to_out", is_causal=False):
    """Attention of x (batch, length, channels) to `context`; the softmax is float32 in every precision."""
    query, key, value, out = [weights[name] for name in names.split()]
    heads = [dense(projection, source) for projection, source in ((query, x), (key, context), (value, context))]
    heads = [head.reshape(*head.shape[:2], num_heads, -1) for head in heads]
    out = out.get("0", out)  # the UNet's and the VAE's is the first of a list
    return dense(out, jax.nn.dot_product_attention(*heads, is_causal=is_causal).reshape(*x.shape[:2], -1))


def residual_block(weights, x, time_embedding, groups, eps):
    """Two convolutions beside a shortcut, with the time embedding (batch, channels) between them if there is one."""
    hidden = conv(weights["conv1"], jax.nn.silu(norm(weights["norm1"], x, eps, groups)))
    if time_embedding is not None:
        hidden += dense(weights["time_emb_proj"], jax.nn.silu(time_embedding))[:, None, None]
    hidden = conv(weights["conv2"], jax.nn.silu(norm(weights["norm2"], hidden, eps, groups)))
    return (dense(weights["conv_shortcut"], x) if "conv_shortcut" in weights else x) + hidden


def transformer_block(weights, x, context, num_heads):
    """Self-attention, cross-attention and a gated feed-forward layer; the gate is the exact GELU."""
    normal, layers = norm(weights["norm1"], x, 1e-5), weights["ff"]["net"]
    x += attention(weights["attn1"], normal, normal, num_heads)
    x += attention(weights["attn2"], norm(weights["norm2"], x, 1e-5), context, num_heads)
    hidden, gate = jnp.split(dense(layers["0"]["proj"], norm(weights["norm3"], x, 1e-5)), 2, axis=-1)
    return x + dense(layers["2"], hidden * jax.nn.gelu(gate, approximate=False))


def embed_timesteps(weights, config, timesteps):
    """The embedding (batch, 4 x channels of the first level) of timesteps (arXiv 1706.03762, section 3.5)."""
    half = config["block_out_channels"][0] // 2
    # By PyTorch, since timesteps of up to 999 enlarge what another exp would round otherwise.
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - config["freq_shift"]))
    angles = timesteps[:, None].astype(jnp.float32) * rates.numpy()
    waves = [jnp.cos(angles), jnp.sin(angles)] if config["flip_sin_to_cos"] else [jnp.sin(angles), jnp.cos(angles)]
    waves = jnp.concatenate(waves, axis=-1).astype(weights["linear_1"]["weight"].dtype)
    return dense(weights["linear_2"], jax.nn.silu(dense(weights["linear_1"], waves)))


def apply_unet(weights, latents, timesteps, context, config, gradient_checkpointing=False):
    """The prediction (batch, 4, height / 8, width / 8) of a UNet2DConditionModel for latents of this shape, timesteps
    (batch,) and prompt embeddings (batch, tokens, channels), in the precision of the weights."""
    weights, dtype = traverse_util.unflatten_dict(weights, sep="."), weights["conv_in.weight"].dtype
    groups, num_levels = config["norm_num_groups"], len(weights["down_blocks"])
    heads = config["attention_head_dim"]  # so called since the first releases, it is the number of heads
    heads = heads if isinstance(heads, list | tuple) else [heads] * num_levels
    maybe_checkpoint = jax.checkpoint if gradient_checkpointing else lambda function: function
    residual = maybe_checkpoint(functools.partial(residual_block, groups=groups, eps=config["norm_eps"]))
    blocks_of_level = [maybe_checkpoint(functools.partial(transformer_block, num_heads=number)) for number in heads]

    def attend(block, index, x, level):
        if "attentions" not in block:
            return x
        inside = block["attentions"][str(index)]
        hidden = dense(inside["proj_in"], norm(inside["norm"], x, 1e-6, groups).reshape(len(x), -1, x.shape[-1]))
        for layer in in_order(inside["transformer_blocks"]):
            hidden = blocks_of_level[level](layer, hidden, context)
        return x + dense(inside["proj_out"], hidden).reshape(x.shape)

    context, time_embedding = context.astype(dtype), embed_timesteps(weights["time_embedding"], config, timesteps)
    x = conv(weights["conv_in"], latents.transpose(0, 2, 3, 1).astype(dtype))
    skipped = [x]
    for level, block in enumerate(in_order(weights["down_blocks"])):
        for index, layer in enumerate(in_order(block["resnets"])):
            x = attend(block, index, residual(layer, x, time_embedding), level)
            skipped.append(x)
        if "downsamplers" in block:
            x = conv(block["downsamplers"]["0"]["conv"], x, stride=2)
            skipped.append(x)
    first, *others = in_order(weights["mid_block"]["resnets"])
    x = residual(first, x, time_embedding)
    for index, layer in enumerate(others):
        x = residual(layer, attend(weights["mid_block"], index, x, -1), time_embedding)
    for level, block in enumerate(in_order(weights["up_blocks"])):
        for index, layer in enumerate(in_order(block["resnets"])):
            x = residual(layer, jnp.concatenate([x, skipped.pop()], -1), time_embedding)
            x = attend(block, index, x, -1 - level)
        if "upsamplers" in block:
            height, width = skipped[-1].shape[1:3]  # odd sides lose a row that the way down did not have
            x = conv(block["upsamplers"]["0"]["conv"], x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width])
    x = jax.nn.silu(norm(weights["conv_norm_out"], x, config["norm_eps"], groups))
    return conv(weights["conv_out"], x).transpose(0, 3, 1, 2)


def apply_vae_encoder(weights, pixel_values, config):
    """Mean and log-variance (batch, 2 x 4, height / 8, width / 8) of an AutoencoderKL's posterior, in float32, for
    pixels (batch, 3, height, width) in [-1, 1]."""
    weights, groups = traverse_util.unflatten_dict(weights, sep="."), config["norm_num_groups"]
    encoder, middle = weights["encoder"], weights["encoder"]["mid_block"]
    x = conv(encoder["conv_in"], pixel_values.transpose(0, 2, 3, 1).astype(encoder["conv_in"]["weight"].dtype))
    for block in in_order(encoder["down_blocks"]):
        for layer in in_order(block["resnets"]):
            x = residual_block(layer, x, None, groups, 1e-6)
        if "downsamplers" in block:
            x = conv(block["downsamplers"]["0"]["conv"], x, stride=2, padding=(0, 1))
    x = residual_block(middle["resnets"]["0"], x, None, groups, 1e-6)
    hidden = norm(middle["attentions"]["0"]["group_norm"], x, 1e-6, groups).reshape(len(x), -1, x.shape[-1])
    x += attention(middle["attentions"]["0"], hidden, hidden, 1).reshape(x.shape)
    x = residual_block(middle["resnets"]["1"], x, None, groups, 1e-6)
    x = conv(encoder["conv_out"], jax.nn.silu(norm(encoder["conv_norm_out"], x, 1e-6, groups)))
    return dense(weights["quant_conv"], x).transpose(0, 3, 1, 2).astype(jnp.float32)


def apply_text_encoder(weights, input_ids, config):
    """The last hidden states (batch, tokens, channels) of a CLIPTextModel (arXiv 2103.00020) for tokens."""
    gelu = {"gelu": functools.partial(jax.nn.gelu, approximate=False),
            "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x)}[config["hidden_act"]]
    normal = functools.partial(norm, eps=config["layer_norm_eps"])
    weights = traverse_util.unflatten_dict(weights, sep=".")
    x = weights["embeddings"]["token_embedding"]["weight"][input_ids]
    x += weights["embeddings"]["position_embedding"]["weight"][: input_ids.shape[1]]
    for layer in in_order(weights["encoder"]["layers"]):
        hidden = normal(layer["layer_norm1"], x)
        x += attention(layer["self_attn"], hidden, hidden, config["num_attention_heads"],
                       "q_proj k_proj v_proj out_proj", is_causal=True)
        x += dense(layer["mlp"]["fc2"], gelu(dense(layer["mlp"]["fc1"], normal(layer["layer_norm2"], x))))
    return normal(weights["final_layer_norm"], x)


# ---------------------------------------------------------------------------------------------------------- models
def last_line(error):
    """The last line of an exception's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def start_jax(coordinator_address, num_hosts, host_index, mixed_precision, cache_dir, **_):
    """Joins the other hosts, if there are any; returns the mesh of all devices. Raises `InputError`."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # compiled programs are kept for the next run
        folder = Path(cache_dir or datasets.config.HF_CACHE_HOME, "compiled_by_jax")
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_default_matmul_precision", "highest" if mixed_precision != "bf16" else None)
    if coordinator_address:
        jax.config.update("jax_enable_preemption_service", False)  # it would take our signals
        where = {} if coordinator_address == "auto" else {
            "coordinator_address": coordinator_address, "num_processes": num_hosts, "process_id": host_index}
        try:
            jax.distributed.initialize(**where, shutdown_timeout_seconds=86400)  # one saves for all
        except (RuntimeError, ValueError) as error:
            raise InputError(f"--coordinator_address={coordinator_address}: the hosts do not meet; check it, and "
                             f"--num_hosts and --host_index of each ({last_line(error)})") from None
    return Mesh(np.array(jax.devices()), ("data",))


def load_models(args):
    """Returns the base's pipeline in float32, whose UNet is to be trained, and the noise scheduler. Raises
    `InputError`."""
    source = {"revision": args.revision, "cache_dir": args.cache_dir}
    try:
        if args.from_flax:
            pipeline = load_flax(args.pretrained_model_name_or_path, **source)
        else:
            load = diffusers.StableDiffusionPipeline.from_pretrained
            if args.single_file_config:  # a .ckpt is read as weights only
                load, source["config"] = diffusers.StableDiffusionPipeline.from_single_file, args.single_file_config
            pipeline = load(args.pretrained_model_name_or_path, dtype=torch.float32, variant=args.variant,
                            safety_checker=None, **source)
    except Exception as error:  # every format has its own way of being broken
        raise InputError(f"{args.pretrained_model_name_or_path}: cannot be loaded ({last_line(error)})") from None
    objective = {"prediction_type": args.prediction_type} if args.prediction_type else {}
    if args.rescale_betas_zero_snr:
        objective |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return pipeline, diffusers.DDPMScheduler.from_config(pipeline.scheduler.config, **objective)


def load_flax(source, revision, cache_dir):
    """A pipeline of PyTorch's modules with the weights of a Flax pipeline, folder or Hub id, in float32. Raises
    `RuntimeError` for a name or shape too many or too few."""
    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(
        source, revision=revision, cache_dir=cache_dir, allow_patterns=["*.json", "tokenizer/*", "*/*.msgpack"]))
    parts = {name: kind.from_config(kind.load_config(folder, subfolder=name)) for name, kind in (
        ("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL))}
    parts["text_encoder"] = CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")).float()
    for name, module in parts.items():  # which may be in chunks or bfloat16
        tree = serialization.msgpack_restore((folder / name / FLAX_FILES[name]).read_bytes())
        weights = {}
        for path, array in traverse_util.flatten_dict(tree).items():
            *path, kind = [FLAX_NAMES.get(key, key) if name == "vae" else key for key in path if key != "text_model"]
            array = np.asarray(array, np.float32)
            array = array.transpose({4: (3, 2, 0, 1), 2: (1, 0)}[array.ndim]) if kind == "kernel" else array
            key = re.sub(rf"\b({FLAX_LISTS})_(\d+)", r"\1.\2", ".".join(path))
            weights[f"{key}.{'bias' if kind == 'bias' else 'weight'}"] = torch.tensor(np.ascontiguousarray(array))
        module.load_state_dict(weights)
    scheduler = diffusers.DDPMScheduler.load_config(folder, subfolder="scheduler")
    kind = getattr(diffusers, scheduler.get("_class_name", "").removeprefix("Flax"), diffusers.PNDMScheduler)
    return diffusers.StableDiffusionPipeline(
        **parts, tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"), safety_checker=None,
        scheduler=kind.from_config(scheduler), feature_extractor=None, requires_safety_checker=False)


def write_flax(pipeline, output_dir):
    """Writes the weights of UNet, VAE and text encoder as Flax's classes had them, in the precision that they have."""
    old_names = {new.replace(".", "_"): old for old, new in FLAX_NAMES.items()}
    for name, file in FLAX_FILES.items():
        tree = {}
        for key, value in getattr(pipeline, name).state_dict().items():
            *path, kind = re.sub(rf"\b({FLAX_LISTS})\.(\d+)", r"\1_\2", key).split(".")
            path = [old_names.get(word, word) if name == "vae" else word for word in path]
            array = value.float().numpy()
            if kind == "weight":
                kind = "scale" if array.ndim == 1 else "embedding" if path[-1].endswith("embedding") else "kernel"
            array = array.transpose({4: (2, 3, 1, 0), 2: (1, 0)}[array.ndim]) if kind == "kernel" else array
            path = ["text_model", *path] if name == "text_encoder" else path
            tree[*path, kind] = array.astype(str(value.dtype).removeprefix("torch."))  # JAX gives NumPy a bfloat16
        content = serialization.msgpack_serialize(traverse_util.unflatten_dict(tree))
        Path(output_dir, name, file).write_bytes(content)


def make_schedule(rate, last_step, lr_scheduler, lr_step_rules, lr_warmup_steps, lr_num_cycles, lr_power, **_):
    """The learning rate as a function of the step, by diffusers' schedules."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)  # they want one, and are not told more
    schedule = get_scheduler(lr_scheduler, optimizer, lr_step_rules, lr_warmup_steps, last_step, lr_num_cycles or 1,
                             lr_power or 1.0)
    return lambda step: rate * schedule.lr_lambdas[0](step)


def frozen(function, module, dtype):
    """`function(weights, inputs, config)` of a module's weights in `dtype`: takes numpy inputs, a multiple of this
    host's devices, splits them over these and returns the outputs in float32."""
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    config = dict(module.config) if hasattr(module.config, "items") else module.config.to_dict()
    weights = {name: jnp.asarray(value.numpy(), dtype) for name, value in module.state_dict().items()}
    weights = jax.device_put(weights, everywhere)
    program = jax.jit(lambda weights, inputs: function(weights, inputs, config).astype(jnp.float32),
                      out_shardings=split)
    return lambda inputs: np.asarray(program(weights, jax.device_put(inputs, split)))


# ------------------------------------------------------------------------------------------- what is encoded once
def stack(samples):
    """A batch of numpy arrays of samples, by name."""
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def pad(array, length):
    """Repeats the first row at the end, up to `length` rows: compiled programs have one size."""
    return np.concatenate([array, np.repeat(array[:1], length - len(array), axis=0)])


def encode_rows(rows_of, num_rows, batch_size, compute, label):
    """What `compute` gives for `rows_of(indices)`, as an array (num_rows, ...) in a nameless file of the temporary
    folder: it may be larger than the memory."""
    table = None
    for start in tqdm(range(0, num_rows, batch_size), label, unit="batch", disable=None, leave=False):
        indices = range(start, min(start + batch_size, num_rows))
        found = compute(pad(rows_of(indices), batch_size))[: len(indices)]
        if table is None:
            file = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the table)
            table = np.memmap(file, np.float32, "w+", shape=(num_rows, *found.shape[1:]))
        table[indices.start : indices.stop] = found
    return table


def encode_once(images, vae, text_encoder, batch_size, pool):
    """Encodes all captions and, with `center_crop`, the images, each with its mirror image if these are drawn; with
    random crops they are others in every epoch. Returns what to draw samples from, and the tables for `look_up`."""
    captions = {"", *(caption for found in images.rows["captions"] for caption in found)}
    tokens = images.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="np").input_ids
    tokens = np.unique(tokens, axis=0)
    prompts = encode_rows(lambda rows: tokens[rows], len(tokens), batch_size, text_encoder, "Encoding captions")
    tables = {"prompts": prompts, "row_of": {row.tobytes(): number for number, row in enumerate(tokens)}}
    if not images.flags["center_crop"]:
        return images, {**tables, "moments": None, "vae": vae}
    plain = dataclasses.replace(images, flags={**images.flags, "random_flip": False})
    views = [slice(None), slice(None, None, -1)][: 1 + images.flags["random_flip"]]

    def pixels_of(indices):
        return stack(list(pool.map(plain.__getitem__, [(0, index, 1.0) for index in indices])))["pixel_values"]

    def moments_of(pixels):
        return np.stack([vae(pixels[..., view]) for view in views], axis=1)

    moments = encode_rows(pixels_of, len(images), batch_size, moments_of, "Encoding images")
    # A mark in the place of each image, black and white: white is on the left in mirrored ones. None is opened again.
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 255], [0, 255]], np.uint8)).save(file, "PNG")
    rows = [{"image": {"bytes": file.getvalue()}, "captions": found} for found in images.rows["captions"]]
    images = dataclasses.replace(images, rows=rows, flags={**images.flags, "resolution": 2})
    return images, {**tables, "moments": moments, "vae": None}


def look_up(batch, prompts, row_of, moments, vae, batch_size):
    """What a pass needs of a batch of samples, from the tables of `encode_once`, padded by samples of weight 0."""
    found = {"prompt_embeds": prompts[[row_of[tokens.tobytes()] for tokens in batch["input_ids"]]],
             "timestep": batch["timestep"].astype(np.int32)}
    found |= {name: batch[name] for name in ("noise", "added_noise", "posterior_noise")}
    if moments is not None:
        found["moments"] = moments[batch["index"], (batch["pixel_values"][:, 0, 0, 0] > 127).astype(int)]
    found = {name: pad(array, batch_size) for name, array in found.items()}
    if moments is None:
        found["moments"] = vae(pad(batch["pixel_values"], batch_size))
    return {**found, "weight": np.pad(batch["weight"], (0, batch_size - len(batch["weight"])))}


def step_batches(images, order, passes_of_steps, num_passes, pool, **tables):
    """Yields what each step needs, arrays (num_passes, images, ...); the last step of an epoch, which may have fewer
    passes, gets passes of weight 0."""
    for number in passes_of_steps:
        passes = [look_up(stack(list(pool.map(images.__getitem__, next(order)))), **tables) for _ in range(number)]
        passes += [passes[0] | {"weight": np.zeros_like(passes[0]["weight"])}] * (num_passes - number)
        yield stack(passes)


# ----------------------------------------------------------------------------------------------------- mathematics
def encode(moments, posterior_noise, scaling_factor):
    """Latents (batch, 4, height / 8, width / 8) in float32, drawn from the VAE's posterior with these moments."""
    mean, log_variance = jnp.split(moments, 2, axis=1)
    return (mean + jnp.exp(0.5 * log_variance.clip(-30, 20)) * posterior_noise) * scaling_factor


def diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, noise, added_noise, timesteps, snr_gamma=None):
    """One diffusion step: the loss of each sample (batch,), the mean over its latents (arXiv 2006.11239, eq. 14)."""
    # All is float32 up to the UNet: in bfloat16 the first timesteps would get no noise at all.
    alphas = jnp.asarray(noise_scheduler.alphas_cumprod.numpy())[timesteps]
    signal_rate, noise_rate = [jnp.sqrt(share)[:, None, None, None] for share in (alphas, 1 - alphas)]
    noisy_latents = signal_rate * latents + noise_rate * added_noise
    predicts_noise = noise_scheduler.config.prediction_type == "epsilon"
    target = noise if predicts_noise else signal_rate * noise - noise_rate * latents
    model_pred = unet(noisy_latents, timesteps, prompt_embeds)
    losses = jnp.square(model_pred.astype(jnp.float32) - target).mean(axis=(1, 2, 3))
    if snr_gamma is not None:  # min-SNR, arXiv 2303.09556, section 3.4: min(snr, gamma) / snr, or / (snr + 1) for v
        snr = alphas / (1 - alphas)
        losses = losses * (jnp.minimum(snr, snr_gamma) / (snr if predicts_noise else snr + 1))
    return losses


def batch_losses(weights, batch, unet, noise_scheduler, scaling_factor, dtype, snr_gamma=None):
    """The losses (batch,) of a UNet with these float32 weights, computed in `dtype`."""
    weights = jax.tree.map(lambda weight: weight.astype(dtype), weights)
    latents = encode(batch["moments"], batch["posterior_noise"], scaling_factor)
    return diffusion_losses(functools.partial(unet, weights), noise_scheduler, latents, batch["prompt_embeds"],
                            batch["noise"], batch["added_noise"], batch["timestep"], snr_gamma)


def train_step(state, batch, rate, ema_decay, losses_of, optimizer, max_grad_norm):
    """One optimizer step over passes (num_passes, images, ...), whose weighted losses are added. Returns the new
    state, or the old one if loss or gradient is not finite, and [loss, gradient's norm, whether a host has to stop].
    """
    def loss_of(weights, one_pass):
        return (losses_of(weights, one_pass) * one_pass["weight"]).sum()

    def add_pass(total, one_pass):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(state["unet"], one_pass)), None

    if len(batch["weight"]) == 1:  # without a loop, in which XLA's convolutions are five times slower on a CPU
        loss, grads = jax.value_and_grad(loss_of)(state["unet"], {name: array[0] for name, array in batch.items()})
    else:
        nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["unet"]))
        (loss, grads), _ = jax.lax.scan(add_pass, nothing, batch)
    grad_norm = optax.global_norm(grads)
    grads = jax.tree.map(lambda grad: grad * jnp.minimum(1, max_grad_norm / (grad_norm + 1e-6)), grads)
    updates, moments = optimizer.update(grads, state["optimizer"], state["unet"])
    updates = jax.tree.map(lambda update: -rate * update, updates)
    after = {"unet": optax.apply_updates(state["unet"], updates), "optimizer": moments}
    if "ema" in state:
        after["ema"] = optax.incremental_update(after["unet"], state["ema"], 1 - ema_decay)
    whole = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    after = jax.tree.map(lambda new, old: jnp.where(whole, new, old), after, state)
    return after, jnp.stack([loss, grad_norm, batch["stop"].max()])


# ----------------------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(output_dir, settings, progress, state, total_limit):
    """Writes checkpoint-N beside its place, then renames it; only then do older ones beyond `total_limit` go."""
    final = output_dir / f"checkpoint-{progress['global_step']}"
    if jax.process_index() == 0 and not (final / "progress.json").exists():  # else a step broke just after a save
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
        partial.mkdir()
        for name, content in (("args", settings), ("progress", progress)):
            (partial / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
        save_file(arrays, partial / "state.safetensors")
        shutil.copymode(partial / "args.json", partial / "state.safetensors")  # made for its owner alone
        os.sync()  # files before names, or a crash could leave a whole name with half a file
        partial.rename(final)
        for old in list_checkpoints(output_dir)[: -total_limit if total_limit else 0]:
            shutil.rmtree(old.rename(old.with_suffix(".partial")))  # which is what a kill would leave of it
    multihost_utils.sync_global_devices("saved")


def named_leaves(state):
    """The arrays of a nested state by their paths."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def list_checkpoints(output_dir):
    """The whole checkpoints of a run, oldest first; half-written ones have another name or no progress.json."""
    found = [path.parent for path in Path(output_dir).glob("checkpoint-*/progress.json")]
    return sorted((path for path in found if path.name[11:].isdigit()), key=lambda path: int(path.name[11:]))


def find_checkpoint(output_dir, wanted):
    """The checkpoint that `wanted` means: a folder in `output_dir`, a path, or the "latest"; None if there is none."""
    if wanted in (None, "latest"):
        return (list_checkpoints(output_dir) or [None])[-1] if wanted else None
    return Path(output_dir, wanted) if Path(output_dir, wanted).is_dir() else Path(wanted)


def resume(checkpoint, settings, last_step, state):
    """Returns the state in a checkpoint, and its progress: steps, held-out losses before, losses not yet logged.
    Settings that change the result and differ raise `InputError`, or are told and take effect if that is allowed."""
    try:
        before, progress = [json.loads((checkpoint / name).read_text()) for name in ("args.json", "progress.json")]
        saved, wanted = load_file(checkpoint / "state.safetensors"), named_leaves(state)
    except Exception as error:  # safetensors has one for every way of being broken
        raise InputError(f"--resume_from_checkpoint: {checkpoint} is damaged, or of another script; name another "
                         f"({last_line(error)})") from None
    changed = {name: f"{name}: {before.get(name)} there, {value} now" for name, value in settings.items()
               if name not in FREE_ON_RESUME and before.get(name) != value}
    fixed = changed.keys() & FIXED_ON_RESUME
    remedy = "use those" if fixed else "use those, or add --allow_changed_resume"
    told = "\n  ".join([f"{checkpoint} was made under other settings; {remedy}", *changed.values()])
    if fixed or (changed and not settings["allow_changed_resume"]):
        raise InputError(f"--resume_from_checkpoint: {told}")
    if changed:
        print(told)
    if progress["global_step"] > last_step:
        raise InputError(f"--max_train_steps: {checkpoint} is beyond the last step, {last_step}; raise it")
    if {name: leaf.shape for name, leaf in saved.items()} != {name: leaf.shape for name, leaf in wanted.items()}:
        raise InputError(f"--resume_from_checkpoint: {checkpoint} holds the state of another model")
    state = jax.tree.unflatten(jax.tree.structure(state), [saved[name] for name in wanted])
    task = {"captioned_images", "image_interpolation_mode", "prediction_type", "rescale_betas_zero_snr", "resolution"}
    return state, {**progress, "base_losses": None if changed.keys() & task else progress["base_losses"]}


def on_signals(action, _=None):
    """Answers SIGTERM and SIGINT by `action`; workers ignore them: the main process needs them to finish the step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, action)


def note_signal(received, number, _):
    """Appends the signal to `received`; a second one ends the process at once."""
    os.write(2, b"\nFinishing the step and writing a checkpoint; a second signal ends at once, without one.\n")
    received.append(number)
    signal.signal(number, signal.SIG_DFL)


# -------------------------------------------------------------------------------------------- samples, held-out loss
def held_out_losses(losses_of, mesh, images, tables, batch_size, weights):
    """The unweighted loss of every held-out image (num_images,), a mean over timesteps spread evenly; noise and
    timesteps are the same in every call and run."""
    pairs = [(part, index, 1.0) for index in range(len(images)) for part in range(HELD_OUT_TIMESTEPS)]
    split, losses = NamedSharding(mesh, PartitionSpec("data")), []
    for start in range(0, len(pairs), batch_size):
        batch = stack([images[pair] for pair in pairs[start : start + batch_size]])
        batch["timestep"] = (batch["timestep"] + batch["epoch"] * images.num_timesteps) // HELD_OUT_TIMESTEPS
        found = {name: jax.make_array_from_callback(array.shape, split, array.__getitem__)
                 for name, array in look_up(batch, **tables, batch_size=batch_size).items()}
        losses += np.asarray(losses_of(weights, found))[: len(batch["weight"])].tolist()
    return np.reshape(losses, (len(images), HELD_OUT_TIMESTEPS)).mean(axis=1)


@torch.no_grad()
def draw_samples(accelerator, parts, prompts, resolution, seed, path):
    """Draws an image per prompt by 25 steps of DPM-Solver++ (arXiv 2211.01095), and their grid to `path`."""
    parts = {**parts, "scheduler": diffusers.DPMSolverMultistepScheduler.from_config(parts["scheduler"].config)}
    pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    with accelerator.autocast():
        images = [pipeline(prompt, resolution, resolution, num_inference_steps=25, generator=torch.Generator()
                           .manual_seed(seed + k)).images[0] for k, prompt in enumerate(prompts)]
    columns = min(len(images), 4)
    padding = [Image.new("RGB", images[0].size, "white")] * (-len(images) % columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images + padding, math.ceil(len(images) / columns), columns).save(path)
    return images


def validate(accelerator, pipeline, noise_scheduler, measure, prompts, resolution, seed, output_dir, progress,
             weights):
    """Draws samples to samples/step-N.png by PyTorch's pipeline and logs the held-out loss that `measure` gives, and
    its gain over the first call's, which `progress` keeps, with the standard error of the paired difference."""
    step, is_first = progress["global_step"], jax.process_index() == 0
    if measure:
        losses = measure(weights)
        progress["base_losses"] = progress["base_losses"] or losses.tolist()
        gain = np.array(progress["base_losses"]) - losses
        error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
        numbers = {"held_out_loss": losses.mean(), "held_out_gain": gain.mean(), "gain_error": error}
        numbers = {name: float(value) for name, value in numbers.items()}
        if is_first:
            write_log(accelerator, output_dir, step, numbers)
        print(f"\nStep {step}:", *[f"{name} {value:.5f}" for name, value in numbers.items()])
    if prompts and is_first:
        copy_weights(weights, pipeline.unet)
        path = output_dir / "samples" / f"step-{step:06d}.png"
        parts = {**pipeline.components, "scheduler": noise_scheduler}
        drawn = np.stack(draw_samples(accelerator, parts, prompts, resolution, seed, path))
        for tracker in [tracker for tracker in accelerator.trackers if hasattr(tracker, "log_images")]:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": drawn}, step=step, **layout)


def copy_weights(weights, module):
    """Copies weights of JAX into a module of PyTorch, whose names and shapes have to be the same."""
    module.load_state_dict({name: torch.tensor(np.asarray(weight)) for name, weight in weights.items()})


def write_log(accelerator, output_dir, step, numbers):
    """Appends numbers to log.jsonl and sends them to the trackers."""
    if accelerator.is_main_process:
        with (output_dir / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
    accelerator.log(numbers, step=step)


# -------------------------------------------------------------------------------------------------------- training
def print_plan(settings, num_devices, num_trained, num_images, num_held_out, first_step, last_step):
    """Says, before the first step, what will be done."""
    epochs = last_step / math.ceil(num_images / settings["samples_per_step"])
    latents = "once" if settings["center_crop"] else "in every step; once with --center_crop"
    print("""Plan
  images     {0:,} to train on, {1:,} held out, at {resolution} x {resolution} pixels, encoded {2}
  steps      {3:,} to {4:,}, {5:,.1f} epochs
  per step   {samples_per_step:,} images: {train_batch_size} a pass x {gradient_accumulation_steps} passes x {6} {7}
  trained    UNet, {8:,} parameters in float32, passes in precision {mixed_precision!r}; frozen: VAE, text encoder
  optimizer  AdamW at {peak_learning_rate:g}, {lr_scheduler}; EMA: {use_ema}
  output     {output_dir}, a checkpoint of {9:.2g} GB every {checkpointing_steps:,} steps""".format(
        num_images, num_held_out, latents, first_step, last_step, epochs, num_devices,
        f"{jax.default_backend()} devices", num_trained, 4e-9 * num_trained * (3 + settings["use_ema"]), **settings))


def prepare_output(accelerator, output_dir, settings, first_step):
    """Makes the output folder with args.json and a log up to `first_step`, and starts the trackers."""
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        if settings["overwrite_output_dir"]:
            (output_dir / "README.md").unlink(missing_ok=True)  # which says that a run has ended
            for old in [p for p in output_dir.iterdir() if re.fullmatch(r"samples|checkpoint-\d+(.partial)?", p.name)]:
                shutil.rmtree(old, ignore_errors=True)
        (output_dir / "args.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        log = output_dir / "log.jsonl"  # steps after the checkpoint are done again, and so logged again
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() and first_step else []
        log.write_text("".join(line for line in lines if line.endswith("}\n") and (row := json.loads(line))
                               and row["step"] < first_step + ("loss" in row)), encoding="utf-8")
    accelerator.wait_for_everyone()
    accelerator.init_trackers(settings["tracker_project_name"], {name: str(value) for name, value in settings.items()})


def train(args):
    """Trains as `args` say. Ends with status 128 + signal after SIGTERM or SIGINT, 1 if a loss is not finite."""
    output_dir, signals = Path(args.output_dir), []
    check_args(args)
    mesh = start_jax(**vars(args))
    is_first, num_devices, num_local = jax.process_index() == 0, jax.device_count(), jax.local_device_count()
    images, held_out, fingerprint = load_data(**vars(args))
    repo_id = create_repo(**vars(args)) if is_first and args.push_to_hub and not args.dry_run else None
    accelerator = Accelerator(cpu=True, mixed_precision="no", project_dir=output_dir / args.logging_dir,
                              log_with=None if args.report_to == "none" or not is_first else args.report_to)
    dtype = jnp.bfloat16 if args.mixed_precision == "bf16" else jnp.float32
    pipeline, noise_scheduler = load_models(args)

    per_pass, per_host = args.train_batch_size * num_devices, args.train_batch_size * num_local
    samples_per_step = per_pass * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(images) / samples_per_step)
    last_step = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    validation_steps = args.validation_steps or 500
    learning_rate = args.learning_rate * (samples_per_step if args.scale_lr else 1)
    rate_of = make_schedule(learning_rate, last_step, **vars(args))
    average = EMAModel([], 0.9999 if args.ema_decay is None else args.ema_decay, use_ema_warmup=args.ema_warmup)
    optimizer = optax.chain(optax.scale_by_adam(args.adam_beta1, args.adam_beta2, args.adam_epsilon),
                            optax.add_decayed_weights(args.adam_weight_decay))
    weights = {name: value.numpy() for name, value in pipeline.unet.state_dict().items()}
    state = {"unet": weights, "optimizer": jax.device_get(optimizer.init(weights))}
    state |= {"ema": weights} if args.use_ema else {}
    settings = {**vars(args), "hub_token": None, "captioned_images": fingerprint, "samples_per_step": samples_per_step,
                "peak_learning_rate": learning_rate, "mixed_precision": args.mixed_precision or "no",
                "state": [*state], "schedule_steps": None if args.lr_scheduler.startswith("constant") else last_step}
    progress = {"global_step": 0, "base_losses": None, "losses": []}
    if checkpoint := find_checkpoint(output_dir, args.resume_from_checkpoint):
        state, progress = resume(checkpoint, settings, last_step, state)
    first_step, num_trained = progress["global_step"], sum(weight.size for weight in weights.values())
    print_plan(settings, num_devices, num_trained, len(images), len(held_out), first_step, last_step)
    if args.dry_run:
        return
    if is_first:
        prepare_output(accelerator, output_dir, settings, first_step)
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "data"))
    state = jax.device_put(state, everywhere)
    unet = functools.partial(apply_unet, config=dict(pipeline.unet.config),
                             gradient_checkpointing=args.gradient_checkpointing)
    losses_of = functools.partial(batch_losses, unet=unet, noise_scheduler=noise_scheduler, dtype=dtype,
                                  scaling_factor=pipeline.vae.config.scaling_factor)
    step_program = jax.jit(functools.partial(
        train_step, losses_of=functools.partial(losses_of, snr_gamma=args.snr_gamma), optimizer=optimizer,
        max_grad_norm=args.max_grad_norm), donate_argnums=0, out_shardings=everywhere)
    pool = ThreadPoolExecutor(args.dataloader_num_workers or 1)
    vae = frozen(lambda weights, pixels, config: apply_vae_encoder(weights, pixels / 127.5 - 1, config), pipeline.vae,
                 dtype)
    encoders = {"vae": vae, "text_encoder": frozen(apply_text_encoder, pipeline.text_encoder, dtype)}
    images, tables = encode_once(images, **encoders, batch_size=per_host, pool=pool)
    measure = len(held_out) and functools.partial(held_out_losses, jax.jit(losses_of, out_shardings=everywhere), mesh,
                                                  *encode_once(held_out, **encoders, batch_size=per_host, pool=pool),
                                                  per_pass)
    del vae, encoders  # which hold weights on the devices
    look = functools.partial(validate, accelerator, pipeline, noise_scheduler, measure, args.validation_prompts,
                             args.resolution, args.seed, output_dir, progress)
    if first_step % validation_steps == 0 or first_step == last_step:  # a stop comes before the look at its step
        look(state.get("ema", state["unet"]))
    on_signals(functools.partial(note_signal, signals))
    order = micro_batches(len(images), per_host, jax.process_count(), jax.process_index(),
                          args.gradient_accumulation_steps, args.seed, first_step, last_step)
    sizes = [min(samples_per_step, len(images) - k * samples_per_step) for k in range(steps_per_epoch)]
    num_passes = [math.ceil(sizes[step % steps_per_epoch] / per_pass) for step in range(first_step, last_step)]
    batches = step_batches(images, order, num_passes, args.gradient_accumulation_steps, pool, batch_size=per_host,
                           **tables)
    bar = tqdm(range(first_step, last_step), initial=first_step, total=last_step, unit="step", disable=not is_first)

    batch = next(batches, None)
    for step in bar:
        started = time.perf_counter()
        batch["stop"] = np.full_like(batch["weight"], bool(signals))
        batch = {name: jax.make_array_from_process_local_data(split, array) for name, array in batch.items()}
        decay = average.get_decay(step + 1)
        state, numbers = step_program(state, batch, np.float32(rate_of(step)), np.float32(decay))
        batch = next(batches, None)  # the next one is made while the devices work
        loss, grad_norm, stop = np.asarray(numbers).tolist()
        stop = bool(stop or (signals and jax.process_count() == 1))
        broken = not np.isfinite([loss, grad_norm]).all()
        if not broken:
            progress["global_step"] = step + 1
            progress["losses"].append(loss)
            images_per_second = sizes[step % steps_per_epoch] / (time.perf_counter() - started)
            bar.set_postfix(loss=f"{loss:.4f}", images_per_second=f"{images_per_second:.1f}", refresh=False)
        done = progress["global_step"]
        if is_first and done > step and (done % args.logging_steps == 0 or done == last_step):
            write_log(accelerator, output_dir, done, {
                "loss": sum(progress["losses"]) / len(progress["losses"]), "lr": rate_of(done), "grad_norm": grad_norm,
                "images_per_second": images_per_second})
            progress["losses"] = []
        if stop or broken or done % args.checkpointing_steps == 0:
            limit = None if broken else args.checkpoints_total_limit  # the last good one may be an older one
            save_checkpoint(output_dir, settings, progress, state, limit)
        if stop or broken:
            leave(accelerator, output_dir, done, broken, signals)
        if done % validation_steps == 0 or done == last_step:
            look(state.get("ema", state["unet"]))
    if is_first:
        copy_weights(state.get("ema", state["unet"]), pipeline.unet)
        save_model(args, pipeline, noise_scheduler.config, last_step)
        if repo_id:
            push(repo_id, ["model_index.json", *[f"{name}/*" for name in pipeline.components]],
                 f"Train {last_step} steps", **vars(args))
    accelerator.end_training()


def leave(accelerator, output_dir, step, broken, signals):
    """Ends the process after its last checkpoint, and says why."""
    accelerator.end_training()
    why = "a signal" if not broken else f"a loss or gradient that is not finite, in step {step + 1}"
    remedy = "" if not broken else " --allow_changed_resume and a lower --learning_rate"
    accelerator.print(f"Stopped by {why}. {output_dir / f'checkpoint-{step}'} holds the state after step {step}; go "
                      f"on with --resume_from_checkpoint=latest{remedy}", file=sys.stderr)
    sys.exit(1 if broken else 128 + (signals or [signal.SIGTERM])[0])


def save_model(args, pipeline, objective, step):
    """Writes the pipeline, with a scheduler that fits `objective`, the noise scheduler's config, and the card."""
    kind, changes = type(pipeline.scheduler), {"prediction_type": objective.prediction_type}
    if objective.rescale_betas_zero_snr:  # few samplers can start from pure noise
        kind = diffusers.DDIMScheduler
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.register_modules(scheduler=kind.from_config(pipeline.scheduler.config, **changes))
    for module in (pipeline.unet, pipeline.vae):  # not the text encoder: half would stay half when loaded, and fail
        module.to(DTYPES[args.save_precision]).register_to_config(_name_or_path=None)  # which is a path here
    pipeline.register_to_config(_name_or_path=None)
    pipeline.save_pretrained(args.output_dir)
    if args.save_flax:
        write_flax(pipeline, args.output_dir)
    settings = {flag: value for flag, value in vars(args).items() if "host" not in flag and "coordinator" not in flag}
    write_card(args.output_dir, args.pretrained_model_name_or_path, args.validation_prompts, settings, step,
               "`StableDiffusionPipeline.from_pretrained(...)`", ["stable-diffusion", "stable-diffusion-diffusers"])
    for path in [path for name in pipeline.components for path in Path(args.output_dir, name).glob("*.safetensors")]:
        shutil.copymode(Path(args.output_dir, "README.md"), path)  # safetensors makes it for its owner alone


def write_card(output_dir, base, prompts, settings, step, loader, tags, instance_prompt=None):
    """Writes the model card: licence of the base, how to load the result, samples, settings; no paths, no secrets."""
    local, name = Path(base).exists(), Path(output_dir).resolve().name
    licence = None
    with contextlib.suppress(Exception):  # no card, no connection, bad YAML: a licence must not cost a result
        licence = ModelCard.load(Path(base) / "README.md" if local else base).data.license
    data = ModelCardData(base_model=None if local else base, license=licence or "other", library_name="diffusers",
                         pipeline_tag="text-to-image", tags=tags, instance_prompt=instance_prompt)
    samples = f"![samples](samples/step-{step:06d}.png)\n\n{'; '.join(dict.fromkeys(prompts))}\n\n" if prompts else ""
    rows = [f"| {flag} | {str(value).replace('|', ' ')} |\n" for flag, value in settings.items()
            if value is not None and value is not False and not re.search("_dir$|_path$|_token|config|resume", flag)
            and not (isinstance(value, str) and os.path.exists(value))]
    Path(output_dir, "README.md").write_text(
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nFine-tuned for {step} steps from "
        f"{Path(base).name if local else base}. Load it with {loader}.\n\n{samples}| setting | value |\n|---|---|\n"
        f"{''.join(rows)}", encoding="utf-8")


def create_repo(output_dir, hub_model_id, hub_token, hub_private_repo, **_):
    """Makes the repository on the Hub; returns its full name. Raises `InputError`."""
    name = hub_model_id or Path(output_dir).resolve().name
    try:
        return HfApi(token=hub_token).create_repo(name, private=hub_private_repo or None, exist_ok=True).repo_id
    except Exception as error:  # of the Hub, of the connection or of the name
        raise InputError(f"--push_to_hub: the repository {name} cannot be made; log in with `hf auth login` or "
                         f"--hub_token, and check --hub_model_id ({last_line(error)})") from None


def push(repo_id, files, message, output_dir, hub_token, **_):
    """Uploads `files` of the result, nothing else; if that fails, says how to and ends with status 1."""
    files = ["README.md", "log.jsonl", "samples/*", *files]
    try:
        HfApi(token=hub_token).upload_folder(repo_id=repo_id, folder_path=output_dir, commit_message=message,
                                             allow_patterns=files)
    except Exception as error:  # whatever it is, the result is safe and the user should hear that
        print(f"The upload failed ({last_line(error)}). The result is whole in {output_dir}; to send it again:\n"
              f"  hf upload {repo_id} {output_dir} . --include {' '.join(map(repr, files))}", file=sys.stderr)
        sys.exit(1)


def main(argv=None):
    """Runs the script; a mistake of the user's ends with status 2 and its message."""
    args = parse_args(argv)
    for library in (diffusers, transformers):  # their bars and remarks would drown the plan
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(None if args.host_index else sys.stdout):
            train(args)
    except (InputError, KeyboardInterrupt) as error:  # once it trains, signals are noted
        print(f"{Path(__file__).name}: {str(error) or 'stopped before the first step'}", file=sys.stderr)
        sys.exit(2 if str(error) else 128 + signal.SIGINT)


if __name__ == "__main__":
    main()
