"""Run a script: read its flags, tell what is wrong with them, train."""

import contextlib
import io
import os
import sys

from sdtune.arguments import parse_flags
from sdtune.errors import raise_problems, told_to_user
from sdtune.models import quiet_libraries


def run_script(program, parser, argv, replaced_flags, check_args, train, prints=None):
    """Runs a training script: reads its flags, tells all that `check_args` finds wrong with them, and trains. A
    mistake of the user's ends with status 2 and its message; of several processes the first one tells it. On hosts
    that are started one by one, `prints(args)` says whether this one tells more than its mistakes."""
    args, problems = parse_flags(parser, argv, replaced_flags)
    quiet_libraries()
    is_first = os.environ.get("RANK", "0") == "0"
    with told_to_user(program, speaks=is_first):
        raise_problems(problems + check_args(args))
        is_heard = prints is None or prints(args)
        with contextlib.redirect_stdout(sys.stdout if is_heard else io.StringIO()):
            train(args)
