#!/usr/bin/env python
"""Convert a pipeline folder of Stable Diffusion 1 or 2 to one file as A1111, Forge and ComfyUI read it, or back.

    python convert_checkpoint.py my_model my_model.safetensors --save_precision fp16
    python convert_checkpoint.py downloaded.safetensors my_model --config_folder stable-diffusion-v1-5

The direction follows from what is read: a folder, or a .safetensors or .ckpt file. Weights keep their bits there and
back, unless --save_precision rounds them. A file holds weights alone. So the way back needs a pipeline folder of the
same architecture, whose weights may be missing, for configs, tokenizer and scheduler; its text encoder is saved in
float32, because a half one does not load without more ado. Nothing is downloaded. What folders do not have, files made
of them lack: averaged weights (model_ema), and of the text encoder of Stable Diffusion 2, which stops a block early,
resblocks.23, text_projection and logit_scale; nothing that draws uses them.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

import diffusers
import torch
import transformers
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
REPLACED_FLAGS = {}
PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
PIPELINES = ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
POSITIONS = CLIP + "embeddings.position_ids"
ZERO_SNR = "ztsnr"  # A1111 and Forge take a tensor of this name, whatever it holds, for zero terminal SNR
# What files have and folders do not, besides the blocks of OpenCLIP after the last one that folders have.
UNUSED = [POSITIONS, *[OPEN_CLIP + name for name in ("logit_scale", "text_projection", "attn_mask")]]
OTHERS = {  # what else comes as one file, by a pattern of its keys
    r"(^|\.)joint_blocks\.": "Stable Diffusion 3", r"(^|\.)double_blocks\.": "Flux",
    r"^conditioner\.": "Stable Diffusion XL or a relative", r"^(control_model|controlnet_\w+)\.": "a ControlNet",
    r"(^lora_|\.lora_?(A|B|up|down|linear))": "a LoRA, which convert_lora.py converts",
    r"^depth_model\.": "Stable Diffusion 2 with depth", r"^embedder\.": "Stable unCLIP",
    r"^(down_blocks|encoder|decoder|text_model)\.": "a single part of a pipeline"}

# Names of the parts of a layer: {diffusers' module: the original's}.
UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
               "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of early folders
OPEN_CLIP_ENDS = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
                  "embeddings.position_embedding.weight": "positional_embedding"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj", **{f"self_attn.{name}_proj.{kind}": f"attn.in_proj_{kind}"
                                              for name in "qkv" for kind in ("weight", "bias")}}

# What interfaces take for granted, because a file does not say it: {part: {setting: value}}.
BOTH = {"unet": {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4},
        "text_encoder": {"vocab_size": 49408, "max_position_embeddings": 77}}
ARCHITECTURES = {
    "stable-diffusion-v1": {
        "unet": {"cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False},
        "text_encoder": {"hidden_act": "quick_gelu", "hidden_size": 768, "num_hidden_layers": 12}},
    "stable-diffusion-v2": {
        "unet": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        "text_encoder": {"hidden_act": "gelu", "hidden_size": 1024, "num_hidden_layers": 23}}}


class InputError(ValueError):
    """A mistake in what the user gave; its text is all that they need to see."""


# ------------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    """Reads the command line and `--config`; a flag that is wrong by itself ends with status 2 and one message."""
    parser = argparse.ArgumentParser(usage="%(prog)s SOURCE OUTPUT [flags]", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, switch = parser.add_argument, {"action": argparse.BooleanOptionalAction, "default": False}
    add("source", nargs="?", default="", help="pipeline folder, or original .safetensors or .ckpt file")
    add("output", nargs="?", default="", help=".safetensors file to write, or pipeline folder if SOURCE is a file")
    add("--config_folder", help="for a file: pipeline folder with configs, tokenizer and scheduler for it")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--save_precision", default="no", choices=list(DTYPES), help="half precision of what is saved, or no")
    add("--overwrite", **switch, help="replace what is at OUTPUT")
    add("--config", metavar="FILE.yaml", help="flags by name; the command line wins")
    return parse_words(parser, argv)


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


def check_args(args):
    """Raises one `InputError` that names every path and flag that is wrong, before anything large is read."""
    if not args.source or not args.output:
        raise InputError("give what to read and what to write: SOURCE OUTPUT")
    source, output, is_folder = Path(args.source), Path(args.output), Path(args.source).is_dir()
    if not is_folder and not (source.suffix in (".safetensors", ".ckpt") and source.is_file()):
        raise InputError(f"{source}: is no pipeline folder and no .safetensors or .ckpt file")
    problems = [f"--{flag}={value}: is for a {kind} as SOURCE; leave it out" for flag, value, kind in (
        ("config_folder", args.config_folder if is_folder else None, "file"),
        ("variant", None if is_folder else args.variant, "folder")) if value is not None]
    if is_folder:
        problems += check_folder(source, args.variant, with_weights=True)
        if output.suffix != ".safetensors":
            problems.append(f"{output}: end the name of the file to write in .safetensors")
    elif args.config_folder is None:
        problems.append(f"{source}: is weights alone; add --config_folder=FOLDER, a pipeline folder of the same "
                        "architecture, to say the rest (tokenizer, scheduler, number of heads)")
    else:
        problems += [f"--config_folder={text}" for text in check_folder(Path(args.config_folder), None, False)]
        if output.suffix in (".safetensors", ".ckpt") and not output.exists():
            problems.append(f"{output}: a pipeline folder is written there; name it without {output.suffix}")
    problems += check_place(output, [source, *filter(None, [args.config_folder])], not is_folder, args.overwrite)
    if problems:
        raise InputError("\n  ".join(["", *problems] if len(problems) > 1 else problems))


def check_place(output, read, is_folder, overwrite):
    """Lists what forbids writing a file, or a folder, to `output`."""
    if any(output.resolve() == path or output.resolve() in path.parents for path in (Path(p).resolve() for p in read)):
        return [f"{output}: holds what is read; write the result somewhere else"]
    if output.exists() and not overwrite:
        return [f"{output}: exists; give another name, or --overwrite to replace it"]
    if output.exists() and output.is_dir() != is_folder:
        return [f"{output}: is a {'folder' if output.is_dir() else 'file'}; give another name"]
    parts = {"model_index.json"}
    with contextlib.suppress(InputError):
        parts |= read_json(output / "model_index.json").keys()
    more = sorted({path.name for path in output.iterdir()} - parts) if output.is_dir() else []
    return [f"{output}: holds {name}, which is no part of a pipeline; move it, or give another name"
            for name in more[:1]]


def class_of(index, part):
    """The class of a part by a pipeline's model_index.json, or None."""
    return index[part][-1] if isinstance(index.get(part), list) and index[part] else None


