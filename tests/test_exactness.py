"""The same command gives the same bits, whatever interrupts it; processes share a batch and its losses stay."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from image_data import write_image_folder
from running import run_script, start_script
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
def straight(train_script, base, images, tmp_path_factory):
    """The output of eight steps without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    assert train(train_script, base, images, folder, **EVERYTHING) == 0
    return folder


def assert_same_run(folder, straight, step=8):
    assert same(unet(folder), unet(straight))
    checkpoint = f"checkpoint-{step}"
    assert same(checkpoint_state(folder / checkpoint), checkpoint_state(straight / checkpoint))
    assert read_log(folder) == read_log(straight)


def interrupt(script, monkeypatch, at_step, number):
    """Lets the script send itself a signal when it logs `at_step`; it shall end after the step that follows."""
    write_log = script.write_log

    def write_log_and_signal(accelerator, output_dir, step, numbers):
        write_log(accelerator, output_dir, step, numbers)
        if step == at_step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(script, "write_log", write_log_and_signal)


def wait_for_steps(process, folder, number, seconds=120):
    """Waits until the log of a running script has so many lines."""
    deadline, log = time.monotonic() + seconds, folder / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= number):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step was logged in time"
        time.sleep(0.01)


def test_the_fixture_is_no_trivial_run(straight, base):
    """Equality below would mean nothing if average and weights were one, or nothing had been trained."""
    result, last = unet(straight), checkpoint_state(straight / "checkpoint-8")["unet"]
    start = unet(base)
    assert not any(torch.equal(result[name], last[name]) for name in result)
    assert not any(torch.equal(result[name], start[name]) for name in result)
    assert len(set(losses(straight))) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_same_command_gives_the_same_bits(train_script, base, images, straight, tmp_path, workers):
    assert train(train_script, base, images, tmp_path, **EVERYTHING, dataloader_num_workers=workers) == 0
    assert_same_run(tmp_path, straight)


def test_other_seed_gives_other_bits(train_script, base, images, straight, tmp_path):
    assert train(train_script, base, images, tmp_path, **EVERYTHING, seed=1) == 0
    result, other = unet(straight), unet(tmp_path)
    assert not any(torch.equal(result[name], other[name]) for name in result)
    assert not set(losses(tmp_path)) & set(losses(straight))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_straight(train_script, base, images, straight, tmp_path, workers):
    """Also where the run had gone on beyond the checkpoint: what it logged there must not be there twice."""
    folder = tmp_path / "out"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoint-8")
    shutil.rmtree(folder / "unet")
    settings = {**EVERYTHING, "dataloader_num_workers": workers, "resume_from_checkpoint": "latest"}
    assert train(train_script, base, images, folder, **settings) == 0
    assert_same_run(folder, straight)


