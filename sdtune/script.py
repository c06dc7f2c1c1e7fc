"""Run a script: read its flags, tell what is wrong with them, train."""

import contextlib
import gc
import io
import os
import re
import socket
import sys

from sdtune.arguments import NOT_UNDERSTOOD, check_encoding, parse_flags
from sdtune.errors import (
    InputError,
    is_lost_peer,
    last_line,
    print_any_character,
    raise_problems,
    told_to_user,
)
from sdtune.models import quiet_libraries
from sdtune.output import locked_output
from sdtune.signals import find_launcher, stopped_by_signals


def run_launched_script(program, parser, argv, replaced_flags, check_args, train):
    """Runs a training script as `run_script` does, in a process that a launcher may have started: `train(args,
    launcher)` gets to know that, and of several processes the first one speaks."""
    launcher = find_launcher()  # first of all: it may die soon, and accelerate sets variables of its own
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    is_first = rank == "0"
    if not is_first:
        program = f"{program}, rank {rank} on {socket.gethostname()}"
    # The first process of a machine tells its mistakes. The others do, too, if they live to: their launcher ends them
    # when the first one, which has mostly made the same mistake, has ended.
    patience = 0 if local_rank == "0" else 5

    def start(args):
        with work_of(args, is_first):
            train(args, launcher)

    run_script(program, parser, argv, replaced_flags, check_args, start, is_first, patience)


@contextlib.contextmanager
def work_of(args, is_first):
    """What is done in one of several processes: the first one holds the lock of the output folder, and prints. Raises
    `InputError` if another one has ended."""
    lock = locked_output(args) if is_first and not args.dry_run else contextlib.nullcontext()
    with lock, contextlib.redirect_stdout(sys.stdout if is_first else io.StringIO()):
        try:
            yield
        except Exception as error:
            if not is_lost_peer(error):
                raise
            told = f"another process has ended ({last_line(error)})"
            raise InputError(f"{told}; read its message, mend that, and start all of them again") from None


def run_script(program, parser, argv, replaced_flags, check_args, start, is_first=True, patience=0):
    """Runs a training script: reads its flags, tells all that is wrong with them, and calls `start(args)`, which
    trains. A mistake of the user's ends with status 2 and its message, after `patience` seconds, and a signal that
    asks to stop, where that notes none, with its status and a line.

    `check_args(args, problems)` lists what is wrong beside `problems` with the values of single flags.
    """
    with (
        contextlib.ExitStack() as stack,
        stopped_by_signals(),
        told_to_user(program, speaks=is_first, patience=patience),
    ):
        stack.callback(look_for_garbage)  # after a mistake too: a notebook goes on
        print_any_character()
        args, problems = parse_flags(parser, argv, replaced_flags)
        problems += check_encoding(args)
        if any(NOT_UNDERSTOOD.search(problem) for problem in problems):
            raise_problems(problems)  # at once: what else is wrong depends on what was meant, and to ask takes seconds
        quiet_libraries()
        # What is said of a flag whose value was refused is about its default.
        refused = re.findall(r"^--\w+", "\n".join(problems), re.MULTILINE)
        for problem in check_args(args, problems):
            if not any(re.search(rf"{flag}\b", problem) for flag in refused):
                problems.append(problem)
        raise_problems(problems)
        look_for_garbage()
        start(args)


def look_for_garbage():
    """Has Python look for garbage again, which a script stops while libraries are imported, and but for what these
    made."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
