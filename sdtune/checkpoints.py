"""Write checkpoints that are whole or not there, find them, and go on from one."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from sdtune.batches import StepCounts
from sdtune.digests import find_damage, write_digests
from sdtune.errors import InputError, counted, fitted, in_one_line, is_lack_of_memory, is_lost_peer, last_line
from sdtune.files import beside, copy_mode, read_json, sync, sync_folder
from sdtune.optimization import peak_learning_rate

AVERAGED = "_ema"  # ends the names of averaged weights in a checkpoint
# What settings are digests of, or dictionaries of digests.
DIGESTED = {"captioned_images": "images or captions", "class_data": "class images", "photos": "images or captions"}
WHOLE_WEIGHT = 0.999  # of the samples of a step in all, which is 1 but for rounding
# Flags that choose images and captions, of which only the outcome is compared.
CHOOSE_IMAGES = """
    num_validation_samples max_train_samples skip_bad_images dataset_config_name image_column caption_column
""".split()
MAX_NAMED = 5  # of what differs in a setting
REMEDY_FOR_SHARDING = (
    "use the accelerate config of there, under ZeRO with as many processes (accelerate launch --num_processes=N), or "
    "begin a new run from what `sdtune export` makes of the checkpoint"
)


@dataclasses.dataclass
class Weights:
    """The weights that are trained, and how they become files that people can load, and come back from them."""

    models: dict  # by name, that have them
    prepared: dict  # by name, as accelerate prepared them for passes
    parameters: list  # of torch
    write: Callable  # (models, folder, suffix): writes into a folder, with a suffix to the names
    read: Callable  # (models, folder, suffix): reads what was written. Raises whatever a broken file leads to
    skeletons: dict  # by name, models without weights, for those that are shared out over processes


@dataclasses.dataclass
class Run:
    """What a run is and how far it has come. A checkpoint holds `settings`, `progress`, `weights` and `state`."""

    output_dir: Path
    settings: dict  # flags, and what was made of them
    # global_step, base_losses (held-out, before training), losses (not yet logged), nan_steps (skipped ones in a row),
    # skipped_steps (all of them)
    progress: dict
    state: dict  # by name: what has a state_dict, or in JAX arrays
    counts: StepCounts
    weights: Weights | None = None  # None in JAX, where they are part of the state
    is_whole: bool = True  # weights and state belong together; not so in the middle of an optimizer step


def new_run(args, counts, state, precision, fingerprints, weights=None):
    """A run at its start. `fingerprints` are digests, by name, of what the run is trained on."""
    settings = {
        **vars(args),
        **fingerprints,
        "hub_token": None,
        "mixed_precision": precision,
        "peak_learning_rate": peak_learning_rate(args, counts),
        "samples_per_step": counts.samples_per_step,
        "schedule_steps": None if args.lr_scheduler.startswith("constant") else counts.last_step,
        "state": [*state],
    }
    progress = {"global_step": 0, "base_losses": None, "losses": [], "nan_steps": 0, "skipped_steps": 0}
    return Run(Path(args.output_dir), settings, progress, state, counts, weights)


def list_checkpoints(output_dir):
    """The whole checkpoints of a run, oldest first; half-written ones have another name or no progress.json."""
    found = [path.parent for path in Path(output_dir).glob("checkpoint-*/progress.json")]
    numbered = {path: path.name.removeprefix("checkpoint-") for path in found}
    whole = [path for path, number in numbered.items() if number.isdigit()]
    return sorted(whole, key=lambda path: int(numbered[path]))


def find_checkpoint(output_dir, wanted, num_damaged=0):
    """The checkpoint that `wanted` means: a folder in `output_dir`, a path, or the "latest" of those before the
    `num_damaged` newest; None if there is none."""
    if wanted is None:
        return None
    if wanted == "latest":
        checkpoints = list_checkpoints(output_dir)
        checkpoints = checkpoints[: len(checkpoints) - num_damaged]
        return checkpoints[-1] if checkpoints else None
    inside = Path(output_dir, wanted)
    return inside if inside.is_dir() else Path(wanted)


def count_damaged(output_dir, wanted):
    """How many of the newest checkpoints `latest` has to pass over, which are named: their files are not those that
    were written. For one process alone, which reads them whole. Raises `InputError` if nothing else is left, and if a
    damaged one was asked for by name."""
    if wanted == "latest":
        checkpoints = list_checkpoints(output_dir)[::-1]
    else:
        checkpoints = [checkpoint for checkpoint in [find_checkpoint(output_dir, wanted)] if checkpoint]
    damages = {}
    for checkpoint in checkpoints:
        damage = find_damage(checkpoint)
        if damage is None:
            break
        damages[checkpoint] = f"{checkpoint.name} is damaged ({damage})"
    whole = checkpoints[len(damages) :]
    if damages and not whole:
        told = "\n  ".join(damages.values())
        remedy = "name another one, or start anew in another --output_dir"
        raise InputError(f"--resume_from_checkpoint={wanted}: {told}; {remedy}")
    for told in damages.values():
        print(f"{told}; {whole[0].name} is used instead.")
    return len(damages)


def name_of_choice(output_dir, wanted):
    """What every process finds the checkpoint by that `wanted` means, `latest` without damaged ones: its name in the
    output folder, which each machine may know by a path of its own, or its path; None without one. For one process
    alone. Raises `InputError` as `count_damaged`."""
    found = find_checkpoint(output_dir, wanted, count_damaged(output_dir, wanted))
    return found and (found.name if found.parent == output_dir else str(found))


def find_newer(output_dir, checkpoint):
    """The newest checkpoint of a run if it is newer than another one of it, and not damaged; None otherwise."""
    newer = list_checkpoints(output_dir)
    if checkpoint in newer:
        newer = newer[newer.index(checkpoint) + 1 :]
    return next((path for path in reversed(newer) if find_damage(path) is None), None)


def set_aside_damaged(output_dir, step):
    """Gives what is in the place of checkpoints after `step`, from which a run goes on, another name: it is damaged or
    half there, and the run will write its own."""
    for path in sorted(output_dir.glob("checkpoint-*")):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and int(number) > step:
            names = (f"{path.name}.damaged{suffix}" for suffix in ["", *range(2, 1000)])
            aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
            print(f"{path.name} is renamed to {path.rename(aside).name}.")


def checkpoint_of(run):
    """Where the checkpoint of the run's step is, or will be."""
    return run.output_dir / f"checkpoint-{run.progress['global_step']}"


