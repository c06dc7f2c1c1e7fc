"""How far a run has come: a bar in a terminal, plain lines elsewhere."""

import io
import math
import re
from types import SimpleNamespace

import pytest
import torch
from image_data import write_image_folder
from training import losses, parse, train

from sdtune import progress

NOT_TIMED = None


@pytest.mark.parametrize(
    "recent, loss, rate, seconds",
    [
        ([], None, None, None),
        ([(0.5, 4, NOT_TIMED)], 0.5, None, None),
        ([(0.5, 4, NOT_TIMED), (0.25, 4, 2.0), (0.75, 2, 1.0)], 0.5, 2.0, 1.5),  # 6 images in 3 s
        ([(math.nan, 4, 1.0), (0.3, 4, 3.0)], 0.3, 2.0, 2.0),  # a step that was skipped took its time
        ([(math.inf, 8, 2.0)], None, 4.0, 2.0),
    ],
)
def test_means_of_steps(recent, loss, rate, seconds):
    assert progress.means_of(recent) == (loss, rate, seconds)


class Terminal(io.StringIO):
    """What takes a bar."""

    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


@pytest.fixture
def told(monkeypatch):
    """What twelve steps from step 3 to 15 say, to a terminal or not, with the steps every so many of which are told:
    standard error, and what is printed. Step N has the loss N, of 2 images in half a second."""
    monkeypatch.setattr(progress, "peak_memory", lambda device: ["1.5 GB of the device", "9 GB of this process"])
    monkeypatch.setattr(progress, "NUM_RECENT", 4)

    def tell(is_terminal, *words, is_shown=True):
        err, out = Terminal(is_terminal), io.StringIO()
        run = SimpleNamespace(progress={"global_step": 3}, counts=SimpleNamespace(last_step=15))
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", err)
            patch.setattr("sys.stdout", out)
            bar, recent = progress.start_bar(run, is_shown)
            bar.mininterval = 0
            for step in bar:
                run.progress["global_step"] = step + 1
                recent.append((float(step + 1), 2, None if step == 3 else 0.5))
                progress.tell_step(parse(*words), bar, run, torch.device("cpu"), recent)
        return err.getvalue(), out.getvalue()

    return tell


def test_outside_of_a_terminal_there_are_plain_lines(told):
    """Of the mean of the last four steps; the first one is not timed. Nothing of a bar is written."""
    assert told(False, "--logging_steps=5") == (
        "",
        "Step 5 of 15: mean loss 4.5000, 4 images/s, 1.5 GB of the device, 0:00:05 left\n"
        "Step 10 of 15: mean loss 8.5000, 4 images/s, 1.5 GB of the device, 0:00:02 left\n"
        "Step 15 of 15: mean loss 13.5000, 4 images/s, 1.5 GB of the device\n",
    )
    _, out = told(False, "--logging_steps=4")
    assert re.findall(r"^Step (\d+) of 15: mean loss ([\d.]+)", out, re.MULTILINE) == [
        ("4", "4.0000"),
        ("8", "6.5000"),
        ("12", "10.5000"),
        ("15", "13.5000"),  # the last one
    ]
    assert out.startswith("Step 4 of 15: mean loss 4.0000, 1.5 GB of the device\n")


def test_in_a_terminal_there_is_a_bar_alone(told):
    err, out = told(True, "--logging_steps=1")
    assert out == ""
    assert err.split("\r")[-1].startswith("100%|")
    assert err.split("\r")[-1].endswith("| 15/15, 00:00 left, mean loss 13.5000, 4 images/s, 1.5 GB\n")
    assert told(True, is_shown=False)[0] == ""


def test_of_a_run_that_ends_early_no_bar_stands_below_what_says_why(monkeypatch):
    """Which its process prints, and ends, within a step."""
    err = Terminal(True)
    monkeypatch.setattr("sys.stderr", err)
    run = SimpleNamespace(progress={"global_step": 0}, counts=SimpleNamespace(last_step=9))
    bar, recent = progress.start_bar(run, is_shown=True)
    for _ in bar:
        run.progress["global_step"] += 1
        progress.tell_step(parse(), bar, run, torch.device("cpu"), recent)
        print("\nStopped.", file=err)
        break
    bar.close()  # as Python does when it lets go of it
    assert err.getvalue().rpartition("\nStopped.\n")[2].strip(" \r\n") == ""


def test_a_run_tells_the_means_of_its_log(train_script, tiny_pipeline, tmp_path, capsys):
    images = write_image_folder(tmp_path / "images", 4)
    assert train(train_script, tiny_pipeline, images, tmp_path / "out", max_train_steps=3) == 0
    said = capsys.readouterr()
    each = losses(tmp_path / "out")
    means = [f"{sum(each[:number]) / number:.4f}" for number in (1, 2, 3)]
    assert re.findall(r"^Step \d of 3: mean loss (\S+),", said.out, re.MULTILINE) == means
    assert "%|" not in said.err
