#!/usr/bin/env python
"""Train LoRA adapters for Stable Diffusion 1.x or 2.x on captioned images.

    accelerate launch train_text_to_image_lora.py --pretrained_model_name_or_path=MODEL --train_data_dir=my_images \
        --resolution=512 --train_batch_size=4 --learning_rate=1e-4 --max_train_steps=5000 --rank=16 \
        --mixed_precision=bf16 --validation_prompts "a drawing of a cat" --output_dir=my_lora

`my_images` holds images and a metadata.jsonl (file_name, text), or a .txt beside each image; the result is
pytorch_lora_weights.safetensors, and on demand the same adapter as A1111, Forge and ComfyUI read it. What is random in
a sample depends on (seed, epoch, index of the sample) alone, so a run that is killed and resumed ends in the same
bits. Papers: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), latent diffusion (2112.10752), DDPM
(2006.11239), v-prediction (2202.00512), min-SNR (2303.09556), zero terminal SNR (2305.08891), input perturbation
(2301.11706).
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import diffusers
import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env, send_to_device
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params, compute_snr
from diffusers.utils import is_bitsandbytes_available, is_xformers_available, make_image_grid
from filelock import FileLock
from huggingface_hub import HfApi, ModelCard, ModelCardData
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

IMAGE_SUFFIXES = set(".avif .bmp .gif .jfif .jpe .jpeg .jpg .png .tif .tiff .webp".split())
MIN_SIDE = 16  # pixels; anything smaller is an icon or a broken file
HELD_OUT_TIMESTEPS = 4  # at which the loss of each held-out image is measured
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAMPLE, ORDER, DROPOUT, SUBSET, HELD_OUT = range(5)  # a stream of random numbers each
REPLACED_FLAGS = {
    "--local_rank": "start with `accelerate launch` or torchrun, which set the rank",
    "--validation_epochs": "use --validation_steps",
    "--validation_prompt": "use --validation_prompts",
    "--num_validation_images": "give a prompt to --validation_prompts several times",
}
# Settings that a resume may change: they leave the result as it is, or what follows from them is compared instead.
FREE_ON_RESUME = """allow_changed_resume cache_dir caption_column checkpointing_steps checkpoints_total_limit
    class_data_dir config dataloader_num_workers dataset_config_name dataset_name dry_run gradient_accumulation_steps
    gradient_checkpointing hub_model_id hub_private_repo hub_token image_column init_lora_weights instance_data_dir
    kohya_file_name logging_dir logging_steps max_train_samples max_train_steps num_class_images num_train_epochs
    num_validation_images num_validation_samples offload_ema output_dir output_kohya_format overwrite_output_dir
    prior_generation_precision push_to_hub report_to resume_from_checkpoint sample_batch_size save_precision
    skip_bad_images tracker_project_name train_batch_size train_data_dir validation_prompt validation_prompts
    validation_steps""".split()
# The checkpoint's state would not fit.
FIXED_ON_RESUME = set("lora_target mixed_precision rank state train_text_encoder use_8bit_adam use_dora".split())
# Names of layers, of the UNet and of the text encoder, by --lora_target.
ATTENTION = "to_q to_k to_v to_out.0 q_proj k_proj v_proj out_proj".split()
FEED_FORWARD = "ff.net.0.proj ff.net.2 fc1 fc2".split()
RESIDUAL = "proj_in proj_out conv1 conv2 time_emb_proj conv_shortcut".split()
LORA_TARGETS = {"attention": ATTENTION, "attention+ff": ATTENTION + FEED_FORWARD,
                "all": ATTENTION + FEED_FORWARD + RESIDUAL}
LORA_FILE = "pytorch_lora_weights.safetensors"


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
    add("--cache_dir", help="where downloads and remembered checks go, instead of the Hugging Face cache")
    add = parser.add_argument_group("adapters").add_argument
    add("--rank", type=int, default=4, help="rank of the adapters [1, inf)")
    add("--lora_alpha", type=float, help="scale of the adapters times the rank; default: the rank (0, inf)")
    add("--lora_dropout", type=float, default=0.0, help="share of the adapters' inputs that is dropped [0, 1)")
    add("--use_rslora", **switch, help="scale by alpha / sqrt(rank) instead of alpha / rank")
    add("--use_dora", **switch, help="train the length of the weights apart from their direction")
    add("--lora_target", default="attention", choices=list(LORA_TARGETS), help="layers with adapters")
    add("--train_text_encoder", **switch, help="adapters on the text encoder too")
    add("--text_encoder_lr", type=float, help="default: --learning_rate; needs --train_text_encoder (0, inf)")
    add("--init_lora_weights", metavar="PATH", help="go on from such a file of this script, or its folder")
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
    add("--dataloader_num_workers", type=int, default=0, help="processes that load images; 0: the main one [0, inf)")
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
    add("--use_8bit_adam", **switch, help="AdamW with 8-bit state, by bitsandbytes")
    add("--use_ema", **switch, help="average the weights over the steps; samples and result use the average")
    add("--ema_decay", type=float, help="highest decay of the average; 0.9999 if not given; needs --use_ema [0, 1]")
    add("--ema_warmup", **switch, help="raise the decay slowly, as 1 - (1 + step) ** -2/3; needs --use_ema")
    add("--offload_ema", **switch, help="keep the average in CPU memory between steps; needs --use_ema")
    add("--foreach_ema", **switch, help="update the average with fused operations; needs --use_ema")
    add = parser.add_argument_group("memory and speed").add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of passes; default: accelerate's config")
    add("--gradient_checkpointing", **switch, help="compute activations twice: slower, less memory")
    add("--enable_xformers_memory_efficient_attention", **switch, help="xFormers' attention instead of torch's")
    add("--allow_tf32", **switch, help="TensorFloat-32 matrix products, on GPUs that have them")
    add = parser.add_argument_group("output").add_argument
    add("--output_kohya_format", **switch, help="write the adapter as A1111, Forge and ComfyUI read it too")
    add("--kohya_file_name", help="name of that file; default: that of --output_dir; needs --output_kohya_format")
    add("--output_dir", default="sd-model-finetuned-lora", help="where everything is written")
    add("--overwrite_output_dir", **switch, help="write over the run in --output_dir and remove its checkpoints")
    add("--save_precision", default="no", choices=list(DTYPES), help="half precision of what is saved, or no")
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
    problems = parse_args(check=vars(args)) + check_settings(vars(args))
    problems += check_output(**vars(args)) + check_model(**vars(args))
    if not problems:  # else the layers are not known
        problems = check_adapters(**vars(args))
    if problems:
        raise InputError("\n  ".join(["", *problems] if len(problems) > 1 else problems))


def check_settings(settings):
    """Lists which flags contradict each other or cannot be obeyed here."""
    get, schedule = settings.get, settings["lr_scheduler"]
    is_local = Path(get("pretrained_model_name_or_path") or "").exists()
    rules = re.fullmatch(r"({0}:\d+,)+{0}".format(r"\d*\.?\d+(e-?\d+)?"), get("lr_step_rules") or "")
    folder = "train_data_dir" if "train_data_dir" in settings else "instance_data_dir"
    trackers = ["all", "none", *map(str, get_available_trackers())]
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    xformers = "enable_xformers_memory_efficient_attention"
    precision = get("mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    shown = {**settings, "mixed_precision": f"{precision} (or accelerate's config)"}
    return [f"--{flag}={shown.get(flag)}: {remedy}" for wrong, flag, remedy in (
        (get("revision") and is_local, "revision", "does nothing without a model on the Hub; drop this"),
        (get("variant") and get("single_file_config"), "variant", "does nothing with a single file; drop this"),
        (get("lr_warmup_steps") and schedule in ("constant", "piecewise_constant"), "lr_warmup_steps",
         "does nothing without constant_with_warmup or the like; add that or drop this"),
        (schedule == "piecewise_constant" and not rules, "lr_step_rules", "give rules such as 1:10,0.1:20,0.01"),
        (bool(get("dataset_name")) == bool(get(folder)), folder, "give this or --dataset_name, not both"),
        (get("report_to") not in trackers, "report_to", f"installed are {', '.join(trackers)}"),
        (get("use_8bit_adam") and not is_bitsandbytes_available(), "use_8bit_adam", "needs bitsandbytes; drop this"),
        (get("allow_tf32") and on_cpu, "allow_tf32", "needs an NVIDIA GPU; drop this"),
        (get(xformers) and (on_cpu or not is_xformers_available()), xformers, "needs a GPU and xformers; drop this"),
        (precision not in DTYPES or (on_cpu and precision == "fp16"), "mixed_precision", "cannot run here; use bf16"),
        (schedule == "polynomial" and get("learning_rate") <= 1e-7, "learning_rate", "must be above 1e-7, its end"),
    ) if wrong] + [f"accelerate's config asks for {name}, which cannot be used; choose GPUs alone" for name in (
        "FSDP", "DEEPSPEED", "MEGATRON_LM") if parse_flag_from_env(f"ACCELERATE_USE_{name}")]


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


def check_adapters(pretrained_model_name_or_path, single_file_config, revision, cache_dir, train_text_encoder,
                   output_kohya_format, kohya_file_name, output_dir, **settings):
    """Lists what is wrong with the name of kohya's file, or between adapters, layers and the file to go on from."""
    kohya = (kohya_file_name or Path(output_dir).resolve().name).removesuffix(".safetensors")
    if output_kohya_format and (Path(kohya).name != kohya or f"{kohya}.safetensors" == LORA_FILE):
        return [f"--kohya_file_name={kohya}: is a path, or the name of the other file; give another name"]
    source, where = single_file_config or pretrained_model_name_or_path, {"revision": revision, "cache_dir": cache_dir}
    with torch.device("meta"):  # layers without weights
        unet = diffusers.UNet2DConditionModel
        models = {"unet": unet.from_config(unet.load_config(source, subfolder="unet", **where))}
        if train_text_encoder:
            config = CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", **where)
            models["text_encoder"] = CLIPTextModel(config)
        try:
            add_adapters(models, **settings)
        except Exception as error:  # of the file system, the format, or the layers
            flag = "init_lora_weights" if settings["init_lora_weights"] else "lora_target"
            return [f"--{flag}={settings[flag]}: cannot be used with these flags and model ({last_line(error)})"]
    return []


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


