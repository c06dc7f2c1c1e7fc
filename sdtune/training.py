"""Train in PyTorch: the accelerator, the state of a run, and the loop over its steps."""

import contextlib
import datetime
import functools
import os
import signal
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env, send_to_device
from diffusers.utils import is_xformers_available
from tqdm.auto import tqdm

from sdtune.batches import micro_batches, passes_in_step, samples_in_step
from sdtune.checkpoints import (
    find_checkpoint,
    new_run,
    resume,
    save_checkpoint,
    write_torch_state,
)
from sdtune.models import DTYPES
from sdtune.optimization import make_average, make_optimizer, make_schedule
from sdtune.output import log_losses, prepare_output
from sdtune.plan import print_plan
from sdtune.randomness import DROPOUT, random_numbers
from sdtune.signals import is_orphaned, leave, note_signal, on_signals


def check_hardware(args):
    """Lists what this machine, or accelerate's config, cannot do."""
    problems = []
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if args.allow_tf32 and on_cpu:
        problems.append("--allow_tf32=True: needs an NVIDIA GPU; drop this")
    if args.enable_xformers_memory_efficient_attention and (on_cpu or not is_xformers_available()):
        problems.append("--enable_xformers_memory_efficient_attention=True: needs a GPU and xformers; drop this")
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in DTYPES or (precision == "fp16" and on_cpu):
        problems.append(f"--mixed_precision={precision} (or accelerate's config): cannot run here; use bf16")
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            problems.append(f"accelerate's config asks for {name}, which cannot be used; choose GPUs alone")
    return problems


def make_accelerator(args):
    """The accelerator; its processes wait for each other for a day, since one of them draws and saves alone."""
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    return Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=Path(args.output_dir, args.logging_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(days=1))],
    )


def make_state(args, accelerator, weights, groups, last_step):
    """All that a checkpoint holds, by name: `weights` (modules), optimizer, lr_scheduler, maybe ema and scaler. The
    optimizer trains the parameter `groups`."""
    optimizer = make_optimizer(args, groups)
    lr_scheduler = make_schedule(args, optimizer, last_step)
    state = {**weights, "optimizer": accelerator.prepare(optimizer), "lr_scheduler": lr_scheduler}
    if args.use_ema:
        parameters = [parameter for group in groups for parameter in group["params"]]
        state["ema"] = make_average(args, parameters, args.foreach_ema)
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler
    return state


def start_run(args, accelerator, counts, state, fingerprints, free, fixed):
    """A run at its start, or where the checkpoint to resume from ended; `free` and `fixed` name settings that may and
    that cannot differ from the checkpoint's. Raises `InputError`."""
    run = new_run(args, counts, state, accelerator.mixed_precision, fingerprints)
    if checkpoint := find_checkpoint(run.output_dir, args.resume_from_checkpoint):
        resume(run, checkpoint, free, fixed)
    return run


def tell_plan(args, accelerator, run, num_held_out, parameters, trained, frozen):
    """Prints what will be done: how many of `parameters`, of which models are `trained`, and which are `frozen`."""
    num_trained = sum(parameter.numel() for parameter in parameters)
    about = {
        "images": "",
        "devices": f"{accelerator.num_processes} ranks",
        "trained": trained,
        "frozen": frozen,
        "optimizer": f"8-bit: {args.use_8bit_adam}; EMA: {args.use_ema}",
    }
    print_plan(args, run, num_held_out, num_trained, about)


def start_output(args, accelerator, run):
    """Makes the output folder, and starts the trackers."""
    if accelerator.is_main_process:
        prepare_output(run, args.overwrite_output_dir)
    accelerator.wait_for_everyone()
    config = {name: str(value) for name, value in run.settings.items()}
    accelerator.init_trackers(args.tracker_project_name, config)


def batches_of(args, accelerator, run):
    """This process's lists of (epoch, index, weight), from the run's next step on."""
    first_step = run.progress["global_step"]
    return micro_batches(run.counts, accelerator.num_processes, accelerator.process_index, args.seed, first_step)


def make_loader(args, accelerator, samples, batches):
    """Loads the samples of `batches`, lists of what `samples` takes."""
    return torch.utils.data.DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type != "cpu",
        worker_init_fn=functools.partial(on_signals, signal.SIG_IGN),
    )