def save_checkpoint(run, write_state, total_limit):
    """Writes checkpoint-N, in which `write_state(run, folder)` writes the run's weights and state. For one process
    alone. If it fails, nothing of it stays behind. Raises whatever a full disk or the like leads to."""
    partial = begin_checkpoint(run)
    if partial is None:
        return
    with removed_on_failure(partial):
        write_state(run, partial)
        finish_checkpoint(run, partial, total_limit)


def begin_checkpoint(run):
    """Makes the folder of the checkpoint of the run's step, beside its place; None if the checkpoint is there, because
    a step broke just after a save. For one process alone."""
    final = checkpoint_of(run)
    if (final / "progress.json").exists():
        return None
    # Two processes, maybe of two machines, may save after a failure: the first one wins.
    partial = final.with_name(f"{final.name}.{socket.gethostname()}-{os.getpid()}.partial")
    partial.mkdir()
    return partial


@contextlib.contextmanager
def removed_on_failure(partial):
    """Leaves nothing behind of a checkpoint that fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def finish_checkpoint(run, partial, total_limit):
    """Completes a checkpoint whose weights and state are written, and renames it; only then do older ones beyond
    `total_limit` go, but not the best one. For one process alone."""
    for name, content in (("args", run.settings), ("progress", run.progress)):
        (partial / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    copy_mode(run.output_dir / "args.json", partial.rglob("*.safetensors"))
    write_digests(partial)
    sync(partial)  # files before names, or a crash could leave a whole name with half a file
    partial.rename(checkpoint_of(run))
    sync_folder(run.output_dir)
    remove_surplus(run.output_dir, total_limit)


def remove_surplus(output_dir, total_limit):
    """Removes the oldest checkpoints beyond `total_limit`, all but the best one; None for no limit."""
    best = read_best(output_dir)
    surplus = list_checkpoints(output_dir)[:-total_limit] if total_limit else []
    for old in surplus:
        if best is None or old.name != f"checkpoint-{best['step']}":
            try:
                shutil.rmtree(old.rename(old.with_suffix(".partial")))  # which is what a kill would leave of it
            except OSError as error:  # somebody has a file of it open, maybe; the new one is safe
                print(f"Warning: {old} could not be removed ({last_line(error)}); remove what is left of it.")


def read_best(output_dir):
    """The `step` of a run's checkpoint with the lowest held-out loss, and that `held_out_loss`; None without one."""
    path = Path(output_dir, "best.json")
    return read_json(path) if path.is_file() else None


