"""Train in PyTorch: the accelerator, the state of a run, and the loop over its steps."""

import contextlib
import ctypes
import dataclasses
import datetime
import functools
import itertools
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
    get_int_from_env,
    parse_flag_from_env,
    send_to_device,
)
from diffusers.utils import is_xformers_available
from tqdm.auto import tqdm

from sdtune.batches import find_largest_step, micro_batches, step_sizes
from sdtune.buckets import warn_of_short_steps
from sdtune.checkpoints import (
    find_checkpoint,
    keep_best,
    new_run,
    note_step,
    resume,
    save_checkpoint,
    write_torch_state,
)
from sdtune.errors import InputError
from sdtune.failures import leave, told_in_a_line
from sdtune.models import DTYPES
from sdtune.optimization import (
    OPTIMIZERS,
    make_average,
    make_schedule,
    optimizer_of,
    step_average,
    warn_of_rate,
)
from sdtune.output import chosen_tracker, log_losses, prepare_output
from sdtune.plan import print_plan, tell_cost, warn_of_precision
from sdtune.randomness import DROPOUT, random_numbers
from sdtune.signals import is_asked, on_signals
from sdtune.streaming import stream_from, without_left_out
from sdtune.validation import LookGivenUp, steps_between_looks

# Of glibc's `mallopt` (malloc.h): parameters, with the largest values that serve.
FREED_MEMORY_IS_KEPT = {-1: 2**31 - 1, -3: 2**30}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, in bytes
MINUTES = datetime.timedelta(minutes=10)  # for what all processes do at the same time
A_DAY = datetime.timedelta(days=1)
# Flags that may differ between machines: what they name is compared in their place, or has no effect on others.
OWN_TO_A_MACHINE = set(
    """
    cache_dir class_data_dir config dataloader_num_workers dataset_name hub_token init_lora_weights instance_data_dir
    local_rank logging_dir output_dir pretrained_model_name_or_path single_file_config tokenizer_name train_data_dir
    """.split()
)


@dataclasses.dataclass
class Work:
    """What the steps of a run are made of."""

    loader: torch.utils.data.DataLoader  # of this process's batches, from the run's next step on
    models: list  # as accelerate prepared them, whose gradients processes share
    training_loss: Callable  # (batch): the loss of each sample (batch,), through `models`
    make_gradients: Callable  # (args, accelerator, run, work, passes): a step's loss, and the norm of its gradient


def check_hardware(args):
    """Lists what this machine, or accelerate's config, cannot do."""
    problems = []
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if args.allow_tf32 and on_cpu:
        problems.append("--allow_tf32=True: needs an NVIDIA GPU; drop this")
    if args.enable_xformers_memory_efficient_attention and (on_cpu or not is_xformers_available()):
        problems.append(
            "--enable_xformers_memory_efficient_attention=True: needs a GPU and xformers; run "
            "`pip install -r requirements_xformers.txt` there, or drop this"
        )
    if args.compile and on_cpu and not shutil.which(os.environ.get("CXX", "g++")):
        problems.append("--compile=True: needs a C++ compiler; install g++, or drop this")
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    told = f"--mixed_precision={precision} (or accelerate's config)"
    if precision not in DTYPES:
        problems.append(f"{told}: must be no, fp16 or bf16; use bf16")
    elif precision == "fp16" and on_cpu:
        problems.append(f"{told}: a CPU cannot train in fp16; use --mixed_precision=no")
    return problems


