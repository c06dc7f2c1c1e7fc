#!/usr/bin/env python
"""Convert a LoRA file between diffusers' and kohya's layout, or merge it into a Stable Diffusion 1 or 2.

    python convert_lora.py my_lora my_lora_for_webui.safetensors --to kohya
    python convert_lora.py downloaded.safetensors my_lora/pytorch_lora_weights.safetensors --to diffusers
    python convert_lora.py my_lora my_model --merge stable-diffusion-v1-5 --scale 0.8

The input may be a folder with pytorch_lora_weights.safetensors. diffusers' layout names tensors as peft does,
unet.<layer>.lora_A.weight, with rank and alpha in the header; kohya's is lora_unet_<layer>.lora_down.weight with a
tensor .alpha per layer, as A1111, Forge and ComfyUI read it. The text encoder and DoRA are converted too, there and
back to the same bits; rsLoRA becomes the alpha that gives the same scale.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

LORA_FILE = "pytorch_lora_weights.safetensors"
# Names of layers that contain underscores: kohya's layout writes them like the dots between names.
UNDERSCORED = ["down_blocks", "up_blocks", "mid_block", "transformer_blocks", "to_q", "to_k", "to_v", "to_out",
               "proj_in", "proj_out", "time_emb_proj", "conv_shortcut", "time_embedding", "linear_1", "linear_2",
               "conv_in", "conv_out", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"]
ROOTS = {"conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out", "encoder"}
DIFFUSERS = re.compile(r"(unet|text_encoder)\.(?:text_model\.)?(.+?)\.(?:(lora_A|lora\.down|lora_linear_layer\.down)\."
                       r"weight|(lora_B|lora\.up|lora_linear_layer\.up)\.weight|lora_magnitude_vector(?:\.weight)?)")
KOHYA = re.compile(r"lora_(unet|te_text_model)_(.+)\.(lora_down\.weight|lora_up\.weight|alpha|dora_scale)")
# peft's name of DoRA's lengths, but transformers 5 loads those of the text encoder by the second name only.
LENGTH = {"unet": "lora_magnitude_vector", "text_encoder": "lora_magnitude_vector.weight"}
OTHERS = {  # what else has such files, by a pattern of its keys
    r"\.lokr_": "LoKr", r"\.hada_": "LoHa", r"\.oft_": "OFT", r"\.lora_mid": "LoCon with three factors",
    r"^(lora_te[12]_|text_encoder_[23]\.|lora_unet_(input|middle|output)_block)": "Stable Diffusion XL",
    r"^(lora_transformer_|transformer\.)": "a transformer"}


class InputError(ValueError):
    """A mistake in what the user gave; its text is all that they need to see."""


# ------------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    """Reads the command line; a flag that is wrong by itself ends with status 2 and one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", type=Path, help="LoRA file in either layout, or folder with " + LORA_FILE)
    add("output", type=Path, help=".safetensors file to write; with --merge, folder of the merged model")
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--to", choices=["diffusers", "kohya"], help="layout to convert to")
    either.add_argument("--merge", metavar="BASE", type=Path,
                        help="pipeline folder to merge into; the result is float32")
    add("--scale", type=float, help="strength of the adapter in a merge; default: 1.0")
    add("--overwrite", action="store_true", help="replace what is at the output")
    return parser.parse_args(argv)


def lora_file(path):
    """The LoRA file that `path` names or, as a folder, holds. Raises `InputError`."""
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: does not exist; give a LoRA file, or a folder with {LORA_FILE}")
    return file


def check_args(args):
    """Raises `InputError` for what is wrong with the paths and flags, before anything large is read."""
    output, given = args.output, [path.resolve() for path in (lora_file(args.input), args.merge) if path]
    if any(output.resolve() == path or output.resolve() in path.parents for path in given):
        raise InputError(f"{output}: holds what is read; write the result somewhere else")
    if args.to and output.suffix != ".safetensors":
        raise InputError(f"{output}: end the name of the file to write in .safetensors")
    if args.to and args.scale is not None:
        raise InputError(f"--scale={args.scale}: is for --merge; a converted file keeps its scale")
    if args.scale is not None and not math.isfinite(args.scale):
        raise InputError(f"--scale={args.scale}: give a number, such as 1.0")
    if output.exists() and not args.overwrite:
        raise InputError(f"{output}: exists; give another name, or --overwrite to replace it")
    if output.exists() and output.is_dir() != bool(args.merge):
        raise InputError(f"{output}: is a {'folder' if output.is_dir() else 'file'}; give another name")
    if not args.merge:
        return
    parts = pipeline_parts(args.merge)
    if more := sorted({path.name for path in output.iterdir()} - parts if output.exists() else []):
        raise InputError(f"{output}: holds {more[0]}, which is no part of a pipeline; move it, or give another name")


def pipeline_parts(folder):
    """The names of what a Stable Diffusion 1 or 2 pipeline folder holds. Raises `InputError` for any other folder."""
    try:
        parts = set(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"--merge={folder}: is no pipeline folder with a model_index.json "
                         f"({last_line(error)})") from None
    if not {"unet", "text_encoder"} <= parts or "text_encoder_2" in parts:
        raise InputError(f"--merge={folder}: is no Stable Diffusion 1 or 2, the only ones that this tool merges into")
    return {"model_index.json", *parts}


