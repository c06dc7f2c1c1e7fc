"""A script asks for its launcher first, tells each mistake once, and trains only if there is none."""

import io
import re
import subprocess
import sys

import pytest
from conftest import load_script
from copies import free_port
from image_data import write_image_folder
from running import (
    SCRIPTS,
    TRAIN_DREAMBOOTH_LORA,
    TRAIN_TEXT_TO_IMAGE,
    TRAIN_TEXT_TO_IMAGE_LORA,
    environment,
    run_command,
    run_script,
    status_of,
)
from training import losses, read_log, train, words

from sdtune import errors, script
from sdtune.arguments import new_parser, non_negative_int, positive_int
from sdtune.errors import InputError
from sdtune.output import locked_output


def make_parser():
    parser = new_parser("Trains.", "%(prog)s [flags]")
    parser.add_argument("--num_hosts", type=positive_int)
    parser.add_argument("--rank", type=positive_int, default=4)
    parser.add_argument("--port", type=non_negative_int)
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--config")
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--logging_dir", default="logs")
    parser.add_argument("--dry_run", action="store_true")
    return parser


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def no_problems(args, problems):
    """Finds nothing wrong."""
    return []


def run(check_args, words=(), **options):
    """Runs a script with these words; returns its status and what it was asked to train with."""
    trained = []
    status = status_of(
        lambda argv: script.run_script("train.py", make_parser(), argv, {}, check_args, trained.append, **options),
        *words,
    )
    return status, trained


def test_right_flags_are_trained_with():
    status, trained = run(lambda args, problems: [], ["--rank=8"])
    assert status == 0
    assert [args.rank for args in trained] == [8]


def test_all_mistakes_are_told_and_nothing_is_trained(capsys):
    status, trained = run(lambda args, problems: ["--port: is taken"], ["--rank=0", "--num_hosts=x"])
    assert (status, trained) == (2, [])
    assert capsys.readouterr().err == (
        "train.py: \n"
        "  --rank: must be a whole number in [1, inf), not '0'\n"
        "  --num_hosts: must be a whole number in [1, inf), not 'x'\n"
        "  --port: is taken\n"
    )


def test_a_refused_flag_is_not_judged_by_its_default(capsys):
    """Checks see the default in its place, and what they say of that would mislead."""

    def check_args(args, problems):
        assert problems == ["--num_hosts: must be a whole number in [1, inf), not '0'"]
        assert args.num_hosts is None
        return ["--port=1: needs --num_hosts", "--rank=4: does not fit"]

    assert run(check_args, ["--num_hosts=0"])[0] == 2
    told = capsys.readouterr().err
    assert "--port" not in told
    assert "--rank=4: does not fit" in told


def test_processes_that_are_not_the_first_tell_mistakes_alone(capsys, monkeypatch):
    """After a while, in which the first one may have told the same."""
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)

    def check_args(args, problems):
        print("checked")
        return ["--port: is taken"]

    assert run(check_args, is_first=False, patience=5)[0] == 2
    assert capsys.readouterr() == ("", "train.py: --port: is taken\n")
    assert waited == [5]


def test_the_folder_is_locked_while_it_trains(tmp_path):
    """By the process that is the first, and not for a trial."""

    args = make_parser().parse_args([])
    with script.work_of(args, is_first=True):
        with pytest.raises(InputError, match="another run is writing there"), locked_output(args):
            pass
        (tmp_path / "out" / "result").write_text("")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "result"]
    for line, is_first in ((["--output_dir=other", "--dry_run"], True), (["--output_dir=other"], False)):
        with script.work_of(make_parser().parse_args(line), is_first):
            assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "encoding, shown",
    [("cp1252", b"caf\xe9 \\u30ab\n"), ("ascii", b"caf\\xe9 \\u30ab\n"), ("utf-8", "caf\xe9 カ\n".encode())],
)
def test_what_the_output_cannot_show_is_escaped(monkeypatch, encoding, shown):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, newline="\n") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def train(args):
        print("caf\xe9 カ")
        print("caf\xe9 カ", file=sys.stderr)

    assert status_of(lambda argv: script.run_script("train.py", make_parser(), argv, {}, no_problems, train)) == 0
    for stream in streams:
        stream.flush()
        assert stream.buffer.getvalue() == shown