def check_environment(args):
    """Lists what accelerate would take from its variables without obeying it as its users expect."""
    problems = []
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if asked not in ("1", str(args.gradient_accumulation_steps)):
        problems.append(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={asked} (or accelerate's config): give "
            f"--gradient_accumulation_steps={asked} to this script"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        problems.append(
            f"ACCELERATE_DYNAMO_BACKEND={os.environ['ACCELERATE_DYNAMO_BACKEND']} (or accelerate's config): is not "
            "obeyed here; use no, and --compile"
        )
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            problems.append(f"accelerate's config asks for {name}, which cannot be used; choose GPUs alone")
    return problems


def make_accelerator(args):
    """The accelerator, whose processes have agreed on the flags. They wait for each other for minutes, but for a day
    in `wait_for_everyone`: there one of them draws, reads or saves alone. Raises `InputError`."""
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32  # of convolutions, for which torch's default is True
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=chosen_tracker(args),
        project_dir=Path(args.output_dir, args.logging_dir),
        # The passes of a step are ours to count: accelerate would divide gradients by what its variable says.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=MINUTES),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else every gradient is there twice
        ],
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.num_processes > 1:
        patient = torch.distributed.new_group(timeout=A_DAY, backend="gloo")
        accelerator.wait_for_everyone = functools.partial(torch.distributed.barrier, patient)
    flags = {name: value for name, value in vars(args).items() if name not in OWN_TO_A_MACHINE}
    check_agreement(accelerator, flags)
    return accelerator


def keep_freed_memory():
    """Makes glibc keep what a step frees for the next one. It would give large tensors back to the system, which
    hands them out again page by page, filled with zeros: a tenth of a CPU's time. Other C libraries are left alone."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # there is no such function
        for parameter, value in FREED_MEMORY_IS_KEPT.items():
            ctypes.CDLL(None).mallopt(parameter, value)


def check_agreement(accelerator, values):
    """Compares `values` of all processes, by name: any that differ would have them wait for each other for ever.
    Raises `InputError` in all of them, which names the difference."""
    here = {"host": socket.gethostname(), **values}
    everywhere = gather_object([here])
    differences = []
    for name in values:
        for rank, there in enumerate(everywhere):
            if there[name] != everywhere[0][name]:
                differences.append(
                    f"{name}: {everywhere[0][name]} on rank 0 ({everywhere[0]['host']}), {there[name]} on rank {rank} "
                    f"({there['host']})"
                )
                break
    if differences:
        remedy = "all need the same flags, the same data and one --output_dir that they share"
        raise InputError("\n  ".join([f"the processes do not agree; {remedy}", *differences]))


def agree_on_data(accelerator, fingerprints):
    """Waits until all processes have read their images, and compares what they have. Raises `InputError`."""
    accelerator.wait_for_everyone()
    check_agreement(accelerator, fingerprints)


def make_state(args, accelerator, optimizer, last_step):
    """All that a checkpoint holds beside weights, by name: optimizer, lr_scheduler, maybe ema and scaler."""
    lr_scheduler = make_schedule(args, optimizer, last_step)
    state = {"optimizer": accelerator.prepare(optimizer), "lr_scheduler": lr_scheduler}
    if args.use_ema:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state["ema"] = make_average(args, parameters)
        if args.offload_ema:  # at once: the first step needs all memory that there is
            state["ema"].to("cpu")
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler
    return state


def start_run(args, accelerator, counts, state, fingerprints, weights, free, fixed):
    """A run at its start, or where the checkpoint to resume from ended, the same in all processes; `free` and `fixed`
    name settings that may and that cannot differ from the checkpoint's. Raises `InputError`."""
    masks = split_of_step(args, accelerator) if has_dropout(weights.models) else None
    fingerprints = {**fingerprints, "dropout_masks": masks, "optimizer": optimizer_of(args)}
    run = new_run(args, counts, state, accelerator.mixed_precision, fingerprints, weights)
    if checkpoint := find_checkpoint(run.output_dir, args.resume_from_checkpoint):
        resume(run, checkpoint, free, fixed)
    check_agreement(accelerator, {"global_step": run.progress["global_step"]})
    return run


def has_dropout(models):
    """Whether layers of models in training, by name, drop a part of their inputs."""
    modules = [module for model in models.values() for module in model.modules()]
    shares = [module.p for module in modules if isinstance(module, torch.nn.Dropout)]
    others = [vars(module).get("dropout") for module in modules]  # of transformers' attention
    shares += [share for share in others if isinstance(share, float)]
    return any(share > 0 for share in shares)


def split_of_step(args, accelerator):
    """How a step is split: masks of dropout are drawn by pass and process, so that another split draws others."""
    passes = f"{args.train_batch_size} a pass x {args.gradient_accumulation_steps} passes"
    return f"{passes} x {accelerator.num_processes} processes"


def tell_plan(args, accelerator, run, num_held_out, about):
    """Prints what will be done. `about` says what the script knows: which models are `trained`, which are `frozen`,
    `result_bytes`, `buckets` (lines on the sizes of images), and of the `cache` a text, or None, and warnings."""
    parameters, (about_cache, cache_warnings) = run.weights.parameters, about["cache"]
    num_trained = sum(parameter.numel() for parameter in parameters)
    warnings = warn_of_precision(accelerator) + warn_of_rate(args, run.settings["peak_learning_rate"])
    about = {
        **about,
        "images": "",
        "devices": f"{accelerator.num_processes} ranks",
        "weights": str(parameters[0].dtype).removeprefix("torch."),
        "optimizer": OPTIMIZERS[optimizer_of(args)],
        "cache": about_cache,
        "warnings": warnings + warn_of_short_steps(run.counts) + cache_warnings,
    }
    print_plan(args, run, num_held_out, num_trained, about)


def start_output(args, accelerator, run):
    """Makes the output folder."""
    if accelerator.is_main_process:
        prepare_output(run, args.overwrite_output_dir)
    accelerator.wait_for_everyone()


def batches_of(args, accelerator, run):
    """This process's lists of (epoch, index, weight), from the run's next step on."""
    first_step = first_step_of(args, run)
    return micro_batches(run.counts, accelerator.num_processes, accelerator.process_index, args.seed, first_step)


def first_step_of(args, run):
    """The run's next step; in a dry run with buckets the largest of the next ones, which decides what fits."""
    first_step = run.progress["global_step"]
    if args.dry_run and run.counts.buckets is not None:
        return find_largest_step(run.counts, args.seed, first_step)
    return first_step


def choose_num_workers(wanted):
    """How many processes load images for this one: as many as are wanted, or for None one per core of its share of the
    machine, but for one that trains, and at most 4. On two cores they would only be in each other's way."""
    if wanted is not None:
        return wanted
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_cores = allowed // get_int_from_env(["LOCAL_WORLD_SIZE"], 1)
    return min(4, num_cores - 1) if num_cores > 2 else 0


def make_loader(args, accelerator, samples, batches):
    """Loads the samples of `batches`, lists of what `samples` takes; or the batches of a stream, for None."""
    return torch.utils.data.DataLoader(
        samples,
        **({"batch_size": None} if batches is None else {"batch_sampler": batches}),
        num_workers=choose_num_workers(args.dataloader_num_workers),
        pin_memory=accelerator.device.type != "cpu",
        worker_init_fn=functools.partial(on_signals, signal.SIG_IGN),
    )


def load_batches(args, accelerator, run, images, left_out):
    """Loads this process's batches of images, which may be a stream, from the run's next step on. What cannot be used
    of a stream is noted in `left_out`."""
    if not args.streaming:
        return make_loader(args, accelerator, images, batches_of(args, accelerator, run))
    rank, num_ranks, step = accelerator.process_index, accelerator.num_processes, run.progress["global_step"]
    if step:
        accelerator.print(f"The stream is read again, and not decoded, up to step {step:,}.", flush=True)
    stream = stream_from(images, args, rank, num_ranks, args.train_batch_size, step)
    return without_left_out(make_loader(args, accelerator, stream, None), left_out)


def train_steps(args, accelerator, run, stop, work, look):
    """Trains to the last step. `look(is_asked)` is called before training and every --validation_steps; it returns the
    mean held-out loss or None, or raises `LookGivenUp` when `is_asked()`.

    Ends the process with status 128 + signal when `stop` asks for it, 1 after too many losses that are not finite.
    """
    counts, lr_scheduler = run.counts, run.state["lr_scheduler"]
    first_step, validation_steps = run.progress["global_step"], steps_between_looks(args, counts)
    # A run that was stopped had not yet looked at the step that it goes on from.
    if first_step % validation_steps == 0 or first_step == counts.last_step:
        look_and_keep(args, accelerator, run, stop, look)
    steps = passes_by_step(args, run, work.loader)
    bar = tqdm(
        range(first_step, counts.last_step),
        initial=first_step,
        total=counts.last_step,
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    for step in bar:
        started = time.perf_counter()
        num_samples, passes = next(steps)
        loss, grad_norm, is_broken, stop_now = take_step(args, accelerator, run, work, passes, is_asked(stop))
        seconds = time.perf_counter() - started
        done = run.progress["global_step"]
        if args.compile and step == first_step:
            accelerator.print(f"\nCompiled: the first step took {seconds:.1f} s.")
        if step == first_step + 2 and accelerator.is_main_process and not is_broken:
            print()
            left = counts.last_step - done
            tell_cost(counts, accelerator.device, num_samples, seconds, left, datetime.datetime.now())

        # Log
        if not is_broken:
            images_per_second = num_samples / seconds
            bar.set_postfix(loss=f"{loss:.4f}", images_per_second=f"{images_per_second:.1f}", refresh=False)
            if done % args.logging_steps == 0 or done == counts.last_step:
                norm = None if grad_norm is None else grad_norm.item()
                log_losses(accelerator, run, lr_scheduler.get_last_lr()[0], norm, images_per_second)

        # Save and look
        if stop_now or is_broken or done % args.checkpointing_steps == 0 or done == counts.last_step:
            if accelerator.is_main_process and run.is_whole:
                # After a broken step none is removed: the last good one may be an older one.
                save_checkpoint(run, write_torch_state, None if is_broken else args.checkpoints_total_limit)
            accelerator.wait_for_everyone()
        if stop_now or is_broken:
            leave(accelerator, run, is_broken, stop.received)
        if done % validation_steps == 0 or done == counts.last_step:
            look_and_keep(args, accelerator, run, stop, look)


def try_steps(args, accelerator, run, work):
    """Takes two steps of the run, whose effect nobody keeps, and prints what the second one costs. Nothing is written.
    Ends the process with status 1 if that fails."""
    num_steps, seconds = run.counts.last_step - run.progress["global_step"], None
    with told_in_a_line(args, accelerator, "The trial"):
        steps = passes_by_step(args, run, work.loader)
        for step_samples, passes in itertools.islice(steps, 2):
            started = time.perf_counter()
            _, _, is_broken, _ = take_step(args, accelerator, run, work, passes, False)
            if is_broken:
                raise InputError("a loss or gradient that is not finite; use a lower --learning_rate or bf16")
            if accelerator.device.type != "cpu":
                torch.accelerator.synchronize()
            num_samples, seconds = step_samples, time.perf_counter() - started
    if not num_steps:
        accelerator.print("  time       no step is left; --max_train_steps says how many there are")
    if seconds and accelerator.is_main_process:
        tell_cost(run.counts, accelerator.device, num_samples, seconds, num_steps, datetime.datetime.now())
        if (args.cache_latents or args.cache_text_embeddings) and not work.loader.dataset.cache:
            print("  cache      not used by these two steps; a run takes less time and memory")


def passes_by_step(args, run, loader):
    """Yields of each step that is left how many samples it has, and its passes: pairs of a batch, which is loaded when
    it is asked for, and of whether it is the last one."""
    batches = iter(loader)
    for num_samples, num_passes in step_sizes(run.counts, args.seed, first_step_of(args, run)):
        is_last = [False] * (num_passes - 1) + [True]
        yield num_samples, zip(itertools.islice(batches, num_passes), is_last, strict=True)


def take_step(args, accelerator, run, work, passes, is_stop_asked):
    """Takes one optimizer step. Returns its loss; the norm of its gradient, or None if one of the two is not
    finite; whether it was broken: one such step too many in a row, of which nothing is noted; and whether a stop is
    asked for in some process."""
    optimizer, lr_scheduler, step = run.state["optimizer"], run.state["lr_scheduler"], run.progress["global_step"]
    # Dropout layers alone use torch's own generator.
    torch.manual_seed(random_numbers(args.seed, DROPOUT, step, accelerator.process_index).integers(2**32))
    step_loss, grad_norm = work.make_gradients(args, accelerator, run, work, passes)

    # Optimizer step, unless a loss or a gradient is not finite in some process.
    loss, num_not_finite, stop_now = exchange(accelerator, step_loss, grad_norm, is_stop_asked)
    is_finite = num_not_finite == 0
    is_broken = not is_finite and run.progress["nan_steps"] >= max_nan_steps(args, accelerator)
    if not is_broken:
        run.is_whole = False
        if is_finite or accelerator.scaler is not None:  # which skips the step, and scales losses less from now on
            optimizer.step()
        optimizer.zero_grad()
        if is_finite:
            lr_scheduler.step()
            update_average(args, run, run.weights.parameters)
        note_step(run, step, loss, is_finite)
        run.is_whole = True
    return loss, grad_norm if is_finite else None, is_broken, stop_now


def add_up_gradients(args, accelerator, run, work, passes):
    """Forward and backward: the passes of a step add up their gradients, which processes share in the last one.
    Returns the step's loss in this process, and the norm of its gradient, which is clipped then."""
    step_loss = torch.zeros((), device=accelerator.device)
    for batch, is_last in passes:
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        with without_sync(accelerator, [] if is_last else work.models):
            loss = (work.training_loss(batch) * batch["weight"]).sum()
            accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
        step_loss += loss.detach()
    return step_loss, accelerator.clip_grad_norm_(run.weights.parameters, args.max_grad_norm)


def look_and_keep(args, accelerator, run, stop, look):
    """Looks at the run, and keeps its checkpoint if it is the best one so far and that is asked for. Ends the process
    after a checkpoint, with status 128 + signal, if `stop` asks for it meanwhile: who resumes looks again."""
    try:
        held_out_loss = look(functools.partial(is_asked, stop))
    except LookGivenUp:
        if accelerator.is_main_process:
            save_checkpoint(run, write_torch_state, args.checkpoints_total_limit)
        accelerator.wait_for_everyone()
        leave(accelerator, run, False, stop.received)
    if args.keep_best and held_out_loss is not None and accelerator.is_main_process:
        keep_best(run, held_out_loss, write_torch_state, args.checkpoints_total_limit)
    accelerator.wait_for_everyone()


def max_nan_steps(args, accelerator):
    """How many steps in a row may be skipped: a scaler of fp16 begins too high, and finds its scale by such steps."""
    if args.max_nan_steps is not None:
        return args.max_nan_steps
    return 5 if accelerator.mixed_precision == "fp16" else 0


@contextlib.contextmanager
def without_sync(accelerator, models):
    """Leaves the gradients of `models` in each process, to be shared later."""
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(accelerator.no_sync(model))
        yield


def exchange(accelerator, loss, grad_norm, stop):
    """The step's one exchange between processes: the sum of their losses, and in how many of them loss or gradient is
    not finite, and a stop is asked for."""
    not_finite = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
    numbers = torch.stack([loss, not_finite.float(), torch.full_like(loss, stop)])
    return accelerator.reduce(numbers, reduction="sum").tolist()


def update_average(args, run, parameters):
    """Moves the average of the weights, if there is one, towards the parameters."""
    ema = run.state.get("ema")
    if ema:
        step_average(ema, parameters, args.foreach_ema, args.offload_ema)


def use_average(run):
    """Puts the averaged weights, if there are any, into the models, in float32: those are the result, but no state to
    go on from."""
    run.is_whole = False
    for parameter in run.weights.parameters:  # which may be in bfloat16, and lose what an average is for
        parameter.data = parameter.data.float()
    if "ema" in run.state:
        run.state["ema"].copy_to(run.weights.parameters)
