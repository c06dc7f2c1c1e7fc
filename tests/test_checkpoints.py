"""Checkpoints are whole or absent, old ones go last, and a resume under other conditions is refused."""

import json
import math
import os
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from image_data import snapshot, write_image_folder
from PIL import Image
from training import checkpoint_state, checkpoint_unet, losses, read_log, same, train, trains_into, unet

from sdtune.checkpoints import (
    Run,
    Weights,
    compare_settings,
    count_damaged,
    find_checkpoint,
    find_newer,
    keep_best,
    list_checkpoints,
    read_best,
    read_undamaged,
    save_checkpoint,
    set_aside_damaged,
    tell_difference,
)
from sdtune.digests import write_digests
from sdtune.errors import InputError
from sdtune.states import averaged

FILES = """
args.json digests.json optimizer.bin progress.json random_states_0.pkl state.json unet
""".split()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 6)


@pytest.fixture(scope="module")
def straight(train_script, tiny_pipeline, images, tmp_path_factory):
    """The output of four steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    assert train(train_script, tiny_pipeline, images, folder, checkpointing_steps=1) == 0
    return folder


@pytest.fixture
def fit(train_script, tiny_pipeline, images):
    """Trains four steps into a folder, or as the settings say; returns the exit status."""
    return trains_into(train_script, tiny_pipeline, images)


@pytest.fixture
def stopped(straight, tmp_path):
    """A copy of that run as it was after two steps."""
    folder = tmp_path / "stopped"
    shutil.copytree(straight, folder)
    for name in ("checkpoint-3", "checkpoint-4", "unet"):
        shutil.rmtree(folder / name)
    return folder


def checkpoints(folder):
    """The names of a run's checkpoints, half-written ones too."""
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# ------------------------------------------------------------------------------------------------- written whole


def break_save(monkeypatch):
    """The third checkpoint fails while its first file is written, the one with the weights."""
    save = torch.save

    def fail(content, path, **options):
        save(content, path, **options)
        if "checkpoint-3" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)


def break_json(monkeypatch):
    """The third checkpoint fails while its last file is written, the one that tells how far it is."""
    write_text = Path.write_text

    def fail(self, text, **options):
        if self.name == "progress.json" and "checkpoint-3" in str(self):
            write_text(self, text[:5], **options)
            raise OSError("no space left")
        return write_text(self, text, **options)

    monkeypatch.setattr(Path, "write_text", fail)


def break_rename(monkeypatch):
    """The third checkpoint is whole but fails to get its name."""
    rename = Path.rename

    def fail(self, target):
        if "checkpoint-3" in str(self):
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)


@pytest.mark.parametrize("break_it", [break_save, break_json, break_rename])
def test_failed_save_leaves_the_older_checkpoints(fit, straight, tmp_path, monkeypatch, capsys, break_it):
    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 2}
    with monkeypatch.context() as patch:
        break_it(patch)
        assert fit(tmp_path, **settings) == 1
    assert (
        "Stopped after step 3 by a full disk. No checkpoint could be written (the disk is full); go on "
        f"from {tmp_path / 'checkpoint-2'} with --resume_from_checkpoint=latest. Make room first\n"
    ) in capsys.readouterr().err
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    for name in ("checkpoint-1", "checkpoint-2"):
        assert same(checkpoint_state(tmp_path / name), checkpoint_state(straight / name))
    # The next start goes on from the second and is not disturbed by what lies about.
    assert fit(tmp_path, **settings, resume_from_checkpoint="latest") == 0
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    assert same(checkpoint_state(tmp_path / "checkpoint-4"), checkpoint_state(straight / "checkpoint-4"))
    assert same(unet(tmp_path), unet(straight))