def test_an_output_that_is_no_stream_of_pythons_is_left_alone(monkeypatch):
    """As in a notebook."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert run(no_problems) == (0, [make_parser().parse_args([])])


def test_words_that_are_not_utf_8_are_told_with_the_others(capsys):
    status, trained = run(no_problems, ["--names", "café", "caf\udce9", "--rank=0"])
    assert (status, trained) == (2, [])
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  --rank: must be a whole number in [1, inf), not '0'",
        r"  --names=caf\udce9: is not UTF-8; if it is, set PYTHONUTF8=1",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, shown", [("カエル.png", r"\u30ab\u30a8\u30eb.png"), ("λύκος.png", r"\u03bb\u03cd\u03ba\u03bf\u03c2.png")]
)
def test_names_in_any_script_are_told_where_the_output_is_not_utf_8(tmp_path, tiny_pipeline, name, shown):
    """In processes, as on Windows behind a redirect."""
    data = write_image_folder(tmp_path / "data", 2)
    (data / name).write_bytes(b"no image")
    (data / name).with_suffix(".txt").write_text(name, encoding="utf-8")
    words = [f"--pretrained_model_name_or_path={tiny_pipeline}", f"--train_data_dir={data}", "--resolution=32"]
    words += ["--skip_bad_images", "--report_to=none", "--dry_run"]
    env, cache = {"PYTHONIOENCODING": "cp1252"}, f"--cache_dir={tmp_path / 'cache'}"
    done = run_script([*words, cache], env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert "2 to train on" in done.stdout
    checked = run_command(["check", data, "--resolution=32", cache], env)
    assert checked.returncode == 1, checked.stderr
    assert shown in checked.stdout
    assert "Traceback" not in checked.stderr


@pytest.mark.parametrize("rank, speaks", [(None, True), ("0", True), ("1", False)])
def test_launcher_is_asked_for_before_anything_is_checked(monkeypatch, capsys, rank, speaks):
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    order = []
    monkeypatch.setattr(script, "find_launcher", lambda: order.append("launcher") or 12)

    def check_args(args, problems):
        order.append("checks")
        return []

    def train(args, launcher):
        order.append(launcher)
        print("Plan")

    script.run_launched_script("train.py", make_parser(), [], {}, check_args, train)
    assert order == ["launcher", "checks", 12]
    assert capsys.readouterr().out == ("Plan\n" if speaks else "")


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
@pytest.mark.parametrize("flag, status", [("--help", 0), ("--lr=1", 2)], ids=["help", "wrong"])
def test_who_does_not_train_waits_for_no_pipeline_to_be_imported(path, flag, status):
    """That would double the time until an answer. datasets shows that imports are told at all."""
    done = run_script([flag], {"PYTHONPROFILEIMPORTTIME": "1"}, script=path)
    assert done.returncode == status
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))
    assert imported & {"datasets", "torch", "diffusers", "transformers", "peft", "bitsandbytes"} == {
        "datasets",
        "torch",
    }


IN_A_NOTEBOOK = """
import sys
from accelerate import notebook_launcher

def run(words):
    import {module}
    {module}.main(words)

words, sys.argv = sys.argv[2:], sys.argv[:1]
notebook_launcher(run, args=(words,), num_processes=2, use_port="{port}")
print("prompt", sys.argv)
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", [TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA], ids=lambda path: path.stem)
def test_a_notebook_starts_two_processes_that_import_the_script_themselves(tmp_path, tiny_pipeline, path):
    """As the README says. accelerate would refuse to start them once bitsandbytes is imported, which peft does, and
    diffusers imports that."""
    data = write_image_folder(tmp_path / "data", 6)
    code = IN_A_NOTEBOOK.format(module=path.stem, port=free_port())
    flags = words(tiny_pipeline, data, tmp_path / "two", train_batch_size=1, max_train_steps=2)
    env = environment({"PYTHONPATH": str(path.parent), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    command = [sys.executable, "-c", code, "-", *flags]
    done = subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("prompt ['-c']\n")
    assert done.stdout.count("Plan\n") == 1
    assert "x 2 ranks" in done.stdout
    alone = train(load_script(path), tiny_pipeline, data, tmp_path / "one", train_batch_size=2, max_train_steps=2)
    assert alone == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("path", [TRAIN_TEXT_TO_IMAGE, TRAIN_DREAMBOOTH_LORA], ids=lambda path: path.stem)
def test_without_xformers_a_run_says_nothing_of_it(tmp_path, tiny_pipeline, path):
    """As after `make` on a new machine: Python takes a module that is None for one that is not installed."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['xformers'] = None\n", encoding="utf-8")
    flags = words(tiny_pipeline, write_image_folder(tmp_path / "data", 4), tmp_path / "out", max_train_steps=2)
    if path is TRAIN_DREAMBOOTH_LORA:
        flags = [flag.replace("--train_data_dir", "--instance_data_dir") for flag in flags]
    done = run_script(flags, {"PYTHONPATH": str(tmp_path)}, script=path)
    assert done.returncode == 0, done.stderr
    assert not re.search("xFormers|XFORMERS", done.stdout + done.stderr)  # the path has the test's name
    assert [row["step"] for row in read_log(tmp_path / "out")] == [1, 2]
