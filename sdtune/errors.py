"""Mistakes of the user's: how they are gathered, told and end the process."""

import contextlib
import io
import os
import re
import shutil
import signal
import stat
import sys
import textwrap
import time
from pathlib import Path

MAX_LINES = 12  # of a message
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY")  # in the environment
OUT_OF_MEMORY_TEXT = re.compile(r"out of memory|can't allocate memory|RESOURCE_EXHAUSTED", re.IGNORECASE)
# What a process says whose connection to another one ends.
LOST_PEER_TEXT = re.compile(r"Connection (closed|reset) by (peer|remote)|remote process exited", re.IGNORECASE)
# What makes the folders that commands in the READMEs read.
MAKERS = {
    "demo/creatures": "make demo",
    "demo/dreambooth": "make demo-dreambooth",
    "demo/emoji": "make demo-emoji",
    "demo/emoji_lora": "make demo-emoji",
    "demo/flax": "make demo-flax",
    "demo/lora": "make demo-lora",
    "demo/model": "make demo",
    "demo/subject": "make demo-dreambooth",
}


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


def printable(text):
    """A text without signs that move or colour what a terminal shows: of somebody else's files, names and captions."""
    return "".join(sign if sign.isprintable() or sign in "\n\u00a0\u3000" else repr(sign)[1:-1] for sign in text)


def in_one_line(name):
    """As `printable`, for a name that may hold line ends."""
    return printable(str(name)).replace("\n", "\\n")


def counted(number, one, many=None):
    """A number and what it counts, such as 1 image or 1,234 images; `many` is the plural of a word, or of a phrase,
    that does not end in an s more."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def without_secrets(text):
    """A text with stars in the place of tokens: those of the environment, and what looks like one of the Hub's."""
    for name in SECRETS:
        value = os.environ.get(name, "").strip()
        if len(value) >= 8:  # anything shorter is none, and may be a word
            text = text.replace(value, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "hf_***", text)


def broken(line):
    """The lines that one line makes in a terminal as wide as it is, or of 100 columns where there is none."""
    own = line[: len(line) - len(line.lstrip())]
    margins = {"initial_indent": own, "subsequent_indent": max(own + "  ", "    ")}
    words = {"break_long_words": False, "break_on_hyphens": False}  # paths and flags
    width = shutil.get_terminal_size((100, 24)).columns
    lines = textwrap.wrap(line.lstrip(), width, **margins, **words) or [""]
    lines[-1] += line[len(line.rstrip()) :]  # of a program's name, before a list
    return lines


def fitted(text):
    """A message as it is shown: in lines as wide as the terminal, or of 100 columns where there is none, at most 12 of
    them; of a list that is longer the end is cut. Nothing in it is a secret, or moves what a terminal shows."""
    parts = [broken(line) for line in printable(without_secrets(text)).split("\n")]
    end = [] if len(parts) == 1 or parts[-1][0].startswith(" ") else [parts.pop()]  # the remedy for all of a list
    num_cut = 0
    while len(parts) > 1 and sum(map(len, parts + end)) + bool(num_cut) > MAX_LINES:
        parts.pop()
        num_cut += 1
    cut = [[f"  and {num_cut} more"]] if num_cut else []
    lines = [line for part in parts + cut + end for line in part]
    return "\n".join(lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "  ..."])


@contextlib.contextmanager
def told_in_lines():
    """Prints what is printed inside at the end, all of it, in lines as wide as those of `fitted`."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            yield
    finally:
        for line in told.getvalue().splitlines():
            print("\n".join(broken(printable(without_secrets(line)))))


def last_line(error):
    """The last line of an exception's text, for a message of one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:200]


def remedy_for(error):
    """What is to be done about what the system says of a file; "" for an `InputError`, which says that itself."""
    if isinstance(error, InputError):
        return ""
    if re.search(r"No space left|File too large|quota exceeded", str(error), re.IGNORECASE):
        return "; make room"
    return "; check that path, and that you may use it" if isinstance(error, OSError) else ""


def remedy_for_missing(path):
    """What is to be done about a path of a command in the READMEs that is not there; "" for any other path."""
    if not path or os.path.exists(path):
        return ""
    place = Path(os.path.normpath(path))
    for made in (place, *place.parents):
        if maker := MAKERS.get(made.as_posix()):
            return f"run `{maker}` in the folder of the repository, which makes it"
    if place.parts[0] in ("miniature", "examples") and not os.path.isdir(place.parts[0]):
        return "start in the folder of the repository, which it comes with"
    return ""


def is_lack_of_memory(error):
    """Whether an exception comes of too little memory, of the machine or of a device."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY_TEXT.search(str(error)))


def is_lost_peer(error):
    """Whether an exception comes of the end of another process: what happened is told there."""
    return bool(LOST_PEER_TEXT.search(str(error)))


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


def end_unread():
    """Ends the process without a word, with the status that SIGPIPE gives other programs, if nobody reads its output
    any more, as of `head`."""
    try:
        if sys.stdout and stat.S_ISFIFO(os.fstat(1).st_mode):  # another pipe may be what broke
            os.write(1, b"\n")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain as it ends
        sys.exit(128 + signal.SIGPIPE)


@contextlib.contextmanager
def told_to_user(program, speaks=True, errors=InputError, stopped=None, patience=0):
    """Ends the process with status 2 and the message after an `InputError`, or the class or classes `errors`; after
    Ctrl-C, or another signal that raised `KeyboardInterrupt` with its number, with the status of that and the line
    `stopped`. Of several processes only the one that `speaks` prints more than mistakes, which another one tells after
    `patience` seconds, if it was not ended by then."""
    try:
        try:
            with contextlib.redirect_stdout(sys.stdout if speaks else io.StringIO()):
                yield
        except BrokenPipeError:
            end_unread()
            raise
        except errors as error:
            time.sleep(patience)  # in which the launcher's signal may come
            print(fitted(f"{program}: {error}{remedy_for(error)}"), file=sys.stderr)
            sys.exit(2)
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        if speaks:
            print(stopped or f"{program}: stopped by {number.name}", file=sys.stderr)
        sys.exit(128 + number)