def keep_best(run, held_out_loss, write_state, total_limit):
    """Keeps the checkpoint of the run's step, and writes it if it is not there, if its held-out loss is the lowest so
    far. For one process alone."""
    if is_best(run, held_out_loss):
        save_checkpoint(run, write_state, None)
        note_best(run, held_out_loss, total_limit)


def is_best(run, held_out_loss):
    """Whether a held-out loss is the lowest so far."""
    best = read_best(run.output_dir)
    is_worse = best and best["step"] != run.progress["global_step"] and best["held_out_loss"] <= held_out_loss
    return math.isfinite(held_out_loss) and not is_worse


def note_best(run, held_out_loss, total_limit):
    """Notes that the checkpoint of the run's step is the best one, which makes another one surplus."""
    with beside(run.output_dir / "best.json") as path:
        best = {"step": run.progress["global_step"], "held_out_loss": held_out_loss}
        path.write_text(json.dumps(best) + "\n", encoding="utf-8")
    remove_surplus(run.output_dir, total_limit)


def note_step(run, step, loss, is_finite):
    """Notes that a step is done; one whose loss or gradient was not finite changed nothing."""
    progress = run.progress
    progress["global_step"] = step + 1
    progress["nan_steps"] = 0 if is_finite else progress["nan_steps"] + 1
    if math.isfinite(loss):
        progress["losses"].append(loss)
    if not is_finite:
        progress["skipped_steps"] = progress.get("skipped_steps", 0) + 1  # which older checkpoints do not have
        print(f"\nStep {step + 1}: loss or gradient is not finite; skipped, {progress['nan_steps']} in a row.")


def note_passed_over(run, step):
    """Notes that a step is done of a stream's images of which none could be used."""
    run.progress["global_step"] = step + 1
    print(f"\nStep {step + 1}: of its images none can be used; passed over.")


def mean_of_usable(loss, weight):
    """The mean loss of a step's images that could be used, whose weights add up to less than 1 where a stream left
    others out."""
    return loss / weight if weight < WHOLE_WEIGHT else loss


def tell_skipped(run):
    """Prints how many of the run's steps changed nothing, if there are such: a result may be less than it seems."""
    number = run.progress.get("skipped_steps", 0)
    if number:
        steps = f"{number:,} of {counted(run.progress['global_step'], 'step')} {'was' if number == 1 else 'were'}"
        print(f"\n{steps} skipped, since loss or gradient was not finite.")


def read_undamaged(checkpoint, read):
    """What `read(checkpoint)` gives. Raises `InputError` if that fails."""
    try:
        return read(checkpoint)
    except Exception as error:  # torch and safetensors have one for every way of being broken
        if is_lack_of_memory(error) or is_lost_peer(error):  # which is not the checkpoint's fault
            raise
        told = f"{checkpoint} is damaged, or of another script; name another ({last_line(error)})"
        raise InputError(f"--resume_from_checkpoint: {told}") from None


def read_settings(checkpoint):
    """The settings of the run that wrote a checkpoint, and its progress. Raises `InputError`."""
    return read_json(checkpoint / "args.json"), read_json(checkpoint / "progress.json")


