"""Train in PyTorch: the accelerator, the state of a run, and the loop over its steps."""

import contextlib
import ctypes
import dataclasses
import datetime
import functools
import itertools
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    get_int_from_env,
    parse_flag_from_env,
    send_to_device,
)
from tqdm.auto import tqdm

from sdtune.arguments import changed_flags
from sdtune.batches import find_largest_step, micro_batches, step_sizes
from sdtune.buckets import warn_of_short_steps
from sdtune.checkpoints import (
    Weights,
    find_checkpoint,
    mean_of_usable,
    name_of_choice,
    new_run,
    note_passed_over,
    note_step,
    take_settings,
    tell_difference,
    tell_skipped,
)
from sdtune.deepspeed import (
    check_deepspeed,
    choose_backend,
    make_deepspeed_accelerator,
    name_of_zero,
    set_up_engine,
    step_by_engine,
    uses_deepspeed,
)
from sdtune.errors import InputError, counted, gathered, raise_problems
from sdtune.failures import leave, told_in_a_line
from sdtune.models import DTYPES, numel_of
from sdtune.optimization import (
    OPTIMIZERS,
    make_average,
    make_schedule,
    optimizer_of,
    step_average,
    warn_of_rate,
)
from sdtune.output import chosen_tracker, leave_token, log_losses, prepare_output, remove_token, sees_token
from sdtune.plan import describe_device, print_plan, tell_cost, warn_of_precision
from sdtune.progress import start_bar, tell_step
from sdtune.randomness import DROPOUT, random_numbers
from sdtune.sharding import check_sharding, held_here, set_up_sharding, skeleton_of, whole_tensor
from sdtune.signals import ended_by_signals, ignore_signals, is_asked, take_save_requests
from sdtune.states import keep_best_together, read_checkpoint, register_weights, save_together
from sdtune.streaming import stream_from, without_left_out
from sdtune.validation import LookGivenUp, steps_between_looks

# Of glibc's `mallopt` (malloc.h): parameters, with the largest values that serve.
FREED_MEMORY_IS_KEPT = {-1: 2**31 - 1, -3: 2**30}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, in bytes
MINUTES = datetime.timedelta(minutes=10)  # for what all processes do at the same time
A_DAY = datetime.timedelta(days=1)
PATIENCE_WITH_FOLDERS = 75  # seconds: NFS may keep for 60 that a file is not there
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
    training_loss: Callable  # (batch): the loss of each sample (batch,), through the models that are trained
    make_gradients: Callable  # (args, accelerator, run, work, passes): a step's loss, and the norm of its gradient


def check_hardware(args):
    """Lists what this machine, or accelerate's config, cannot do."""
    problems = []
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if args.allow_tf32 and on_cpu:
        problems.append("--allow_tf32=True: needs an NVIDIA GPU; drop this")
    if args.enable_xformers_memory_efficient_attention and (on_cpu or not diffusers.utils.is_xformers_available()):
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
    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            problems.append(f"accelerate's config asks for {name}, which cannot be used; choose GPUs alone")
    return problems + check_sharding(args) + check_deepspeed(args)


def make_accelerator(args):
    """The accelerator, whose processes have agreed on the flags. They wait for each other for minutes, but for a day
    in `wait_for_everyone`: there one of them draws, reads or saves alone. Raises `InputError`."""
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32  # of convolutions, for which torch's default is True
    make = functools.partial(Accelerator, mixed_precision=args.mixed_precision)
    if uses_deepspeed():
        make = functools.partial(make_deepspeed_accelerator, args)
    is_alone = get_int_from_env(["WORLD_SIZE"], 1) == 1
    with contextlib.nullcontext() if is_alone else ended_by_signals():  # until the other processes come
        accelerator = make(
            log_with=chosen_tracker(args),
            project_dir=Path(args.output_dir, args.logging_dir),
            # The passes of a step are ours to count: accelerate would divide gradients by what its variable says.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                InitProcessGroupKwargs(choose_backend(), timeout=MINUTES),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else every gradient is there twice
            ],
        )
    check_company(accelerator)
    set_up_sharding(accelerator)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.num_processes > 1:
        patient = torch.distributed.new_group(timeout=A_DAY, backend="gloo")
        accelerator.wait_for_everyone = functools.partial(torch.distributed.barrier, patient)
    flags = {name: value for name, value in vars(args).items() if name not in OWN_TO_A_MACHINE}
    check_agreement(accelerator, flags)
    if accelerator.num_processes > 1 and not args.dry_run:  # which writes nothing
        check_shared_output(accelerator, args.output_dir)
    return accelerator


