"""What may go wrong around a run; each function does it to a script, and asserts that nothing is lost."""

import errno
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from lives import (
    assert_as_straight,
    end_of,
    failing_at,
    live,
    newest_of,
    run_straight,
    start,
    stop_at,
    weights_of,
    went_on_from,
)
from safetensors import safe_open
from training import checkpoint_state, same

from sdtune.digests import write_digests

MAX_LINES = 12  # of a message


def message_of(said):
    """The last line of what a script said, without its bar and empty ones; after the bar there are no more lines than
    a message may have, and no traceback anywhere."""
    assert "Traceback" not in said, said
    lines = [line for line in said.splitlines() if line.strip()]
    bars = [number for number, line in enumerate(lines) if re.search(r"\d+%\|", line)]
    assert len(lines) - (bars[-1] + 1 if bars else 0) <= MAX_LINES or not bars, said
    return [line for line in lines if not re.search(r"\d+%\|", line)][-1]


def straight_and_stopped(victim, **settings):
    """A whole run of four steps, and one that was killed after two of them."""
    straight = run_straight(victim, **settings)
    return straight, stop_at(victim, victim.folder / "out", 2, **settings)


def goes_on(victim, output, straight, **settings):
    """Goes on to the end; the result is that of the whole run."""
    status, said = live(victim, output, **settings)
    assert status == 0, said
    assert same(weights_of(output), weights_of(straight))
    return said


def opened(pattern, number=1):
    """Whether Python opens a file of that pattern to write it, for at least the how many-th time."""
    times = 0

    def is_there(event, words):
        nonlocal times
        is_written = event == "open" and words[1] and words[1][0] in "wxa"
        times += bool(is_written and re.search(pattern, str(words[0])))
        return bool(is_written and re.search(pattern, str(words[0]))) and times >= number

    return is_there


def fill_disk(victim, pattern, number, told, settings):
    """Has the disk be full when a file of that pattern is written; what has been written stays, and with room the run
    goes on."""
    straight, output = run_straight(victim, **settings), victim.folder / "out"
    if "encoded" in pattern:
        shutil.rmtree(victim.settings["cache_dir"] / "encoded")
    main = failing_at(victim.script.main, opened(pattern, number), errno.ENOSPC)
    status, said = live(victim, output, main, **settings)
    assert status == (2 if "encoded" in pattern else 1), said  # before the first step nothing is to be kept
    assert re.search(told, message_of(said)), said
    newest = newest_of(output)
    said = goes_on(victim, output, straight, **settings)
    assert went_on_from(said) == newest


def disk_full_in_cache(victim):
    """While images are encoded."""
    cached = {"center_crop": True, "cache_latents": True}
    fill_disk(
        victim,
        r"/encoded/",
        3,
        r"/cache/encoded: the disk is full; .* make room, or name another --cache_dir$",
        cached,
    )


def disk_full_in_result(victim):
    """All steps are done."""
    told = r"Stopped after step 4 by a full disk\. .*checkpoint-4 holds its state; .* Make room first"
    fill_disk(victim, r"\.result\.partial/", 1, told.replace(" Make", r"\. Make"), {})


def disk_full_in_samples(victim):
    """Of the second look."""
    settings = {"validation_prompts": ["a red circle"], "validation_steps": 2, "num_validation_images": 1}
    told = r"Stopped after step 2 by a full disk\. .*checkpoint-2 holds its state"
    fill_disk(victim, r"/samples/", 2, told, settings)


def disk_full_in_log(victim):
    """In the third line, after the step."""
    told = r"Stopped after step 3 by a full disk\. .*checkpoint-3 holds its state"
    fill_disk(victim, r"/log\.jsonl$", 3, told, {"logging_steps": 1})


def disk_full_in_checkpoint(victim):
    """A limit on the size of files holds for what other languages write too."""
    straight, output = straight_and_stopped(victim)
    before = checkpoint_state(output / "checkpoint-2")

    def limited(line):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        victim.script.main(line)

    status, said = live(victim, output, limited)
    assert status == 1, said
    told = r"Stopped after step 3 by a full disk\. No checkpoint could be written \(the disk is full\); go on from"
    assert re.search(told, message_of(said)), said
    assert newest_of(output) == 2
    assert same(checkpoint_state(output / "checkpoint-2"), before)
    goes_on(victim, output, straight)
    assert_as_straight(output, straight)


def read_only_output(victim):
    """From the start, and from the third step on, as a disk becomes that has errors."""
    straight, output = run_straight(victim), victim.folder / "out"

    def writes(event, words):
        return str(words[0]).startswith(str(output)) and (event != "open" or not words[1] or words[1][0] in "wxa")

    status, said = live(victim, output, failing_at(victim.script.main, writes, errno.EROFS))
    assert status == 2, said
    assert f"--output_dir={output}: cannot be made" in message_of(said)
    log = opened(r"/log\.jsonl$", 3)
    is_broken = False

    def breaks(event, words):
        nonlocal is_broken
        is_broken = is_broken or log(event, words)
        return is_broken and writes(event, words)

    status, said = live(victim, output, failing_at(victim.script.main, breaks, errno.EROFS), logging_steps=1)
    assert status == 1, said
    told = (
        r"Stopped after step 3 by a file that cannot be written \(.*Read-only file system.*go on from .*checkpoint-2 "
    )
    assert re.search(told, message_of(said)), said
    goes_on(victim, output, straight)
    assert_as_straight(output, straight)


