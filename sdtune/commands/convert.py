"""Convert a pipeline folder of Stable Diffusion 1 or 2 to one file as A1111, Forge and ComfyUI read it, or back.

    sdtune convert my_model my_model.safetensors --save_precision fp16
    sdtune convert downloaded.safetensors my_model --config_folder stable-diffusion-v1-5

The direction follows from what is read: a folder, or a .safetensors or .ckpt file. Weights keep their bits there and
back, unless --save_precision rounds them. A file holds weights alone. So the way back needs a pipeline folder of the
same architecture, whose weights may be missing, for configs, tokenizer and scheduler; its text encoder is saved in
float32, because a half one does not load without more ado. Nothing is downloaded. What folders do not have, files made
of them lack: averaged weights (model_ema), and of the text encoder of Stable Diffusion 2, which stops a block early,
resblocks.23, text_projection and logit_scale; nothing that draws uses them.
"""

import json
import shlex
import shutil
import textwrap
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sdtune.arguments import SWITCH, nearest_beside, new_parser, parse_flags, path_name
from sdtune.errors import InputError, counted, raise_problems, remedy_for_missing, told_to_user
from sdtune.files import beside, read_json
from sdtune.lora_layouts import LORA_FILE
from sdtune.models import DTYPES, quiet_libraries, tell_checkpoint, write_text_encoder
from sdtune.pipeline_folder import PARTS, check_folder, check_place, class_of, read_models, read_weights
from sdtune.single_file import (
    POSITIONS,
    ZERO_SNR,
    make_header,
    original_names,
    read_single,
    schedule,
    to_original,
    to_parts,
    version_of,
)

PROGRAM = "sdtune convert"


def make_parser():
    """The command's flags."""
    parser = new_parser(__doc__, f"{PROGRAM} SOURCE OUTPUT [flags]")
    add = parser.add_argument
    add("source", nargs="?", type=path_name, help="pipeline folder, or original .safetensors or .ckpt file")
    add("output", nargs="?", type=path_name, help=".safetensors file to write, or pipeline folder if SOURCE is a file")
    add("--config_folder", help="for a file: pipeline folder with configs, tokenizer and scheduler for it")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--save_precision", default="no", choices=list(DTYPES), help="half precision of what is saved, or no")
    add("--overwrite", **SWITCH, help="replace what is at OUTPUT")
    add("--config", metavar="FILE.yaml", help="flags by name; the command line wins")
    return parser


def check_args(args):
    """Lists every path and flag that is wrong, before anything large is read."""
    if not args.source or not args.output:
        return ["give what to read and what to write: SOURCE OUTPUT"]
    source, output = Path(args.source), Path(args.output)
    if source.is_dir():
        return check_to_file(args, source, output)
    if source.suffix in (".safetensors", ".ckpt") and source.is_file():
        return check_to_folder(args, source, output)
    remedy = remedy_for_missing(source) or "name one"
    return [f"{source}: is no pipeline folder and no .safetensors or .ckpt file{nearest_beside(source)}; {remedy}"]


def check_to_file(args, source, output):
    """Lists what is wrong with paths and flags where a folder is converted to a file."""
    problems = []
    if args.config_folder is not None:
        problems.append(f"--config_folder={args.config_folder}: is for a file as SOURCE; leave it out")
    problems += check_kind(source) or check_folder(source, args.variant, with_weights=True)
    if output.suffix != ".safetensors":
        problems.append(f"{output}: end the name of the file to write in .safetensors")
    sources = [Path(path) for path in (args.source, args.config_folder) if path]
    return problems + check_place(output, sources, is_folder=False, overwrite=args.overwrite)


def check_kind(source):
    """Lists whether a folder holds what another command is for: LoRA weights, or a checkpoint."""
    name = shlex.quote(str(source))
    if (source / "model_index.json").is_file():
        return []
    if (source / LORA_FILE).is_file():
        return [f"{source}: holds LoRA weights; use `sdtune convert-lora {name} OUTPUT.safetensors --to=kohya`"]
    if told := tell_checkpoint(source):
        return [f"{source}: {told}"]
    return []


def check_to_folder(args, source, output):
    """Lists what is wrong with paths and flags where a file is converted to a folder."""
    problems = []
    if args.variant is not None:
        problems.append(f"--variant={args.variant}: is for a folder as SOURCE; leave it out")
    if args.config_folder is None:
        problems.append(
            f"{source}: is weights alone; add --config_folder=FOLDER, a pipeline folder of the same architecture, to "
            "say the rest (tokenizer, scheduler, number of heads)"
        )
    else:
        for problem in check_folder(Path(args.config_folder), None, with_weights=False):
            problems.append(f"--config_folder={problem}")
        if output.suffix in (".safetensors", ".ckpt") and not output.exists():
            problems.append(f"{output}: a pipeline folder is written there; name it without {output.suffix}")
    sources = [Path(path) for path in (args.source, args.config_folder) if path]
    return problems + check_place(output, sources, is_folder=True, overwrite=args.overwrite)