def test_a_whole_checkpoint_holds_what_a_resume_needs(straight):
    for step in range(1, 5):
        folder = straight / f"checkpoint-{step}"
        assert json.loads((folder / "progress.json").read_text())["global_step"] == step
        assert json.loads((folder / "args.json").read_text())["learning_rate"] == 1e-3
        assert sorted(path.name for path in folder.iterdir()) == FILES
        state = checkpoint_state(folder)
        weights = "unet/diffusion_pytorch_model.safetensors"
        assert state.keys() == {weights, "optimizer", "lr_scheduler", "progress"}
        assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {step}
        assert state["lr_scheduler"]["last_epoch"] == step
    assert same(checkpoint_unet(straight / "checkpoint-4"), unet(straight))


@pytest.mark.parametrize("limit, kept", [(1, [4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_limit_keeps_the_newest(fit, tmp_path, limit, kept):
    assert fit(tmp_path, checkpointing_steps=1, checkpoints_total_limit=limit) == 0
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_newest_is_by_number_not_by_name(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "progress.json").write_text("{}")
    for other in ("checkpoint-best", "checkpoint-11.partial", "checkpoint-"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "progress.json").write_text("{}")
    (tmp_path / "checkpoint-200").mkdir()
    found = [path.name for path in list_checkpoints(tmp_path)]
    assert found == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"


def checkpoint_with_digests(output_dir, step):
    """A folder as a checkpoint's, and its path."""
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("progress.json", "weights"):
        (folder / name).write_text(json.dumps({"global_step": step}))
    write_digests(folder)
    return folder


def damage(folder):
    """Changes a file of a checkpoint without changing its size."""
    path = folder / "weights"
    path.write_text(path.read_text().upper())


def test_latest_passes_over_damaged_checkpoints(tmp_path, capsys):
    older, newer, newest = (checkpoint_with_digests(tmp_path, step) for step in (9, 10, 11))
    assert count_damaged(tmp_path, "latest") == 0
    assert count_damaged(tmp_path, None) == 0
    assert count_damaged(tmp_path / "none", "latest") == 0
    damage(older)  # which nobody asks for
    assert count_damaged(tmp_path, "latest") == 0
    assert find_newer(tmp_path, newer) == newest
    damage(newest)
    assert capsys.readouterr().out == ""
    assert count_damaged(tmp_path, "latest") == 1
    assert capsys.readouterr().out == (
        "checkpoint-11 is damaged (the content of weights has changed since it was written); checkpoint-10 is used "
        "instead.\n"
    )
    assert find_checkpoint(tmp_path, "latest", 1) == newer
    assert find_newer(tmp_path, newer) is None  # so it may be asked for by name
    assert find_newer(tmp_path, newest) is None
    assert find_newer(tmp_path, older) == newer
    (newest / "digests.json").unlink()
    assert count_damaged(tmp_path, "latest") == 1
    assert capsys.readouterr().out == (
        "checkpoint-11 is damaged (digests.json is missing); checkpoint-10 is used instead.\n"
    )
    with pytest.raises(
        InputError, match=r"=checkpoint-11: checkpoint-11 is damaged \(digests.json is missing\); name"
    ):
        count_damaged(tmp_path, "checkpoint-11")


def test_a_damaged_checkpoint_is_not_used_where_there_is_no_other(tmp_path):
    """Nor where it is named: its user shall know."""
    older, newer = (checkpoint_with_digests(tmp_path, step) for step in (9, 10))
    damage(newer)
    for name in ("checkpoint-10", str(newer)):
        with pytest.raises(InputError) as caught:
            count_damaged(tmp_path, name)
        assert str(caught.value) == (
            f"--resume_from_checkpoint={name}: checkpoint-10 is damaged (the content of weights has changed since it "
            "was written); name another one, or start anew in another --output_dir"
        )
    assert count_damaged(tmp_path, "checkpoint-9") == 0
    os.truncate(older / "progress.json", 3)
    with pytest.raises(InputError) as caught:
        count_damaged(tmp_path, "latest")
    assert "checkpoint-9 is damaged (progress.json has 3 bytes instead of 18); name another" in str(caught.value)
    assert "checkpoint-10 is damaged" in str(caught.value)


ONE, OTHER = "0a" * 32, "0b" * 32  # two digests


@pytest.mark.parametrize(
    "there, now, told",
    [
        (ONE, OTHER, "photos: other images or captions now than there"),
        (ONE, None, "photos: other images or captions now than there"),
        (None, OTHER, "photos: other images or captions now than there"),
        (3, 4, "photos: 3 there, 4 now"),
        ({"b": 1, "a": 2}, {"b": 1, "a": 3}, "photos: other images or captions now than there: a"),
        ({"b\n": 1, "a": 2}, {"c": 1, "a": 2}, "photos: other images or captions now than there: b\\n, c"),
        (
            dict.fromkeys("gfedcba", 1),
            dict.fromkeys("abcdefg", 2),
            "photos: other images or captions now than there: a, b, c, d, e and 2 more",
        ),
        (ONE, {"a": OTHER}, "photos: other images or captions now than there: a"),
    ],
)
def test_what_differs_is_told_in_a_line(there, now, told):
    assert tell_difference("photos", there, now) == told
    assert tell_difference("photos", there, now, "here", "elsewhere") == told.replace("there", "here").replace(
        "now", "elsewhere"
    )


def test_names_that_differ_are_told_in_a_refusal(tmp_path):
    """The message on dictionaries, and the end of that on state that no other number of processes can read."""
    settings = {"shards": {"a.tar": 1, "b.tar": 2}, "sharding": "ZeRO-2 of 3 processes", "allow_changed_resume": False}
    run = Run(tmp_path, settings, {}, {}, None)
    with pytest.raises(InputError) as caught:
        compare_settings(run, tmp_path, {**settings, "shards": {"a.tar": 1, "b.tar": 3}}, set(), {"sharding"})
    assert str(caught.value).splitlines()[1:] == ["  shards: other content now than there: b.tar"]
    with pytest.raises(InputError) as caught:
        compare_settings(run, tmp_path, {**settings, "sharding": "ZeRO-2 of 2 processes"}, set(), {"sharding"})
    assert str(caught.value).splitlines()[1:] == [
        "  sharding: ZeRO-2 of 2 processes there, ZeRO-2 of 3 processes now; use the accelerate config of there, "
        "under ZeRO with as many processes (accelerate launch --num_processes=N), or begin a new run from what "
        "`sdtune export` makes of the checkpoint"
    ]


def test_what_is_in_the_place_of_checkpoints_to_come_is_renamed(tmp_path, capsys):
    for step in (2, 3, 10):
        checkpoint_with_digests(tmp_path, step)
    (tmp_path / "checkpoint-11").write_text("a file")
    (tmp_path / "checkpoint-12").mkdir()  # half of one
    (tmp_path / "checkpoint-10.damaged").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    before = snapshot(tmp_path / "checkpoint-10")
    set_aside_damaged(tmp_path, 3)
    assert checkpoints(tmp_path) == sorted(
        ["checkpoint-2", "checkpoint-3", "checkpoint-best"]
        + [f"checkpoint-{name}" for name in ("10.damaged", "10.damaged2", "11.damaged", "12.damaged")]
    )
    assert snapshot(tmp_path / "checkpoint-10.damaged2") == before
    assert capsys.readouterr().out.splitlines()[0] == "checkpoint-10 is renamed to checkpoint-10.damaged2."


def test_older_go_only_when_the_new_one_is_whole(fit, tmp_path, monkeypatch):
    rmtree, removals = shutil.rmtree, []

    def watch(path, *args, **options):
        path = Path(path)
        if path.exists():
            removals.append((path.name, [whole.name for whole in list_checkpoints(path.parent)]))
        return rmtree(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", watch)
    assert fit(tmp_path, checkpointing_steps=1, checkpoints_total_limit=1) == 0
    assert removals == [(f"checkpoint-{step}.partial", [f"checkpoint-{step + 1}"]) for step in (1, 2, 3)]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660)])
def test_files_honour_the_umask(fit, tmp_path, umask, mode):
    """safetensors writes for the owner alone; on a shared machine the others could not load the result."""
    before = os.umask(umask)
    try:
        settings = {"max_train_steps": 1, "checkpointing_steps": 1, "use_ema": True, "validation_prompts": ["a"]}
        assert fit(tmp_path, **settings) == 0
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) == 5  # of result, checkpoint and average
    assert len([path for path in files if path.name == "optimizer.bin"]) == 1
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files}
    assert set(modes.values()) == {oct(mode)}, modes


