"""The folder of a run: whether it may be used, its log, the pipeline that results."""

import contextlib
import datetime
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import diffusers
from accelerate.tracking import get_available_trackers
from accelerate.utils import is_cuda_available
from filelock import FileLock, Timeout
from torch.cuda import max_memory_reserved

from sdtune.checkpoints import find_checkpoint, find_newer, read_best, set_aside_damaged
from sdtune.errors import InputError, last_line, without_secrets
from sdtune.files import beside, copy_mode, existing_place, move_into, sync
from sdtune.models import DTYPES, numel_of, write_text_encoder

LOCK_FILE = ".lock"
TOKEN_FILE = ".token"  # what the first process leaves for the other machines to see, for a moment
HISTORY_FILE = "history.jsonl"  # when the run was started, stopped and resumed: of the clock, as the log is not
HALF_FILE = re.compile(r"\.(args\.json|log\.jsonl|best\.json|history\.jsonl)\..+\.new")  # what a kill leaves of one
NEW_RESULT = ".result.partial"  # a folder beside which the old result stays until the new one is whole


def check_output(args, foreign_result):
    """Lists what is wrong with the output folder and the checkpoint to resume from. The file `foreign_result` marks a
    result of another kind of script, which would stay behind beside this one's."""
    problems, wanted = [], args.resume_from_checkpoint
    output = Path(args.output_dir).resolve()
    checkpoint = find_checkpoint(output, wanted)
    existing = existing_place(output)
    is_usable = existing.is_dir() and os.access(existing, os.W_OK)
    is_used = is_usable and existing == output and is_taken(args)
    is_run = (output / "args.json").is_file() and not (output / foreign_result).exists()
    if checkpoint:
        is_own = output == checkpoint.resolve().parent
    else:  # `latest` starts anew, in the folder of a run that was stopped before its first checkpoint
        is_own = wanted == "latest" and is_run and not (output / "README.md").exists()

    if checkpoint and not (checkpoint / "progress.json").is_file():
        problems.append(f"--resume_from_checkpoint={wanted}: is no whole checkpoint folder; name one, or latest")
    if (output / args.logging_dir).resolve() == output:
        problems.append(f"--logging_dir={args.logging_dir}: is --output_dir itself; name a folder in it, such as logs")
    if wanted and args.overwrite_output_dir:
        problems.append("--overwrite_output_dir: contradicts --resume_from_checkpoint; drop one")
    if is_own and checkpoint and (newer := find_newer(output, checkpoint.resolve())):
        problems.append(f"--resume_from_checkpoint={wanted}: {newer} is newer; use that, or another --output_dir")
    if not is_usable:
        told = f"{existing} is a file or cannot be written to; name another folder"
        problems.append(f"--output_dir={args.output_dir}: {told}")
    if is_used and not is_own and args.overwrite_output_dir and not is_run:
        told = "holds no run of this script, which alone --overwrite_output_dir writes over; name another folder"
        problems.append(f"--output_dir={args.output_dir}: {told}")
    elif is_used and not is_own and not args.overwrite_output_dir:
        remedy = "name another (it holds no run of this script)"
        if is_run:
            remedy = (
                "name another, go on with its run by --resume_from_checkpoint=latest, or use --overwrite_output_dir"
            )
        problems.append(f"--output_dir={args.output_dir}: is in use; {remedy}")
    kind = kind_of_checkpoint(checkpoint) if checkpoint else None
    if kind not in (None, "LoRA adapters" if foreign_result == "model_index.json" else "whole models"):
        remedy = "use the script that wrote it, or another checkpoint"
        problems.append(f"--resume_from_checkpoint={wanted}: holds {kind}, which this script does not train; {remedy}")
    return problems


def kind_of_checkpoint(checkpoint):
    """What a checkpoint holds, or None where it holds neither."""
    if (checkpoint / "pytorch_lora_weights.safetensors").is_file():
        return "LoRA adapters"
    return "whole models" if (checkpoint / "unet").is_dir() else None


def check_trackers(args):
    """Lists whether a tracker is asked for that is not installed."""
    installed = ["all", "none", *map(str, get_available_trackers())]
    if args.report_to is not None and args.report_to not in installed:
        return [
            f"--report_to={args.report_to}: installed are {', '.join(installed)}; for tensorboard and wandb run `pip "
            "install -r requirements_trackers.txt`"
        ]
    return []


def is_taken(args):
    """Whether the output folder holds more than a lock, logs of trackers, which get a folder of their own, and what a
    kill at the start left."""
    others = {LOCK_FILE, TOKEN_FILE, *Path(args.logging_dir).parts[:1]}
    names = {path.name for path in Path(args.output_dir).iterdir()} - others
    return any(not HALF_FILE.fullmatch(name) for name in names)


