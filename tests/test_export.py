"""A checkpoint becomes the model that the run's end would have written, and the best one is kept for that."""

import json
import os
import shutil

import pytest
import torch
from conftest import load_script
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from image_data import snapshot, write_image_folder
from running import TRAIN_DREAMBOOTH, TRAIN_TEXT_TO_IMAGE_LORA, status_of
from safetensors.torch import load_file
from training import read_log, same, train, trains_into, unet

from sdtune.checkpoints import read_best
from sdtune.commands import evaluate, export, generate
from sdtune.digests import write_digests
from sdtune.lora_layouts import LORA_FILE


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 6)


@pytest.fixture(scope="module")
def lora_script():
    return load_script(TRAIN_TEXT_TO_IMAGE_LORA)


@pytest.fixture
def fit(train_script, tiny_pipeline, images):
    """Trains four steps into a folder, or as the settings say; returns the exit status."""
    return trains_into(train_script, tiny_pipeline, images)


@pytest.fixture(scope="module")
def averaged_run(train_script, tiny_pipeline, images, tmp_path_factory):
    """A run of one step with an average, and its checkpoint. Read only."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    settings = {"use_ema": True, "ema_decay": 0.5, "max_train_steps": 1}
    assert train(train_script, tiny_pipeline, images, folder, **settings) == 0
    return folder


def test_a_checkpoint_becomes_what_a_shorter_run_leaves(fit, tmp_path, capsys):
    """Averaged weights, as that run would have taken them; or on demand those that were trained."""
    settings = {"use_ema": True, "ema_decay": 0.5, "prediction_type": "v_prediction"}
    assert fit(tmp_path / "long", checkpointing_steps=1, **settings) == 0
    assert fit(tmp_path / "short", max_train_steps=2, **settings) == 0
    capsys.readouterr()
    assert status_of(export.main, tmp_path / "long" / "checkpoint-2", tmp_path / "out") == 0
    assert "averaged weights" in capsys.readouterr().out
    there, here = snapshot(tmp_path / "short"), snapshot(tmp_path / "out")
    parts = {name: digest for name, (_, _, digest) in there.items() if name in here}
    assert parts == {name: digest for name, (_, _, digest) in here.items()}
    assert {"model_index.json", "scheduler/scheduler_config.json", "vae/config.json"} <= parts.keys()

    words = [tmp_path / "long" / "checkpoint-2", tmp_path / "trained", "--weights=trained"]
    assert status_of(export.main, *words) == 0
    trained = load_file(tmp_path / "long" / "checkpoint-2" / "unet" / "diffusion_pytorch_model.safetensors")
    assert same(unet(tmp_path / "trained"), trained)
    assert not same(unet(tmp_path / "trained"), unet(tmp_path / "out"))


def test_a_trained_text_encoder_comes_along(tiny_pipeline, images, tmp_path):
    script = load_script(TRAIN_DREAMBOOTH)
    settings = {"train_data_dir": None, "instance_data_dir": images, "instance_prompt": "a sks star"}
    settings |= {"train_text_encoder": True, "checkpointing_steps": 1, "max_train_steps": 2}
    assert train(script, tiny_pipeline, images, tmp_path / "run", **settings) == 0
    assert status_of(export.main, tmp_path / "run" / "checkpoint-2", tmp_path / "out") == 0
    file = "text_encoder/model.safetensors"
    result = load_file(tmp_path / "run" / file)
    assert same(load_file(tmp_path / "out" / file), result)
    assert not same(load_file(tiny_pipeline / file), result)


def test_adapters_of_a_checkpoint_load(lora_script, tiny_pipeline, images, tmp_path):
    fit = trains_into(lora_script, tiny_pipeline, images)
    assert fit(tmp_path / "long", checkpointing_steps=1) == 0
    assert fit(tmp_path / "short", max_train_steps=2) == 0
    checkpoint = tmp_path / "long" / "checkpoint-2"
    assert status_of(export.main, checkpoint, tmp_path / "out") == 0
    assert same(load_file(tmp_path / "out" / LORA_FILE), load_file(tmp_path / "short" / LORA_FILE))
    # As they lie in the checkpoint they load, too.
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipeline.load_lora_weights(checkpoint, weight_name=LORA_FILE)
    assert pipeline.get_active_adapters()
    assert status_of(export.main, checkpoint, tmp_path / "half", "--save_precision=fp16") == 0
    assert {weight.dtype for weight in load_file(tmp_path / "half" / LORA_FILE).values()} == {torch.float16}


def test_parts_of_a_checkpoint_load_by_themselves(fit, tmp_path):
    assert fit(tmp_path, use_ema=True, ema_decay=0.5, max_train_steps=2) == 0
    checkpoint = tmp_path / "checkpoint-2"
    averaged = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet_ema").state_dict()
    assert same(averaged, unet(tmp_path))
    trained = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet").state_dict()
    assert not same(trained, averaged)
    assert json.loads((checkpoint / "unet" / "config.json").read_text())["_name_or_path"] is None


def test_a_checkpoint_is_no_model_yet(fit, lora_script, tiny_pipeline, images, tmp_path, capsys):
    """Of a LoRA's it is told that it goes with a model."""
    fit_lora = trains_into(lora_script, tiny_pipeline, images)
    assert fit(tmp_path / "my run", max_train_steps=1) == 0
    assert fit_lora(tmp_path / "lora", max_train_steps=1) == 0
    whole, adapters = tmp_path / "my run" / "checkpoint-1", tmp_path / "lora" / "checkpoint-1"
    told = f"MODEL={whole}: is a checkpoint of a training; make a model of it by `sdtune export '{whole}' OUTPUT`"
    capsys.readouterr()
    for command, words in ((generate, ["--prompts=a"]), (evaluate, [images, "--clip_model=miniature/clip"])):
        assert status_of(command.main, whole, *words, "--output_dir", tmp_path / "out") == 2
        assert told in capsys.readouterr().err
        assert status_of(command.main, adapters, *words, "--output_dir", tmp_path / "out") == 2
        assert (
            f"MODEL={adapters}: holds LoRA weights; give the model that they were trained on"
            in capsys.readouterr().err
        )
    assert not (tmp_path / "out").exists()