def write_file(source, output, variant, dtype):
    """Writes the pipeline in the folder `source` as one file, its weights in `dtype` or, if None, as they are; returns
    what to tell about it. Raises `InputError`."""
    models = read_models(source)
    noise_config = read_json(source / "scheduler" / "scheduler_config.json")
    original_names(models)  # here too, because it may refuse what would take a while to read
    buffers = schedule(noise_config)
    if noise_config.get("rescale_betas_zero_snr"):
        buffers[ZERO_SNR] = torch.ones(1)
    weights = to_original(read_weights(source, variant), models, source)
    if dtype:
        for name, value in weights.items():
            if value.is_floating_point():
                weights[name] = value.to(dtype)
    prediction_type = noise_config.get("prediction_type", "epsilon")
    with beside(output) as unfinished:  # the schedule is not rounded: it would lose its small numbers
        save_file(weights | buffers, unfinished, make_header(models, prediction_type, output.stem))
    index = read_json(source / "model_index.json")
    return notes_on_file(index, version_of(models), prediction_type, ZERO_SNR in buffers)


def notes_on_file(index, version, prediction_type, zero_snr):
    """What to tell about a file: what of the pipeline with this model_index.json is not in it, and what interfaces
    have to be told to draw with it."""
    notes = []
    left_out = sorted(name for name in index if class_of(index, name) and name not in [*PARTS, "scheduler"])
    if left_out:
        notes.append(f"Not in it, for lack of a place: {', '.join(left_out)}.")
    if version is None:
        notes.append(
            "Its sizes are not those of Stable Diffusion 1 or 2, so A1111, Forge and ComfyUI do not read it; "
            "from_single_file does, with the folder as `config`."
        )
    elif prediction_type == "v_prediction" and version == 1:
        notes.append(
            "It predicts v, as the header says, but interfaces take it for epsilon. In ComfyUI add "
            "ModelSamplingDiscrete; A1111 and Forge need a .yaml of v-prediction beside the file."
        )
    elif prediction_type == "v_prediction":
        notes.append(
            "It predicts v, as the header says; A1111, Forge and ComfyUI guess it from the weights instead. If images "
            "are noise, put the original v2-inference-v.yaml beside the file."
        )
    if zero_snr:
        notes.append(f"The tensor {ZERO_SNR} tells A1111 and Forge of zero terminal SNR; ComfyUI has to be told.")
    return notes


def write_folder(source, output, config_folder, dtype):
    """Writes the file `source` as a pipeline folder, with all but weights as in `config_folder`, UNet and VAE in
    `dtype` or, if None, as they are; returns what to tell about it. Raises `InputError`."""
    models = read_models(config_folder)
    noise_config = read_json(config_folder / "scheduler" / "scheduler_config.json")
    buffers = schedule(noise_config)
    weights, header = read_single(source)
    parts = to_parts(weights, models, source)
    check_objective(source, header, ZERO_SNR in weights, noise_config)
    with beside(output) as unfinished:
        for part, model in models.items():
            part_dtype = torch.float32 if part == "text_encoder" else dtype
            state = parts.pop(part)
            if part_dtype:
                state = {name: value.to(part_dtype) for name, value in state.items()}
            model.load_state_dict(state, assign=True)
            model.save_pretrained(unfinished / part)
        write_text_encoder(models["text_encoder"], unfinished / "text_encoder")
        copy_other_parts(config_folder, unfinished)
    left_out = sorted(weights.keys() - buffers.keys() - {POSITIONS, ZERO_SNR})
    if not left_out:
        return []
    examples = ", ".join(left_out[:3])
    if len(left_out) > 3:
        examples += ", ..."
    number = counted(len(left_out), "tensor of the file has", "tensors of the file have")
    return [f"{number} no place in a folder: {examples}."]


def check_objective(source, header, zero_snr, noise_config):
    """Raises `InputError` if a file says another objective than the scheduler's config."""
    said = header.get("modelspec.prediction_type")
    prediction_type = "v_prediction" if said == "v" else said
    own_prediction_type = noise_config.get("prediction_type", "epsilon")
    own_zero_snr = noise_config.get("rescale_betas_zero_snr", False)
    if prediction_type not in (None, own_prediction_type):
        told = f"prediction_type {prediction_type}, the scheduler of --config_folder has {own_prediction_type}"
    elif zero_snr and not own_zero_snr:
        told = f"rescale_betas_zero_snr True, the scheduler of --config_folder has {own_zero_snr}"
    else:
        return
    remedy = "give a folder with that of the model, or change its scheduler_config.json"
    raise InputError(f"{source}: was trained with {told}; {remedy}")


def copy_other_parts(config_folder, target):
    """Copies the parts of a pipeline folder that a file does not hold, such as the tokenizer, and writes
    model_index.json, in which parts without their weights are none."""
    index = read_json(config_folder / "model_index.json")
    for part in list(index):
        if not class_of(index, part) or part in PARTS:
            continue
        folder = config_folder / part
        # A safety checker has weights, a tokenizer has none and no config.json.
        needs_weights = (folder / "config.json").exists()
        has_weights = any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*"))
        if folder.is_dir() and (has_weights or not needs_weights):
            shutil.copytree(folder, target / part)
        else:
            index[part] = [None, None]
    if not class_of(index, "safety_checker"):
        index["requires_safety_checker"] = False
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def main(argv=None):
    """Runs the command; a mistake of the user's ends with status 2 and its message."""
    args, problems = parse_flags(make_parser(), argv, {})
    quiet_libraries()
    with told_to_user(PROGRAM, errors=(InputError, OSError, SafetensorError), stopped="Stopped."):
        raise_problems(problems + check_args(args))
        source, output = Path(args.source), Path(args.output)
        dtype = None if args.save_precision == "no" else DTYPES[args.save_precision]
        if source.is_dir():
            notes = write_file(source, output, args.variant, dtype)
        else:
            notes = write_folder(source, output, Path(args.config_folder), dtype)
    print("\n".join([f"Wrote {output}.", *[textwrap.fill(note, 100) for note in notes]]))