# -------------------------------------------------------------------------------------- under other conditions


def edit_caption(images, folder):
    """Copies images, one of them with another caption."""
    shutil.copytree(images, folder)
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("number zero", "number ten"))


def edit_image(images, folder):
    """Copies images, one of them with another's pixels."""
    shutil.copytree(images, folder)
    shutil.copy(folder / "01.png", folder / "00.png")


def refused_unless_allowed(fit, folder, capsys, named, **settings):
    """A resume ends with a message that names what was changed and leaves the run alone; allowed, it trains on."""
    settings = {"checkpointing_steps": 1, "resume_from_checkpoint": "latest", **settings}
    before = snapshot(folder)
    assert fit(folder, **settings) == 2
    message = capsys.readouterr().err
    assert named in re.sub(r"\n {4,}", " ", message)
    assert "--allow_changed_resume" in message
    assert len(message.splitlines()) <= 12
    assert snapshot(folder) == before

    assert fit(folder, **settings, allow_changed_resume=True) == 0
    assert named in re.sub(r"\n {4,}", " ", capsys.readouterr().out)
    assert len(losses(folder)) == 4
    assert all(map(math.isfinite, losses(folder)))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 3}, "seed: 0 there, 3 now"),
        ({"train_batch_size": 3}, "samples_per_step: 2 there, 3 now"),
        ({"gradient_accumulation_steps": 2}, "samples_per_step: 2 there, 4 now"),
        ({"learning_rate": 1e-4}, "learning_rate: 0.001 there, 0.0001 now"),
        ({"caption_dropout": 0.1}, "caption_dropout: 0.0 there, 0.1 now"),
        ({"random_flip": True}, "random_flip: False there, True now"),
        ({"noise_offset": 0.1}, "noise_offset: 0.0 there, 0.1 now"),
        ({"lr_scheduler": "linear"}, "lr_scheduler: constant there, linear now"),
        (
            {"num_validation_samples": 1},
            "captioned_images: other images or captions now than there (--num_validation_samples: 0 there, 1 now)\n",
        ),
        (
            {"num_validation_samples": 2, "max_train_samples": 5},
            "captioned_images: other images or captions now than there (--num_validation_samples: 0 there, 2 now; "
            "--max_train_samples: None there, 5 now)\n",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_changed_flags_are_refused_unless_allowed(fit, stopped, capsys, changes, named):
    refused_unless_allowed(fit, stopped, capsys, named, **changes)


@pytest.mark.parametrize(
    "changes, lines",
    [
        ({"learning_rate": 1e-4}, ["learning_rate: 0.001 there, 0.0001 now"]),
        ({"scale_lr": True}, ["scale_lr: False there, True now"]),
        ({"learning_rate": 1e-4, "seed": 3}, ["learning_rate: 0.001 there, 0.0001 now", "seed: 0 there, 3 now"]),
    ],
)
def test_what_follows_from_a_changed_flag_is_not_told_again(fit, stopped, capsys, changes, lines):
    """As the peak of the learning rate does, which is no flag."""
    assert fit(stopped, checkpointing_steps=1, resume_from_checkpoint="latest", **changes) == 2
    told = re.sub(r"\n {4,}", " ", capsys.readouterr().err).splitlines()
    assert sorted(line.strip() for line in told[1:]) == sorted(lines)


@pytest.mark.parametrize("edit", [edit_caption, edit_image])
def test_changed_images_are_refused_unless_allowed(fit, images, stopped, tmp_path, capsys, edit):
    data = tmp_path / "changed"
    edit(images, data)
    told = "captioned_images: other images or captions now than there\n"
    refused_unless_allowed(fit, stopped, capsys, told, data=data)


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path):
    """Nor does it take the place of one that is."""
    (tmp_path / "args.json").write_text("{}")
    run = Run(tmp_path, settings={}, progress={}, state={}, counts=None)
    for step, loss in ((1, 0.5), (2, 0.1), (3, math.nan), (4, 0.9)):
        run.progress = {"global_step": step}
        save_checkpoint(run, lambda *_: None, 1)
        keep_best(run, loss, lambda *_: None, 1)
    assert read_best(tmp_path) == {"step": 2, "held_out_loss": 0.1}
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_averages_that_do_not_fit_leave_the_weights_as_they_were():
    """A copy that fails half-way would otherwise be saved as the state of the run."""
    parameters = [torch.nn.Parameter(torch.full((2,), float(number))) for number in range(2)]
    ema = EMAModel(parameters)
    ema.shadow_params = [torch.full((2,), 7.0), torch.full((3,), 7.0)]  # the second one cannot be copied
    run = Run(Path(), {}, {}, {"ema": ema}, None, Weights({}, {}, parameters, None, None, {}))
    with pytest.raises(RuntimeError, match="size"), averaged(run):
        pass
    assert [parameter.tolist() for parameter in parameters] == [[0.0, 0.0], [1.0, 1.0]]


