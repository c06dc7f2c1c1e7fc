"""Run a script: read its flags, tell what is wrong with them, train."""

import contextlib
import functools
import io
import os
import re
import socket
import sys

from sdtune.arguments import check_encoding, parse_flags
from sdtune.errors import print_any_character, raise_problems, told_to_user
from sdtune.models import quiet_libraries
from sdtune.output import locked_output
from sdtune.signals import find_launcher


def run_launched_script(program, parser, argv, replaced_flags, check_args, train):
    """Runs a training script as `run_script` does, in a process that a launcher may have started: `train(args,
    launcher)` gets to know that, and of several processes the first one speaks."""
    launcher = find_launcher()  # first of all: it may die soon, and accelerate sets variables of its own
    start = functools.partial(train, launcher=launcher)
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if rank != "0":
        program = f"{program}, rank {rank} on {socket.gethostname()}"
    # The first process of a machine tells its mistakes. The others do, too, if they live to: their launcher ends them
    # when the first one, which has mostly made the same mistake, has ended.
    patience = 0 if local_rank == "0" else 5
    run_script(program, parser, argv, replaced_flags, check_args, start, is_first=rank == "0", patience=patience)


def run_script(program, parser, argv, replaced_flags, check_args, train, is_first=True, patience=0, prints_for=None):
    """Runs a training script: reads its flags, tells all that is wrong with them, and trains. A mistake of the user's
    ends with status 2 and its message, after `patience` seconds. The process that `is_first` holds the lock of the
    output folder, and prints; on hosts that are started one by one, `prints_for(args)` says whether it is.

    `check_args(args, problems)` lists what is wrong beside `problems` with the values of single flags.
    """
    print_any_character()
    args, problems = parse_flags(parser, argv, replaced_flags)
    problems += check_encoding(args)
    quiet_libraries()
    with told_to_user(program, speaks=is_first, patience=patience):
        # What is said of a flag whose value was refused is about its default.
        refused = [re.match(r"--\w+", problem)[0] for problem in problems]
        for problem in check_args(args, problems):
            if not any(re.search(rf"{flag}\b", problem) for flag in refused):
                problems.append(problem)
        raise_problems(problems)
        if prints_for:
            is_first = prints_for(args)
        lock = locked_output(args) if is_first and not args.dry_run else contextlib.nullcontext()
        with lock, contextlib.redirect_stdout(sys.stdout if is_first else io.StringIO()):
            train(args)
