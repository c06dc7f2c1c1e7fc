"""What ends a run too early: it is told in a line, and nothing is lost that can be written."""

import contextlib
import errno
import re
import signal
import socket
import sys
import traceback
from pathlib import Path

import diffusers

from sdtune.checkpoints import checkpoint_of, list_checkpoints, save_checkpoint
from sdtune.errors import InputError, fitted, is_lack_of_memory, is_lost_peer
from sdtune.output import end_training, note_end, restore_output
from sdtune.signals import drop_lost_output, noted_signals

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What libraries say instead: safetensors, torch, which hides the reason, and torch again.
DISK_FULL_TEXT = re.compile(
    r"No space left|File too large|quota exceeded|iostream error|PytorchStreamWriter failed|unexpected pos",
    re.IGNORECASE,
)


@contextlib.contextmanager
def nothing_lost(args, accelerator, run, stop, write_state, end=sys.exit):
    """Notes signals in `stop`, and after an exception writes the last state that is whole as a checkpoint, by
    `write_state(run, folder)`, says what happened and ends the process by `end(1)`. Any process may be the one that
    fails, and holds the same state as the others."""
    with noted_signals(stop):
        try:
            yield
            note_end(accelerator, run, "finished")
        except Exception as error:  # of the data, the disk, the memory, a library
            is_unread = drop_lost_output()  # which may be what failed
            reason, remedy = explain(args, error)
            if is_unread and isinstance(error, BrokenPipeError):
                reason = "the end of the program that read its output"
            told_as = name_of_process(accelerator)
            if not reason:
                traceback.print_exception(error)
                reason = last_words(error)
            traceback.clear_frames(error.__traceback__)  # which hold what the step computed
            kept = save_what_is_whole(run, write_state)
            step = run.progress["global_step"]
            told = fitted(f"{told_as}Stopped after step {step} by {reason}. {kept}{remedy}")
            print(f"\n{told}", file=sys.stderr, flush=True)
            note_end(accelerator, run, "stopped", reason)
            end(1)


@contextlib.contextmanager
def told_in_a_line(args, accelerator, what):
    """Ends the process with status 1 after an exception in `what`, of which nothing is to be kept, and says what
    happened. Raises `InputError`, for that."""
    try:
        yield
    except Exception as error:  # of the data, the memory, a library
        # Workers that load images live as long as the frames that began them, and the process as long as they do.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, InputError):
            raise InputError(last_words(error)) from None
        reason, remedy = explain(args, error)
        if not reason:
            traceback.print_exception(error)
            reason = last_words(error)
        told_as = name_of_process(accelerator)
        told = fitted(f"{told_as}{what} was stopped by {reason}{remedy}")
        print(f"\n{told}", file=sys.stderr, flush=True)
        sys.exit(1)


def name_of_process(accelerator):
    """How a message begins, where it has to say of several processes which one it comes from."""
    if accelerator.num_processes == 1:
        return ""
    return f"Rank {accelerator.process_index} on {socket.gethostname()}: "


def explain(args, error):
    """What happened, and a remedy, for a user; ("", "") for what only a developer can understand."""
    if isinstance(error, InputError):
        return last_words(error), ""
    if is_disk_full(error):
        return "a full disk", ". Make room first"
    if is_lack_of_memory(error):
        return f"a lack of memory ({last_words(error)})", f". Use {memory_flags(args)}"
    if not Path(args.output_dir).is_dir():
        return f"the loss of {args.output_dir}, which was removed meanwhile", ""
    if isinstance(error, OSError) and is_below(args.output_dir, error.filename):
        return f"a file that cannot be written ({last_words(error)})", ". Make --output_dir writable first"
    if is_lost_peer(error):
        return f"the end of another process ({last_words(error)})", ""
    return "", ""


def is_below(folder, path):
    """Whether a path, which an exception may lack, is one in a folder."""
    return isinstance(path, str | Path) and Path(folder).absolute() in Path(path).absolute().parents


def is_disk_full(error):
    """Whether an exception comes of a full disk, a quota or a limit on the size of files."""
    return getattr(error, "errno", None) in DISK_FULL or bool(DISK_FULL_TEXT.search(str(error)))


def memory_flags(args):
    """The flags that would make the run smaller and are not used yet."""
    flags = []
    size, passes = args.train_batch_size, args.gradient_accumulation_steps
    if size > 1 and getattr(args, "full_bf16", False):  # which cannot accumulate
        flags.append(f"--train_batch_size={size // 2}")
    elif size > 1:
        parts = next(part for part in range(2, size + 1) if size % part == 0)  # mostly 2
        flags.append(
            f"--train_batch_size={size // parts} --gradient_accumulation_steps={passes * parts} (or what `sdtune "
            "find-batch-size -- COMMAND` finds)"
        )
    for flag in ("gradient_checkpointing", "use_8bit_adam", "offload_ema"):
        useful = flag != "offload_ema" or args.use_ema
        if useful and getattr(args, flag, None) is False:
            flags.append(f"--{flag}")
    if args.mixed_precision in (None, "no"):
        flags.append("--mixed_precision=bf16")
    return ", ".join([*flags, "a smaller --resolution"])


def last_words(error):
    """The last line of an exception's text, without the class that a worker's report begins it with."""
    if is_disk_full(error):
        return "the disk is full"  # which torch says in riddles
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^[\w.]+Error: ", "", lines[-1]).rstrip(".")


def save_what_is_whole(run, write_state):
    """Writes the checkpoint of the run's step, if weights and state belong together; returns what there is to go on
    from."""
    why = "the weights were being changed"
    if run.is_whole:
        try:
            diffusers.training_utils.free_memory()
            restore_output(run)
            save_checkpoint(run, write_state, None)
        except Exception as error:  # the disk may be what is full, or another process was first
            why = last_words(error)
    if (checkpoint_of(run) / "progress.json").exists():
        return f"{checkpoint_of(run)} holds its state; go on with --resume_from_checkpoint=latest"
    whole = list_checkpoints(run.output_dir)
    if not whole:
        return f"No checkpoint could be written ({why}), and there is none before"
    return f"No checkpoint could be written ({why}); go on from {whole[-1]} with --resume_from_checkpoint=latest"


def leave(accelerator, run, broken, received):
    """Ends the process after its last checkpoint, and says why: status 1 for a broken step, else 128 + signal."""
    end_training(accelerator)
    step = run.progress["global_step"]
    why, remedy = "a signal", ""
    if broken:
        why = f"a loss or gradient that is not finite, in step {step + 1}"
        remedy = " --allow_changed_resume and a lower --learning_rate"
        if run.settings["mixed_precision"] == "fp16":
            remedy += ", or start anew with --mixed_precision=bf16, whose numbers reach further"
    kept = f"{checkpoint_of(run)} holds the state after step {step}; go on with --resume_from_checkpoint=latest"
    if not run.is_whole:  # --full_bf16: the step had begun to change the weights
        kept = save_what_is_whole(run, None)
    if not list_checkpoints(run.output_dir):
        kept, remedy = "There is no checkpoint", "; use a lower --learning_rate"
    accelerator.print("\n" + fitted(f"Stopped by {why}. {kept}{remedy}"), file=sys.stderr)
    # Another process, or the launcher, may have got the signal: SIGTERM, then.
    number = received[0] if received else signal.SIGTERM
    note_end(accelerator, run, "stopped", why if broken else signal.Signals(number).name)
    sys.exit(1 if broken else 128 + number)
