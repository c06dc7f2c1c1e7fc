"""A run goes on under the settings of its checkpoint; others are refused, or said."""

import json
import shutil

import pytest
from image_data import write_image_folder
from training import train

MAX_LINES = 12  # of a message


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 4)


@pytest.fixture(scope="module")
def two_steps(train_script, tiny_pipeline, images, tmp_path_factory):
    """A run of two steps with a checkpoint after each. Read only."""
    folder = tmp_path_factory.mktemp("run") / "out"
    settings = {"max_train_steps": 2, "learning_rate": 1e-4, "checkpointing_steps": 1}
    assert train(train_script, tiny_pipeline, images, folder, **settings) == 0
    return folder


@pytest.fixture
def run(two_steps, tmp_path):
    """A copy of that run."""
    return shutil.copytree(two_steps, tmp_path / "out")


@pytest.fixture
def resume(train_script, tiny_pipeline, images, tmp_path, capsys):
    """Goes on to step 3 with the run in tmp_path / "out"; returns the status, and what was printed."""

    def go_on(data=images, **settings):
        settings = {
            "resume_from_checkpoint": "latest",
            "max_train_steps": 3,
            "learning_rate": 1e-4,
            "checkpointing_steps": 1,
            **settings,
        }
        capsys.readouterr()
        status = train(train_script, tiny_pipeline, data, tmp_path / "out", **settings)
        said = capsys.readouterr()
        return status, said.err if status else said.out

    return go_on


def rows_of(run, name):
    """(step, number) of the lines of a run's log that have the number."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row[name]) for row in rows if name in row]


CHANGES = [  # what changes the result, and how it is called in the message
    ({"learning_rate": 2e-4}, "learning_rate"),
    ({"seed": 1}, "seed"),
    ({"snr_gamma": 5}, "snr_gamma"),
    ({"random_flip": True}, "random_flip"),
    ({"caption_dropout": 0.1}, "caption_dropout"),
    ({"mixed_precision": "bf16"}, "mixed_precision"),
    ({"train_batch_size": 4}, "samples_per_step"),
    ({"num_validation_samples": 1}, "captioned_images"),
    ({"lr_scheduler": "cosine"}, "lr_scheduler"),
    ({"use_ema": True}, "use_ema"),
]


@pytest.mark.parametrize("settings, name", CHANGES, ids=[name for _, name in CHANGES])
def test_resuming_under_settings_that_change_the_result_is_refused(run, resume, settings, name):
    status, message = resume(**settings)
    assert status == 2
    assert f"{name}: " in message
    # State of another kind does not fit, so no flag lets these change.
    assert ("--allow_changed_resume" in message) == (name not in ("mixed_precision", "use_ema"))
    assert len(message.strip().splitlines()) <= MAX_LINES
    assert not (run / "checkpoint-3").exists()


@pytest.mark.parametrize("settings", [{"mixed_precision": "bf16"}, {"use_ema": True}])
def test_state_of_another_kind_cannot_be_allowed(run, resume, settings):
    status, message = resume(**settings, allow_changed_resume=True)
    assert status == 2
    assert "was made under other settings; use those\n" in message
    assert not (run / "checkpoint-3").exists()


def test_precision_of_accelerates_config_is_a_setting(run, resume, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    status, message = resume()
    assert status == 2
    assert "mixed_precision: no there, bf16 now" in message


def test_other_images_are_other_settings(run, resume, image_folder):
    status, message = resume(data=image_folder(4, size=40))
    assert status == 2
    assert "\n  captioned_images: other images or captions now than there\n" in message


def test_the_same_images_in_another_place_are_the_same_settings(run, resume, image_folder):
    status, said = resume(data=image_folder(4))
    assert status == 0
    assert "NO CHECKPOINT" not in said
    assert "steps      2 to 3" in said


def test_changed_settings_can_be_allowed_and_are_said(run, resume):
    status, said = resume(learning_rate=2e-4, allow_changed_resume=True)
    assert status == 0
    assert "learning_rate: 0.0001 there, 0.0002 now" in said
    assert rows_of(run, "lr") == [(1, 1e-4), (2, 1e-4), (3, 2e-4)]


def test_a_checkpoint_beyond_the_last_step_is_refused(run, resume):
    status, message = resume(max_train_steps=1)
    assert status == 2
    assert "beyond the last step, 1" in message
    assert [step for step, _ in rows_of(run, "loss")] == [1, 2]


@pytest.mark.parametrize("is_trial", [False, True])
def test_a_run_that_is_done_writes_its_result_again_and_says_that_no_step_is_left(run, resume, is_trial):
    (run / "model_index.json").unlink()
    status, said = resume(max_train_steps=2, dry_run=is_trial)
    assert status == 0
    told = "all of 2 steps are done, and only the result is written again; raise --max_train_steps to train on"
    assert f"warning {told}" in " ".join(said.split())
    assert (run / "model_index.json").is_file() != is_trial
    assert [step for step, _ in rows_of(run, "loss")] == [1, 2]


def test_settings_that_leave_the_result_alone_may_change(run, resume):
    shutil.rmtree(run / "checkpoint-2")
    status, said = resume(
        resume_from_checkpoint=run / "checkpoint-1",
        checkpointing_steps=2,
        train_batch_size=1,
        gradient_accumulation_steps=2,
        save_precision="fp16",
        gradient_checkpointing=True,
    )
    assert status == 0
    assert "steps      1 to 3" in said
    assert [step for step, _ in rows_of(run, "loss")] == [1, 2, 3]


def test_checkpoints_are_found_by_their_name_in_the_output_folder(run, resume):
    """As diffusers' users write it. The path as it stands is tested above."""
    status, message = resume(resume_from_checkpoint="checkpoint-1")
    assert status == 2
    assert "newer" in message
    shutil.rmtree(run / "checkpoint-2")
    status, said = resume(resume_from_checkpoint="checkpoint-1", dry_run=True)
    assert status == 0
    assert "steps      1 to 3" in said
    status, message = resume(resume_from_checkpoint="checkpoint-7")
    assert status == 2
    assert "no whole checkpoint" in message


def test_latest_without_a_checkpoint_starts_from_the_beginning_and_says_so(resume, tmp_path):
    status, said = resume(dry_run=True)
    assert status == 0
    told = f"--resume_from_checkpoint=latest: {tmp_path / 'out'} holds NO CHECKPOINT; this run starts from step 0"
    assert f"warning {told} " in " ".join(said.split())
    assert "steps      0 to 3" in said
