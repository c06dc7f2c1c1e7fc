"""The plan that a run prints before its first step."""

import contextlib
import datetime
import io
import math
import platform
import shutil
import textwrap

import torch
from accelerate.utils import is_cuda_available
from torch.backends.cpu import get_cpu_capability
from torch.cpu import _is_amx_tile_supported, _is_avx512_bf16_supported
from torch.cuda import get_device_name, get_device_properties, is_bf16_supported

from sdtune.arguments import missing_here
from sdtune.batches import max_samples_per_step, mean_samples_per_step
from sdtune.checkpoints import list_checkpoints
from sdtune.errors import counted
from sdtune.files import existing_place
from sdtune.models import numel_of
from sdtune.output import chosen_tracker, peak_gigabytes

MARGIN = " " * 13  # before the text of a row
PASSES_IN = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}  # by --mixed_precision


def print_plan(args, run, num_held_out, num_trained, about):
    """Says, before the first step, what will be done. `about` says what only a script knows: `trained` and `frozen`
    (which models), `device` (its name), `devices` (how many share a pass), `optimizer` (its name), `warnings` (a
    list), and maybe `other_rate` (what stands behind the learning rate), `images` (a remark), `kinds` (lines on
    them), `data` (texts that were told as they were read), `stream` (how they are read), `precision` (of passes, if
    that is not the setting), `weights` (their precision, if not float32), `result_bytes` (of the files that will be
    the result), `buckets` (lines on the sizes of images) and `cache` (a text, or None)."""
    counts, side, tracker = run.counts, args.resolution, chosen_tracker(args)
    first_step, precision = run.progress["global_step"], about.get("precision", run.settings["mixed_precision"])
    buckets, size = about.get("buckets", ()), tell_size(checkpoint_bytes(run))
    shape = f"in buckets of the area of {side} x {side}" if buckets else f"at {side} x {side}"
    number, epochs = "streamed, their number is not known", ""
    if counts.num_images is not None:
        number = f"{counts.num_images:,} to train on"
        epochs = f", {counts.last_step / counts.steps_per_epoch:,.1f} epochs"
    images = f"{number}, {num_held_out:,} held out, {shape} pixels"
    num_passes = counted(args.gradient_accumulation_steps, "pass", "passes")
    passes = f"{args.train_batch_size} a pass x {num_passes} x {about['devices']}"
    often = "step" if args.checkpointing_steps == 1 else f"{args.checkpointing_steps:,} steps"
    rows = {
        "device": about["device"],
        "images": "\n".join([images + about.get("images", ""), *about.get("kinds", []), *buckets]),
        "stream": about.get("stream"),
        "steps": f"{first_step:,} to {counts.last_step:,}{epochs}",
        "per step": f"{tell_images_of_step(counts)}: {passes}",
        "trained": f"{about['trained']}, {num_trained:,} parameters in {about.get('weights', 'float32')}, passes in "
        f"{PASSES_IN[precision]}; frozen: {about['frozen']}",
        "optimizer": f"{about['optimizer']} at {run.settings['peak_learning_rate']:g}{about.get('other_rate', '')}, "
        f"{args.lr_scheduler}; {'an average of the weights (EMA)' if args.use_ema else 'no average of the weights'}",
        "output": f"{args.output_dir}, a checkpoint of {size} every {often}",
        "disk": tell_disk(args, run, about.get("result_bytes")),
        "log": f"log.jsonl and {tracker}" if tracker else "log.jsonl, no tracker",
    }
    rows["cache"] = about.get("cache")
    rows["data"] = "".join(about.get("data", [])).rstrip("\n")
    lines = [as_row(name, text) for name, text in rows.items() if text]
    warned = (
        warn_of_name(args)
        + about["warnings"]
        + warn_of_start(args)
        + warn_of_no_step(run)
        + warn_of_held_out(args, counts, num_held_out)
        + warn_of_warm_up(args, counts)
        + warn_of_disk(args, run)
    )
    warnings = [as_row("warning", text) for text in warned]
    # At once: who is killed for what the first step takes has told it.
    print("\n".join(["Plan", *lines, *warnings]), flush=True)


def tell_images_of_step(counts):
    """How many images a step has, as a text: no more than there are."""
    most = max_samples_per_step(counts)
    return counted(most, "image") + (" at most" if most < counts.samples_per_step else "")


def as_row(name, text):
    """A row of a plan: a name, and lines of text, which are broken where they are wider than the terminal."""
    width = min(100, shutil.get_terminal_size((100, 24)).columns) - len(MARGIN)
    words = {"break_long_words": False, "break_on_hyphens": False}  # paths and flags
    lines = []
    for line in text.split("\n"):
        lines += [line] if len(line) <= width else textwrap.wrap(line, width, **words)
    return f"  {name:<10} " + f"\n{MARGIN}".join(lines)


