"""Stop at the end of a step, on SIGTERM, Ctrl-C or the death of the launcher."""

import os
import signal
import sys


def on_signals(action, _=None):
    """Answers SIGTERM and SIGINT by `action`; workers ignore them: the main process needs them to finish the step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, action)


def note_signal(received, number, _):
    """Appends the signal to `received`; a second one ends the process at once."""
    os.write(2, b"\nFinishing the step and writing a checkpoint; a second signal ends at once, without one.\n")
    received.append(number)
    signal.signal(number, signal.SIG_DFL)


def find_launcher():
    """The process number of the launcher that started this process, or None without one; to be asked before accelerate
    sets variables of its own."""
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    return os.getppid() if launched else None


def is_orphaned(launcher):
    """Whether the launcher is gone, to whom alone a SIGTERM goes: then this process has another parent."""
    return launcher is not None and os.getppid() != launcher


def leave(accelerator, run, broken, received):
    """Ends the process after its last checkpoint, and says why: status 1 for a broken step, else 128 + signal."""
    accelerator.end_training()
    step = run.progress["global_step"]
    why, remedy = "a signal", ""
    if broken:
        why = f"a loss or gradient that is not finite, in step {step + 1}"
        remedy = " --allow_changed_resume and a lower --learning_rate"
    accelerator.print(
        f"Stopped by {why}. {run.output_dir / f'checkpoint-{step}'} holds the state after step {step}; go on with "
        f"--resume_from_checkpoint=latest{remedy}",
        file=sys.stderr,
    )
    # Another process, or the launcher, may have got the signal: SIGTERM, then.
    number = received[0] if received else signal.SIGTERM
    sys.exit(1 if broken else 128 + number)
