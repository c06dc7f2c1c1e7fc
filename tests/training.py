"""Runs a training script inside the test process, many times faster than as a process, and reads what it wrote."""

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from sdtune.arguments import (
    add_bucket_arguments,
    add_cache_arguments,
    add_data_arguments,
    add_memory_arguments,
    add_model_arguments,
    add_objective_arguments,
    add_optimization_arguments,
    add_output_arguments,
    add_run_arguments,
    add_validation_arguments,
    new_parser,
    parse_flags,
)

DEFAULTS = {
    "resolution": 32,
    "train_batch_size": 2,
    "max_train_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "dataloader_num_workers": 0,  # by default chosen by the cores; starting some takes longer than these runs
}


def words(base, images, output_dir, **settings):
    """Returns the command line: settings by flag name; True is a bare flag, None and False leave it out."""
    settings = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": images,
        "output_dir": output_dir,
        **DEFAULTS,
        **settings,
    }
    line = []
    for flag, value in settings.items():
        if value is True:
            line.append(f"--{flag}")
        elif isinstance(value, (list, tuple)):
            line += [f"--{flag}", *map(str, value)]
        elif value is not None and value is not False:
            line.append(f"--{flag}={value}")
    return line


def parse(*words):
    """The flags of text-to-image in PyTorch, made of the groups of sdtune, and no recipe's own; for tests of parts."""
    parser = new_parser("Trains.", "train [flags]")
    for add_group in (
        add_model_arguments,
        add_data_arguments,
        add_bucket_arguments,
        add_cache_arguments,
        add_objective_arguments,
        add_optimization_arguments,
        add_memory_arguments,
        add_output_arguments,
        add_validation_arguments,
        add_run_arguments,
    ):
        add_group(parser)
    parser.set_defaults(output_dir="out", report_to="none")
    args, problems = parse_flags(parser, [str(word) for word in words], {})
    assert problems == []
    return args


def train(script, base, images, output_dir, **settings):
    """Calls main() of the script; returns the exit status that its process would have."""
    # Where its workers look for the classes of what they raise: another test may have loaded the script anew.
    sys.modules[script.__name__] = script
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        script.main(words(base, images, output_dir, **settings))
    except SystemExit as stop:
        return stop.code or 0
    finally:  # accelerate keeps its state in the process, and would refuse another precision
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def trains_into(script, default_base, default_data):
    """A function that trains into a folder and returns the exit status: four steps, or as its settings say."""

    def run(output_dir, base=default_base, data=default_data, **settings):
        return train(script, base, data, output_dir, **settings)

    return run


def unet(folder):
    """The UNet's weights in a pipeline folder, by name."""
    return load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")


def text_encoder(folder):
    """The text encoder's weights in a pipeline folder, by name, without the level that published files have."""
    weights = load_file(Path(folder) / "text_encoder" / "model.safetensors")
    return {name.removeprefix("text_model."): weight for name, weight in weights.items()}


def checkpoint_state(folder):
    """All that a checkpoint holds and a resume needs: weights, optimizer, schedule, average and progress."""
    folder = Path(folder)
    weights = {}
    for file in sorted(folder.rglob("*.safetensors")):
        weights[file.relative_to(folder).as_posix()] = load_file(file)
    parts = ("progress", "state") if (folder / "optimizer.bin").exists() else ("progress",)  # a JAX run has arrays
    numbers = {name: json.loads((folder / f"{name}.json").read_text()) for name in parts}
    for file in ("optimizer.bin", "scaler.pt"):
        if (folder / file).exists():
            numbers[Path(file).stem] = torch.load(folder / file, weights_only=True)
    return {**weights, **numbers.pop("state", {}), **numbers}


def checkpoint_unet(folder):
    """The UNet's weights in a checkpoint, by name."""
    return unet(folder)


def same(a, b):
    """Whether two nested structures are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def draws(seed, epoch, index, shape=(4, 4, 4), num_timesteps=1000):
    """What a sample with latents of `shape` draws, from the definition alone: one generator, by the seed, stream 0,
    the epoch and the index, in this order."""
    generator = np.random.default_rng((seed, 0, epoch, index))
    left, top, flip, choice, drop = generator.random(5)
    timestep = int(generator.integers(num_timesteps))
    normal = torch.from_numpy(generator.standard_normal((3, *shape), np.float32))
    offset = torch.from_numpy(generator.standard_normal((shape[0], 1, 1), np.float32))
    return SimpleNamespace(
        left=left,
        top=top,
        flip=flip,
        choice=choice,
        drop=drop,
        timestep=timestep,
        posterior_noise=normal[0],
        noise=normal[1],
        perturbation=normal[2],
        offset=offset,
    )


def read_log(folder):
    """The rows of log.jsonl without what the clock and the process decide."""
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    apart = {"images_per_second", "process_gb"}
    return [{name: value for name, value in row.items() if name not in apart} for row in rows]


def losses(folder):
    """The logged losses in the order of the steps."""
    return [row["loss"] for row in read_log(folder) if "loss" in row]
