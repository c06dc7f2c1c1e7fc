"""Mistakes of the user's: how they are gathered, told and end the process."""

import contextlib
import io
import signal
import sys
import time


class InputError(ValueError):
    """A mistake in what the user gave; its text is all that they need to see."""


def print_any_character():
    """Lets what the encoding of the output lacks, such as a name in Japanese in cp1252 (a redirect on Windows), appear
    as escapes instead of ending the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's own takes everything
            stream.reconfigure(errors="backslashreplace")


def is_utf8(text):
    """Whether a text can be written as UTF-8: Python reads other bytes of a command line, and in a locale that is not
    UTF-8 every letter that is not English, as surrogates, which neither a tokenizer nor a file takes."""
    return text == text.encode("utf-8", "replace").decode("utf-8")


def last_line(error):
    """The last line of an exception's text, for a message of one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:200]


def raise_problems(problems):
    """Raises one `InputError` that lists all problems, if there are any."""
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputError("\n  ".join(["", *problems]))


@contextlib.contextmanager
def gathered(problems):
    """Adds the message of an `InputError` to a list, instead of raising it."""
    try:
        yield
    except InputError as error:
        problems.append(str(error))


@contextlib.contextmanager
def told_to_user(program, speaks=True, errors=InputError, stopped=None, patience=0):
    """Ends the process with status 2 and the message after an `InputError`, or the class or classes `errors`; after
    Ctrl-C with the status of SIGINT and the line `stopped`. Of several processes only the one that `speaks` prints
    more than mistakes, which another one tells after `patience` seconds, if it was not ended by then."""
    try:
        with contextlib.redirect_stdout(sys.stdout if speaks else io.StringIO()):
            yield
    except errors as error:
        time.sleep(patience)
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if speaks:
            print(stopped or f"{program}: stopped before the first step", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
