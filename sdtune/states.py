"""The state of a run in PyTorch, of which every process writes its part and reads it back."""

import contextlib
import functools
import json
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from sdtune.checkpoints import (
    AVERAGED,
    begin_checkpoint,
    finish_checkpoint,
    is_best,
    note_best,
    read_undamaged,
    removed_on_failure,
)
from sdtune.deepspeed import held_whole, is_partitioned, uses_deepspeed
from sdtune.errors import InputError
from sdtune.files import read_json
from sdtune.optimization import PRODIGY_PROGRESS
from sdtune.sharding import SHARDS_FOLDER, forget_gathered, held_here, read_shards, write_shards

OPTIMIZER_FILE = "optimizer.bin"  # as accelerate calls it
STATE_FILE = "state.json"


@contextlib.contextmanager
def averaged(run):
    """Has the averaged weights, if there are any, in the models for a while."""
    ema, parameters = run.state.get("ema"), held_here(run.weights.parameters)
    if not ema:
        yield
        return
    ema.store(parameters)
    try:
        ema.copy_to(parameters)
        yield
    finally:
        ema.restore(parameters)
        forget_gathered(run.weights.models)


def use_average(run):
    """Puts the averaged weights, if there are any, into the models, in float32: those are the result, but no state to
    go on from."""
    run.is_whole = False
    for parameter in run.weights.parameters:
        if parameter.dtype != torch.float32:  # in bfloat16 they would lose what an average is for
            parameter.data = parameter.data.float()
    if "ema" in run.state:
        run.state["ema"].copy_to(held_here(run.weights.parameters))


@contextlib.contextmanager
def holding(parameters, values):
    """Has parameters hold other tensors for a while, wherever and in whatever precision these are: to write them, or
    to read into them."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


def save_together(accelerator, run, total_limit):
    """Writes the checkpoint of the run's step, by all processes together."""
    started = begin_checkpoint(run) if accelerator.is_main_process else None
    [name] = broadcast_object_list([started and started.name])
    if name is None:
        return
    partial = run.output_dir / name  # which each machine may know by a path of its own
    # One process removes it: another one may hear of a failure while the first one completes the checkpoint.
    with removed_on_failure(partial) if accelerator.is_main_process else contextlib.nullcontext():
        write_state(accelerator, run, partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish_checkpoint(run, partial, total_limit)
        accelerator.wait_for_everyone()


def keep_best_together(accelerator, run, held_out_loss, total_limit):
    """Keeps the checkpoint of the run's step, by all processes together, if its held-out loss is the lowest so far."""
    [is_kept] = broadcast_object_list([accelerator.is_main_process and is_best(run, held_out_loss)])
    if is_kept:
        save_together(accelerator, run, None)
        if accelerator.is_main_process:
            note_best(run, held_out_loss, total_limit)


def register_weights(accelerator, run):
    """Has accelerate's checkpoints hold the weights that are trained, as files that people can load, in the place of
    those of the models that it prepared, which would be the whole base."""
    accelerator.register_save_state_pre_hook(functools.partial(replace_saved_weights, accelerator, run))
    accelerator.register_load_state_pre_hook(functools.partial(replace_loaded_weights, run))


def replace_saved_weights(accelerator, run, _, weights, folder):
    """Writes a run's weights into the folder of a checkpoint, instead of what accelerate would write."""
    weights.clear()
    with held_whole(run.weights.parameters):
        if accelerator.is_main_process:
            write_weights(run, Path(folder))


def replace_loaded_weights(run, models, folder):
    """Reads a run's weights from the folder of a checkpoint, instead of what accelerate would read."""
    models.clear()
    if not is_partitioned(run.weights.parameters[0]):  # else DeepSpeed has read them
        read_weights(run, Path(folder))


def write_weights(run, folder):
    """Writes a run's weights, averaged ones too, into a folder."""
    weights = run.weights
    weights.write(weights.models, folder, "")
    if "ema" in run.state:
        with holding(weights.parameters, run.state["ema"].shadow_params):
            weights.write(weights.models, folder, AVERAGED)


def read_weights(run, folder):
    """Reads what `write_weights` wrote: weights into the models, the average into the run's."""
    weights = run.weights
    if "ema" in run.state:
        with holding(weights.parameters, run.state["ema"].shadow_params):
            weights.read(weights.models, folder, AVERAGED)
    weights.read(weights.models, folder, "")


def write_state(accelerator, run, folder):
    """Writes the run's weights and state into the folder of a checkpoint, by all processes together."""
    if accelerator.is_fsdp2:
        write_shards(run, folder / SHARDS_FOLDER)  # accelerate would pickle, and write frozen weights too
    elif uses_deepspeed():
        accelerator.save_state(folder, exclude_frozen_parameters=True)
    else:
        accelerator.save_state(folder)
    if accelerator.is_main_process:
        write_numbers(run, folder)


def write_state_alone(accelerator, run, folder):
    """Writes the run's weights and state into the folder of a checkpoint, by this process alone. Raises `InputError`
    if it does not have all of them."""
    if accelerator.is_fsdp2 or uses_deepspeed():
        raise InputError("no process has all of the state")
    accelerator.save_state(folder)  # by any process but the first one only what each process has of its own
    if not accelerator.is_main_process:
        write_weights(run, folder)
        torch.save(run.state["optimizer"].state_dict(), folder / OPTIMIZER_FILE)
    write_numbers(run, folder)


def write_numbers(run, folder):
    """Writes those parts of the state that are a few numbers."""
    parts = numbers_of(run)
    (folder / STATE_FILE).write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")


def numbers_of(run):
    """The parts of a run's state that are a few numbers, by name: of the schedule, and of the average."""
    parts = {name: run.state[name].state_dict() for name in ("lr_scheduler", "ema") if name in run.state}
    for part in parts.values():
        part.pop("shadow_params", None)
    return parts


def read_checkpoint(accelerator, run, checkpoint):
    """Reads weights and state of a checkpoint into the run, by all processes together. Raises `InputError`."""
    read_undamaged(checkpoint, functools.partial(read_state, accelerator, run))


def read_state(accelerator, run, folder):
    """Reads what `write_state` wrote. Rates and decays stay those asked for now, which are the checkpoint's unless
    they were changed."""
    optimizer, lr_scheduler = run.state["optimizer"], run.state["lr_scheduler"]
    asked = [dict(group) for group in optimizer.param_groups]
    numbers, numbers_now = read_json(folder / STATE_FILE), numbers_of(run)
    if accelerator.is_fsdp2:
        read_shards(run, folder / SHARDS_FOLDER)
    elif uses_deepspeed():
        accelerator.load_state(folder, load_module_strict=False)
    else:
        accelerator.load_state(folder, load_kwargs={"mmap": True})  # tensor by tensor, not all of them at once
        own_tensors(optimizer)
    for group, group_asked in zip(optimizer.param_groups, asked, strict=True):
        kept = group_asked.keys() - {"params", *PRODIGY_PROGRESS}
        group.update({name: group_asked[name] for name in kept})
    for name, part in numbers.items():
        part.update({key: numbers_now[name][key] for key in part.keys() & {"base_lrs", "decay", "use_ema_warmup"}})
        run.state[name].load_state_dict(part)
    for group, factor in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(lr_scheduler.last_epoch)


def own_tensors(optimizer):
    """Has an optimizer's tensors in the CPU's memory be its own, and not parts of the file that they came from."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if torch.is_tensor(value) and value.device.type == "cpu":
                state[name] = value.clone()