def test_a_resume_on_a_full_disk_keeps_the_log(fit, stopped, monkeypatch, capsys):
    """It is written beside its place."""
    write_text, before = Path.write_text, snapshot(stopped)

    def fail(self, text, **options):
        if "log.jsonl" in self.name:
            write_text(self, text[:5], **options)
            raise OSError(28, "No space left on device")
        return write_text(self, text, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    assert fit(stopped, checkpointing_steps=1, resume_from_checkpoint="latest") == 2
    assert "cannot be written to ([Errno 28] No space left on device); make room" in capsys.readouterr().err
    after = snapshot(stopped)
    assert after["log.jsonl"] == before["log.jsonl"]
    assert after.keys() == {*before, ".lock"}


def test_the_best_of_another_task_is_forgotten(fit, tmp_path):
    settings = {"num_validation_samples": 2, "checkpointing_steps": 2, "validation_steps": 2, "keep_best": True}
    assert fit(tmp_path, **settings, max_train_steps=2) == 0
    (tmp_path / "best.json").write_text('{"step": 2, "held_out_loss": -1.0}')
    settings |= {"resume_from_checkpoint": "latest", "allow_changed_resume": True}
    assert fit(tmp_path, **settings, resolution=16) == 0
    assert read_best(tmp_path)["held_out_loss"] > 0


def test_half_a_checkpoint_in_the_place_is_not_taken_for_one(tmp_path):
    """Nor removed: it is none of ours, which are renamed when they are whole."""
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "mine.txt").write_text("mine")
    run = Run(tmp_path, settings={}, progress={"global_step": 4}, state={}, counts=None)
    with pytest.raises(OSError, match="not empty"):
        save_checkpoint(run, lambda *_: None, None)
    assert (tmp_path / "checkpoint-4" / "mine.txt").read_text() == "mine"
    assert checkpoints(tmp_path) == ["checkpoint-4"]