def check_folder(folder, variant, with_weights):
    """Lists what a folder lacks to be a pipeline of Stable Diffusion 1 or 2, its weights if `with_weights`."""
    try:
        index = read_json(folder / "model_index.json")
    except InputError as error:
        return [f"{error}; give a pipeline folder"]
    strange = [f"{part} of class {class_of(index, part)}" for part, kind in PARTS.items()
               if class_of(index, part) not in (kind, None)]
    if index.get("_class_name") not in PIPELINES or strange:
        kind = " with a ".join([str(index.get("_class_name")), *strange])
        return [f"{folder}: is a {kind}; only Stable Diffusion 1 and 2 are converted"]
    files = [f"{part}/config.json" for part in PARTS] + ["scheduler/scheduler_config.json"]
    missing = [file for file in files if not (folder / file).is_file()]
    if with_weights:
        missing += [f"{part}/{weights_name(part, variant)}.safetensors" for part in PARTS
                    if not weight_files(folder / part, variant)]
    elif not (folder / "tokenizer").is_dir():
        missing.append("tokenizer")
    return [f"{folder}: lacks {', '.join(missing)}"] if missing else []


def last_line(error):
    """The last line of an exception's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


# --------------------------------------------------------------------------------------------------------- reading
def read_json(path):
    """The dictionary in a JSON file. Raises `InputError`."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({last_line(error)})") from None


def weights_name(part, variant=None):
    """The name of a part's file of weights, without its suffix."""
    name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    return f"{name}.{variant}" if variant else name


def weight_files(folder, variant):
    """The files with the weights of the part in `folder`: one, or several shards; none if they are missing."""
    name = weights_name(folder.name, variant)
    old = folder / f"{name if folder.name != 'text_encoder' else f'pytorch_{name}'}.bin"
    shards = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
    whole = [path for path in (folder / f"{name}.safetensors", old) if path.is_file()]
    return whole[:1] or shards


def read_models(folder):
    """The UNet, VAE and text encoder of a pipeline's configs, without weights (on the meta device)."""
    models = {}
    for part in PARTS:
        config = read_json(folder / part / "config.json")
        try:
            with torch.device("meta"):
                if part == "text_encoder":
                    models[part] = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
                else:
                    models[part] = getattr(diffusers, PARTS[part]).from_config(config)
        except Exception as error:  # of the settings, or of how they fit together
            raise InputError(f"{folder / part}: its config.json makes no model ({last_line(error)})") from None
    return models


