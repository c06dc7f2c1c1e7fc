"""The same command gives the same bits, whatever interrupts it."""

import json
import os
import random
import shutil
import signal
import time

import psutil
import pytest
import torch
from copies import FORK, end_of, start_copy, start_launcher, wait_for_end
from diffusers import StableDiffusionPipeline
from image_data import write_image_folder
from PIL import Image
from training import checkpoint_state, losses, read_log, same, train, unet, words

# All that is random or has a state. 11 images in steps of 4 make epochs of 3 steps, the last one short: step 4 lies
# within the second epoch.
EVERYTHING = {
    "max_train_steps": 8,
    "checkpointing_steps": 4,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "use_ema": True,
    "ema_decay": 0.5,
    "caption_dropout": 0.3,
    "random_flip": True,
    "noise_offset": 0.05,
    "input_perturbation": 0.1,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
}


@pytest.fixture(scope="module")
def base(tiny_pipeline, tmp_path_factory):
    """The tiny pipeline with dropout layers in its UNet: the one part that draws from torch's own generator."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_pipeline, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"dropout": 0.1}))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven images larger than the resolution and not square, so that crops are random; two captions each."""
    captions = [[f"a red circle {index}", f"a small picture {index}"] for index in range(11)]
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 11, (48, 40), captions)


@pytest.fixture(scope="module")
def fit(train_script, base, images):
    """Trains into a folder with EVERYTHING, or other settings; returns the exit status."""

    def run(folder, **settings):
        return train(train_script, base, images, folder, **{**EVERYTHING, **settings})

    return run


@pytest.fixture(scope="module")
def straight(fit, tmp_path_factory):
    """The output of eight steps without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    assert fit(folder) == 0
    return folder


def assert_same_run(folder, straight, step=8):
    """Result, checkpoint and log are the same."""
    assert same(unet(folder), unet(straight))
    checkpoint = f"checkpoint-{step}"
    assert same(checkpoint_state(folder / checkpoint), checkpoint_state(straight / checkpoint))
    assert read_log(folder) == read_log(straight)


def copy_stopped(straight, folder, last_checkpoint):
    """Copies a run as it would be if it had been killed after its last checkpoint, when it was about to save."""
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / last_checkpoint)
    shutil.rmtree(folder / "unet")
    return folder


def names_of_checkpoints(folder):
    return {path.name for path in folder.glob("checkpoint-*")}


def interrupt(script, monkeypatch, at_step, number):
    """Lets the script send itself a signal when it logs `at_step`; it shall end after the step that follows."""
    write_log = script.write_log

    def write_log_and_signal(accelerator, output_dir, step, numbers):
        write_log(accelerator, output_dir, step, numbers)
        if step == at_step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(script, "write_log", write_log_and_signal)


def wait_for_steps(is_running, folder, number, seconds=120):
    """Waits until the log of a running script has so many lines."""
    deadline, log = time.monotonic() + seconds, folder / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < number:
        assert is_running(), "it ended before its step"
        assert time.monotonic() < deadline, "no step was logged in time"
        time.sleep(0.01)


# ----------------------------------------------------------------------------------------------------------- same bits


def test_the_fixture_is_no_trivial_run(straight, base):
    """Equality below would mean nothing if average and weights were one, or nothing had been trained."""
    result, last = unet(straight), unet(straight / "checkpoint-8")
    start = unet(base)
    assert not any(torch.equal(result[name], last[name]) for name in result)
    assert not any(torch.equal(result[name], start[name]) for name in result)
    assert len(set(losses(straight))) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_same_command_gives_the_same_bits(fit, straight, tmp_path, workers):
    assert fit(tmp_path, dataloader_num_workers=workers) == 0
    assert_same_run(tmp_path, straight)


def test_other_seed_gives_other_bits(fit, straight, tmp_path):
    assert fit(tmp_path, seed=1) == 0
    result, other = unet(straight), unet(tmp_path)
    assert not any(torch.equal(result[name], other[name]) for name in result)
    assert not set(losses(tmp_path)) & set(losses(straight))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_straight(fit, straight, tmp_path, workers):
    """Also where the run had gone on beyond the checkpoint: what it logged there must not be there twice."""
    folder = copy_stopped(straight, tmp_path / "out", "checkpoint-8")
    assert fit(folder, dataloader_num_workers=workers, resume_from_checkpoint="latest") == 0
    assert_same_run(folder, straight)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_8bit_adam": True},
        {"optimizer": "adafactor"},
        {"optimizer": "prodigy", "learning_rate": 1},
        {"mixed_precision": "bf16"},
        {"offload_ema": True},
        {"no-foreach_ema": True},
    ],
    ids=lambda settings: " ".join(map(str, next(iter(settings.items())))),
)
def test_resumed_equals_straight_in_every_precision(fit, tmp_path, settings):
    settings = {"max_train_steps": 4, "checkpointing_steps": 2, **settings}
    straight = tmp_path / "straight"
    assert fit(straight, **settings) == 0
    folder = copy_stopped(straight, tmp_path / "out", "checkpoint-4")
    assert fit(folder, **settings, resume_from_checkpoint="latest") == 0
    assert_same_run(folder, straight, step=4)


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_at_a_random_step(train_script, fit, straight, tmp_path, monkeypatch, number, workers):
    step = random.randrange(1, 8)
    print(f"signal at step {step}")
    with monkeypatch.context() as patch:
        interrupt(train_script, patch, step, number)
        assert fit(tmp_path, dataloader_num_workers=workers) == 128 + number
    expected = {f"checkpoint-{step + 1}"}
    if step + 1 > 4:
        expected.add("checkpoint-4")
    assert names_of_checkpoints(tmp_path) == expected
    assert not (tmp_path / "model_index.json").exists()
    assert read_log(tmp_path) == read_log(straight)[: step + 1]
    assert fit(tmp_path, dataloader_num_workers=workers, resume_from_checkpoint="latest") == 0
    assert_same_run(tmp_path, straight)


def draw_weights(pipeline, *prompt_and_size, **settings):
    """Stands for the sampler: a picture of the UNet's first weights."""
    weights = next(pipeline.unet.parameters()).flatten()[: 16 * 16].reshape(16, 16)
    levels = (weights * 1e4).remainder(256).byte()
    picture = Image.fromarray(levels.numpy()).convert("RGB")
    return type("Drawn", (), {"images": [picture]})