def wait_for(condition, copy, said, seconds=120):
    """Waits until something is so in a running copy."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert copy.is_alive(), said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def output_removed(victim):
    """While it runs; then the run makes it anew, for its last state."""
    output, settings = (
        victim.folder / "out",
        {"lr_scheduler": "constant", "lr_warmup_steps": None, "max_train_steps": 1000},
    )
    copy, said = start(victim, output, **settings)
    wait_for(lambda: newest_of(output) >= 2, copy, said)
    output.rename(victim.folder / "trash")
    assert end_of(copy) == 1, said.read_text()
    step = newest_of(output)
    assert step >= 2
    told = (
        f"Stopped after step {step} by the loss of {output}, which was removed meanwhile. {output}/checkpoint-{step}"
    )
    assert told in message_of(said.read_text())
    settings["max_train_steps"] = step + 1
    status, text = live(victim, output, **settings)
    assert status == 0, text
    assert went_on_from(text) == step
    assert same(weights_of(output), weights_of(run_straight(victim, **settings)))


def second_run(victim):
    """It is refused, by whatever flag it comes; what a kill leaves of the first one is no lock."""
    output, settings = (
        victim.folder / "out",
        {"lr_scheduler": "constant", "lr_warmup_steps": None, "max_train_steps": 1000},
    )
    copy, said = start(victim, output, **settings)
    try:
        wait_for(lambda: newest_of(output) >= 1, copy, said)
        for flags in ({}, {"resume_from_checkpoint": None, "overwrite_output_dir": True}):
            (second := victim.folder / "second").mkdir(exist_ok=True)
            other = type(victim)(victim.script, victim.base, victim.data, victim.settings, second)
            status, text = live(other, output, **settings, **flags)
            assert status == 2, text
            assert f"--output_dir={output}: another run is writing there" in message_of(text)
        assert copy.is_alive()
    finally:
        copy.kill()
        copy.join()
    step = newest_of(output)
    status, text = live(victim, output, **{**settings, "max_train_steps": step + 1})
    assert status == 0, text
    assert went_on_from(text) == step


def flipped_bit(victim):
    """In the middle of the newest checkpoint's largest file: the one before is used, and nothing is removed."""
    straight, output = straight_and_stopped(victim)
    newest = output / "checkpoint-2"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    name = largest.relative_to(newest).as_posix()
    status, said = live(victim, output, resume_from_checkpoint="checkpoint-2")
    assert status == 2
    told = f"checkpoint-2 is damaged (the content of {name} has changed since it was written)"
    assert f"--resume_from_checkpoint=checkpoint-2: {told}; name another one" in message_of(said)
    said = goes_on(victim, output, straight)
    assert f"{told}; checkpoint-1 is used instead.\n" in said
    assert went_on_from(said) == 1
    assert (output / "checkpoint-2.damaged" / name).read_bytes() == content
    shutil.rmtree(output / "checkpoint-2.damaged")
    assert_as_straight(output, straight)


def stray_folders(victim):
    """Beside checkpoints, which are not the script's."""
    straight, output = straight_and_stopped(victim)
    shutil.copytree(output / "checkpoint-1", output / "checkpoint-best")
    (output / "checkpoint-").mkdir()
    (output / "checkpoint-9").mkdir()  # which lacks all files
    said = goes_on(victim, output, straight)
    assert went_on_from(said) == 2
    assert same(checkpoint_state(output / "checkpoint-best"), checkpoint_state(straight / "checkpoint-1"))
    assert (output / "checkpoint-9.damaged").is_dir()


def resume_paths(victim):
    """A checkpoint may be named in every way; from another folder's a new run begins."""
    straight, output = straight_and_stopped(victim)
    os.chdir(victim.folder)
    for path in (output / "checkpoint-2", "out/checkpoint-2", "checkpoint-2", "./out/../out/checkpoint-2", "latest"):
        status, said = live(victim, output, resume_from_checkpoint=path, dry_run=True)
        assert status == 0, said
        assert went_on_from(said) == 2
    for path in (output / "checkpoint-1", "out/checkpoint-1", "checkpoint-1"):
        status, said = live(victim, output, resume_from_checkpoint=path)
        assert status == 2
        assert "checkpoint-2 is newer; use that" in message_of(said)
    for number, path in enumerate((output / "checkpoint-1", "out/checkpoint-1")):
        said = goes_on(victim, victim.folder / f"new_{number}", straight, resume_from_checkpoint=path)
        assert went_on_from(said) == 1