# ---------------------------------------------------------------------------------------------------------- models
def last_line(error):
    """The last line of an exception's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def make_accelerator(mixed_precision, report_to, output_dir, logging_dir, allow_tf32, **_):
    """The accelerator; its processes wait for each other for a day, since one of them draws and saves alone."""
    torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=1))
    return Accelerator(mixed_precision=mixed_precision, log_with=None if report_to == "none" else report_to,
                       project_dir=Path(output_dir, logging_dir), kwargs_handlers=[patience])


def load_models(args, weight_dtype, device):
    """Returns the base's pipeline, frozen and in `weight_dtype`, its models that get adapters, by name, and the noise
    scheduler. Adapters are in float32. Raises `InputError`."""
    pipeline, noise_scheduler = load_base(**vars(args))
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.requires_grad_(False).eval().to(device, dtype=weight_dtype)
    models = {"unet": pipeline.unet}
    if args.train_text_encoder:
        models["text_encoder"] = pipeline.text_encoder
        if args.gradient_checkpointing:
            pipeline.text_encoder.activation_checkpointing_enable()
    add_adapters(models, **vars(args))
    for model in models.values():
        model.train()
    return pipeline, models, noise_scheduler


def add_adapters(models, rank, lora_alpha, lora_dropout, use_rslora, use_dora, lora_target, init_lora_weights, seed,
                 **_):
    """Adds adapters in float32 to the `unet` and maybe `text_encoder` of `models`, new ones or those in a file: W + B
    A alpha / rank, with A (rank, in) and B (out, rank), arXiv 2106.09685, section 4.1. Raises `ValueError` if no layer
    is a target or if the file does not fit, or what reading it raises."""
    torch.manual_seed(seed)
    weights, header = read_lora(init_lora_weights) if init_lora_weights else ({}, {})
    for name, model in models.items():
        config = peft.LoraConfig(
            r=rank, lora_alpha=lora_alpha or rank, lora_dropout=lora_dropout, use_rslora=use_rslora, use_dora=use_dora,
            target_modules=LORA_TARGETS[lora_target])
        model.add_adapter(config)
        cast_training_params(model, torch.float32)
        for key in ("r", "lora_alpha", "use_rslora", "alpha_pattern"):
            if (made := header.get(f"{name}.{key}", getattr(config, key))) != getattr(config, key):
                raise ValueError(f"{key} is {made} in its {name}, not {getattr(config, key)}; use that")
    adapters = lora_weights(models)
    if init_lora_weights and {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in adapters.items()}:
        raise ValueError("it is in kohya's layout, or of another base, --rank, --lora_target, --use_dora or encoders")
    for key, value in weights.items():
        adapters[key].copy_(value)


def lora_weights(models):
    """The adapters' tensors as peft names them, such as unet.<layer>.lora_A.weight."""
    weights = {f"{name}.{key}": value.detach() for name, model in models.items()
               for key, value in peft.get_peft_model_state_dict(model).items()}
    # transformers finds DoRA's lengths of the text encoder under this name only.
    return {re.sub(r"^(text_encoder\..+_vector)$", r"\1.weight", key): value for key, value in weights.items()}


