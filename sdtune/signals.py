"""Signals that ask a run to stop, and the death of the launcher, which asks for the same."""

import contextlib
import dataclasses
import functools
import os
import signal
import threading


@dataclasses.dataclass
class Stop:
    """What may ask a run to stop."""

    launcher: int | None  # number of the process that started this one
    received: list = dataclasses.field(default_factory=list)  # signals


def is_asked(stop):
    """Whether the run is to stop: after a signal, or when the launcher is gone, to which alone a SIGTERM goes."""
    return bool(stop.received) or is_orphaned(stop.launcher)


def find_launcher():
    """The process number of the launcher that started this process, or None without one; to be asked before accelerate
    sets variables of its own."""
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    return os.getppid() if launched else None


def is_orphaned(launcher):
    """Whether the launcher is gone: then this process has another parent."""
    return launcher is not None and os.getppid() != launcher


@contextlib.contextmanager
def noted_signals(stop):
    """Notes SIGTERM and SIGINT in `stop` instead of ending; afterwards they do what they did before. Outside the main
    thread, which alone gets signals, all stays as it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    on_signals(functools.partial(note_signal, stop.received))
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def on_signals(action, _=None):
    """Answers SIGTERM and SIGINT by `action`; workers ignore them: the main process needs them to finish the step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, action)


def note_signal(received, number, _):
    """Appends the signal to `received`; a second one ends the process at once."""
    os.write(2, b"\nFinishing the step and writing a checkpoint; a second signal ends at once, without one.\n")
    received.append(number)
    on_signals(signal.SIG_DFL)