@pytest.mark.parametrize(
    "settings",
    [{"use_8bit_adam": True}, {"mixed_precision": "bf16"}, {"offload_ema": True}, {"foreach_ema": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_resumed_equals_straight_in_every_precision(train_script, base, images, tmp_path, settings):
    settings = {**EVERYTHING, "max_train_steps": 4, "checkpointing_steps": 2, **settings}
    assert train(train_script, base, images, tmp_path / "straight", **settings) == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    shutil.rmtree(tmp_path / "out" / "unet")
    assert train(train_script, base, images, tmp_path / "out", **settings, resume_from_checkpoint="latest") == 0
    assert_same_run(tmp_path / "out", tmp_path / "straight", step=4)


@pytest.mark.parametrize(
    "number, workers", [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 0), (signal.SIGINT, 2)]
)
def test_signal_at_a_random_step(train_script, base, images, straight, tmp_path, monkeypatch, number, workers):
    step = random.randrange(1, 8)
    print(f"signal at step {step}")
    settings = {**EVERYTHING, "dataloader_num_workers": workers}
    with monkeypatch.context() as patch:
        interrupt(train_script, patch, step, number)
        assert train(train_script, base, images, tmp_path, **settings) == 128 + number
    checkpoints = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert checkpoints == {f"checkpoint-{step + 1}"} | ({"checkpoint-4"} if step + 1 > 4 else set())
    assert not (tmp_path / "model_index.json").exists()
    assert read_log(tmp_path) == read_log(straight)[: step + 1]
    assert train(train_script, base, images, tmp_path, **settings, resume_from_checkpoint="latest") == 0
    assert_same_run(tmp_path, straight)


def test_signal_in_the_last_step_costs_nothing(train_script, base, images, tmp_path, monkeypatch):
    """Validation of the step in which the signal came is made up for by the resume."""
    prompts = {"validation_prompts": ["a red circle"], "validation_steps": 2, "num_validation_samples": 2}
    settings = {**EVERYTHING, "max_train_steps": 4, "checkpointing_steps": 100, **prompts}
    assert train(train_script, base, images, tmp_path / "straight", **settings) == 0
    for stopped_at in (2, 4):
        folder = tmp_path / f"stopped_{stopped_at}"
        with monkeypatch.context() as patch:
            interrupt(train_script, patch, stopped_at - 1, signal.SIGTERM)
            assert train(train_script, base, images, folder, **settings) == 143
        assert train(train_script, base, images, folder, **settings, resume_from_checkpoint="latest") == 0
        assert same(unet(folder), unet(tmp_path / "straight"))
        assert read_log(folder) == read_log(tmp_path / "straight")
        for path in (tmp_path / "straight" / "samples").iterdir():
            assert (folder / "samples" / path.name).read_bytes() == path.read_bytes(), path.name


def test_signal_while_loading_ends_the_run_at_once(train_script, base, images, tmp_path, monkeypatch, capsys):
    """There is nothing to save yet, and loading may take minutes."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    load_models = train_script.load_models

    def load_models_and_signal(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return load_models(*args)

    monkeypatch.setattr(train_script, "load_models", load_models_and_signal)
    try:
        assert train(train_script, base, images, tmp_path / "out", **EVERYTHING) == 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "train_text_to_image.py: stopped before the first step\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("launched", [True, False])
def test_launcher_that_died_while_loading_is_noticed(
    train_script, base, images, straight, tmp_path, monkeypatch, launched
):
    """Only under a launcher: who starts the script in the background and logs out wants it to go on."""
    load_models, parent = train_script.load_models, [os.getppid()]

    def load_models_and_lose_the_parent(*args):
        parent[:] = [1]
        return load_models(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "load_models", load_models_and_lose_the_parent)
        patch.setattr(os, "getppid", lambda: parent[0])
        if launched:
            patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        status = train(train_script, base, images, tmp_path, **EVERYTHING)
    if not launched:
        assert status == 0
    else:
        assert status == 143
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
        assert train(train_script, base, images, tmp_path, **EVERYTHING, resume_from_checkpoint="latest") == 0
    assert_same_run(tmp_path, straight)


def half_written(straight, folder):
    """Makes a copy of a run that stopped while it wrote checkpoint 9, and one that was moved without progress.json."""
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoint-8")
    for name in ("checkpoint-9", "checkpoint-9.partial"):
        shutil.copytree(folder / "checkpoint-4", folder / name)
        (folder / name / "state.pt").write_bytes(b"half")
    (folder / "checkpoint-9" / "progress.json").unlink()
    return folder


def test_latest_skips_half_written_checkpoints(train_script, base, images, straight, tmp_path, capsys):
    folder = half_written(straight, tmp_path / "out")
    assert train(train_script, base, images, folder, **EVERYTHING, resume_from_checkpoint="latest") == 0
    assert "4 to 8" in capsys.readouterr().out
    assert_same_run(folder, straight)


def test_half_written_checkpoint_by_name_is_refused(train_script, base, images, straight, tmp_path, capsys):
    folder = half_written(straight, tmp_path / "out")
    path = folder / "checkpoint-9"
    assert train(train_script, base, images, folder, **EVERYTHING, resume_from_checkpoint=path) == 2
    message = capsys.readouterr().err
    assert str(path) in message
    assert "no whole checkpoint" in message
    assert len(message.splitlines()) <= 12


def test_checkpoint_by_name_goes_on_in_another_folder(train_script, base, images, straight, tmp_path):
    path = straight / "checkpoint-4"
    assert train(train_script, base, images, tmp_path / "out", **EVERYTHING, resume_from_checkpoint=path) == 0
    assert same(unet(tmp_path / "out"), unet(straight))
    assert read_log(tmp_path / "out") == read_log(straight)[4:]


def test_latest_without_a_checkpoint_starts_from_the_beginning(train_script, base, images, straight, tmp_path):
    assert train(train_script, base, images, tmp_path, **EVERYTHING, resume_from_checkpoint="latest") == 0
    assert_same_run(tmp_path, straight)


@pytest.mark.slow
def test_process_ended_by_a_signal_is_resumed(train_script, base, images, tmp_path):
    """From outside, as a cluster does it: the constant schedule allows any number of steps."""
    settings = {**EVERYTHING, "lr_scheduler": "constant", "lr_warmup_steps": None, "checkpointing_steps": 1000}
    folder = tmp_path / "killed"
    process = start_script(words(base, images, folder, **settings | {"max_train_steps": 1000}))
    wait_for_steps(process, folder, random.randrange(1, 6))
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    (checkpoint,) = folder.glob("checkpoint-*")
    step = len(read_log(folder))
    assert checkpoint.name == f"checkpoint-{step}"
    assert "--resume_from_checkpoint=latest" in said
    settings |= {"max_train_steps": step + 2}
    assert train(train_script, base, images, folder, **settings, resume_from_checkpoint="latest") == 0
    assert train(train_script, base, images, tmp_path / "straight", **settings) == 0
    assert same(unet(folder), unet(tmp_path / "straight"))
    assert read_log(folder) == read_log(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_script_saves_and_ends_when_its_launcher_died(base, images, tmp_path, number):
    """`accelerate launch` hands no signal on: without a look at its parent the script would train on for ever."""
    settings = {**EVERYTHING, "max_train_steps": 100_000, "checkpointing_steps": 100_000}
    process = start_script(words(base, images, tmp_path, **settings), launcher="accelerate")
    wait_for_steps(process, tmp_path, 2)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]  # the script holds the pipe: this waits until it has ended too
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = len(read_log(tmp_path))
    assert checkpoint.name == f"checkpoint-{step}"
    assert json.loads((checkpoint / "progress.json").read_text())["global_step"] == step
    assert f"holds the state after step {step}" in said


@pytest.mark.slow
@pytest.mark.parametrize("num_images, accumulation", [(11, 1), (9, 2)])
def test_two_processes_equal_one(train_script, base, images, tmp_path, num_images, accumulation):
    """The last step of an epoch is short: of 11 images one process has 2 and the other 1; of 9 one has none."""
    data = write_image_folder(tmp_path / "images", num_images, (48, 40))
    settings = {
        "max_train_steps": 10,
        "checkpointing_steps": 5,
        "gradient_accumulation_steps": accumulation,
        "use_ema": True,
        "random_flip": True,
        "caption_dropout": 0.3,
        "lr_scheduler": "cosine",
        "learning_rate": 1e-4,
        "lr_warmup_steps": 2,
    }
    # Without dropout layers: their numbers belong to a process.
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    plain = tmp_path / "base"
    shutil.copytree(base, plain)
    config = json.loads((plain / "unet" / "config.json").read_text())
    (plain / "unet" / "config.json").write_text(json.dumps(config | {"dropout": 0.0}))
    result = run_script(words(plain, data, two, **settings, train_batch_size=2), nproc=2)
    assert result.returncode == 0, result.stderr
    assert train(train_script, plain, data, one, **settings, train_batch_size=4) == 0
    assert "x 2 ranks" in result.stdout
    assert result.stdout.count("Plan\n") == 1  # not once a process
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert [row["lr"] for row in read_log(two)] == [row["lr"] for row in read_log(one)]
    assert len(losses(one)) == 10

    # The checkpoint of two processes goes on in one.
    path = two / "checkpoint-5"
    status = train(
        train_script, plain, data, resumed, **settings, train_batch_size=4, resume_from_checkpoint=path
    )
    assert status == 0
    assert losses(resumed) == pytest.approx(losses(one)[5:], rel=1e-5)
    assert [row["lr"] for row in read_log(resumed)] == [row["lr"] for row in read_log(one)][5:]