def read_lora(path):
    """Reads a LoRA file of these scripts, or the one in a folder: returns its tensors by name, and peft's settings."""
    path = Path(path, LORA_FILE) if Path(path).is_dir() else path
    with safe_open(path, "pt") as file:
        header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118 (it is no dict)


def load_base(pretrained_model_name_or_path, single_file_config, revision, variant, cache_dir, prediction_type,
              rescale_betas_zero_snr, gradient_checkpointing, enable_xformers_memory_efficient_attention, **_):
    """Loads a pipeline in float32 without its safety checker, and the noise scheduler. Raises `InputError`."""
    load, source = diffusers.StableDiffusionPipeline.from_pretrained, {"revision": revision, "variant": variant}
    if single_file_config:  # a .ckpt is read as weights only
        load, source = diffusers.StableDiffusionPipeline.from_single_file, {"config": single_file_config}
    source |= {"cache_dir": cache_dir, "safety_checker": None}
    try:
        pipeline = load(pretrained_model_name_or_path, dtype=torch.float32, **source)
        if enable_xformers_memory_efficient_attention:
            pipeline.unet.enable_xformers_memory_efficient_attention()
    except Exception as error:  # every format has its own way of being broken, and xFormers one for every mismatch
        raise InputError(f"{pretrained_model_name_or_path}: cannot be loaded ({last_line(error)})") from None
    if gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    objective = {"prediction_type": prediction_type} if prediction_type else {}
    if rescale_betas_zero_snr:
        objective |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return pipeline, diffusers.DDPMScheduler.from_config(pipeline.scheduler.config, **objective)