def test_other_held_out_images_are_other_images(fit, images, tmp_path, capsys):
    """Else their loss would be compared with that of the pictures before."""
    data = shutil.copytree(images, tmp_path / "data")
    settings = {"data": data, "num_validation_samples": 2, "checkpointing_steps": 1}
    assert fit(tmp_path / "out", **settings, max_train_steps=1) == 0
    held_out = np.random.default_rng(4).permutation(6)[0]  # 4: the number of the stream of random numbers
    Image.new("RGB", (32, 32)).save(sorted(data.glob("*.png"))[held_out])
    assert fit(tmp_path / "out", **settings, resume_from_checkpoint="latest") == 2
    assert "captioned_images: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, length",  # of what is left of the file; None: it is gone
    [
        ("optimizer.bin", None),
        ("optimizer.bin", 500),
        ("state.json", 5),
        ("args.json", None),
        ("args.json", 0),
        ("progress.json", 0),
        ("unet/diffusion_pytorch_model.safetensors", 500),
    ],
)
def test_damaged_checkpoints_are_named(fit, stopped, capsys, name, length):
    """Where digests say nothing of it: by somebody who knows of them. Else another is used: tests/torture."""
    newest = find_checkpoint(stopped, "latest")
    content = (newest / name).read_bytes()
    (newest / name).unlink()
    if length is not None:
        (newest / name).write_bytes(content[:length])
    write_digests(newest)
    before = snapshot(stopped)
    assert fit(stopped, checkpointing_steps=1, resume_from_checkpoint="latest") == 2
    message = capsys.readouterr().err
    assert f"--resume_from_checkpoint: {newest} is damaged, or of another script; name another (" in message
    assert len(message.splitlines()) == 1
    assert snapshot(stopped) == before


