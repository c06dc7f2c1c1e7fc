"""Run a script: read its flags, tell what is wrong with them, train."""

import contextlib
import functools
import io
import os
import re
import sys

from sdtune.arguments import parse_flags
from sdtune.errors import raise_problems, told_to_user
from sdtune.models import quiet_libraries
from sdtune.signals import find_launcher


def run_launched_script(program, parser, argv, replaced_flags, check_args, train):
    """Runs a training script as `run_script` does, in a process that a launcher may have started: `train(args,
    launcher)` gets to know that, and of several processes the first one speaks."""
    launcher = find_launcher()  # first of all: it may die soon, and accelerate sets variables of its own
    start = functools.partial(train, launcher=launcher)
    is_first = os.environ.get("RANK", "0") == "0"
    run_script(program, parser, argv, replaced_flags, check_args, start, speaks=is_first)


def run_script(program, parser, argv, replaced_flags, check_args, train, speaks=True, prints=None):
    """Runs a training script: reads its flags, tells all that is wrong with them, and trains. A mistake of the user's
    ends with status 2 and its message, which a process tells that `speaks`. On hosts that are started one by one,
    `prints(args)` says whether this one tells more than its mistakes.

    `check_args(args, problems)` lists what is wrong beside `problems` with the values of single flags.
    """
    args, problems = parse_flags(parser, argv, replaced_flags)
    quiet_libraries()
    with told_to_user(program, speaks=speaks):
        # What is said of a flag whose value was refused is about its default.
        refused = [re.match(r"--\w+", problem)[0] for problem in problems]
        for problem in check_args(args, problems):
            if not any(re.search(rf"{flag}\b", problem) for flag in refused):
                problems.append(problem)
        raise_problems(problems)
        is_heard = prints is None or prints(args)
        with contextlib.redirect_stdout(sys.stdout if is_heard else io.StringIO()):
            train(args)
