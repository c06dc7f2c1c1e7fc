"""A run never writes over what is not its own, and says what it will do."""

import json

import pytest
from training import parse

from sdtune import output
from sdtune.arguments import add_output_arguments, new_parser
from sdtune.digests import write_digests
from sdtune.output import check_output, check_trackers, chosen_tracker, was_before

LORA_FILE = "pytorch_lora_weights.safetensors"


def problems(output_dir, *words, foreign_result=LORA_FILE):
    """What is wrong with an output folder, as one text."""
    return "\n".join(check_output(parse(f"--output_dir={output_dir}", *words), foreign_result))


def test_a_folder_in_use_is_not_written_over(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    used = f"--output_dir={tmp_path}: is in use; name another"
    assert problems(tmp_path) == f"{used} (it holds no run of this script)"
    # No run of ours is there to be written over, so that flag does not help.
    told = "holds no run of this script, which alone --overwrite_output_dir writes over; name another folder"
    assert problems(tmp_path, "--overwrite_output_dir") == f"--output_dir={tmp_path}: {told}"
    (tmp_path / "args.json").write_text("{}")
    told = "go on with its run by --resume_from_checkpoint=latest, or use --overwrite_output_dir"
    assert problems(tmp_path) == f"{used}, {told}"
    assert problems(tmp_path, "--overwrite_output_dir") == ""


def test_what_a_kill_at_the_start_leaves_is_no_run(tmp_path):
    """It has to be possible to start again by the same command."""
    for name in (".lock", ".args.json.host-12.new", ".log.jsonl.host-12.new"):
        (tmp_path / name).write_text("{")
    assert problems(tmp_path) == ""
    assert problems(tmp_path, "--resume_from_checkpoint=latest") == ""
    (tmp_path / ".args.json.swp").write_text("")  # somebody's own
    assert "is in use" in problems(tmp_path)


def test_an_empty_folder_may_be_there_but_not_a_file(tmp_path):
    assert problems(tmp_path) == ""
    assert problems(tmp_path / "new" / "folder") == ""
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        message = problems(place)
        assert f"--output_dir={place}: {tmp_path / 'file'} is a file or cannot be written to" in message
        assert "name another folder" in message


@pytest.mark.parametrize("foreign_result", [LORA_FILE, "model_index.json"])
def test_a_result_of_another_kind_is_not_written_over(tmp_path, foreign_result):
    """Both in one folder would be taken for one result, by its name."""
    (tmp_path / "args.json").write_text("{}")
    assert problems(tmp_path, "--overwrite_output_dir", foreign_result=foreign_result) == ""
    (tmp_path / foreign_result).write_text("{}")
    told = "is in use; name another (it holds no run of this script)"
    assert problems(tmp_path, foreign_result=foreign_result) == f"--output_dir={tmp_path}: {told}"
    assert "holds no run of this script" in problems(tmp_path, "--overwrite_output_dir", foreign_result=foreign_result)


@pytest.mark.parametrize("place", [".", "", "a/.."])
def test_logs_of_trackers_need_a_folder_of_their_own(tmp_path, place):
    assert "is --output_dir itself; name a folder in it" in problems(tmp_path, f"--logging_dir={place}")
    assert problems(tmp_path, f"--logging_dir={tmp_path / 'elsewhere'}") == ""


def test_resuming_and_overwriting_exclude_each_other(tmp_path):
    message = problems(tmp_path / "out", "--resume_from_checkpoint=latest", "--overwrite_output_dir")
    assert "--overwrite_output_dir: contradicts --resume_from_checkpoint; drop one" in message


def make_checkpoint(output_dir, step, is_whole=True):
    """A folder as a checkpoint's, and its path."""
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.bin").write_bytes(b"")
    if is_whole:
        (folder / "progress.json").write_text(json.dumps({"global_step": step}))
        write_digests(folder)
    return folder


def test_a_checkpoint_has_to_be_whole(tmp_path):
    missing = tmp_path / "elsewhere" / "checkpoint-3"
    for path in (missing, make_checkpoint(tmp_path / "half", 3, is_whole=False)):
        message = problems(tmp_path / "out", f"--resume_from_checkpoint={path}")
        assert f"--resume_from_checkpoint={path}: is no whole checkpoint folder; name one, or latest" in message
    whole = make_checkpoint(tmp_path / "elsewhere", 3)
    assert whole == missing
    assert problems(tmp_path / "out", f"--resume_from_checkpoint={whole}") == ""


def test_a_run_goes_on_in_its_folder_from_its_newest_checkpoint(tmp_path):
    """By path, by the name of the folder in the output folder, or as the latest."""
    (tmp_path / "args.json").write_text("{}")
    older, newer = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    for name in (newer, newer.name, "latest"):
        assert problems(tmp_path, f"--resume_from_checkpoint={name}") == ""
    for name in (older, older.name):
        assert f"{newer} is newer; use that" in problems(tmp_path, f"--resume_from_checkpoint={name}")
    assert "no whole checkpoint" in problems(tmp_path, "--resume_from_checkpoint=checkpoint-7")
    assert "is in use" in problems(tmp_path)


def test_latest_starts_anew_only_where_a_run_was_stopped_before_its_first_checkpoint(tmp_path):
    assert problems(tmp_path, "--resume_from_checkpoint=latest") == ""
    (tmp_path / "notes.txt").write_text("mine")
    assert "is in use" in problems(tmp_path, "--resume_from_checkpoint=latest")
    (tmp_path / "args.json").write_text("{}")
    assert problems(tmp_path, "--resume_from_checkpoint=latest") == ""
    (tmp_path / "README.md").write_text("")  # which says that a run has ended
    assert "is in use" in problems(tmp_path, "--resume_from_checkpoint=latest")


def test_a_tracker_has_to_be_installed():
    (problem,) = check_trackers(parse("--report_to=tensorbord"))
    assert problem.startswith("--report_to=tensorbord: installed are all, none, ")
    assert "tensorboard" in problem
    for tracker in ("tensorboard", "wandb", "all", "none"):
        assert check_trackers(parse(f"--report_to={tracker}")) == []


@pytest.mark.parametrize("tracker, others", [("wandb", ["tensorboard"]), ("tensorboard", [])])
def test_a_tracker_that_is_missing_is_told_with_the_file_to_install(monkeypatch, tracker, others):
    monkeypatch.setattr(output, "get_available_trackers", lambda: others)
    assert check_trackers(parse(f"--report_to={tracker}")) == [
        f"--report_to={tracker}: installed are {', '.join(['all', 'none', *others])}; for tensorboard and wandb run "
        "`pip install -r requirements_trackers.txt`"
    ]
    assert check_trackers(parse()) == []


@pytest.mark.parametrize(
    "words, installed, tracker",
    [
        ([], ["wandb", "tensorboard"], "tensorboard"),
        ([], ["wandb"], None),
        ([], [], None),
        (["--report_to=none"], ["tensorboard"], None),
        (["--report_to=wandb"], ["wandb", "tensorboard"], "wandb"),
        (["--report_to=all"], ["wandb", "tensorboard"], "all"),
        (["--report_to=all"], [], None),
    ],
)
def test_tensorboard_is_the_tracker_where_it_is_installed_and_no_other_is_named(
    monkeypatch, words, installed, tracker
):
    """By the script's own default, which the tests' other runs replace."""
    parser = new_parser("Trains.", "train [flags]")
    add_output_arguments(parser)
    args = parser.parse_args(words)
    monkeypatch.setattr(output, "get_available_trackers", lambda: installed)
    assert check_trackers(args) == []
    assert chosen_tracker(args) == tracker


@pytest.mark.parametrize(
    "line, stays",
    [
        ('{"step": 3, "loss": 1.0}\n', True),
        ('{"step": 4, "loss": 1.0}\n', True),
        ('{"step": 4, "held_out_loss": 1.0}\n', False),  # which is measured again
        ('{"step": 5, "loss": 1.0}\n', False),
        ('{"step": 3, "loss": 1.0}', False),  # cut by a kill
        ('{"step": 3, "lo\n', False),
    ],
)
def test_a_log_is_cut_where_a_run_goes_on(line, stays):
    assert was_before(line, 4) == stays


def test_an_empty_name_of_a_tracker_is_refused():
    """As an unset variable of the shell gives it."""
    (problem,) = check_trackers(parse("--report_to="))
    assert problem.startswith("--report_to=: installed are all, none, ")
