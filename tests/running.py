"""Runs a script as a user does: in a process of its own, by itself or through a launcher."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
TRAIN_TEXT_TO_IMAGE = REPO / "examples" / "text_to_image" / "train_text_to_image.py"
TRAIN_TEXT_TO_IMAGE_LORA = REPO / "examples" / "text_to_image" / "train_text_to_image_lora.py"
TRAIN_TEXT_TO_IMAGE_FLAX = REPO / "examples" / "text_to_image" / "train_text_to_image_flax.py"
TRAIN_DREAMBOOTH = REPO / "examples" / "dreambooth" / "train_dreambooth.py"
TRAIN_DREAMBOOTH_LORA = REPO / "examples" / "dreambooth" / "train_dreambooth_lora.py"
SCRIPTS = [
    TRAIN_TEXT_TO_IMAGE,
    TRAIN_TEXT_TO_IMAGE_LORA,
    TRAIN_TEXT_TO_IMAGE_FLAX,
    TRAIN_DREAMBOOTH,
    TRAIN_DREAMBOOTH_LORA,
]


def command_for(args, script=TRAIN_TEXT_TO_IMAGE, launcher="python", nproc=1):
    """Returns (command, environment additions).

    launcher: "python", "accelerate" (`accelerate launch`, one process) or "torchrun".
    nproc: more than one means that many CPU processes under torchrun, whatever the launcher:
        `accelerate launch --cpu --num_processes 2` silently runs one.
    """
    args = [str(arg) for arg in args]
    if nproc > 1 or launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
        return command + [str(script)] + args, {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if launcher == "accelerate":
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
        return command + [str(script)] + args, {"OMP_NUM_THREADS": "1"}
    if launcher == "python":
        return [sys.executable, str(script)] + args, {}
    raise ValueError(f"unknown launcher {launcher!r}")


def run_script(args, env=None, nproc=1, launcher="python", script=TRAIN_TEXT_TO_IMAGE, cwd=None, timeout=300):
    """Runs the script to its end; returns the CompletedProcess with stdout and stderr as text (never raises for its
    status). `env` is added to the environment; None as a value removes a variable."""
    command, additions = command_for(args, script, launcher, nproc)
    process_env = environment(additions | (env or {}))
    return subprocess.run(
        command, env=process_env, cwd=cwd, timeout=timeout, text=True, capture_output=True, check=False
    )


def start_script(args, env=None, nproc=1, launcher="python", script=TRAIN_TEXT_TO_IMAGE, cwd=None):
    """Starts the script and returns the Popen (stderr goes into stdout, as text), for tests that send signals.

    It leads a process group of its own, so that a test can end a launcher and its workers together.
    """
    command, additions = command_for(args, script, launcher, nproc)
    process_env = environment(additions | {"PYTHONUNBUFFERED": "1"} | (env or {}))
    return subprocess.Popen(
        command,
        env=process_env,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_command(words, env=None, cwd=None):
    """Runs `python -m sdtune` with the words, from any folder, as `run_script` runs a script."""
    return run_script(["sdtune", *words], {"PYTHONPATH": str(REPO)} | (env or {}), script="-m", cwd=cwd)


def start_command(words, env=None):
    """Starts `python -m sdtune` with the words as `start_script` starts a script."""
    return start_script(["sdtune", *words], {"PYTHONPATH": str(REPO)} | (env or {}), script="-m")


def status_of(main, *words):
    """Calls the main() of a command in this process; returns the exit status that a process would have."""
    try:
        return main([str(word) for word in words]) or 0
    except SystemExit as stop:
        return stop.code or 0


def catches(job, number):
    """Whether a process has an answer to a signal."""
    status = Path(f"/proc/{job.pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) & 1 << number - 1)


def wait_for(condition, job):
    """Waits until something holds, while a job goes on."""
    deadline = time.monotonic() + 60
    while not condition():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_when(process, condition, seconds=240):
    """Ends a process of `start_script` by SIGKILL as soon as the condition holds, which it has to within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def kill_copy_when(condition, main, *words, seconds=60):
    """Calls the main() of a command in a copy of this process, which has no imports to wait for, and ends that by
    SIGKILL as soon as the condition holds."""
    process = multiprocessing.get_context("fork").Process(target=main, args=([str(word) for word in words],))
    process.start()
    try:
        deadline = time.monotonic() + seconds
        while not condition():
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL


def environment(additions):
    """Returns a copy of the environment with the additions; None as a value removes a variable."""
    merged = os.environ | additions
    return {name: value for name, value in merged.items() if value is not None}