@contextlib.contextmanager
def locked_output(args):
    """Holds the lock of the output folder, which the end of the process releases in every case: a run may still be
    finishing a step when the terminal is free again. A folder that stays empty is removed. Raises `InputError`."""
    output_dir = Path(args.output_dir)
    is_new = not output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # such as a link to a disk that is not there
        raise InputError(
            f"--output_dir={output_dir}: cannot be made ({last_line(error)}); name another folder"
        ) from None
    lock = FileLock(output_dir / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"--output_dir={output_dir}: another run is writing there, maybe one that finishes its last step; wait "
            "for it, or name another folder"
        ) from None
    except (OSError, NotImplementedError) as error:  # network file systems may know no locks; older filelocks say so
        print(f"Warning: {output_dir} cannot be locked ({last_line(error)}); start no other run there meanwhile.")
    try:
        yield
    finally:
        lock.release()
        if is_new and [path.name for path in output_dir.iterdir()] in ([], [LOCK_FILE]):
            shutil.rmtree(output_dir, ignore_errors=True)


def leave_token(output_dir, token):
    """Leaves a token, a text, in the output folder for the other machines to see. Raises `InputError`."""
    try:
        Path(output_dir, TOKEN_FILE).write_text(token, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output_dir={output_dir}: cannot be written to ({last_line(error)}); make room") from None


def sees_token(output_dir, token, seconds):
    """Whether the token that the first process left can be read here within so many seconds: what one machine writes
    to a network file system others may see with a delay."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if Path(output_dir, TOKEN_FILE).read_text(encoding="utf-8") == token:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.25)


def remove_token(output_dir):
    """Removes what `leave_token` left."""
    with contextlib.suppress(OSError):
        Path(output_dir, TOKEN_FILE).unlink()


def chosen_tracker(args):
    """The name of accelerate's tracker to start: the one asked for, or all that are installed, else tensorboard where
    it is installed; None for no tracker."""
    installed = list(map(str, get_available_trackers()))
    if args.report_to is None:
        return "tensorboard" if "tensorboard" in installed else None
    return args.report_to if args.report_to != "none" and installed else None


def prepare_output(run, overwrite, changed):
    """Makes the output folder with args.json, a log up to the first step, and a line more of history that names the
    flags that were `changed` from their defaults; removes what an earlier run left there if it may be overwritten, and
    what it left unfinished. For one process alone."""
    output_dir = run.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    old_files = ["README.md", "best.json", HISTORY_FILE]  # the first of which says that a run has ended
    old_folders = r"samples|checkpoint-\d+"
    unfinished = r"checkpoint-\d+(\..+-\d+)?\.partial|" + re.escape(NEW_RESULT)
    if overwrite:
        for name in old_files:
            (output_dir / name).unlink(missing_ok=True)
    for old in list(output_dir.iterdir()):
        if re.fullmatch(unfinished, old.name) or (overwrite and re.fullmatch(old_folders, old.name)):
            shutil.rmtree(old)
        if HALF_FILE.fullmatch(old.name):
            old.unlink()
    first_step = run.progress["global_step"]
    set_aside_damaged(output_dir, first_step)
    best = read_best(output_dir)
    # The loss may be of other images, or of another objective; or the checkpoint is damaged.
    if best and first_step and (run.progress["base_losses"] is None or best["step"] > first_step):
        (output_dir / "best.json").unlink()
    log = output_dir / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() and first_step else []
    history = output_dir / HISTORY_FILE
    past = []
    with contextlib.suppress(OSError):  # it is no part of what a run needs
        past = history.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    now = history_line(run, "resumed" if first_step else "started", last_step=run.counts.last_step, changed=changed)
    contents = {
        "args.json": json.dumps(run.settings, indent=2) + "\n",
        "log.jsonl": "".join(line for line in lines if was_before(line, first_step)),
        HISTORY_FILE: "".join([line for line in past if line.endswith("}\n")] + [now]),
    }
    try:
        for name, content in contents.items():
            with beside(output_dir / name) as path:
                path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output_dir={output_dir}: cannot be written to ({last_line(error)}); make room") from None


def history_line(run, event, **more):
    """A line of history.jsonl: what happened to the run, and when, after which step."""
    time_of_day = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return json.dumps({"time": time_of_day, "event": event, "step": run.progress["global_step"], **more}) + "\n"


def note_end(accelerator, run, event, why=None):
    """Appends to history.jsonl how a run has ended, by the first process alone, but by each host of JAX. A run that is
    killed notes nothing, and one that cannot write has more to say elsewhere."""
    if accelerator.is_main_process:
        with contextlib.suppress(OSError), (run.output_dir / HISTORY_FILE).open("a", encoding="utf-8") as file:
            file.write(history_line(run, event, **({"why": without_secrets(why)} if why else {})))


def restore_output(run):
    """Makes the output folder anew, with what a checkpoint needs there, if somebody has removed it meanwhile."""
    settings = run.output_dir / "args.json"
    if not settings.exists():
        run.output_dir.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(run.settings, indent=2) + "\n", encoding="utf-8")


def was_before(line, first_step):
    """Whether a line of the log is whole and stays: steps after the checkpoint are done again, and so logged again,
    and so is the held-out loss at its step."""
    if not line.endswith("}\n"):
        return False
    row = json.loads(line)
    return row["step"] < first_step or ("loss" in row and row["step"] == first_step)


def start_trackers(args, accelerator):
    """Starts the trackers. Raises `InputError` for one that does not start."""
    config = {name: str(value) for name, value in vars(args).items() if name != "hub_token"}
    try:
        accelerator.init_trackers(args.tracker_project_name, config)
    except Exception as error:  # each has its own way to say that nobody is logged in
        remedy = "set it up as it asks for"
        if args.report_to == "wandb":
            remedy = "log in to it (wandb login), work offline (WANDB_MODE=offline)"
        told = f"does not start ({last_line(error)}); {remedy}, or use --report_to=none"
        raise InputError(f"--report_to={args.report_to}: {told}") from None


def tell_trackers(accelerator, tell):
    """Calls `tell(tracker)` for every tracker; one that fails is done without from then on."""
    for tracker in list(accelerator.trackers):
        try:
            tell(tracker)
        except Exception as error:  # of a connection, a quota, a disk: its log is not the run
            print(f"Warning: {tracker.name} failed and is done without ({last_line(error)}).", file=sys.stderr)
            accelerator.trackers.remove(tracker)


def end_training(accelerator):
    """Ends the trackers and leaves the other processes."""
    tell_trackers(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers = []
    accelerator.end_training()


def log_losses(accelerator, run, learning_rate, grad_norm, images_per_second):
    """Logs the mean loss of the steps since the last such line, and the last step's other numbers."""
    losses = run.progress["losses"]
    numbers = {
        "loss": sum(losses) / len(losses) if losses else None,  # none if all of them were skipped
        "lr": learning_rate,
        "grad_norm": grad_norm,
        "images_per_second": images_per_second,
        **peak_gigabytes(accelerator.device),
    }
    write_log(accelerator, run.output_dir, run.progress["global_step"], numbers)
    run.progress["losses"] = []


def peak_gigabytes(device):
    """The most memory, in GB by name, that PyTorch took on a device so far, if that is a GPU of NVIDIA's or AMD's, and
    this process in all, which the processes that load images are not part of."""
    peaks = {}
    if device.type != "cpu" and is_cuda_available():
        peaks["device_gb"] = max_memory_reserved(device) / 1e9
    if sys.platform != "win32":
        import resource  # which Windows has not

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["process_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return peaks


def write_log(accelerator, output_dir, step, numbers):
    """Appends numbers to log.jsonl and sends them to the trackers."""
    if accelerator.is_main_process:
        with (output_dir / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
    known = {name: value for name, value in numbers.items() if value is not None}
    tell_trackers(accelerator, lambda tracker: tracker.log(known, step=step))


@contextlib.contextmanager
def new_result(output_dir):
    """Gives a folder to write the result to, which comes into the output folder when it is whole."""
    folder = Path(output_dir, NEW_RESULT)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        copy_mode(Path(output_dir, "args.json"), folder.rglob("*.safetensors"))
        sync(folder)
        move_into(folder, Path(output_dir))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def count_result_bytes(args, pipeline, with_text_encoder=True):
    """How many bytes the weights take that `save_pipeline` will write."""
    numel = sum(numel_of(value) for model in (pipeline.unet, pipeline.vae) for value in model.parameters())
    total = numel * DTYPES[args.save_precision].itemsize
    if with_text_encoder:
        total += 4 * sum(value.numel() for value in pipeline.text_encoder.parameters())
    return total


def save_pipeline(args, folder, pipeline, noise_scheduler):
    """Writes a pipeline into a folder, with UNet and VAE in the precision asked for, and a scheduler that fits what
    was trained; returns patterns that are its files."""
    objective = noise_scheduler.config
    kind, changes = type(pipeline.scheduler), {"prediction_type": objective.prediction_type}
    if objective.rescale_betas_zero_snr:  # few samplers can start from pure noise
        kind = diffusers.DDIMScheduler
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.register_modules(scheduler=kind.from_config(pipeline.scheduler.config, **changes))
    for part in (pipeline.unet, pipeline.vae):  # not the text encoder: half would stay half when loaded, and fail
        part.to(DTYPES[args.save_precision])
        part.register_to_config(_name_or_path=None)  # which is a path here
    pipeline.register_to_config(_name_or_path=None)
    pipeline.save_pretrained(folder)
    if pipeline.text_encoder:
        write_text_encoder(pipeline.text_encoder, folder / "text_encoder")
    return ["model_index.json", *[f"{name}/*" for name in pipeline.components]]