def check_company(accelerator):
    """Raises `InputError` where a launcher started several processes, but accelerate leaves each alone, as it does
    without a GPU: all would train the same, and write into one output folder."""
    number = get_int_from_env(["WORLD_SIZE"], 1)
    if number == 1 or accelerator.num_processes > 1:
        return
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            f"WORLD_SIZE={number}, but LOCAL_RANK is not set, and each process would train alone; start them by "
            "`accelerate launch` or torchrun, or unset WORLD_SIZE"
        )
    raise InputError(
        f"{number} processes were started (WORLD_SIZE), but PyTorch {torch.__version__} finds no GPUs for them, and "
        "each would train alone; use `python` for one process, install a PyTorch that knows your GPUs, or set "
        "ACCELERATE_USE_CPU=true to share CPUs"
    )


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
                places = [f"on rank 0 ({everywhere[0]['host']})", f"on rank {rank} ({there['host']})"]
                differences.append(tell_difference(name, everywhere[0][name], there[name], *places))
                break
    if differences:
        remedy = "all need the same flags, the same data and one --output_dir that they share"
        raise InputError("\n  ".join([f"the processes do not agree; {remedy}", *differences]))


def check_shared_output(accelerator, output_dir):
    """Asks whether all processes see one output folder: a machine with a folder of its own would not find the
    checkpoint to go on from, nor keep one where the others look for it. Raises `InputError` in all of them."""
    token, problems = secrets.token_hex(16), []
    if accelerator.is_main_process:
        with gathered(problems):
            leave_token(output_dir, token)
    token, problems = broadcast_object_list([token, problems])  # the first process's, once it has left the token
    raise_problems(problems)
    here = {
        "host": socket.gethostname(),
        "folder": Path(output_dir).resolve(),
        "sees": accelerator.is_main_process or sees_token(output_dir, token, PATIENCE_WITH_FOLDERS),
    }
    everywhere = gather_object([here])
    if accelerator.is_main_process:
        remove_token(output_dir)
    first, blind = everywhere[0], [rank for rank, there in enumerate(everywhere) if not there["sees"]]
    if blind:
        there, number = everywhere[blind[0]], f"{len(blind)} of {counted(len(everywhere), 'process', 'processes')}"
        raise InputError(
            f"--output_dir={output_dir}: {number} {'does' if len(blind) == 1 else 'do'} not see what rank 0 writes "
            f"to {first['folder']} on {first['host']}, such as rank {blind[0]}, which looks into {there['folder']} on "
            f"{there['host']}; name one folder that all machines share, by its whole path"
        )


def agree_on_data(accelerator, fingerprints):
    """Waits until all processes have read their images, and compares what they have. Raises `InputError`."""
    accelerator.wait_for_everyone()
    check_agreement(accelerator, fingerprints)


def prepare(accelerator, models, optimizer, write, read):
    """Prepares models, by name, and their optimizer for the accelerator: their passes are autocast then. Returns the
    weights that are trained, with `write` and `read` as `Weights` has them, and the optimizer."""
    skeletons = {name: skeleton_of(model) for name, model in models.items()} if accelerator.is_fsdp2 else {}
    # In one call: an optimizer has to get to know the shards of its weights.
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    *prepared, optimizer = accelerator.prepare(*models.values(), optimizer)
    if accelerator.is_fsdp2:  # which autocasts nothing
        for model in prepared:
            model.forward = accelerator.autocast()(model.forward)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if uses_deepspeed():  # whose optimizer has other tensors
        set_up_engine(*prepared)
        parameters = given
    prepared = dict(zip(models, prepared, strict=True))
    return Weights(models, prepared, parameters, write, read, skeletons), optimizer


def make_state(args, accelerator, optimizer, weights, last_step):
    """All that a checkpoint holds beside weights, by name: optimizer, lr_scheduler, maybe ema and scaler."""
    lr_scheduler = make_schedule(args, optimizer, last_step)
    state = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
    if args.use_ema:
        state["ema"] = make_average(args, held_here(weights.parameters))
        if args.offload_ema:  # at once: the first step needs all memory that there is
            state["ema"].to("cpu")
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler
    return state


def start_run(args, accelerator, counts, state, fingerprints, weights, free, fixed):
    """A run at its start, or where the checkpoint to resume from ended, the same in all processes; `free` and `fixed`
    name settings that may and that cannot differ from the checkpoint's. Raises `InputError`."""
    masks = split_of_step(args, accelerator) if has_dropout(weights.models) else None
    sharding = "FSDP2" if accelerator.is_fsdp2 else name_of_zero(accelerator)
    fingerprints = {**fingerprints, "dropout_masks": masks, "optimizer": optimizer_of(args), "sharding": sharding}
    run = new_run(args, counts, state, accelerator.mixed_precision, fingerprints, weights)
    register_weights(accelerator, run)
    checkpoint, own = choose_checkpoint(accelerator, run, args.resume_from_checkpoint)
    run.settings |= own
    if checkpoint:
        with raised_together(accelerator):  # before they read together, which none of them could do alone
            take_settings(run, checkpoint, free, fixed)
        check_agreement(accelerator, {"global_step": run.progress["global_step"]})
        with told_in_a_line(args, accelerator, "The resume"):
            read_checkpoint(accelerator, run, checkpoint)
    return run