def read_tensors(path):
    """Returns ({name: tensor}, header) of a .safetensors file, or of a pickled one, of which only weights are read."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                bar = tqdm(file.keys(), desc=path.name, unit="tensor", disable=None)
                return {key: file.get_tensor(key) for key in bar}, file.metadata() or {}
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = state.get("state_dict", state)
        return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}, {}
    except Exception as error:  # a pickle can fail in any way
        raise InputError(f"{path}: cannot be read as weights ({last_line(error)}); get the file again, "
                         "best as .safetensors") from None


def read_pipeline(folder, variant):
    """Reads the weights of a pipeline folder: {(part, name): tensor}, named as diffusers and transformers do today."""
    weights = {}
    for part in PARTS:
        for path in weight_files(folder / part, variant):
            for name, tensor in read_tensors(path)[0].items():
                name = name.removeprefix("text_model.")  # which transformers 5 dropped
                if part == "vae":
                    name = re.sub(r"(attentions\.0)\.(query|key|value|proj_attn)\.",
                                  lambda match: f"{match[1]}.{OLD_VAE_ATTENTION[match[2]]}.", name)
                if name != "embeddings.position_ids":  # which it does not save
                    weights[part, name] = tensor
    return weights


def read_single(path):
    """Returns ({original name: tensor}, header) of a single file. Raises `InputError` for one of something else."""
    weights, header = read_tensors(path)
    for key in weights:
        if kind := next((kind for pattern, kind in OTHERS.items() if re.search(pattern, key)), None):
            raise InputError(f"{path}: is {kind} ({key}); only Stable Diffusion 1 and 2 are converted")
    # Early files were also written without this level.
    return {re.sub(r"^cond_stage_model\.transformer\.(?!text_model\.)", CLIP, key): value
            for key, value in weights.items()}, header


# ---------------------------------------------------------------------------------------------------------- layout
def unet_modules(config):
    """Where a UNet's modules stand in the original: {diffusers' module: the original's}.

    There a UNet is three lists: input_blocks (the first convolution, then each layer and each downsampling a number
    of its own), middle_block and output_blocks (an upsampling is the last part of the layer before it).
    """
    layers, blocks = config["layers_per_block"], {"mid_block.resnets.0": "middle_block.0",
                                                  "mid_block.attentions.0": "middle_block.1",
                                                  "mid_block.resnets.1": "middle_block.2"}
    for level, kind in enumerate(config["up_block_types"]):
        first, out = 1 + level * (layers + 1), level * (layers + 1)
        for layer in range(layers + 1):  # one layer more upwards
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{first + layer}.0"
            blocks[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{first + layer}.1"
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{out + layer}.0"
            blocks[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{out + layer}.1"
        blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
        blocks[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{out + layers}.{2 if 'Attn' in kind else 1}"
    return UNET_ENDS | parts_of(blocks, UNET_RESNET, "resnets")


def vae_modules(config):
    """Where a VAE's modules stand in the original, which counts the decoder's levels from the image."""
    blocks, num_levels = {}, len(config["block_out_channels"])
    for level in range(num_levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{num_levels - 1 - level}"
        for layer in range(config["layers_per_block"] + 1):
            blocks[f"encoder.{down}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
            blocks[f"decoder.{up}.resnets.{layer}"] = f"decoder.up.{level}.block.{layer}"
        blocks[f"encoder.{down}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        blocks[f"decoder.{up}.upsamplers.0"] = f"decoder.up.{level}.upsample"
    for side in ("encoder", "decoder"):
        blocks |= {f"{side}.mid_block.resnets.{number}": f"{side}.mid.block_{number + 1}" for number in range(2)}
        blocks[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        blocks |= {f"{side}.{end}": f"{side}.{end.removeprefix('conv_') if 'norm' in end else end}"
                   for end in ("conv_in", "conv_norm_out", "conv_out")}
    blocks |= {name: name for name in ("quant_conv", "post_quant_conv")}
    return parts_of(parts_of(blocks, VAE_RESNET, "resnets"), VAE_ATTENTION, "attentions")


def text_modules(config):
    """Where a text encoder's modules stand in the original: named alike in CLIP's (SD 1), not in OpenCLIP's (SD 2)."""
    if config["hidden_act"] == "quick_gelu":
        return {name: name for name in ("embeddings", "encoder", "final_layer_norm")}
    return OPEN_CLIP_ENDS | {f"encoder.layers.{number}.{ours}": f"transformer.resblocks.{number}.{theirs}"
                             for number in range(config["num_hidden_layers"])
                             for ours, theirs in OPEN_CLIP_LAYER.items()}