def make_state(accelerator, weights, groups, last_step, lr_scheduler, lr_step_rules, lr_warmup_steps, lr_num_cycles,
               lr_power, use_8bit_adam, adam_beta1, adam_beta2, adam_weight_decay, adam_epsilon, use_ema, ema_decay,
               ema_warmup, foreach_ema, **_):
    """All that a checkpoint holds, by name: `weights` (modules), optimizer, lr_scheduler, maybe ema and scaler. AdamW
    (arXiv 1711.05101) trains the parameter `groups`, or its 8-bit form (2110.02861)."""
    AdamW = functools.partial(torch.optim.AdamW, fused=True)
    if use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW
    optimizer = AdamW(groups, groups[0]["lr"], (adam_beta1, adam_beta2), adam_epsilon, adam_weight_decay)
    schedule = get_scheduler(lr_scheduler, optimizer, lr_step_rules, lr_warmup_steps, last_step, lr_num_cycles or 1,
                             lr_power or 1.0)  # its polynomial falls from the optimizer's default rate
    # The schedule is not prepared: it would count processes.
    state = {**weights, "optimizer": accelerator.prepare(optimizer), "lr_scheduler": schedule}
    if use_ema:
        parameters = [parameter for group in groups for parameter in group["params"]]
        decay = 0.9999 if ema_decay is None else ema_decay
        state["ema"] = EMAModel(parameters, decay, use_ema_warmup=ema_warmup, foreach=foreach_ema)
    return state if accelerator.scaler is None else {**state, "scaler": accelerator.scaler}


# ----------------------------------------------------------------------------------------------------- mathematics
@torch.no_grad()
def encode(vae, batch):
    """Encodes images to latents (batch, 4, height / 8, width / 8) in float32, drawn from the VAE's posterior."""
    pixel_values = batch["pixel_values"] / 127.5 - 1  # [-1, 1], in float32: half precision would round them
    posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
    return (posterior.mean.float() + posterior.std.float() * batch["posterior_noise"]) * vae.config.scaling_factor


def diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, noise, added_noise, timesteps, snr_gamma=None):
    """One diffusion step: the loss of each sample (batch,), the mean over its latents (arXiv 2006.11239, eq. 14)."""
    # All is float32 up to the UNet: in bfloat16 the first timesteps would get no noise at all.
    noisy_latents = noise_scheduler.add_noise(latents, added_noise, timesteps)
    predicts_noise = noise_scheduler.config.prediction_type == "epsilon"
    target = noise if predicts_noise else noise_scheduler.get_velocity(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, prompt_embeds).sample
    losses = F.mse_loss(model_pred.float(), target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:  # min-SNR, arXiv 2303.09556, section 3.4: min(snr, gamma) / snr, or / (snr + 1) for v
        snr = compute_snr(noise_scheduler, timesteps)
        losses = losses * (snr.clamp(max=snr_gamma) / (snr if predicts_noise else snr + 1))
    return losses


# ----------------------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(accelerator, output_dir, settings, progress, state, total_limit):
    """Writes checkpoint-N beside its place, then renames it; only then do older ones beyond `total_limit` go."""
    final = output_dir / f"checkpoint-{progress['global_step']}"
    if accelerator.is_main_process and not (final / "progress.json").exists():  # else a step broke just after a save
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
        partial.mkdir()
        torch.save({name: part.state_dict() for name, part in state.items()}, partial / "state.pt")
        for name, content in (("args", settings), ("progress", progress)):
            (partial / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.sync()  # files before names, or a crash could leave a whole name with half a file
        partial.rename(final)
        for old in list_checkpoints(output_dir)[: -total_limit if total_limit else 0]:
            shutil.rmtree(old.rename(old.with_suffix(".partial")))  # which is what a kill would leave of it
    accelerator.wait_for_everyone()


def list_checkpoints(output_dir):
    """The whole checkpoints of a run, oldest first; half-written ones have another name or no progress.json."""
    found = [path.parent for path in Path(output_dir).glob("checkpoint-*/progress.json")]
    return sorted((path for path in found if path.name[11:].isdigit()), key=lambda path: int(path.name[11:]))


def find_checkpoint(output_dir, wanted):
    """The checkpoint that `wanted` means: a folder in `output_dir`, a path, or the "latest"; None if there is none."""
    if wanted in (None, "latest"):
        return (list_checkpoints(output_dir) or [None])[-1] if wanted else None
    return Path(output_dir, wanted) if Path(output_dir, wanted).is_dir() else Path(wanted)


def resume(accelerator, checkpoint, settings, last_step, state):
    """Loads a checkpoint into `state`; returns its progress: steps, held-out losses before, losses not yet logged.
    Settings that change the result and differ raise `InputError`, or are told and take effect if that is allowed."""
    try:
        before, progress = [json.loads((checkpoint / name).read_text()) for name in ("args.json", "progress.json")]
        saved = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch has one for every way of being broken
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
        accelerator.print(told)
    if progress["global_step"] > last_step:
        raise InputError(f"--max_train_steps: {checkpoint} is beyond the last step, {last_step}; raise it")
    # Rates and decays are those asked for now, which are the checkpoint's unless they were changed.
    asked = {"param_groups", "base_lrs", "decay", "use_ema_warmup"}
    for name, part in state.items():
        now = part.state_dict()
        saved[name].update({key: now[key] for key in now.keys() & asked})
        part.load_state_dict(saved[name])
    optimizer, lr_scheduler = state["optimizer"], state["lr_scheduler"]
    for group, factor in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(lr_scheduler.last_epoch)
    task = {"captioned_images", "image_interpolation_mode", "prediction_type", "rescale_betas_zero_snr", "resolution"}
    return {**progress, "base_losses": None if changed.keys() & task else progress["base_losses"]}


def exchange(accelerator, loss, grad_norm, stop):
    """The step's one exchange between processes: the sum of their losses, whether loss or gradient is not finite,
    whether the gradient is not (which is for fp16's scaler to mend), and whether any of them has to stop."""
    overflow = ~torch.isfinite(grad_norm)
    broken = ~torch.isfinite(loss) | (overflow & (accelerator.mixed_precision != "fp16"))
    flags = torch.stack([loss, broken.float(), overflow.float(), torch.full_like(loss, stop)])
    return accelerator.reduce(flags).tolist()


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
@torch.no_grad()
def held_out_losses(accelerator, unet, vae, text_encoder, noise_scheduler, images, batch_size):
    """The unweighted loss of every held-out image (num_images,), a mean over timesteps spread evenly; noise and
    timesteps are the same in every call and run. Each process does its share."""
    pairs = [(part, index, 1.0) for index in range(len(images)) for part in range(HELD_OUT_TIMESTEPS)]
    mine = pairs[accelerator.process_index :: accelerator.num_processes]
    losses = torch.zeros(len(images))
    for batch in torch.utils.data.DataLoader(images, batch_size, sampler=mine):
        batch = send_to_device(batch, accelerator.device, skip_keys="index")
        timesteps = (batch["timestep"] + batch["epoch"] * images.num_timesteps) // HELD_OUT_TIMESTEPS
        with accelerator.autocast():
            latents, prompt_embeds = encode(vae, batch), text_encoder(batch["input_ids"])[0]
            part_losses = diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, batch["noise"],
                                           batch["noise"], timesteps)
        losses.index_add_(0, batch["index"], part_losses.cpu() / HELD_OUT_TIMESTEPS)
    return accelerator.reduce(losses.to(accelerator.device), "sum").cpu()


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


def validate(accelerator, parts, parameters, ema, images, batch_size, prompts, resolution, seed, output_dir, progress):
    """Draws samples to samples/step-N.png and logs the held-out loss, under the averaged weights if there are any, and
    its gain over the first call's, which `progress` keeps, with the standard error of the paired difference."""
    unet, vae, text_encoder, step = parts["unet"], parts["vae"], parts["text_encoder"], progress["global_step"]
    trained = torch.nn.ModuleList(part for part in (unet, text_encoder) if part.training).eval()
    if ema and (prompts or len(images)):
        ema.store(parameters)
        ema.copy_to(parameters)
    if len(images):
        losses = held_out_losses(accelerator, unet, vae, text_encoder, parts["scheduler"], images, batch_size)
        progress["base_losses"] = progress["base_losses"] or losses.tolist()
        gain = torch.tensor(progress["base_losses"]) - losses
        error = gain.std().item() / len(gain) ** 0.5 if len(gain) > 1 else 0.0
        numbers = {"held_out_loss": losses.mean().item(), "held_out_gain": gain.mean().item(), "gain_error": error}
        write_log(accelerator, output_dir, step, numbers)
        accelerator.print(f"\nStep {step}:", *[f"{name} {value:.5f}" for name, value in numbers.items()])
    if prompts and accelerator.is_main_process:
        path = output_dir / "samples" / f"step-{step:06d}.png"
        drawn = np.stack(draw_samples(accelerator, parts, prompts, resolution, seed, path))
        for tracker in [tracker for tracker in accelerator.trackers if hasattr(tracker, "log_images")]:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": drawn}, step=step, **layout)
    if ema and (prompts or len(images)):
        ema.restore(parameters)
    trained.train()
    accelerator.wait_for_everyone()


def write_log(accelerator, output_dir, step, numbers):
    """Appends numbers to log.jsonl and sends them to the trackers."""
    if accelerator.is_main_process:
        with (output_dir / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
    accelerator.log(numbers, step=step)


# -------------------------------------------------------------------------------------------------------- training
def print_plan(settings, trained, frozen, num_processes, num_trained, num_images, num_held_out, first_step, last_step):
    """Says, before the first step, what will be done."""
    epochs = last_step / math.ceil(num_images / settings["samples_per_step"])
    print("""Plan
  images     {0:,} to train on, {1:,} held out, at {resolution} x {resolution} pixels
  steps      {2:,} to {3:,}, {4:,.1f} epochs
  per step   {samples_per_step:,} images: {train_batch_size} a pass x {gradient_accumulation_steps} passes x {5} ranks
  trained    {6}, {7:,} parameters in float32, passes in precision {mixed_precision!r}; frozen: {8}
  optimizer  AdamW at {peak_learning_rate:g}, {lr_scheduler}; 8-bit: {use_8bit_adam}; EMA: {use_ema}
  output     {output_dir}, a checkpoint of {9:.2g} GB every {checkpointing_steps:,} steps""".format(
        num_images, num_held_out, first_step, last_step, epochs, num_processes, trained, num_trained, frozen,
        4e-9 * num_trained * (3 + settings["use_ema"]), **settings))


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
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    output_dir, signals, parent = Path(args.output_dir), [], os.getppid()
    check_args(args)
    images, held_out, fingerprint = load_data(**vars(args))
    repo_id = create_repo(**vars(args)) if args.push_to_hub and not args.dry_run else None
    accelerator = make_accelerator(**vars(args))
    device, precision = accelerator.device, accelerator.mixed_precision
    pipeline, models, noise_scheduler = load_models(args, DTYPES[precision], device)

    per_pass = args.train_batch_size * accelerator.num_processes
    samples_per_step = per_pass * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(images) / samples_per_step)
    last_step = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    validation_steps = args.validation_steps or 500
    learning_rate = args.learning_rate * (samples_per_step if args.scale_lr else 1)
    text_rate = learning_rate * (args.text_encoder_lr or args.learning_rate) / args.learning_rate
    groups = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad], "lr": rate}
              for model, rate in zip(models.values(), (learning_rate, text_rate))]
    parameters = [parameter for group in groups for parameter in group["params"]]
    wrapped = {name: accelerator.prepare(model) for name, model in models.items()}
    unet, text_encoder = wrapped["unet"], wrapped.get("text_encoder", pipeline.text_encoder)
    state = make_state(accelerator, {"adapters": torch.nn.ParameterList(parameters)}, groups, last_step, **vars(args))
    optimizer, lr_scheduler, ema = state["optimizer"], state["lr_scheduler"], state.get("ema")
    settings = {**vars(args), "hub_token": None, "captioned_images": fingerprint, "samples_per_step": samples_per_step,
                "peak_learning_rate": learning_rate, "mixed_precision": precision,
                "state": [*state], "schedule_steps": None if args.lr_scheduler.startswith("constant") else last_step}
    progress = {"global_step": 0, "base_losses": None, "losses": []}
    if checkpoint := find_checkpoint(output_dir, args.resume_from_checkpoint):
        progress = resume(accelerator, checkpoint, settings, last_step, state)
    first_step, num_trained = progress["global_step"], sum(parameter.numel() for parameter in parameters)
    print_plan(settings, f"LoRA of rank {args.rank} on {args.lora_target} of {' and '.join(models)}", "all else",
               accelerator.num_processes, num_trained, len(images), len(held_out), first_step, last_step)
    if args.dry_run:
        accelerator.end_training()
        return
    prepare_output(accelerator, output_dir, settings, first_step)
    parts = {**pipeline.components, "scheduler": noise_scheduler}
    look = functools.partial(validate, accelerator, parts, parameters, ema, held_out, args.train_batch_size,
                             args.validation_prompts, args.resolution, args.seed, output_dir, progress)
    if first_step % validation_steps == 0 or first_step == last_step:  # a stop comes before the look at its step
        look()
    on_signals(functools.partial(note_signal, signals))
    order = micro_batches(len(images), args.train_batch_size, accelerator.num_processes, accelerator.process_index,
                          args.gradient_accumulation_steps, args.seed, first_step, last_step)
    batches = iter(torch.utils.data.DataLoader(images, batch_sampler=order, num_workers=args.dataloader_num_workers,
        pin_memory=device.type != "cpu", worker_init_fn=functools.partial(on_signals, signal.SIG_IGN)))
    bar = tqdm(range(first_step, last_step), initial=first_step, total=last_step, unit="step",
               disable=not accelerator.is_local_main_process)

    for step in bar:
        started, step_loss = time.perf_counter(), torch.zeros((), device=device)
        # Only dropout uses torch's own generator.
        torch.manual_seed(np.random.default_rng((args.seed, DROPOUT, step, accelerator.process_index)).integers(2**32))
        num_samples = min(samples_per_step, len(images) - step % steps_per_epoch * samples_per_step)
        for passes_left in reversed(range(math.ceil(num_samples / per_pass))):
            batch = send_to_device(next(batches), device, non_blocking=True)
            latents = encode(pipeline.vae, batch)
            with contextlib.ExitStack() as stack:
                for model in wrapped.values() if passes_left else []:
                    stack.enter_context(accelerator.no_sync(model))
                prompt_embeds = text_encoder(batch["input_ids"])[0]
                losses = diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, batch["noise"],
                                          batch["added_noise"], batch["timestep"], args.snr_gamma)
                loss = (losses * batch["weight"]).sum()
                accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
            step_loss += loss.detach()
        grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)

        # A SIGTERM to the launcher ends it alone: then this process has another parent.
        stop = bool(signals or (launched and os.getppid() != parent))
        loss, broken, overflow, stop = exchange(accelerator, step_loss, grad_norm, stop)
        if not broken:
            optimizer.step()
            optimizer.zero_grad()
            progress["global_step"] = step + 1
            progress["losses"].append(loss)
            if not overflow:  # else fp16's scaler skipped the step; its own report misses that of a fused optimizer
                lr_scheduler.step()
                if ema:
                    ema.to(device)
                    ema.step(parameters)
                    ema.to("cpu" if args.offload_ema else None)
            images_per_second = num_samples / (time.perf_counter() - started)
            bar.set_postfix(loss=f"{loss:.4f}", images_per_second=f"{images_per_second:.1f}", refresh=False)
        done = progress["global_step"]
        if done > step and (done % args.logging_steps == 0 or done == last_step):
            write_log(accelerator, output_dir, done, {
                "loss": sum(progress["losses"]) / len(progress["losses"]), "lr": lr_scheduler.get_last_lr()[0],
                "grad_norm": None if overflow else grad_norm.item(), "images_per_second": images_per_second})
            progress["losses"] = []
        if stop or broken or done % args.checkpointing_steps == 0:
            limit = None if broken else args.checkpoints_total_limit  # the last good one may be an older one
            save_checkpoint(accelerator, output_dir, settings, progress, state, limit)
        if stop or broken:
            leave(accelerator, output_dir, done, broken, signals)
        if done % validation_steps == 0 or done == last_step:
            look()
    if accelerator.is_main_process:
        if ema:
            ema.copy_to(parameters)
        files = save_model(args, models, len(images), last_step)
        if repo_id:
            push(repo_id, files, f"Train {last_step} steps", **vars(args))
    accelerator.end_training()