def test_a_base_that_moved_is_named(fit, tiny_pipeline, tmp_path, capsys):
    base = shutil.copytree(tiny_pipeline, tmp_path / "base")
    assert fit(tmp_path / "run", base=base, max_train_steps=1) == 0
    moved = base.rename(tmp_path / "moved")
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert status_of(export.main, checkpoint, tmp_path / "out") == 2
    assert "name the run's base, with PyTorch weights, by --base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert status_of(export.main, checkpoint, tmp_path / "out", f"--base={moved}") == 0
    assert same(unet(tmp_path / "out"), unet(tmp_path / "run"))


def test_mistakes_are_named(fit, tmp_path, capsys):
    assert fit(tmp_path / "run", max_train_steps=1) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert status_of(export.main, tmp_path / "run", tmp_path / "mine", "--overwrite") == 2
    message = capsys.readouterr().err
    assert "is no whole checkpoint" in message
    assert "holds notes.txt" in message
    run, there = tmp_path / "run", f"take {tmp_path / 'run' / 'checkpoint-1'}\n"
    meant = f" (did you mean {run}?); give a folder checkpoint-N of a run\n"
    for wrong, told in (
        (run, f"is no whole checkpoint; {there}"),
        (run / "checkpoint-99", f"does not exist; {there}"),
        (run / "samples", f"does not exist; {there}"),
        (tmp_path / "rum" / "checkpoint-1", f"does not exist{meant}"),
        (tmp_path / "mine", "is no whole checkpoint; give a folder checkpoint-N of a run\n"),
    ):
        assert status_of(export.main, wrong, tmp_path / "out") == 2
        assert capsys.readouterr().err == f"sdtune export: {wrong}: {told}"
    shutil.copytree(run / "checkpoint-1", run / "checkpoint-10")
    shutil.copytree(run / "checkpoint-1", run / "checkpoint-9")
    assert status_of(export.main, run, tmp_path / "out") == 2
    assert f"take {run}/checkpoint-1 or {run}/checkpoint-9 or {run}/checkpoint-10\n" in capsys.readouterr().err
    words = [tmp_path / "run" / "checkpoint-1", tmp_path / "out", "--weights=averaged"]
    assert status_of(export.main, *words) == 2
    assert "has no average" in capsys.readouterr().err


