"""Convert a LoRA file between diffusers' and kohya's layout, or merge it into a Stable Diffusion 1 or 2.

    sdtune convert-lora my_lora my_lora_for_webui.safetensors --to kohya
    sdtune convert-lora downloaded.safetensors my_lora/pytorch_lora_weights.safetensors --to diffusers
    sdtune convert-lora my_lora my_model --merge stable-diffusion-v1-5 --scale 0.8

The input may be a folder with pytorch_lora_weights.safetensors. Interfaces such as A1111, Forge and ComfyUI read
kohya's layout. The text encoder and DoRA are converted too, there and back to the same bits; rsLoRA becomes the alpha
that gives the same scale.
"""

import json
import math
from pathlib import Path

import diffusers
import peft
import torch
from safetensors import SafetensorError

from sdtune.arguments import SWITCH, checked, new_parser, parse_flags, path_name
from sdtune.errors import InputError, counted, last_line, raise_problems, remedy_for_missing, told_to_user
from sdtune.files import beside
from sdtune.lora_layouts import (
    LORA_FILE,
    lora_config,
    models_of,
    most_common,
    own_part,
    ranks,
    read_adapters,
    write_diffusers,
    write_kohya,
)
from sdtune.models import reason_of, refuse_foreign_code
from sdtune.pipeline_folder import check_place

PROGRAM = "sdtune convert-lora"


def finite_float(text):
    """A number that is neither infinite nor none."""
    return checked(text, float, math.isfinite, "a number, such as 1.0")


def make_parser():
    """The command's flags."""
    parser = new_parser(__doc__, f"{PROGRAM} INPUT OUTPUT (--to LAYOUT | --merge BASE) [flags]")
    add = parser.add_argument
    add("input", nargs="?", type=path_name, help=f"LoRA file in either layout, or folder with {LORA_FILE}")
    add(
        "output",
        nargs="?",
        type=path_name,
        help=".safetensors file to write; with --merge, folder of the merged model",
    )
    add("--to", choices=["diffusers", "kohya"], help="layout to convert to")
    add("--merge", metavar="BASE", help="pipeline folder to merge into; the result is float32")
    add("--scale", type=finite_float, help="strength of the adapter in a merge; 1.0 if not given")
    add("--overwrite", **SWITCH, help="replace what is at the output")
    return parser


def check_args(args):
    """Lists what is wrong with the paths and flags, before anything large is read."""
    if not args.input or not args.output:
        return ["give what to read and what to write: INPUT OUTPUT"]
    if bool(args.to) == bool(args.merge):
        return ["give either --to, a layout to convert to, or --merge, a base to merge into"]
    problems = []
    file, output = lora_file(args.input), Path(args.output)
    if not file.is_file():
        remedy = remedy_for_missing(file) or f"give a LoRA file, or a folder with {LORA_FILE}"
        problems.append(f"{file}: does not exist; {remedy}")
    if args.to and output.suffix != ".safetensors":
        problems.append(f"{output}: end the name of the file to write in .safetensors")
    if args.to and args.scale is not None:
        problems.append(f"--scale={args.scale}: is for --merge; a converted file keeps its scale")
    sources = [file]
    if args.merge:
        problems += check_base(Path(args.merge))
        sources.append(Path(args.merge))
    return problems + check_place(output, sources, is_folder=bool(args.merge), overwrite=args.overwrite)


def lora_file(path):
    """The LoRA file that `path` names or, as a folder, holds."""
    path = Path(path)
    return path / LORA_FILE if path.is_dir() else path


def check_base(folder):
    """Lists what forbids merging into what is in a folder: it has to be a pipeline of Stable Diffusion 1 or 2."""
    try:
        parts = set(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        return [f"--merge={folder}: is no pipeline folder with a model_index.json ({last_line(error)})"]
    if not {"unet", "text_encoder"} <= parts or "text_encoder_2" in parts:
        return [f"--merge={folder}: is no Stable Diffusion 1 or 2, the only ones that are merged into"]
    return []


def merge(weights, alphas, base, output, scale):
    """Merges the adapters at `scale` into the pipeline in the folder `base`, and writes it in float32 to `output`:
    complete beside it, then renamed. DoRA is scaled as diffusers does: before the weights get their length. Raises
    `InputError`."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        refuse_foreign_code(base)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    except Exception as error:  # of the files, their formats or their parts
        raise InputError(f"--merge={base}: cannot be loaded ({reason_of(error)})") from None
    check_fit(weights, alphas, base, pipeline)
    models = models_of(alphas)
    for name in models:
        model = getattr(pipeline, name)
        model.add_adapter(lora_config(weights, alphas, name))
        own_weights = {key: value.float() for key, value in own_part(weights, name).items()}
        peft.set_peft_model_state_dict(model, own_weights)
    pipeline.fuse_lora(components=models, lora_scale=scale)
    pipeline.unload_lora_weights()
    with beside(output) as unfinished:
        pipeline.save_pretrained(unfinished)


def check_fit(weights, alphas, base, pipeline):
    """Raises `InputError` unless the pipeline has every layer of the adapters, in its shape."""
    shapes = {}
    for model in ("unet", "text_encoder"):
        for name, weight in getattr(pipeline, model).named_parameters():
            shapes[f"{model}.{name}"] = tuple(weight.shape)
    for layer in alphas:
        down, up = weights[f"{layer}.lora_A.weight"], weights[f"{layer}.lora_B.weight"]
        shape = (up.shape[0], *down.shape[1:])
        own_shape = shapes.get(f"{layer}.weight")
        if own_shape != shape:
            told = f"has {layer} of shape {own_shape}, the LoRA is for {shape}; give the base that it was trained on"
            raise InputError(f"--merge={base}: {told}")


def main(argv=None):
    """Runs the command; a mistake of the user's ends with status 2 and its message."""
    args, problems = parse_flags(make_parser(), argv, {})
    with told_to_user(PROGRAM, errors=(InputError, OSError, SafetensorError), stopped="Stopped."):
        raise_problems(problems + check_args(args))
        output = Path(args.output)
        layout, weights, alphas = read_adapters(lora_file(args.input))
        if layout == args.to:
            raise InputError(f"{args.input}: is in the layout of {layout} already; there is nothing to convert")
        if args.merge:
            merge(weights, alphas, args.merge, output, 1.0 if args.scale is None else args.scale)
        elif args.to == "kohya":
            write_kohya(output, weights, alphas)
        else:
            write_diffusers(output, weights, alphas)
    is_dora = any(".lora_magnitude_vector" in name for name in weights)
    kind = f"rank {most_common(ranks(weights))}" + (", DoRA" if is_dora else "")
    print(f"Wrote {output}: {counted(len(alphas), 'layer')} of {kind}.")
