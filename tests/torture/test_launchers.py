"""Signals to launchers, to their workers and to both: the state is saved once, and no process is left behind."""

import os
import signal
import time

import psutil
import pytest
from conftest import load_script
from copies import end_of, start_launcher
from faults import steps_of, wait_for
from image_data import write_image_folder
from lives import newest_of
from running import TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA
from training import train, words

LONG = pytest.mark.torture
ENDLESS = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "train_batch_size": 1}


@pytest.fixture
def launched(tiny_pipeline, tmp_path):
    """Starts a script by a launcher, and waits for its third step; returns the launcher, its workers by rank, the
    output and the file with what they say. What is still there in the end is killed."""
    launchers = []

    def run(script, launcher, nproc):
        output, said = tmp_path / "out", tmp_path / "said"
        data = write_image_folder(tmp_path / "images", 6)
        line = words(tiny_pipeline, data, output, **ENDLESS)
        launchers.append(start_launcher(load_script(script), line, said, launcher, nproc))
        wait_for(lambda: steps_of(output) >= 3, launchers[0], said)
        workers = psutil.Process(launchers[0].pid).children()
        workers = sorted(workers, key=lambda worker: int(worker.environ().get("RANK", 0)))
        assert len(workers) == nproc
        launchers.extend(workers)
        return launchers[0], workers, output, said

    yield run
    for process in launchers:
        if isinstance(process, psutil.Process) and not process.is_running():
            continue
        process.kill()


def assert_saved_once(launcher, workers, output, said):
    """All processes end within a minute, after one checkpoint of the last step."""
    end_of(launcher, 90)
    deadline = time.monotonic() + 60
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.02)
    step = steps_of(output)
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{step}"], said.read_text()
    assert said.read_text().count(f"checkpoint-{step} holds the state after step {step}") == 1


def to_launcher(launcher, workers):
    return [launcher]


def to_all(launcher, workers):
    """As a terminal or a cluster sends to a group; torchrun hands it on besides."""
    return [launcher, *workers]


def to_second_worker(launcher, workers):
    return workers[1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, nproc, number, receivers",
    [
        ("torchrun", 2, signal.SIGTERM, to_all),
        pytest.param("torchrun", 2, signal.SIGTERM, to_launcher, marks=LONG),
        pytest.param("torchrun", 2, signal.SIGHUP, to_launcher, marks=LONG),
        pytest.param("torchrun", 2, signal.SIGINT, to_all, marks=LONG),
        pytest.param("torchrun", 2, signal.SIGHUP, to_second_worker, marks=LONG),
        pytest.param("torchrun", 2, signal.SIGKILL, to_launcher, marks=LONG),
        pytest.param("accelerate", 1, signal.SIGHUP, to_launcher, marks=LONG),
        pytest.param("accelerate", 1, signal.SIGINT, to_all, marks=LONG),
    ],
)
def test_a_stop(launched, launcher, nproc, number, receivers):
    found = launched(TRAIN_TEXT_TO_IMAGE, launcher, nproc)
    for process in receivers(*found[:2]):
        os.kill(process.pid, number)
    assert_saved_once(*found)


@LONG
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_checkpoint_that_one_worker_is_asked_for(launched, number, tiny_pipeline, tmp_path):
    """All take part in it, and go on."""
    launcher, workers, output, said = launched(TRAIN_TEXT_TO_IMAGE_LORA, "torchrun", 2)
    os.kill(workers[1].pid, number)
    wait_for(lambda: newest_of(output) > 0, launcher, said)
    step = newest_of(output)
    wait_for(lambda: steps_of(output) > step + 2, launcher, said)
    for process in (launcher, *workers):
        os.kill(process.pid, signal.SIGKILL)
    launcher.join()
    script, settings = load_script(TRAIN_TEXT_TO_IMAGE_LORA), {**ENDLESS, "max_train_steps": step + 1}
    settings |= {"train_batch_size": 2, "resume_from_checkpoint": "latest"}
    assert train(script, tiny_pipeline, tmp_path / "images", output, **settings) == 0
    assert steps_of(output) == step + 1