def train_steps(args, accelerator, run, launcher, loader, models, parameters, training_loss, look):
    """Trains `parameters` to the last step; `training_loss(batch)` gives the loss of each sample (batch,) through
    `models`, as accelerate prepared them. `look()` is called before training and every --validation_steps.

    Ends the process with status 128 + signal after SIGTERM or SIGINT, 1 if a loss is not finite.
    """
    received, device, counts = [], accelerator.device, run.counts
    optimizer, lr_scheduler = run.state["optimizer"], run.state["lr_scheduler"]
    first_step, validation_steps = run.progress["global_step"], args.validation_steps or 500
    # A run that was stopped had not yet looked at the step that it goes on from.
    if first_step % validation_steps == 0 or first_step == counts.last_step:
        look()
    on_signals(functools.partial(note_signal, received))
    batches = iter(loader)
    bar = tqdm(
        range(first_step, counts.last_step),
        initial=first_step,
        total=counts.last_step,
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    for step in bar:
        started = time.perf_counter()
        # Dropout layers alone use torch's own generator.
        torch.manual_seed(random_numbers(args.seed, DROPOUT, step, accelerator.process_index).integers(2**32))

        # Forward and backward: the passes of a step add up their gradients, which processes share in the last one.
        step_loss = torch.zeros((), device=device)
        num_passes = passes_in_step(counts, step)
        for number in range(num_passes):
            batch = send_to_device(next(batches), device, non_blocking=True)
            is_last = number == num_passes - 1
            with without_sync(accelerator, [] if is_last else models):
                loss = (training_loss(batch) * batch["weight"]).sum()
                accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
            step_loss += loss.detach()
        grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)

        # Optimizer step, unless a loss or a gradient is not finite in some process.
        stop = bool(received) or is_orphaned(launcher)
        loss, broken, overflow, stop = exchange(accelerator, step_loss, grad_norm, stop)
        if not broken:
            optimizer.step()
            optimizer.zero_grad()
            if not overflow:  # else fp16's scaler skipped the step; its own report misses that of a fused optimizer
                lr_scheduler.step()
                update_average(args, accelerator, run, parameters)
            run.progress["global_step"] = step + 1
            run.progress["losses"].append(loss)
        done = run.progress["global_step"]

        # Log
        if not broken:
            images_per_second = samples_in_step(counts, step) / (time.perf_counter() - started)
            bar.set_postfix(loss=f"{loss:.4f}", images_per_second=f"{images_per_second:.1f}", refresh=False)
            if done % args.logging_steps == 0 or done == counts.last_step:
                norm = None if overflow else grad_norm.item()
                log_losses(accelerator, run, lr_scheduler.get_last_lr()[0], norm, images_per_second)

        # Save and look
        if stop or broken or done % args.checkpointing_steps == 0:
            if accelerator.is_main_process:
                # After a broken step none is removed: the last good one may be an older one.
                limit = None if broken else args.checkpoints_total_limit
                save_checkpoint(run, functools.partial(write_torch_state, run), limit)
            accelerator.wait_for_everyone()
        if stop or broken:
            leave(accelerator, run, broken, received)
        if done % validation_steps == 0 or done == counts.last_step:
            look()


@contextlib.contextmanager
def without_sync(accelerator, models):
    """Leaves the gradients of `models` in each process, to be shared later."""
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(accelerator.no_sync(model))
        yield


def exchange(accelerator, loss, grad_norm, stop):
    """The step's one exchange between processes: the sum of their losses, and in how many of them loss or gradient is
    not finite, the gradient is not (which is for fp16's scaler to mend), a stop is asked for."""
    overflow = ~torch.isfinite(grad_norm)
    broken = ~torch.isfinite(loss) | (overflow & (accelerator.mixed_precision != "fp16"))
    flags = torch.stack([loss, broken.float(), overflow.float(), torch.full_like(loss, stop)])
    return accelerator.reduce(flags, reduction="sum").tolist()


def update_average(args, accelerator, run, parameters):
    """Moves the average of the weights, if there is one, towards the parameters."""
    ema = run.state.get("ema")
    if ema:
        ema.to(accelerator.device)
        ema.step(parameters)
        if args.offload_ema:
            ema.to("cpu")


def use_average(run, parameters):
    """Puts the averaged weights, if there are any, into the models: those are the result."""
    if "ema" in run.state:
        run.state["ema"].copy_to(parameters)