def test_changed_model_is_refused(fit, tiny_pipeline, stopped, tmp_path, capsys):
    other = shutil.copytree(tiny_pipeline, tmp_path / "other")
    assert fit(stopped, base=other, checkpointing_steps=1, resume_from_checkpoint="latest") == 2
    assert "pretrained_model_name_or_path" in capsys.readouterr().err


def test_held_out_images_may_change_on_an_allowed_resume(fit, tmp_path):
    """Losses of other images than at the start cannot be compared with it in pairs."""
    settings = {"checkpointing_steps": 2, "validation_steps": 2}
    assert fit(tmp_path, **settings, num_validation_samples=2, max_train_steps=2) == 0
    settings |= {"resume_from_checkpoint": "latest", "allow_changed_resume": True}
    assert fit(tmp_path, **settings, num_validation_samples=3) == 0
    assert [row["step"] for row in read_log(tmp_path) if "held_out_loss" in row] == [0, 2, 4]


def test_no_gain_over_losses_of_another_task(fit, tmp_path):
    """Losses at another resolution are no measure of what was learnt; the gain starts anew."""
    settings = {"num_validation_samples": 2, "checkpointing_steps": 2, "validation_steps": 2}
    assert fit(tmp_path, **settings, max_train_steps=2) == 0
    settings |= {"resume_from_checkpoint": "latest", "allow_changed_resume": True}
    assert fit(tmp_path, **settings, resolution=16) == 0
    gains = [row["held_out_gain"] for row in read_log(tmp_path) if "held_out_gain" in row]
    assert gains[0] == 0
    assert gains[1] == 0  # measured again, at the step of the resume
    assert gains[2] != 0


def test_a_gain_outlives_a_lower_rate(fit, tmp_path):
    """As is advised after a loss that is not finite: what is measured stays the same."""
    settings = {"num_validation_samples": 2, "checkpointing_steps": 3, "validation_steps": 2}
    assert fit(tmp_path, **settings, max_train_steps=3) == 0
    settings |= {"resume_from_checkpoint": "latest", "allow_changed_resume": True}
    assert fit(tmp_path, **settings, learning_rate=1e-4) == 0
    rows = [row for row in read_log(tmp_path) if "held_out_loss" in row]
    assert rows[-1]["step"] == 4
    assert rows[-1]["held_out_gain"] == pytest.approx(rows[0]["held_out_loss"] - rows[-1]["held_out_loss"], abs=1e-6)