def choose_checkpoint(accelerator, run, wanted):
    """The checkpoint that the first process goes on from, or None, as each process finds it; and of the first one the
    settings that are a machine's own, which are those in the checkpoint. Raises `InputError` in all of them."""
    name, problems = None, []
    if accelerator.is_main_process:
        with gathered(problems):
            name = name_of_choice(run.output_dir, wanted)
    accelerator.wait_for_everyone()
    own = {flag: run.settings[flag] for flag in OWN_TO_A_MACHINE & run.settings.keys()}
    name, problems, own = broadcast_object_list([name, problems, own])
    raise_problems(problems)
    checkpoint = name and find_checkpoint(run.output_dir, name)
    if checkpoint:
        is_seen = (checkpoint / "progress.json").is_file()
        check_agreement(accelerator, {checkpoint.name: "seen" if is_seen else "not seen"})
    return checkpoint, own


@contextlib.contextmanager
def raised_together(accelerator):
    """Raises an `InputError` of one process in all of them, which must not exchange anything in between: who fails
    would exchange its problems meanwhile."""
    problems = []
    with gathered(problems):
        yield
    for found in gather_object([problems]):
        raise_problems(found)


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
    num_trained = sum(numel_of(parameter) for parameter in parameters)
    rates = run.state["lr_scheduler"].base_lrs  # the UNet's first
    warnings = warn_of_precision(accelerator) + warn_of_rate(args, run.settings["peak_learning_rate"])
    about = {
        **about,
        "device": describe_device(accelerator.device),
        "devices": counted(accelerator.num_processes, "rank"),
        "weights": str(parameters[0].dtype).removeprefix("torch."),
        "optimizer": OPTIMIZERS[optimizer_of(args)],
        "other_rate": f", text encoder at {rates[-1]:g}" if rates[-1] != rates[0] else "",
        "cache": about_cache,
        "warnings": warnings + warn_of_short_steps(run.counts) + cache_warnings,
    }
    print_plan(args, run, num_held_out, num_trained, about)


def start_output(args, accelerator, run, parser):
    """Makes the output folder; `parser` knows the defaults of the flags."""
    if accelerator.is_main_process:
        prepare_output(run, args.overwrite_output_dir, changed_flags(parser, args))
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
        worker_init_fn=ignore_signals,
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
    bar, recent = start_bar(run, accelerator.is_local_main_process)
    for step in bar:
        started = time.perf_counter()
        num_samples, passes = next(steps)
        requests = is_asked(stop), take_save_requests(stop)
        loss, grad_norm, is_broken, (stop_now, save_now) = take_step(args, accelerator, run, work, passes, requests)
        seconds = time.perf_counter() - started
        done = run.progress["global_step"]
        if args.compile and step == first_step:
            tqdm.write(f"Compiled: the first step took {seconds:.1f} s.")
        if step == first_step + 2 and accelerator.is_main_process and not is_broken:
            left = counts.last_step - done
            with tqdm.external_write_mode():  # above the bar
                tell_cost(counts, accelerator.device, num_samples, seconds, left, datetime.datetime.now())

        # Log
        if not is_broken:
            images_per_second = num_samples / seconds
            recent.append((loss, num_samples, None if step == first_step else seconds))
            tell_step(args, bar, run, accelerator.device, recent)
            if done % args.logging_steps == 0 or done == counts.last_step:
                norm = None if grad_norm is None else grad_norm.item()
                log_losses(accelerator, run, lr_scheduler.get_last_lr()[0], norm, images_per_second)

        # Save and look
        is_due = is_broken or stop_now or save_now or done % args.checkpointing_steps == 0 or done == counts.last_step
        if is_due and run.is_whole:
            # After a broken step none is removed: the last good one may be an older one.
            save_together(accelerator, run, None if is_broken else args.checkpoints_total_limit)
        if stop_now or is_broken:
            leave(accelerator, run, is_broken, stop.received)
        if done % validation_steps == 0 or done == counts.last_step:
            look_and_keep(args, accelerator, run, stop, look)
    tell_skipped(run)


def try_steps(args, accelerator, run, work):
    """Takes two steps of the run, whose effect nobody keeps, and prints what the second one costs. Nothing is written.
    Ends the process with status 1 if that fails."""
    num_steps, seconds = run.counts.last_step - run.progress["global_step"], None
    with told_in_a_line(args, accelerator, "The trial"):
        steps = passes_by_step(args, run, work.loader)
        for step_samples, passes in itertools.islice(steps, 2):
            started = time.perf_counter()
            _, _, is_broken, _ = take_step(args, accelerator, run, work, passes, [])
            if is_broken:
                raise InputError("a loss or gradient that is not finite; use a lower --learning_rate or bf16")
            if accelerator.device.type != "cpu":
                torch.accelerator.synchronize()
            num_samples, seconds = step_samples, time.perf_counter() - started
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


