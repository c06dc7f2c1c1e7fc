"""Runs of a script that end too early, many times, in copies of a process that has imported it and trained nothing.

    PYTHONPATH=tests:. python tests/torture/lives.py SCRIPT KILLS SEED FOLDER [variant]

kills a script, such as train_text_to_image, so often; a fifth word turns cache and buckets on.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from conftest import load_script
from copies import end_of, start_copy
from diffusers import UNet2DConditionModel
from image_data import write_image_folder
from running import SCRIPTS
from safetensors import safe_open
from tiny import make_pipeline
from tqdm.auto import tqdm
from training import checkpoint_state, read_log, same, words

from sdtune.digests import find_damage

NAMES = {path.stem: path for path in SCRIPTS}
CACHE = {"center_crop": True, "cache_latents": True, "cache_text_embeddings": True}
BUCKETS = {"aspect_ratio_buckets": True, "bucket_min": 16, "bucket_max": 64, "bucket_step": 8}
WHOLE = re.compile(r"checkpoint-(\d+)")
WAITS = 180  # seconds for which a copy may take to end by itself


@dataclasses.dataclass
class Victim:
    """A script and what it trains on."""

    script: object  # the module
    base: Path
    data: Path
    settings: dict
    folder: Path  # to run in


def make_base(folder, channels):
    """Writes a pipeline with so many channels in the levels of its UNet."""
    pipeline = make_pipeline(num_blocks=len(channels))
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "block_out_channels": channels})
    pipeline.save_pretrained(folder)
    return folder


def make_victim(name, folder, channels=(96, 192), variant=()):
    """A script, by its name, with weights of a size that takes time to save, and all that is random or has a state.
    `variant`: settings that it has besides."""
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes most of the time of Flax's runs
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.environ["HF_HOME"], "compiled"))
    script = load_script(NAMES[name])
    settings = {
        "max_train_steps": 4,
        "checkpointing_steps": 1,
        "train_batch_size": 2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "learning_rate": 1e-4,
        "random_flip": True,
        "caption_dropout": 0.3,
        "cache_dir": folder / "cache",
        **dict(variant),
    }
    if "flax" in name:
        settings["adam_epsilon"] = 1e-3
        channels = channels[-1:]  # a single level, which compiles in half the time
    if "lora" in name:
        settings["rank"] = 256
    if "lora" not in name:
        settings["use_ema"] = True
    # Not square, so that crops are random, and in buckets of several sizes.
    data = write_image_folder(
        folder / "images", 7, [(48, 40), (40, 48), (56, 32), (32, 56), (48, 40), (40, 48), (32, 32)]
    )
    if "dreambooth" in name:
        settings |= {"instance_data_dir": data, "instance_prompt": "a photo of sks star"}
        settings["train_text_encoder"] = "cache_text_embeddings" not in settings
        data = None
    return Victim(script, make_base(folder / "base", channels), data, settings, folder)


def line_for(victim, output, **settings):
    """The command line of a run into a folder, which goes on from the latest checkpoint, if there is one."""
    settings = {**victim.settings, "resume_from_checkpoint": "latest", **settings}
    return words(victim.base, victim.data, output, **settings)


def start(victim, output, main=None, **settings):
    """Starts a run; returns the copy, and the file with what it says."""
    said = victim.folder / f"{output.name}.said"
    said.write_text("")  # a copy may be killed before it says anything
    script = SimpleNamespace(main=functools.partial(with_own_lock, main or victim.script.main))
    return start_copy(script, line_for(victim, output, **settings), said), said


def with_own_lock(train_main, line):
    """Calls main() of a script with a lock of its own around bars: a copy that is killed in the middle of one would
    leave tqdm's, which copies share, held for all that come after it."""
    tqdm.set_lock(threading.RLock())
    train_main(line)


def live(victim, output, main=None, **settings):
    """Runs to the end; returns the exit status and what was said."""
    copy, said = start(victim, output, main, **settings)
    return end_of(copy, WAITS), said.read_text()


def run_straight(victim, **settings):
    """The output of a run that nothing interrupts."""
    output = victim.folder / "straight"
    status, said = live(victim, output, **settings)
    assert status == 0, said
    return output


def newest_of(output):
    """The step of a run's newest checkpoint by the names of folders; 0 without one."""
    names = [WHOLE.fullmatch(path.name) for path in output.glob("checkpoint-*")]
    return max([int(name[1]) for name in names if name], default=0)


def weights_of(output):
    """What the files with weights of a run's result hold, by their paths."""
    paths = [path for path in output.rglob("*.safetensors") if "checkpoint-" not in str(path.relative_to(output))]
    assert paths
    return {path.relative_to(output).as_posix(): content_of(path) for path in paths}