def last_line(error):
    """The last line of an exception's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


# --------------------------------------------------------------------------------------------------------- reading
def read_adapters(path):
    """Reads a LoRA file of either layout.

    Returns (layout, tensors as peft names them, {layer: alpha}), such as unet.mid_block.<...>.to_q.lora_A.weight
    (rank, in, ...), .lora_B.weight (out, rank, ...) and unet.mid_block.<...>.to_q; the effect of a layer is
    lora_B @ lora_A * alpha / rank. Raises `InputError`.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            settings = dict(json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}")))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: is no LoRA in a .safetensors file ({last_line(error)})") from None
    for key in tensors:
        if kind := next((kind for pattern, kind in OTHERS.items() if re.search(pattern, key)), None):
            raise InputError(f"{path}: is of {kind} ({key}); only LoRA and DoRA of Stable Diffusion 1 and 2 convert")
    layouts = {key: "diffusers" if DIFFUSERS.fullmatch(key) else "kohya" if KOHYA.fullmatch(key) else None
               for key in tensors}
    if not tensors or None in layouts.values():
        key = next((key for key, layout in layouts.items() if not layout), "nothing")
        raise InputError(f"{path}: holds {key}, which is in neither diffusers' nor kohya's layout of LoRA weights")
    if len(set(layouts.values())) > 1:
        keys = sorted(layouts, key=layouts.get)
        raise InputError(f"{path}: mixes diffusers' and kohya's layout ({keys[0]}, {keys[-1]}); split it in two")
    layout = layouts.popitem()[1]
    weights, alphas = from_kohya(tensors) if layout == "kohya" else from_diffusers(tensors, settings)
    check_layers(path, weights, alphas)
    return layout, weights, alphas


def ranks(weights):
    """{layer: rank} of tensors as peft names them."""
    end = ".lora_A.weight"
    return {key.removesuffix(end): value.shape[0] for key, value in weights.items() if key.endswith(end)}


def from_diffusers(tensors, settings):
    """Returns (tensors as peft names them today, {layer: alpha}), given the header's `settings`."""
    weights, alphas = {}, {}
    for key, tensor in tensors.items():
        model, layer, down, up = DIFFUSERS.fullmatch(key).groups()
        kind = "lora_A.weight" if down else "lora_B.weight" if up else LENGTH[model]
        weights[f"{model}.{layer}.{kind}"] = tensor
    for layer, rank in ranks(weights).items():
        model, name = layer.split(".", 1)
        own = [alpha for pattern, alpha in settings.get(f"{model}.alpha_pattern", {}).items()
               if re.match(rf"(.*\.)?({pattern.removeprefix('text_model.')})$", name)]  # as peft matches them
        alpha = own[0] if own else settings.get(f"{model}.lora_alpha", rank)
        alphas[layer] = float(alpha) * (math.sqrt(rank) if settings.get(f"{model}.use_rslora") else 1)
    return weights, alphas


def from_kohya(tensors):
    """Returns (tensors as peft names them, {layer: alpha}); where a layer has no alpha, it is the rank."""
    weights, alphas = {}, {}
    for key, tensor in tensors.items():
        model, flat, kind = KOHYA.fullmatch(key).groups()
        model = "unet" if model == "unet" else "text_encoder"
        layer = f"{model}.{layer_name(flat)}"
        if kind == "alpha":
            alphas[layer] = tensor.item() if tensor.numel() == 1 else math.nan
        elif kind == "dora_scale":  # (out, 1), of a convolution (out, 1, 1, 1); peft has (out,) and (1, out, 1, 1)
            length = tensor.transpose(0, 1) if tensor.ndim == 4 else tensor.squeeze(-1)
            weights[f"{layer}.{LENGTH[model]}"] = length
        else:
            weights[f"{layer}.{'lora_A' if kind == 'lora_down.weight' else 'lora_B'}.weight"] = tensor
    return weights, {layer: float(rank) for layer, rank in ranks(weights).items()} | alphas


def layer_name(flat):
    """The name of a layer whose dots kohya's layout made underscores: mid_block.resnets.0 for mid_block_resnets_0."""
    names = "|".join(name.replace("_", r"\.") for name in UNDERSCORED)
    return re.sub(rf"\b({names})\b", lambda match: match[0].replace(".", "_"), flat.replace("_", "."))


def check_layers(path, weights, alphas):
    """Raises `InputError` for a layer that is not whole or that Stable Diffusion 1 and 2 do not have."""
    for layer in sorted({key.split(".lora_")[0] for key in weights} | alphas.keys()):
        model, root = layer.split(".")[:2]
        down, up, length = [weights.get(f"{layer}.{kind}") for kind in
                            ("lora_A.weight", "lora_B.weight", LENGTH[model])]
        if root not in ROOTS:
            raise InputError(f"{path}: has a layer {layer}, which Stable Diffusion 1 and 2 do not have")
        if down is None or up is None or down.ndim != up.ndim or down.ndim < 2 or down.shape[0] != up.shape[1]:
            raise InputError(f"{path}: lacks a part of {layer}, or its parts do not fit; get the file again")
        if not math.isfinite(alphas[layer]):
            raise InputError(f"{path}: the alpha of {layer} is not a number; get the file again")
        if length is not None and length.shape != ((1, len(up), 1, 1) if up.ndim == 4 else (len(up),)):
            raise InputError(f"{path}: its DoRA has a length per input of {layer}; only one per output converts")


