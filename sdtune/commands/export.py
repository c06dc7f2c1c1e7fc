"""Make a model of a checkpoint: a pipeline folder, or a folder with LoRA weights, as the run's end would have written.

    sdtune export my_model/checkpoint-500 my_earlier_model
    sdtune export my_lora/checkpoint-200 my_earlier_lora

The averaged weights are taken if the run has them (--weights=trained takes the others). What was not trained comes
from the base that the run began with; --base names it anew if it is elsewhere now.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdtune.arguments import SWITCH, nearest_beside, new_parser, parse_flags, path_name
from sdtune.checkpoints import AVERAGED, list_checkpoints, read_settings
from sdtune.digests import find_damage
from sdtune.errors import InputError, fitted, last_line, raise_problems, remedy_for_missing, told_to_user
from sdtune.files import beside, read_json
from sdtune.lora import add_adapters, file_of_adapters, lora_weights, save_lora
from sdtune.lora_layouts import LORA_FILE
from sdtune.models import DTYPES, config_source, load_base, make_noise_scheduler, quiet_libraries, read_models
from sdtune.output import save_pipeline
from sdtune.pipeline_folder import check_place
from sdtune.sharding import AVERAGE, SHARDS_FOLDER, read_whole
from sdtune.states import STATE_FILE

PROGRAM = "sdtune export"
SUFFIXES = {"averaged": AVERAGED, "trained": ""}
UNUSED = {"trained": f"*{AVERAGED}[./]*"}  # pattern of files in a checkpoint, which may be missing then


def make_parser():
    """The command's flags."""
    parser = new_parser(__doc__, f"{PROGRAM} CHECKPOINT OUTPUT [flags]")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=path_name, help="folder checkpoint-N of a run")
    add("output", nargs="?", type=path_name, help="folder to write")
    add("--weights", choices=list(SUFFIXES), help="which of them; default: averaged if the run has them, else trained")
    add("--base", help="the base of the run, a pipeline folder or Hub id, if it is not where it was")
    add("--save_precision", default="no", choices=list(DTYPES), help="half precision of what is saved, or no")
    add("--overwrite", **SWITCH, help="replace the model at OUTPUT")
    add("--config", metavar="FILE.yaml", help="flags by name; the command line wins")
    return parser


def check_args(args):
    """Lists every path that is wrong, before anything large is read."""
    if not args.checkpoint or not args.output:
        return ["give what to read and what to write: CHECKPOINT OUTPUT"]
    checkpoint = Path(args.checkpoint)
    problems = check_place(Path(args.output), [checkpoint], is_folder=True, overwrite=args.overwrite)
    if not (checkpoint / "progress.json").is_file():
        there = list_checkpoints(checkpoint) or list_checkpoints(checkpoint.parent)
        told = "is no whole checkpoint" if checkpoint.exists() else "does not exist"
        remedy = remedy_for_missing(checkpoint) or "give a folder checkpoint-N of a run"
        if there:
            remedy = f"take {' or '.join(map(str, there[-5:]))}"
        elif not checkpoint.parent.exists():
            told += nearest_beside(checkpoint.parent)
        problems.append(f"{checkpoint}: {told}; {remedy}")
    elif damage := find_damage(checkpoint, UNUSED.get(args.weights, "")):
        problems.append(f"{checkpoint}: is damaged ({damage}); give another checkpoint of the run")
    elif args.weights != "trained" and not holds(checkpoint, AVERAGED):
        settings, _ = read_settings(checkpoint)
        if settings.get("use_ema"):
            remedy = "give another checkpoint, or --weights=trained"
            problems.append(f"{checkpoint}: lacks the averaged weights of its run (--use_ema); {remedy}")
        elif args.weights == "averaged":
            problems.append("--weights=averaged: the run has no average (--use_ema); drop this")
    return problems


def holds(checkpoint, suffix):
    """Whether a checkpoint has weights with the suffix."""
    if (checkpoint / SHARDS_FOLDER).is_dir():
        return not suffix or "ema" in read_json(checkpoint / STATE_FILE)
    return (checkpoint / f"unet{suffix}").is_dir() or (checkpoint / file_of_adapters(suffix)).is_file()


