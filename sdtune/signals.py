"""Signals that ask a run to stop or to save, and the death of the launcher, which asks it to stop."""

import contextlib
import dataclasses
import functools
import os
import signal
import threading
import time

# By their names, since Windows lacks some. SIGHUP: the terminal is gone. SIGUSR1, SIGUSR2: what clusters are told to
# send some time before they end a job.
ASK_TO_STOP = {"SIGTERM", "SIGINT", "SIGHUP"}
ASK_TO_SAVE = {"SIGUSR1", "SIGUSR2"}
SAME_REQUEST = 3.0  # seconds in which a signal may come twice: to a group, and handed on by the launcher in it


@dataclasses.dataclass
class Stop:
    """What may ask a run to stop, or to save and go on."""

    launcher: int | None  # number of the process that started this one
    received: list = dataclasses.field(default_factory=list)  # signals that ask to stop
    saves: list = dataclasses.field(default_factory=list)  # signals that ask for a checkpoint, not answered yet


def is_asked(stop):
    """Whether the run is to stop: after a signal, or when the launcher is gone, to which alone a SIGTERM goes."""
    return bool(stop.received) or is_orphaned(stop.launcher)


def take_save_requests(stop):
    """Whether signals have asked for a checkpoint since the last call."""
    number = len(stop.saves)
    del stop.saves[:number]
    return number > 0


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
    """Notes in `stop` the signals that ask to stop or to save, which by default end the process. One that came before
    is answered now, if a library has swallowed the exception that it raised, as some do with all exceptions."""
    if (number := swallowed_stop()) is not None:
        raise KeyboardInterrupt(number)
    note_stop = functools.partial(note_signal, stop.received)
    with answered_signals(note_stop, functools.partial(note_save, stop.saves)):
        yield


@contextlib.contextmanager
def stopped_by_signals():
    """Raises `KeyboardInterrupt` with the number of a signal that asks to stop, where there is no step to be finished,
    nor anything to save: what asks for that is ignored."""
    with answered_signals(interrupt, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def ended_by_signals():
    """Lets a signal that asks to stop end the process at once, where it waits for others outside of Python, which
    would not hear of the signal until they come."""
    with answered_signals(signal.SIG_DFL, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def answered_signals(stop_action, save_action):
    """Answers signals that ask to stop or to save by other actions for a while; afterwards they do what they did
    before. An ignored SIGHUP (nohup) stays ignored, and outside the main thread, which alone gets signals, all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    actions = {**dict.fromkeys(ASK_TO_STOP, stop_action), **dict.fromkeys(ASK_TO_SAVE, save_action)}
    number_of = signal.Signals.__members__
    if "SIGHUP" in number_of and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        del actions["SIGHUP"]
    before = {name: signal.getsignal(number) for name, number in known_signals(actions)}
    for name, number in known_signals(actions):
        signal.signal(number, actions[name])
    try:
        yield
    finally:
        for name, number in known_signals(before):
            signal.signal(number, before[name])


def known_signals(names):
    """Pairs of name and number of those signals that this system has."""
    return [(name, number) for name, number in signal.Signals.__members__.items() if name in names]


def on_signals(action, names=ASK_TO_STOP):
    """Answers signals by `action`."""
    for _, number in known_signals(names):
        signal.signal(number, action)


def ignore_signals(_=None):
    """Has a worker ignore what the main process answers, which needs its workers to finish the step."""
    on_signals(signal.SIG_IGN, ASK_TO_STOP | ASK_TO_SAVE)


def note_signal(received, number, _):
    """Appends the signal to `received`; another one ends the process at once, but for what comes with the first."""
    say("Finishing the step and writing a checkpoint; another signal, later, ends at once, without one.")
    received.append(number)
    on_signals(functools.partial(end_at_once, time.monotonic()))


def interrupt(number, _):
    """Raises `KeyboardInterrupt` with the number of the signal, as Ctrl-C does without one; another signal, but for
    what comes with the first, does not wait for what is left then."""
    on_signals(functools.partial(end_at_once, time.monotonic(), after=number))
    raise KeyboardInterrupt(number)


def swallowed_stop():
    """The signal after which `interrupt` raised its exception, where the process goes on nevertheless; or None."""
    if threading.current_thread() is threading.main_thread():
        action = signal.getsignal(signal.SIGTERM)
        if isinstance(action, functools.partial) and action.func is end_at_once:
            return action.keywords.get("after")
    return None


def end_at_once(since, number, _, after=None):
    """Ends the process by the signal, unless it is one with that of the time `since`, `after` which it came: of a
    Ctrl-C that a launcher hands on to a process that has got it too."""
    if time.monotonic() - since > SAME_REQUEST:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def note_save(saves, number, _):
    """Appends the signal to `saves`."""
    say("A checkpoint follows at the end of a step, and the run goes on.")
    saves.append(number)


def say(text):
    """Prints a line about a signal, where printing can be interrupted by it. What is printed from now on goes nowhere
    if the terminal, or a program that reads it, has gone by the same signal: any print would fail."""
    drop_lost_output()
    os.write(2, f"{text}\n".encode())


def drop_lost_output():
    """Sends standard output and errors nowhere if nobody is there to read them any more; returns whether so."""
    is_lost = False
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"\n")
        except OSError:
            is_lost = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
    return is_lost