# --------------------------------------------------------------------------------------------------------- writing
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


def save_kohya(path, weights, alphas):
    """Writes a file in kohya's layout, with what interfaces show of it in the header."""
    tensors = {}
    for layer, alpha in alphas.items():
        tensors |= to_kohya({key: value for key, value in weights.items() if key.startswith(f"{layer}.lora_")}, alpha)
    header = {"ss_network_module": "networks.lora", "ss_network_dim": most(ranks(weights)),
              "ss_network_alpha": most(alphas), "ss_output_name": path.stem, "modelspec.title": path.stem}
    with beside(path) as unfinished:
        save_file(tensors, unfinished, {"format": "pt", **{key: str(value) for key, value in header.items()}})


def save_diffusers(path, weights, alphas):
    """Writes a file in diffusers' layout, with peft's settings of each model's adapters in the header."""
    settings = {f"{model}.{name}": value for model in models_of(alphas)
                for name, value in lora_config(weights, alphas, model).to_dict().items()}
    settings = json.dumps(settings, default=sorted, sort_keys=True)  # default: of sets
    with beside(path) as unfinished:
        save_file(weights, unfinished, {"format": "pt", "lora_adapter_metadata": settings})


def models_of(alphas):
    """The names of the models that have adapters: unet, text_encoder or both."""
    return sorted({layer.split(".")[0] for layer in alphas})


def lora_config(weights, alphas, model):
    """peft's settings for the adapters of a model, by which each layer gets its rank and alpha."""
    from peft import LoraConfig  # here, because peft takes seconds to import

    rank, alpha = [{key.removeprefix(f"{model}."): value for key, value in values.items()
                    if key.startswith(f"{model}.")} for values in (ranks(weights), alphas)]
    return LoraConfig(
        r=most(rank), lora_alpha=most(alpha), target_modules=sorted(rank),
        rank_pattern={layer: value for layer, value in rank.items() if value != most(rank)},
        alpha_pattern={layer: value for layer, value in alpha.items() if value != most(alpha)},
        use_dora=any(key.startswith(f"{model}.") and key.endswith(LENGTH[model]) for key in weights))


def most(values):
    """The commonest of the dictionary's values."""
    return Counter(values.values()).most_common(1)[0][0]


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


def merge(weights, alphas, base, output, scale):
    """Merges the adapters at `scale` into the pipeline in the folder `base`, and writes it in float32 to `output`:
    complete beside it, then renamed. DoRA is scaled as diffusers does: before the weights get their length."""
    import diffusers  # here, for the same reason
    import peft

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32,
                                                                     local_files_only=True)
    except Exception as error:  # of the files, their formats or their parts
        raise InputError(f"--merge={base}: cannot be loaded ({last_line(error)})") from None
    shapes = {f"{model}.{name}": tuple(weight.shape) for model in ("unet", "text_encoder")
              for name, weight in getattr(pipeline, model).named_parameters()}
    for layer in alphas:
        shape = (len(weights[f"{layer}.lora_B.weight"]), *weights[f"{layer}.lora_A.weight"].shape[1:])
        if shapes.get(f"{layer}.weight") != shape:
            raise InputError(f"--merge={base}: has {layer} of shape {shapes.get(f'{layer}.weight')}, the LoRA is for "
                             f"{shape}; give the base that it was trained on")
    for model in models_of(alphas):
        part, own = getattr(pipeline, model), f"{model}."
        part.add_adapter(lora_config(weights, alphas, model))
        peft.set_peft_model_state_dict(part, {key.removeprefix(own): value.float() for key, value in weights.items()
                                              if key.startswith(own)})
    pipeline.fuse_lora(components=models_of(alphas), lora_scale=scale)
    pipeline.unload_lora_weights()
    with beside(output) as unfinished:
        pipeline.save_pretrained(unfinished)


def main(argv=None):
    """Runs the tool; a mistake of the user's ends with status 2 and its message."""
    args = parse_args(argv)
    try:
        check_args(args)
        layout, weights, alphas = read_adapters(lora_file(args.input))
        if layout == args.to:
            raise InputError(f"{args.input}: is in the layout of {layout} already; there is nothing to convert")
        if args.merge:
            merge(weights, alphas, args.merge, args.output, 1.0 if args.scale is None else args.scale)
        else:
            (save_kohya if args.to == "kohya" else save_diffusers)(args.output, weights, alphas)
    except (InputError, OSError, SafetensorError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    print(f"Wrote {args.output}: {len(alphas)} layers of rank {most(ranks(weights))}"
          f"{', DoRA' if any('.lora_magnitude_vector' in key for key in weights) else ''}.")


if __name__ == "__main__":
    main()