def compare_settings(run, checkpoint, before, free, fixed):
    """Returns the names of settings that were others `before`, in the checkpoint. Those in `free` may differ. Others
    change the result: they raise `InputError`, or are told and take effect if --allow_changed_resume allows that, but
    not those in `fixed`, with which the state would not fit."""
    settings = run.settings
    changed = {}
    for name, value in settings.items():
        # A checkpoint from before a flag was there is one of a run without it.
        is_new = name not in before and value in (None, False, "adamw")
        if name not in free and not is_new and before.get(name) != value:
            changed[name] = tell_difference(name, before.get(name), value)
    if changed.keys() & {"learning_rate", "samples_per_step", "scale_lr"}:
        changed.pop("peak_learning_rate", None)  # which follows from these
    if is_digest(settings.get("captioned_images")) and "captioned_images" in changed:
        changed["captioned_images"] += tell_choice(before, settings)
    if "sharding" in changed:
        changed["sharding"] += f"; {REMEDY_FOR_SHARDING}"
    cannot_change = changed.keys() & fixed
    if "text_encoder_lr" in changed:
        changed.pop("text_encoder_apart", None)  # which follows from it
    told = f"{checkpoint} was made under other settings"
    if cannot_change or (changed and not settings["allow_changed_resume"]):
        remedy = "use those" if cannot_change else "use those, or add --allow_changed_resume"
        raise InputError("\n  ".join([f"--resume_from_checkpoint: {told}; {remedy}", *changed.values()]))
    if changed:
        lines = [f"{told}; from here on those of now hold (--allow_changed_resume)", *changed.values()]
        print(fitted("\n  ".join(lines)))
    return changed.keys()


def tell_choice(before, settings):
    """Says which flags choose other images than they did `before`, in brackets; "" where none does."""
    flags = [name for name in CHOOSE_IMAGES if settings.get(name) != before.get(name)]
    told = [f"--{tell_difference(name, before.get(name), settings.get(name))}" for name in flags]
    return f" ({'; '.join(told)})" if told else ""


def tell_difference(name, first, second, first_place="there", second_place="now"):
    """Says in a line that a setting has two values in two places: of a digest no more, since it says nothing to
    people; of a dictionary which of its keys differ."""
    what, keys = DIGESTED.get(name, "content"), ""
    if isinstance(first, dict) or isinstance(second, dict):
        one, other = [value if isinstance(value, dict) else {} for value in (first, second)]
        differing = sorted(in_one_line(key) for key in one | other if one.get(key) != other.get(key))
        more = f" and {len(differing) - MAX_NAMED} more" if len(differing) > MAX_NAMED else ""
        keys = ": " + ", ".join(differing[:MAX_NAMED]) + more
    if keys or is_digest(first) or is_digest(second):
        return f"{name}: other {what} {second_place} than {first_place}{keys}"
    return f"{name}: {first} {first_place}, {second} {second_place}"


def is_digest(value):
    """Whether a setting is the SHA-256 of something, in hexadecimal digits."""
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def take_progress(run, checkpoint, progress, changed):
    """Sets the run's progress to the checkpoint's. Raises `InputError` if that is beyond the last step."""
    if progress["global_step"] > run.counts.last_step:
        raise InputError(f"--max_train_steps: {checkpoint} is beyond the last step, {run.counts.last_step}; raise it")
    task = {"captioned_images", "image_interpolation_mode", "prediction_type", "rescale_betas_zero_snr", "resolution"}
    task |= {"aspect_ratio_buckets", "bucket_max", "bucket_min", "bucket_no_upscale", "bucket_step"}
    if changed & task:  # held-out losses are of other images, or of another objective
        progress["base_losses"] = None
    run.progress = progress


def take_settings(run, checkpoint, free, fixed):
    """Compares the run's settings with those of a checkpoint, and takes over its progress; `free` and `fixed` as in
    `compare_settings`. Raises `InputError`."""
    before, progress = read_undamaged(checkpoint, read_settings)
    changed = compare_settings(run, checkpoint, before, free, fixed)
    take_progress(run, checkpoint, progress, changed)