def holds_adapters(checkpoint, suffix):
    """Whether the weights with the suffix are adapters."""
    if (checkpoint / SHARDS_FOLDER).is_dir():
        with safe_open(next((checkpoint / SHARDS_FOLDER).glob("*.safetensors")), "pt") as file:
            return any(".lora_" in name for name in file.keys())  # noqa: SIM118 (it is no dict)
    return (checkpoint / file_of_adapters(suffix)).is_file()


def export_shared_adapters(checkpoint, folder, suffix, precision):
    """Puts together the adapters that processes under FSDP2 have written, and writes them into a folder."""
    settings, _ = read_settings(checkpoint)
    settings = SimpleNamespace(**{**settings, "save_precision": precision, "init_lora_weights": None})
    source, where = config_source(settings)
    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(source, subfolder="unet", **where)
        models = {"unet": UNet2DConditionModel.from_config(config)}
        add_adapters(settings, models)
    trained = {name: value for name, value in models["unet"].named_parameters() if value.requires_grad}
    values = {name: torch.empty(value.shape) for name, value in trained.items()}
    models["unet"].load_state_dict(values, strict=False, assign=True)
    read_whole(models, checkpoint / SHARDS_FOLDER, AVERAGE if suffix else "")
    folder.mkdir()
    save_lora(
        models, {name: value.to(DTYPES[precision]) for name, value in lora_weights(models).items()}, folder, LORA_FILE
    )


def export_adapters(checkpoint, folder, suffix, precision):
    """Copies the adapters of a checkpoint into a folder."""
    if (checkpoint / SHARDS_FOLDER).is_dir():
        export_shared_adapters(checkpoint, folder, suffix, precision)
        return
    with safe_open(checkpoint / file_of_adapters(suffix), "pt") as file:
        weights = {name: file.get_tensor(name).to(DTYPES[precision]) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        header = file.metadata()
    folder.mkdir()
    save_file(weights, folder / LORA_FILE, header)


def export_pipeline(args, checkpoint, folder, suffix):
    """Writes the run's base with the weights of a checkpoint in their places. Raises `InputError`."""
    settings, _ = read_settings(checkpoint)
    if args.base:
        settings |= {"pretrained_model_name_or_path": args.base, "single_file_config": None}
        settings |= {"revision": None, "variant": None}
    settings = SimpleNamespace(**{**settings, "save_precision": args.save_precision})
    try:
        pipeline = load_base(settings)
    except InputError as error:
        base, told = settings.pretrained_model_name_or_path, error
        if not Path(base).exists():  # the Hub's cache is not to blame: the run may have begun in another folder
            told = f"{base}: is no folder seen from here, nor a model that the Hub or its cache has"
        raise InputError(f"{told}; name the run's base, with PyTorch weights, by --base") from None
    found = [path.name for path in checkpoint.iterdir() if path.is_dir()]
    trained = [name.removesuffix(suffix) for name in found if re.fullmatch(rf"(unet|text_encoder){suffix}", name)]
    try:
        if SHARDS_FOLDER in found:
            read_whole({"unet": pipeline.unet}, checkpoint / SHARDS_FOLDER, AVERAGE if suffix else "")
        read_models({name: getattr(pipeline, name) for name in trained}, checkpoint, suffix)
    except Exception as error:  # of the files, or of another architecture
        raise InputError(
            f"{checkpoint}: does not fit {settings.pretrained_model_name_or_path} ({last_line(error)})"
        ) from None
    save_pipeline(settings, folder, pipeline, make_noise_scheduler(settings, pipeline))


def main(argv=None):
    """Runs the command; a mistake of the user's ends with status 2 and its message."""
    args, problems = parse_flags(make_parser(), argv, {})
    quiet_libraries()
    with told_to_user(PROGRAM, errors=(InputError, OSError, SafetensorError), stopped="Stopped; nothing was written."):
        raise_problems(problems + check_args(args))
        checkpoint, output = Path(args.checkpoint), Path(args.output)
        weights = args.weights or ("averaged" if holds(checkpoint, AVERAGED) else "trained")
        suffix = SUFFIXES[weights]
        with beside(output) as unfinished:
            if holds_adapters(checkpoint, suffix):
                export_adapters(checkpoint, unfinished, suffix, args.save_precision)
                loader = f'pipe.load_lora_weights("{output}")'
            else:
                export_pipeline(args, checkpoint, unfinished, suffix)
                loader = f'StableDiffusionPipeline.from_pretrained("{output}")'
        print(fitted(f"Wrote {output}: the {weights} weights of {checkpoint}. Load it with {loader}."))
