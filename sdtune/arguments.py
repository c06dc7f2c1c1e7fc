"""The flags that several scripts share, their types, and `--config`."""

import argparse
import contextlib
import difflib
import math
import operator
import os
import re
import sys
from pathlib import Path

import yaml
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from sdtune.errors import is_utf8, remedy_for_missing

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
DATA_FREE_ON_RESUME = {*DATASET_FREE_ON_RESUME, "shuffle_buffer_size", "streaming", "train_data_dir"}
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
STREAM_REQUIRES = {"shuffle_buffer_size": "streaming"}
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


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that ends, of each flag that has a default, with that."""

    def _get_help_string(self, action):
        text = super()._get_help_string(action)
        return text.removesuffix(" (default: %(default)s)") if action.default is None else text


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


def add_data_arguments(parser):
    """Adds the captioned images to train on, and what is done to them."""
    add = parser.add_argument_group("data").add_argument
    add(
        "--train_data_dir",
        type=path_name,
        help="folder of images with metadata.jsonl/.csv (file_name, text), or a .txt beside each",
    )
    add_dataset_arguments(add)
    add("--streaming", **SWITCH, help="read --dataset_name while training; needs that and --max_train_steps")
    add(
        "--shuffle_buffer_size",
        type=positive_int,
        help="images that wait, in each worker, to be drawn; 1000 if not given; needs --streaming [1, inf)",
    )
    add_transform_arguments(add)


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