def test_removing_a_checkpoint_leaves_no_half_one(train_script, fit, tmp_path, monkeypatch):
    """However far it came: what is left has the name of one that is not whole."""
    with monkeypatch.context() as patch:
        patch.setattr(train_script.shutil, "rmtree", lambda path, **_: None)
        assert fit(tmp_path, checkpointing_steps=1, checkpoints_total_limit=1) == 0
    partial = [f"checkpoint-{step}.partial" for step in (1, 2, 3)]
    assert checkpoints(tmp_path) == sorted(["checkpoint-4", *partial])
    assert fit(tmp_path, overwrite_output_dir=True, checkpointing_steps=1, max_train_steps=1) == 0
    assert checkpoints(tmp_path) == ["checkpoint-1"]


def test_a_run_written_over_an_ended_one_can_be_gone_on_with(train_script, fit, tmp_path, monkeypatch):
    """Though it was stopped before its first checkpoint."""
    assert fit(tmp_path, max_train_steps=1) == 0

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "encode_held_out", stop)
        assert fit(tmp_path, overwrite_output_dir=True) == 130
    assert not (tmp_path / "README.md").exists()
    assert fit(tmp_path, resume_from_checkpoint="latest") == 0
    assert len(losses(tmp_path)) == 4


def test_what_leaves_the_result_may_change(fit, straight, stopped):
    settings = {
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "dataloader_num_workers": 1,
        "validation_prompts": ["a red circle"],
        "tracker_project_name": "another",
    }
    assert fit(stopped, **settings) == 0
    assert same(unet(stopped), unet(straight))
    assert checkpoints(stopped) == ["checkpoint-4"]


def test_same_step_in_other_passes_may_be_resumed(fit, straight, stopped):
    """1 x 2 images instead of 2 x 1: the same step up to rounding."""
    settings = {
        "checkpointing_steps": 1,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "resume_from_checkpoint": "latest",
    }
    assert fit(stopped, **settings) == 0
    assert losses(stopped)[:2] == losses(straight)[:2]
    assert losses(stopped) == pytest.approx(losses(straight), rel=1e-3)