def parts_of(blocks, parts, kind):
    """Replaces each block of a `kind` by its parts, each with a name of its own."""
    whole = {name: place for name, place in blocks.items() if f"{kind}." not in name}
    return whole | {f"{name}.{ours}": f"{place}.{theirs}" for name, place in blocks.items() if name not in whole
                    for ours, theirs in parts.items()}


def original_names(models):
    """Returns {original name: [(part, name), ...]} of all weights that the models have: one each, but three (of
    queries, keys and values, in this order) where OpenCLIP keeps them in one. Raises `InputError`."""
    text = models["text_encoder"].config
    if text.hidden_act not in ("quick_gelu", "gelu"):
        raise InputError(f"text_encoder: has the activation {text.hidden_act}, which Stable Diffusion 1 and 2 do not")
    if not all(isinstance(models[part].config.layers_per_block, int) for part in ("unet", "vae")):
        raise InputError("unet: has layers_per_block of several numbers, which Stable Diffusion 1 and 2 do not have")
    modules = {"unet": (UNET, unet_modules(models["unet"].config)), "vae": (VAE, vae_modules(models["vae"].config)),
               "text_encoder": (CLIP if text.hidden_act == "quick_gelu" else OPEN_CLIP, text_modules(text.to_dict()))}
    places = {}
    for part, (prefix, names) in modules.items():
        # CLIP's order is k, v, q; the alphabet's would be right if q came before k.
        for key in sorted(models[part].state_dict(), key=lambda key: key.replace(".q_proj.", ".a_proj.")):
            words = key.split(".")
            for length in range(len(words), 0, -1):
                if module := names.get(".".join(words[:length])):
                    break
            else:
                raise InputError(f"{part}: has {key}, which Stable Diffusion 1 and 2 do not have")
            places.setdefault(prefix + ".".join([module, *words[length:]]), []).append((part, key))
    return places


def fit(name, tensor, shape):
    """Gives a weight its shape, where linear maps and 1 x 1 convolutions differ. Raises `InputError`."""
    if tensor.dtype not in DTYPES.values():
        raise InputError(f"{name}: is {str(tensor.dtype).removeprefix('torch.')}; only weights in float32, float16 "
                         "and bfloat16 are converted")
    if [size for size in tensor.shape if size > 1] != [size for size in shape if size > 1]:
        raise InputError(f"{name}: has the shape {tuple(tensor.shape)}, its config says {tuple(shape)}")
    return tensor.reshape(shape)


def check_whole(where, needed, given, remedy, beyond=()):
    """Raises `InputError` unless the names in `given` are those needed and, at most, those `beyond`."""
    for names, fault in ((needed - given, "lacks"), (given - needed - set(beyond), "has, unlike its config,")):
        if names:
            first = min(name if isinstance(name, str) else ".".join(name) for name in names)
            raise InputError(f"{where}: {fault} {len(names):,} tensors, such as {first}; {remedy}")


# --------------------------------------------------------------------------------------------------------- writing
def to_original(weights, models, folder):
    """Renames the weights of a pipeline, {(part, name): tensor}, to the original layout. Raises `InputError`."""
    places = original_names(models)
    shapes = {(part, name): value.shape for part in models for name, value in models[part].state_dict().items()}
    check_whole(folder, shapes.keys(), weights.keys(), "get the folder again")
    result = {}
    for place, keys in places.items():
        tensors = [fit("/".join(key), weights[key], shapes[key]) for key in keys]
        tensor = tensors[0] if len(keys) == 1 else torch.cat(tensors)
        if place.startswith(VAE) and ".attn_1." in place and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # there attention's linear maps are convolutions
        result[place] = tensor.contiguous()
    text = models["text_encoder"].config
    if text.hidden_act == "quick_gelu":
        result[POSITIONS] = torch.arange(text.max_position_embeddings)[None]
    return result