def describe_device(device):
    """What a device of PyTorch's is: which one, and how large."""
    if device.type == "cpu":
        number = torch.get_num_threads()
        # On a busy machine many wait for each other: a step may take a hundred times as long as by one.
        told = f"{counted(number, 'thread')}{' (OMP_NUM_THREADS sets fewer)' if number > 1 else ''}"
        told = f"CPU, {told}, {get_cpu_capability()}"
    elif is_cuda_available():
        told = f"{get_device_name(device)}, {get_device_properties(device).total_memory / 1e9:.3g} GB"
    else:
        told = device.type
    return f"{told}, by PyTorch {torch.__version__}"  # whose name says which GPUs it knows


@contextlib.contextmanager
def told_in_plan(texts):
    """Adds to `texts` what is printed meanwhile, as images are read, for a row of the plan; if that fails, and there
    will be no plan, it is printed at once."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            yield
    except BaseException:
        print(told.getvalue(), end="", flush=True)
        raise
    texts.append(told.getvalue())


def describe_kinds(images, repeats, prompt):
    """Lines on photos to train on: how often each is there, and how many have captions of their own, where others get
    the `prompt`."""
    lines, number = [], len(images) // repeats
    if repeats > 1:
        lines.append(f"{counted(number, 'photo')}, each {repeats:,} times")
    if prompt:
        num_own = sum(captions != [prompt] for captions in images.rows["captions"]) // repeats
        lines.append(f"{num_own:,} with captions of their own, {number - num_own:,} with --instance_prompt")
    return lines


def count_checkpoints(args, run):
    """How many checkpoints a run will have at once: the newest is there before the oldest goes."""
    steps = range(run.progress["global_step"] + 1, run.counts.last_step + 1)
    number = sum(step % args.checkpointing_steps == 0 or step == run.counts.last_step for step in steps)
    if args.checkpoints_total_limit:
        number = min(number, args.checkpoints_total_limit + 1 + args.keep_best)
    return number


def tell_disk(args, run, result_bytes):
    """What checkpoints and result will take of the disk; nothing if the size of the result is not known."""
    if result_bytes is None:
        return None
    number, one = count_checkpoints(args, run), checkpoint_bytes(run)
    free = shutil.disk_usage(existing_place(args.output_dir)).free
    checkpoints = "no checkpoint"
    if number:
        checkpoints = f"{counted(number, 'checkpoint', 'checkpoints at once')}: {tell_size(number * one)}"
    return f"{checkpoints}, result: {tell_size(result_bytes)}; {tell_size(free)} are free"


def tell_cost(counts, device, num_samples, seconds, num_steps, now):
    """Prints what was measured of a step of `num_samples`, which took so many seconds: the time of a step that has as
    many as the mean, and of `num_steps` from `now` on, and the peak of the memory so far."""
    rate = num_samples / seconds
    seconds = mean_samples_per_step(counts) / rate  # those at the end of an epoch, or of a bucket, may be short
    duration = datetime.timedelta(seconds=round(num_steps * seconds))
    print(
        f"  time       {seconds:.3g} s per step, {rate:.4g} images/s; "
        f"{counted(num_steps, 'step takes', 'steps take')} {duration}, until {now + duration:%Y-%m-%d %H:%M}"
    )
    print(f"  memory     {', '.join(peak_memory(device))} at most")


def peak_memory(device):
    """Lists the most memory that was taken so far, as far as it can be measured."""
    names = {"device_gb": "the device", "process_gb": "this process"}
    peaks = [f"{number:.3g} GB of {names[name]}" for name, number in peak_gigabytes(device).items()]
    return peaks or ["not measured here"]


def warn_of_disk(args, run):
    """Lists whether the checkpoints will not fit on the disk."""
    number = count_checkpoints(args, run)
    needed, free = number * checkpoint_bytes(run), shutil.disk_usage(existing_place(args.output_dir)).free
    if needed <= free:
        return []
    return [
        f"{counted(number, 'checkpoint takes', 'checkpoints take')} {needed / 1e9:.2g} GB, where {free / 1e9:.2g} are "
        "free; make room, or use a smaller --checkpoints_total_limit"
    ]


def warn_of_name(args):
    """Lists whether the base came from the Hub, though its name looks like that of a folder here, mistyped."""
    name = args.pretrained_model_name_or_path
    missing = missing_here(name)
    if not missing:
        return []
    return [f"--pretrained_model_name_or_path={name}: {missing}; it is the Hub's model of that name"]


def warn_of_start(args):
    """Lists whether there is nothing to resume."""
    if args.resume_from_checkpoint != "latest" or list_checkpoints(args.output_dir):
        return []
    return [f"--resume_from_checkpoint=latest: {args.output_dir} holds NO CHECKPOINT; this run starts from step 0"]


def warn_of_no_step(run):
    """Lists whether nothing is left to train of a run that is gone on with."""
    last_step = run.counts.last_step
    if run.progress["global_step"] < last_step:
        return []
    done = "the one step is" if last_step == 1 else f"all of {last_step:,} steps are"
    return [f"{done} done, and only the result is written again; raise --max_train_steps to train on"]


def warn_of_held_out(args, counts, num_held_out):
    """Lists whether no more images are left to train on than are held out."""
    if counts.num_images is None:
        return []
    number = counts.num_images // getattr(args, "repeats", 1)
    if num_held_out < number:
        return []
    told = f"leaves {number:,} to train on, no more than are held out; use fewer, or more images"
    return [f"--num_validation_samples={args.num_validation_samples}: {told}"]


def warn_of_warm_up(args, counts):
    """Lists whether the learning rate never arrives at what was asked for."""
    if args.lr_warmup_steps < counts.last_step:
        return []
    told = f"in {counted(counts.last_step, 'step')} the learning rate never arrives; use fewer"
    return [f"--lr_warmup_steps={args.lr_warmup_steps}: {told}"]


def warn_of_precision(accelerator):
    """Lists whether the device of a run in PyTorch has to emulate the precision that is asked for."""
    precision = accelerator.mixed_precision
    if accelerator.device.type == "cpu":
        is_quick = _is_avx512_bf16_supported() or _is_amx_tile_supported()
        # What others than Intel's and AMD's can, PyTorch does not tell.
        return [] if is_quick else warn_of_slow_bf16(precision, platform.machine() in ("x86_64", "AMD64"))
    if precision != "bf16" or not is_cuda_available() or is_bf16_supported(including_emulation=False):
        return []
    return ["bf16 is only emulated on this GPU, and slow; use --mixed_precision=fp16"]


def warn_of_slow_bf16(precision, is_known=False):
    """Lists whether a precision is slow on a CPU, or may be, unless it is known to have no instructions for it."""
    if precision != "bf16":
        return []
    if is_known:
        told = "bf16 is several times slower than float32 on this CPU, which lacks AVX512-BF16 and AMX"
    else:
        told = "bf16 may be slower than float32 on a CPU"
    return [f"{told}; use --mixed_precision=no"]


def checkpoint_bytes(run):
    """How many bytes the tensors of a checkpoint take, before the first step or later: weights, the optimizer's
    moments, the average."""
    if (run.settings.get("sharding") or "").startswith(
        "ZeRO"
    ):  # weights, once more in float32 in the optimizer, and its two moments
        total = sum(16 * numel_of(parameter) for parameter in run.weights.parameters)
        return total + array_bytes(run.state["ema"].shadow_params if "ema" in run.state else [])
    total = array_bytes(run.weights.parameters) if run.weights else 0
    for name, part in run.state.items():
        if name == "optimizer" and hasattr(part, "param_groups"):  # whose moments are made in the first step
            for group in part.param_groups:
                for parameter in group["params"]:
                    total += moment_bytes(parameter, part.state.get(parameter, {}), run.settings["optimizer"])
        else:
            total += array_bytes(part.state_dict() if hasattr(part, "state_dict") else part)
    return total


def moment_bytes(parameter, state, optimizer):
    """How many bytes the state of an optimizer, by name, takes for a parameter; `state` is what is there of it."""
    size = parameter.numel()
    if optimizer == "adamw8bit":
        # A byte for each moment, and for every 256 a scale; but small tensors, and embeddings, are left in 32 bits.
        is_whole = size < 4096 or ("state1" in state and state["state1"].dtype == torch.float32)
        return 8 * size if is_whole else 2 * (size + 4 * math.ceil(size / 256))
    if optimizer == "adafactor" and parameter.dim() >= 2:  # means over rows and over columns
        return 4 * (size // parameter.shape[-1] + size // parameter.shape[-2])
    if optimizer == "adafactor":
        return 4 * size
    if optimizer == "prodigy":  # two moments, a sum, and the start, unless that was zero
        was_zero = state["p0"].dim() == 0 if "p0" in state else not parameter.any()
        return 4 * size * (3 if was_zero else 4)
    return 2 * parameter.nbytes


def tell_size(size):
    """A number of bytes for people, in units of 1000."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} KB"


def array_bytes(part):
    """How many bytes the tensors or arrays take in a nested structure."""
    if isinstance(part, dict):
        return sum(array_bytes(value) for value in part.values())
    if isinstance(part, list | tuple):
        return sum(array_bytes(value) for value in part)
    return getattr(part, "nbytes", 0)