def content_of(path):
    """Tensors and metadata of a safetensors file, whose order says nothing."""
    with safe_open(path, "pt") as file:
        return {"metadata": file.metadata(), **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


def assert_as_straight(output, straight):
    """A run ended with the bits of another one: result, last checkpoint and log; nothing unfinished is left."""
    assert same(weights_of(output), weights_of(straight))
    last = f"checkpoint-{newest_of(straight)}"
    assert same(checkpoint_state(output / last), checkpoint_state(straight / last))
    assert read_log(output) == read_log(straight)
    assert [path.name for path in output.iterdir() if "partial" in path.name] == []
    for path in output.glob("checkpoint-*"):
        assert find_damage(path) is None


def went_on_from(said):
    """The step that a run said it starts at; None if it did not come so far."""
    found = re.search(r"^ +steps +(\d+) to", said, re.MULTILINE)
    return int(found[1]) if found else None


def where_killed(output, before, pid):
    """In what a process was when it was killed, by what it left."""
    left = {path.name for path in output.glob("*partial")} if output.exists() else set()
    if any(name.endswith(f"-{pid}.partial") for name in left):
        return "in a save"
    if any(re.fullmatch(r"checkpoint-\d+\.partial", name) for name in left - before):
        return "in the removal of an old checkpoint"
    if ".result.partial" in left - before:
        return "in the result"
    return "elsewhere"


def kill_at_random(victim, num_kills, seed, num_steps=20):
    """Kills runs at moments drawn from `seed`, and goes on with each; one that came to its end begins anew. Asserts
    that all go on from their newest checkpoint, and end as if nothing had happened. Returns how many were killed
    where."""
    draw, settings = random.Random(seed), {"max_train_steps": num_steps, "checkpoints_total_limit": 2}
    started = time.monotonic()
    straight = run_straight(victim, **settings)
    seconds = time.monotonic() - started
    longest = max(2.0, seconds / 3)  # of a life: beginning, and some steps
    output, kills, stuck = victim.folder / "killed", Counter(), 0
    while kills.total() < num_kills:
        newest = newest_of(output)
        before = {path.name for path in output.glob("*partial")}
        copy, said = start(victim, output, **settings)
        copy.join(draw.uniform(0, longest))
        copy.kill()
        copy.join()
        step = went_on_from(said.read_text())
        assert step in (None, newest), said.read_text()
        assert newest_of(output) >= newest
        if copy.exitcode == -signal.SIGKILL:
            kills[where_killed(output, before, copy.pid)] += 1
            stuck = stuck + 1 if newest_of(output) == newest else 0
            longest *= 1.3 if stuck >= 5 else 1  # the machine is busier now
        else:
            assert copy.exitcode == 0, said.read_text()
            assert_as_straight(output, straight)
            shutil.rmtree(output)
    status, said = live(victim, output, **settings)
    assert status == 0, said
    assert_as_straight(output, straight)
    return kills


def files_of(checkpoint):
    """The files of a checkpoint, by their paths in it."""
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def dying_at(train_main, is_there):
    """main() of a script that kills itself, as soon as `is_there(event, words)` says of what Python does with files,
    as `sys.addaudithook` tells it, that it is time."""

    def watch(event, words):
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and is_there(event, words):
            os.kill(os.getpid(), signal.SIGKILL)

    def run(line):
        sys.addaudithook(watch)
        train_main(line)

    return run


def half_written(name):
    """Whether Python is about to write the file `name` of a checkpoint; then half of it is there."""

    def is_there(event, words):
        path, mode = str(words[0]), words[1] if event == "open" else None
        if event != "open" or not mode or mode[0] not in "wx" or not re.search(rf"\.partial/{re.escape(name)}$", path):
            return False
        Path(path).parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
        os.write(descriptor, b'{"half')
        return True

    return is_there


def at_number(event, number, pattern):
    """Whether something happens for that many times to what has a path of that pattern."""
    counts = Counter()

    def is_there(happened, words):
        counts[event] += happened == event and bool(re.search(pattern, str(words[0])))
        return counts[event] == number

    return is_there


def kill_in_file(victim, output, name, **settings):
    """Kills a run while the file `name` of its next checkpoint is written; by itself where Python writes it, else when
    a part of it is there. Returns what was said, and the bytes that were there."""
    copy, said = start(victim, output, dying_at(victim.script.main, half_written(name)), **settings)
    # safetensors writes beside the place, as .tmp..., and renames.
    names = [name, Path(name).parent / ".tmp*"] if name.endswith(".safetensors") else [name]
    places = [f"checkpoint-*-{copy.pid}.partial/{path}" for path in names]
    deadline = time.monotonic() + WAITS
    while copy.exitcode is None and not sum(sizes_of(output, places)):
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.0005)
    copy.kill()
    copy.join()
    assert copy.exitcode == -signal.SIGKILL, said.read_text()
    return said.read_text(), sum(sizes_of(output, places))