def test_constant_schedule_may_be_extended(fit, straight, stopped):
    settings = {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    assert fit(stopped, **settings, max_train_steps=3) == 0
    assert same(unet(stopped), checkpoint_unet(straight / "checkpoint-3"))
    assert fit(stopped, **settings, max_train_steps=4) == 0
    assert same(unet(stopped), unet(straight))
    assert read_log(stopped) == read_log(straight)


def test_schedule_that_ends_may_not_be_extended(fit, tmp_path, capsys):
    settings = {"checkpointing_steps": 1, "lr_scheduler": "cosine"}
    assert fit(tmp_path, **settings, max_train_steps=2) == 0
    assert fit(tmp_path, **settings, resume_from_checkpoint="latest") == 2
    assert "schedule_steps: 2 there, 4 now" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- over an older run


def test_used_folder_is_left_alone(fit, stopped, capsys):
    before = snapshot(stopped)
    assert fit(stopped) == 2
    message = capsys.readouterr().err
    assert "--overwrite_output_dir" in message
    assert "--resume_from_checkpoint" in message
    assert snapshot(stopped) == before


def test_overwriting_removes_the_old_run_and_nothing_else(fit, straight, stopped):
    (stopped / "notes.txt").write_text("mine")
    (stopped / "checkpoint-best").mkdir()
    (stopped / "checkpoint-best" / "mine.txt").write_text("mine")
    (stopped / "samples").mkdir()
    (stopped / "samples" / "step-000900.png").write_bytes(b"old")
    shutil.copytree(stopped / "checkpoint-1", stopped / "checkpoint-900")
    assert fit(stopped, checkpointing_steps=2, overwrite_output_dir=True) == 0
    assert (stopped / "notes.txt").read_text() == "mine"
    assert (stopped / "checkpoint-best" / "mine.txt").read_text() == "mine"
    assert checkpoints(stopped) == ["checkpoint-2", "checkpoint-4", "checkpoint-best"]
    assert not (stopped / "samples").exists()
    assert same(unet(stopped), unet(straight))
    assert read_log(stopped) == read_log(straight)


def test_wrong_flag_overwrites_nothing(fit, stopped, capsys):
    before = snapshot(stopped)
    assert fit(stopped, overwrite_output_dir=True, resolution=33) == 2
    assert "--resolution=33" in capsys.readouterr().err
    assert snapshot(stopped) == before


# ------------------------------------------------------------------------------------- a loss that is not finite


@pytest.mark.parametrize("broken_in", ["loss", "gradient"])
def test_broken_step_ends_the_run_before_it_does_harm(
    train_script, fit, straight, tmp_path, monkeypatch, capsys, broken_in
):
    """The checkpoint holds the weights before the step, so that the run may go on as if the step had been whole."""
    diffusion_losses = train_script.diffusion_losses
    num_calls = 0

    def break_third(*args, **options):
        nonlocal num_calls
        num_calls += 1
        result = diffusion_losses(*args, **options)
        if num_calls != 3:
            return result
        if broken_in == "loss":
            return result * torch.tensor([1.0, math.nan])
        result.register_hook(lambda grad: grad * math.inf)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "diffusion_losses", break_third)
        assert fit(tmp_path, checkpointing_steps=100) == 1
    message = capsys.readouterr().err
    assert "not finite, in step 3" in message
    assert "checkpoint-2 holds the state after step 2" in message
    assert not (tmp_path / "unet").exists()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert same(checkpoint_state(tmp_path / "checkpoint-2"), checkpoint_state(straight / "checkpoint-2"))
    assert read_log(tmp_path) == read_log(straight)[:2]
    assert fit(tmp_path, checkpointing_steps=100, resume_from_checkpoint="latest") == 0
    assert same(unet(tmp_path), unet(straight))


def test_huge_learning_rate_ends_with_finite_weights(fit, tmp_path, capsys):
    """By themselves, without a patch: the first step throws the weights far off, a later loss overflows."""
    assert fit(tmp_path, learning_rate=1e30, adam_weight_decay=0) == 1
    message = capsys.readouterr().err
    assert "not finite" in message
    assert "a lower --learning_rate" in message
    (name,) = checkpoints(tmp_path)
    assert all(weight.isfinite().all() for weight in checkpoint_unet(tmp_path / name).values())


def test_an_old_checkpoint_that_stays_is_no_failure(fit, tmp_path, monkeypatch, capsys):
    """As where somebody has a file of it open on a network file system."""
    rmtree = shutil.rmtree

    def fail(path, **options):
        if "checkpoint-1" in str(path):
            raise OSError(39, "Directory not empty")
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", fail)
    assert fit(tmp_path, checkpointing_steps=1, checkpoints_total_limit=1, max_train_steps=3) == 0
    told = f"Warning: {tmp_path / 'checkpoint-1'} could not be removed ([Errno 39] Directory not empty); remove"
    assert told in capsys.readouterr().out
    assert checkpoints(tmp_path) == ["checkpoint-1.partial", "checkpoint-3"]


def test_what_hosts_with_long_names_left_unfinished_goes(fit, tmp_path):
    for host in ("node1", "node1.cluster.local"):
        (tmp_path / f"checkpoint-2.{host}-77.partial").mkdir()
    (tmp_path / "args.json").write_text("{}")
    assert fit(tmp_path, max_train_steps=1, resume_from_checkpoint="latest") == 0
    assert checkpoints(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), OSError("reset by peer")])
def test_a_lack_of_memory_is_no_damage(tmp_path, error):
    def fail(_):
        raise error

    is_damage = "peer" in str(error)  # which is not what a lost process says
    with pytest.raises(InputError if is_damage else type(error)):
        read_undamaged(tmp_path, fail)