def test_signal_in_the_last_step_costs_nothing(train_script, fit, tmp_path, monkeypatch):
    """Validation of the step in which the signal came is made up for by the resume."""
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", draw_weights)
    settings = {
        "max_train_steps": 4,
        "checkpointing_steps": 100,
        "validation_prompts": ["a red circle"],
        "validation_steps": 2,
        "num_validation_samples": 2,
    }
    straight = tmp_path / "straight"
    assert fit(straight, **settings) == 0
    pictures = {path.name: path.read_bytes() for path in (straight / "samples").iterdir()}
    assert len(set(pictures.values())) == 3
    for stopped_at in (2, 4):
        folder = tmp_path / f"stopped_{stopped_at}"
        with monkeypatch.context() as patch:
            interrupt(train_script, patch, stopped_at - 1, signal.SIGTERM)
            assert fit(folder, **settings) == 143
        assert fit(folder, **settings, resume_from_checkpoint="latest") == 0
        assert same(unet(folder), unet(straight))
        assert read_log(folder) == read_log(straight)
        assert {path.name: path.read_bytes() for path in (folder / "samples").iterdir()} == pictures


def test_signal_while_loading_ends_the_run_at_once(train_script, fit, tmp_path, monkeypatch, capsys):
    """There is nothing to save yet, and loading may take minutes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    load_models = train_script.load_models

    def load_models_and_signal(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return load_models(*args)

    monkeypatch.setattr(train_script, "load_models", load_models_and_signal)
    assert fit(tmp_path / "out") == 128 + signal.SIGINT
    assert "train_text_to_image.py: stopped by SIGINT\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("launched", [True, False])
def test_launcher_that_died_while_loading_is_noticed(train_script, fit, straight, tmp_path, monkeypatch, launched):
    """Only under a launcher: who starts the script in the background and logs out wants it to go on."""
    load_models = train_script.load_models
    parent = os.getppid()

    def load_models_and_lose_the_parent(*args):
        nonlocal parent
        parent = 1
        return load_models(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "load_models", load_models_and_lose_the_parent)
        patch.setattr(os, "getppid", lambda: parent)
        if launched:
            patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        status = fit(tmp_path)
    if launched:
        assert status == 143
        assert names_of_checkpoints(tmp_path) == {"checkpoint-1"}
        status = fit(tmp_path, resume_from_checkpoint="latest")
    assert status == 0
    assert_same_run(tmp_path, straight)


def test_process_ended_by_a_signal_is_resumed(train_script, base, images, fit, tmp_path):
    """From outside, as a cluster does it: the constant schedule allows any number of steps."""
    settings = {
        **EVERYTHING,
        "lr_scheduler": "constant",
        "lr_warmup_steps": None,
        "checkpointing_steps": 1000,
        "max_train_steps": 1000,
    }
    folder, straight, said = tmp_path / "killed", tmp_path / "straight", tmp_path / "said"
    copy = start_copy(train_script, words(base, images, folder, **settings), said)
    try:
        wait_for_steps(copy.is_alive, folder, random.randrange(1, 6))
        os.kill(copy.pid, signal.SIGTERM)
        assert end_of(copy) == 128 + signal.SIGTERM, said.read_text()
    finally:
        copy.kill()
    step = len(read_log(folder))
    assert names_of_checkpoints(folder) == {f"checkpoint-{step}"}
    assert "--resume_from_checkpoint=latest" in said.read_text()
    settings["max_train_steps"] = step + 2
    assert fit(folder, **settings, resume_from_checkpoint="latest") == 0
    assert fit(straight, **settings) == 0
    assert same(unet(folder), unet(straight))
    assert read_log(folder) == read_log(straight)


def launch(script, line, said):
    """Stands for a launcher, which starts the script and waits for it."""
    start_copy(script, line, said, ACCELERATE_MIXED_PRECISION="no").join()


def start_a_launcher(script, line, said):
    """Starts the shortest of launchers."""
    launcher = FORK.Process(target=launch, args=(script, line, said))
    launcher.start()
    return launcher


def start_accelerate(script, line, said):
    """Starts `accelerate launch`, which hands no signal on."""
    return start_launcher(script, line, said, "accelerate")


@pytest.mark.parametrize(
    "start, number",
    [
        pytest.param(start_accelerate, signal.SIGTERM, marks=pytest.mark.slow),
        (start_a_launcher, signal.SIGKILL),
    ],
)
def test_script_saves_and_ends_when_its_launcher_died(train_script, base, images, tmp_path, start, number):
    """Without a look at its parent the script would train on for ever."""
    folder, said = tmp_path / "out", tmp_path / "said"
    settings = {**EVERYTHING, "max_train_steps": 100_000, "checkpointing_steps": 100_000}
    launcher = start(train_script, words(base, images, folder, **settings), said)
    script = None
    try:
        wait_for_steps(launcher.is_alive, folder, 2)
        (script,) = psutil.Process(launcher.pid).children()
        os.kill(launcher.pid, number)
        assert end_of(launcher) == -number
        wait_for_end(script)
    finally:
        launcher.kill()
        if script and script.is_running():
            script.kill()
    step = len(read_log(folder))
    assert names_of_checkpoints(folder) == {f"checkpoint-{step}"}
    progress = json.loads((folder / f"checkpoint-{step}" / "progress.json").read_text())
    assert progress["global_step"] == step
    assert f"holds the state after step {step}" in said.read_text()


# ------------------------------------------------------------------------------------------------- half-written


def half_written(straight, folder):
    """Makes a copy of a run that stopped while it wrote checkpoint 9, and one that was moved without progress.json."""
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoint-8")
    for name in ("checkpoint-9", "checkpoint-9.partial"):
        shutil.copytree(folder / "checkpoint-4", folder / name)
        (folder / name / "optimizer.bin").write_bytes(b"half")
    (folder / "checkpoint-9" / "progress.json").unlink()
    return folder


def test_latest_skips_half_written_checkpoints(fit, straight, tmp_path, capsys):
    folder = half_written(straight, tmp_path / "out")
    assert fit(folder, resume_from_checkpoint="latest") == 0
    assert "4 to 8" in capsys.readouterr().out
    assert_same_run(folder, straight)


def test_half_written_checkpoint_by_name_is_refused(fit, straight, tmp_path, capsys):
    folder = half_written(straight, tmp_path / "out")
    path = folder / "checkpoint-9"
    assert fit(folder, resume_from_checkpoint=path) == 2
    message = capsys.readouterr().err
    assert str(path) in message
    assert "no whole checkpoint" in message
    assert len(message.splitlines()) <= 12


def test_checkpoint_by_name_goes_on_in_another_folder(fit, straight, tmp_path):
    assert fit(tmp_path / "out", resume_from_checkpoint=straight / "checkpoint-4") == 0
    assert same(unet(tmp_path / "out"), unet(straight))
    assert read_log(tmp_path / "out") == read_log(straight)[4:]


def test_latest_without_a_checkpoint_starts_from_the_beginning(fit, straight, tmp_path):
    assert fit(tmp_path, resume_from_checkpoint="latest") == 0
    assert_same_run(tmp_path, straight)
