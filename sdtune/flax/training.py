"""Train in JAX: hosts and devices, the state of a run, and the loop over its steps."""

import contextlib
import functools
import hashlib
import json
import math
import os
import secrets
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import jax
import numpy as np
from accelerate import Accelerator
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from sdtune.arguments import changed_flags
from sdtune.batches import micro_batches, step_sizes
from sdtune.checkpoints import (
    find_checkpoint,
    is_digest,
    keep_best,
    mean_of_usable,
    name_of_choice,
    new_run,
    note_passed_over,
    note_step,
    save_checkpoint,
    tell_skipped,
)
from sdtune.errors import InputError, counted, gathered, last_line, raise_problems
from sdtune.failures import leave
from sdtune.flax.checkpoints import resume
from sdtune.flax.encoding import step_batches
from sdtune.flax.optimization import learning_rate_of_step, train_step
from sdtune.flax.validation import on_some_host
from sdtune.optimization import make_average
from sdtune.output import chosen_tracker, leave_token, log_losses, prepare_output, remove_token, sees_token
from sdtune.plan import print_plan, warn_of_slow_bf16
from sdtune.progress import start_bar, tell_step
from sdtune.signals import ended_by_signals, is_asked, take_save_requests
from sdtune.streaming import stream_from
from sdtune.validation import LookGivenUp, steps_between_looks

PATIENCE_WITH_FOLDERS = 75  # seconds: NFS may keep for 60 that a file is not there
# Flags that may differ between hosts: what they name is compared in their place, or has no effect on others.
OWN_TO_A_HOST = set(
    """
    cache_dir config coordinator_address dataloader_num_workers dataset_name host_index hub_token local_rank
    logging_dir output_dir pretrained_model_name_or_path single_file_config tokenizer_name train_data_dir
    """.split()
)


def check_hosts(args):
    """Lists what is wrong with how the hosts are to find each other."""
    problems = []
    is_numbered = args.num_hosts is not None and args.host_index is not None
    if args.coordinator_address and is_numbered == (args.coordinator_address == "auto"):
        told = "HOST:PORT needs --num_hosts and --host_index, auto finds them"
        problems.append(f"--coordinator_address={args.coordinator_address}: {told}")
    if is_numbered and args.host_index >= args.num_hosts:
        problems.append(f"--host_index={args.host_index}: must be below --num_hosts")
    return problems


