"""Add adapters to models, go on from those in a file, and save what was trained."""

import contextlib
import json
import os
import re
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from sdtune.arguments import nearest_beside
from sdtune.errors import last_line
from sdtune.lora_layouts import LORA_FILE, published_names, split_weight_name, to_kohya
from sdtune.models import (
    DTYPES,
    config_source,
    enable_memory_savers,
    frozen,
    load_base,
    make_noise_scheduler,
    numel_of,
)

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