def nan_loss(victim):
    """A rate that throws the weights far off: the run ends with those of before."""
    output = victim.folder / "out"
    settings = {"learning_rate": 1e30, "adam_weight_decay": 0, "lr_scheduler": "constant", "lr_warmup_steps": None}
    status, said = live(victim, output, **settings, max_train_steps=20)
    assert status == 1, said
    assert "a loss or gradient that is not finite" in message_of(said)
    assert "a lower --learning_rate" in message_of(said)
    newest = output / f"checkpoint-{newest_of(output)}"
    for path in newest.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def planted_pickle(victim):
    """In the place of each file that is no text, by somebody who knows of digests: none runs."""
    straight, output = straight_and_stopped(victim)
    ran, whole = victim.folder / "ran", victim.folder / "whole"
    output.rename(whole)
    names = [path.relative_to(whole) for path in (whole / "checkpoint-2").rglob("*") if path.suffix != ".json"]
    planted = 0
    for name in [name for name in names if (whole / name).is_file()]:
        for write in (torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))):
            shutil.copytree(whole, output)
            write({"state": Bomb(ran), "param_groups": Bomb(ran)}, output / name)
            write_digests(output / "checkpoint-2")
            status, said = live(victim, output, dry_run=True)
            assert not ran.exists(), name
            if status == 2:
                assert "checkpoint-2 is damaged, or of another script; name another" in message_of(said)
            planted += 1
            shutil.rmtree(output)
    assert planted >= 2
    whole.rename(output)
    goes_on(victim, output, straight)


def stopped_by_signals(victim):
    """SIGTERM, SIGINT and SIGHUP finish the step and save; SIGUSR1 and SIGUSR2 save, and the run goes on."""
    output = victim.folder / "out"
    settings = {
        "lr_scheduler": "constant",
        "lr_warmup_steps": None,
        "max_train_steps": 10_000,
        "checkpointing_steps": 10_000,
        "logging_steps": 1,
    }
    saved = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        copy, said = start(victim, output, **settings)
        wait_for(lambda: "steps " in said.read_text() and steps_of(output) > newest_of(output), copy, said)  # noqa: B023
        for save in (signal.SIGUSR1, signal.SIGUSR2):
            before = newest_of(output)
            os.kill(copy.pid, save)
            wait_for(lambda: newest_of(output) > before, copy, said)  # noqa: B023
            saved.append(newest_of(output))
        wait_for(lambda: steps_of(output) > newest_of(output), copy, said)
        os.kill(copy.pid, number)
        os.kill(copy.pid, number)  # as a launcher hands on what its group has got
        assert end_of(copy) == 128 + number, said.read_text()
        step = newest_of(output)
        assert f"checkpoint-{step} holds the state after step {step}" in message_of(said.read_text())
        saved.append(step)
    settings |= {"max_train_steps": step + 1}
    status, text = live(victim, output, **settings)
    assert status == 0, text
    assert went_on_from(text) == step
    assert sorted(saved) == saved
    straight = run_straight(victim, **settings)
    assert same(weights_of(output), weights_of(straight))


def steps_of(output):
    """How many steps have been logged."""
    log = output / "log.jsonl"
    return log.read_text().count("images_per_second") if log.exists() else 0


def ignored_hangup(victim):
    """As under `nohup`, whose user logs out."""
    output = victim.folder / "out"

    def with_nohup(line):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        victim.script.main(line)

    copy, said = start(victim, output, with_nohup, logging_steps=1)
    wait_for(lambda: steps_of(output) >= 1, copy, said)
    os.kill(copy.pid, signal.SIGHUP)
    assert end_of(copy) == 0, said.read_text()
    assert "Finishing the step" not in said.read_text()


def lost_reader(victim):
    """What reads the output, such as `tee`, ends while the script runs."""
    output = victim.folder / "out"
    endless = {"lr_scheduler": "constant", "lr_warmup_steps": None, "max_train_steps": 10_000}
    read_end, write_end = os.pipe()

    def piped(line):
        os.close(read_end)
        for descriptor in (1, 2):
            os.dup2(write_end, descriptor)
        sys.stdout, sys.stderr = [os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2)]
        victim.script.main(line)

    copy, said = start(victim, output, piped, **endless, checkpointing_steps=10_000, logging_steps=1)
    os.close(write_end)
    wait_for(lambda: steps_of(output) >= 2, copy, said)
    os.close(read_end)
    assert end_of(copy) == 1
    step = newest_of(output)
    assert 2 <= step <= steps_of(output) + 1  # a print may come before the log
    status, text = live(victim, output, **{**endless, "max_train_steps": step + 1})
    assert status == 0, text
    assert went_on_from(text) == step


FAULTS = [
    disk_full_in_checkpoint,
    disk_full_in_cache,
    disk_full_in_result,
    disk_full_in_samples,
    disk_full_in_log,
    read_only_output,
    output_removed,
    second_run,
    flipped_bit,
    stray_folders,
    resume_paths,
    nan_loss,
    planted_pickle,
    stopped_by_signals,
    ignored_hangup,
    lost_reader,
]
