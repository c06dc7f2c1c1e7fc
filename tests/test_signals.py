"""Signals are noted and answered, and afterwards do what they did before."""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from conftest import load_script
from image_data import write_image_folder
from running import SCRIPTS, TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_FLAX, catches, start_script, wait_for
from training import words

from sdtune import signals
from sdtune.errors import InputError, told_to_user
from sdtune.signals import Stop, is_asked, noted_signals, stopped_by_signals, take_save_requests

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
    with stopped_by_signals():
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


# ---- before the first step


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_outside_of_steps_ends_with_its_status_and_a_line(number, capsys):

    def wait():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)  # at once: as a launcher hands it on

    with pytest.raises(SystemExit) as caught, stopped_by_signals(), told_to_user("train.py"):
        wait()
    assert caught.value.code == 128 + number
    assert capsys.readouterr().err == f"train.py: stopped by {number.name}\n"
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_stop_whose_exception_a_library_swallows_is_heard_before_the_first_step(capsys):

    def load_and_train():
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with noted_signals(Stop(launcher=None)):
            raise AssertionError("a step is taken")

    with pytest.raises(SystemExit) as caught, stopped_by_signals(), told_to_user("train.py"):
        load_and_train()
    assert caught.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "train.py: stopped by SIGTERM\n"


def test_a_stop_while_a_process_waits_to_tell_its_mistake_leaves_no_traceback(capsys, monkeypatch):
    """Its launcher ends it when the first process has told the same one."""

    def sleep(seconds):
        assert seconds == 5
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("sdtune.errors.time.sleep", sleep)
    with pytest.raises(SystemExit) as caught, stopped_by_signals(), told_to_user("train.py", False, patience=5):
        raise InputError("a mistake")
    assert caught.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == ""


@pytest.fixture
def start(tmp_path):
    """Factory of a run of a script with more words on its command line, in a process that ends with the test."""
    write_image_folder(tmp_path / "images", 4)
    started = []

    def begin(path, base, *more):
        settings = {} if "dreambooth" not in path.stem else {"instance_prompt": "a", "instance_data_dir": tmp_path}
        line = words(base, tmp_path / "images", tmp_path / "out", **settings)
        started.append(start_script([*line, *more], script=path))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def imports(process):
    """Whether a script is importing its largest library: has begun to, and has not ended."""
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    return "libtorch" in maps or "jaxlib" in maps


def count_unread(pipe):
    """Bytes that were written to a pipe and that nobody has read."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def sleeps(process):
    """Whether the main thread of a process waits for something."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def check_end(process, path, number):
    """Asserts that a script has ended by a signal with its status and one line."""
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert said == f"{path.name}: stopped by {number.name}\n"


@pytest.mark.parametrize("path, number", zip(SCRIPTS, [*STOPS, *STOPS]), ids=[path.stem for path in SCRIPTS])
def test_a_signal_in_the_middle_of_imports(path, number, start, tmp_path):
    """What asks for a checkpoint ends nothing, and what asks for an end leaves no traceback."""
    process = start(path, tmp_path)
    wait_for(lambda: catches(process, signal.SIGTERM), process)
    for save in SAVES:
        process.send_signal(save)
    wait_for(lambda: imports(process), process)
    process.send_signal(number)
    check_end(process, path, number)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", [TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_FLAX], ids=lambda path: path.stem)
def test_a_signal_while_flags_are_read(path, start, tmp_path):
    """Which wait here for what a pipe is to say next."""
    os.mkfifo(tmp_path / "recipe.yaml")
    process = start(path, tmp_path, f"--config={tmp_path / 'recipe.yaml'}")
    writers = []

    def is_opened():
        with contextlib.suppress(OSError):  # nobody reads yet
            writers.append(os.open(tmp_path / "recipe.yaml", os.O_WRONLY | os.O_NONBLOCK))
        return writers

    wait_for(is_opened, process)
    os.write(*writers, b"seed: 1\n")
    # Python answers no signal that arrives between its opening of a file and its wait for what is in it.
    wait_for(lambda: count_unread(*writers) == 0 and sleeps(process), process)
    for number in (*SAVES, signal.SIGINT):
        process.send_signal(number)
    check_end(process, path, signal.SIGINT)
    os.close(*writers)


@pytest.mark.slow
@pytest.mark.parametrize("path", [TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_FLAX], ids=lambda path: path.stem)
def test_a_signal_while_models_are_loaded(path, start, tiny_pipeline, tmp_path):
    """The lock of the output folder is what comes before."""
    process = start(path, tiny_pipeline)
    wait_for((tmp_path / "out" / ".lock").exists, process)
    for number in (*SAVES, signal.SIGTERM):
        process.send_signal(number)
    check_end(process, path, signal.SIGTERM)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_signal_while_a_process_waits_for_another_that_never_comes(tiny_pipeline, tmp_path):
    """The library waits outside of Python, and hears of no signal that Python would answer."""
    with socket.socket() as server:  # which answers nobody
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        where = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        line = words(tiny_pipeline, write_image_folder(tmp_path / "images", 4), tmp_path / "out")
        process = start_script(line, where | {"ACCELERATE_USE_CPU": "true"})
        server.settimeout(60)
        server.accept()[0].close()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM, said
    assert "Traceback" not in said


def test_an_ignored_hangup_stays_ignored_while_a_script_imports(start, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which a process that is started inherits
    process = start(TRAIN_TEXT_TO_IMAGE, tmp_path)
    wait_for(lambda: catches(process, signal.SIGTERM), process)
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: imports(process), process)
    process.send_signal(signal.SIGTERM)
    check_end(process, TRAIN_TEXT_TO_IMAGE, signal.SIGTERM)


def test_a_script_that_is_imported_leaves_signals_alone():
    before = {number: signal.getsignal(number) for number in STOPS + SAVES}
    script = load_script(TRAIN_TEXT_TO_IMAGE)
    assert {number: signal.getsignal(number) for number in STOPS + SAVES} == before
    assert callable(script.stop_at_once)