def to_parts(weights, models, path):
    """Takes what the models need out of `weights`, those of a file in the original layout.

    Returns {part: {name: tensor}}. Raises `InputError`.
    """
    places, parts = original_names(models), {part: {} for part in models}
    shapes = {(part, name): value.shape for part in models for name, value in models[part].state_dict().items()}
    mine = {key for key in weights if key.startswith((UNET, VAE, "cond_stage_model."))}
    last_block = f"{OPEN_CLIP}transformer.resblocks.{models['text_encoder'].config.num_hidden_layers}."
    check_whole(path, places.keys(), mine, "give a whole file, and a --config_folder of its architecture",
                [key for key in mine if key in UNUSED or key.startswith(last_block)])
    for place, keys in places.items():
        tensor = weights.pop(place)
        pieces = tensor.chunk(len(keys)) if len(keys) > 1 else [tensor]
        for (part, name), piece in zip(keys, pieces):
            # A clone, because a file has no place for tensors that share memory.
            parts[part][name] = fit(place, piece, shapes[part, name]).clone()
    return parts


def schedule(config):
    """The buffers of the original code's noise schedule, {name: (timesteps,)}: float32, from float64 as there.

    The posterior's are those of DDPM (arXiv 2006.11239, equations 6 and 7). Rescaling to zero terminal SNR is left to
    whoever samples: it makes some of them infinite.
    """
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    try:
        scheduler = diffusers.DDPMScheduler(**{name: config[name] for name in names if name in config})
    except Exception as error:  # of the settings, or of how they fit together
        raise InputError(f"scheduler_config.json: makes no schedule of noise ({last_line(error)})") from None
    betas, config = scheduler.betas.double(), scheduler.config
    if config.beta_schedule == "scaled_linear" and config.trained_betas is None:
        ends = config.beta_start ** 0.5, config.beta_end ** 0.5
        betas = torch.linspace(*ends, len(betas), dtype=torch.float64) ** 2
    alphas = 1 - betas
    product = alphas.cumprod(0)
    previous = torch.cat([product.new_ones(1), product[:-1]])
    variance = betas * (1 - previous) / (1 - product)
    buffers = {
        "betas": betas, "alphas_cumprod": product, "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": product.sqrt(), "sqrt_one_minus_alphas_cumprod": (1 - product).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - product).log(), "sqrt_recip_alphas_cumprod": (1 / product).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / product - 1).sqrt(), "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - product),
        "posterior_mean_coef2": (1 - previous) * alphas.sqrt() / (1 - product)}
    return {name: value.float() for name, value in buffers.items()}


def architecture(models):
    """The name of the architecture whose settings the models have, or None."""
    for name, own in ARCHITECTURES.items():
        wanted = [(part, *item) for settings in (BOTH, own) for part in settings for item in settings[part].items()]
        got = [getattr(models[part].config, setting) for part, setting, _ in wanted]
        if [tuple(value) if isinstance(value, list) else value for value in got] == [value for *_, value in wanted]:
            return name
    return None


def make_header(models, prediction, title):
    """The file's header, by Stability AI's ModelSpec 1.0.0 if it is for an architecture that has a name there."""
    known, config = architecture(models), models["unet"].config
    prediction = {"v_prediction": "v"}.get(prediction, prediction)
    header = {"format": "pt", "modelspec.title": title, "modelspec.prediction_type": prediction}
    if known:
        kind = "" if known.endswith("1") else "-768-v" if prediction == "v" else "-512"
        kind += "-inpainting" if config.in_channels == 9 else ""
        header |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": known + kind,
                   "modelspec.implementation": "https://github.com/" + (
                       "CompVis/stable-diffusion" if known.endswith("1") else "Stability-AI/stablediffusion"),
                   "modelspec.resolution": "x".join([str(8 * config.sample_size)] * 2)}
    return header


