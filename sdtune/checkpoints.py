"""Write checkpoints that are whole or not there, find them, and go on from one."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch

from sdtune.batches import StepCounts
from sdtune.errors import InputError, last_line
from sdtune.optimization import peak_learning_rate


@dataclasses.dataclass
class Run:
    """What a run is and how far it has come. A checkpoint holds `settings`, `progress` and `state`."""

    output_dir: Path
    settings: dict  # flags, and what was made of them
    progress: dict  # global_step, base_losses (held-out losses before training), losses (not yet logged)
    state: dict  # by name: what has a state_dict, or in JAX arrays
    counts: StepCounts


def new_run(args, counts, state, precision, fingerprints):
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
    progress = {"global_step": 0, "base_losses": None, "losses": []}
    return Run(Path(args.output_dir), settings, progress, state, counts)


def list_checkpoints(output_dir):
    """The whole checkpoints of a run, oldest first; half-written ones have another name or no progress.json."""
    found = [path.parent for path in Path(output_dir).glob("checkpoint-*/progress.json")]
    numbered = {path: path.name.removeprefix("checkpoint-") for path in found}
    whole = [path for path, number in numbered.items() if number.isdigit()]
    return sorted(whole, key=lambda path: int(numbered[path]))


def find_checkpoint(output_dir, wanted):
    """The checkpoint that `wanted` means: a folder in `output_dir`, a path, or the "latest"; None if there is none."""
    if wanted is None:
        return None
    if wanted == "latest":
        checkpoints = list_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    inside = Path(output_dir, wanted)
    return inside if inside.is_dir() else Path(wanted)


def save_checkpoint(run, write_state, total_limit):
    """Writes checkpoint-N beside its place, then renames it; only then do older ones beyond `total_limit` go.
    `write_state(folder)` writes the run's state. For one process alone."""
    final = run.output_dir / f"checkpoint-{run.progress['global_step']}"
    if (final / "progress.json").exists():  # a step broke just after a save
        return
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
    partial.mkdir()
    write_state(partial)
    for name, content in (("args", run.settings), ("progress", run.progress)):
        (partial / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.sync()  # files before names, or a crash could leave a whole name with half a file
    partial.rename(final)
    surplus = list_checkpoints(run.output_dir)[:-total_limit] if total_limit else []
    for old in surplus:
        shutil.rmtree(old.rename(old.with_suffix(".partial")))  # which is what a kill would leave of it


def write_torch_state(run, folder):
    """Writes the state of what was made by PyTorch into a checkpoint's folder."""
    torch.save({name: part.state_dict() for name, part in run.state.items()}, folder / "state.pt")


def read_checkpoint(checkpoint, read_state):
    """Returns (settings, progress, state) in a checkpoint, the state as `read_state(folder)` reads it. Raises
    `InputError`."""
    try:
        settings = json.loads((checkpoint / "args.json").read_text())
        progress = json.loads((checkpoint / "progress.json").read_text())
        return settings, progress, read_state(checkpoint)
    except Exception as error:  # torch and safetensors have one for every way of being broken
        told = f"{checkpoint} is damaged, or of another script; name another ({last_line(error)})"
        raise InputError(f"--resume_from_checkpoint: {told}") from None


def read_torch_state(folder):
    """The state in a checkpoint's folder, by name, as tensors in the CPU's memory."""
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def compare_settings(run, checkpoint, before, free, fixed):
    """Returns the names of settings that were others `before`, in the checkpoint. Those in `free` may differ. Others
    change the result: they raise `InputError`, or are told and take effect if --allow_changed_resume allows that, but
    not those in `fixed`, with which the state would not fit."""
    settings = run.settings
    changed = {}
    for name, value in settings.items():
        if name not in free and before.get(name) != value:
            changed[name] = f"{name}: {before.get(name)} there, {value} now"
    cannot_change = changed.keys() & fixed
    remedy = "use those" if cannot_change else "use those, or add --allow_changed_resume"
    told = "\n  ".join([f"{checkpoint} was made under other settings; {remedy}", *changed.values()])
    if cannot_change or (changed and not settings["allow_changed_resume"]):
        raise InputError(f"--resume_from_checkpoint: {told}")
    if changed:
        print(told)
    return changed.keys()


def take_progress(run, checkpoint, progress, changed):
    """Sets the run's progress to the checkpoint's. Raises `InputError` if that is beyond the last step."""
    if progress["global_step"] > run.counts.last_step:
        raise InputError(f"--max_train_steps: {checkpoint} is beyond the last step, {run.counts.last_step}; raise it")
    task = {"captioned_images", "image_interpolation_mode", "prediction_type", "rescale_betas_zero_snr", "resolution"}
    if changed & task:  # held-out losses are of other images, or of another objective
        progress["base_losses"] = None
    run.progress = progress


def resume(run, checkpoint, free, fixed):
    """Loads a checkpoint into the run, made by PyTorch; `free` and `fixed` as in `compare_settings`. Raises
    `InputError`."""
    before, progress, saved = read_checkpoint(checkpoint, read_torch_state)
    changed = compare_settings(run, checkpoint, before, free, fixed)
    take_progress(run, checkpoint, progress, changed)
    # Rates and decays are those asked for now, which are the checkpoint's unless they were changed.
    asked = {"param_groups", "base_lrs", "decay", "use_ema_warmup"}
    for name, part in run.state.items():
        now = part.state_dict()
        saved[name].update({key: now[key] for key in now.keys() & asked})
        part.load_state_dict(saved[name])
    optimizer, lr_scheduler = run.state["optimizer"], run.state["lr_scheduler"]
    for group, factor in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(lr_scheduler.last_epoch)