def sizes_of(folder, patterns):
    """The sizes of the files of these patterns in a folder; they may be renamed meanwhile."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                yield path.stat().st_size


# What Python does with a checkpoint beside writing its files: event, for the how many-th time, with what; and the
# newest whole checkpoint then.
BETWEEN = {
    "before its name": (("os.rename", 1, r"-\d+\.partial$"), 2),
    "before the old one goes": (("os.rename", 1, r"/checkpoint-\d+$"), 3),
    "in the old one's removal": (("os.remove", 2, r"^[^/]+$"), 3),
    "at the end of the old one's removal": (("os.rmdir", 1, r"/checkpoint-\d+\.partial$"), 3),
}


def stop_at(victim, output, step, **settings):
    """Makes a run that was killed when it had written the checkpoint of a step, and no later one."""
    point = at_number("os.rename", step + 1, r"-\d+\.partial$")
    status, said = live(victim, output, dying_at(victim.script.main, point), **settings)
    assert status == -signal.SIGKILL, said
    assert newest_of(output) == step
    for path in output.glob("*.partial"):
        shutil.rmtree(path)
    return output


def kill_in_every_file(victim, limit):
    """Kills runs inside of each file of a checkpoint, and between; asserts that each goes on from its newest whole
    checkpoint, and ends as if nothing had happened. Returns of each file how much of it there was."""
    settings = {"max_train_steps": 3, "checkpoints_total_limit": limit}
    straight = run_straight(victim, **settings)
    stopped = stop_at(victim, victim.folder / "stopped", 2, **settings)
    output, written = shutil.copytree(stopped, victim.folder / f"limit_{limit}"), {}
    for name in files_of(straight / "checkpoint-3"):  # each goes on with what the one before has left
        size = (straight / "checkpoint-3" / name).stat().st_size
        said, part = kill_in_file(victim, output, name, **settings)
        assert went_on_from(said) == newest_of(output) == 2
        written[name] = f"{part} of {size}"
    finish(victim, output, straight, 2, **settings)
    for where, (point, newest) in BETWEEN.items():
        shutil.copytree(stopped, output)
        status, said = live(victim, output, dying_at(victim.script.main, at_number(*point)), **settings)
        assert status == -signal.SIGKILL, (where, said)
        assert newest_of(output) == newest
        written[where] = f"checkpoint-{newest}"
        finish(victim, output, straight, newest, **settings)
    shutil.rmtree(stopped)
    shutil.rmtree(straight)
    return written


def finish(victim, output, straight, newest, **settings):
    """Goes on with a run, which shall begin with its newest checkpoint and end as if nothing had happened."""
    status, said = live(victim, output, **settings)
    assert status == 0, said
    assert went_on_from(said) == newest
    assert_as_straight(output, straight)
    shutil.rmtree(output)


def failing_at(train_main, is_there, number):
    """main() of a script for which what Python does with files fails with an error of the system if `is_there(event,
    words)`."""

    def watch(event, words):
        if event in ("open", "os.rename", "os.mkdir") and is_there(event, words):
            raise OSError(number, os.strerror(number), str(words[0]))

    def run(line):
        sys.addaudithook(watch)
        train_main(line)

    return run


def torture(function, name, folder, *rest, **more):
    """Calls function(victim, *rest) for a script by its name, in a folder that is removed afterwards; for JAX in a
    process of its own, since copies of one that has computed with it would hang."""
    if "flax" not in name:
        return call(function, name, folder, rest, more)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, function, name, folder, rest, more).result()


def call(function, name, folder, rest, more):
    """What `torture` does in the right process."""
    try:
        return function(make_victim(name, folder, **more), *rest)
    finally:
        shutil.rmtree(folder)


def main(argv):
    """Kills runs of a script: NAME NUMBER [SEED [FOLDER [cached]]], the last of which turns cache and buckets on."""
    name, number = argv[0], int(argv[1])
    seed, folder = int(argv[2]) if len(argv) > 2 else 0, Path(argv[3] if len(argv) > 3 else "/tmp")
    folder = folder / f"torture_{name}_{seed}_{os.getpid()}"
    variant = {**CACHE, **BUCKETS} if len(argv) > 4 else {}
    folder.mkdir(parents=True)
    try:
        kills = kill_at_random(make_victim(name, folder, variant=variant), number, seed)
    finally:
        shutil.rmtree(folder)
    print(f"{name}: {kills.total()} kills, {dict(kills)}; all went on, to the bit")


if __name__ == "__main__":
    main(sys.argv[1:])
