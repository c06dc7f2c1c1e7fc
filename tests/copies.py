"""Runs scripts and launchers in copies of the test's own process: as apart as other processes, without seconds of
imports."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import types

import psutil
import torch
from running import command_for

FORK = multiprocessing.get_context("fork")


def start_copy(script, words, said, **environment):
    """Starts main() of a script with the words in a copy of this process; returns the copy. What it prints is appended
    to the file `said`, and `environment` is added to its variables."""
    if isinstance(script, types.ModuleType):  # where workers look for the classes of what they raise
        sys.modules[script.__name__] = script
    copy = FORK.Process(target=run_main, args=(script.main, [words], said, environment))
    copy.start()
    return copy


def start_launcher(script, words, said, launcher, nproc=1, **environment):
    """Starts a launcher, which starts the script as users do, in a process of its own; returns the launcher. The
    others are as in `start_copy`."""
    command, more = command_for(words, script.__file__, launcher, nproc)
    _, _, module, *launcher_words = command  # python -m module ...
    copy = FORK.Process(target=run_main, args=(run_module, [module, launcher_words], said, more | environment))
    copy.start()
    return copy


def run_module(module, words):
    """Does what `python -m` does."""
    sys.argv = [module, *words]
    sys.modules.pop(module, None)  # runpy would warn of it
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_main(main, words, said, environment):
    """Calls main(*words) as if this process had begun with it; its end becomes the exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stderr = open(said, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (until the process ends)
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)
    os.environ.update(environment)
    torch.set_num_threads(1)  # others of this process were not copied
    main(*words)


def end_of(copy, seconds=120):
    """Waits for a copy to end; returns its exit status, that of a signal as a negative number."""
    copy.join(seconds)
    if copy.is_alive():
        copy.kill()
        copy.join()
        raise TimeoutError(f"the copy did not end in {seconds} seconds")
    return copy.exitcode


def wait_for_end(process, seconds=120):
    """Waits until a process has ended that is not this one's own; nobody may have asked for its exit status yet."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "it goes on"
            time.sleep(0.01)


def start_ranks(script, lines, files, num_local, **environment):
    """Starts main() of a script in copies that share the work, as torchrun starts them with `num_local` on a machine:
    each has a command line, and a file for what it says; returns the copies. `environment` is added to their
    variables."""
    together = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(len(lines)),
        "LOCAL_WORLD_SIZE": str(num_local),
        "TORCHELASTIC_RUN_ID": "none",
        "ACCELERATE_USE_CPU": "true",
        **environment,
    }
    copies = []
    for rank, (line, file) in enumerate(zip(lines, files, strict=True)):
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank % num_local)}
        copies.append(start_copy(script, line, file, **together, **numbers))
    return copies


def run_copies(script, words, said, number=2, seconds=240, **environment):
    """Runs main() of a script in so many copies that share the work, as torchrun starts them on one machine; returns
    their exit statuses. `environment` is added to their variables."""
    copies = start_ranks(script, [words] * number, [said] * number, number, **environment)
    deadline = time.monotonic() + seconds
    while any(copy.is_alive() for copy in copies):
        failed = [copy for copy in copies if copy.exitcode]
        if failed or time.monotonic() > deadline:  # the others would wait for it for a day
            time.sleep(1)
            for copy in copies:
                copy.kill()
        time.sleep(0.01)
    return [copy.exitcode for copy in copies]


def run_machines(script, lines, said):
    """Runs main() of a script in copies with a command line each, as torchrun starts them on a machine each; returns
    their exit statuses and what they said."""
    files = [said.with_suffix(f".{rank}") for rank in range(len(lines))]
    copies = start_ranks(script, lines, files, 1)
    return [end_of(copy) for copy in copies], [file.read_text() for file in files]


def free_port():
    """A port of this machine that nobody listens on."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
