"""A script asks for its launcher first, tells each mistake once, and trains only if there is none."""

import io
import sys

import pytest
from image_data import write_image_folder
from running import run_command, run_script, status_of

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

    def train(args):
        with pytest.raises(InputError, match="another run is writing there"), locked_output(args):
            pass
        (tmp_path / "out" / "result").write_text("")

    assert status_of(lambda argv: script.run_script("train.py", make_parser(), argv, {}, no_problems, train)) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "result"]
    for options in (
        {"words": ["--output_dir=other", "--dry_run"]},
        {"words": ["--output_dir=other"], "is_first": False},
    ):
        assert run(no_problems, **options)[0] == 0
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