@contextlib.contextmanager
def beside(output):
    """Gives a name to write to beside `output`, and renames what is there when it is complete. Files get a new file's
    usual permissions: safetensors makes them for their owner alone."""
    output.parent.mkdir(parents=True, exist_ok=True)
    new, old = (output.with_name(f".{output.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    try:
        yield new
        os.umask(umask := os.umask(0))
        for path in [path for path in [new, *new.glob("**/*.safetensors")] if path.is_file()]:
            path.chmod(0o666 & ~umask)
        if output.is_dir():  # which a rename does not replace
            output.rename(old)
        new.replace(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        else:
            new.unlink(missing_ok=True)


def write_file(source, output, variant, dtype):
    """Writes the pipeline in the folder `source` as one file; returns what to tell about it."""
    models, noise = read_models(source), read_json(source / "scheduler" / "scheduler_config.json")
    original_names(models)  # here too, because it may refuse what would take a while to read
    buffers = schedule(noise) | ({ZERO_SNR: torch.ones(1)} if noise.get("rescale_betas_zero_snr") else {})
    prediction = noise.get("prediction_type", "epsilon")
    tensors = to_original(read_pipeline(source, variant), models, source)
    if dtype:
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    with beside(output) as unfinished:  # the schedule is not rounded: it would lose its small numbers
        save_file(tensors | buffers, unfinished, make_header(models, prediction, output.stem))

    index, known = read_json(source / "model_index.json"), architecture(models)
    left = sorted(name for name in index if class_of(index, name) and name not in [*PARTS, "scheduler"])
    notes = [f"Not in it, for lack of a place: {', '.join(left)}."] if left else []
    if not known:
        notes.append("Its sizes are not those of Stable Diffusion 1 or 2, so A1111, Forge and ComfyUI do not read it; "
                     "from_single_file does, with the folder as `config`.")
    elif prediction == "v_prediction" and known.endswith("1"):
        notes.append("It predicts v, as the header says, but interfaces take it for epsilon. In ComfyUI add "
                     "ModelSamplingDiscrete; A1111 and Forge need a .yaml of v-prediction beside the file.")
    elif prediction == "v_prediction":
        notes.append("It predicts v, as the header says; A1111, Forge and ComfyUI guess it from the weights instead. "
                     "If images are noise, put the original v2-inference-v.yaml beside the file.")
    if ZERO_SNR in buffers:
        notes.append(f"The tensor {ZERO_SNR} tells A1111 and Forge of zero terminal SNR; ComfyUI has to be told.")
    return notes


def write_folder(source, output, config_folder, dtype):
    """Writes the file `source` as a pipeline folder, with all but weights as in `config_folder`; returns what to tell
    about it."""
    models, index = read_models(config_folder), read_json(config_folder / "model_index.json")
    noise = read_json(config_folder / "scheduler" / "scheduler_config.json")
    buffers = schedule(noise)
    weights, header = read_single(source)
    zero_snr, parts = ZERO_SNR in weights, to_parts(weights, models, source)
    check_objective(source, header, zero_snr, noise)
    left = sorted(weights.keys() - buffers.keys() - {POSITIONS, ZERO_SNR})
    with beside(output) as unfinished:
        for part, model in models.items():
            kept = torch.float32 if part == "text_encoder" else dtype
            state = {name: value.to(kept) if kept else value for name, value in parts.pop(part).items()}
            model.load_state_dict(state, assign=True)
            model.save_pretrained(unfinished / part)
        for name in [name for name in index if class_of(index, name) and name not in PARTS]:
            folder = config_folder / name
            # A safety checker has weights that the file does not have.
            has_weights = any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*"))
            if folder.is_dir() and (has_weights or not (folder / "config.json").exists()):
                shutil.copytree(folder, unfinished / name)
            else:
                index[name] = [None, None]
        if not class_of(index, "safety_checker"):
            index["requires_safety_checker"] = False
        (unfinished / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    first = f"{', '.join(left[:3])}{', ...' if left[3:] else ''}"
    return [f"{len(left):,} tensors of the file have no place in a folder: {first}."] if left else []


def check_objective(source, header, zero_snr, noise):
    """Raises `InputError` if a file says another objective than the scheduler's config `noise`."""
    said = {"v": "v_prediction"}.get(given := header.get("modelspec.prediction_type"), given)
    for name, value, own in (("prediction_type", said, noise.get("prediction_type", "epsilon")),
                             ("rescale_betas_zero_snr", zero_snr or None, noise.get("rescale_betas_zero_snr", False))):
        if value not in (None, own):
            raise InputError(f"{source}: was trained with {name} {value}, the scheduler of --config_folder has {own}; "
                             "give a folder with that of the model, or change its scheduler_config.json")


def main(argv=None):
    """Runs the tool; a mistake of the user's ends with status 2 and its message."""
    args = parse_args(argv)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        check_args(args)
        source, output = Path(args.source), Path(args.output)
        dtype = None if args.save_precision == "no" else DTYPES[args.save_precision]
        if source.is_dir():
            notes = write_file(source, output, args.variant, dtype)
        else:
            notes = write_folder(source, output, Path(args.config_folder), dtype)
    except (InputError, OSError, SafetensorError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    print("\n".join([f"Wrote {output}.", *[textwrap.fill(note, 100) for note in notes]]))


if __name__ == "__main__":
    main()
