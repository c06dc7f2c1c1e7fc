"""`sdtune find-batch-size` tries a training's command with other sizes of a pass, and tells the largest that fits."""

import sys

import pytest
from image_data import write_image_folder
from running import TRAIN_TEXT_TO_IMAGE, status_of
from training import words

from sdtune.commands.find_batch_size import main, next_size, split_words

# Takes 40 MB per image of a limited memory, says what a script says, and ends as it is told to where that fails.
STUB = """
import argparse, os, resource, signal, sys
parser = argparse.ArgumentParser()
parser.add_argument("--train_batch_size", type=int, default={batch})
parser.add_argument("--gradient_accumulation_steps", type=int, default={passes})
parser.add_argument("--dry_run", action="store_true")
args = parser.parse_args()
assert args.dry_run
size, passes = args.train_batch_size, args.gradient_accumulation_steps
with open({log!r}, "a") as file:
    print(size, passes, file=file)
print("Plan")
images = "image" if size * passes == 1 else "images"
images += " at most" if size > 4 else ""  # of fewer images
passes = f"{{passes}} pass" if passes == 1 else f"{{passes}} passes"
print(f"  per step   {{size * args.gradient_accumulation_steps}} {{images}}: {{size}} a pass x {{passes}} x 1 rank")
print("  trained    UNet, 5 parameters in {weights}, passes in float32", flush=True)
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + {fits} * 40_000_000 + 20_000_000,) * 2)
try:
    block = bytearray(size * 40_000_000)
except MemoryError as error:
    {failure}
print(f"  time       {{size / 10:g}} s per step, 10 images/s; 9 steps take 0:00:09, until 2026-11-27 03:00")
print(f"  memory     {{size * 0.04:.2f}} GB of this process at most")
"""
FAILURES = {
    "exception": "raise",
    "message": "sys.exit('Stopped by a lack of memory (it is full). Use less')",
    "kernel": "os.kill(os.getpid(), signal.SIGKILL)",
    "launcher": "sys.exit('traceback: Signal 9 (SIGKILL) received by PID 7')",
    "shell": "sys.exit(137)",
}


@pytest.fixture
def stub(tmp_path):
    """Writes a stand-in for a script, into which so many images fit; returns its command, and what lists its sizes."""

    def write(batch, passes, fits, failure="message", weights="float32"):
        log, script = tmp_path / "log.txt", tmp_path / "stub.py"
        settings = {"batch": batch, "passes": passes, "fits": fits, "weights": weights, "log": str(log)}
        script.write_text(STUB.format(**settings, failure=FAILURES.get(failure, failure)))
        return [sys.executable, str(script)], lambda: [tuple(map(int, row.split())) for row in log.open()]

    return write


@pytest.mark.parametrize(
    "batch, passes, fits, tried, found",
    [
        (4, 2, 100, [(4, 2), (8, 1)], (8, 1)),  # all that a step has
        (16, 1, 5, [(16, 1), (4, 1), (8, 1)], (4, 4)),
        (1, 12, 4, [(1, 12), (2, 1), (4, 1), (12, 1), (6, 1)], (4, 3)),
        (6, 1, 1, [(6, 1), (2, 1), (1, 1)], (1, 6)),
        (7, 1, 6, [(7, 1), (1, 1)], (1, 7)),
    ],
)
def test_the_largest_size_that_divides_a_step_and_fits(stub, capsys, batch, passes, fits, tried, found):
    command, sizes = stub(batch, passes, fits)
    assert status_of(main, "--", *command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sizes() == tried
    expected = []
    for size, _ in tried:
        cost = f"{size / 10:g} s per step, 10 images/s; {size * 0.04:.2f} GB of this process at most"
        expected.append(f"{size:>5} a pass: {cost if size <= fits else 'lack of memory'}")
    size, number = found
    assert lines == [
        *expected,
        f"{size} of the {batch * passes} images that a process has in a step fit at once. Use",
        f"  --train_batch_size={size} --gradient_accumulation_steps={number}",
    ]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_lack_of_memory_however_it_shows(stub, capsys, failure):
    command, sizes = stub(4, 1, 3, failure)
    assert status_of(main, "--", *command) == 0
    assert sizes() == [(4, 1), (2, 1)]
    assert "    4 a pass: lack of memory\n    2 a pass: 0.2 s per step" in capsys.readouterr().out


def test_nothing_fits(stub, capsys):
    command, sizes = stub(2, 1, 0)
    assert status_of(main, "--", *command) == 1
    assert sizes() == [(2, 1), (1, 1)]
    assert capsys.readouterr().out.splitlines()[-1].startswith("Not even one image a pass fits; use --gradient_ch")


def test_weights_in_bfloat16_are_not_accumulated(stub, capsys):
    command, _ = stub(4, 1, 2, weights="bfloat16")
    assert status_of(main, "--", *command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  --train_batch_size=2"


@pytest.mark.parametrize("status, said", [(2, "--train_data_dir: give this"), (5, "something else")])
def test_another_failure_is_shown_and_ends_the_search(stub, capsys, status, said):
    command, sizes = stub(4, 1, 3, f"print({said!r}, file=sys.stderr); sys.exit({status})")
    assert status_of(main, "--", *command) == 2
    assert sizes() == [(4, 1)]
    told = capsys.readouterr().err
    assert f"sdtune find-batch-size: the command failed with status {status}:\n" in told
    assert said in told


def test_commands_that_cannot_be_tried(capsys, tmp_path):
    for command, told in (
        ([], "a training's command is missing; give it behind --"),
        ([str(tmp_path / "none")], "none: cannot be started (["),
        ([sys.executable, "-c", "print('hello')"], "of its steps: it has no step left, or is no script for PyTorch"),
        (["train.py", "--resume_from_checkpoint=latest"], "--resume_from_checkpoint: other sizes of a pass cannot"),
    ):
        assert status_of(main, "--", *command) == 2
        assert told in capsys.readouterr().err
    assert status_of(main) == 2
    assert "a training's command is missing" in capsys.readouterr().err


def test_words_behind_the_first_dashes_are_the_command():
    assert split_words(["--a", "--", "b", "--", "c"]) == (["--a"], ["b", "--", "c"])
    assert split_words(["--a"]) == (["--a"], [])


def test_sizes_are_doubled_then_halved():
    sizes = [1, 2, 3, 4, 6, 8, 12, 24]
    assert next_size(sizes, 1, 25) == 2
    assert next_size(sizes, 3, 25) == 6
    assert next_size(sizes, 12, 25) == 24
    assert next_size(sizes, 24, 25) is None
    assert next_size(sizes, 6, 24) == 12
    assert next_size(sizes, 6, 12) == 8
    assert next_size(sizes, 8, 12) is None
    assert next_size(sizes, 0, 1) is None


@pytest.mark.slow
def test_a_real_training(tiny_pipeline, tmp_path, capsys, monkeypatch):
    """Of two images a pass, in two passes; nothing is written."""
    images = write_image_folder(tmp_path / "images", 8)
    line = words(tiny_pipeline, images, tmp_path / "out", gradient_accumulation_steps=2, mixed_precision="no")
    command = [sys.executable, str(TRAIN_TEXT_TO_IMAGE), *line]
    assert status_of(main, "--", *command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [row.split(":")[0].strip() for row in lines[:2]] == ["2 a pass", "4 a pass"]
    assert all("s per step" in row and "GB of this process at most" in row for row in lines[:2])
    assert lines[2:] == [
        "4 of the 4 images that a process has in a step fit at once. Use",
        "  --train_batch_size=4 --gradient_accumulation_steps=1",
    ]
    assert not (tmp_path / "out").exists()