def take_step(args, accelerator, run, work, passes, requests):
    """Takes one optimizer step. Returns its loss; the norm of its gradient, or None if one of the two is not
    finite; whether it was broken: one such step too many in a row, of which nothing is noted; and which of `requests`
    there are in some process."""
    optimizer, lr_scheduler, step = run.state["optimizer"], run.state["lr_scheduler"], run.progress["global_step"]
    # Dropout layers alone use torch's own generator.
    torch.manual_seed(random_numbers(args.seed, DROPOUT, step, accelerator.process_index).integers(2**32))
    make_gradients = step_by_engine if uses_deepspeed() else work.make_gradients
    weights = []
    step_loss, grad_norm = make_gradients(args, accelerator, run, work, with_weights_noted(passes, weights))

    # Optimizer step, unless a loss or a gradient is not finite in some process.
    weight = sum(weights)
    loss, weight, num_not_finite, *requests = exchange(accelerator, step_loss, weight, grad_norm, requests)
    if weight == 0:  # nothing of a stream could be used
        pass_over(accelerator, run, step)
        return math.nan, None, False, requests
    is_finite = num_not_finite == 0
    is_broken = not is_finite and run.progress["nan_steps"] >= max_nan_steps(args, accelerator)
    if not is_broken:
        run.is_whole = False
        if is_finite or accelerator.scaler is not None:  # which skips the step, and scales losses less from now on
            optimizer.step()  # DeepSpeed's engine has done it
        optimizer.zero_grad()
        if is_finite:
            lr_scheduler.step()
            update_average(args, run, held_here(run.weights.parameters))
        loss = mean_of_usable(loss, weight)
        note_step(run, step, loss, is_finite)
        run.is_whole = True
    return loss, grad_norm if is_finite else None, is_broken, requests


def with_weights_noted(passes, weights):
    """Yields the passes of a step, and adds the weight of each to `weights`, while the batch is still on the host."""
    for batch, is_last in passes:
        weights.append(batch["weight"].sum().item())
        yield batch, is_last


def pass_over(accelerator, run, step):
    """Notes that a step is done of which no sample had weight: it leaves weights, moments and average alone."""
    run.is_whole = False
    if accelerator.scaler is not None:  # it wants to be told that the gradients, which it unscaled, are done with
        accelerator.scaler.update()
    run.state["optimizer"].zero_grad()
    note_passed_over(run, step)
    run.is_whole = True


def add_up_gradients(args, accelerator, run, work, passes):
    """Forward and backward: the passes of a step add up their gradients, which processes share in the last one.
    Returns the step's loss in this process, and the norm of its gradient, which is clipped then."""
    step_loss = torch.zeros((), device=accelerator.device)
    for batch, is_last in passes:
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        with without_sync(accelerator, [] if is_last else run.weights.prepared.values()):
            loss = (work.training_loss(batch) * batch["weight"]).sum()
            accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
        step_loss += loss.detach()
    grad_norm = accelerator.clip_grad_norm_(run.weights.parameters, args.max_grad_norm)
    return step_loss, whole_tensor(grad_norm)


def look_and_keep(args, accelerator, run, stop, look):
    """Looks at the run, and keeps its checkpoint if it is the best one so far and that is asked for. Ends the process
    after a checkpoint, with status 128 + signal, if `stop` asks for it meanwhile: who resumes looks again."""
    try:
        held_out_loss = look(functools.partial(is_asked, stop))
    except LookGivenUp:
        save_together(accelerator, run, args.checkpoints_total_limit)
        leave(accelerator, run, False, stop.received)
    if args.keep_best and held_out_loss is not None:
        keep_best_together(accelerator, run, held_out_loss, args.checkpoints_total_limit)


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


def exchange(accelerator, loss, weight, grad_norm, requests):
    """The step's one exchange between processes: the sums of their losses and of the weights of their samples, and in
    how many of them loss or gradient is not finite, and there is each of `requests`."""
    not_finite = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
    weight, *requests = [torch.full_like(loss, number) for number in (weight, *requests)]
    numbers = torch.stack([loss, weight, not_finite.float(), *requests])
    return accelerator.reduce(numbers, reduction="sum").tolist()


def update_average(args, run, parameters):
    """Moves the average of the weights, if there is one, towards the parameters."""
    ema = run.state.get("ema")
    if ema:
        step_average(ema, parameters, args.foreach_ema, args.offload_ema)
