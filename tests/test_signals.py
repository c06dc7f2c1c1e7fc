"""Signals are noted and answered, and afterwards do what they did before."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from sdtune import signals
from sdtune.signals import ASK_TO_SAVE, Stop, answered_signals, is_asked, noted_signals, take_save_requests

STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
SAVES = [signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture(autouse=True)
def usual_signals():
    """As a shell starts a process, which pytest or a job in the background may have changed."""
    before = {number: signal.getsignal(number) for number in STOPS + SAVES}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, action in before.items():
        signal.signal(number, action)


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_is_noted(number, capfd):
    stop = Stop(None)
    with noted_signals(stop):
        assert not is_asked(stop)
        os.kill(os.getpid(), number)
        assert is_asked(stop)
        assert not take_save_requests(stop)
        os.kill(os.getpid(), number)  # at once: as a launcher hands it on
    assert stop.received == [number]
    assert capfd.readouterr().err.count("Finishing the step and writing a checkpoint;") == 1
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("number", SAVES)
def test_a_checkpoint_is_asked_for_as_often_as_one_likes(number, capfd):
    stop = Stop(None)
    with noted_signals(stop):
        for _ in range(2):
            assert not take_save_requests(stop)
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert take_save_requests(stop)
        assert not take_save_requests(stop)
        assert not is_asked(stop)
    assert "A checkpoint follows at the end of a step, and the run goes on." in capfd.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_later_signal_ends_the_process(monkeypatch):
    """Whichever of them it is."""
    monkeypatch.setattr(signals, "SAME_REQUEST", -1)
    child = os.fork()
    if child == 0:
        with noted_signals(Stop(None)):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_an_ignored_hangup_stays_ignored():
    """As `nohup` has it, whose user logs out and wants the run to go on."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop(None)
    with noted_signals(stop):
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.received == []
    assert len(stop.saves) == 1
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_outside_of_a_run_no_checkpoint_ends_the_process():
    """Nor is it one for what a run starts, such as a compiler."""
    shows = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"]
    assert subprocess.run(shows, check=False).returncode == -signal.SIGUSR1
    with answered_signals(dict.fromkeys(ASK_TO_SAVE, signal.SIG_IGN)):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert subprocess.run(shows, check=False).returncode == 0
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_thread_notes_nothing():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def note():
        with noted_signals(Stop(None)):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=note)
    thread.start()
    thread.join()
    assert found == [before]


def print_to_nobody(write_end, number):
    """What a run does whose output goes to a program that has ended; its end is this process's."""
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    stop = Stop(None)
    with noted_signals(stop):
        os.kill(os.getpid(), number)
        print("prints", flush=True)
        print("prints", file=sys.__stderr__, flush=True)
    os._exit(0 if len(stop.received + stop.saves) == 1 else 1)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_lost_output_is_no_failure(number):
    """The terminal is gone, or `tee` has got the same Ctrl-C."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    child = os.fork()
    if child == 0:
        try:
            print_to_nobody(write_end, number)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(write_end)