def start_jax(args):
    """Sets up JAX and joins the other hosts, if any, with which it agrees on the flags; returns the mesh of all
    devices. Raises `InputError`."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # compiled programs are kept for the next run
        folder = Path(args.cache_dir or datasets.config.HF_CACHE_HOME, "compiled_by_jax")
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_default_matmul_precision", None if args.mixed_precision == "bf16" else "highest")
    if args.coordinator_address:
        join_hosts(args)
    check_agreement({name: value for name, value in vars(args).items() if name not in OWN_TO_A_HOST})
    return Mesh(np.array(jax.devices()), ("data",))


def join_hosts(args):
    """Joins the other hosts. They wait for each other for a day, since one of them draws and saves alone. Raises
    `InputError`."""
    jax.config.update("jax_enable_preemption_service", False)  # it would take our signals
    where = {}
    if args.coordinator_address != "auto":
        where["coordinator_address"] = args.coordinator_address
        where["num_processes"], where["process_id"] = args.num_hosts, args.host_index
    try:
        with ended_by_signals():  # until the other hosts come
            jax.distributed.initialize(**where, shutdown_timeout_seconds=86400)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"--coordinator_address={args.coordinator_address}: the hosts do not meet; check it, and --num_hosts and "
            f"--host_index of each ({last_line(error)})"
        ) from None


def check_shared_output(args):
    """Asks whether all hosts see one output folder: one with a folder of its own would not find the checkpoint to go
    on from. Raises `InputError` on all of them."""
    if jax.process_count() == 1 or args.dry_run:  # which writes nothing
        return
    numbers = multihost_utils.broadcast_one_to_all(np.frombuffer(secrets.token_bytes(16), np.uint8))
    token, is_first, problems = np.asarray(numbers).tobytes().hex(), jax.process_index() == 0, []
    if is_first:
        with gathered(problems):
            leave_token(args.output_dir, token)
    multihost_utils.sync_global_devices("token left")
    sees = not problems if is_first else sees_token(args.output_dir, token, PATIENCE_WITH_FOLDERS)
    everywhere = multihost_utils.process_allgather(np.array(sees)).reshape(-1)
    if is_first:
        remove_token(args.output_dir)
    if not everywhere.all() and not problems:
        blind = ", ".join(map(str, np.flatnonzero(~everywhere)))
        problems = [
            f"--output_dir={args.output_dir}: what host 0 writes there is not seen by host {blind}; this is host "
            f"{jax.process_index()}, {socket.gethostname()}, which looks into {Path(args.output_dir).resolve()}; name "
            "one folder that all machines share, by its whole path"
        ]
    raise_problems(problems)


def end_of_process():
    """What ends this process after a failure. Of several hosts one that fails must not wait for the others, as JAX
    does at a regular end: they are in a program in which it takes no part any more."""
    return sys.exit if jax.process_count() == 1 else os._exit


@contextlib.contextmanager
def ended_alone():
    """Ends this process at once after a signal if there are other hosts, for which JAX waits at a regular end."""
    try:
        yield
    except KeyboardInterrupt as error:
        if jax.process_count() == 1:
            raise
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        print(f"Stopped by {number.name}.", file=sys.stderr, flush=True)
        os._exit(128 + number)


def make_accelerator(args):
    """Accelerate's trackers, for the first host alone; nothing else is accelerate's here, so it sees one process."""
    is_first = jax.process_index() == 0
    return Accelerator(
        cpu=True,
        mixed_precision="no",
        log_with=chosen_tracker(args) if is_first else None,
        project_dir=Path(args.output_dir, args.logging_dir),
    )


def make_state(args, weights, optimizer):
    """All that a checkpoint holds, as arrays of numpy: `unet` (the weights), `optimizer`, maybe `ema`."""
    state = {"unet": weights, "optimizer": jax.device_get(optimizer.init(weights))}
    if args.use_ema:
        state["ema"] = weights
    return state


def start_run(args, counts, state, fingerprints, pipeline, free, fixed):
    """A run at its start, or where the checkpoint to resume from ended, the same on all hosts; `free` and `fixed` name
    settings that may and that cannot differ from the checkpoint's. Raises `InputError`."""
    check_agreement(fingerprints)
    run = new_run(args, counts, state, args.mixed_precision or "no", fingerprints)
    checkpoint, own = choose_checkpoint(run, args.resume_from_checkpoint)
    run.settings |= own
    problems = []
    if checkpoint:
        with gathered(problems):
            resume(pipeline, run, checkpoint, free, fixed)
    if on_some_host(bool(problems)):
        raise_problems(problems or [f"{checkpoint}: another host cannot go on from it; read what it says"])
    check_agreement({"global_step": run.progress["global_step"]})
    return run


def choose_checkpoint(run, wanted):
    """The checkpoint that the first host goes on from, or None, as each host finds it; and of the first one the
    settings that are a host's own, which are those in the checkpoint. Raises `InputError` on all of them."""
    name, problems = None, []
    if jax.process_index() == 0:
        with gathered(problems):
            name = name_of_choice(run.output_dir, wanted)
    own = {flag: run.settings[flag] for flag in OWN_TO_A_HOST & run.settings.keys()}
    name, problems, own = told_by_first([name, problems, own])
    raise_problems(problems)
    checkpoint = name and find_checkpoint(run.output_dir, name)
    if checkpoint:
        check_agreement({checkpoint.name: "seen" if (checkpoint / "progress.json").is_file() else "not seen"})
    return checkpoint, own


def told_by_first(value):
    """A value, which JSON can hold, of the first host, on all of them, which have to call this together."""
    text = json.dumps(value).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.frombuffer(text[:length].ljust(length), np.uint8)  # of other hosts any text of that length
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())