def flip_bit(path):
    """Changes a file without changing its size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, change, told",
    [
        ("unet_ema/diffusion_pytorch_model.safetensors", flip_bit, "the content of {name} has changed since"),
        ("unet/config.json", os.unlink, "{name} is missing"),
        ("args.json", lambda path: os.truncate(path, 3), "{name} has 3 bytes instead of "),
        ("digests.json", os.unlink, "{name} is missing"),
    ],
)
def test_a_damaged_checkpoint_makes_no_model(averaged_run, tmp_path, capsys, name, change, told):
    checkpoint = shutil.copytree(averaged_run / "checkpoint-1", tmp_path / "checkpoint-1")
    change(checkpoint / name)
    assert status_of(export.main, checkpoint, tmp_path / "out") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"{checkpoint}: is damaged ({told.format(name=name)}" in message
    assert message.endswith("; give another checkpoint of the run")
    assert not (tmp_path / "out").exists()


def test_damaged_adapters_make_no_model(lora_script, tiny_pipeline, images, tmp_path, capsys):
    fit = trains_into(lora_script, tiny_pipeline, images)
    assert fit(tmp_path / "run", max_train_steps=1) == 0
    checkpoint = tmp_path / "run" / "checkpoint-1"
    flip_bit(checkpoint / LORA_FILE)
    assert status_of(export.main, checkpoint, tmp_path / "out") == 2
    assert f"is damaged (the content of {LORA_FILE} has changed" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_known", [True, False])
def test_averaged_weights_that_are_gone_are_not_replaced_by_others(averaged_run, tmp_path, capsys, is_known):
    """Unless these are asked for. Digests may say nothing of it, by somebody who knows of them."""
    checkpoint = shutil.copytree(averaged_run / "checkpoint-1", tmp_path / "checkpoint-1")
    shutil.rmtree(checkpoint / "unet_ema")
    told = "is damaged (unet_ema/config.json is missing); give another checkpoint of the run"
    if is_known:
        write_digests(checkpoint)
        told = "lacks the averaged weights of its run (--use_ema); give another checkpoint, or --weights=trained"
    for words in ([], ["--weights=averaged"]):
        assert status_of(export.main, checkpoint, tmp_path / "out", *words) == 2
        assert f"{checkpoint}: {told}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    assert status_of(export.main, checkpoint, tmp_path / "out", "--weights=trained") == 0
    trained = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    assert same(unet(tmp_path / "out"), trained)


def test_the_best_checkpoint_outlives_the_limit(train_script, fit, tmp_path, monkeypatch, capsys):
    """Losses are made to be lowest at step 2, which is not the newest, and not one that would be saved anyway."""
    means = {0: 1.0, 1: 0.9, 2: 0.5, 3: 0.6, 4: 0.7, 5: 0.4, 6: 0.8}
    measured = iter(means.values())

    def measure(accelerator, *_):
        return torch.full((2,), next(measured))

    monkeypatch.setattr(train_script, "held_out_losses", measure)
    settings = {"num_validation_samples": 2, "validation_steps": 1, "checkpointing_steps": 3, "keep_best": True}
    settings |= {"checkpoints_total_limit": 1}
    assert fit(tmp_path, **settings, max_train_steps=4) == 0
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert read_best(tmp_path) == {"step": 2, "held_out_loss": pytest.approx(0.5)}
    # A resumed run remembers it, and finds a better one.
    measured = iter([means[4], means[5], means[6]])
    assert fit(tmp_path, **settings, max_train_steps=6, resume_from_checkpoint="latest") == 0
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert read_best(tmp_path)["step"] == 5
    assert [row["step"] for row in read_log(tmp_path) if "held_out_loss" in row] == [*range(7)]


def test_keeping_the_best_needs_a_measure(fit, tmp_path, capsys):
    assert fit(tmp_path, keep_best=True) == 2
    assert "--keep_best=True: does nothing without --num_validation_samples" in capsys.readouterr().err
