"""The folder of a run: whether it may be used, its log, the pipeline that results."""

import json
import os
import re
import shutil
from pathlib import Path

import diffusers
from accelerate.tracking import get_available_trackers

from sdtune.checkpoints import find_checkpoint
from sdtune.files import copy_mode, existing_place
from sdtune.models import DTYPES


def check_output(args, foreign_result):
    """Lists what is wrong with the output folder and the checkpoint to resume from. The file `foreign_result` marks a
    result of another kind of script, which would stay behind beside this one's."""
    problems, wanted = [], args.resume_from_checkpoint
    output = Path(args.output_dir).resolve()
    checkpoint, newest = find_checkpoint(output, wanted), find_checkpoint(output, "latest")
    existing = existing_place(output)
    is_usable = existing.is_dir() and os.access(existing, os.W_OK)
    is_used = is_usable and existing == output and any(output.iterdir())
    is_run = (output / "args.json").is_file() and not (output / foreign_result).exists()
    if checkpoint:
        is_own = output == checkpoint.resolve().parent
    else:  # `latest` starts anew, in the folder of a run that was stopped before its first checkpoint
        is_own = wanted == "latest" and is_run and not (output / "README.md").exists()

    if checkpoint and not (checkpoint / "progress.json").is_file():
        problems.append(f"--resume_from_checkpoint={wanted}: is no whole checkpoint folder; name one, or latest")
    if wanted and args.overwrite_output_dir:
        problems.append("--overwrite_output_dir: contradicts --resume_from_checkpoint; drop one")
    if is_own and newest and checkpoint.resolve() != newest.resolve():
        problems.append(f"--resume_from_checkpoint={wanted}: {newest} is newer; use that, or another --output_dir")
    if not is_usable:
        told = f"{existing} is a file or cannot be written to; name another folder"
        problems.append(f"--output_dir={args.output_dir}: {told}")
    if is_used and not is_own and not (args.overwrite_output_dir and is_run):
        problems.append(
            f"--output_dir={args.output_dir}: is in use; name another, go on with its run by "
            "--resume_from_checkpoint=latest, or, if of this kind, use --overwrite_output_dir"
        )
    return problems


def check_trackers(args):
    """Lists whether a tracker is asked for that is not installed."""
    installed = ["all", "none", *map(str, get_available_trackers())]
    if args.report_to not in installed:
        return [f"--report_to={args.report_to}: installed are {', '.join(installed)}"]
    return []


def prepare_output(run, overwrite):
    """Makes the output folder with args.json and a log up to the first step; removes what an earlier run left there if
    it may be overwritten. For one process alone."""
    output_dir = run.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    if overwrite:
        (output_dir / "README.md").unlink(missing_ok=True)  # which says that a run has ended
        for old in list(output_dir.iterdir()):
            if re.fullmatch(r"samples|checkpoint-\d+(.partial)?", old.name):
                shutil.rmtree(old, ignore_errors=True)
    (output_dir / "args.json").write_text(json.dumps(run.settings, indent=2) + "\n", encoding="utf-8")
    log = output_dir / "log.jsonl"
    first_step = run.progress["global_step"]
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() and first_step else []
    log.write_text("".join(line for line in lines if was_before(line, first_step)), encoding="utf-8")


def was_before(line, first_step):
    """Whether a line of the log is whole and stays: steps after the checkpoint are done again, and so logged again,
    and so is the held-out loss at its step."""
    if not line.endswith("}\n"):
        return False
    row = json.loads(line)
    return row["step"] < first_step or ("loss" in row and row["step"] == first_step)


def log_losses(accelerator, run, learning_rate, grad_norm, images_per_second):
    """Logs the mean loss of the steps since the last such line, and the last step's other numbers."""
    losses = run.progress["losses"]
    numbers = {
        "loss": sum(losses) / len(losses),
        "lr": learning_rate,
        "grad_norm": grad_norm,
        "images_per_second": images_per_second,
    }
    write_log(accelerator, run.output_dir, run.progress["global_step"], numbers)
    run.progress["losses"] = []


def write_log(accelerator, output_dir, step, numbers):
    """Appends numbers to log.jsonl and sends them to the trackers."""
    if accelerator.is_main_process:
        with (output_dir / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
    accelerator.log(numbers, step=step)


def save_pipeline(args, pipeline, noise_scheduler):
    """Writes a pipeline folder with UNet and VAE in the precision asked for, and a scheduler that fits what was
    trained; returns patterns that are its files."""
    objective, output_dir = noise_scheduler.config, Path(args.output_dir)
    kind, changes = type(pipeline.scheduler), {"prediction_type": objective.prediction_type}
    if objective.rescale_betas_zero_snr:  # few samplers can start from pure noise
        kind = diffusers.DDIMScheduler
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.register_modules(scheduler=kind.from_config(pipeline.scheduler.config, **changes))
    for part in (pipeline.unet, pipeline.vae):  # not the text encoder: half would stay half when loaded, and fail
        part.to(DTYPES[args.save_precision])
        part.register_to_config(_name_or_path=None)  # which is a path here
    pipeline.register_to_config(_name_or_path=None)
    pipeline.save_pretrained(output_dir)
    for name in pipeline.components:
        copy_mode(output_dir / "args.json", (output_dir / name).glob("*.safetensors"))
    return ["model_index.json", *[f"{name}/*" for name in pipeline.components]]