def check_agreement(values):
    """Compares `values` of all hosts, by name: any that differ would have them wait for each other for ever. Raises
    `InputError` on all of them, which names the difference."""
    digests = [hashlib.sha256(repr(value).encode()).digest() for value in values.values()]
    here = np.frombuffer(b"".join(digests), np.uint8).reshape(len(values), -1)
    everywhere = multihost_utils.process_allgather(here).reshape(-1, *here.shape)
    is_same = (everywhere == everywhere[0]).all(axis=(0, 2))
    differences = []
    for (name, value), same in zip(values.items(), is_same, strict=True):
        if not same:
            shown = "not the same" if is_digest(value) or isinstance(value, dict) else value
            differences.append(f"{name}: {shown} here")
    if differences:
        remedy = "all need the same flags, the same data and one --output_dir that they share"
        raise InputError("\n  ".join([f"the hosts do not agree; {remedy}", *differences]))


def precision_of_passes(args):
    """The precision of the UNet's passes: not fp16, in which the gradients of unscaled losses vanish. As in diffusers'
    script, fp16 is for what is frozen."""
    return "bf16" if args.mixed_precision == "bf16" else "no"


def tell_plan(args, run, num_held_out, stream, told):
    """Prints what will be done; `stream` says how images are read, if they are a stream, and `told` are texts
    that were told as they were read."""
    num_trained = sum(weight.size for weight in run.state["unet"].values())
    encoded = "once" if args.center_crop else "in every step; once with --center_crop"
    about = {
        "device": f"{jax.devices()[0].device_kind}, by JAX {jax.__version__}",
        "images": "" if stream else f", encoded {encoded}",
        "data": told,
        "stream": stream,
        "devices": counted(jax.device_count(), f"{jax.default_backend()} device"),
        "trained": "UNet",
        "frozen": "VAE, text encoder, in float16" if args.mixed_precision == "fp16" else "VAE, text encoder",
        "precision": precision_of_passes(args),
        "optimizer": "AdamW",
        "warnings": warn_of_slow_bf16(args.mixed_precision) if jax.default_backend() == "cpu" else [],
    }
    print_plan(args, run, num_held_out, num_trained, about)


def start_output(args, run, parser):
    """Makes the output folder, by the first host alone; `parser` knows the defaults of the flags."""
    if jax.process_index() == 0:
        prepare_output(run, args.overwrite_output_dir, changed_flags(parser, args))


def load_batches(args, run, encoded, batch_size, pool, left_out):
    """Yields this host's share of what each step needs, from the run's next step on; a pass has `batch_size` images
    here. What cannot be used of a stream is noted in `left_out`."""
    counts, first_step = run.counts, run.progress["global_step"]
    if args.streaming:
        passes = stream_passes(args, run, encoded.samples, batch_size, pool, left_out)
    else:
        items = micro_batches(counts, jax.process_count(), jax.process_index(), args.seed, first_step)
        passes = (list(pool.map(encoded.samples.__getitem__, items_of_pass)) for items_of_pass in items)
    sizes = step_sizes(counts, args.seed, first_step)
    return step_batches(encoded, counts, sizes, passes, batch_size)


def stream_passes(args, run, images, batch_size, pool, left_out):
    """Yields the samples of this host's passes of a stream, from the run's next step on."""
    host, num_hosts = jax.process_index(), jax.process_count()
    stream = stream_from(images, args, host, num_hosts, batch_size, run.progress["global_step"])
    for samples, problems in stream.batches(host, num_hosts, stream.first_batch, pool.map):
        left_out.note(problems)
        yield samples


def compile_step(args, mesh, training_loss, optimizer):
    """`train_step` as a program of all devices, which writes a new state over the old one."""
    step = functools.partial(
        train_step, training_loss=training_loss, optimizer=optimizer, max_grad_norm=args.max_grad_norm
    )
    return jax.jit(step, donate_argnums=0, out_shardings=NamedSharding(mesh, PartitionSpec()))


