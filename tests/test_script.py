"""A script asks for its launcher first, tells each mistake once, and trains only if there is none."""

import pytest
from running import status_of

from sdtune import errors, script
from sdtune.arguments import new_parser, non_negative_int, positive_int
from sdtune.errors import InputError
from sdtune.output import locked_output


def make_parser():
    parser = new_parser("Trains.", "%(prog)s [flags]")
    parser.add_argument("--num_hosts", type=positive_int)
    parser.add_argument("--rank", type=positive_int, default=4)
    parser.add_argument("--port", type=non_negative_int)
    parser.add_argument("--config")
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--logging_dir", default="logs")
    parser.add_argument("--dry_run", action="store_true")
    return parser


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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


def no_problems(args, problems):
    return []


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
