"""Runs training commands through `probe.py`, lets them take turns, and sums up what was measured."""

import contextlib
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Client, Listener
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = "torch diffusers transformers accelerate datasets peft bitsandbytes xformers numpy pillow".split()
LAUNCH = "accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
CONFIDENCE = 0.95


class Run:
    """A training script in processes of its own, which waits for its turn before its first step and after each.

    `messages` are those of `probe.py`: (event, seconds of CPU, seconds of its turns, bytes of the device).
    """

    def __init__(self, script, flags, folder, timeout=900, num_processes=1, environment=None):
        self.log = Path(folder, f"{Path(script).stem}.log")
        self.messages, self.seconds_to_first_step, self.connection = [], None, None
        self.place = tempfile.TemporaryDirectory()
        self.listener = Listener(str(Path(self.place.name, "turns")))
        command = [*launcher(num_processes), str(HERE / "probe.py"), str(script), *map(str, flags)]
        variables = {"BENCHMARK_ADDRESS": self.listener.address, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if num_processes > 1:
            variables["ACCELERATE_USE_CPU"] = "true"
        self.launched = time.perf_counter()
        with self.log.open("w", encoding="utf-8") as log:
            environment = os.environ | variables | (environment or {})
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.timer = threading.Timer(timeout, self.kill)
        self.watcher = threading.Thread(target=self.watch)
        self.timer.start()
        self.watcher.start()

    def watch(self):
        """Waits for the end of the launcher, whose peak of memory is that of the largest process below it."""
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        with contextlib.suppress(OSError):  # `step` may still wait for a script that ended before it called
            Client(self.listener.address).close()

    def kill(self):
        """Ends the script where it is, with all processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def step(self):
        """Gives the script its turn and waits for its next message; returns whether one came."""
        try:
            if self.connection is None:
                self.connection = self.listener.accept()
            else:
                self.connection.send("go")
            self.messages.append(self.connection.recv())
        except (EOFError, OSError):
            return False
        if len(self.messages) == 1:
            self.seconds_to_first_step = time.perf_counter() - self.launched
        return True

    def finish(self):
        """Lets the script come to its end. Raises `RuntimeError`, with what it said last, if it failed."""
        while self.step():
            pass
        self.close()
        if self.process.returncode != 0:
            raise RuntimeError(f"{self.log.stem} ended with status {self.process.returncode}:\n{self.told()}")

    def close(self):
        """Waits for the end of the processes."""
        self.watcher.join()
        self.timer.cancel()
        self.listener.close()
        self.place.cleanup()

    def told(self):
        """The end of what the script said."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-2000:]

    def per_step(self, column, skipped=2):
        """What a step took on average in a column of the messages; the first ones warm up and do not count."""
        steps = [message[column] for message in self.messages if message[0] == "step"][skipped:]
        return (steps[-1] - steps[0]) / (len(steps) - 1)


def launcher(num_processes):
    """The words that start a script, before its name."""
    if num_processes > 1:  # `accelerate launch --cpu` would start one
        torchrun = f"torch.distributed.run --standalone --nproc_per_node {num_processes}"
        return [sys.executable, "-m", *torchrun.split()]
    return [sys.executable, "-m", *LAUNCH.split(), *([] if torch.accelerator.is_available() else ["--cpu"])]


def start(script, flags, folder, num_processes=1, timeout=900):
    """Starts a run that writes into `folder`, anew but with its caches; returns it at its first step."""
    shutil.rmtree(folder / "output", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    # What is remembered of the data lies here and stays.
    environment = {"HF_DATASETS_CACHE": str(folder / "datasets")}
    words = [*flags, f"--output_dir={folder / 'output'}"]
    run = Run(script, words, folder, timeout, num_processes, environment)
    if not run.step():
        run.finish()
    return run


def run_in_turns(starts):
    """Takes runs, given as arguments of `start`, to their ends, step by step in turns; returns their measures."""
    runs = [start(*arguments) for arguments in starts]
    going = runs
    while going:
        going = [run for run in going if run.step()]
    for run in runs:
        run.finish()
    return [measures_of(run) for run in runs]


def measures_of(run):
    """What is measured in a run that has ended, by name."""
    on_device = torch.accelerator.is_available()
    measures = {
        "seconds_per_step": run.per_step(2 if on_device else 1),
        "peak_memory": run.messages[-1][3] if on_device else run.peak_bytes,
        "time_to_first_step": run.seconds_to_first_step,
        "cpu_to_first_step": run.messages[0][1],
    }
    if on_device:
        measures["peak_process_memory"] = run.peak_bytes
    return measures


def interval_of_median(values, confidence=CONFIDENCE):
    """(low, high, confidence) of the narrowest interval between two of the values, from both ends alike, that holds
    the median of what they are drawn from with this confidence, or with the most that so few values allow: by order
    statistics, which assume nothing of the distribution."""
    values, number = sorted(values), len(values)
    for cut in range((number - 1) // 2, -1, -1):
        outside = sum(math.comb(number, below) for below in range(cut + 1)) / 2**number
        if 1 - 2 * outside >= confidence or cut == 0:
            return values[cut], values[number - 1 - cut], 1 - 2 * outside
    raise ValueError("no values")


def spread_of(values):
    """The median of values, and how they spread."""
    low, high, _ = interval_of_median(values)
    return {"median": statistics.median(values), "low": low, "high": high, "values": values}


def versions():
    """The versions of what measurements depend on, by name."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def machine():
    """What is measured on, in words."""
    if torch.accelerator.is_available():
        return torch.cuda.get_device_name()
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    return f"{names[0] if names else platform.machine()}, one thread"


def merge_records(path, records):
    """Writes records into a JSON list, each in the place of that of the same name."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    merged = {record["name"]: record for record in [*old, *records]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(merged.values()), indent=1) + "\n", encoding="utf-8")