def train_steps(args, accelerator, run, write_state, stop, mesh, batches, training_loss, optimizer, look):
    """Trains to the last step; `training_loss(weights, batch)` gives the loss of each sample (batch,).
    `look(is_asked)` is called before training and every --validation_steps; it returns the mean held-out loss or None,
    or raises `LookGivenUp` when `is_asked()`. `write_state(run, folder)` writes the state of a checkpoint.

    Ends the process with status 128 + signal when `stop` asks for it, 1 after too many losses that are not finite.
    """
    counts, is_first = run.counts, jax.process_index() == 0
    average = make_average(args, [])  # for its decay
    learning_rate_of = learning_rate_of_step(args, run.settings["peak_learning_rate"], counts.last_step)
    step_program = compile_step(args, mesh, training_loss, optimizer)
    run.state = jax.device_put(run.state, NamedSharding(mesh, PartitionSpec()))  # whole on every device
    split = NamedSharding(mesh, PartitionSpec(None, "data"))  # the passes of a batch one after the other
    first_step, validation_steps = run.progress["global_step"], steps_between_looks(args, counts)
    # A run that was stopped has not had the look at its last step.
    if first_step % validation_steps == 0 or first_step == counts.last_step:
        look_and_keep(args, accelerator, run, stop, look, write_state)
    if first_step < counts.last_step:
        print("Compiling the step, which may take minutes.", flush=True)
    bar, recent = start_bar(run, is_first)
    sizes = step_sizes(counts, args.seed, first_step)
    reader = ThreadPoolExecutor(1)  # makes the next batch while the devices work
    upcoming = reader.submit(next, batches, None)
    for step in bar:
        started = time.perf_counter()
        num_samples, _ = next(sizes)
        batch = upcoming.result()  # raises what went wrong with it, while the state is whole
        upcoming = reader.submit(next, batches, None)

        # Forward, backward and optimizer step on the devices, unless a loss or a gradient is not finite.
        asked = max(2 * is_asked(stop), take_save_requests(stop))  # 1 for a checkpoint, 2 for a stop
        batch["asked"] = np.full_like(batch["weight"], asked)  # which is how the hosts tell each other
        arrays = {name: jax.make_array_from_process_local_data(split, array) for name, array in batch.items()}
        learning_rate, ema_decay = np.float32(learning_rate_of(step)), np.float32(average.get_decay(step + 1))
        run.is_whole = False  # the program writes over the state
        run.state, outcome = step_program(run.state, arrays, learning_rate, ema_decay)
        loss, grad_norm, weight, asked = np.asarray(outcome).tolist()
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        is_broken = not is_finite and run.progress["nan_steps"] >= (args.max_nan_steps or 0)
        stop_now = asked == 2 or (is_asked(stop) and jax.process_count() == 1)
        if weight == 0:
            loss = math.nan  # of nothing, which is no part of a mean
            note_passed_over(run, step)
        elif not is_broken:
            loss = mean_of_usable(loss, weight)
            note_step(run, step, loss, is_finite)
        run.is_whole = True
        done = run.progress["global_step"]

        # Log
        seconds = time.perf_counter() - started
        if step == first_step:
            tqdm.write(f"Compiled: the first step took {seconds:.1f} s.")
        if not is_broken:
            images_per_second = num_samples / seconds
            recent.append((loss, num_samples, None if step == first_step else seconds))
            tell_step(args, bar, run, accelerator.device, recent)
            if is_first and (done % args.logging_steps == 0 or done == counts.last_step):
                norm = grad_norm if is_finite else None
                log_losses(accelerator, run, learning_rate_of(done), norm, images_per_second)

        # Save and look
        if asked or stop_now or is_broken or done % args.checkpointing_steps == 0 or done == counts.last_step:
            if is_first:
                # After a broken step none is removed: the last good one may be an older one.
                save_checkpoint(run, write_state, None if is_broken else args.checkpoints_total_limit)
            multihost_utils.sync_global_devices("saved")
        if stop_now or is_broken:
            leave(accelerator, run, is_broken, stop.received)
        if done % validation_steps == 0 or done == counts.last_step:
            look_and_keep(args, accelerator, run, stop, look, write_state)
    tell_skipped(run)


def look_and_keep(args, accelerator, run, stop, look, write_state):
    """Looks at the run, and keeps its checkpoint if it is the best one so far and that is asked for. Ends the process
    after a checkpoint, with status 128 + signal, if `stop` asks for it meanwhile: who resumes looks again."""
    try:
        held_out_loss = look(functools.partial(is_asked, stop))
    except LookGivenUp:
        if jax.process_index() == 0:
            save_checkpoint(run, write_state, args.checkpoints_total_limit)
        leave(accelerator, run, False, stop.received)
    if args.keep_best and held_out_loss is not None and jax.process_index() == 0:
        keep_best(run, held_out_loss, write_state, args.checkpoints_total_limit)