def leave(accelerator, output_dir, step, broken, signals):
    """Ends the process after its last checkpoint, and says why."""
    accelerator.end_training()
    why = "a signal" if not broken else f"a loss or gradient that is not finite, in step {step + 1}"
    remedy = "" if not broken else " --allow_changed_resume and a lower --learning_rate"
    accelerator.print(f"Stopped by {why}. {output_dir / f'checkpoint-{step}'} holds the state after step {step}; go "
                      f"on with --resume_from_checkpoint=latest{remedy}", file=sys.stderr)
    sys.exit(1 if broken else 128 + (signals or [signal.SIGTERM])[0])


def save_model(args, models, num_images, step):
    """Writes the adapters in diffusers' layout with rank, alpha and targets in the header, on demand in kohya's layout
    too, and the model card; returns patterns that are the adapters' files."""
    weights = {key: value.to("cpu", DTYPES[args.save_precision]) for key, value in lora_weights(models).items()}
    layers = {f"{name}_lora_layers": {key.removeprefix(f"{name}."): value for key, value in weights.items()
                                      if key.startswith(f"{name}.")} for name in models}
    headers = {f"{name}_lora_adapter_metadata": {**model.peft_config["default"].to_dict(),
                                                 "base_model_name_or_path": None} for name, model in models.items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(args.output_dir, **layers, **headers)
    files = [LORA_FILE]
    if args.output_kohya_format:
        alpha = (args.lora_alpha or args.rank) * (args.rank**0.5 if args.use_rslora else 1)
        name = (args.kohya_file_name or Path(args.output_dir).resolve().name).removesuffix(".safetensors")
        version = 2 if models["unet"].config.cross_attention_dim == 1024 else 1
        header = kohya_header(name, version, alpha, num_images, step, **vars(args))
        files.append(f"{name}.safetensors")
        save_file(to_kohya(weights, alpha), Path(args.output_dir, files[1]), header)
    write_card(args.output_dir, args.pretrained_model_name_or_path, args.validation_prompts, vars(args), step,
               "`pipe.load_lora_weights(...)`", ["stable-diffusion", "stable-diffusion-diffusers", "lora"])
    for file in files:  # which safetensors makes for their owner alone
        shutil.copymode(Path(args.output_dir, "README.md"), Path(args.output_dir, file))
    return [re.sub(r"([*?[])", r"[\1]", file) for file in files]


def to_kohya(weights, alpha):
    """Renames adapters to kohya's layout: lora_unet_ or lora_te_text_model_, the layer's name with underscores, and
    .lora_down.weight (rank, in, ...), .lora_up.weight (out, rank, ...), .alpha, with DoRA .dora_scale (out, 1, ...).
    A layer's effect is lora_up @ lora_down * alpha / rank."""
    renamed = {}
    for key, weight in weights.items():
        layer, kind = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", key).groups()
        name = layer.replace("text_encoder.", "lora_te_text_model.", 1).replace("unet.", "lora_unet.", 1)
        name = name.replace(".", "_")
        if kind == "lora_magnitude_vector":
            ones = [1] * (weights[f"{layer}.lora_A.weight"].ndim - 1)
            renamed[f"{name}.dora_scale"] = weight.reshape(-1, *ones).contiguous()
        else:
            renamed[f"{name}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = weight.contiguous()
            exact, short = torch.tensor(float(alpha)), torch.tensor(float(alpha), dtype=weight.dtype)
            renamed[f"{name}.alpha"] = short if short == exact else exact  # half precision rounds what rsLoRA needs
    return renamed


def kohya_header(name, version, alpha, num_images, step, rank, resolution, seed, learning_rate,
                 pretrained_model_name_or_path, **_):
    """What interfaces show of a LoRA file for Stable Diffusion 1 or 2, as strings: no captions and no paths."""
    base = pretrained_model_name_or_path
    fields = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": alpha, "ss_seed": seed,
              "ss_output_name": name, "ss_sd_model_name": Path(base).name if Path(base).exists() else base,
              "ss_base_model_version": f"sd_v{version}", "ss_v2": version == 2, "ss_learning_rate": learning_rate,
              "ss_resolution": f"({resolution}, {resolution})", "ss_num_train_images": num_images, "ss_steps": step,
              "modelspec.title": name, "modelspec.sai_model_spec": "1.0.0",
              "modelspec.resolution": f"{resolution}x{resolution}",
              "modelspec.architecture": f"stable-diffusion-v{version}/lora"}
    return {"format": "pt", **{key: str(value) for key, value in fields.items()}}


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
    args, is_first = parse_args(argv), os.environ.get("RANK", "0") == "0"
    for library in (diffusers, transformers):  # their bars and remarks would drown the plan
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stdout if is_first else None):
            train(args)
    except (InputError, KeyboardInterrupt) as error:  # once it trains, signals are noted
        if is_first:
            print(f"{Path(__file__).name}: {str(error) or 'stopped before the first step'}", file=sys.stderr)
        sys.exit(2 if str(error) else 128 + signal.SIGINT)


if __name__ == "__main__":
    main()
